"""The choice of a token's experts and of their weights, from its hidden state and a router's weight: one kernel,
csrc/route_experts.cu, or plain torch."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.quant.kernels.extension import launch, reason_against_device
from lowbit.quant.kernels.problem import Deferred, reason_against_squares
from lowbit.quant.kernels.reference import inverse_deviation

# Limits of the kernel.
MOST_ROWS, MOST_EXPERTS, MOST_TOP, MOST_GROUPS, MOST_BEST = 65535, 512, 32, 32, 2
MOST_BLOCKS = 8  # of a cluster that shares a row
ROW_STEP = 8  # inputs that are read together
SCORES = ("softmax", "sigmoid", "chosen", "mixer")
LEAST_SUM = 1e-20  # added to sums that divide, as the models do


@dataclass(frozen=True)
class Rule:
    """The way from one logit per expert to a token's experts.

    top          number of experts of a token
    scores       "softmax" or "sigmoid" of the logits; "chosen": softmax of the logits of the chosen alone; "mixer": two
                 experts in turn, each with its share of a softmax over the logits near it (sparsemixer, Phi-MoE)
    normalized   True: the weights of a token's experts are divided by their sum
    scale        factor of the weights
    groups       equal groups of neighbouring experts; a token uses the best `used_groups` of them
    group_best   a group is as good as the sum of this many best scores in it
    jitter       of "mixer": a logit is near the best one within 2 * jitter, relative to the larger of the two
    """

    top: int
    scores: str = "softmax"
    normalized: bool = True
    scale: float = 1.0
    groups: int = 1
    used_groups: int = 1
    group_best: int = 1
    jitter: float = 0.0

    def reason_against(self, experts: int) -> str | None:
        """The reason why no token can choose so among `experts`, or None."""
        if type(self.top) is not int or not 1 <= self.top <= experts:
            return f"{self.top} experts of a token, of {experts}"
        if not math.isfinite(self.scale) or not math.isfinite(self.jitter):
            return f"weights times {self.scale}, a jitter of {self.jitter}: finite numbers are needed"
        if self.scores not in SCORES or (self.scores == "mixer" and self.top != 2):
            return f"scores {self.scores!r} for {self.top} experts of a token: {', '.join(SCORES)}, mixer for 2"
        if self.groups < 1 or experts % self.groups or not 1 <= self.used_groups <= self.groups:
            return f"{self.used_groups} of {self.groups} groups of {experts} experts"
        size = experts // self.groups
        if self.top > self.used_groups * size or self.group_best > size:
            return f"{self.top} experts of {self.used_groups} groups of {size}, ranked by {self.group_best}"
        return None


@dataclass(frozen=True)
class RouteCall:
    """Rows to route. Of equal scores the first expert is better; NaN is better than all, as in torch.

    x           (m, k)        floating point
    weight      (experts, k)  x's dtype
    bias        (experts)     of the logits, or None
    correction  (experts)     float32, added to scores for the choice alone, or None
    deferred    the norm still to finish on x, or None
    dependent   launch without waiting for the previous kernel (programmatic dependent launch)
    factors     (experts)     float32, of the weights of a row's experts, or None
    """

    x: Tensor
    weight: Tensor
    rule: Rule
    bias: Tensor | None = None
    correction: Tensor | None = None
    deferred: Deferred | None = None
    dependent: bool = False
    factors: Tensor | None = None

    def empty(self) -> tuple[Tensor, Tensor]:
        """Memory for the result."""
        shape = self.x.shape[0], self.rule.top
        return self.x.new_empty(shape, dtype=torch.int32), self.x.new_empty(shape, dtype=torch.float32)

    def check(self) -> None:
        """ValueError if the tensors do not fit together."""
        x, w = self.x, self.weight
        if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
            raise ValueError(
                f"x of shape {tuple(x.shape)} with a router {tuple(w.shape)}: rows of its width are needed"
            )
        of_experts = {"bias": self.bias, "correction": self.correction, "factors": self.factors}
        for name, tensor in of_experts.items():
            if tensor is not None and tuple(tensor.shape) != w.shape[:1]:
                raise ValueError(f"{name} of shape {tuple(tensor.shape)} for {w.shape[0]} experts")
        for name, tensor in ({"weight": w} | of_experts).items():
            if tensor is not None and tensor.device != x.device:
                raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
        reason = self.rule.reason_against(w.shape[0]) or reason_against_squares(
            len(x), x.device, x.shape[1], self.deferred
        )
        if reason is not None:
            raise ValueError(reason)


def route(call: RouteCall) -> tuple[Tensor, Tensor]:
    """Experts (m, top) int32, best first, and their weights (m, top) float32. ValueError if tensors do not fit."""
    call.check()
    return reference(call) if reason_against(call) else run_kernel(call)


def reason_against(call: RouteCall) -> str | None:
    """The reason why the kernel cannot choose for these rows, or None."""
    x, w, rule = call.x, call.weight, call.rule
    if x.device.type != "cuda":
        return f"the tensors are on the {x.device.type}"
    if x.dtype not in (torch.float16, torch.bfloat16) or w.dtype != x.dtype or x.shape[1] % ROW_STEP:
        return f"x is {x.dtype}, the router {w.dtype}, of {x.shape[1]} inputs: it takes halves, {ROW_STEP} at a time"
    if not 0 < len(x) <= MOST_ROWS or len(w) > MOST_EXPERTS or rule.top > MOST_TOP or rule.groups > MOST_GROUPS:
        return f"{len(x)} rows, {len(w)} experts, {rule.top} of a row, {rule.groups} groups: more than it takes"
    if rule.scores == "mixer" or rule.group_best > MOST_BEST:
        return f"scores {rule.scores!r}, groups by {rule.group_best}: it has no code for them"
    for name, tensor in (("x", x), ("weight", w)):
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            return f"{name} at {tensor.data_ptr():#x} with strides {tensor.stride()}: it reads whole rows, aligned"
    return reason_against_device(torch.cuda.get_device_capability(x.device))


def run_kernel(call: RouteCall) -> tuple[Tensor, Tensor]:
    """The result of `call`, which `check` has passed, by csrc/route_experts.cu."""
    (m, k), (experts, weights), rule, deferred = call.x.shape, call.empty(), call.rule, call.deferred
    args = {name: getattr(call, name) for name in ("x", "weight", "bias", "correction", "factors")}
    args |= {name: getattr(rule, name) for name in ("top", "scores", "normalized", "scale", "groups", "used_groups")}
    args |= {"group_best": rule.group_best, "experts_of_rows": experts, "weights_of_rows": weights}
    args |= {"x_squares": deferred and deferred.squares, "x_parts": deferred.squares.shape[1] if deferred else 0}
    args |= {"m": m, "k": k, "experts": len(call.weight), "norm_eps": deferred.eps if deferred else 0.0}
    if rule.scores == "softmax" and rule.normalized and rule.groups == 1 and call.correction is None:
        args["scores"] = "chosen"  # a softmax over the chosen experts is that over all, divided by their sum
    blocks = MOST_BLOCKS if torch.cuda.get_device_capability(call.x.device) >= (9, 0) else 1
    launch("route_experts", call.x.dtype, device=call.x.device, args=args, blocks=blocks, dependent=call.dependent)
    return experts, weights


def reference(call: RouteCall) -> tuple[Tensor, Tensor]:
    """The result of `call` in plain torch, from float32 logits."""
    rule = call.rule
    bias = None if call.bias is None else call.bias.float()
    logits = functional.linear(call.x.float(), call.weight.float())
    if call.deferred is not None:
        logits = logits * inverse_deviation(call.deferred)
    if bias is not None:
        logits = logits + bias
    if rule.scores == "mixer":
        experts, weights = mixed(logits, rule.jitter)
    else:
        experts, weights = ranked(logits, rule, call.correction)
    if rule.normalized:
        weights = weights / (weights.sum(-1, keepdim=True) + LEAST_SUM)
    weights = weights * rule.scale
    return experts.int(), weights if call.factors is None else weights * call.factors[experts]


def ranked(logits: Tensor, rule: Rule, correction: Tensor | None) -> tuple[Tensor, Tensor]:
    """The best experts by their scores, and these scores."""
    scores = logits
    if rule.scores != "chosen":
        scores = logits.softmax(-1) if rule.scores == "softmax" else logits.sigmoid()
    ranks = scores if correction is None else scores + correction
    if rule.groups > 1:
        ranks = ranks.masked_fill(~in_best_groups(ranks, rule), -torch.inf)
    experts = best(ranks, rule.top)
    weights = scores.gather(-1, experts)
    return experts, weights.softmax(-1) if rule.scores == "chosen" else weights


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the largest scores of each row, the first of equals first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def in_best_groups(ranks: Tensor, rule: Rule) -> Tensor:
    """(m, experts) bool: True for experts of a row's best groups."""
    grouped = ranks.unflatten(-1, (rule.groups, -1))
    used = best(grouped.topk(rule.group_best, -1).values.sum(-1), rule.used_groups)
    mask = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=ranks.device).scatter(-1, used, value=True)
    return mask.unsqueeze(-1).expand_as(grouped).flatten(1)


def mixed(logits: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """The two best experts, each with its share of the logits near it; the second as if the first were not there.

    Differences are relative to the larger magnitude of a logit and the best one left.
    """
    experts, weights, left = [], [], logits
    for _ in range(2):
        most, chosen = left.max(-1, keepdim=True)
        apart = (most - logits) / torch.maximum(logits.abs(), most)
        near = left.masked_fill(apart > 2 * jitter, -torch.inf)
        experts.append(chosen)
        weights.append(near.softmax(-1).gather(-1, chosen))
        left = left.scatter(-1, chosen, -torch.inf)
    return torch.cat(experts, -1), torch.cat(weights, -1)
