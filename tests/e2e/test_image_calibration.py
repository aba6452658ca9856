"""Calibration on images and text: samples go through the checkpoint's processor, its tower and the blocks as they do in
use, and rows that cannot are skipped and counted."""

import base64
import io
import json
import os
import shutil
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from lowbit.api.quantizing import quantize
from lowbit.calibrate.data import CalibrationSet, calibration_tokens
from lowbit.calibrate.seeing import Viewer, marks_of
from lowbit.errors import CheckpointError, DatasetError, LowbitError
from lowbit.models.imagetext import ImageText
from lowbit.models.skeleton import open_skeleton
from lowbit.models.source import Source, open_source
from lowbit.models.walk import Walk
from tests.builders import calibration, save_family
from tests.families.seeing import SEEING, save_seeing, seeing_processor

TEXT = "What is in this picture? A few words will do."


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("seeing")
    return {kind: save_seeing(kind, root / kind) for kind in SEEING}


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def turns(*images: Any, text: str = TEXT) -> list[dict[str, Any]]:
    parts = [{"type": "image", "path": str(image)} for image in images]
    return [
        {"role": "user", "content": [*parts, {"type": "text", "text": text}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Noise."}]},
    ]


def rows_of(directory: Path, count: int = 6) -> Path:
    """A file of chats, each with an image."""
    for number in range(count):
        picture(number, 30 + 10 * number).save(directory / f"{number}.png")
    rows = [{"messages": turns(f"{number}.png", text=TEXT * (1 + number % 3))} for number in range(count)]
    return table(directory, rows)


def table(directory: Path, rows: list[Any]) -> Path:
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(source: Source, path: Path, count: int, seqlen: int = 256, **more: Any) -> CalibrationSet:
    return calibration_tokens(str(path), source.tokenizer(), count, seqlen, 0, eyes=source, **more)


def sample(kind: str, source: Source, *seeds: int) -> ImageText:
    """A chat about images as the processor makes it."""
    processor = seeing_processor(kind)
    text = processor.apply_chat_template(turns(*seeds), tokenize=False)
    images = [{"bytes": as_png(picture(seed))} for seed in seeds]
    return Viewer(processor, marks_of(source.config), 256, Path()).sample(text, images)


def as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", SEEING)
def test_logits_by_blocks_are_transformers_on_images_and_text(models, kind):
    source = open_source(str(models[kind]))
    batches = [sample(kind, source, 1), calibration(2, 20).ids, sample(kind, source, 2, 3), sample(kind, source, 4)]
    walk = Walk(open_skeleton(source), "cpu", torch.float32)
    left = walk.start(batches)
    for index in range(len(walk.skeleton.blocks)):
        with walk.loaded(index), torch.no_grad():
            left = [walk.run(index, states) for states in left]
    theirs = AutoModelForImageTextToText.from_pretrained(models[kind], dtype=torch.float32).eval()
    for batch, logits in zip(batches, walk.logits(batches, left), strict=True):
        given = batch.tensors if isinstance(batch, ImageText) else {"input_ids": batch}
        with torch.no_grad():
            wanted = theirs(**given, use_cache=False).logits
        assert (logits - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("kind", ["llava", "gemma3", "idefics3"])
def test_samples_are_what_transformers_makes_of_the_chat(models, tmp_path, kind):
    path = rows_of(tmp_path)
    source = open_source(str(models[kind]))
    found = read(source, path, 6)
    assert found.ids.shape == (0, 256)
    processor = AutoProcessor.from_pretrained(models[kind])
    wanted = {}
    for row in map(json.loads, path.read_text().splitlines()):
        chat = json.loads(json.dumps(row["messages"]).replace('"path": "', f'"path": "{tmp_path}/'))
        made = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        wanted[ImageText(dict(made), torch.zeros(0)).sha256] = row
    assert {sample.sha256 for sample in found.seen} == wanted.keys()
    assert found.tokens == sum(sample.ids.numel() for sample in found.seen)
    assert read(source, path, 6).sha256 == found.sha256
    assert "6 samples with their images" in found.source


@pytest.mark.parametrize("recipe", ["awq", "gptq", "signround", "smoothquant", "best"])
def test_every_method_calibrates_on_images(models, tmp_path, recipe):
    path = rows_of(tmp_path)
    short = {"signround": {"iters": 4}, "best": {"iters": 4, "distill_steps": 3}}.get(recipe, {})
    settings = {"num_samples": 6, "seqlen": 256, "eval_windows": 0, **short}
    settings |= {} if recipe == "smoothquant" else {"group_size": 32}
    for name, dataset in (("seen", str(path)), ("read", "builtin")):
        quantize(models["llava"], tmp_path / name, method=recipe, dataset=dataset, **settings)
    seen, read = (load_file(tmp_path / name / "model.safetensors") for name in ("seen", "read"))
    report = json.loads((tmp_path / "seen" / "quantization_report.json").read_text())
    assert seen.keys() == read.keys()
    assert any(not torch.equal(seen[name], read[name]) for name in seen if "layers" in name)
    assert 0 < report["blocks"][0]["loss"] < 0.5


def test_target_bits_are_spent_on_images(models, tmp_path):
    done = quantize(
        models["gemma3"],
        tmp_path / "out",
        method="gptq",
        group_size=32,
        target_bits=6.0,
        eval_windows=0,
        dataset=str(rows_of(tmp_path)),
        num_samples=6,
        seqlen=256,
    )
    assert len({str(scheme) for scheme in done.plan.schemes.values()}) > 1


def test_statistics_are_those_of_the_image_and_its_text(models, tmp_path):
    """The first inputs of a block are normed embeddings: those of image tokens are features, and count like words."""
    source = open_source(str(models["llava"]))
    one = sample("llava", source, 1)
    walk = Walk(open_skeleton(source), "cpu", torch.float32)
    (states,) = walk.start([one])
    theirs = AutoModelForImageTextToText.from_pretrained(models["llava"], dtype=torch.float32).eval()
    words = theirs.get_input_embeddings()(one.ids)
    features = theirs.get_image_features(pixel_values=one.tensors["pixel_values"]).pooler_output[0]
    assert torch.equal(states.hidden[0, ~one.marks], words[0, ~one.marks])
    torch.testing.assert_close(states.hidden[0, one.marks], features, rtol=1e-5, atol=1e-5)


def test_images_stay_out_where_a_text_column_is_named_or_the_model_reads_alone(models, tmp_path):
    picture(1).save(tmp_path / "0.png")
    path = table(tmp_path, [{"text": TEXT * 20, "image": "0.png"} for _ in range(20)])
    source = open_source(str(models["llava"]))
    assert read(source, path, 4, text_column="text").seen == ()
    assert len(read(source, path, 4).seen) == 4
    blind = open_source(str(save_family("llama", tmp_path / "llama")))
    assert not blind.sees


def test_images_of_a_hub_data_set_stay_bytes_until_they_are_opened(models, monkeypatch):
    files = [{"bytes": as_png(picture(1)), "path": None}, {"bytes": bomb(30000), "path": None}] * 3
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    hub = datasets.Dataset.from_dict({"image": files, "text": [TEXT] * 6}, features=features)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub.to_iterable_dataset())
    streamed = read(open_source(str(models["llava"])), Path("some/images"), 3)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
    cached = read(open_source(str(models["llava"])), Path("some/images"), 3)
    for found in (streamed, cached):
        assert len(found.seen) == 3
        assert all("its image: more than 67108864 pixels" in said for said in found.readings[0].skipped)


def test_images_and_text_are_mixed(models, tmp_path):
    found = read(open_source(str(models["llava"])), Path(f"builtin:3,{rows_of(tmp_path)}"), 6)
    assert found.ids.shape == (3, 256)
    assert len(found.seen) == 3
    assert [len(batch) if isinstance(batch, torch.Tensor) else 1 for batch in found.batches(512)] == [2, 1, 1, 1, 1]


def test_learned_rounding_on_images_and_text(models, tmp_path):
    """Random sequences for a step: some texts are without the others of their batch."""
    data = {"dataset": f"builtin:3,{rows_of(tmp_path)}", "num_samples": 6, "seqlen": 256, "eval_windows": 0}
    quantize(models["llava"], tmp_path / "out", method="signround", iters=6, group_size=32, **data)
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert 0 < report["blocks"][0]["loss"] < 0.5


def test_a_text_is_cut_and_an_image_is_not(models, tmp_path):
    path = rows_of(tmp_path)
    source = open_source(str(models["llava"]))
    whole, cut = (read(source, path, 6, seqlen).seen for seqlen in (256, 40))
    assert {sample.ids.shape[1] for sample in cut} == {40}
    assert {tuple(sample.ids[0, :40].tolist()) for sample in whole} == {tuple(sample.ids[0].tolist()) for sample in cut}
    assert all(int(sample.marks.sum()) == 4 for sample in cut)
    with pytest.raises(DatasetError, match="its images end at token 10, beyond the sample's 9 tokens: pass --seqlen"):
        read(source, path, 6, 9)


def inline(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(as_png(image)).decode()


FORMS: dict[str, Any] = {
    "a column": {"text": TEXT, "image": "0.png"},
    "a column of several": {"text": TEXT, "images": ["0.png"]},
    "an object": {"text": TEXT, "image": {"bytes": None, "path": "0.png"}},
    "llava's conversations": {
        "image": "0.png",
        "conversations": [{"from": "human", "value": f"<image>{TEXT}"}, {"from": "gpt", "value": "Noise."}],
    },
    "a column for the turns' places": {
        "images": ["0.png"],
        "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TEXT}]}],
    },
    "openai's": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": inline(picture(0))}},
                    {"type": "text", "text": TEXT},
                ],
            }
        ]
    },
    "a question": {"question": TEXT, "answer": "Noise.", "image": "0.png"},
}


