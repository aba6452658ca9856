"""lowbit/ahead.py: overlapped work, in order, bounded, and with its errors."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from lowbit.ahead import Behind, ahead, one_thread


def test_results_come_in_order_and_few_are_held_at_once() -> None:
    begun: list[int] = []

    def double(value: int) -> int:
        begun.append(value)
        time.sleep(0.002 * (5 - value % 5))
        return 2 * value

    found = []
    with ahead(double, range(20), workers=3) as doubled:
        for index, value in enumerate(doubled):
            assert max(begun) <= index + 4
            found.append(value)
    assert found == [2 * value for value in range(20)]


def test_an_error_comes_in_its_place() -> None:
    with ahead(lambda value: 1 // value, [1, 0, 1]) as results:
        assert next(results) == 1
        with pytest.raises(ZeroDivisionError):
            next(results)


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads")
def test_whoever_stops_early_leaves_no_thread_and_torch_its_own() -> None:
    """Also while the error that ended it is still held: its traceback keeps every frame."""
    before = threading.active_count()

    def stop() -> None:
        with ahead(abs, range(100), workers=2) as results:
            raise InterruptedError(next(results), torch.get_num_threads())

    with pytest.raises(InterruptedError) as held:
        stop()
    assert held.value.args == (0, 2)
    assert (threading.active_count(), torch.get_num_threads()) == (before, 4)


@pytest.mark.usefixtures("four_threads")
def test_one_thread_also_of_the_workers_within() -> None:
    def threads(_: int) -> int:
        return torch.get_num_threads()

    with one_thread(), ahead(threads, range(3), workers=3) as found:
        assert [torch.get_num_threads(), *found] == [1, 1, 1, 1]
    assert torch.get_num_threads() == 4


def test_what_is_given_runs_in_order_one_at_a_time() -> None:
    done: list[int] = []

    def slow(value: int) -> None:
        time.sleep(0.01)
        done.append(value)

    with Behind() as behind:
        for value in range(4):
            behind(slow, value)
            assert len(done) >= value  # all before it has run
    assert done == [0, 1, 2, 3]


def fail() -> None:
    raise ZeroDivisionError


def test_an_error_behind_stops_the_work_before_it() -> None:
    behind = Behind()
    behind(fail)
    with pytest.raises(ZeroDivisionError):
        behind(print)
    behind.__exit__(None)


def test_an_error_behind_comes_at_the_end_unless_there_is_another() -> None:
    behind = Behind()
    behind(fail)
    with pytest.raises(ZeroDivisionError):
        behind.__exit__(None)
    other = Behind()
    other(fail)
    other.__exit__(KeyError)
