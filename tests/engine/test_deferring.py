"""Steps with deferred norms against steps with separate norms."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from lowbit import engine
from lowbit.engine.decoder import Decoder
from lowbit.engine.engine import Engine
from lowbit.engine.options import Options
from lowbit.engine.products import HalfNorm, Hidden, Norm, Product
from lowbit.engine.shapes import decoder_shape, random_weights
from lowbit.quant.kernels import ops, wna16_gemv
from lowbit.quant.kernels.problem import Deferred
from lowbit.quant.kernels.weight import Dense, Linear
from lowbit.quant.scheme import parse_scheme
from tests.builders import logits_of
from tests.engine.make import quantized

ROWS, STEPS = 3, 4
TOKENS = torch.tensor([[5, 77, 200, 31], [9, 100, 3, 60], [1, 2, 3, 4]])
# families whose norms can be fused into products, and one without such norms
SHARED = ["llama", "mistral", "qwen2", "qwen3", "phi3"]
NOT_SHARED = ["gemma2", "gemma3", "gpt2", "gpt_neox"]


def decoded(model: Engine, deferring: bool) -> Tensor:
    """Logits (steps, rows, vocabulary) of a batch, a token a step."""
    model.decoder.plan(deferring)
    cache = model.spaces.make_cache(ROWS, STEPS)
    starts = torch.tensor([cache.start(b) for b in range(ROWS)])
    rows = []
    with torch.inference_mode():
        for t in range(STEPS):
            step = model.decoder.step(TOKENS[:, t], torch.full((ROWS,), t), starts)
            rows.append(model.decoder.logits(model.decoder.hidden(step, cache)))
    return torch.stack(rows)


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts of norm kernels, and of products that apply half a norm."""
    counts: dict[str, int] = {}
    with mock.patch.multiple(ops, normalize=mock.DEFAULT, linear_deferring=mock.DEFAULT) as mocks:
        for name, each in mocks.items():
            each.side_effect = ORIGINALS[name]
        yield counts
        counts |= {name: each.call_count for name, each in mocks.items()}


LINEAR = ops.linear
ORIGINALS = {"normalize": ops.normalize, "linear_deferring": ops.linear_deferring}


def strays(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", SHARED)
def test_logits_are_those_of_norms_by_themselves(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    reference = quantized(tmp_path, parse_scheme("int4-g32"), family=family)
    model = engine.load(tmp_path, device="cpu", dtype=dtype)
    with counted() as counts:
        deferred = decoded(model, True)
    # two layers: of five norms a step, only the one behind the embedding is launched
    assert counts == {"normalize": STEPS, "linear_deferring": 4 * STEPS}
    plain, exact = decoded(model, False), logits_of(reference, TOKENS).transpose(0, 1)
    assert not torch.equal(deferred, plain)
    assert strays(deferred, exact) < 1.5 * strays(plain, exact) + torch.finfo(dtype).eps


@pytest.mark.parametrize("family", NOT_SHARED)
def test_other_norms_stay_by_themselves(family: str, tmp_path: Path) -> None:
    quantized(tmp_path, parse_scheme("int4-g32"), family=family)
    model = engine.load(tmp_path, device="cpu", dtype=torch.float16)
    with mock.patch.object(ops, "linear_deferring", side_effect=AssertionError("a norm was begun")):
        deferred = decoded(model, True)
    assert torch.equal(deferred, decoded(model, False))


@pytest.mark.parametrize("method", ["w4", "int8", "w8a8", "dense"])
@pytest.mark.parametrize("head", ["dense", "int8-channel", "int4-g128"])
def test_what_is_packed_or_dense_begins_a_norm(method: str, head: str) -> None:
    shape = decoder_shape(vocabulary=300, hidden=128, inner=256, heads=4, layers=2, kv_heads=2)
    weights = random_weights(shape, method, torch.empty(0, dtype=torch.float16), head)
    model = Engine(Decoder(shape, weights, 32), None, Options(32))
    with counted() as counts:
        deferred = decoded(model, True)
    assert counts["linear_deferring"] == (0 if method == "w8a8" else 4 * STEPS)
    assert strays(deferred, decoded(model, False)) < 0.01


def test_several_rows_pass_from_product_to_product_in_panels() -> None:
    """Four products of each layer read panels, but for the first, whose rows are the embedding's."""
    shape = decoder_shape(vocabulary=300, hidden=128, inner=256, heads=4, layers=2, kv_heads=2)
    weights = random_weights(shape, "w4", torch.empty(0, dtype=torch.float16), "int4-g128")
    model = Engine(Decoder(shape, weights, 32), None, Options(32))
    seen = []
    with mock.patch.object(ops, "linear", side_effect=lambda call: seen.append(call) or LINEAR(call)):
        found = decoded(model, True)
    assert [call.x.ndim for call in seen] == [2, *[3] * 8] * STEPS
    with mock.patch.object(wna16_gemv, "prefers_panels", return_value=False):
        assert torch.equal(decoded(model, True), found)


def test_a_norm_is_taken_by_its_reader_alone() -> None:
    norm, other = (Norm("rms", torch.rand(64).half(), None, 1e-5) for _ in range(2))
    h, linear = torch.randn(2, 64).half(), Linear(Dense(torch.randn(8, 64).half()))
    half = HalfNorm(norm, h * norm.weight, Deferred(h.float().square().view(2, 4, 16).sum(-1), 1e-5))
    hidden = Hidden(h, half)
    product = Product(linear, norm)
    torch.testing.assert_close(product(hidden), product(h), atol=0.03, rtol=0.01)
    for product in (Product(linear, other), Product(linear)):
        assert torch.equal(product(hidden), product(h))


def test_prompts_keep_their_norms(tmp_path: Path) -> None:
    quantized(tmp_path, parse_scheme("int4-g32"))
    model = engine.load(tmp_path, device="cpu", dtype=torch.float16)
    model.decoder.plan(deferring=True)
    with mock.patch.object(ops, "linear_deferring", side_effect=AssertionError("a norm was begun")):
        model.logits(TOKENS)
