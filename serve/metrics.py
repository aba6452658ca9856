"""Metrics for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lowbit.serve.answers import Choice
from lowbit.serve.session import Session

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
STEPS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1)


class Metrics:
    """The server's metrics, in a registry of their own."""

    def __init__(self, session: Session) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("lowbit_requests", "Answered requests", ["path", "status"], registry=registry)
        self.prompt = Counter("lowbit_prompt_tokens", "Tokens of prompts", registry=registry)
        self.cached = Counter("lowbit_cached_prompt_tokens", "Those of them that were in the cache", registry=registry)
        self.written = Counter("lowbit_generated_tokens", "Generated tokens", registry=registry)
        self.first = Histogram(
            "lowbit_first_token_seconds", "Time to a choice's first token", buckets=SECONDS, registry=registry
        )
        self.next = Histogram(
            "lowbit_next_token_seconds", "Time between a choice's tokens", buckets=STEPS, registry=registry
        )
        gauges = {
            "lowbit_running": ("Requests in the batch", lambda: len(session.batch.jobs)),
            "lowbit_waiting": ("Requests in the queue", lambda: len(session.queue)),
            "lowbit_slots": ("Most requests in the batch", lambda: len(session.batch.slots.all)),
        }
        for name, (text, count) in gauges.items():
            Gauge(name, text, registry=registry).set_function(count)

    def count(self, choice: Choice) -> None:
        """Count a choice's tokens."""
        self.prompt.inc(choice.read)
        self.cached.inc(choice.cached)
        self.written.inc(choice.written)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return bytes(generate_latest(self.registry))
