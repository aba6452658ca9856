"""The short, fixed part of the fuzzing: what was found before, and a few spoiled inputs for each target.

`python -m tests.fuzz TARGET --minutes 60` is the long part.
"""

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.targets import SEEDS, TARGETS, Files, attempt, honest, inputs

FOUND = sorted(path.name for path in (SEEDS / "found").iterdir())
FEW = {"report": 3, "engine": 10, "config": 20, "tokenizer": 20, "convert": 15, "free": 15}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("honest")


@pytest.mark.parametrize("seed", FOUND)
def test_what_was_found_stays_mended(seed, base, tmp_path):
    """Refused with our error, or read, within ten seconds."""
    name = seed.partition("-")[0]
    files = {path.name: path.read_bytes() for path in (SEEDS / "found" / seed).iterdir()}
    model = files.pop("model").decode()
    begun = time.monotonic()
    attempt(TARGETS[name], honest(name, base)[model], files, tmp_path / "spoiled")
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("name", TARGETS)
def test_spoiled_inputs_are_read_or_refused(name, base, tmp_path):
    once = settings(
        max_examples=FEW.get(name, 60),
        derandomize=True,
        deadline=10_000,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    @once
    @given(inputs(name, base))
    def read(found: tuple[str, Files]) -> None:
        model, files = found
        attempt(TARGETS[name], honest(name, base)[model], files, tmp_path / "spoiled")

    read()


def test_an_honest_input_is_read(base, tmp_path):
    """The targets' readers accept undamaged files: otherwise every damaged input would pass for the wrong reason."""
    for name, target in TARGETS.items():
        if name == "tokenless":
            continue
        for model in honest(name, base).values():
            content = {"x.json": b"{}"} if name == "json" else {}
            attempt(target, model, content, tmp_path / "whole", strict=True)
