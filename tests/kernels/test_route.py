"""The choice of experts: ties, NaN, groups, and rules that contradict themselves."""

import pytest
import torch

from lowbit.quant.kernels.route import RouteCall, Rule, route


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
