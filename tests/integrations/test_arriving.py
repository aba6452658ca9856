"""integrations/arriving.py: shares of joined linears, cut from what a checkpoint's tensors stand for."""

import pytest
import torch

from lowbit.errors import CheckpointError
from lowbit.export.compressed_tensors import COMPRESSED_TENSORS
from lowbit.integrations.arriving import Arriving, Share, placeholder, reason_against
from lowbit.quant.kernels.joined import columns_of
from lowbit.quant.kernels.weight import Dense, Linear, Packed, W8a8, load_weight, takes_codes
from lowbit.quant.qtensor import QTensor, round_to_nearest
from lowbit.quant.scheme import Scheme, parse_scheme

CPU = torch.device("cpu")
SCHEMES = (
    *("int2-g32", "int3-g64", "int4-g128", "uint4-g32", "int5-g32", "int6-channel", "int7-g32", "int8-channel"),
    *("int8-channel-a8token", "int8-channel-a8tensor", "fp8", "fp8-static", "fp8-a16", "fp8-block", "nvfp4"),
    *("nvfp4-a16", "mxfp4", "mxfp4-a16", "mxfp8-a16"),
)
SIZES, K = (512, 256, 256), 512


def weights_of(text: str, sizes: tuple[int, ...] = SIZES, k: int = K) -> list[QTensor]:
    """Random weights of a scheme, those of nvfp4 with different divisors."""
    generator, found = torch.Generator().manual_seed(len(text)), []
    scheme = parse_scheme(text)
    for place, n in enumerate(sizes):
        w = round_to_nearest((1 + place) * torch.randn(n, k, generator=generator), scheme.weights_only, torch.bfloat16)
        scale = torch.tensor(0.01 * (1 + place)) if scheme.static_inputs else None
        found.append(QTensor(w.codes, w.scales, w.zeros, scheme, scale, w.divisor))
    return found


def arrived(weights: list[QTensor], together: bool = False) -> Arriving:
    """Weights that have arrived as a file's tensors, in another order than that of the file."""
    names = [f"model.layers.0.{place}" for place in range(len(weights))]
    arriving = Arriving(names, [weight.scheme for weight in weights], weights[0].shape[1])
    for place, weight in reversed(list(enumerate(weights))):
        for key, tensor in reversed(COMPRESSED_TENSORS.write("", weight).items()):
            arriving.put(key.removeprefix("."), tensor, None if together else place)
    return arriving


def dense(weight: object) -> torch.Tensor:
    """The values of a joined weight, float32."""
    return weight.float() if isinstance(weight, torch.Tensor) else weight.dequantize()  # type: ignore[attr-defined]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("text", SCHEMES)
