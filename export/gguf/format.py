"""The format `gguf`: llama.cpp's files. A linear P is one tensor of blocks (n, bytes of a row), `P.q4_k` or the like.

The suffix is the block type. NVFP4 has a tensor `P.scale` besides, float32 (1,): a factor, the reciprocal of the
divisor.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.export.blocks import BLOCKS, block_of, from_rows, to_rows
from lowbit.export.format import Format, ShapeReader, TensorReader, following, reading
from lowbit.export.gguf.container import FACTOR, GGUF, METHOD, TYPES
from lowbit.export.gguf.families import family_of, place_of
from lowbit.export.gguf.forms import held
from lowbit.export.gguf.hyper import UNFIT, caveat_of, experts_of, heads_of, hyper_keys, layers_of
from lowbit.export.gguf.mixtures import MIXTURES, Shape
from lowbit.export.gguf.tokens import token_keys
from lowbit.export.microscaling import one_number
from lowbit.quant.naming import expert_role
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import PerGroup, Scheme

NAME = "gguf"
GROUP = 32  # weights with one scale in blocks of integers


class GgufFormat(Format):
    """The format `gguf`."""

    name = NAME
    method = METHOD
    package = "gguf"
    library = "gguf"
    suffixes = (*TYPES, FACTOR)
    marker = FACTOR
    loading = "`model.gguf` follows the layout of GGUF: llama.cpp loads it, and every program that runs llama.cpp."
    scale_dtype = torch.float16
    holds_head = True
    ties_head = True
    container = GGUF

    def reason_against(self, scheme: Scheme) -> str | None:
        """The reason why GGUF has no block type for a scheme, or None."""
        if scheme.inputs is not None:
            return f"GGUF holds weights alone: {scheme.weights_only}"
        known = ", ".join(str(block.scheme) for block in BLOCKS.values())
        return None if block_of(scheme) else f"GGUF has no blocks of it; those that are written: {known}"

    def reason_against_shape(self, scheme: Scheme, n: int, k: int) -> str | None:
        """The reason why the rows of a weight (n, k) are no whole blocks, or None."""
        block = block_of(scheme)
        if block is None or k % block.size == 0:
            return None
        return f"{k} inputs are no whole blocks of {block.size}"

    def alike(self, scheme: Scheme) -> Scheme:
        """The blocks with the same values: integers in groups of 32, and minima in the place of zeros."""
        plain, size = scheme.weights_only, scheme.group_size
        if block_of(plain) or not plain.number.is_integer or (size != -1 and size % GROUP):
            return plain if block_of(plain) else scheme
        minima = not plain.symmetric
        narrow = Scheme(replace(plain.weights, granularity=PerGroup(GROUP), minima=minima))
        return narrow if block_of(narrow) else scheme

    def set_of(self, linear: str) -> str:
        """A key shared by the linears that need one scheme: a linear in all experts of a layer."""
        return expert_role(linear)

    def reason_against_model(self, config: Mapping[str, Any], companions: Path) -> str | None:
        """The reason: another family, a setting that llama.cpp does not compute, or another tokenizer; or None."""
        try:
            hyper_keys(config, family_of(config))
            token_keys(companions, config, int(config.get("vocab_size", 0)))
        except UNFIT as error:
            return str(error)
        return None

    def caveat_of_model(self, config: Mapping[str, Any]) -> str | None:
        """A warning about a model with sliding windows, or None."""
        return caveat_of(config, family_of(config))

    def mixed(self, scheme: str | None, linears: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
        """The schemes of linears in the mixture `scheme` that differ from that of most."""
        mixture, family = MIXTURES.get(scheme or ""), family_of(config)
        if mixture is None:
            return {}
        shape = Shape(layers_of(config), heads_of(config, "attn_q") // heads_of(config, "attn_k"), experts_of(config))
        places = {name: place_of(family, f"{name}.weight") for name in linears}
        found = {
            name: mixture.scheme_of(place.part, place.layer, shape)
            for name, place in places.items()
            if place is not None and place.layer is not None
        }
        return {name: own for name, own in found.items() if own != mixture.base}

    def vocabulary(self, scheme: str | None) -> dict[str, str]:
        """The schemes of head and embeddings in the mixture `scheme`."""
        mixture = MIXTURES.get(scheme or "")
        return {} if mixture is None else {"head": mixture.head, "embeddings": mixture.embeddings}

    def kept(self, name: str, tensor: Tensor, config: Mapping[str, Any]) -> Tensor | None:
        """An unquantized tensor as the file gives it back: vectors in float32. None for one that has no place."""
        return held(name, tensor, config, family_of(config))

    def linears(self, names: Iterable[str], shapes: ShapeReader | None = None) -> list[str]:
        """The quantized linears among a file's tensor names."""
        return [linear for linear, _, kind in (name.rpartition(".") for name in names) if kind in TYPES]

    def write(self, name: str, weight: QTensor) -> dict[str, Tensor]:
        """The file's tensors for the linear `name`."""
        block = block_of(weight.scheme)
        assert block is not None
        with reading(name):
            tensors = {f"{name}.{block.name.lower()}": to_rows(weight)}
        if weight.divisor is not None:
            tensors[f"{name}.{FACTOR}"] = weight.divisor.float().reciprocal().reshape(1)
        return tensors

    def read(self, name: str, tensor: TensorReader, scheme: Scheme) -> QTensor:
        """The weight of the linear `name`. CheckpointError if its blocks hold no such weight."""
        block = block_of(scheme)
        assert block is not None
        with reading(name):
            divisor = self._divisor(name, tensor) if scheme.weights.parent else None
            return from_rows(tensor(f"{name}.{block.name.lower()}"), block, divisor)

    def divisor(self, name: str, tensor: TensorReader) -> float | None:
        """The reciprocal of NVFP4's factor."""
        return float(self._divisor(name, tensor))

    def _divisor(self, name: str, tensor: TensorReader) -> Tensor:
        try:
            return one_number(tensor(f"{name}.{FACTOR}"), FACTOR).reciprocal()
        except CheckpointError:
            return torch.ones(())  # a factor of 1 is left out by other writers

    def shape(self, name: str, shapes: ShapeReader, tensor: TensorReader, scheme: Scheme) -> tuple[int, int]:
        """(n, k) of the linear `name`."""
        block = block_of(scheme)
        assert block is not None
        n, width = shapes(f"{name}.{block.name.lower()}")
        return n, width // block.nbytes * block.size

    def quantization_config(self, schemes: Mapping[str, Scheme], unquantized: Iterable[str]) -> dict[str, Any]:
        """The block types; the file says them itself, and no other reader looks for this."""
        found = ((name, block_of(scheme)) for name, scheme in schemes.items())
        return {"quant_method": METHOD, "types": {name: block.name for name, block in found if block is not None}}

    def schemes_of(self, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
        """The scheme of each linear, by its block type."""
        with following():
            return {name: BLOCKS[config["types"][name]].scheme for name in names}


GGUF_FORMAT = GgufFormat()
