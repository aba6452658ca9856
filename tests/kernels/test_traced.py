"""quant/kernels/traced.py: a linear of any kind as one operator, alone and inside torch.compile."""

import pytest
import torch

from lowbit.quant.kernels.traced import FORMS, form_of, multiply
from lowbit.quant.kernels.weight import Dense, Hints, Linear, Packed, W8a8, inputs_of, load_weight
from lowbit.quant.qtensor import QTensor, round_to_nearest
from lowbit.quant.scheme import parse_scheme

N, K = 48, 256
KINDS = {
    "int4-g128": Packed,
    "uint4-g32": Packed,
    "int3-g64": Packed,
    "int4-a8": Packed,
    "int4-afp8": Packed,
    "fp8": W8a8,
    "fp8-a16": Packed,
    "fp8-block": W8a8,
    "nvfp4": Packed,
    "mxfp4-a16": Packed,
    "int8-a8": W8a8,
    "int8-a8-static": W8a8,
    "q4_k": Dense,
}


def linear_of(text: str, bias: bool) -> Linear:
    generator, scheme = torch.Generator().manual_seed(5), parse_scheme(text)
    w = round_to_nearest(torch.randn(N, K, generator=generator), scheme.weights_only, torch.bfloat16)
    scale = torch.tensor(0.03) if scheme.static_inputs else None
    weight = QTensor(w.codes, w.scales, w.zeros, scheme, scale, w.divisor)
    vector = torch.randn(N, generator=generator).bfloat16() if bias else None
    return Linear(load_weight(weight, torch.bfloat16), vector, inputs_of(weight), Hints(dependent=True))


@pytest.mark.parametrize("text", KINDS)
def test_the_operator_is_the_linear_and_compiles_to_its_parts(text):
    linear = linear_of(text, bias=text != "fp8")
    assert isinstance(linear.weight, KINDS[text])
    form, tensors = form_of(linear)
    assert FORMS[form].kind is KINDS[text]
    scale = None if linear.inputs is None else linear.inputs.scale

    following = torch.zeros(16, 64, 64, dtype=torch.int32)

    def product(x: torch.Tensor) -> torch.Tensor:
        return multiply(x, list(tensors.values()), linear.bias, scale, following, form).relu()

    seen: list[str] = []

    def noting(graph: torch.fx.GraphModule, example: object) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    whole, parts = (torch.compile(product, fullgraph=True, backend=end) for end in (noting, "aot_eager"))
    x = torch.randn((2, 3, K), generator=torch.Generator().manual_seed(7)).bfloat16()
    wanted = linear(x).relu()
    apart = 0.08 if text == "int4-a8" else 0.02  # traced, its x is in codes; few rows otherwise stay in bfloat16
    for found in (product(x), whole(x), parts(x)):
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=apart)
    assert any("traced_linear" in name for name in seen)


def test_forms_of_equal_linears_are_equal_and_of_others_are_not():
    first, again, other = (form_of(linear_of(text, False))[0] for text in ("fp8", "fp8", "fp8-a16"))
    assert first == again != other
