"""Fuzz targets: for each an honest model, the files to spoil, and the code that then reads it.

A target is a strategy of files (name -> content) laid over a model directory, and a reader that may only fail with an
error of ours.
"""

import json
import shutil
import struct
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lowbit
from lowbit import engine
from lowbit.calibrate.free import prepare_free, run_free
from lowbit.calibrate.job import prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.errors import LowbitError
from lowbit.evaluation.record import FILE
from lowbit.evaluation.report.compare import comparison
from lowbit.evaluation.report.facts import RECIPE, REPORT, facts_of
from lowbit.evaluation.report.page import render, render_comparison
from lowbit.export.checkpoint import open_checkpoint, verify_checksums
from lowbit.export.compressed_tensors import COMPRESSED_TENSORS
from lowbit.export.convert import convert
from lowbit.export.dialects import FORMATS
from lowbit.export.formats import LogicalTensors
from lowbit.export.gguf.file import header_bytes, read_header
from lowbit.export.gguf.foreign import unpack
from lowbit.export.gguf.format import GGUF_FORMAT
from lowbit.export.gguf.hyper import UNFIT
from lowbit.export.plain import parse_json, read_json, read_rows
from lowbit.export.recipes import read_recipe
from lowbit.export.tensorfile import read_entries, read_tensor
from lowbit.models.files import open_files
from lowbit.models.source import open_source
from lowbit.quant.scheme import Scheme, parse_scheme
from tests.builders import make_model, save
from tests.fuzz import datasets, images, recipes
from tests.fuzz.documents import ODD, spoiled, turned
from tests.quantized import quantize_files

Files = dict[str, bytes]
SEEDS = Path(__file__).parent / "seeds"
PACKED = {
    "ct": ("compressed-tensors", "uint4-g32"),
    "fp8": ("compressed-tensors", "fp8"),
    "gptq": ("gptq", "int4-g32"),
    "awq": ("awq", "uint4-g32"),
}
FAMILIES = ("llama", "gpt2", "gemma3", "mixtral", "phi3", "opt")


@dataclass(frozen=True)
class Target:
    """One kind of input.

    models  creates the honest directories, by name, below a given directory
    files   files to lay over the honest model of that name, in its directory
    read    reads the result; LowbitError is accepted, anything else is a finding
    """

    models: Callable[[Path], dict[str, Path]]
    files: Callable[[Path], st.SearchStrategy[Files]]
    read: Callable[[Path], None]
    without: tuple[str, ...] = field(default=())


def attempt(target: Target, honest: Path, files: Files, place: Path, strict: bool = False) -> None:
    """Read `files` laid over a copy of `honest` at `place`; raises what is a finding, with `strict` every error."""
    shutil.copytree(honest, place, ignore=lambda directory, names: [name for name in names if name in target.without])
    try:
        for name, content in files.items():
            (place / name).write_bytes(content)
        with nullcontext() if strict else suppress(LowbitError):
            target.read(place)
    finally:
        shutil.rmtree(place)


def _dense(base: Path) -> dict[str, Path]:
    return {family: save(make_model(family), base / family, torch.bfloat16) for family in FAMILIES}


def _known_to_the_engine(base: Path) -> dict[str, Path]:
    return {name: directory for name, directory in _dense(base).items() if name not in ("mixtral", "opt")}


def _packed(base: Path) -> dict[str, Path]:
    made = {}
    for name, (fmt, scheme) in PACKED.items():
        made[name] = save(make_model("llama", num_hidden_layers=1), base / name, torch.bfloat16)
        quantize_files(made[name], fmt, scheme)
    return made