def test_shares_of_outputs_are_rows_of_the_weights(text, ranks):
    """q, k and v, of which k and v have fewer heads than there are processes at 4."""
    weights = weights_of(text)
    holders = (1, max(1, ranks // 2), max(1, ranks // 2))
    widths = tuple(weight.shape[0] * each // ranks for weight, each in zip(weights, holders, strict=True))
    for rank in range(ranks):
        joined = arrived(weights).joined(Share(widths, K, rank, ranks), torch.bfloat16, CPU)
        parts = zip(weights, widths, holders, strict=True)
        wanted = torch.cat([w.dequantize()[rank // h * width :][:width] for w, width, h in parts])
        torch.testing.assert_close(dense(joined.weight), wanted, rtol=1e-6, atol=0)
        assert joined.reason is None
        assert (joined.inputs is None) == (weights[0].scheme.inputs is None)
        if joined.inputs is not None and joined.inputs.scale is not None:
            assert float(joined.inputs.scale) == pytest.approx(0.01 if "nvfp4" in text else 0.03)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("text", SCHEMES)
def test_shares_of_inputs_are_columns_of_the_weight(text, ranks):
    [weight] = weights_of(text, (256,))
    for rank in range(ranks):
        k = K // ranks
        joined = arrived([weight]).joined(Share((256,), k, rank, ranks), torch.bfloat16, CPU)
        torch.testing.assert_close(dense(joined.weight), weight.dequantize()[:, rank * k :][:, :k], rtol=1e-6, atol=0)
        kind = W8a8 if takes_codes(weight) else Packed
        assert isinstance(load_weight(joined.weight, torch.bfloat16), kind)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("text", SCHEMES)
def test_four_processes_have_the_product_between_them(text, device):
    """A linear of 4 processes, split by outputs and by inputs, each share run by itself on one device."""
    weights, ranks = weights_of(text), 4
    scheme, x = weights[0].scheme, (0.25 * torch.randn(3, K, generator=torch.Generator().manual_seed(7))).bfloat16()

    def product(share: Share, matrices: list[QTensor], columns: torch.Tensor) -> torch.Tensor:
        joined = arrived(matrices).joined(share, torch.bfloat16, torch.device(device))
        linear = Linear(load_weight(joined.weight, torch.bfloat16), None, joined.inputs)
        return linear(columns.to(device)).float().cpu()

    shares = [Share((SIZES[0],), K // ranks, rank, ranks) for rank in range(ranks)]
    by_inputs = [product(share, weights[:1], part) for share, part in zip(shares, x.chunk(ranks, 1), strict=True)]
    widths = tuple(n // ranks for n in SIZES)
    by_outputs = [product(Share(widths, K, rank, ranks), weights, x).split(widths, 1) for rank in range(ranks)]
    exact = [x.float() @ weight.dequantize().T for weight in weights]
    found = [sum(by_inputs), *(torch.cat(parts, 1) for parts in zip(*by_outputs, strict=True))]
    slack = 0.006 if scheme.inputs is None else 0.16 if scheme.inputs.number.bits == 4 else 0.05
    for y, wanted in zip(found, [exact[0], *exact], strict=True):
        assert (y - wanted).norm() < slack * wanted.norm()


def test_a_linear_of_the_file_may_hold_all_of_them():
    [weight] = weights_of("int4-g128", (1024,))
    for rank in (0, 1):
        arriving = arrived([weight, weight], together=True)
        joined = arriving.joined(Share((256, 256), K, rank, 2), torch.bfloat16, CPU)
        rows = torch.cat([torch.arange(256), 512 + torch.arange(256)]) + 256 * rank
        assert torch.equal(dense(joined.weight), weight.dequantize()[rows])


def test_the_share_of_a_vocabulary_is_padded():
    [weight] = weights_of("int8-channel", (250,))
    joined = arrived([weight]).joined(Share((128,), K, 1, 2, first=128), torch.bfloat16, CPU)
    found = dense(joined.weight)
    assert torch.equal(found[:122], weight.dequantize()[128:])
    assert torch.equal(found[122:], weight.dequantize()[-1:].expand(6, -1))


def test_different_schemes_in_one_product_are_expanded_with_the_reason():
    first, second = weights_of("int4-g128", (64,))[0], weights_of("int8-channel", (64,))[0]
    joined = arrived([first, second]).joined(Share((64, 64), K), torch.bfloat16, CPU)
    assert joined.reason == "int4-g128, int8 beside other weights in one product"
    assert isinstance(load_weight(joined.weight, torch.bfloat16), Dense)
    torch.testing.assert_close(dense(joined.weight)[:64], first.dequantize(torch.bfloat16).float())


def test_a_linear_in_16_bits_stands_beside_a_quantized_one():
    [weight], plain = weights_of("int4-g128", (64,)), torch.randn(64, K).bfloat16()
    arriving = Arriving(["q", "k"], [weight.scheme, None], K)
    assert set(arriving.suffixes) == {"weight_packed", "weight_scale", "weight_shape", "weight"}
    for key, tensor in COMPRESSED_TENSORS.write("", weight).items():
        arriving.put(key.removeprefix("."), tensor, 0)
    assert arriving.missing == ["k.weight"]
    arriving.put("weight", plain, 1)
    joined = arriving.joined(Share((64, 64), K), torch.bfloat16, CPU)
    assert torch.equal(dense(joined.weight)[64:], plain.float())


def refused(arriving: Arriving, share: Share, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        arriving.joined(share, torch.bfloat16, CPU)


def test_what_does_not_split_is_refused_with_the_name():
    [weight] = weights_of("int4-g128", (256,))
    refused(arrived([weight]), Share((256,), 192, 0, 2), r"layers\.0\.0: its 512 inputs in groups of 128 do not split")
    refused(
        arrived([weight]), Share((100,), K, 0, 2), r"layers\.0\.0: its 256 outputs do not split into 2 parts of 100"
    )
    refused(arrived([weight]), Share((64, 32), K, 0, 2), r"its 256 outputs do not split into 2 times 64 \+ 32")
    arriving = arrived([weight])
    arriving.k = 384
    refused(arriving, Share((256,), 384), "it has 512 inputs, the model 384")


def test_what_is_missing_or_wrong_is_named():
    [weight] = weights_of("nvfp4-a16", (64,))
    arriving = arrived([weight])
    del arriving.tensors[0, "weight_global_scale"]
    refused(arriving, Share((64,), K), r"layers\.0\.0\.weight_global_scale: not in the files")
    arriving = arrived([weight])
    arriving.put("weight_global_scale", torch.zeros(1), 0)
    refused(arriving, Share((64,), K), r"layers\.0\.0: .*divisor")
    with pytest.raises(CheckpointError, match="down: 100 inputs do not divide into groups of 16"):
        _ = Arriving(["down"], [weight.scheme], 100).suffixes


def test_one_linear_of_the_file_cannot_have_two_schemes():
    schemes: list[Scheme | None] = [parse_scheme("int4-g128"), parse_scheme("int8")]
    with pytest.raises(CheckpointError, match=r"gate \+ up: one linear in the file, with several schemes"):
        Arriving(["gate", "up"], schemes, K).put("weight_packed", torch.zeros(1), None)


def test_columns_in_act_order_are_dense():
    [weight] = weights_of("int4-g128", (64,))
    order = torch.randperm(K, generator=torch.Generator().manual_seed(1))
    moved = QTensor(weight.codes, weight.scales, None, weight.scheme, order=order)
    assert torch.equal(columns_of(moved, 32, 64), moved.dequantize(torch.bfloat16)[:, 32:96])
    assert reason_against([moved]) == "int4-g128: its inputs are in another order (act-order)"


def test_shapes_without_a_kernel_say_why():
    [weight] = weights_of("int8-channel", (64,), 48)
    assert reason_against([weight]) == "int8: 48 inputs: the kernels take multiples of 32"


def test_a_placeholder_hands_tensors_on():
    found = []
    parameter = placeholder(lambda *arguments: found.append(arguments))
    parameter.weight_loader(parameter, torch.ones(2), "q")  # type: ignore[attr-defined]
    assert parameter.numel() == 0
    assert found[0][2] == "q"
