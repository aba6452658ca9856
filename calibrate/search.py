"""Search for a fold's scale: a transform's candidates, each tried with the rounding that will be exported."""

from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from lowbit.calibrate import ranks
from lowbit.calibrate.alike import in_batches, most_at_once, stacked
from lowbit.calibrate.block import BlockWork
from lowbit.models.products import InputRounding
from lowbit.models.states import States
from lowbit.quant.algos.awq import Losses
from lowbit.quant.naming import EXPERT, expert_role
from lowbit.quant.numerics import fake_quantize
from lowbit.quant.site import Fold
from lowbit.quant.stats import Stats, output_energies


@dataclass(frozen=True)
class ModuleCalls:
    """Recorded calls of a module: arguments, and the first returned tensor in float32."""

    module: nn.Module
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]]

    def error(self) -> float:
        """Mean squared difference between the module's outputs now and the recorded ones."""
        total = sum(
            float((_first(self.module(*args, **kwargs)).float() - then).square().mean())
            for args, kwargs, then in self.calls
        )
        return total / max(len(self.calls), 1)


@dataclass(frozen=True)
class FoldSearch:
    """The search at a fold of a block, or at alike ones inside experts, each with one consumer.

    sample  batches for comparing module outputs
    """

    work: BlockWork
    folds: list[Fold]
    sample: list[States]

    def reason_against(self) -> str | None:
        """The reason why there is nothing to search here, or None."""
        if not self.quantized:
            return "none of its consumers is quantized"
        if not any(name in self.work.stats for fold in self.folds for name in fold.columns):
            return "too few calibration tokens reached its consumers"
        return None

    @property
    def quantized(self) -> list[str]:
        """The consumers with a scheme."""
        return [name for fold in self.folds for name in fold.columns if name in self.work.schemes]

    def of_inputs(self, values: Callable[[Stats], Tensor], reduce: str) -> Tensor:
        """`values` (k,) of the inputs of consumers with statistics, by channel (Fold.per_channel): (f, channels)."""
        stats = self.work.stats
        return self._per_channel(lambda name: values(stats[name]), stats, reduce)

    def of_weights(self, values: Callable[[str], Tensor], reduce: str) -> Tensor:
        """`values` (k,) of quantized consumers by channel: (f, channels)."""
        return self._per_channel(values, self.work.schemes, reduce)

    def _per_channel(self, values: Callable[[str], Tensor], among: Container[str], reduce: str) -> Tensor:
        found = ({name: values(name) for name in fold.columns if name in among} for fold in self.folds)
        return stacked([fold.per_channel(each, reduce) for fold, each in zip(self.folds, found, strict=True)])

    def apply(self, scales: Sequence[Tensor | None]) -> None:
        """At each fold, move its scales (channels,) from the producer into the consumers. None does nothing."""
        for fold, chosen in zip(self.folds, scales, strict=True):
            if chosen is not None:
                self.work.apply(fold, fold.on_used_channels(ranks.leaders(chosen)))

    def losses(self) -> Losses:
        """A function from candidates to losses: the output error of the smallest module that holds all consumers.

        Candidates are split over the ranks. If the only consumer is a linear with few inputs in 16 bits, its second
        moment gives the error over all tokens, for less work.
        """
        measured = [_measured_by_moment(self.work, fold, self.sample) for fold in self.folds]
        loss = self._linear_loss() if all(measured) else self._module_loss()
        return lambda candidates: ranks.each_numbers(candidates, len(self.folds), loss)

    def _linear_loss(self) -> Callable[[Tensor | None], list[float]]:
        names = self.quantized
        moments = stacked([self.work.stats[name].second_moment() for name in names])
        masters = stacked([self.work.masters[name] for name in names])

        def loss(scales: Tensor | None) -> list[float]:
            error = self._rounded(names, scales) - masters
            return output_energies(error[:, None], moments).flatten().tolist()

        return loss

    def _module_loss(self) -> Callable[[Tensor | None], list[float]]:
        calls = self._record(self._common_module())

        def loss(scales: Tensor | None) -> list[float]:
            with self._trial(scales):
                return [calls.error()]

        return loss

    def _rounded(self, names: list[str], scales: Tensor | None) -> Tensor:
        """The weights (e, n, k) of consumers of one shape and scheme after rounding under `scales`, in the terms of
        unscaled inputs."""
        work = self.work
        masters, scheme = stacked([work.masters[name] for name in names]), work.schemes[names[0]]
        if scales is None:
            return fake_quantize(masters, scheme, work.scale_dtype)
        columns = stacked([self._columns(name, scales) for name in names])[:, None]
        return fake_quantize(masters * columns, scheme, work.scale_dtype) / columns

    def _columns(self, name: str, scales: Tensor) -> Tensor:
        """The scale (k,) of each input of the consumer `name`, from the scales (f, channels) of all folds."""
        place = next(place for place, fold in enumerate(self.folds) if name in fold.columns)
        return self.folds[place].column_scales(scales[place], name)

    def _input_rounding(self, scales: Tensor | None) -> InputRounding:
        """Each linear's input rounding under `scales`, in the terms of unscaled inputs."""
        rounds = self.work.input_rounding()
        if scales is None:
            return rounds
        for name in self.quantized:
            if name in rounds:
                columns = self._columns(name, scales)
                rounds[name] = _rescaled(self.work.rounding_of(name, columns), columns)
        return rounds

    @contextmanager
    def _trial(self, scales: Tensor | None) -> Iterator[None]:
        self._write(lambda names: self._rounded(names, scales))
        try:
            with self.work.rounded_inputs(self._input_rounding(scales)):
                yield
        finally:
            for name in self.quantized:
                self.work.weight(name).copy_(self.work.masters[name])

    def _write(self, weights: Callable[[list[str]], Tensor]) -> None:
        """Load `weights` into the module: (e, n, k) of consumers of one shape and scheme."""
        work = self.work

        def write(names: list[str]) -> list[str]:
            for name, weight in zip(names, weights(names), strict=True):
                work.weight(name).copy_(weight)
            return names

        in_batches(
            self.quantized,
            lambda name: (work.masters[name].shape, work.schemes[name]),
            lambda name: most_at_once(work.masters[name]),
            write,
        )

    def _common_module(self) -> nn.Module:
        (fold,) = self.folds
        owners = [self.work.specs[name].placement.parameter.split(".")[:-1] for name in fold.columns]
        common = []
        for parts in zip(*owners, strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        return self.work.model.get_submodule(".".join(common))

    def _record(self, module: nn.Module) -> ModuleCalls:
        calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.append((args, kwargs, _first(output).float()))

        handle = module.register_forward_hook(keep, with_kwargs=True)
        try:
            self.work.run(self.sample)
        finally:
            handle.remove()
        return ModuleCalls(module, calls)


def searches(work: BlockWork, folds: Sequence[Fold], sample: list[States]) -> Iterator[FoldSearch]:
    """The searches at `folds`, in their order: alike ones of experts that follow each other at once, as many as memory
    allows."""

    def kind(fold: Fold) -> Hashable:
        name = _measured_by_moment(work, fold, sample)
        if name is None or not EXPERT.search(name):
            return fold.producer
        return expert_role(name), work.masters[name].shape, work.schemes[name], fold.channels

    for _, alike in groupby(folds, kind):
        some = list(alike)
        most = most_at_once(work.masters[next(iter(some[0].columns))])
        yield from (FoldSearch(work, some[first : first + most], sample) for first in range(0, len(some), most))


def _measured_by_moment(work: BlockWork, fold: Fold, sample: list[States]) -> str | None:
    """The only consumer of `fold`, if its second moment measures errors: a linear with few inputs, in 16 bits."""
    name = next(iter(fold.columns))
    if len(fold.columns) > 1 or name not in work.schemes or name not in work.stats or name in work.inputs:
        return None
    return name if work.specs[name].k <= sum(states.tokens for states in sample) else None


def _rescaled(rounding: Callable[[Tensor], Tensor], columns: Tensor) -> Callable[[Tensor], Tensor]:
    """`rounding` of inputs divided by `columns` (k,), as a function of undivided inputs."""
    return lambda x: (rounding(x.float() / columns) * columns).to(x.dtype)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
