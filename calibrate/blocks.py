"""The loop over blocks: each is quantized on the outputs of the quantized blocks before it."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import Any, Protocol

import torch
from torch import Tensor

from lowbit.ahead import WORKERS, ahead
from lowbit.calibrate.block import BlockWork
from lowbit.calibrate.cache import cache_scales
from lowbit.calibrate.data import CalibrationSet
from lowbit.calibrate.job import Job, covered
from lowbit.calibrate.outcome import BlockOutcome, run_shared, run_stored
from lowbit.calibrate.parts import BlockTask, Rounded, Rows
from lowbit.calibrate.report import BlockReport, Stopwatch, calibrated_rows, linear_row, peak_memory
from lowbit.calibrate.rounding import MOMENT_TOKENS, TOKENS_PER_INPUT, spread
from lowbit.calibrate.settings import rounder_of, transforms_of
from lowbit.calibrate.structure import Prober
from lowbit.calibrate.written import require_scales
from lowbit.errors import CheckpointError
from lowbit.export.survey import checked
from lowbit.models.imagetext import Batch
from lowbit.models.placement import Placement
from lowbit.models.skeleton import Block, LinearSpec
from lowbit.models.states import States
from lowbit.models.walk import Walk
from lowbit.quant.algos.clip import round_plainly
from lowbit.quant.naming import EXPERT, largest_by_parent, parent_set
from lowbit.quant.numerics import divisor_of
from lowbit.quant.qtensor import QTensor
from lowbit.quant.stats import Stats, nothing_seen, stats_of

BATCH_TOKENS = 2048  # tokens per forward pass of a block
MIXED_TOKENS = 16384  # of a block with experts on a GPU, which the host asks for one by one
GRAM_TOKENS = 16384  # tokens used for the second moments of transforms and clipping


class Blocks(Protocol):
    """All blocks of a job in order, each quantized now or replayed from an earlier run."""

    def quantize(self, index: int) -> BlockOutcome:
        """The outcome of block `index`, quantized now."""

    def replay(self, index: int, outcome: BlockOutcome) -> None:
        """Skip block `index`, whose `outcome` comes from an earlier run."""


# A linear's name, its weight rounded to nearest, and its row in the report.
Nearest = tuple[str, QTensor, dict[str, Any]]


class DataFreeBlocks:
    """Blocks whose weights are rounded to nearest, with a few tensors of the file in memory at a time.

    Within its context, tensors of the next blocks are read and rounded ahead of their turn.
    """

    def __init__(self, job: Job) -> None:
        self._job, self._held = job, ExitStack()
        self._pieces: Iterator[list[Nearest]] = iter(())

    def __enter__(self) -> "DataFreeBlocks":
        self._pieces = self._held.enter_context(ahead(self._in_tensor, self._tensors(), WORKERS))
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def quantize(self, index: int) -> BlockOutcome:
        """The outcome of block `index`, the next one."""
        begun = time.monotonic()
        block = self._job.skeleton.blocks[index]
        found = list(chain.from_iterable(islice(self._pieces, len(self._names(block)))))
        weights = {name: weight for name, weight, _ in found}
        rows = {name: row for name, _, row in found}
        seconds = time.monotonic() - begun
        report = BlockReport(index, block.name, None, seconds, peak_memory(self._job.device), [], rows)
        return BlockOutcome(weights, {}, report)

    def _tensors(self) -> Iterator[tuple[Block, str, dict[str, Tensor]]]:
        """Each block's tensors that hold linears with a scheme, and the block's largest magnitudes."""
        for block in self._job.skeleton.blocks:
            largest = self._largest(block)
            yield from ((block, name, largest) for name in self._names(block))

    def _in_tensor(self, item: tuple[Block, str, dict[str, Tensor]]) -> list[Nearest]:
        """The linears in a tensor, rounded."""
        block, name, largest = item
        return [self._rounded(spec.name, w, largest) for spec, w in self._linears_of(block, name)]

    def _rounded(self, name: str, w: Tensor, largest: dict[str, Tensor]) -> Nearest:
        """The weight `w` of a linear rounded to nearest, in host memory, and its row in the report."""
        job, scheme = self._job, self._job.plan.schemes[name]
        require_scales(name, w, scheme, job.scale_dtype)
        shared = largest.get(parent_set(name))
        divisor = None if shared is None else divisor_of(shared, scheme.weights)
        weight = round_plainly(w, scheme, job.scale_dtype, divisor)
        return name, weight.to("cpu"), linear_row(job.plan, name, weight, w)

    def _names(self, block: Block) -> list[str]:
        """The block's tensors of the file that hold a linear with a scheme."""
        return [name for name in block.tensors if self._specs(block, name)]

    def _specs(self, block: Block, name: str) -> list[LinearSpec]:
        """The linears with a scheme in the file's tensor `name`."""
        schemes = self._job.plan.schemes
        return [spec for spec in _linears_in(block, name, block.tensors[name]) if spec.name in schemes]

    def _linears_of(self, block: Block, name: str) -> Iterator[tuple[LinearSpec, Tensor]]:
        """Every linear with a scheme in the file's tensor `name`, and its weight on the job's device."""
        placement = block.tensors[name]
        value = checked(name, self._read(name, placement))
        for spec in self._specs(block, name):
            yield spec, _cut(value, placement, spec).to(self._job.device)

    def _largest(self, block: Block) -> dict[str, Tensor]:
        """The largest magnitude of weights whose scales share a parent, by `parent_set`; empty if no scales have
        one."""
        schemes = self._job.plan.schemes
        related = {spec.name for spec in block.linears if spec.name in schemes and schemes[spec.name].weights.parent}
        names = [name for name in self._names(block) if any(s.name in related for s in self._specs(block, name))]
        linears = (pair for name in names for pair in self._linears_of(block, name))
        return largest_by_parent((spec.name, w) for spec, w in linears if spec.name in related)

    def _read(self, name: str, placement: Placement) -> Tensor:
        """The file's tensor `name`, or the parameter that transformers converts it to."""
        read = self._job.skeleton.read
        if placement.conversion is None:
            return read(name)
        return placement.conversion.parameters(self._job.skeleton.model, read)[placement.parameter]

    def replay(self, index: int, outcome: BlockOutcome) -> None:
        """Nothing to do: no block depends on another."""


