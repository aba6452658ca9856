"""`python -m tests.fuzz TARGET --minutes 60`: spoiled inputs for the given time, and their findings.

Findings (what is raised besides our error, more than 10 seconds of processor, more than 1 GiB) go to --findings, a
directory each, with the files and what happened; they become seeds once mended. Inputs are chosen by chance, or with
--guided by the code that they reach, which needs the package `atheris` (`pip install "lowbit[fuzz]"`). --corpus keeps
the inputs that reached new code, and a later run goes on from them.
"""

import argparse
import importlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.targets import TARGETS, Files, inputs
from tests.fuzz.watch import Watch

ROUND = 500  # inputs of one seed: a new round forgets the old one's
LENGTHS = tuple(2**power for power in range(6, 14))  # bytes that guided inputs are drawn from; too few make no input


class Over(Exception):
    """The time is."""


def main() -> None:
    """Fuzz one target, or each in turn, and print counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()) / "lowbit-findings")
    parser.add_argument("--guided", action="store_true", help="by coverage; one target")
    parser.add_argument("--corpus", type=Path, help="of --guided: read and kept in this directory")
    options = parser.parse_args()
    names = list(TARGETS) if options.target == "all" else [options.target]
    for name in names:
        with tempfile.TemporaryDirectory() as work:
            watch = Watch(name, Path(work), options.findings)
            end = time.monotonic() + 60 * options.minutes
            if options.guided:
                guided(name, Path(work), watch, end, options.corpus or Path(work) / "corpus")
            fuzz(name, Path(work), watch, end)
            print(watch.summary(), flush=True)
    sys.exit(0)


def fuzz(name: str, work: Path, watch: Watch, end: float) -> None:
    """Rounds of inputs until `end`."""
    while time.monotonic() < end:

        @seed(random.getrandbits(64))
        @settings(
            max_examples=ROUND,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(inputs(name, work / "honest"))
        def one_round(found: tuple[str, Files]) -> None:
            if time.monotonic() > end:
                raise Over
            watch.attempt(*found)

        try:
            one_round()
        except Over:
            return


def guided(name: str, work: Path, watch: Watch, end: float, corpus: Path) -> None:
    """Inputs until `end` that libFuzzer mutates towards branches of ours not seen before. Ends the process.

    corpus  where libFuzzer reads its first inputs, and writes each that reached new code
    """
    atheris = importlib.import_module("atheris")

    @settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(inputs(name, work / "honest"))
    def one(found: tuple[str, Files]) -> None:
        watch.attempt(*found)

    def attempt(data: bytes) -> None:
        if time.monotonic() > end:  # libFuzzer never returns
            print(watch.summary(), flush=True)
            os._exit(0)
        one.hypothesis.fuzz_one_input(data)

    for module in [module for name, module in sys.modules.items() if name.startswith("lowbit.")]:
        instrument(module, atheris.instrument_func)
    corpus.mkdir(parents=True, exist_ok=True)
    for length in LENGTHS:
        (corpus / str(length)).write_bytes(random.randbytes(length))
    flags = ("-rss_limit_mb=0", "-timeout=0", "-len_control=0", f"-max_len={max(LENGTHS)}")
    atheris.Setup([sys.argv[0], *flags, str(corpus)], attempt)
    atheris.Fuzz()


def instrument(module: ModuleType, trace: Callable[[Any], Any]) -> None:
    """Have every function and method that `module` defines tell the branches it takes."""
    holders = [module, *(value for value in vars(module).values() if isinstance(value, type))]
    for holder in holders:
        for function in list(vars(holder).values()):
            if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                trace(function)


if __name__ == "__main__":
    main()
