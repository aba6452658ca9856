"""One block during quantization: float32 master weights, the running copy, and all changes to both."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from lowbit.calibrate import ranks
from lowbit.calibrate.capture import SiteStats
from lowbit.errors import CheckpointError
from lowbit.models.products import InputRounding, LinearInputs, bias_view, rounded_inputs, taped, weight_view
from lowbit.models.routing import widened, widest
from lowbit.models.skeleton import Block
from lowbit.models.states import States
from lowbit.models.walk import Walk
from lowbit.quant.algos.rotate import rotation, turned_inputs, turned_outputs
from lowbit.quant.naming import EXPERT, expert_of, expert_role, largest_by_parent, parent_set
from lowbit.quant.numerics import divisor_of, input_rounding, input_scale_of
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import Scheme
from lowbit.quant.site import Fold, Heads, Site
from lowbit.quant.stats import Stats, output_energy

# Experts below either threshold see the tokens of a wider choice; if these are too few as well, they are rounded to
# nearest: their statistics are too thin to trust.
EXPERT_TOKENS, EXPERT_SHARE = 32, 0.005
WIDER = 4  # times as many experts of a token, before all of them


def least_tokens(tokens: int) -> int:
    """The fewest of all `tokens` that an expert's statistics are trusted with."""
    return max(EXPERT_TOKENS, math.ceil(EXPERT_SHARE * tokens))


def tokens_of(stats: Stats | None) -> int:
    """The number of tokens in `stats`."""
    return 0 if stats is None else stats.tokens


class _Seen(Exception):
    """Stops a run of the block early, once all needed inputs were seen."""


