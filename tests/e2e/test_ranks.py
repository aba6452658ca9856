"""Several ranks under torchrun write the same files as one; if one rank fails, all end with its message."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.calibrate import ranks
from lowbit.calibrate.pipeline import run
from lowbit.calibrate.report import BlockReport
from lowbit.calibrate.resume import journal_of, journaled
from lowbit.errors import CheckpointError
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.formats import LogicalTensors
from tests.builders import make_tokenizer, save_family
from tests.e2e.cli import names
from tests.e2e.several import LENGTH, RECIPES, SAMPLES, job_of, quantize_all

ROOT = Path(__file__).parents[2]
# Summation order differs, so float32 rounding does, and a code at a tie may too.
EQUAL_CODES, WEIGHT_ERROR = 0.999, 1e-2
KEPT_ERROR = 1e-5


def torchrun(*args: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """A program under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*command, *map(str, args)],
        cwd=ROOT,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@dataclass(frozen=True)
class Outputs:
    """Output directories of a run with one process, and of one with several."""

    alone: Path
    together: Path

    def report(self, recipe: str) -> tuple[dict, dict]:
        """The two reports of a recipe."""
        texts = ((side / recipe / "quantization_report.json").read_text() for side in (self.alone, self.together))
        alone, together = map(json.loads, texts)
        return alone, together


class Killed(BaseException):
    """A stand-in for a signal."""


def stop_after_a_block(source: Path, output: Path, device: str) -> None:
    """Leave the journal of a gptq run that was killed after its first block."""
    job, tokens = job_of("gptq", source, device)
    output.mkdir(parents=True)

    def on_block(report: BlockReport) -> None:
        raise Killed

    with pytest.raises(Killed), journaled(output, job, tokens, resume=False) as journal:
        run(job, output, tokens, on_block, journal)
    assert "block-00000.json" in names(journal_of(output))


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def outputs(request, tmp_path_factory) -> Outputs:
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU: NCCL needs one for each process")
    directory = tmp_path_factory.mktemp("ranks")
    source = save_family("llama", directory / "llama")
    quantize_all(source, directory / "alone", request.param)
    stop_after_a_block(source, directory / "together" / "gptq", request.param)
    done = torchrun("tests/e2e/several.py", source, directory / "together", request.param)
    assert done.returncode == 0, done.stderr
    return Outputs(directory / "alone", directory / "together")


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_write_what_one_writes(outputs, recipe):
    check_alike(outputs, recipe)


def test_experts_are_shared_out(tmp_path):
    """Each process takes its own experts together."""
    source, some = save_family("qwen3_moe", tmp_path / "source"), ["awq", "gptq"]
    quantize_all(source, tmp_path / "alone", "cpu", some)
    done = torchrun("tests/e2e/several.py", source, tmp_path / "together", "cpu", *some)
    assert done.returncode == 0, done.stderr
    found = Outputs(tmp_path / "alone", tmp_path / "together")
    for recipe in some:
        check_alike(found, recipe)
        alone, together = found.report(recipe)
        assert [block["linears"].keys() for block in alone["blocks"]] == [
            block["linears"].keys() for block in together["blocks"]
        ]


def check_alike(outputs: Outputs, recipe: str) -> None:
    """Files of one process and of two differ as other orders of summation explain."""
    alone, together = (LogicalTensors(open_checkpoint(side / recipe)) for side in (outputs.alone, outputs.together))
    assert together.names == alone.names
    assert together.schemes == alone.schemes
    equal = []
    for name in alone.names:
        wanted, found = alone.read(name).float(), together.read(name).float()
        linear = name.removesuffix(".weight")
        if linear in alone.schemes:
            equal.append((alone.qtensor(linear).codes == together.qtensor(linear).codes).float().mean())
            assert (found - wanted).norm() <= WEIGHT_ERROR * wanted.norm()
        else:
            assert (found - wanted).norm() <= KEPT_ERROR * wanted.norm()
    assert torch.stack(equal).mean() >= EQUAL_CODES


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "rtn"])
def test_reports_count_the_tokens_of_all(outputs, recipe):
    alone, together = outputs.report(recipe)
    counts = [
        [row["tokens"] for b in report["blocks"] for row in b["linears"].values()] for report in (alone, together)
    ]
    assert counts[0] == counts[1]
    if recipe != "gptq":
        assert set(counts[0]) <= {SAMPLES * LENGTH}
    assert together["distilled"] == pytest.approx(alone["distilled"], rel=1e-3)


def test_one_writes_and_the_journal_goes(outputs):
    assert names(outputs.together) == sorted(RECIPES)


@pytest.mark.parametrize(("device", "own"), [("cuda", 2), ("cuda:1", 0)])
def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch, device, own):
    monkeypatch.setattr(ranks, "count", lambda: 3)
    monkeypatch.setattr("torch.distributed.get_node_local_rank", lambda: own)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(CheckpointError, match=f"device '{device}' for local rank {own} .* 2 GPUs.*--nproc-per-node 2"):
        ranks.own_device(device)
    assert ranks.own_device("cpu") == "cpu"


def test_an_error_in_one_process_ends_all_with_its_message(tmp_path):
    """A window has a token whose embedding overflows in the norm; only one of two ranks reads that window."""
    source = save_family("gpt2", tmp_path / "gpt2")
    tensors = load_file(source / "model.safetensors")
    tensors["transformer.wte.weight"][make_tokenizer().convert_tokens_to_ids("#")] = 3e38
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    text = tmp_path / "text.txt"
    text.write_text("a#" + "word " * SAMPLES * LENGTH)
    program = tmp_path / "program.py"
    program.write_text("from lowbit.commands.quantize import main\n\nmain()\n")
    flags = ["--method", "gptq", "--group-size", 32, "--num-samples", SAMPLES, "--seqlen", LENGTH, "--dataset", text]
    done = torchrun(program, source, "-o", tmp_path / "out", *flags)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error")]
    assert "its inputs are NaN or infinite for calibration samples" in line
    assert "Interrupted" not in done.stderr
    assert "calibrate" not in done.stderr.replace(line, "")
    assert not [name for name in names(tmp_path) if "out" in name and "journal" not in name]