def _stored(base: Path) -> dict[str, Path]:
    """Packed models, one of them with scales of a key-value cache, and a stack of experts as gpt-oss has it."""
    made = _packed(base)
    path, config = made["fp8"] / "model.safetensors", read_json(made["fp8"] / "config.json")
    attention = "model.layers.0.self_attn"
    scales = {f"{attention}.{part}_scale": torch.full((2, 1, 1), 0.5) for part in "kv"}
    save_file(load_file(path) | scales, path)
    config["quantization_config"] = COMPRESSED_TENSORS.with_cache(config["quantization_config"], "fp8-head")
    (made["fp8"] / "config.json").write_text(json.dumps(config))
    made["stack"] = base / "stack"
    made["stack"].mkdir()
    (made["stack"] / "config.json").write_text(
        '{"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}'
    )
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    blocks, scales = torch.zeros(3, 8, 2, 16, dtype=torch.uint8), torch.full((3, 8, 2), 127, dtype=torch.uint8)
    save_file({f"{stack}_blocks": blocks, f"{stack}_scales": scales}, made["stack"] / "model.safetensors")
    return made


def _one(base: Path) -> dict[str, Path]:
    return {"llama": save(make_model("llama", num_hidden_layers=1), base / "llama", torch.bfloat16)}


def _with(add: Callable[[Path], None]) -> Callable[[Path], dict[str, Path]]:
    """The model of `_one`, with the files that `add` writes next to it."""

    def models(base: Path) -> dict[str, Path]:
        made = _one(base)
        add(made["llama"])
        return made

    return models


def _json(name: str) -> Callable[[Path], st.SearchStrategy[Files]]:
    """Spoiled values of one JSON file, and now and then spoiled bytes."""

    def files(honest: Path) -> st.SearchStrategy[Files]:
        raw = (honest / name).read_bytes()
        values = spoiled(json.loads(raw)).map(lambda value: json.dumps(value).encode())
        return st.one_of(values, values, values, turned(raw)).map(lambda content: {name: content})

    return files


def _header(honest: Path) -> st.SearchStrategy[Files]:
    """model.safetensors with a spoiled header, or spoiled bytes around it."""
    raw = (honest / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], raw[8 + length :]

    def joined(text: bytes) -> Files:
        return {"model.safetensors": len(text).to_bytes(8, "little") + text + data}

    values = spoiled(json.loads(header)).map(lambda value: joined(json.dumps(value).encode()))
    return st.one_of(
        values, turned(header).map(joined), turned(raw[:200]).map(lambda start: {"model.safetensors": start})
    )


def _blocks(base: Path) -> dict[str, Path]:
    made = {}
    for family in ("llama", "mixtral", "gpt2"):
        model = save(make_model(family, num_hidden_layers=1), base / family, torch.bfloat16)
        made[f"{family}-gguf"] = base / f"{family}-gguf"
        settings: dict[str, Any] = {"method": "rtn", "scheme": "q4_0", "format": "gguf", "eval_windows": 0}
        lowbit.quantize(model, made[f"{family}-gguf"], device="cpu", **settings)
    return made


def _gguf(honest: Path) -> st.SearchStrategy[Files]:
    """model.gguf with spoiled bytes in its header, with spoiled keys, or with its tensors in other places."""
    raw, header = (honest / "model.gguf").read_bytes(), read_header(honest / "model.gguf")
    data = raw[min(info.offset for info in header.tensors.values()) :]
    table = {name: [list(info.shape), info.kind] for name, info in header.tensors.items()}

    def written(spoiled: Any) -> Files:
        try:
            keys = {name: value for name, value in spoiled["keys"].items() if value is not None}
            start = header_bytes(
                keys, {name: (tuple(shape), kind) for name, (shape, kind) in spoiled["tensors"].items()}
            )
        except (*UNFIT, struct.error):  # no file can say this
            start = raw[:200]
        return {"model.gguf": start + data}

    cuts = st.sampled_from([200, 4000, len(raw)])
    turns = cuts.flatmap(lambda cut: turned(raw[:cut]).map(lambda start: {"model.gguf": start + raw[cut:]}))
    said = spoiled({"keys": header.keys, "tensors": table}).map(written)
    return st.one_of(turns, said, said)


