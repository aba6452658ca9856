"""row_norm: the reference against its formula, the kernel against the reference."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lowbit.quant.kernels import ops
from lowbit.quant.kernels.row_norm import GROUP, Rows, check, reference, reference_codes
from lowbit.quant.numbers import FP8, INT8
from tests.kernels.make import opcheck

NORMS = ("none", "rms", "layer")
# a number, and whether one scale serves all rows
ROUNDINGS = (("none", False), ("int8", False), ("int8", True), ("fp8", False), ("fp8", True))
TO_CODES = ROUNDINGS[1:]
CODES = {"int8": INT8, "fp8": FP8}


def make_rows(m: int, k: int, norm: str, rounding: tuple[str, bool], dtype=torch.float32, device: str = "cpu") -> Rows:
    x = (2 * torch.randn(m, k) + 0.5).to(device, dtype)
    weight, bias = ((torch.randn(k) + 1).to(device, dtype) for _ in range(2))
    scale = torch.tensor(0.03, device=device) if rounding[1] else None
    normed = norm != "none"
    return Rows(x, norm, weight if normed else None, bias if norm == "layer" else None, 1e-5, rounding[0], scale)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("norm", NORMS)
def test_rows_are_normed_and_rounded(norm, rounding):
    call = make_rows(3, 48, norm, rounding)
    y = call.x
    if norm != "none":
        y = y - y.mean(-1, keepdim=True) if norm == "layer" else y
        y = y / (y.square().mean(-1, keepdim=True) + call.eps).sqrt() * call.weight
        y = y + call.bias if norm == "layer" else y
    name, static = rounding
    if name != "none":
        largest = 127 if name == "int8" else 448
        scale = call.input_scale if static else y.abs().amax(-1, keepdim=True) / largest
        codes = y / scale
        codes = codes.round().clamp(-128, 127) if name == "int8" else codes.to(torch.float8_e4m3fn).float()
        assert static or (codes.abs().amax(-1) == largest).all()
        y = codes * scale
    # a norm's last bit may turn a code by one
    tolerance = {"none": (1e-5, 1e-4), "int8": (0.04, 1e-4), "fp8": (1e-5, 0.13)}[name]
    torch.testing.assert_close(ops.normalize(call), y, atol=tolerance[0], rtol=tolerance[1])


def test_the_bound_of_turned_codes_holds_where_a_norm_is_rounded_to_half():
    """The bound that the kernel is held to, here against a norm rounded to half precision by torch."""
    for norm, static, dtype in product(NORMS[1:], (False, True), (torch.float16, torch.bfloat16)):
        call = make_rows(300, 512, norm, ("fp8", static), dtype)
        wide = {name: None if t is None else t.float() for name, t in (("weight", call.weight), ("bias", call.bias))}
        wanted = reference(replace(call, x=call.x.float(), **wide))
        assert_turned_seldom(reference(call).float(), wanted, ("fp8", static), dtype)


@pytest.mark.parametrize("number", CODES)
def test_groups_of_a_row_have_scales_of_their_own(number):
    x = torch.randn(3, 3 * GROUP) * torch.tensor([1e-3, 1.0, 100.0]).repeat_interleave(GROUP)
    x[1, :GROUP] = 0
    codes, scales = ops.quantize_rows(Rows(x, rounding=number, grouped=True))
    assert scales.shape == (3, 3)
    assert scales[0, 1] == 1
    for group in range(3):
        part = slice(group * GROUP, (group + 1) * GROUP)
        alone = ops.quantize_rows(Rows(x[:, part].contiguous(), rounding=number))
        assert torch.equal(codes[:, part].float(), alone[0].float())
        assert torch.equal(scales[group], alone[1])
    rounded = ops.normalize(Rows(x, rounding=number, grouped=True))
    assert torch.equal(rounded, codes.float() * scales.T.repeat_interleave(GROUP, 1))


@pytest.mark.parametrize("number", CODES)
def test_infinities_become_the_largest_code(number):
    x = torch.tensor([[torch.inf, -torch.inf, 1.0, 0.0]])
    codes, _ = ops.quantize_rows(Rows(x, rounding=number, input_scale=torch.tensor(1.0)))
    assert codes.float().tolist() == [[CODES[number].high, CODES[number].low, 1.0, 0.0]]


def test_what_is_given_is_not_what_is_returned():
    call = make_rows(1, 8, "none", ("none", False))
    assert ops.normalize(call).data_ptr() != call.x.data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "batch"}, "norm 'batch' is one of"),
        ({"weight": None}, "has a weight unless"),
        ({"activation": "relu"}, "activation 'relu' is none of"),
        ({"rounding": "int8", "input_scale": torch.ones(2)}, "not one number of torch.float32"),
        ({"rounding": "fp8", "grouped": True}, "rows of [0-9]+ in groups of 128"),
        ({"rounding": "int4"}, "rounding 'int4' is one of"),
        ({"input_scale": torch.tensor(1.0)}, "has no input_scale where it is 'none'"),
        ({"weight": torch.ones(7)}, r"weight is \(7,\)"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ops.normalize(replace(make_rows(2, 8, "rms", ("none", False)), **change))


@pytest.mark.parametrize("name", ["weight", "bias", "input_scale"])
def test_a_tensor_on_another_device_is_named(name):
    call = make_rows(2, 8, "layer", ("int8", True))
    with pytest.raises(ValueError, match=f"{name} is on meta, x on cpu"):
        check(replace(call, **{name: getattr(call, name).to("meta")}))


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "silu_mul"])
def test_an_activation_comes_first(activation):
    x = torch.randn(3, 48)
    gate, up = x.chunk(2, -1)
    wanted = {
        "gelu": functional.gelu(x),
        "quick_gelu": x * torch.sigmoid(1.702 * x),
        "silu_mul": functional.silu(gate) * up,
    }[activation]
    torch.testing.assert_close(ops.normalize(Rows(x, activation=activation)), wanted)
    codes, scales = ops.quantize_rows(Rows(x, rounding="int8", activation=activation))
    assert codes.shape == wanted.shape
    torch.testing.assert_close(codes * scales.unsqueeze(1), wanted, atol=wanted.abs().max().item() / 250, rtol=0)


@pytest.mark.parametrize("rounding", TO_CODES)
def test_codes_stand_for_what_the_rounded_rows_are(rounding):
    call = make_rows(3, 48, "rms", rounding)
    codes, scales = ops.quantize_rows(call)
    assert codes.dtype == CODES[rounding[0]].storage
    assert scales.shape == (3,)
    assert torch.equal(codes.float() * scales.unsqueeze(1), ops.normalize(call))


def test_the_operators_pass_opcheck():
    call = make_rows(2, 16, "rms", ("int8", False))
    opcheck(ops.normalize, call)
    gated = Rows(torch.randn(2, 16), rounding="fp8", input_scale=torch.tensor(0.1), activation="silu_mul")
    opcheck(ops.quantize_rows, gated)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_kernel_computes_the_reference(norm, rounding, dtype):
    for m, k in ((1, 8), (2, 264), (7, 4096), (1, 8192), (3, 13824), (300, 512)):
        call = make_rows(m, k, norm, rounding, dtype, "cuda")
        wide = {name: None if t is None else t.float() for name, t in (("weight", call.weight), ("bias", call.bias))}
        wanted = reference(replace(call, x=call.x.float(), **wide))
        got = ops.normalize(call).float()
        error, slack = (got - wanted).abs(), 2.0**-10 if dtype == torch.float16 else 2.0**-7
        if rounding[0] == "none":
            assert (error <= slack * wanted.abs() + slack * 1e-2).all()
            continue
        assert_turned_seldom(got, wanted, rounding, dtype)


def assert_turned_seldom(got: Tensor, wanted: Tensor, rounding: tuple[str, bool], dtype: torch.dtype) -> None:
    """Values that stand for codes; some fell the other way, by one step, where a norm's own rounding decided."""
    error, slack = (got - wanted).abs(), 2.0**-10 if dtype == torch.float16 else 2.0**-7
    step = 0.03 if rounding[1] else wanted.abs().amax(-1, keepdim=True) / CODES[rounding[0]].high
    if rounding[0] == "fp8":
        # A GPU's torch divides by numbers through their rounded inverse: a quotient that loses its last bit lies just
        # below the power of two that its code is.
        step = CODES["fp8"].spacing(wanted / step * (1 + 2**-20)).clamp(max=32) * step
    assert (error <= 1.01 * step + 2 * slack * wanted.abs()).all()
    assert (error > 0.5 * step).sum() <= 3 + (0.03 if dtype == torch.float16 else 0.2) * error.numel()