class BlockWork:
    """A loaded block during quantization.

    index, walk  the block is `walk.skeleton.blocks[index]`; it must be loaded
    schemes      scheme of each linear to quantize; split into `schemes` (weights only) and `inputs` (quantized inputs)
    scale_dtype  dtype of scales
    kept_dtype   dtype of weights that are stored unquantized; None for scale_dtype

    masters    float32 weights with transforms applied; the module computes with a copy in the walk's dtype
    stats      calibration statistics of each linear, without experts in `scarce`
    tokens     number of calibration tokens at each linear, as the model routes them
    widened    number of tokens of experts that saw too few of their own, with those of a wider choice
    scarce     linears with too few calibration tokens, with the reason
    outliers   outlier_ratio of each linear's input, before transforms
    fallbacks  linear -> deviations from the requested treatment, as sentences
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
        self.schemes = {name: scheme.weights_only for name, scheme in schemes.items()}
        self.inputs = {name: scheme.inputs for name, scheme in schemes.items() if scheme.inputs}
        self.scale_dtype = scale_dtype
        self.kept_dtype = kept_dtype or scale_dtype
        self.stats: dict[str, Stats] = {}
        self.tokens: dict[str, int] = {}
        self.widened: dict[str, int] = {}
        self.scarce: dict[str, str] = {}
        self.outliers: dict[str, float] = {}
        self.fallbacks: dict[str, list[str]] = {}
        self.model = walk.skeleton.model
        self.specs = {spec.name: spec for spec in self.block.linears}
        self.masters = {spec.name: self.weight(spec.name).to(torch.float32, copy=True) for spec in self.block.linears}
        self.index, self._walk = index, walk
        self._divisors: dict[str, Tensor] = {}

    def parameter(self, name: str) -> Tensor:
        """The running parameter with this name in the model."""
        return self.model.get_parameter(name).data

    def weight(self, linear: str) -> Tensor:
        """The running weight (n, k) of `linear`, a view."""
        spec = self.specs[linear]
        return weight_view(self.parameter(spec.placement.parameter), spec)

    def bias(self, linear: str) -> Tensor | None:
        """The running bias (n,) of `linear`, a view; None without a bias."""
        return bias_view(self.parameter, self.specs[linear])

    def use(self, weights: dict[str, QTensor]) -> None:
        """Load the dequantized `weights` into the module."""
        for name, weight in weights.items():
            self.weight(name).copy_(weight.dequantize())

    def note(self, linear: str, fallback: str) -> None:
        """Record a deviation from the requested treatment of `linear`."""
        self.fallbacks.setdefault(linear, []).append(fallback)

    def run(self, batches: Iterable[States]) -> list[States]:
        """The block's outputs for `batches`, with inputs in 16 bits."""
        return [self._walk.run(self.index, states) for states in batches]

    def run_quantized(self, batches: Iterable[States]) -> list[States]:
        """The block's outputs for `batches`, with inputs rounded according to the schemes."""
        with self.rounded_inputs(self.input_rounding()):
            return self.run(batches)

    def input_scale(self, linear: str, columns: Tensor | float = 1.0) -> Tensor | None:
        """The static input scale () float32 of `linear` after division by `columns` (k,); it covers the largest input
        seen.

        None if each token has its own scale. An expert with too few tokens takes the largest scale of the other
        experts, or 1 if no expert saw any.
        """
        inputs = self.inputs.get(linear)
        if inputs is None or not inputs.static:
            return None
        alike = [linear] if linear in self.stats else [n for n in self.stats if expert_role(n) == expert_role(linear)]
        if not alike:
            return torch.ones((), device=self.weight(linear).device)
        largest = torch.stack([self.stats[name].abs_max for name in alike]).amax(0)
        limits = torch.finfo(torch.float32)
        return input_scale_of((largest / columns).amax(), inputs).clamp(limits.tiny, limits.max)

    def divisor(self, linear: str) -> Tensor | None:
        """The divisor () of the scales of `linear`, shared by all linears with the same parent; None if scales have
        none."""
        scheme = self.schemes[linear]
        if not scheme.weights.parent:
            return None
        if not self._divisors:
            largest = largest_by_parent((name, self.masters[name]) for name in self.schemes)
            self._divisors = {name: divisor_of(largest[parent_set(name)], scheme.weights) for name in self.schemes}
        return self._divisors[linear]

    def input_rounding(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """The input rounding function of each linear with quantized inputs."""
        return {name: self.rounding_of(name) for name in self.inputs}

    def rounding_of(self, linear: str, columns: Tensor | float = 1.0) -> Callable[[Tensor], Tensor]:
        """The input rounding function of `linear` after division by `columns` (k,). Its scheme must quantize inputs."""
        return input_rounding(self.inputs[linear], self.input_scale(linear, columns))

    def finished(self, weights: dict[str, QTensor]) -> dict[str, QTensor]:
        """`weights` on the CPU, with the inputs' scheme and scale added."""
        return {
            name: replace(
                weight,
                scheme=replace(weight.scheme, inputs=self.inputs.get(name)),
                input_scale=self.input_scale(name),
            ).to("cpu")
            for name, weight in weights.items()
        }

    def rounded_inputs(self, rounds: InputRounding) -> AbstractContextManager[None]:
        """A context in which the given linears round their inputs."""
        return rounded_inputs(self.block, self.model, rounds)

    @contextmanager
    def gradients(self, linears: Iterable[str]) -> Iterator[Callable[[], Iterator[tuple[str, Tensor]]]]:
        """A context with gradients for the weights of `linears`.

        Yields a function that returns (name, gradient (n, k)) for each weight with a gradient so far.
        """
        parameters = {name: self.model.get_parameter(self.specs[name].placement.parameter) for name in linears}

        def reached() -> Iterator[tuple[str, Tensor]]:
            ranks.total_gradients(parameters.values())
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    yield name, weight_view(parameter.grad, self.specs[name])

        with taped(parameters.values()):
            yield reached

    def observe(self, entering: list[States], sites: list[Site], gram_tokens: int, up_to: int | None = None) -> None:
        """Gather the statistics of every site over all batches, split over the ranks.

        gram_tokens  tokens used for second moments; experts use all tokens routed to them
        up_to        stop after at least this many tokens, and leave a batch once all sites have seen it

        CheckpointError names the site and the samples if an input is NaN or infinite.
        """
        tokens, seen = self._seen(entering, sites, gram_tokens, up_to)
        wide = self._seen_widely(entering, sites, seen, tokens)
        for site in sites:
            for name in site.linears:
                self._believe(name, seen.of(name), wide.get(site.linears[0]), tokens)

    def _seen(
        self, entering: list[States], sites: list[Site], gram_tokens: int, up_to: int | None
    ) -> tuple[int, SiteStats]:
        """The number of tokens that ran, and the statistics of `sites`; arguments as in `observe`."""
        seen = SiteStats(sites)
        before = [0, *accumulate(states.tokens for states in entering)]
        batches = [states for states, begun in zip(entering, before, strict=False) if up_to is None or begun < up_to]
        rounds = self.input_rounding() if self.stats else {}

        def see(names: tuple[str, ...], x: Tensor) -> None:
            seen.see(names, x)
            if up_to is not None and seen.complete:
                raise _Seen

        rounding, hooks = self.rounded_inputs(rounds), LinearInputs(self.block, self.parameter, see)
        for place, states in ranks.mine(enumerate(batches)):
            seen.next_batch(with_gram=before[place] < gram_tokens)
            with suppress(_Seen), rounding, hooks:
                self._walk.run(self.index, states)
            site = seen.broken()
            if site is not None:
                first = sum(states.shape[0] for states in batches[:place])
                raise CheckpointError(
                    f"{site.linears[0]}: its inputs are NaN or infinite for calibration samples {first} to "
                    f"{first + states.shape[0] - 1}; drop them from the dataset, or calibrate with --dtype float32"
                )
        seen.add_up(self._walk.device)
        return sum(states.tokens for states in batches), seen

    def _seen_widely(self, entering: list[States], sites: list[Site], seen: SiteStats, tokens: int) -> dict[str, Stats]:
        """Statistics of the experts that saw too few of all `tokens`, by the first linear of their site: with those
        tokens whose next best choices they are, and where these are too few, with any.

        Only statistics come from these runs: what the block hands on is routed as the model says.
        """
        experts = len({expert_of(name) for name in self.specs if EXPERT.search(name)})
        found: dict[str, Stats] = {}
        least, thin = least_tokens(tokens), [site for site in sites if EXPERT.search(site.linears[0])]
        for width, up_to in ((WIDER * widest(self.block.module), None), (experts, least)):
            thin = [site for site in thin if tokens_of(found.get(site.linears[0]) or seen.of(site.linears[0])) < least]
            if not thin or not width:
                break
            with widened(self.block.module, min(width, experts)):
                _, wide = self._seen(entering, thin, 0, up_to)
            found |= {site.linears[0]: stats for site in thin if (stats := wide.of(site.linears[0])) is not None}
        return found

    def _believe(self, name: str, stats: Stats | None, wide: Stats | None, tokens: int) -> None:
        """Keep a linear's statistics, unless it is an expert with too few of all `tokens`, `wide` ones included."""
        seen = self.tokens[name] = tokens_of(stats)
        least = least_tokens(tokens) if EXPERT.search(name) else 1
        if wide is not None and tokens_of(wide) > seen:
            stats, self.widened[name] = wide, wide.tokens
        if stats is None or stats.tokens < least:
            wider = f", {tokens_of(stats)} by a wider choice" if name in self.widened else ""
            self.scarce[name] = f"{seen} of {tokens} calibration tokens reached it{wider}, {least} are needed"
            return
        self.stats[name] = stats
        self.outliers.setdefault(name, stats.outlier_ratio())

    def rotate(self, heads: Heads) -> None:
        """Rotate the producer's outputs within `heads`, and the consumer's inputs to match. Must come before
        statistics."""
        assert not self.stats, "rotations come before statistics"
        self._divisors = {}
        producer, matrix = heads.fold.producer, rotation(heads.channels.shape[1])
        bias = self.bias(producer)
        if bias is not None:
            bias.copy_(turned_outputs(bias.float(), heads.channels, matrix))
        self.masters[producer] = turned_outputs(self.masters[producer], heads.channels, matrix)
        self.masters[heads.consumer] = turned_inputs(self.masters[heads.consumer], matrix)
        for name in (producer, heads.consumer):
            self.weight(name).copy_(self.masters[name])

    def apply(self, fold: Fold, scales: Tensor) -> None:
        """Divide the producer by `scales` and multiply its consumers, in masters, running weights and statistics."""
        self._divisors = {}
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
        """Divide a norm. Returns the scales that its rounded weight really has, so that consumers undo them exactly."""
        norm = self.model.get_submodule(fold.producer)
        weight = norm.get_parameter("weight").data
        before = weight.float() + fold.offset
        stored = (before / scales - fold.offset).to(self.kept_dtype)
        after = stored.float() + fold.offset
        exact = torch.where(after != 0, before / after, torch.ones_like(before))
        sane = (exact / scales - 1).abs() < 0.5  # a channel that would round to zero keeps its weight
        weight.copy_(torch.where(sane, stored.float(), weight.float()))
        exact = torch.where(sane, exact, torch.ones_like(exact))
        bias = norm._parameters.get("bias")
        if bias is not None:
            bias.data.copy_(bias.data.float() / exact)
        return exact

    def _divide_linear(self, fold: Fold, scales: Tensor) -> Tensor:
        self.masters[fold.producer] /= scales[:, None]
        self.weight(fold.producer).copy_(self.masters[fold.producer])
        bias = self.bias(fold.producer)
        if bias is not None:
            bias.copy_(bias.float() / scales)
        return scales

    def energy(self, name: str) -> Tensor | None:
        """The mean square (k,) of each input of a linear; None without a second moment."""
        stats = self.stats.get(name)
        return None if stats is None or stats.gram is None else stats.second_moment().diagonal()

    def output_error(self, name: str, weight: QTensor) -> float | None:
        """Relative squared error of the linear's output over the tokens of its second moment; None without one."""
        stats = self.stats.get(name)
        if stats is None or stats.gram is None:
            return None
        moment, master = stats.second_moment(), self.masters[name]
        return output_energy(weight.dequantize() - master, moment) / max(output_energy(master, moment), 1e-30)
