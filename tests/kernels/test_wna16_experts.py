"""The products with packed experts: the arithmetic, tracing, what is refused; on a GPU the kernels against the CPU."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.quant.kernels import ops, wna16_experts
from lowbit.quant.kernels.packed import dequantize_packed
from lowbit.quant.kernels.pairs import Chosen, pairs_by_expert, products
from lowbit.quant.kernels.problem import PART, Deferred, PackedCall
from lowbit.quant.kernels.wna16_experts import DownCall, Gate, UpCall, reference_down, reference_up
from tests.kernels.make import assert_dependence_changes_nothing, make_float, make_packed, make_x, opcheck

COUNT, TOP, K, INNER = 6, 3, 192, 40
GATE = Gate("silu_mul")


def make_chosen(m: int, count: int = COUNT, top: int = TOP, device: str = "cpu") -> Chosen:
    experts = torch.stack([torch.randperm(count)[:top] for _ in range(m)]).int()
    return Chosen(experts.to(device), torch.rand(m, top, device=device), count)


def make_up(m: int = 3, gate: Gate = GATE, device: str = "cpu", bits: int = 4, group_size: int = 64, **sizes) -> UpCall:
    k, inner, count, top = (
        sizes.get(name, value) for name, value in (("k", K), ("inner", INNER), ("count", COUNT), ("top", TOP))
    )
    weight = make_packed(count * 2 * inner, k, bits, group_size, device=device, pair_block=2 * inner)
    return UpCall(make_x(m, k, torch.float16, device), weight, make_chosen(m, count, top, device), gate)


def make_down(
    m: int = 3, n: int = 64, k: int = 160, device: str = "cpu", count: int = COUNT, top: int = TOP
) -> DownCall:
    x = torch.zeros(m, top, -(-k // 128) * 128, dtype=torch.float16, device=device)
    x[..., :k] = torch.randn(m, top, k, device=device)
    weight = make_packed(count * n, k, 4, 32, device=device)
    residual = torch.randn(m, n, device=device).half()
    return DownCall(x, weight, make_chosen(m, count, top, device), residual=residual)


def dense(weight, count: int) -> Tensor:
    return dequantize_packed(weight).unflatten(0, (count, -1))


@pytest.mark.parametrize("gate", [GATE, Gate("gelu_tanh_mul"), Gate("clamped_mul", 0.5, 1.702)])
def test_up_is_each_row_with_its_experts(gate: Gate) -> None:
    call = replace(make_up(gate=gate), bias=torch.randn(COUNT, 2 * INNER).half())
    y, w = ops.experts_up(call), dense(call.weight, COUNT)
    assert y.shape == (3, TOP, 128)
    assert not y[..., INNER:].any()
    for row in range(3):
        for place in range(TOP):
            e, weight = int(call.chosen.experts[row, place]), call.chosen.weights[row, place]
            act, up = (call.x[row].float() @ w[e].T + call.bias[e].float()).chunk(2)
            wanted = {
                "silu_mul": torch.nn.functional.silu(act) * up,
                "gelu_tanh_mul": torch.nn.functional.gelu(act, approximate="tanh") * up,
                "clamped_mul": act.clamp(max=0.5) * (1.702 * act.clamp(max=0.5)).sigmoid() * (up.clamp(-0.5, 0.5) + 1),
            }[gate.activation]
            torch.testing.assert_close(y[row, place, :INNER], (wanted * weight).half(), atol=2e-3, rtol=2e-3)


def test_up_finishes_a_deferred_norm() -> None:
    plain = make_up()
    deferred = replace(plain, deferred=Deferred(torch.full((3, K // PART), 4.0 * PART), 0.0))
    half = replace(plain, x=plain.x / 2)
    torch.testing.assert_close(ops.experts_up(deferred), ops.experts_up(half), atol=2e-3, rtol=2e-3)


def test_down_adds_a_rows_experts_and_their_biases() -> None:
    call = replace(make_down(), bias=torch.randn(COUNT, 64).half())
    w, y = dense(call.weight, COUNT), ops.experts_down(call)
    for row in range(3):
        wanted = call.residual[row].float()
        for place in range(TOP):
            e = int(call.chosen.experts[row, place])
            wanted = wanted + call.x[row, place, :160].float() @ w[e].T
            wanted = wanted + call.chosen.weights[row, place] * call.bias[e].float()
        torch.testing.assert_close(y[row].float(), wanted, atol=2e-2, rtol=2e-3)


def test_down_begins_the_next_norm() -> None:
    call, weight = make_down(), torch.randn(64).half()
    h, z, squares = ops.experts_down_deferring(call, weight)
    assert torch.equal(h, ops.experts_down(call))
    torch.testing.assert_close(z, (h.float() * weight.float()).half())
    torch.testing.assert_close(squares, h.float().square().unflatten(1, (4, PART)).sum(-1))


def test_pairs_come_by_expert_in_their_order() -> None:
    experts = torch.tensor([2, 0, 2, 1, 0])
    assert [(e, pairs.tolist()) for e, pairs in pairs_by_expert(experts, 4)] == [(0, [1, 4]), (1, [3]), (2, [0, 2])]
    x, w = torch.randn(5, 8), torch.randn(4, 3, 8)
    torch.testing.assert_close(products(x, w, experts), torch.einsum("pk,pnk->pn", x, w[experts]))


def test_operators_are_traceable() -> None:
    opcheck(ops.experts_up, make_up())
    opcheck(ops.plain_experts_down, make_down())


WRONG = {
    "pair_block 80": lambda up: replace(up, weight=make_packed(COUNT * 80, K, group_size=64)),
    "are not 7 experts": lambda up: replace(up, chosen=replace(up.chosen, count=7)),
    "for 3 rows": lambda up: replace(up, chosen=make_chosen(2)),
    "not int32": lambda up: replace(up, chosen=replace(up.chosen, experts=up.chosen.experts.long())),
    "is none of": lambda up: replace(up, gate=Gate("relu_mul")),
    "x must have the shape": lambda up: replace(up, x=up.x[:, :64].contiguous()),
    "half precision": lambda up: replace(up, x=up.x.float()),
    "as many experts": lambda up: replace(up, next_weight=torch.zeros(COUNT + 1, 8, dtype=torch.int32)),
    "bias is": lambda up: replace(up, bias=torch.zeros(COUNT, 3).half()),
}


@pytest.mark.parametrize("message", WRONG)
def test_tensors_that_do_not_fit_are_told(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.experts_up(WRONG[message](make_up()))


def test_rows_of_down_that_do_not_fit_are_told() -> None:
    call = make_down()
    with pytest.raises(ValueError, match="x must have the shape"):
        ops.experts_down(replace(call, x=call.x[..., :128].contiguous()))
    with pytest.raises(ValueError, match="residual is"):
        ops.experts_down(replace(call, residual=call.residual[:, :32]))
    with pytest.raises(ValueError, match="is for gate and up"):
        ops.experts_down(replace(call, weight=make_packed(COUNT * 64, 160, group_size=32, pair_block=64)))


@pytest.mark.parametrize("scheme", ["mxfp4-a16", "nvfp4-a16", "int4-g32", "int8"])
@pytest.mark.parametrize("n", [1536, 5760, 28672])
def test_a_warp_has_one_tile(monkeypatch: pytest.MonkeyPatch, scheme: str, n: int) -> None:
    """wna16_gemv's launches of one row may have two, for which the kernel of experts has no code."""
    monkeypatch.setattr(wna16_experts, "place_of", lambda device: ("cuda", (9, 0), 132, True))
    weight = replace(make_float(scheme, 96, 2880 // 128 * 128, torch.bfloat16, "cpu", 96), n=n)
    chosen = make_chosen(1, 6, 4)
    assert wna16_experts.up_cut(PackedCall(make_x(1, weight.k, torch.bfloat16, "cpu"), weight), chosen).row_tiles == 1


def close(y: Tensor, wanted: Tensor) -> None:
    error, most = (y.cpu().float() - wanted.float()).abs().max(), wanted.float().abs().max()
    assert error <= 4 * torch.finfo(wanted.dtype).eps * most, f"error {error:.3g} of {most:.3g}"


SIZES = {  # hidden, inner, experts, experts of a row
    "qwen3": (2048, 768, 24, 8),
    "mixtral": (4096, 1792, 8, 2),
    "gpt-oss": (2880, 2880, 8, 4),
    "top 10": (1024, 512, 16, 10),
    "top 6": (2048, 1408, 16, 6),
}
GPU_SCHEMES = ("int4-g32", "int8", "mxfp4-a16", "nvfp4-a16", "fp8-a16", "int4-g128", "fp8-block-a16")


# the 2880 inputs of gpt-oss do not divide into groups of 128
WHOLE = GPU_SCHEMES[:5]
CASES = [(shape, each) for shape in SIZES for each in (WHOLE if shape == "gpt-oss" else GPU_SCHEMES)]


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 3, 16, 19])
@pytest.mark.parametrize(("shape", "scheme"), CASES)
def test_the_gpu_computes_the_reference(shape: str, m: int, scheme: str) -> None:
    """In float32 on the same device: of its own arithmetic test_up and test_down above are the proof."""
    hidden, inner, count, top = SIZES[shape]
    chosen, x = make_chosen(m, count, top, "cuda"), make_x(m, hidden, torch.bfloat16, "cuda")
    weights = [
        make_float(scheme, count * n, k, torch.bfloat16, "cuda", pair_block)
        for n, k, pair_block in ((2 * inner, hidden, 2 * inner), (hidden, inner, 16))
    ]
    up = UpCall(x, weights[0], chosen, GATE)
    down = DownCall(ops.experts_up(up), weights[1], chosen, residual=x)
    close(down.x, reference_up(up).cpu())
    close(ops.experts_down(down), reference_down(down).cpu())


