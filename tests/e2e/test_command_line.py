"""The options of `quantize`: common aliases, --dry-run, and messages about mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.builders import save_family
from tests.e2e.cli import names, run_quantize

SLOW = ["--method", "awq", "--group-size", "32", "--num-samples", "64", "--seqlen", "256", "--eval-windows", "0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_family("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--w-bit", 8], "bits = 8"),
        (["--w_bit", 8], "bits = 8"),
        (["--wbits", 8], "bits = 8"),
        (["--q-group-size", 64], "group_size = 64"),
        (["--q_group_size", 64], "group_size = 64"),
        (["--group_size", 64], "group_size = 64"),
        (["--groupsize", 64], "group_size = 64"),
        (["--group-size", -1], "group_size = -1"),
        (["--nsamples", 7], "num_samples = 7"),
        (["--calib-size", 7], "num_samples = 7"),
        (["--num-calibration-samples", 7], "num_samples = 7"),
        (["--max-seq-length", 99], "seqlen = 99"),
        (["--calib-seq", 99], "seqlen = 99"),
        (["--sym"], "symmetric = true"),
        (["--asym"], "symmetric = false"),
        (["--max-shard-size", "1.5GB"], "max_shard_size = 1500000000"),
        (["--max_shard_size", "20"], "max_shard_size = 20"),
        (["--seed", 5], "seed = 5"),
        (["--ignore", "lm_head,layers.0.mlp.down_proj"], '"layers.0.mlp.down_proj"'),
        (["--ignore", "lm_head", "--ignore", "o_proj"], '"o_proj"'),
        (["--ignore-layers", "lm_head"], '"lm_head"'),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_aliases_reach_the_recipe(model, flags, line):
    done = run_quantize(model, *flags, "--dry-run")
    assert done.code == 0, done.err
    assert line in done.out


@pytest.mark.parametrize("way", [[], ["--model"], ["-m"], ["--model-path"], ["--model_path"]])
def test_ways_to_name_the_model(model, way):
    assert run_quantize(*way, model, "--dry-run").code == 0


def test_a_dry_run_says_the_plan_and_writes_nothing(model, tmp_path):
    done = run_quantize(model, "--group-size", 32, "--dry-run", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "int4-g32 (14 linears)" in done.out
    assert "coverage 100.00%" in done.out
    assert names(tmp_path) == []


def test_an_unknown_option(model):
    done = run_quantize(model, "--grup-size", 32)
    assert done.code == 2
    assert "--grup-size" in done.err
    assert "--group-size" in done.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "name a model"),
        (["a", "--model", "b"], "two models named"),
        (["a"], "--output DIR"),
        (["a", "--bits", "four"], "four"),
        (["a", "--max-shard-size", "5XB"], "is no size"),
        (["a", "--max-shard-size", "0"], "is no size"),
    ],
)
def test_a_mistake_in_the_command(args, message):
    done = run_quantize(*args)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err


def test_help_and_version_as_installed():
    """The console script itself, in a separate process."""
    script = Path(sys.executable).with_name("quantize")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--group-size" in done.stdout
    assert not done.stderr


def started(model: Path, output: Path) -> subprocess.Popen[str]:
    """A run of quantize in a separate process, in the middle of its work."""
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a background shell ignores it
    code += "; from lowbit.commands.quantize import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(model), *SLOW, "-o", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    end = time.monotonic() + 120
    while not list(output.parent.glob(f".{output.name}.partial-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(model, tmp_path, number):
    process = started(model, tmp_path / "out")
    process.send_signal(number)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130
    kept = "Finished blocks of a method with calibration are kept: see --resume."
    assert complaint.strip() == f"Interrupted; nothing was written. {kept}"
    assert set(names(tmp_path)) <= {".out.journal"}


def test_killed(model, tmp_path):
    """A killed run cannot clean up: its remains do not look finished, and the next run removes them."""
    process = started(model, tmp_path / "out")
    process.kill()
    process.communicate(timeout=60)
    assert not (tmp_path / "out").exists()
    (partial,) = (path for path in tmp_path.iterdir() if path.name not in (".out.journal", ".out.lock"))
    assert partial.name.startswith(".out.partial-")
    assert not (partial / "config.json").exists()
    done = run_quantize(model, "--method", "int8", "--eval-windows", 0, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert names(tmp_path) == ["out"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
