"""Search for a fold's scale: a transform's candidates, each tried with the rounding that will be exported."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lowbit.calibrate import ranks
from lowbit.calibrate.block import BlockWork
from lowbit.models.products import InputRounding
from lowbit.models.states import States
from lowbit.quant.numerics import fake_quantize
from lowbit.quant.site import Fold
from lowbit.quant.stats import Stats, output_energy

Losses = Callable[[Sequence[Tensor | None]], list[float]]


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
    """The search at one fold of a block.

    sample  batches for comparing module outputs
    """

    work: BlockWork
    fold: Fold
    sample: list[States]

    def reason_against(self) -> str | None:
        """The reason why there is nothing to search here, or None."""
        if not self.quantized:
            return "none of its consumers is quantized"
        if not any(name in self.work.stats for name in self.fold.columns):
            return "too few calibration tokens reached its consumers"
        return None

    @property
    def quantized(self) -> list[str]:
        """The consumers with a scheme."""
        return [name for name in self.fold.columns if name in self.work.schemes]

    def reached(self) -> Iterable[tuple[str, Stats]]:
        """The consumers with statistics, and these."""
        return [(name, self.work.stats[name]) for name in self.fold.columns if name in self.work.stats]

    def apply(self, scales: Tensor | None) -> None:
        """Move `scales` (channels,) from the producer into the consumers. None does nothing."""
        if scales is not None:
            self.work.apply(self.fold, self.fold.on_used_channels(ranks.leaders(scales)))

    def losses(self) -> Losses:
        """A function from candidates to losses: the output error of the smallest module that holds all consumers.

        Candidates are split over the ranks. If the only consumer is a linear with few inputs in 16 bits, its second
        moment gives the error over all tokens, for less work.
        """
        name = self.quantized[0]
        tokens = sum(states.tokens for states in self.sample)
        exact_inputs = name not in self.work.inputs
        if len(self.fold.columns) == 1 and exact_inputs and self.work.specs[name].k <= tokens:
            return self._linear_losses(name)
        calls = self._record(self._common_module())

        def loss(scales: Tensor | None) -> float:
            with self._trial(scales):
                return calls.error()

        return lambda candidates: ranks.each_number(candidates, loss)

    def _linear_losses(self, name: str) -> Losses:
        moment, master = self.work.stats[name].second_moment(), self.work.masters[name]

        def loss(scales: Tensor | None) -> float:
            return output_energy(self._rounded(name, scales) - master, moment)

        return lambda candidates: ranks.each_number(candidates, loss)

    def _rounded(self, name: str, scales: Tensor | None) -> Tensor:
        """The consumer's weight after rounding under `scales`, in the terms of unscaled inputs."""
        work = self.work
        master, scheme = work.masters[name], work.schemes[name]
        if scales is None:
            return fake_quantize(master, scheme, work.scale_dtype)
        columns = self.fold.column_scales(scales, name)
        return fake_quantize(master * columns, scheme, work.scale_dtype) / columns

    def _input_rounding(self, scales: Tensor | None) -> InputRounding:
        """Each linear's input rounding under `scales`, in the terms of unscaled inputs."""
        rounds = self.work.input_rounding()
        if scales is None:
            return rounds
        for name in self.quantized:
            if name in rounds:
                columns = self.fold.column_scales(scales, name)
                rounds[name] = _rescaled(self.work.rounding_of(name, columns), columns)
        return rounds

    @contextmanager
    def _trial(self, scales: Tensor | None) -> Iterator[None]:
        for name in self.quantized:
            self.work.weight(name).copy_(self._rounded(name, scales))
        try:
            with self.work.rounded_inputs(self._input_rounding(scales)):
                yield
        finally:
            for name in self.quantized:
                self.work.weight(name).copy_(self.work.masters[name])

    def _common_module(self) -> nn.Module:
        owners = [self.work.specs[name].placement.parameter.split(".")[:-1] for name in self.fold.columns]
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


def _rescaled(rounding: Callable[[Tensor], Tensor], columns: Tensor) -> Callable[[Tensor], Tensor]:
    """`rounding` of inputs divided by `columns` (k,), as a function of undivided inputs."""
    return lambda x: (rounding(x.float() / columns) * columns).to(x.dtype)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