@pytest.mark.gpu
def test_on_a_gpu_results_are_the_same_each_time_and_captured() -> None:
    up, down = make_up(5, device="cuda", k=2048, inner=768, count=64, top=8), make_down(5, 2048, 768, "cuda", 64, 8)
    down = replace(down, chosen=up.chosen)

    def compute(dependent: bool) -> Tensor:
        inner = ops.experts_up(replace(up, dependent=dependent))
        return ops.experts_down(replace(down, x=inner, dependent=dependent))

    assert_dependence_changes_nothing(compute)


@pytest.mark.gpu
def test_on_a_gpu_a_row_does_not_see_its_batch() -> None:
    up = make_up(4, device="cuda", k=2048, inner=768, count=64, top=8)
    others = replace(up, x=up.x.clone(), chosen=make_chosen(4, 64, 8, "cuda"))
    others.x[1:].normal_()
    others.chosen.experts[0].copy_(up.chosen.experts[0])
    others.chosen.weights[0].copy_(up.chosen.weights[0])
    first = ops.experts_up(up)[0]
    assert torch.equal(ops.experts_up(others)[0], first)
    alone = Chosen(up.chosen.experts[:1], up.chosen.weights[:1], up.chosen.count)
    assert torch.equal(ops.experts_up(replace(up, x=up.x[:1].contiguous(), chosen=alone))[0], first)
    down = make_down(4, 2048, 768, "cuda", 64, 8)
    one = Chosen(down.chosen.experts[:1], down.chosen.weights[:1], down.chosen.count)
    alone_down = replace(down, x=down.x[:1].contiguous(), chosen=one, residual=down.residual[:1].contiguous())
    assert torch.equal(ops.experts_down(alone_down)[0], ops.experts_down(down)[0])


@pytest.mark.gpu
def test_on_a_gpu_experts_that_do_not_exist_are_not_read() -> None:
    up = make_up(2, device="cuda")
    up.chosen.experts[0].fill_(1 << 30)
    up.chosen.experts[1].fill_(-5)
    assert torch.isfinite(ops.experts_up(up)).all()