def _either(*strategies: Callable[[Path], st.SearchStrategy[Files]]) -> Callable[[Path], st.SearchStrategy[Files]]:
    return lambda honest: st.one_of(*(strategy(honest) for strategy in strategies))


def read_weights(place: Path) -> None:
    """Every tensor of the file, by its header."""
    for entry in read_entries(place / "model.safetensors").values():
        read_tensor(entry)


def read_blocks(place: Path) -> None:
    """The model and tokenizer that a GGUF makes alone, the reasons against one, and each tensor in its directory."""
    made = place / "made"
    made.mkdir()
    with suppress(LowbitError):
        unpack(read_header(place / "model.gguf"), made)
        (made / "model.gguf").symlink_to(place / "model.gguf")
        _read_all(made)
        use_tokenizer(made)
    GGUF_FORMAT.reason_against_model(read_json(place / "config.json"), place)
    _read_all(place)


def _read_all(directory: Path) -> None:
    logical = LogicalTensors(open_checkpoint(directory))
    for name in logical.names:
        logical.read(name)


def read_json_text(place: Path) -> None:
    """The text as a value, and as rows."""
    raw = (place / "x.json").read_bytes()
    with suppress(LowbitError):
        json.dumps(parse_json(raw, "x")).encode()
    read_rows(place / "x.json")


def plan_model(place: Path) -> None:
    """All that `quantize --dry-run` does."""
    job = prepare(open_source(str(place)), complete_recipe({"method": "int8"}), "cpu")
    job.output_bytes()
    job.warnings()


def load_engine(place: Path) -> None:
    """The engine, and what it writes after two tokens."""
    engine.load(str(place), "cpu").generate([[1, 2]], max_new_tokens=1)


def read_packed(place: Path) -> None:
    """Every weight, as convert and inspect read them."""
    tensors = LogicalTensors(open_checkpoint(place))
    tensors.cache_scales()
    for name in tensors.schemes:
        with suppress(LowbitError):
            tensors.shape(name)
            tensors.qtensor(name)
    for name in tensors.names:
        with suppress(LowbitError):
            tensors.read(name)


def convert_packed(place: Path) -> None:
    """All that `convert` does with the weights: to another format, to another scheme, and at last to one for all."""
    for fmt, scheme in (("gptq", None), ("compressed-tensors", parse_scheme("int8-g32"))):
        with suppress(LowbitError):
            _converted(place, fmt, scheme)
    _converted(place, "compressed-tensors", None)


def _converted(place: Path, fmt: str, scheme: Scheme | None) -> None:
    tensors, output = LogicalTensors(open_checkpoint(place)), place / f"out-{fmt}-{scheme}"
    output.mkdir()
    convert(tensors, FORMATS[fmt], (), output, 5_000_000_000, scheme=scheme)


def quantize_by_names(place: Path) -> None:
    """All that `quantize --model-free` does, with a scheme whose linears share a scale and with one without."""
    with suppress(LowbitError):
        _rounded(place, "nvfp4-a16")
    _rounded(place, "int4-g32")


def _rounded(place: Path, scheme: str) -> None:
    recipe = complete_recipe({"method": "rtn", "scheme": scheme, "head": "int8"})
    job, output = prepare_free(open_files(str(place)), recipe, "cpu"), place / f"out-{scheme}"
    output.mkdir()
    run_free(job, output)


def use_tokenizer(place: Path) -> None:
    """A text to tokens and back, and a chat through the template."""
    tokenizer = open_source(str(place)).tokenizer()
    ids = tokenizer("hello, world").input_ids
    tokenizer.decode(ids, skip_special_tokens=True)


def read_report(place: Path) -> None:
    """The page about a checkpoint, and one that compares it with itself."""
    facts = facts_of(place)
    for kind in ("html", "md"):
        render(facts, kind)
    comparison([facts, facts | {"name": "other"}])
    render_comparison([facts, facts | {"name": "other"}], "html")