@pytest.mark.parametrize("form", FORMS)
def test_images_are_found_where_data_sets_have_them(models, tmp_path, form):
    picture(0).save(tmp_path / "0.png")
    source = open_source(str(models["llava"]))
    (found,) = read(source, table(tmp_path, [FORMS[form]]), 1).seen
    text = source.tokenizer().decode(found.ids[0])
    assert text.startswith(f"<user>{'<image>' * 4}{TEXT}")
    assert ("<assistant>Noise." in text) == ("Noise." in json.dumps(FORMS[form]))
    assert int(found.marks.sum()) == 4


def test_a_model_without_a_chat_template_gets_the_image_before_its_text(models, tmp_path):
    plain = shutil.copytree(models["llava"], tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    picture(0).save(tmp_path / "0.png")
    source = open_source(str(plain))
    rows = [{"text": TEXT, "image": "0.png"}, {"text": f"{TEXT}<image>", "image": "0.png"}]
    found = read(source, table(tmp_path, rows), 2).seen
    texts = {source.tokenizer().decode(sample.ids[0]) for sample in found}
    assert texts == {"<image>" * 4 + TEXT, TEXT + "<image>" * 4}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"messages": turns("none.png")}, "no such image: .*none.png"),
    "cut": ({"messages": turns("cut.png")}, "cut.png: damaged, or none of PNG"),
    "no image": ({"messages": turns("rows.jsonl")}, "rows.jsonl: damaged, or none of PNG"),
    "address": ({"messages": turns("https://a.b/c.png")}, "'https://a.b/c.png', and URLs are never fetched"),
    "pipe": ({"messages": turns("pipe")}, "a pipe, where a file is expected"),
    "device": ({"messages": turns("/dev/zero")}, "a device, where a file is expected"),
    "directory": ({"messages": turns(".")}, "a directory, where a file is expected"),
    "bomb": ({"messages": turns("bomb.png")}, "bomb.png: more than 67108864 pixels"),
    "large": ({"messages": turns("large.png")}, "large.png: more than 67108864 pixels"),
    "more places": (
        {"messages": [{"role": "user", "content": "<image><image>?"}], "images": ["0.png"]},
        "1 images, but 2 placeholders",
    ),
    "more images": (
        {"messages": [{"role": "user", "content": "<image>?"}], "images": ["0.png", "0.png"]},
        "2 images, but 1 placeholders",
    ),
    "no source": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "0 images, but 1 placeholders"),
    "another mark": ({"messages": turns(text="<image>")}, "0 images, but .* placeholders|cannot take this row"),
    "long": ({"messages": turns("0.png", "0.png", text="") * 30}, "its images end at token .* pass --seqlen"),
    "number": ({"messages": turns(), "image": 7}, "its image is int"),
    "no base64": ({"messages": turns(), "image": "data:image/png;base64,?"}, "its image: damaged, or none"),
    "no data": ({"messages": turns(), "image": "data:image/png,%00"}, "a data: URL without base64"),
    "many": ({"messages": turns(*["0.png"] * 65)}, "65 images; 64 at most are read"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_skipped_and_counted(models, tmp_path, case):
    path = rows_of(tmp_path)
    (tmp_path / "cut.png").write_bytes(as_png(picture(1, 200, 200))[:5000])
    (tmp_path / "bomb.png").write_bytes(bomb(30000))
    (tmp_path / "large.png").write_bytes(bomb(8193))
    os.mkfifo(tmp_path / "pipe")
    row, said = BAD[case]
    good = [json.loads(line) for line in path.read_text().splitlines()]
    source = open_source(str(models["llava"]))
    found = read(source, table(tmp_path, [row, *good]), 6)
    (reading,) = found.readings
    assert len(found.seen) == 6
    assert len(reading.skipped) == reading.rows - 6
    with pytest.raises(DatasetError, match=rf"7 are asked for; pass --num-samples 6, or more rows.*row 1: .*({said})"):
        read(source, table(tmp_path, [row, *good]), 7)


def test_rows_that_are_all_bad_are_no_samples(models, tmp_path):
    path = table(tmp_path, [{"messages": turns("none.png")}] * 3)
    with pytest.raises(DatasetError, match=r"column 'messages': none of 3 rows can be used; row 1: no such image"):
        read(open_source(str(models["llava"])), path, 2)


def test_a_model_without_a_processor(models, tmp_path):
    path = rows_of(tmp_path)
    plain = shutil.copytree(models["llava"], tmp_path / "plain")
    (plain / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"plain: no processor that transformers can load.*--text-column"):
        read(open_source(str(plain)), path, 2)
    with pytest.raises(CheckpointError, match=r"Qwen2VLVideoProcessor requires the Torchvision library"):
        read(open_source(str(models["qwen2_5_vl"])), path, 2)


def test_images_that_would_fill_memory_are_refused_with_the_number_that_fits(models, tmp_path, monkeypatch):
    """Samples stay in memory: a llava sample here has 0.03 MB."""
    path, source = rows_of(tmp_path), open_source(str(models["llava"]))
    each = max(sample.nbytes for sample in read(source, path, 4).seen)
    monkeypatch.setattr("lowbit.models.devices.psutil.virtual_memory", lambda: SimpleNamespace(available=6 * each))
    assert len(read(source, path, 3).seen) == 3
    with pytest.raises(
        DatasetError, match=r"the images of 4 of 4 samples take .* GB .* pass --num-samples 3, or smaller"
    ):
        read(source, path, 4)


def test_a_processor_of_the_models_own_runs_by_the_flag_alone(models, tmp_path):
    plain = shutil.copytree(models["llava"], tmp_path / "plain")
    (plain / "processing_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((plain / "processor_config.json").read_text())
    config |= {"auto_map": {"AutoProcessor": "processing_own.Own"}, "processor_class": "Own"}
    (plain / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no processor that transformers can load"):
        read(open_source(str(plain)), rows_of(tmp_path), 2)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image_processor": {"size": {"height": 100_000, "width": 100_000}}}, "takes more than 4096 MiB or 60 s"),
        ({"image_processor": {"size": {"shortest_edge": 10**9}}}, "takes more than 4096 MiB or 60 s"),
        ({"num_additional_image_tokens": 10**9}, "num_additional_image_tokens is 1000000000, 65536 at most"),
        ({"num_additional_image_tokens": -1000}, "1 images, but 0 placeholders in its tokens"),
        ({"patch_size": 0}, "it cannot take this row .ZeroDivisionError"),
    ],
)
def test_a_damaged_processor_takes_neither_memory_nor_time(models, tmp_path, fields, said):
    plain = shutil.copytree(models["llava"], tmp_path / "plain")
    config = json.loads((plain / "processor_config.json").read_text())
    for key, value in fields.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (plain / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(LowbitError, match=said):
        read(open_source(str(plain)), rows_of(tmp_path), 2)


def bomb(size: int) -> bytes:
    """A PNG of `size` by `size` pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