def _linears_in(block: Block, name: str, placement: Placement) -> list[LinearSpec]:
    """The linears stored in the file's tensor `name`: one, or every expert of a stacked parameter."""
    alone = [spec for spec in block.linears if f"{spec.name}.weight" == name]
    stacked = placement.expert is None
    return alone or [spec for spec in block.linears if stacked and spec.placement.parameter == placement.parameter]


def _cut(value: Tensor, placement: Placement, spec: LinearSpec) -> Tensor:
    """The weight (n, k) of `spec` in a file's tensor."""
    stacked = placement.expert is None and value.ndim == 3
    inner = spec.placement.view(value.mT if placement.swapped else value) if stacked else value
    return inner.T if spec.transposed else inner


class BlockLoop:
    """Quantizes the blocks of `job` one after another.

    states  outputs of the quantized model so far, one per batch of calibration tokens
    exact   outputs of the unquantized model so far; the same list as `states` if no part needs them
    """

    def __init__(self, job: Job, calibration: CalibrationSet) -> None:
        compute = torch.float32 if job.device == "cpu" and job.dtype == torch.float16 else job.dtype
        mixed = any(EXPERT.search(spec.name) for block in job.skeleton.blocks for spec in block.linears)
        self.batches = calibration.batches(MIXED_TOKENS if mixed and job.device != "cpu" else BATCH_TOKENS)
        self.further = calibration.further
        self.walk = Walk(job.skeleton, job.device, compute)
        self.states = self.walk.start(self.batches)
        self.exact = self.states
        self._job = job
        self._transforms, self._rounder = transforms_of(job.recipe), rounder_of(job.recipe)
        parts = (*self._transforms, self._rounder)
        self._two_streams = any(part.needs.second_stream for part in parts) or job.recipe.distill_steps > 0
        probes = Walk(job.skeleton, job.device, torch.float32)
        self._prober = Prober(probes, calibration.words, job.recipe.seed)

    def before_head(self) -> Stats:
        """Statistics of the head's inputs in the quantized model so far, as many as GPTQ takes."""
        hidden = self._job.skeleton.model.get_output_embeddings().weight.shape[1]
        seen = nothing_seen(hidden, self.walk.device)
        for inputs in self.walk.head_inputs(self.batches, self.states):
            seen += stats_of(inputs, with_gram=True)
            if seen.tokens >= max(MOMENT_TOKENS, TOKENS_PER_INPUT * hidden):
                break
        return seen

    @torch.no_grad()
    def exact_of(self, batches: Sequence[Batch]) -> list[States]:
        """The outputs of the unquantized model's last block for other batches, in host memory. No block may be
        loaded."""
        states = self.walk.start(batches)
        for index in range(len(self._job.skeleton.blocks)):
            with self.walk.loaded(index):
                states = run_shared(self.walk, index, states)
        return [each.to("cpu") for each in states]

    def to_host(self) -> None:
        """Keep both streams in host memory from now on. No block runs any more."""
        self.states, self.exact = ([each.to("cpu") for each in stream] for stream in (self.states, self.exact))

    def quantize(self, index: int) -> BlockOutcome:
        """The outcome of block `index`. Moves both streams past it."""
        with self.walk.loaded(index), torch.no_grad():
            return self._quantize(index)

    def replay(self, index: int, outcome: BlockOutcome) -> None:
        """Move both streams past block `index`, with its `outcome` from an earlier run."""
        with self.walk.loaded(index), torch.no_grad():
            self._prober.learn(index)
            targets = self._targets(index)
            self._move_on(index, outcome, targets)

    def _quantize(self, index: int) -> BlockOutcome:
        job, block = self._job, self._job.skeleton.blocks[index]
        watch = Stopwatch(job.device)
        schemes = {spec.name: job.plan.schemes[spec.name] for spec in block.linears if spec.name in job.plan.schemes}
        with watch.phase("structure"):
            work = BlockWork(self.walk, index, schemes, job.scale_dtype, job.dtype)
            structure = self._prober.structure(index)
        with watch.phase("targets"):
            entering = [states.at(index) for states in self.states]
            sample = spread(entering)
            before = work.run(sample)
            targets = self._targets(index)
            heads = partial(self._prober.heads, index, structure)
            task = BlockTask(work, structure, heads, entering, sample, targets, job.recipe)
        with watch.phase("transforms"):
            folds = self._transform(task)
        with watch.phase("rounding"):
            for name, scheme in work.schemes.items():
                require_scales(name, work.masters[name], scheme, work.scale_dtype)
            rounded = self._rounder.round(task)
            weights = {name: each.weight for name, each in rounded.items()}
        with watch.phase("report"):
            _require_finite(block.name, before)  # after statistics, whose error names the samples
            kept = _kept_tensors(job, block, weights)
            loss = _relative_loss(work.run_quantized(sample), before, sample)
            rows = calibrated_rows(job, work, weights)
        peak = peak_memory(job.device)
        report = BlockReport(index, block.name, loss, watch.elapsed(), peak, folds, rows, watch.seconds)
        outcome = BlockOutcome(work.finished(weights), kept, report, remainders=_remainders(job, rounded))
        with watch.phase("next inputs"):
            entering = self.states
            self._move_on(index, outcome, targets)
            if job.recipe.kv_cache is not None:
                scales = cache_scales(self.walk, index, entering, job.plan.attentions, job.recipe.kv_cache)
                outcome = replace(outcome, cache=scales)
        return outcome

    def _targets(self, index: int) -> list[States]:
        """Outputs of the unmodified block `index` (loaded) for the exact stream; empty if that is not kept."""
        return run_shared(self.walk, index, self.exact) if self._two_streams else []

    def _move_on(self, index: int, outcome: BlockOutcome, targets: list[States]) -> None:
        """Run the quantized stream through the stored block; the exact stream becomes `targets`, if kept."""
        self.states = run_stored(self.walk, index, outcome, self.states)
        self.exact = targets or self.states

    def _transform(self, task: BlockTask) -> Rows:
        """Apply the transforms. Returns one report row per fold. Statistics are gathered after transforms that mix
        channels."""
        work, structure = task.work, task.structure
        rows = [row for part in self._transforms if part.mixes_channels for row in part.apply(task)]
        static = any(inputs.static for inputs in work.inputs.values())
        if self._transforms or static or self._rounder.needs.statistics:
            experts = any(EXPERT.search(name) for name in work.specs)
            # clipping needs only the tokens of the second moments; scales and experts need all tokens
            all_tokens = self._transforms or static or experts
            work.observe(task.entering, structure.sites, GRAM_TOKENS, up_to=None if all_tokens else GRAM_TOKENS)
        rows += [row for part in self._transforms if not part.mixes_channels for row in part.apply(task)]
        return rows + [{"fold": name, "skipped": "failed its proof on this block"} for name in structure.rejected]


