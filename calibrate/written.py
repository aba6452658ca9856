"""Writing a quantized checkpoint, and verifying the files against the tensors in memory."""

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.ahead import WORKERS, ahead, one_thread
from lowbit.calibrate.job import Job, stays
from lowbit.calibrate.outcome import BlockOutcome
from lowbit.calibrate.vocabulary import VocabularyWeight, head_name, rounded, row_of
from lowbit.errors import CheckpointError
from lowbit.export.checkpoint import open_checkpoint, sha256_of
from lowbit.export.formats import LogicalTensors
from lowbit.export.survey import checked, count_broken
from lowbit.export.tensorfile import raw_bytes
from lowbit.export.writer import CheckpointWriter
from lowbit.models.placement import engine_names
from lowbit.models.skeleton import Block
from lowbit.progress import Step, tell
from lowbit.quant.numerics import reason_against_scales
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import Scheme
from lowbit.quant.stats import Stats


def require_scales(name: str, w: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> None:
    """Raise CheckpointError if `scale_dtype` cannot hold the scales of the weight `w` of `name`."""
    reason = reason_against_scales(w, scheme, scale_dtype)
    if reason:
        raise CheckpointError(f"{name}: {reason}; use --dtype bfloat16, or a format whose scales may have it")


class RecordingWriter:
    """Writes the checkpoint's tensors, and keeps a digest of each for verification.

    workers  weights of a block that are packed at the same time
    """

    def __init__(self, writer: CheckpointWriter, job: Job, workers: int = 1) -> None:
        self._writer, self._job, self._workers = writer, job, workers
        self._meant: dict[str, str] = {}

    def add_block(self, block: Block, outcome: BlockOutcome) -> None:
        """Write a block: packed weights, then all other tensors, changed or from the source."""
        weights, kept = outcome.weights, outcome.kept
        self._writer.add_cache(outcome.cache)
        held = {name: tensor for name, tensor in outcome.cache.items() if self._writer.format.cached({name: tensor})}
        self._meant |= {name: _digest((tensor,)) for name, tensor in held.items()}
        with ahead(self._packed, weights.items(), self._workers) as packed:
            for name, tensors, digest in packed:
                self._writer.add_written(tensors)
                self._meant[name] = digest
        for name, placement in block.tensors.items():
            if stays(block, name, weights):
                value = kept[name] if name in kept else self._source(name)
                for single, part in (_biases(block, placement.parameter, value, weights) or {name: value}).items():
                    self._add(single, part)

    def _packed(self, item: tuple[str, QTensor]) -> tuple[str, dict[str, Tensor], str]:
        """The name of a quantized linear, what the format makes of its weight, and the weight's digest."""
        name, weight = item
        return name, self._writer.format.write(name, weight), _digest_of(weight)

    def add_others(self, seen: Stats | None = None) -> dict[str, dict[str, Any]]:
        """Write the tensors outside the blocks, without copies of tied embeddings. Returns the report rows of head and
        embeddings, if they are quantized.

        seen  statistics of the head's inputs; None without calibration
        """
        plan, untied = self._job.plan, self._job.untied_head()
        for name in self._job.names_outside():
            self._add(name, self._source(name))
        if untied is not None:
            self._add(f"{head_name(self._job.skeleton)}.weight", self._source(untied))
        return {each.name: self._add_rounded(each, seen if each is plan.head else None) for each in plan.vocabulary}

    def _add_rounded(self, meant: VocabularyWeight, seen: Stats | None) -> dict[str, Any]:
        """Round and write head or embeddings. Returns the report's row."""
        w, job = checked(meant.tensor, self._job.skeleton.tensors.exact(meant.tensor)).float(), self._job
        w = w.to(job.device)
        require_scales(meant.name, w, meant.scheme, job.scale_dtype)
        weight = rounded(w, meant.scheme, job.scale_dtype, seen, compensate=job.recipe.rounder != "rtn")
        row = row_of(weight, w, seen)
        weight = weight.to("cpu")
        self._writer.add_weight(meant.name, weight)
        self._meant[meant.name] = _digest_of(weight)
        return row

    def _source(self, name: str) -> Tensor:
        value = checked(name, self._job.skeleton.tensors.exact(name))
        return value.to(self._job.kept_dtype(name))

    def _add(self, name: str, tensor: Tensor) -> None:
        kept = self._writer.format.kept(name, tensor, self._job.source.checkpoint.config)
        if kept is None:
            return
        tensor = kept
        if count_broken(tensor):
            raise CheckpointError(f"{name}: some values are too large for {tensor.dtype}; use --dtype bfloat16")
        self._writer.add(name, tensor)
        self._meant[name] = _digest((tensor,))

    def finish(self, config: Mapping[str, Any]) -> None:
        """Close the files and write the configuration."""
        plan, recipe = self._job.plan, self._job.recipe
        self._writer.finish(config, plan.written, engine_names(plan.left), recipe.kv_cache)

    def verify(self, output: Path) -> tuple[int, dict[str, str]]:
        """Read every tensor back and compare its digest. Returns the bytes of the weights on disk, and the SHA-256 of
        their files by name."""
        written = open_checkpoint(output, finished=False)
        logical = LogicalTensors(written)
        paths = sorted({entry.path for entry in written.entries.values()})
        scales = logical.cache_scales()

        def found_in(name: str) -> str:
            if name in scales:
                return _digest((scales[name],))
            if name not in logical.schemes:
                return _digest((written.read(name),))
            return _digest_of(logical.qtensor(name))

        with one_thread(), ThreadPoolExecutor(WORKERS) as pool, ahead(found_in, self._meant, WORKERS) as digests:
            sums = {path.name: pool.submit(sha256_of, path) for path in paths}
            for number, ((name, meant), found) in enumerate(zip(self._meant.items(), digests, strict=True), 1):
                tell(Step("reading the files back", number, len(self._meant)))
                if found != meant:
                    raise CheckpointError(
                        f"{output}: {name} does not read back as it was written; the disk may be failing"
                    )
            return written.nbytes, {name: digest.result() for name, digest in sums.items()}


def _biases(block: Block, parameter: str, value: Tensor, weights: dict[str, QTensor]) -> dict[str, Tensor]:
    """The quantized experts' biases in the stack `parameter`, by their own names; empty for any other parameter."""
    stacked = {spec.name: spec.bias for spec in block.linears if spec.bias and spec.bias.expert is not None}
    return {
        f"{name}.bias": bias.view(value).contiguous()
        for name, bias in stacked.items()
        if bias.parameter == parameter and name in weights
    }


def _digest_of(weight: QTensor) -> str:
    return _digest((weight.codes, weight.scales, weight.zeros, weight.input_scale, weight.divisor))


def _digest(tensors: Iterable[Tensor | None]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            digest.update(raw_bytes(tensor.contiguous()))
    return digest.hexdigest()
