"""`python -m tests.fuzz TARGET --minutes 60`: spoiled inputs for as long as is asked, and what they brought to light.

Findings (what is raised besides our error, more than 10 seconds, more than 1 GiB) go to --findings, a directory each,
with the files and what happened; they become seeds once mended. With `atheris` installed inputs are chosen by the code
that they reach; without it by chance.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.targets import TARGETS, Files, inputs
from tests.fuzz.watch import Watch

ROUND = 500  # inputs of one seed: a new round forgets the old one's


class Over(Exception):
    """The time is."""


def main() -> None:
    """Fuzz one target, or each in turn, and print counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()) / "lowbit-findings")
    options = parser.parse_args()
    names = list(TARGETS) if options.target == "all" else [options.target]
    for name in names:
        with tempfile.TemporaryDirectory() as work:
            watch = Watch(name, Path(work), options.findings)
            fuzz(name, Path(work), watch, time.monotonic() + 60 * options.minutes)
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


if __name__ == "__main__":
    main()
