"""export/limits.py: memory and time of a library in this process."""

import resource
import signal
import threading

import pytest

from lowbit.export.limits import Exceeded, limited

MIB = 1 << 20


def test_memory_beyond_the_limit_is_refused_and_the_limit_ends_with_the_context():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(Exceeded, match="it takes more than 64 MiB or 5 s"), limited("it", 64 * MIB, 5):
        bytearray(1024 * MIB)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    with limited("it", 64 * MIB, 5):
        assert len(bytearray(MIB)) == MIB


def test_processor_time_beyond_the_limit_is_refused_whatever_is_caught_inside():
    before = signal.getsignal(signal.SIGPROF)

    def loop() -> None:
        while True:
            try:
                sum(range(1000))
            except Exception:  # noqa: BLE001  # as libraries do
                continue

    with pytest.raises(Exceeded, match=r"it takes more than 64 MiB or 0\.2 s"), limited("it", 64 * MIB, 0.2):
        loop()
    assert signal.getsignal(signal.SIGPROF) == before
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_another_error_passes_and_other_threads_have_no_clock():
    with pytest.raises(RuntimeError, match="of its own"), limited("it", 64 * MIB, 5):
        raise RuntimeError("of its own")
    found = []

    def work() -> None:
        with limited("it", 64 * MIB, 1e-9):
            found.append(sum(range(10_000)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [49_995_000]


def test_an_inner_limit_leaves_the_outer_one():
    def loop() -> None:
        with limited("inner", 64 * MIB, 5):
            sum(range(1000))
        while True:
            sum(range(1000))

    reason = r"outer takes more than 64 MiB or 0\.3 s: why"
    with pytest.raises(Exceeded, match=reason), limited("outer", 64 * MIB, 0.3, "why"):
        loop()
