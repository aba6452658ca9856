"""lowbit/ahead.py: overlapped work, in order, bounded, and with its errors."""

import threading
import time

import pytest

from lowbit.ahead import Behind, ahead


def test_results_come_in_order_and_few_are_held_at_once() -> None:
    begun: list[int] = []

    def double(value: int) -> int:
        begun.append(value)
        time.sleep(0.002 * (5 - value % 5))
        return 2 * value

    found = []
    for index, value in enumerate(ahead(double, range(20), workers=3)):
        assert max(begun) <= index + 4
        found.append(value)
    assert found == [2 * value for value in range(20)]


def test_an_error_comes_in_its_place() -> None:
    results = ahead(lambda value: 1 // value, [1, 0, 1])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_whoever_stops_early_leaves_no_thread() -> None:
    before = threading.active_count()
    results = ahead(abs, range(100), workers=2)
    next(results)
    results.close()
    assert threading.active_count() == before


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
