"""The demo model itself, quantized to int8 and read by transformers."""

import math

import pytest
import torch

from lowbit.calibrate.data import builtin_text
from lowbit.evaluation.backend import open_backend
from lowbit.evaluation.perplexity import difference, perplexity
from lowbit.evaluation.text import Protocol, cut
from lowbit.models.source import open_source
from tests.e2e.cli import run_quantize

WINDOWS, CONTEXT = 2, 256


@pytest.mark.demo
@pytest.mark.peer
def test_int8_of_the_demo_model_is_read_by_transformers_as_by_us(demo_model, tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    done = run_quantize(demo_model, "--method", "int8", "--eval-windows", 0, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    source = open_source(str(tmp_path / "out"))
    text = builtin_text("heldout")[: WINDOWS * CONTEXT * 12]
    windows = cut(text, source, Protocol(CONTEXT, windows=WINDOWS))
    ours = perplexity(open_backend("blocks", source, "cpu"), windows)
    original = perplexity(open_backend("blocks", open_source(str(demo_model)), "cpu"), windows)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.tensor(source.tokenizer()(text).input_ids)[: WINDOWS * CONTEXT].view(WINDOWS, CONTEXT)
    with torch.no_grad():
        losses = [float(theirs(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in ids]
    assert math.exp(sum(losses) / WINDOWS) == pytest.approx(ours.perplexity, rel=0.01)
    assert abs(difference(ours, original)[0]) < 0.005
