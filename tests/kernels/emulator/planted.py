"""Libraries of the emulator with planted mistakes, which the checks must find."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.emulator import build
from tests.kernels.emulator.build import Mutant
from tests.kernels.emulator.device import failure_of


def built(mutant: Mutant | None = None, only: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> Path:
    """The library of build.build; skips where it cannot be built."""
    if reason := build.reason_against():
        pytest.skip(f"no emulator: {reason}")
    return build.build(mutant, only, without)


def require_found(mistake: object, broken: Path, check: Callable, *args: Any, expected: str = "AssertionError") -> None:
    """Fail if check(gpu, *args) passes on the library with the mistake, or fails otherwise than as expected.

    expected  words of the failure, one of several between bars
    """
    failure = failure_of(broken, check, *args)
    assert failure is not None, f"{mistake} passed every check"
    assert any(words in failure for words in expected.split("|")), failure
