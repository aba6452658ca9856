"""The choice of experts: ties, NaN, groups, and rules that contradict themselves."""

from dataclasses import replace

import pytest
import torch

from lowbit.quant.kernels import ops
from lowbit.quant.kernels.route_experts import RouteCall, Rule, route
from tests.kernels.make import assert_dependence_changes_nothing, opcheck


def routed(logits: torch.Tensor, rule: Rule, **other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts for these logits (m, experts)."""
    return route(RouteCall(logits, torch.eye(logits.shape[1]), rule, **other))


def test_the_best_come_first_and_of_equals_the_first():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    experts, weights = routed(logits, Rule(3))
    assert experts.tolist() == [[1, 3, 2], [0, 1, 2]]
    assert experts.dtype == torch.int32
    torch.testing.assert_close(weights.sum(-1), torch.ones(2))
    torch.testing.assert_close(weights[1], torch.full((3,), 1 / 3))


@pytest.mark.parametrize("scores", ["softmax", "sigmoid", "chosen"])
def test_weights_are_those_of_their_scores(scores):
    logits = torch.randn(4, 8)
    every = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid(), "chosen": logits}[scores]
    best = every.topk(2, -1)
    wanted = best.values.softmax(-1) if scores == "chosen" else best.values
    experts, weights = routed(logits, Rule(2, scores, normalized=False, scale=1.5))
    assert torch.equal(experts.long(), best.indices)
    torch.testing.assert_close(weights, 1.5 * wanted)


def test_a_correction_counts_for_the_choice_alone():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    experts, weights = routed(logits, Rule(1, "sigmoid", normalized=False), correction=torch.tensor([0.0, 0.0, 1.0]))
    assert experts.tolist() == [[2]]
    torch.testing.assert_close(weights, torch.tensor([[0.5]]))


def test_factors_count_for_the_weights_alone():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    experts, weights = routed(logits, Rule(2), factors=torch.tensor([0.5, 3.0, 100.0]))
    assert experts.tolist() == [[0, 1]]
    torch.testing.assert_close(weights, logits[:, :2].softmax(-1) * torch.tensor([[0.5, 3.0]]))


def test_only_experts_of_the_best_groups_are_chosen():
    logits = torch.tensor([[9.0, -9.0, 2.0, 2.0, 1.0, 1.0]])
    one, two = (Rule(2, "chosen", groups=3, used_groups=1, group_best=best) for best in (1, 2))
    assert routed(logits, one)[0].tolist() == [[0, 1]]
    assert routed(logits, two)[0].tolist() == [[2, 3]]


def test_a_row_of_nan_has_experts_and_weights_that_say_so():
    logits = torch.tensor([[torch.nan] * 4, [0.0, 1.0, 2.0, 3.0]])
    for scores in ("softmax", "sigmoid", "chosen", "mixer"):
        experts, weights = routed(logits, Rule(2, scores))
        assert ((experts >= 0) & (experts < 4)).all()
        assert weights[0].isnan().all()
        assert weights[1].isfinite().all()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(5), "5 experts of a token, of 4"),
        (Rule(2, "hard"), "scores 'hard'"),
        (Rule(2, scale=float("inf")), "weights times inf"),
        (Rule(3, "mixer"), "mixer for 2"),
        (Rule(1, groups=3), "1 of 3 groups of 4 experts"),
        (Rule(2, groups=4), "2 experts of 1 groups of 1"),
        (Rule(1, groups=2, group_best=3), "ranked by 3"),
    ],
)
def test_a_rule_that_contradicts_itself_is_told(rule, message):
    with pytest.raises(ValueError, match=message):
        routed(torch.zeros(1, 4), rule)


def test_tensors_that_do_not_fit_are_told():
    with pytest.raises(ValueError, match="rows of its width are needed"):
        route(RouteCall(torch.zeros(1, 3), torch.eye(4), Rule(1)))
    with pytest.raises(ValueError, match="bias of shape"):
        routed(torch.zeros(1, 4), Rule(1), bias=torch.zeros(3))


def test_the_operator_is_traceable():
    opcheck(ops.route_experts, RouteCall(torch.randn(3, 16).half(), torch.randn(4, 16).half(), Rule(2)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 7, 64])
@pytest.mark.parametrize(
    ("experts", "rule"),
    [
        (128, Rule(8)),
        (8, Rule(2)),
        (60, Rule(4, normalized=False)),
        (32, Rule(4, "chosen")),
        (256, Rule(8, "sigmoid", scale=2.5, groups=8, used_groups=4, group_best=2)),
    ],
)
def test_the_gpu_chooses_what_the_cpu_does(experts, rule, m, dtype):
    x, weight = (torch.randint(-1, 2, (rows, 2048)).to(dtype) for rows in (m, experts))
    factors = torch.rand(experts) + 0.5
    call = RouteCall(x, weight, rule, factors=factors)
    on_gpu = RouteCall(x.cuda(), weight.cuda(), rule, factors=factors.cuda())
    wanted, wanted_weights = ops.route_experts(call)
    found, weights = ops.route_experts(on_gpu)
    assert torch.equal(found.cpu(), wanted)
    torch.testing.assert_close(weights.cpu(), wanted_weights, rtol=1e-4, atol=1e-6)
    assert_dependence_changes_nothing(lambda dependent: ops.route_experts(replace(on_gpu, dependent=dependent))[1])
    one = replace(on_gpu, x=on_gpu.x[-1:].clone())
    assert torch.equal(ops.route_experts(one)[1][0], weights[-1])


@pytest.mark.gpu
def test_on_a_gpu_a_row_of_nan_has_experts_and_weights_that_say_so():
    x = torch.randn(2, 512, device="cuda").half()
    x[0, 5] = torch.nan
    experts, weights = ops.route_experts(RouteCall(x, torch.randn(64, 512, device="cuda").half(), Rule(6)))
    assert ((experts >= 0) & (experts < 64)).all()
    assert weights[0].isnan().all()
    assert weights[1].isfinite().all()
