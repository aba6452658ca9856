"""models/products.py: the activations of a product are told from its weight, on whichever side each stands."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lowbit.models.placement import Placement
from lowbit.models.products import LinearInputs
from lowbit.models.skeleton import Block, LinearSpec

N, K, TOKENS = 6, 4, 5
FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": nn.functional.linear,
    "linear with a bias": lambda x, w: nn.functional.linear(x, w, torch.zeros(N)),
    "linear by keywords": lambda x, w: nn.functional.linear(input=x, weight=w),
    "@": lambda x, w: x @ w.T,
    "matmul": lambda x, w: torch.matmul(x, w.T),
    "mm": lambda x, w: torch.mm(x, w.T),
    "addmm": lambda x, w: torch.addmm(torch.zeros(N), x, w.T),
    "weight first, @": lambda x, w: (w @ x.T).T,
    "weight first, mm": lambda x, w: torch.mm(w, x.T).T,
    "weight first, addmm": lambda x, w: torch.addmm(torch.zeros(N, 1), w, x.T).T,
    "weight first, batched": lambda x, w: (w @ x.T[None])[0].T,
}


@pytest.mark.parametrize("form", FORMS)
def test_the_inputs_are_seen_and_replaced(form):
    generator = torch.Generator().manual_seed(0)
    w, x, other = (torch.randn(size, K, generator=generator) for size in (N, TOKENS, TOKENS))
    block = Block("block", nn.Linear(K, N), linears=[LinearSpec("q", Placement("q.weight"), None, False, N, K)])
    seen: list[tuple[tuple[str, ...], Tensor]] = []

    def see(names: tuple[str, ...], inputs: Tensor) -> Tensor:
        seen.append((names, inputs))
        return other.expand_as(inputs)

    with LinearInputs(block, {"q.weight": w}.__getitem__, see):
        result = FORMS[form](x, w)
    ((names, inputs),) = seen
    assert names == ("q",)
    assert torch.equal(inputs.reshape(TOKENS, K), x)
    torch.testing.assert_close(result, other @ w.T)
