"""Scales of few bits: their numbers, one divisor for a set, and the search that chooses them."""

from dataclasses import replace

import pytest
import torch

from lowbit.quant import numerics
from lowbit.quant.algos.clip import plain_shrink, search_shrink
from lowbit.quant.algos.gptq import gptq, output_loss
from lowbit.quant.algos.learned import LearnedWeight
from lowbit.quant.naming import parent_set
from lowbit.quant.numbers import E8M0, FP4, FP8
from lowbit.quant.qtensor import QTensor, round_to_nearest
from lowbit.quant.scheme import NAMED, Scheme, parse_scheme

WEIGHTS = [parse_scheme(name) for name in ("fp8-block-a16", "nvfp4-a16", "mxfp4-a16", "mxfp8-a16")]
NVFP4 = parse_scheme("nvfp4-a16")


def weight(n: int = 128, k: int = 256, seed: int = 0) -> torch.Tensor:
    """A weight whose groups have ranges of their own."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(n, k // 16, 1, generator=generator)).expand(-1, -1, 16).reshape(n, k)
    return torch.randn(n, k, generator=generator) * spread / 20


def test_fp4_rounds_to_the_even_code():
    values = [0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 9.0, -0.25, -5.0, -7.0]
    wanted = [0.0, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, -0.0, -4.0, -6.0]
    assert FP4.decode(FP4.encode(torch.tensor(values))).tolist() == wanted


def test_scales_round_to_their_numbers():
    exact = torch.tensor([0.0, 2.0**-127, 1.4, 1.6, 3.0, 2.0**127])
    assert numerics.coarse_scale(exact, E8M0).tolist() == [1.0, 2.0**-127, 1.0, 2.0, 4.0, 2.0**127]
    exact = torch.tensor([0.0, 1e-9, 2**-9, 1.0, 1.06, 1.07, 17.0, 400.0, 1e6])
    assert numerics.coarse_scale(exact, FP8).tolist() == [1.0, 2**-9, 2**-9, 1.0, 1.0, 1.125, 16.0, 384.0, 448.0]


@pytest.mark.parametrize("scheme", WEIGHTS, ids=str)
def test_every_rounder_rounds_to_the_grid(scheme):
    w = weight()
    x = torch.randn(2048, 256) @ (torch.eye(256) + torch.randn(256, 256) / 16)
    moment = x.T @ x / len(x)
    nearest = round_to_nearest(w, scheme, torch.bfloat16)
    searched = round_to_nearest(w, scheme, torch.bfloat16, plain_shrink(w, scheme, torch.bfloat16))
    assert float((searched.dequantize() - w).norm()) <= float((nearest.dequantize() - w).norm())
    fitted = gptq(w, moment, scheme, torch.bfloat16)
    assert fitted.loss < 0.7 * output_loss(searched, w, moment)
    learned = LearnedWeight(nearest, numerics.in_parts(w, scheme)[0])
    assert torch.equal(learned.rounded().dequantize(), nearest.dequantize())
    for found in (nearest, searched, fitted.weight, learned.rounded()):
        assert tuple(found.scales.shape) == scheme.sides(*w.shape)
        assert found.nbytes == pytest.approx(w.numel() * scheme.bits_per_weight(256) / 8)


def test_a_block_has_the_largest_of_its_weights():
    w = weight(256, 384)
    found = round_to_nearest(w, parse_scheme("fp8-block"), torch.float32)
    wanted = w.view(2, 128, 3, 128).abs().amax((1, 3)) / 448
    torch.testing.assert_close(found.scales, wanted)
    assert float((found.dequantize() - w).abs().max()) <= float(w.abs().max()) / 16 + 1e-6
    cut = QTensor(found.codes[:200, :300].contiguous(), found.scales, None, found.scheme)
    assert torch.equal(cut.dequantize(), found.dequantize()[:200, :300])


def test_four_over_six_and_its_kin_are_found():
    """A group whose weights fit 4 times a scale exactly gets that scale."""
    w = torch.tensor([[4.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.0, -4.0] * 2]) / 8
    divisor = numerics.divisor_of(w.abs().amax(), NVFP4.weights) * 2  # leaves room for 1.5 times the scale
    plain = round_to_nearest(w, NVFP4, torch.bfloat16, divisor=divisor)
    shrink = search_shrink(w, NVFP4, torch.bfloat16, None, divisor)
    found = round_to_nearest(w, NVFP4, torch.bfloat16, shrink, divisor)
    assert float((plain.dequantize() - w).abs().max()) > 0
    assert float(shrink) == 1.5 if float(plain.scales) * 1.5 <= 448 else True
    assert float((found.dequantize() - w).norm()) <= float((plain.dequantize() - w).norm())


def test_inputs_weigh_the_search():
    w, k = weight(32, 64), 64
    loud = torch.full((k,), 1e-4)
    loud[::16] = 1.0
    moments = torch.diag_embed(loud.view(4, 16))
    for_loud = round_to_nearest(w, NVFP4, torch.bfloat16, search_shrink(w, NVFP4, torch.bfloat16, moments))
    for_all = round_to_nearest(w, NVFP4, torch.bfloat16, plain_shrink(w, NVFP4, torch.bfloat16))

    def loss(found: QTensor) -> float:
        return float(((found.dequantize() - w).square() * loud).sum())

    assert loss(for_loud) < 0.8 * loss(for_all)


def test_a_divisor_may_be_shared():
    small, large = weight(16, 64) / 50, weight(16, 64, seed=1)
    divisor = numerics.divisor_of(torch.maximum(small.abs().amax(), large.abs().amax()), NVFP4.weights)
    alone, shared = (round_to_nearest(small, NVFP4, torch.bfloat16, divisor=each) for each in (None, divisor))
    assert torch.equal(shared.divisor, divisor)
    assert float(alone.divisor) > float(shared.divisor)
    assert float((shared.dequantize() - small).norm() / small.norm()) < 0.12
    assert torch.equal(shared.to("cpu").dequantize(), shared.dequantize())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divisor": None}, "a divisor of scales is required"),
        ({"divisor": torch.tensor(0.0)}, "its divisor of scales is 0.0; one finite, positive number"),
        ({"divisor": torch.tensor(float("nan"))}, "its divisor of scales is nan"),
        ({"divisor": torch.tensor([1.0, 2.0])}, "its divisor of scales is"),
        ({"scales": torch.zeros(4, 4, dtype=torch.bfloat16)}, "scale is zero"),
        ({"scales": torch.full((4, 4), float("nan"), dtype=torch.bfloat16)}, "not finite"),
        ({"scales": torch.full((4, 4), 1.0625, dtype=torch.bfloat16)}, "a scale is no fp8"),
        ({"scales": torch.ones(4, 2, dtype=torch.bfloat16)}, r"scales have shape \(4, 2\), not \(4, 4\)"),
        ({"scheme": parse_scheme("nvfp4")}, "an input scale is required"),
        ({"scheme": parse_scheme("mxfp4-a16"), "scales": torch.ones(4, 2)}, "a divisor of scales is required"),
        ({"codes": torch.full((4, 64), 5.0).to(torch.float8_e4m3fn)}, r"is no fp4 within \[-6, 6\]"),
    ],
)
def test_contradictions_are_refused(change, message):
    sound = round_to_nearest(weight(4, 64), NVFP4, torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        replace(sound, **change)


def test_a_scale_of_powers_of_two_is_one():
    scheme = parse_scheme("mxfp4-a16")
    sound = round_to_nearest(weight(4, 64), scheme, torch.bfloat16)
    with pytest.raises(ValueError, match="a scale is no e8m0"):
        replace(sound, scales=sound.scales * 1.5)


def test_inputs_round_in_groups():
    x = torch.tensor([[6.0, 3.1, 0.2] + [0.0] * 29 + [6.99, 1.0] + [0.0] * 30 + [7.01] + [0.0] * 31])
    inputs = parse_scheme("mxfp4").inputs
    assert inputs is not None
    rounded = numerics.input_rounding(inputs, None)(x)
    assert rounded[0, :3].tolist() == [6.0, 3.0, 0.0]
    assert rounded[0, 32:34].tolist() == [6.0, 1.0]  # the exponent of 6.99 stays
    assert rounded[0, 64].item() == 8.0  # from 1.75 of a power on it is one more: 7.01 is 3.5 x 2
    inputs = parse_scheme("nvfp4").inputs
    assert inputs is not None
    divisor = numerics.input_scale_of(torch.tensor(6.0), inputs)
    assert float(divisor) == 256.0  # the power of two below 448
    rounded = numerics.input_rounding(inputs, divisor)(x[:, :16])
    assert rounded[0, :3].tolist() == [6.0, 3.0, 0.0]
    inputs = parse_scheme("fp8-block").inputs
    assert inputs is not None
    wide = torch.randn(3, 256)
    found = numerics.input_rounding(inputs, None)(wide)
    one = numerics.fake_quantize_inputs(wide.view(6, 128), FP8).view(3, 256)
    assert torch.equal(found, one)
    assert torch.equal(numerics.input_rounding(inputs, None)(torch.zeros(1, 128)), torch.zeros(1, 128))


def test_what_engines_fuse_has_one_parent():
    layer = "model.layers.3"
    assert len({parent_set(f"{layer}.self_attn.{part}_proj") for part in "qkv"}) == 1
    assert (
        parent_set(f"{layer}.mlp.gate_proj")
        == parent_set(f"{layer}.mlp.up_proj")
        != parent_set(f"{layer}.mlp.down_proj")
    )
    experts = {parent_set(f"{layer}.mlp.experts.{i}.{part}_proj") for i in range(3) for part in ("gate", "up")}
    assert experts == {parent_set(f"{layer}.mlp.experts.7.up_proj")}
    assert parent_set("model.layers.4.mlp.gate_proj") != parent_set(f"{layer}.mlp.gate_proj")


def test_names_say_all_of_a_scheme():
    for name, scheme in NAMED.items():
        assert str(scheme) == name
        assert parse_scheme(name) is scheme
        assert parse_scheme(str(scheme.weights_only)) == scheme.weights_only
    with pytest.raises(ValueError, match="fp4 per channel is no scheme"):
        parse_scheme("fp4-channel")
    with pytest.raises(ValueError, match="groups alike"):
        Scheme(NVFP4.weights, parse_scheme("mxfp4").weights)
