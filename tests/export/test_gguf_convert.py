"""Conversion to and from GGUF keeps every weight, or says why not; a GGUF alone is a model."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import lowbit
from lowbit.errors import CheckpointError, RecipeError, UsageError
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.convert import command_for_llama_cpp, express
from lowbit.export.dialects import FORMATS
from lowbit.export.formats import LogicalTensors
from lowbit.export.gguf.container import HEAD_NAME
from lowbit.export.gguf.file import read_header
from lowbit.export.gguf.foreign import unpack
from lowbit.models.source import open_source
from lowbit.quant.qtensor import round_to_nearest
from lowbit.quant.scheme import parse_scheme
from tests.builders import save_family

TEXT = "A tale of 12 cities: it was\n\nthe best of times."


def quantized(place: Path, scheme: str, fmt: str = "compressed-tensors", **changes: object) -> Path:
    """A tiny Llama in a scheme and a format."""
    model = place / "model"
    if not model.exists():
        save_family("llama", model, torch.float16, **{"intermediate_size": 128} | changes)
    output = place / f"{fmt}-{scheme}"
    lowbit.quantize(model, output, method="rtn", scheme=scheme, format=fmt, device="cpu", eval_windows=0)
    return output


def values(directory: Path) -> dict[str, torch.Tensor]:
    logical = LogicalTensors(open_checkpoint(directory))
    return {name: logical.exact(name).float() for name in logical.names}


@pytest.mark.parametrize(
    ("scheme", "blocks"),
    [
        ("int4-g32", "Q4_0"),
        ("int4-g64", "Q4_0"),
        ("int8-channel", "Q8_0"),
        ("int5-g32", "Q5_0"),
        ("mxfp4-a16", "MXFP4"),
        ("nvfp4-a16", "NVFP4"),
    ],
)
def test_codes_are_kept_both_ways(scheme: str, blocks: str, tmp_path: Path) -> None:
    source = quantized(tmp_path, scheme)
    there = lowbit.convert(source, tmp_path / "there", format="gguf").conversion
    assert there.exact == 14
    assert not there.rounded
    types = open_checkpoint(tmp_path / "there").quantization["types"]
    assert set(types.values()) == {blocks}
    before, after = values(source), values(tmp_path / "there")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    lowbit.convert(tmp_path / "there", tmp_path / "back", format="compressed-tensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in values(tmp_path / "back").items())


@pytest.mark.parametrize(
    ("scheme", "change", "written"),
    [
        ("int4-g128", {}, True),
        ("int8-channel", {}, True),
        ("mxfp4-a16", {}, True),
        ("uint4-g128", {}, False),
        ("int8-a8", {}, False),
        ("int3-g128", {}, False),
        ("int4-g128", {"model_type": "opt"}, False),
    ],
)
def test_what_llama_cpp_gets_without_loss_has_a_command(scheme, change, written, tmp_path):
    checkpoint = open_checkpoint(save_family("llama", tmp_path / "model", torch.float16))
    checkpoint = replace(checkpoint, config=checkpoint.config | change)
    this = {"m.up_proj": parse_scheme(scheme)}, {"m.up_proj": (256, 256)}, checkpoint
    command = command_for_llama_cpp(FORMATS["compressed-tensors"], *this)
    assert command == ("lowbit convert DIR NEW.gguf" if written else None)
    assert command_for_llama_cpp(FORMATS["gguf"], *this) is None
    assert command_for_llama_cpp(FORMATS["compressed-tensors"], *this, cache="fp8") is None


def test_zeros_become_minima_with_their_rounding(tmp_path: Path) -> None:
    source = quantized(tmp_path, "uint4-g32")
    done = lowbit.convert(source, tmp_path / "there", format="gguf").conversion
    assert done.rewrites == {"zeros as minima, rounded to float16": 14}
    assert len(done.rounded) + done.exact == 14
    assert max(done.rounded.values(), default=0) <= 2**-11 * 15
    before, after = values(source), values(tmp_path / "there")
    logical = LogicalTensors(open_checkpoint(source))
    for name in logical.schemes:
        steps = logical.qtensor(name).scales.float().amax()
        assert (before[f"{name}.weight"] - after[f"{name}.weight"]).abs().max() <= 2**-11 * 15 * steps
    with pytest.raises(CheckpointError, match="its files hold neither super-blocks nor minima"):
        lowbit.convert(tmp_path / "there", tmp_path / "back", format="compressed-tensors")


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [("fp8-a16", "GGUF has no blocks of it"), ("int3-g32", "GGUF has no blocks of it")],
)
def test_the_rest_is_refused(scheme: str, reason: str, tmp_path: Path) -> None:
    source = quantized(tmp_path, scheme)
    with pytest.raises(CheckpointError, match=reason):
        lowbit.convert(source, tmp_path / "there", format="gguf")


def test_super_blocks_are_never_made_of_other_scales() -> None:
    weight = round_to_nearest(torch.randn(4, 256), parse_scheme("uint4-g32"), torch.float16)
    for name in ("q4_k", "q6_k", "q5_1"):
        with pytest.raises(ValueError, match=f"are not rewritten as {name}: `quantize` rounds to it"):
            express(weight, parse_scheme(name))
    blocks = round_to_nearest(torch.randn(4, 256), parse_scheme("q4_k"), torch.float16)
    with pytest.raises(ValueError, match="q4_k weights are not rewritten as uint4-g32"):
        express(blocks, parse_scheme("uint4-g32"))
    assert express(blocks, blocks.scheme)[0].scheme == blocks.scheme


def test_a_quantized_table_that_is_the_head_stays_in_gguf(tmp_path: Path) -> None:
    source = quantized(tmp_path, "q8_0", "gguf", tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="serves as the head too"):
        lowbit.convert(source, tmp_path / "there", format="compressed-tensors")


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A GGUF directory, and its file in another place."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    output = quantized(tmp_path, "q4_0", "gguf")
    (tmp_path / "alone").mkdir()
    shutil.copy(output / HEAD_NAME, tmp_path / "alone" / "mine.gguf")
    return output, tmp_path / "alone" / "mine.gguf"


def test_a_file_alone_is_the_same_model(alone: tuple[Path, Path], tmp_path: Path) -> None:
    output, file = alone
    source = open_source(str(file))
    before, after = values(output), values(source.directory)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    told = json.loads((output / "config.json").read_text())
    for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "vocab_size", "tie_word_embeddings"):
        assert source.checkpoint.config[key] == pytest.approx(told[key])
    tokenizers = [AutoTokenizer.from_pretrained(place) for place in (output, source.directory)]
    assert tokenizers[0](TEXT).input_ids == tokenizers[1](TEXT).input_ids
    assert tokenizers[1].decode(tokenizers[1](TEXT).input_ids) == TEXT
    dialogue = [{"role": "user", "content": "hello"}]
    first, second = (each.apply_chat_template(dialogue, tokenize=False) for each in tokenizers)
    assert first == second
    assert open_source(str(file)).directory == source.directory
    assert (source.directory / HEAD_NAME).samefile(file)


@pytest.mark.parametrize(("blocks", "scalar"), [(42, 128), (46, 144)])
def test_a_large_gemma_alone_scales_queries_as_llama_cpp_does(
    alone: tuple[Path, Path], tmp_path: Path, blocks: int, scalar: int
) -> None:
    header = read_header(alone[1])
    keys = {key: value for key, value in header.keys.items() if key.startswith("tokenizer.")}
    sizes = {"block_count": blocks, "embedding_length": 4608, "attention.head_count": 32, "attention.key_length": 128}
    keys |= {"general.architecture": "gemma2"} | {f"gemma2.{key}": value for key, value in sizes.items()}
    (tmp_path / "gemma").mkdir()
    unpack(replace(header, keys=keys), tmp_path / "gemma")
    assert json.loads((tmp_path / "gemma" / "config.json").read_text())["query_pre_attn_scalar"] == scalar


def test_it_is_inspected_run_and_quantized(alone: tuple[Path, Path], tmp_path: Path) -> None:
    output, file = alone
    found = lowbit.inspect(file)
    assert (found.format, len(found.linears)) == ("gguf", 16)  # with head and embeddings
    assert found.linears["model.layers.0.self_attn.q_proj"].nbytes == 64 * 36
    texts = [
        lowbit.load(place, device="cpu").generate(["Once"], max_new_tokens=8)[0].tokens for place in (file, output)
    ]
    assert texts[0] == texts[1]
    lowbit.quantize(file, tmp_path / "again", method="rtn", scheme="q8_0", format="gguf", device="cpu", eval_windows=0)
    before, after = values(output), values(tmp_path / "again")
    for name in before:
        assert (before[name] - after[name]).abs().max() <= 0.01 * before[name].abs().max(), name


def test_a_scaled_embedding_is_not_read_from_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    output = quantized(tmp_path, "q4_0", "gguf", rope_parameters=rope)
    shutil.copy(output / HEAD_NAME, tmp_path / "alone.gguf")
    with pytest.raises(CheckpointError, match=r"its rotary embedding is scaled \(rope.scaling.type\)"):
        lowbit.inspect(tmp_path / "alone.gguf")


def test_a_name_that_ends_in_gguf_is_one_file(tmp_path: Path) -> None:
    source = quantized(tmp_path, "int4-g32")
    there = tmp_path / "whole.gguf"
    assert lowbit.convert(source, there).format == "gguf"
    assert there.is_file()
    back = lowbit.convert(there, tmp_path / "back")
    assert (back.format, back.conversion.exact) == ("compressed-tensors", 14)
    one, other = values(source), values(tmp_path / "back")
    assert all(torch.equal(one[name], other[name]) for name in one if "proj" in name)
    with pytest.raises(RecipeError, match=r"whole\.gguf: a file of format gguf, but the format is to be awq"):
        lowbit.convert(source, there, format="awq", overwrite=True)
    with pytest.raises(CheckpointError, match="the original model is there"):
        lowbit.convert(there, there, overwrite=True)


def test_a_model_is_quantized_to_one_file(tmp_path: Path) -> None:
    save_family("llama", tmp_path / "model", torch.float16, intermediate_size=128)
    done = lowbit.quantize(
        tmp_path / "model", tmp_path / "m.gguf", method="rtn", scheme="q4_0", device="cpu", eval_windows=0
    )
    assert done.output == tmp_path / "m.gguf"
    assert lowbit.inspect(done.output).format == "gguf"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "model"]
    with pytest.raises(UsageError, match="uploads a directory"):
        lowbit.quantize(tmp_path / "model", tmp_path / "n.gguf", scheme="q4_0", push_to_hub="me/model")


def test_a_pipe_is_no_model(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match=r"m\.gguf: a pipe, where a file is expected"):
        lowbit.inspect(tmp_path / "m.gguf")