def _remainders(job: Job, rounded: dict[str, Rounded]) -> dict[str, Tensor]:
    """The remainder of each rounded linear, on the CPU; empty if codes are not tuned."""
    if not (job.recipe.distill_steps and job.recipe.distill_codes):
        return {}
    return {name: each.weight.remainder(each.wanted).to("cpu") for name, each in rounded.items()}


def _require_finite(name: str, outputs: list[States]) -> None:
    """CheckpointError if the unquantized block `name` returns NaN or infinities, as with a router whose logits are
    NaN."""
    if not all(bool(states.hidden.isfinite().all()) for states in outputs):
        raise CheckpointError(
            f"{name}: its outputs are NaN or infinite for calibration samples, before it is quantized; drop these "
            "samples from the dataset, or calibrate with --dtype float32"
        )


def _relative_loss(after: list[States], before: list[States], inputs: list[States]) -> float:
    return _energy(after, before) / max(_energy(before, inputs), 1e-30)


def _energy(one: list[States], other: list[States]) -> float:
    """The squared distance of hidden states."""
    pairs = zip(one, other, strict=True)
    return sum(float((a.hidden.float() - b.hidden.float()).square().sum()) for a, b in pairs)


def _kept_tensors(job: Job, block: Block, weights: dict[str, QTensor]) -> dict[str, Tensor]:
    """The block's unquantized tensors: changed by transforms, or bit-identical to the file."""
    done = {f"{name}.weight" for name in weights}
    kept = {}
    for name, placement in block.tensors.items():
        if name in done or placement.conversion or covered(block, placement.parameter, weights):
            continue
        owner, _, leaf = placement.parameter.rpartition(".")
        module = job.skeleton.model.get_submodule(owner)
        values = module._parameters.get(leaf)
        if values is not None:
            now, before = placement.view(values.data).cpu(), job.skeleton.read(name)
            unchanged = torch.equal(now, before.to(now.dtype))
            kept[name] = (before if unchanged else now).to(job.kept_dtype(name), copy=True)
    return kept