def read_settings(place: Path) -> None:
    """A recipe, and the sums of the files."""
    with suppress(LowbitError):
        complete_recipe(read_recipe(place / RECIPE))
    verify_checksums(open_checkpoint(place))


def _reported(base: Path) -> dict[str, Path]:
    """A checkpoint with everything that a report reads."""
    directory = _packed(base)["ct"]
    shutil.copytree(SEEDS / "report", directory, dirs_exist_ok=True)
    return {"ct": directory}


def _text(name: str) -> Callable[[Path], st.SearchStrategy[Files]]:
    return lambda honest: turned((honest / name).read_bytes()).map(lambda content: {name: content})


def _rows(name: str) -> Callable[[Path], st.SearchStrategy[Files]]:
    """Spoiled rows of a file of JSON lines."""

    def files(honest: Path) -> st.SearchStrategy[Files]:
        rows = [json.loads(line) for line in (honest / name).read_text().splitlines()]
        return spoiled(rows).map(lambda rows: {name: "".join(json.dumps(row) + "\n" for row in rows or []).encode()})

    return files


def _loose(base: Path) -> dict[str, Path]:
    (base / "loose").mkdir()
    return {"loose": base / "loose"}


def _any_json(honest: Path) -> st.SearchStrategy[Files]:
    leaves = st.one_of(st.sampled_from(ODD), st.text(), st.integers(), st.floats())
    values = st.recursive(leaves, lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)))
    texts = values.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return st.one_of(texts, st.binary(), texts.flatmap(turned)).map(lambda raw: {"x.json": raw})


def _sums(honest: Path) -> st.SearchStrategy[Files]:
    line = st.tuples(
        st.sampled_from(["0" * 64, "abc", "F" * 64]), st.sampled_from(["  ", " *", "\t", ""]), st.text(max_size=9)
    )
    texts = st.lists(st.one_of(line.map("".join), st.text())).map("\n".join)
    return texts.map(lambda text: {"SHA256SUMS": text.encode("utf-8", "surrogatepass")})


TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
TARGETS = {
    "header": Target(_one, _header, read_weights),
    "gguf": Target(_blocks, _either(_gguf, _gguf, _gguf, *map(_json, ("config.json", *TOKENIZER))), read_blocks),
    "json": Target(_loose, _any_json, read_json_text),
    "config": Target(_dense, _json("config.json"), plan_model),
    "engine": Target(_known_to_the_engine, _either(_json("config.json"), _json("generation_config.json")), load_engine),
    "packed": Target(_stored, _either(_header, _json("config.json")), read_packed),
    "convert": Target(_stored, _either(_header, _json("config.json")), convert_packed),
    "free": Target(_packed, _either(_header, _json("config.json")), quantize_by_names),
    "tokenizer": Target(_one, _either(*map(_json, TOKENIZER)), use_tokenizer),
    "tokenless": Target(_one, _json("config.json"), use_tokenizer, TOKENIZER),
    "report": Target(_reported, _either(_json(REPORT), _rows(FILE), _text(RECIPE)), read_report),
    "dataset": Target(_with(datasets.honest), datasets.files, datasets.calibrate),
    "text": Target(_with(datasets.honest), datasets.files, datasets.read),
    "image": Target(images.models, images.files, images.read),
    "recipe": Target(_with(recipes.honest), recipes.files, recipes.read),
    "sources": Target(_with(recipes.honest), recipes.files, recipes.read_spec),
    "settings": Target(_reported, _either(_text(RECIPE), _sums), read_settings),
}


@cache
def honest(name: str, base: Path) -> dict[str, Path]:
    """The honest directories of a target, made once."""
    (base / name).mkdir(parents=True)
    return TARGETS[name].models(base / name)


def inputs(name: str, base: Path) -> st.SearchStrategy[tuple[str, Files]]:
    """(honest directory's name, files to lay over it) of a target."""
    made = honest(name, base)
    return st.sampled_from(sorted(made)).flatmap(
        lambda model: TARGETS[name].files(made[model]).map(lambda files: (model, files))
    )
