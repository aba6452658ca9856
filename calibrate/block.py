"""One block being quantized: its weights in float32, the running copy, and what happens to both."""

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibrate.capture import LinearInputs, SiteStats, weight_view
from models.skeleton import Block
from models.walk import Walk
from quant.algos.awq import ScaleChoice, search_scales, weight_magnitude
from quant.algos.clip import group_moments, search_shrink
from quant.numerics import fake_quantize
from quant.qtensor import QTensor, round_to_nearest
from quant.scheme import Scheme
from quant.site import Fold, Site
from quant.stats import Stats

Losses = Callable[[Tensor | None], float]


@dataclass(frozen=True)
class ModuleCalls:
    """A module's calls as they happened: arguments, and the first tensor it returned, in float32."""

    module: nn.Module
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]]

    def error(self) -> float:
        """Mean squared difference of what the module returns now from what it returned then."""
        total = sum(
            float((_first(self.module(*args, **kwargs)).float() - then).square().mean())
            for args, kwargs, then in self.calls
        )
        return total / max(len(self.calls), 1)


class BlockWork:
    """A loaded block while it is quantized.

    index, walk  the block is `walk.skeleton.blocks[index]`, and must be loaded
    schemes      scheme of each linear to quantize
    scale_dtype  dtype of scales
    kept_dtype   dtype of the weights that are stored unquantized; where None, that of the scales

    `masters` are the linears' weights in float32, transforms applied; the module computes with the same weights in the
    walk's dtype.
    """

    def __init__(
        self,
        walk: Walk,
        index: int,
        schemes: dict[str, Scheme],
        scale_dtype: torch.dtype,
        kept_dtype: torch.dtype | None = None,
    ) -> None:
        self.block: Block = walk.skeleton.blocks[index]
        self.schemes = schemes
        self.scale_dtype = scale_dtype
        self.kept_dtype = kept_dtype or scale_dtype
        self.stats: dict[str, Stats] = {}
        self.outliers: dict[str, float] = {}  # outlier_ratio of each linear's input before any transform
        self._walk, self._index = walk, index
        self._model = walk.skeleton.model
        self._specs = {spec.name: spec for spec in self.block.linears}
        self.masters = {spec.name: self.weight(spec.name).to(torch.float32, copy=True) for spec in self.block.linears}

    def parameter(self, name: str) -> Tensor:
        """The running parameter of that name in the model."""
        return self._model.get_parameter(name).data

    def weight(self, linear: str) -> Tensor:
        """The running weight (n, k) of `linear`, a view."""
        spec = self._specs[linear]
        return weight_view(self.parameter(spec.placement.parameter), spec)

    def run(self, hidden: Iterable[Tensor]) -> list[Tensor]:
        """The block's outputs for batches of hidden states."""
        return [self._walk.run(self._index, states) for states in hidden]

    def observe(self, hidden: list[Tensor], sites: list[Site], gram_tokens: int) -> None:
        """Gather the statistics of every site over all batches."""
        seen = SiteStats(sites, gram_tokens)
        with LinearInputs(self.block, self.parameter, seen.see):
            for states in hidden:
                self._walk.run(self._index, states)
        for name in self._specs:
            stats = seen.of(name)
            if stats is not None:
                self.stats[name] = stats
                self.outliers[name] = stats.outlier_ratio()

    def reason_against(self, fold: Fold) -> str | None:
        """Why there is nothing to search at `fold`, or None."""
        if not any(name in self.schemes for name in fold.columns):
            return "none of its consumers is quantized"
        if not any(name in self.stats for name in fold.columns):
            return "no calibration token reached its consumers"
        return None

    def search_fold(self, fold: Fold, hidden: list[Tensor]) -> ScaleChoice:
        """Search the scale of `fold`, which nothing must stand against, and apply the winner.

        hidden  the batches that module outputs are compared on
        """
        reached = {name: self.stats[name].abs_mean for name in fold.columns if name in self.stats}
        quantized = [name for name in fold.columns if name in self.schemes]
        activation = fold.per_channel(reached, "mean")
        magnitude = fold.per_channel(
            {name: weight_magnitude(self.masters[name], self.schemes[name]) for name in quantized}, "mean"
        )
        choice = search_scales(activation, magnitude, self._losses(fold, quantized, hidden))
        if choice.scales is not None:
            self._apply(fold, fold.on_used_channels(choice.scales))
        return choice

    def _losses(self, fold: Fold, quantized: list[str], hidden: list[Tensor]) -> Losses:
        """The loss of a candidate: error of the output of the smallest module that holds all consumers.

        Where that is one linear of few inputs, its second moment gives the error over all tokens at once, for less.
        """
        if len(fold.columns) == 1 and self._specs[quantized[0]].k <= sum(states[..., 0].numel() for states in hidden):
            return self._linear_losses(fold, quantized[0])
        calls = self._record(self._common_module(fold.columns), hidden)

        def loss(scales: Tensor | None) -> float:
            with self._trial(fold, quantized, scales):
                return calls.error()

        return loss

    def _linear_losses(self, fold: Fold, name: str) -> Losses:
        moment = self.stats[name].second_moment()
        master = self.masters[name]

        def loss(scales: Tensor | None) -> float:
            error = self._rounded(fold, name, scales) - master
            return float(((error @ moment) * error).sum())

        return loss

    def _rounded(self, fold: Fold, name: str, scales: Tensor | None) -> Tensor:
        """The consumer's weight as it would act on unscaled inputs, were it rounded under `scales`."""
        master, scheme = self.masters[name], self.schemes[name]
        if scales is None:
            return fake_quantize(master, scheme, self.scale_dtype)
        columns = fold.column_scales(scales, name)
        return fake_quantize(master * columns, scheme, self.scale_dtype) / columns

    @contextmanager
    def _trial(self, fold: Fold, quantized: list[str], scales: Tensor | None) -> Any:
        for name in quantized:
            self.weight(name).copy_(self._rounded(fold, name, scales))
        try:
            yield
        finally:
            for name in quantized:
                self.weight(name).copy_(self.masters[name])

    def _common_module(self, names: Iterable[str]) -> nn.Module:
        owners = [self._specs[name].placement.parameter.split(".")[:-1] for name in names]
        common = []
        for parts in zip(*owners, strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        return self._model.get_submodule(".".join(common))

    def _record(self, module: nn.Module, hidden: list[Tensor]) -> ModuleCalls:
        calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.append((args, kwargs, _first(output).float()))

        handle = module.register_forward_hook(keep, with_kwargs=True)
        try:
            self.run(hidden)
        finally:
            handle.remove()
        return ModuleCalls(module, calls)

    def _apply(self, fold: Fold, scales: Tensor) -> None:
        """Divide the producer by `scales` and multiply its consumers, in masters, running weights and statistics."""
        exact = self._divide_linear(fold, scales) if fold.is_linear else self._divide_norm(fold, scales)
        moved: dict[int, Stats] = {}
        for name in fold.columns:
            columns = fold.column_scales(exact, name)
            self.masters[name] *= columns
            self.weight(name).copy_(self.masters[name])
            if name in self.stats:
                before = self.stats[name]
                self.stats[name] = moved.setdefault(id(before), before.scaled(columns))

    def _divide_norm(self, fold: Fold, scales: Tensor) -> Tensor:
        """Divide a norm; return the scales that its rounded weight really has, so that consumers undo them exactly."""
        norm = self._model.get_submodule(fold.producer)
        weight = norm.get_parameter("weight").data
        before = weight.float() + fold.offset
        stored = (before / scales - fold.offset).to(self.kept_dtype)
        after = stored.float() + fold.offset
        exact = torch.where(after != 0, before / after, torch.ones_like(before))
        sane = (exact / scales - 1).abs() < 0.5  # a channel that rounding to zero would lose keeps its weight
        weight.copy_(torch.where(sane, stored.float(), weight.float()))
        exact = torch.where(sane, exact, torch.ones_like(exact))
        bias = norm._parameters.get("bias")
        if bias is not None:
            bias.data.copy_(bias.data.float() / exact)
        return exact

    def _divide_linear(self, fold: Fold, scales: Tensor) -> Tensor:
        self.masters[fold.producer] /= scales[:, None]
        self.weight(fold.producer).copy_(self.masters[fold.producer])
        bias = self._specs[fold.producer].bias
        if bias is not None:
            self.parameter(bias).copy_(self.parameter(bias).float() / scales)
        return scales

    def round(self, clip: bool) -> dict[str, QTensor]:
        """Round every linear that has a scheme, and let the module compute with the result."""
        rounded = {}
        for name, scheme in self.schemes.items():
            master, stats = self.masters[name], self.stats.get(name)
            shrink: Tensor | float = 1.0
            if clip and stats is not None:
                moments = group_moments(stats.second_moment(), scheme)
                shrink = search_shrink(master, scheme, self.scale_dtype, moments)
            rounded[name] = round_to_nearest(master, scheme, self.scale_dtype, shrink)
            self.weight(name).copy_(rounded[name].dequantize())
        return rounded

    def output_error(self, name: str, weight: QTensor) -> float | None:
        """Relative squared error of the linear's output over the tokens its second moment saw; None without any."""
        stats = self.stats.get(name)
        if stats is None or stats.gram is None:
            return None
        moment, master = stats.second_moment(), self.masters[name]
        error = weight.dequantize() - master
        return float(((error @ moment) * error).sum() / ((master @ moment) * master).sum().clamp(min=1e-30))


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
