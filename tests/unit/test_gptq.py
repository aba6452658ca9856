"""quant/algos/gptq.py against its definition in float64, and where it has to fall back."""

import pytest
import torch

from lowbit.quant import numerics
from lowbit.quant.algos import gptq as module
from lowbit.quant.algos.gptq import gptq, gptq_each, inverse_factors, output_loss
from lowbit.quant.kernels import ops
from lowbit.quant.numbers import INT4
from lowbit.quant.qtensor import round_to_nearest
from lowbit.quant.scheme import make_scheme, parse_scheme

SCHEMES = [make_scheme(4, 32, True), make_scheme(4, 32, False), make_scheme(8, -1, True), make_scheme(4, -1, True)]
SCHEMES += [parse_scheme("fp8-channel")]
F32 = torch.float32


def inputs(k: int, tokens: int = 400, seed: int = 0) -> torch.Tensor:
    """Correlated activations (tokens, k) with channels of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) * torch.logspace(-1.5, 0.5, k)
    return torch.randn(tokens, k, generator=generator) @ mix / k**0.5


def moment_of(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def obvious_gptq(w, moment, scheme, damping):
    """Column by column in float64, the inverse of what remains computed anew for each: Frantar et al., section 3."""
    w, n = w.double().clone(), len(moment)
    scales, zeros = numerics.choose_params(w.float(), scheme, F32)
    damped = moment.double() + torch.eye(n) * damping * float(moment.diagonal().mean())
    left = moment.diagonal().argsort(descending=True, stable=True).tolist()
    codes = torch.zeros_like(w)
    size = n // scales.shape[1]
    while left:
        j = left[0]
        inverse = torch.linalg.inv(damped[left][:, left])
        scale = scales[:, j // size].double()
        zero = 0.0 if zeros is None else zeros[:, j // size].double()
        codes[:, j] = scheme.number.encode((w[:, j] / scale).float(), None if zeros is None else zero).double()
        error = (w[:, j] - (codes[:, j] - zero) * scale) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return codes


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_are_those_of_the_definition(scheme):
    torch.manual_seed(1)
    w, moment = torch.randn(24, 160), moment_of(inputs(160))
    result = gptq(w, moment, scheme, F32, clip=False, damping=0.01)
    wanted = obvious_gptq(w, moment, scheme, 0.01)
    # a value halfway between two codes may fall to either side in float32, and what follows it with it
    assert (result.weight.codes.double() == wanted).double().mean() > 0.995
    assert result.fallbacks == ()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_never_worse_than_nearest_and_mostly_far_better(scheme, seed, clip):
    torch.manual_seed(seed)
    w, moment = torch.randn(40, 128), moment_of(inputs(128, seed=seed))
    result = gptq(w, moment, scheme, F32, clip=clip)
    plain = output_loss(round_to_nearest(w, scheme, F32), w, moment)
    assert result.loss == pytest.approx(output_loss(result.weight, w, moment))
    assert result.loss < 0.7 * plain


def test_nearest_is_kept_where_it_wins():
    # with uncorrelated inputs there is nothing to make up for; damping far beyond the data only does harm
    w = torch.full((3, 32), 0.5)
    w[:, 0] = 7.5
    scheme = make_scheme(4, 32, True)
    moment = torch.eye(32)
    moment[0, 1] = moment[1, 0] = 0.999
    result = gptq(w, moment, scheme, F32, clip=False)
    assert result.loss <= output_loss(round_to_nearest(w, scheme, F32), w, moment)


def test_scales_are_in_the_dtype_asked_for():
    result = gptq(torch.randn(8, 64), moment_of(inputs(64)), make_scheme(4, 32, True), torch.bfloat16)
    assert result.weight.scales.dtype == torch.bfloat16


def test_dead_inputs_round_to_nearest_and_are_reported():
    torch.manual_seed(0)
    x = inputs(64)
    x[:, [3, 40]] = 0
    w, scheme = torch.randn(8, 64), make_scheme(4, 32, True)
    result = gptq(w, moment_of(x), scheme, F32, clip=False)
    assert "2 of 64 inputs never fired" in result.fallbacks[0]
    nearest = round_to_nearest(w, scheme, F32)
    assert torch.equal(result.weight.codes[:, [3, 40]], nearest.codes[:, [3, 40]])


def test_no_activation_at_all_is_nearest():
    w, scheme = torch.randn(8, 64), make_scheme(4, 32, True)
    result = gptq(w, torch.zeros(64, 64), scheme, F32)
    assert torch.equal(result.weight.codes, round_to_nearest(w, scheme, F32).codes)
    assert result.fallbacks == ("no input ever fired: rounded to nearest",)


def test_one_token_makes_a_singular_moment_that_damping_cures():
    x = inputs(64, tokens=1)
    result = gptq(torch.randn(8, 64), moment_of(x), make_scheme(4, 32, True), F32)
    assert torch.isfinite(result.weight.dequantize()).all()


def test_one_output():
    assert gptq(torch.randn(1, 64), moment_of(inputs(64)), make_scheme(4, -1, True), F32).weight.shape == (1, 64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_moment_that_is_not_finite_is_refused(bad):
    moment = moment_of(inputs(32))
    moment[2, 2] = bad
    with pytest.raises(ValueError, match="second moment of its inputs is not finite"):
        gptq(torch.randn(4, 32), moment, make_scheme(4, 32, True), F32)


def indefinite(by: float, k: int = 32) -> torch.Tensor:
    """A symmetric matrix whose least eigenvalue is -by, its mean diagonal 1."""
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(k, k))
    values = torch.linspace(0.5, 1.5, k)
    values[0] = -by
    return basis @ torch.diag(values) @ basis.T


@pytest.mark.parametrize(
    ("by", "rung"), [(0.02, "damping raised to 0.04"), (0.1, "damping raised to 0.16"), (0.5, "damping raised to 0.64")]
)
def test_the_damping_ladder(by, rung):
    factors = inverse_factors(indefinite(by)[None], 0.01)
    assert factors.failed == [False]
    assert factors.fallbacks == [(rung,)]


def test_the_diagonal_floor():
    moment = torch.eye(32)
    moment[0, 0] = -0.0
    moment[0, 0] = 1e-30
    moment[1, 1] = -2.0  # no moment of real inputs, but what rounding can make of a tiny one
    factors = inverse_factors(moment[None], 0.01)
    assert factors.failed == [False]
    assert "1 of 32 inputs never fired" in factors.fallbacks[0][0]


def test_what_no_rung_cures_is_rounded_to_nearest(monkeypatch):
    w, scheme = torch.randn(4, 32), make_scheme(4, 32, True)
    result = gptq(w, indefinite(5.0), scheme, F32, clip=False)
    assert torch.equal(result.weight.codes, round_to_nearest(w, scheme, F32).codes)
    assert "no Cholesky factor on any rung" in result.fallbacks[-1]


def test_float64_is_the_last_rung(monkeypatch):
    plain = module._factor

    def in_float64(moments):
        factor, fits = plain(moments)
        return factor, fits & (moments.dtype == torch.float64)

    monkeypatch.setattr(module, "_factor", in_float64)
    factors = inverse_factors(moment_of(inputs(32))[None], 0.01)
    assert factors.failed == [False]
    assert factors.fallbacks == [("the same, factored in float64",)]


def test_the_block_operator_traces():
    w = torch.randn(8, 32)
    factor = torch.linalg.cholesky(moment_of(inputs(32)) + torch.eye(32), upper=True)
    args = tuple(each[None] for each in (w, factor, torch.ones(8, 32), torch.zeros(8, 32)))
    torch.library.opcheck(torch.ops.lowbit.gptq_block, (*args, *INT4.grid))
    codes, errors = ops.round_block(*args, INT4)
    assert -8 <= codes.min() <= codes.max() <= 7
    assert torch.equal(errors[0, :, 0], (w[:, 0] - codes[0, :, 0]) / factor[0, 0])


TOGETHER = [
    "int4-g32",
    "uint4-g32",
    "int3-g32",
    "uint2-g32",
    "int8",
    "fp8-a16",
    "mxfp4-a16",
    "nvfp4-a16",
    "q4_k",
    "q2_k",
]


@pytest.mark.parametrize("name", TOGETHER)
def test_weights_are_rounded_together_as_one_by_one(name):
    """Two weights for each of four inputs. Each has its own moment, order, damping and fallbacks."""
    torch.manual_seed(0)
    scheme, w = parse_scheme(name), torch.randn(4, 2, 24, 256)
    moments = torch.stack([moment_of(inputs(256, seed=seed)) for seed in range(4)])
    moments[1, [7, 200]] = moments[1, :, [7, 200]] = 0
    moments[2] = 0
    moments[3] = indefinite(0.02, 256)
    divisor = numerics.own_divisor(w.flatten(0, 2), scheme)
    found = gptq_each(w, moments, scheme, F32, divisor=divisor)
    for place, result in enumerate(found):
        at, by = divmod(place, 2)
        alone = gptq(w[at, by], moments[at], scheme, F32, divisor=divisor)
        assert result.fallbacks == alone.fallbacks
        assert result.loss == pytest.approx(alone.loss, rel=1e-3, abs=1e-9)
        assert result.weight.checked().scheme == scheme
        assert (result.weight.codes.float() == alone.weight.codes.float()).float().mean() > 0.999
        assert torch.equal(result.weight.scales, alone.weight.scales)
        torch.testing.assert_close(result.wanted, alone.wanted, rtol=0.02, atol=0.02)
    assert found[0].fallbacks == ()
    assert "2 of 256 inputs never fired" in found[2].fallbacks[0]
    assert found[5].fallbacks == ("no input ever fired: rounded to nearest",)
    assert found[6].fallbacks == ("damping raised to 0.04",)


def test_together_each_keeps_what_loses_less():
    """The second weight is better off with the nearest codes, the first is not."""
    torch.manual_seed(0)
    scheme, moments = make_scheme(4, 32, True), torch.stack([moment_of(inputs(32)), torch.eye(32)])
    moments[1, 0, 1] = moments[1, 1, 0] = 0.999
    w = torch.randn(2, 1, 3, 32)
    w[1] = 0.5
    w[1, :, :, 0] = 7.5
    found = gptq_each(w, moments, scheme, F32, clip=False)
    for place, result in enumerate(found):
        alone = gptq(w[place, 0], moments[place], scheme, F32, clip=False)
        assert result.fallbacks == alone.fallbacks
        assert torch.equal(result.weight.codes, alone.weight.codes)
