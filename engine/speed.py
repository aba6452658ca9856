"""Decode speed: time per step, and the time that memory alone needs for a step's bytes."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

from lowbit.engine.cache import Cache, position_nbytes
from lowbit.engine.engine import Engine
from lowbit.engine.feed_forward import MixedForward
from lowbit.engine.products import Hidden
from lowbit.engine.runner import Runner
from lowbit.engine.sampler import Features
from lowbit.engine.sampling import Completion

REPEATS = 3
CHECKS = 8
CEILING_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}


@dataclass(frozen=True)
class Speed:
    """A batch's decode speed over `output` tokens after `prompt` tokens.

    ms_per_token  milliseconds per step, including the copy of its tokens to the host
    floor_ms      bytes that a step must read (weights of products, and the cache at its mean length) over read_gbs
    experts       mean number of distinct experts of a layer that a step chose, and whose weights it must read; or None
    read_gbs      memory read bandwidth of this device, GB/s
    memory_gib    weights, cache and workspaces
    """

    batch: int
    prompt: int
    output: int
    ms_per_token: float
    floor_ms: float
    read_gbs: float
    memory_gib: float
    experts: float | None = None

    @property
    def tokens_per_s(self) -> float:
        return self.batch * 1e3 / self.ms_per_token

    @property
    def share_of_floor(self) -> float:
        return self.floor_ms / self.ms_per_token

    def as_row(self) -> dict[str, int | float]:
        """The figures by name, rounded."""
        row: dict[str, int | float] = {
            "batch": self.batch,
            "prompt": self.prompt,
            "output": self.output,
            "ms_per_token": round(self.ms_per_token, 4),
            "tokens_per_s": round(self.tokens_per_s, 1),
            "floor_ms": round(self.floor_ms, 4),
            "share_of_floor": round(self.share_of_floor, 4),
            "memory_gib": round(self.memory_gib, 2),
            "read_gbs": round(self.read_gbs, 1),
        }
        return row if self.experts is None else row | {"experts": round(self.experts, 2)}


def measure(engine: Engine, batch: int, prompt: int, output: int, read_gbs: float) -> Speed:
    """The decode speed of `batch` greedy sequences. No prompt is read: the cache holds zeros, which cost the same."""
    with torch.inference_mode(), engine.spaces.lent() as space:
        runner = space.runner(batch, batch, prompt + output, Features())
        start(runner, batch, prompt)
        runner.advance()
        seconds = statistics.median(run_seconds(runner, batch, prompt, output) for _ in range(REPEATS))
        memory = memory_gib(engine, runner.cache)
        distinct = distinct_experts(runner)
    nbytes = step_bytes(engine, batch, prompt + output / 2, distinct)
    experts = statistics.mean(distinct.values()) if distinct else None
    return Speed(batch, prompt, output, seconds * 1e3 / output, nbytes / read_gbs / 1e6, read_gbs, memory, experts)


@dataclass(frozen=True)
class DraftSpeed:
    """The speed of one sequence at a time with an engine's drafter, and without.

    tokens, steps  written, and decode steps for them
    right          share of right drafts at each place of a step, of those that were checked
    draft_ms, check_ms  milliseconds of a step's drafts, and of their check with the copy of its tokens; where one
                        graph does both, the check is measured alone, and drafts are the rest
    ms, plain_ms   milliseconds a token, prompts included, with drafts and without
    same           True if both texts are the same
    """

    tokens: int
    steps: int
    right: tuple[float, ...]
    draft_ms: float
    check_ms: float
    ms: float
    plain_ms: float
    same: bool

    def as_row(self) -> dict[str, Any]:
        """The figures by name, rounded."""
        row: dict[str, Any] = {"tokens": self.tokens, "steps": self.steps, "same_text": self.same}
        row |= {"tokens_per_step": round(self.tokens / self.steps, 3), "right": [round(x, 3) for x in self.right]}
        row |= {"draft_ms": round(self.draft_ms, 4), "check_ms": round(self.check_ms, 4)}
        return row | {"ms_per_token": round(self.ms, 4), "plain_ms_per_token": round(self.plain_ms, 4)}


def measure_drafts(engine: Engine, prompts: Sequence[Sequence[int]], output: int, **settings: Any) -> DraftSpeed:
    """The speed of `output` tokens after each prompt, one prompt at a time. All are written once before, for graphs."""

    def write(**more: Any) -> tuple[list[Completion], float]:
        for prompt in prompts:
            engine.generate([prompt], max_new_tokens=output, ignore_eos=True, **settings | more)
        costs.forget()
        begin = time.perf_counter()
        found = [
            engine.generate([prompt], max_new_tokens=output, ignore_eos=True, **settings | more)[0]
            for prompt in prompts
        ]
        return found, time.perf_counter() - begin

    costs = engine.spaces.costs
    plain, plain_seconds = write(drafts=0, lookup=0)
    found, seconds = write()
    tokens, steps = sum(len(each.tokens) for each in found), sum(each.steps for each in found)
    places = list(zip_longest(*(each.drafts for each in found), fillvalue=(0, 0)))
    right = tuple(sum(r for _, r in place) / max(sum(c for c, _ in place), 1) for place in places)
    same = [each.tokens for each in found] == [each.tokens for each in plain]
    length = max(map(len, prompts)) + output
    alone = sum(count * check_seconds(engine, *shape, length) for shape, count in costs.followed.items())
    drafting, checking = costs.drafting + costs.following - alone, costs.checking + alone
    times = (1e3 * drafting / steps, 1e3 * checking / steps, 1e3 * seconds / tokens, 1e3 * plain_seconds / tokens)
    return DraftSpeed(tokens, steps, right, *times, same)


def check_seconds(engine: Engine, sequences: int, width: int, length: int) -> float:
    """Seconds of a step that checks drafts and writes none, in the middle of texts of so many positions: the least of
    REPEATS times CHECKS steps."""
    with torch.inference_mode(), engine.spaces.lent() as space:
        assert space.cache is not None
        runner = space.checking(sequences, width, space.cache.batch, length, Features())
        rows = range(sequences * width)
        starts = [runner.cache.start(row // width) for row in rows]
        runner.place([1 + row for row in rows], [length // 2 + row % width for row in rows], starts)

        def run() -> float:
            begin = time.perf_counter()
            for _ in runner.steps(CHECKS):
                pass
            return time.perf_counter() - begin

        run()
        return min(run() for _ in range(REPEATS)) / CHECKS


def start(runner: Runner, batch: int, prompt: int) -> None:
    """Set every sequence to the end of its prompt, each at another token, so that each chooses its own experts."""
    runner.place([1 + b for b in range(batch)], [prompt] * batch, [runner.cache.start(b) for b in range(batch)])


def run_seconds(runner: Runner, batch: int, prompt: int, output: int) -> float:
    """Wall time of `output` steps, with every step's tokens copied to the host."""
    start(runner, batch, prompt)
    synchronize(runner.tokens.device)
    begin = time.perf_counter()
    for _ in runner.steps(output):
        pass
    synchronize(runner.tokens.device)
    return time.perf_counter() - begin


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def distinct_experts(runner: Runner) -> dict[int, int]:
    """The number of distinct experts that the runner's next step chooses in each layer that has experts."""
    decoder, distinct = runner.decoder, {}
    step = decoder.step(runner.tokens, runner.positions, runner.starts)
    x = Hidden(decoder.embed(step))
    for index, (block, turns) in enumerate(zip(decoder.blocks, decoder.turns, strict=True)):
        h = block.attention(x, step, turns, runner.cache)
        if isinstance(block.feed_forward, MixedForward):
            distinct[index] = len(block.feed_forward.chosen_for(h).experts.unique())
        x = block.feed_forward(x if decoder.architecture.parallel else h, h.h)
    return distinct


