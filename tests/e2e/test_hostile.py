"""Checkpoints made to mislead: every one is refused with its reason, by every command, and nothing is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.builders import make_model, save
from tests.e2e.cli import names, run_quantize_convert, run_quantize_inspect
from tests.quantized import quantize_files

LINEAR = "model.layers.0.mlp.up_proj"
CT, GPTQ, AWQ = ("compressed-tensors", "uint4-g32"), ("gptq", "int4-g32"), ("awq", "uint4-g32")
GPTQ_ASYM = ("gptq", "uint4-g32")
W8A8 = ("compressed-tensors", "int8-channel-a8tensor")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[tuple[str, str], Path]:
    made = {}
    for fmt, text in (CT, GPTQ, GPTQ_ASYM, AWQ, W8A8):
        made[fmt, text] = save(make_model("llama"), tmp_path_factory.mktemp("in") / text, torch.bfloat16)
        quantize_files(made[fmt, text], fmt, text)
    return made


def edited_header(directory: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of model.safetensors and leave its data as it is."""
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def tensor(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Change one tensor of LINEAR, in a file that is otherwise in order."""

    def spoil(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        tensors[f"{LINEAR}.{suffix}"] = change(tensors[f"{LINEAR}.{suffix}"]).contiguous()
        save_file(tensors, directory / "model.safetensors")

    return spoil


def zeroed_first(values: torch.Tensor) -> torch.Tensor:
    changed = values.clone()
    changed.view(-1)[0] = 0
    return changed


def overlapping(directory: Path) -> None:
    def edit(header: dict[str, Any]) -> None:
        first, second = sorted(
            (key for key in header if key != "__metadata__"), key=lambda k: header[k]["data_offsets"]
        )[:2]
        size = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
        begin = header[first]["data_offsets"][0]
        header[second]["data_offsets"] = [begin, begin + size]

    edited_header(directory, edit)


def beyond_the_end(directory: Path) -> None:
    def edit(header: dict[str, Any]) -> None:
        last = max((key for key in header if key != "__metadata__"), key=lambda k: header[k]["data_offsets"])
        header[last]["data_offsets"] = [offset + (1 << 40) for offset in header[last]["data_offsets"]]

    edited_header(directory, edit)


def longer_than_its_bytes(directory: Path) -> None:
    edited_header(directory, lambda header: header[f"{LINEAR}.weight_scale"].update(shape=[1 << 40, 1 << 20]))


def said_twice(directory: Path) -> None:
    """A header that gives one tensor two shapes; readers differ in the one they use."""
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + length])[f"{LINEAR}.weight_scale"]
    again = json.dumps({f"{LINEAR}.weight_scale": entry | {"shape": entry["shape"][::-1]}}).encode()
    text = again[:-1] + b"," + raw[9 : 8 + length]
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def mapped_twice(directory: Path) -> None:
    """An index that has one tensor in two files."""
    shutil.move(directory / "model.safetensors", directory / "a.safetensors")
    pairs = [(name, "a.safetensors") for name in load_file(directory / "a.safetensors")]
    pairs.insert(0, (pairs[0][0], "b.safetensors"))
    entries = ", ".join(f"{json.dumps(name)}: {json.dumps(file)}" for name, file in pairs)
    (directory / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{entries}}}}}')


def endless_header(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + path.read_bytes()[8:])


def outside_the_directory(directory: Path) -> None:
    secret = directory.parent / "secret.safetensors"
    shutil.move(directory / "model.safetensors", secret)
    header = list(load_file(secret))
    index = {"weight_map": dict.fromkeys(header, "../secret.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def other_bits(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(
        path.read_text().replace('"num_bits": 4', '"num_bits": 8').replace('"symmetric": false', '"symmetric": true')
    )


def configured(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A quantization_config in config.json changed by `change`."""

    def spoil(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        config["quantization_config"] = change(config["quantization_config"])
        (directory / "config.json").write_text(json.dumps(config))

    return spoil


def grouped(**changes: Any) -> Callable[[Path], None]:
    """Other numbers in the weights of the first config group."""

    def change(block: dict[str, Any]) -> dict[str, Any]:
        block["config_groups"]["group_0"]["weights"] |= changes
        return block

    return configured(change)


def aimed_at(target: Any) -> Callable[[Path], None]:
    """One target in the place of the first config group's."""

    def change(block: dict[str, Any]) -> dict[str, Any]:
        block["config_groups"]["group_0"]["targets"] = [target]
        return block

    return configured(change)


ATTACKS: list[tuple[tuple[str, str], Callable[[Path], None], str]] = [
    (CT, overlapping, "overlapping or missing data"),
    (CT, beyond_the_end, "missing data"),
    (CT, longer_than_its_bytes, "the file is damaged"),
    (CT, said_twice, f"'{LINEAR}.weight_scale' stands in it twice"),
    (CT, mapped_twice, "stands in it twice"),
    (CT, endless_header, "not a safetensors file, or truncated"),
    (CT, outside_the_directory, "lies outside the model directory"),
    (CT, other_bits, "codes of 8 bits"),
    (CT, grouped(group_size=-32), "group size -32"),
    (CT, grouped(group_size=32.0), "group size 32.0"),
    (CT, grouped(group_size=0), "weight_zero_point is torch.int32"),
    (CT, grouped(num_bits="4"), "no 4-bit type"),
    (GPTQ, configured(lambda block: block | {"group_size": -32}), "group size -32"),
    (GPTQ, configured(lambda block: block | {"sym": "false"}), "cannot be followed"),
    (GPTQ_ASYM, configured(lambda block: block | {"sym": True}), "symmetric by config.json, but its zeros run from"),
    (GPTQ_ASYM, tensor("qzeros", lambda zeros: torch.full_like(zeros, -1)), "a zero lies outside [0, 15]"),
    (CT, aimed_at("re:("), "cannot be followed"),
    (CT, aimed_at(7), "cannot be followed"),
    (CT, aimed_at("re:.*gate_proj"), "no config group targets"),
    (CT, configured(lambda block: [block]), "not a JSON object"),
    (CT, configured(lambda block: block | {"quant_method": ["awq"]}), "not read here"),
    (GPTQ, configured(lambda block: block | {"dynamic": {"+:(": {"bits": 8}}}), "cannot be followed"),
    (CT, tensor("weight_packed", lambda words: words.to(torch.int64)), "weight_packed is torch.int64"),
    (CT, tensor("weight_packed", lambda words: words[:, :4]), "words a row cannot hold 64 codes"),
    (CT, tensor("weight_shape", lambda shape: shape + 32), "int32"),
    (CT, tensor("weight_shape", lambda shape: -shape), "int32"),
    (CT, tensor("weight_shape", lambda shape: shape * (1 << 40)), "int32"),
    (CT, tensor("weight_shape", lambda shape: shape.double()), "weight_shape is torch.float64"),
    (CT, tensor("weight_scale", lambda scales: scales.to(torch.float8_e4m3fn)), "scales are torch.float8_e4m3fn"),
    (CT, tensor("weight_scale", lambda scales: scales.double()), "scales are torch.float64"),
    (CT, tensor("weight_scale", zeroed_first), "a scale is zero"),
    (CT, tensor("weight_scale", lambda scales: scales * float("nan")), "a scale is zero or not finite"),
    (CT, tensor("weight_zero_point", lambda zeros: zeros[:4]), "words a row cannot hold"),
    (GPTQ, tensor("qweight", lambda words: words.float()), "qweight is torch.float32"),
    (GPTQ, tensor("qzeros", lambda zeros: zeros + 1), "its zeros run from|its zeros are those of"),
    (GPTQ, tensor("g_idx", lambda order: order + (1 << 30)), "does not divide"),
    (GPTQ, tensor("scales", zeroed_first), "a scale is zero"),
    (AWQ, tensor("qweight", lambda words: words[:-1]), "divide into groups"),
    (AWQ, tensor("qzeros", lambda zeros: zeros.T), "qzeros is torch.int32"),
    (AWQ, tensor("scales", lambda scales: scales * float("inf")), "not finite"),
    (W8A8, tensor("weight", lambda codes: codes.float()), "codes must be 2-dimensional torch.int8"),
    (W8A8, tensor("weight", lambda codes: codes.flatten()), "not outputs and inputs|2-dimensional"),
    (W8A8, tensor("weight_scale", lambda scales: -scales), "a scale is zero, negative or not finite"),
    (W8A8, tensor("input_scale", lambda scale: scale.repeat(2)), "input_scale has the shape [2]"),
    (W8A8, tensor("input_scale", lambda scale: scale * 0), "its input scale is 0.0"),
]


@pytest.mark.parametrize(("kind", "spoil", "reason"), ATTACKS, ids=range(len(ATTACKS)))
def test_refused_with_the_reason_and_nothing_written(checkpoints, tmp_path, kind, spoil, reason):
    source = tmp_path / "in"
    shutil.copytree(checkpoints[kind], source)
    spoil(source)
    before = names(tmp_path)
    for outcome in (
        run_quantize_inspect(source, "--check"),
        run_quantize_convert(source, tmp_path / "out", "--format", "compressed-tensors"),
    ):
        assert any(part in outcome.complaint for part in reason.split("|")), outcome.complaint
    assert names(tmp_path) == before
