"""Writing a quantized checkpoint, and verifying the files against the tensors in memory."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.ahead import WORKERS, ahead
from lowbit.calibrate.head import Head
from lowbit.calibrate.job import Job, stays
from lowbit.errors import CheckpointError
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.formats import LogicalTensors
from lowbit.export.survey import checked, count_broken
from lowbit.export.tensorfile import raw_bytes
from lowbit.export.writer import CheckpointWriter
from lowbit.models.placement import engine_names
from lowbit.models.skeleton import Block
from lowbit.progress import Step, tell
from lowbit.quant.algos.clip import plain_shrink
from lowbit.quant.numerics import reason_against_scales
from lowbit.quant.qtensor import QTensor, round_to_nearest
from lowbit.quant.scheme import Scheme


def require_scales(name: str, w: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> None:
    """Raise CheckpointError if `scale_dtype` cannot hold the scales of the weight `w` of `name`."""
    reason = reason_against_scales(w, scheme, scale_dtype)
    if reason:
        raise CheckpointError(f"{name}: {reason}; use --dtype bfloat16, or a format whose scales may have it")


class RecordingWriter:
    """Writes the checkpoint's tensors, and keeps a digest of each for verification."""

    def __init__(self, writer: CheckpointWriter, job: Job) -> None:
        self._writer, self._job = writer, job
        self._meant: dict[str, str] = {}

    def add_block(self, block: Block, weights: dict[str, QTensor], kept: dict[str, Tensor]) -> None:
        """Write a block: packed weights, then all other tensors, changed or from the source."""
        for name, weight in weights.items():
            self._writer.add_weight(name, weight)
            self._meant[name] = _digest_of(weight)
        for name, placement in block.tensors.items():
            if stays(block, name, weights):
                value = kept[name] if name in kept else self._source(name)
                for single, part in (_biases(block, placement.parameter, value, weights) or {name: value}).items():
                    self._add(single, part)

    def add_others(self) -> None:
        """Write the tensors outside the blocks, without copies of tied embeddings."""
        for name in self._job.names_outside():
            self._add(name, self._source(name))
        if self._job.plan.head is not None:
            self._add_head(self._job.plan.head)

    def _add_head(self, head: Head) -> None:
        """Write the head, rounded to nearest."""
        w, job = checked(head.tensor, self._job.skeleton.tensors.exact(head.tensor)), self._job
        w = w.to(job.device)
        require_scales(head.name, w, head.scheme, job.scale_dtype)
        shrink = plain_shrink(w, head.scheme, job.scale_dtype)
        weight = round_to_nearest(w, head.scheme, job.scale_dtype, shrink).to("cpu")
        self._writer.add_weight(head.name, weight)
        self._meant[head.name] = _digest_of(weight)

    def _source(self, name: str) -> Tensor:
        value = checked(name, self._job.skeleton.tensors.exact(name))
        return value.to(self._job.kept_dtype(name))

    def _add(self, name: str, tensor: Tensor) -> None:
        if count_broken(tensor):
            raise CheckpointError(f"{name}: some values are too large for {tensor.dtype}; use --dtype bfloat16")
        self._writer.add(name, tensor)
        self._meant[name] = _digest((tensor,))

    def finish(self, config: Mapping[str, Any]) -> None:
        """Close the files and write the configuration."""
        self._writer.finish(config, self._job.plan.written, engine_names(self._job.plan.left))

    def verify(self, output: Path) -> int:
        """Read every tensor back and compare its digest. Returns the bytes of the weights on disk."""
        written = open_checkpoint(output, finished=False)
        logical = LogicalTensors(written)

        def found_in(name: str) -> str:
            if name not in logical.schemes:
                return _digest((written.read(name),))
            return _digest_of(logical.qtensor(name))

        checked = zip(self._meant.items(), ahead(found_in, self._meant, WORKERS), strict=True)
        for number, ((name, meant), found) in enumerate(checked, 1):
            tell(Step("reading back what was written", number, len(self._meant)))
            if found != meant:
                raise CheckpointError(f"{output}: {name} does not read back as it was written; the disk may be failing")
        return written.nbytes


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
