"""The container of GGUF: model.gguf with everything that llama.cpp needs, and the model's other files in its directory.

The file is complete by itself, and is the whole output if that is named *.gguf. config.json and the tokenizer's files
stay in the directory, so that transformers and lowbit read the same configuration that the model had.

Tensors are gathered in a safetensors file and copied into the GGUF in its order: its header comes first and has the
experts of a layer in one tensor.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit import __version__
from lowbit.errors import CheckpointError
from lowbit.export.blocks import BLOCKS, BY_NUMBER
from lowbit.export.container import Container, Writer
from lowbit.export.files import create, read_text
from lowbit.export.gguf.families import Family, Place, family_of, linears_at, place_of
from lowbit.export.gguf.file import ALIGNMENT, Header, TensorInfo, header_bytes, read_header
from lowbit.export.gguf.forms import DTYPES, F32, KINDS, logical, stored, type_of
from lowbit.export.gguf.hyper import UNFIT, experts_of, hyper_keys, rope_tensors
from lowbit.export.gguf.mixtures import MIXTURES
from lowbit.export.gguf.tokens import token_keys
from lowbit.export.plain import read_json, write_json
from lowbit.export.recipes import read_recipe
from lowbit.export.sharded import CONFIG_NAME
from lowbit.export.tensorfile import TensorEntry, TensorFileWriter, raw_bytes, read_entries, read_tensor

HEAD_NAME = "model.gguf"
GATHERED = "model.gguf.tensors"
METHOD = "gguf"
RECIPE = "recipe.toml"
FACTOR = "scale"  # NVFP4's: of a whole tensor
TYPES = {block.name.lower(): block for block in BLOCKS.values()}
DERIVED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}  # general.file_type of models in one dtype


class Gguf(Container):
    """Everything in model.gguf; config.json and the tokenizer's files in its directory."""

    head = HEAD_NAME
    weights = ("*.gguf",)
    suffix = ".gguf"

    def read(self, directory: Path, head: Path) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
        """config.json with the block type of every quantized linear, and the tensors under transformers' names.

        CheckpointError for a damaged file, for a family that is not read, or for a tensor that it does not have.
        """
        header = read_header(head)
        config = read_json(directory / CONFIG_NAME)
        try:
            entries = _all_entries(header, config)
        except CheckpointError:
            raise
        except UNFIT as error:
            path = directory / CONFIG_NAME
            raise CheckpointError(
                f"{path}: it lacks a number that {head.name} needs, or has a wrong one ({error!r})"
            ) from error
        kinds = (name.rpartition(".") for name in entries)
        types = {linear: TYPES[kind].name for linear, _, kind in kinds if kind in TYPES}
        return config | ({"quantization_config": {"quant_method": METHOD, "types": types}} if types else {}), entries

    def writer(self, directory: Path, max_shard_bytes: int) -> "GgufWriter":
        """A writer of one file, of any size."""
        return GgufWriter(self, directory)


GGUF = Gguf()


