"""A file system of 200 kB that really is full; skipped if mounting one is not allowed."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowbit.calibrate.job import prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.calibrate.pipeline import run
from lowbit.errors import CheckpointError
from lowbit.export.staging import staged
from lowbit.models.source import open_source
from tests.builders import calibration, save_family
from tests.e2e.cli import names


@pytest.fixture
def tiny_disk(tmp_path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "lowbit-test", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("method", ["int8", "awq"])
def test_a_full_disk_leaves_nothing(tiny_disk, tmp_path, method):
    source = save_family("llama", tmp_path / "source")
    job = prepare(open_source(str(source)), complete_recipe({"method": method}), "cpu")
    tokens = calibration() if method == "awq" else None
    with pytest.raises(CheckpointError, match="disk is full"), staged(tiny_disk / "out", overwrite=False) as staging:
        run(job, staging, tokens, lambda report: None)
    assert names(tiny_disk) == []