def step_bytes(engine: Engine, batch: int, length: float, distinct: Mapping[int, int]) -> float:
    """Bytes read by a step with `length` positions in the cache of each of `batch` sequences, which chooses so many
    experts in layers that have some."""
    weights, architecture = engine.decoder.weights, engine.decoder.architecture
    read = sum(
        min(length, layer.window or length) * position_nbytes(architecture, index, weights.dtype, weights.cache.number)
        for index, layer in enumerate(architecture.layers)
    )
    return weights.step_nbytes(distinct) + batch * read


def memory_gib(engine: Engine, cache: Cache) -> float:
    """Memory in use: on a GPU all that torch has reserved, on a CPU weights and cache."""
    device = engine.decoder.weights.device
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device) / 2**30
    return (engine.decoder.weights.nbytes + cache.nbytes) / 2**30


def read_rate(device: torch.device) -> float:
    """The bandwidth in GB/s of a torch reduction over memory larger than any cache: the best of several runs."""
    data = torch.zeros(CEILING_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    best = 0.0
    for _ in range(5):
        synchronize(device)
        begin = time.perf_counter()
        data.sum()
        synchronize(device)
        best = max(best, data.numel() * 4 / (time.perf_counter() - begin) / 1e9)
    return best


def kernels_of_step(engine: Engine, batch: int) -> list[tuple[str, int, float]]:
    """(name, calls, microseconds) of a GPU step's kernels, longest first. Dependent launches overlap."""
    with torch.inference_mode(), engine.spaces.lent() as space:
        runner = space.runner(batch, batch, 1, Features())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            runner.advance()
            torch.cuda.synchronize()
    found = [(event.key, event.count, float(event.self_device_time_total)) for event in profile.key_averages()]
    return sorted((each for each in found if each[2] > 0), key=lambda each: -each[2])