def _all_entries(header: Header, config: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """The tensors of a file under transformers' names."""
    family = family_of(config)
    _require_architecture(header, family)
    wanted = (info for info in header.tensors.values() if info.name not in DERIVED)
    return {name: entry for info in wanted for name, entry in _entries(header, info, config, family)}


def _require_architecture(header: Header, family: Family) -> None:
    """CheckpointError if the file is of another architecture than config.json."""
    found = header.keys.get("general.architecture")
    if found != family.arch:
        raise CheckpointError(
            f"{header.path}: a model of the architecture {str(found)[:40]!r}, and {CONFIG_NAME} says {family.arch!r}"
        )


def _entries(
    header: Header, info: TensorInfo, config: Mapping[str, Any], family: Family
) -> list[tuple[str, TensorEntry]]:
    """The tensors in one of the file: itself, or its part of each expert."""
    linears = linears_at(family, info.name, experts_of(config))
    place = place_of(family, f"{linears[0]}.{info.name.rpartition('.')[2]}") if linears else None
    if place is None:
        raise CheckpointError(f"{header.path}: its tensor {info.name!r} has no place in a {family.arch} model")
    together = place.expert is not None
    if together and (info.shape[0] != len(linears) or info.nbytes % len(linears)):
        raise CheckpointError(f"{header.path}: {info.name!r} is {list(info.shape)}, for {len(linears)} experts")
    shape = info.shape[1:] if together else info.shape
    size, suffix = info.nbytes // len(linears), type_of(info.kind) or info.name.rpartition(".")[2]
    if info.kind in BY_NUMBER:
        dtype, shape = torch.uint8, (shape[0] if len(shape) > 1 else 1, BY_NUMBER[info.kind].row_bytes(shape[-1]))
    elif info.kind in DTYPES:
        dtype = DTYPES[info.kind]
    else:
        raise CheckpointError(f"{header.path}: {info.name!r} is of the type {info.kind}, which no weight has")
    form = _form(shape, place, config, family)
    whole = tuple(form(torch.empty(shape, dtype=dtype, device="meta")).shape)
    places = {f"{name}.{suffix}": info.offset + i * size for i, name in enumerate(linears)}
    return [
        (name, TensorEntry(name, header.path, dtype, whole, offset, size, header.identity, form))
        for name, offset in places.items()
    ]


def _form(
    shape: tuple[int, ...], place: Place, config: Mapping[str, Any], family: Family
) -> Callable[[Tensor], Tensor]:
    """The function from a tensor's bytes in the file to transformers' tensor."""

    def form(tensor: Tensor) -> Tensor:
        return logical(tensor.reshape(shape), place, config, family)

    return form


class GgufWriter(Writer):
    """Gathers tensors, and writes the file when all are known."""

    def __init__(self, container: Gguf, directory: Path) -> None:
        self._container, self._directory = container, directory
        self._path = directory / GATHERED
        self._gathered = TensorFileWriter(self._path)

    def add(self, name: str, tensor: Tensor) -> None:
        """Gather one tensor."""
        self._gathered.add(name, tensor)

    def finish(self, config: Mapping[str, Any]) -> None:
        """Write the file under its unfinished name, and config.json."""
        self._gathered.close()
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        family = family_of(plain)
        parts = _sorted(_gathered(read_entries(self._path), family), family)
        extra = rope_tensors(plain, family)
        table: dict[str, tuple[tuple[int, ...], int]] = {
            name: (tuple(tensor.shape), F32) for name, tensor in extra.items()
        }
        forms = {name: [_part(entry, place, plain, family) for place, entry in each] for name, each in parts.items()}
        for name, each in parts.items():
            table[name] = _shape_of(forms[name], each)
        keys = self._keys(plain, family, parts, table)
        with create(self._container.head_in(self._directory, finished=False)) as file:
            file.write(header_bytes(keys, table))
            for tensor in extra.values():
                _write(file, [tensor])
            for name in parts:
                _write(file, (read() for read, _ in forms[name]))
        self._path.unlink()
        write_json(self._directory / CONFIG_NAME, plain)

    def _keys(
        self,
        config: Mapping[str, Any],
        family: Family,
        parts: Mapping[str, list[tuple[Place, TensorEntry]]],
        table: Mapping[str, tuple[tuple[int, ...], int]],
    ) -> dict[str, Any]:
        """All keys of the file."""
        if "token_embd.weight" not in table:
            raise CheckpointError(f"{self._directory}: no tensor holds the embeddings")
        rows = table["token_embd.weight"][0][0]
        name = str(config.get("_name_or_path") or self._directory.name).rstrip("/").rpartition("/")[2] or family.arch
        keys = {
            "general.architecture": family.arch,
            "general.type": "model",
            "general.name": name,
            "general.quantization_version": 2,
            "general.file_type": _file_type(table, self._directory / RECIPE),
            "general.alignment": ALIGNMENT,
        }
        keys |= _provenance(self._directory) | hyper_keys(config, family)
        return keys | token_keys(self._directory, config, rows, name)


def _gathered(entries: Mapping[str, TensorEntry], family: Family) -> dict[str, list[tuple[Place, TensorEntry]]]:
    """The gathered tensors by their names in GGUF, experts in their order. CheckpointError for one without a place."""
    found: dict[str, list[tuple[Place, TensorEntry]]] = {}
    for name, entry in entries.items():
        linear, _, kind = name.rpartition(".")
        place = place_of(family, f"{linear}.weight" if kind in TYPES else name)
        if place is None:
            raise CheckpointError(f"{name}: GGUF has no place for it in a {family.arch} model")
        found.setdefault(place.name, []).append((place, entry))
    return {name: sorted(each, key=lambda pair: pair[0].expert or 0) for name, each in found.items()}


def _sorted(
    parts: Mapping[str, list[tuple[Place, TensorEntry]]], family: Family
) -> dict[str, list[tuple[Place, TensorEntry]]]:
    """The same in the order of a model: embeddings, blocks, head."""

    def key(name: str) -> tuple[int, int, str]:
        place = parts[name][0][0]
        first = place.part in ("token_embd", "position_embd")
        return (0 if first else 2 if place.layer is None else 1, place.layer or 0, name)

    return {name: parts[name] for name in sorted(parts, key=key)}


def _part(
    entry: TensorEntry, place: Place, config: Mapping[str, Any], family: Family
) -> tuple[Callable[[], Tensor], tuple[int, ...]]:
    """A function that reads a tensor in its form of GGUF, and that form's shape."""
    empty = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
    return partial(_read, entry, place, config, family), tuple(stored(empty, place, config, family).shape)


def _read(entry: TensorEntry, place: Place, config: Mapping[str, Any], family: Family) -> Tensor:
    return stored(read_tensor(entry), place, config, family)


def _shape_of(
    forms: list[tuple[Callable[[], Tensor], tuple[int, ...]]], parts: list[tuple[Place, TensorEntry]]
) -> tuple[tuple[int, ...], int]:
    """The shape in weights, and the block type, of a tensor with these parts: one, or all experts."""
    place, entry = parts[0]
    shapes = {shape for _, shape in forms}
    names = {each.name.rpartition(".")[2] for _, each in parts}
    if len(shapes) > 1 or len(names) > 1:
        raise CheckpointError(f"{place.name}: its experts have several shapes or block types, and GGUF has one for all")
    kind = entry.name.rpartition(".")[2]
    shape = shapes.pop()
    number = KINDS.get(entry.dtype, F32)
    if kind in TYPES:
        block = TYPES[kind]
        shape, number = (*shape[:-1], shape[-1] // block.nbytes * block.size), block.number
    return ((len(parts), *shape) if place.expert is not None else shape), number


def _write(file: Any, tensors: Any) -> None:
    """Write the parts of a tensor, and the padding behind it."""
    written = 0
    for tensor in tensors:
        raw = raw_bytes(tensor.contiguous())
        file.write(raw)
        written += len(raw)
    file.write(b"\0" * (-written % ALIGNMENT))


def _file_type(table: Mapping[str, tuple[tuple[int, ...], int]], recipe: Path) -> int:
    """general.file_type: llama.cpp's number for the recipe's mixture, or for the type of most weights."""
    mixture = MIXTURES.get(str(read_recipe(recipe).get("scheme"))) if recipe.exists() else None
    if mixture is not None:
        return mixture.kind
    weights: dict[int, int] = {}
    for shape, kind in table.values():
        if len(shape) > 1:
            weights[kind] = weights.get(kind, 0) + torch.Size(shape).numel()
    most = max(weights, key=lambda kind: weights[kind])
    if most in DTYPES:
        return FILE_TYPES[DTYPES[most]]
    scheme = str(BY_NUMBER[most].scheme)
    return next(mixture.kind for mixture in MIXTURES.values() if mixture.base == scheme)


def _provenance(directory: Path) -> dict[str, Any]:
    """The keys of a file's origin: the recipe with the hash of the calibration, and the loss that was measured."""
    keys: dict[str, Any] = {"lowbit.version": __version__}
    recipe, report = directory / RECIPE, directory / "quantization_report.json"
    if recipe.exists():
        keys["lowbit.recipe"] = read_text(recipe)
        found = read_recipe(recipe)
        if found.get("calibration_sha256"):
            keys["lowbit.calibration_sha256"] = found["calibration_sha256"]
    if report.exists():
        blocks = [block["loss"] for block in read_json(report)["blocks"] if block.get("loss") is not None]
        if blocks:
            keys["lowbit.block_loss"] = float(sum(blocks) / len(blocks))
    return keys
