"""benchmarks/llamacpp.py: the losses of windows from the perplexities that llama-perplexity prints so far."""

import math
from pathlib import Path

import pytest
import torch

from benchmarks.bench_gguf import apart, perplexity
from benchmarks.llamacpp import window_losses


def program(place: Path, said: str) -> Path:
    made = place / "llama-perplexity"
    made.write_text(f"#!/bin/sh\nprintf '{said}'\n")
    made.chmod(0o755)
    return place


def test_windows_are_told_apart(tmp_path):
    losses = torch.tensor([3.0, 3.5, 2.0], dtype=torch.float64)
    so_far = [math.exp(float(losses[:count].mean())) for count in (1, 2, 3)]
    said = "".join(f"[{window}]{value:.4f}," for window, value in enumerate(so_far, 1))
    found = window_losses(program(tmp_path, said), tmp_path / "model.gguf", tmp_path / "text", 512, 3, 1)
    torch.testing.assert_close(found, losses, atol=1e-4, rtol=0)
    assert perplexity(found) == pytest.approx(so_far[-1], abs=1e-3)


def test_a_run_that_ends_early_is_refused(tmp_path):
    place = program(tmp_path, "[1]20.0,[2]21.0,")
    with pytest.raises(SystemExit, match="failed"):
        window_losses(place, tmp_path / "model.gguf", tmp_path / "text", 512, 3, 1)


def test_a_difference_has_the_error_of_its_windows():
    ours = torch.tensor([3.0, 2.0, 4.0, 3.0], dtype=torch.float64)
    shift = torch.tensor([0.01, 0.03, 0.01, 0.03], dtype=torch.float64)
    found = apart(ours + shift, ours, "relative")
    assert found == {"relative": round(math.expm1(0.02), 5), "relative_se": round(float(shift.std()) / 2, 5)}