def expected_codes(call: Rows) -> tuple[Tensor, Tensor]:
    """On the CPU, because torch on a GPU does not divide by 127 but multiplies with its rounded inverse."""
    scale = None if call.input_scale is None else call.input_scale.cpu()
    return reference_codes(replace(call, x=call.x.cpu(), input_scale=scale))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernel_gives_the_codes_of_the_reference(dtype):
    for m, k in ((1, 8), (2, 264), (7, 4096), (3, 13824), (300, 512), (260, 4104)):
        for rounding in TO_CODES:
            call = make_rows(m, k, "none", rounding, dtype, "cuda")
            call.x[m // 2] = 0
            call.x[0, 0] = torch.inf if rounding[1] else 60000
            for got, wanted in zip(ops.quantize_rows(call), expected_codes(call), strict=True):
                assert torch.equal(got.cpu().float(), wanted.float())
            if rounding[0] == "fp8":
                continue
            # at most 200: a product beyond float16 is infinite, and codes of a row with infinity are undefined
            gated = replace(call, x=call.x.clamp(max=200).repeat(1, 2), activation="silu_mul")
            got, wanted = ops.quantize_rows(gated)[0].cpu(), expected_codes(gated)[0]
            error = (got.int() - wanted.int()).abs()  # an exponential's last bit may turn a code
            assert error.max() <= 1 + (dtype == torch.bfloat16)
            assert (error > 0).float().mean() < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("number", CODES)
def test_the_kernel_gives_the_codes_of_groups(number, dtype):
    for m, k in ((1, 128), (2, 640), (7, 4096), (3, 13824), (300, 512), (260, 11008)):
        call = replace(make_rows(m, k, "none", (number, False), dtype, "cuda"), grouped=True)
        call.x[m // 2, :200] = 0
        call.x[0, 0] = 60000
        for got, wanted in zip(ops.quantize_rows(call), expected_codes(call), strict=True):
            assert torch.equal(got.cpu().float(), wanted.float())
        rounded = ops.normalize(call).cpu()
        codes, scales = expected_codes(call)
        torch.testing.assert_close(
            rounded, (codes.float() * scales.T.repeat_interleave(GROUP, 1)).to(dtype), rtol=0, atol=0
        )
        normed = replace(make_rows(m, k, "rms", (number, False), dtype, "cuda"), grouped=True)
        got, alone = ops.quantize_rows(normed), ops.normalize(replace(normed, rounding="none", grouped=False))
        for each, wanted in zip(got, ops.quantize_rows(Rows(alone, rounding=number, grouped=True)), strict=True):
            assert torch.equal(each.float(), wanted.float())


@pytest.mark.gpu
@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("k", [264, 13824])
def test_the_kernel_keeps_a_nan_to_its_row(k, number):
    for m in (3, 300):
        call = make_rows(m, k, "rms", (number, False), torch.float16, "cuda")
        codes, scales = ops.quantize_rows(call)
        call.x[1, k - 1] = torch.nan
        spoilt_codes, spoilt_scales = ops.quantize_rows(call)
        assert spoilt_scales[1].isnan()
        others = torch.arange(m, device="cuda") != 1
        assert torch.equal(spoilt_scales[others], scales[others])
        assert torch.equal(spoilt_codes[others].float(), codes[others].float())


@pytest.mark.gpu
def test_a_norm_that_is_not_aligned_is_read_all_the_same():
    call = make_rows(3, 264, "layer", ("none", False), torch.float16, "cuda")
    weight, bias = (torch.cat([t[:1], t])[1:] for t in (call.weight, call.bias))
    got = ops.normalize(replace(call, weight=weight, bias=bias))
    torch.testing.assert_close(got, ops.normalize(call), atol=2e-3, rtol=2e-3)
