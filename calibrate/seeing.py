"""Samples of text and images, made from the rows of a table by the checkpoint's own processor.

Images are in a column (`image`, `images`) or in turns (`{"type": "image", "path": ...}`). Images of a column fill the
placeholders in the turns in order: `{"type": "image"}`, or `<image>` in a text. Without placeholders they precede the
first question. Rows with different numbers of images and placeholders are skipped.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from lowbit.calibrate.documents import ChatTemplate, Reading, Table, as_parts, cell, content_text, row_turns, usable
from lowbit.calibrate.pictures import NAMES, open_picture
from lowbit.calibrate.tables import BadRow, Row
from lowbit.errors import CheckpointError, DatasetError
from lowbit.export.limits import Exceeded, limited
from lowbit.export.untrusted import untrusted
from lowbit.models.devices import free_bytes
from lowbit.models.imagetext import ImageText
from lowbit.models.source import PROCESSOR_LIMITS

COLUMNS = ("images", "image")
PLACE = "<image>"  # placeholder of LLaVA's datasets
KINDS = ("image", "image_url")  # types of a part that is an image
# Outputs of processors with an element per token, along dimension 1.
BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask")
TOKEN_IDS = ("image_token_id", "image_token_index")  # keys of a configuration
MOST_IMAGES = 64  # in a row


def has_images(table: Table) -> bool:
    """True if one of the first rows has an image, in a column or in a turn."""
    rows = [row for _, row in table.sample if isinstance(row, dict)]
    return any(any(map(row.get, COLUMNS)) or any(_has_image_part(cell(row, name)) for name in row) for row in rows)


def _has_image_part(value: Any) -> bool:
    turns = [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []
    contents = [turn.get("content") for turn in turns]
    return any(_is_image(part) for content in contents if isinstance(content, list) for part in content)


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in KINDS


@dataclass(frozen=True)
class Viewer:
    """A checkpoint's processor, and the settings of samples.

    processor  transformers' processor
    marks      token ids of image placeholders, from the configuration
    seqlen     maximum tokens of a sample
    home       base directory of relative image paths
    """

    processor: ProcessorMixin
    marks: tuple[int, ...]
    seqlen: int
    home: Path

    def template(self, label: str, reading: Reading) -> ChatTemplate:
        """The chat template of the processor, or of its tokenizer."""
        tokenizer = self.processor.tokenizer
        tokenizer.chat_template = self.processor.chat_template or tokenizer.chat_template
        return ChatTemplate(tokenizer, label, reading)

    def sample(self, text: str, sources: list[Any]) -> ImageText:
        """The sample of `text` and its images. BadRow if an image cannot be read or does not fit into `seqlen`."""
        images = [open_picture(source, self.home) for source in sources]
        # the template wrote BOS; the tokenizer must not add another
        begun = self.processor.tokenizer.bos_token
        plain = {"add_special_tokens": False} if begun and text.startswith(begun) else {}
        name = "the checkpoint's processor"
        try:
            with untrusted(name, "it cannot take this row"), limited(name, *PROCESSOR_LIMITS):
                made = self.processor(text=[text], images=[images] if images else None, return_tensors="pt", **plain)
                tensors = {name: value for name, value in made.items() if isinstance(value, Tensor)}
                marks = self._marks(tensors)
        except Exceeded as error:  # as it would be with the next row
            raise DatasetError(str(error)) from error
        except CheckpointError as error:
            raise BadRow(str(error)) from error
        if bool(marks.any()) != bool(images):
            raise BadRow(f"{len(images)} images, but {int(marks.sum())} placeholders in its tokens")
        return _cut(ImageText(tensors, marks), self.seqlen)

    def _marks(self, tensors: dict[str, Tensor]) -> Tensor:
        """Mask (T,) bool of the placeholders of image features."""
        if "mm_token_type_ids" in tensors:
            return tensors["mm_token_type_ids"][0] != 0
        return torch.isin(tensors["input_ids"][0], torch.tensor(self.marks))


def marks_of(config: Any) -> tuple[int, ...]:
    """The token ids of image placeholders in a configuration."""
    found = (getattr(config, key, None) for key in TOKEN_IDS)
    return tuple(token for token in found if isinstance(token, int))


def _cut(sample: ImageText, seqlen: int) -> ImageText:
    """`sample` truncated to `seqlen` tokens. BadRow if that would cut an image, or if there are fewer than 2 tokens."""
    length, seen = sample.ids.shape[1], int(sample.marks.nonzero().max()) + 1 if bool(sample.marks.any()) else 0
    if length < 2:
        raise BadRow(f"{length} tokens; at least 2 are needed")
    if length <= seqlen:
        return sample
    if seen > seqlen:
        raise BadRow(f"its images end at token {seen}, beyond the sample's {seqlen} tokens: pass --seqlen {length}")
    tensors = {
        name: value[:, :seqlen].contiguous() if name in BY_TOKEN else value for name, value in sample.tensors.items()
    }
    return replace(sample, tensors=tensors, marks=sample.marks[:seqlen])


def samples_of(table: Table, viewer: Viewer, reading: Reading, count: int) -> list[ImageText]:
    """The first `count` usable samples of a table. DatasetError if there are fewer.

    All stay in memory to the end of the run: DatasetError as soon as they would fill more than half of the free part.
    """
    template = viewer.template(f"{reading.label}, {table.layout.label}", reading)
    found: list[ImageText] = []
    room = free_bytes("cpu") // 2
    samples = usable(table, reading, lambda row: _sample(row, table, viewer, template))
    while len(found) < count and (sample := next(samples, None)) is not None:
        found.append(sample)
        if (taken := sum(each.nbytes for each in found)) > room:
            raise DatasetError(
                f"{reading.label}: the images of {len(found)} of {count} samples take {taken / 1e9:.2f} GB as the "
                f"processor makes them, and {room / 1e9:.2f} GB are for all, half of the free memory; pass "
                f"--num-samples {len(found) - 1}, or smaller images"
            )
    if len(found) < count:
        advice = f"--num-samples {len(found)}, or more rows" if found else "rows with a text, or --text-column"
        skipped = f". {reading.describe()}" if reading.skipped else ""
        raise DatasetError(
            f"{reading.label}: {len(found)} rows can be used as samples, {count} are asked for; pass {advice}{skipped}"
        )
    return found


def _sample(row: Row, table: Table, viewer: Viewer, template: ChatTemplate) -> ImageText | None:
    """The sample of a row; None without text."""
    turns = row_turns(row, table.layout, _parts)
    if not turns:
        return None
    turns, sources = placed(turns, _column(row))
    if template.missing and table.layout.text and isinstance(row.get(table.layout.text), str):
        return viewer.sample(_bare(turns, viewer.processor), sources)
    return viewer.sample(template.render_parts(turns, row.get("tools")), sources)


def _bare(turns: list[dict[str, Any]], processor: ProcessorMixin) -> str:
    """The text for a model without a chat template, with the processor's placeholders for images."""
    mark = getattr(processor, "image_token", PLACE)
    return "".join(mark if part["type"] == "image" else part["text"] for turn in turns for part in turn["content"])


def _column(row: Row) -> list[Any]:
    """The images in the image column of a row."""
    for name in COLUMNS:
        if value := row.get(name):
            return value if isinstance(value, list) else [value]
    return []


def _parts(content: Any) -> list[dict[str, Any]]:
    """A turn's content as parts of text and images. The source of an image is None if it is in a column."""
    if not isinstance(content, list):
        return as_parts(content_text(content))
    return [_image_part(part) if _is_image(part) else as_parts(content_text([part]))[0] for part in content]


def _image_part(part: dict[str, Any]) -> dict[str, Any]:
    named = part if part.get("bytes") else next((part[key] for key in NAMES if part.get(key)), None)
    return {"type": "image", "source": named}


def placed(turns: list[dict[str, Any]], column: list[Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """The turns with a part for each image, and the sources of the images in order.

    column  images in a column of the row. BadRow if their number differs from that of the placeholders.
    """
    turns = [turn | {"content": _split(turn["content"] or []) if column else turn["content"] or []} for turn in turns]
    places = [part for turn in turns for part in turn["content"] if part["type"] == "image"]
    waiting = [part for part in places if part["source"] is None]
    if column and not waiting:
        asked = next((turn for turn in turns if turn["role"] == "user"), turns[0])
        waiting = [{"type": "image", "source": None} for _ in column]
        turns = [turn | {"content": waiting + turn["content"]} if turn is asked else turn for turn in turns]
    if len(waiting) != len(column):
        raise BadRow(f"{len(column)} images, but {len(waiting)} placeholders in its text")
    if len(places) > MOST_IMAGES or len(column) > MOST_IMAGES:
        raise BadRow(f"{max(len(places), len(column))} images; {MOST_IMAGES} at most are read")
    remaining = iter(column)
    parts = [part for turn in turns for part in turn["content"] if part["type"] == "image"]
    sources = [next(remaining) if part["source"] is None else part["source"] for part in parts]
    shown = [
        turn | {"content": [{"type": "image"} if part["type"] == "image" else part for part in turn["content"]]}
        for turn in turns
    ]
    return shown, sources


def _split(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parts of text split at placeholders of images."""
    return [piece for part in parts for piece in (_pieces(part["text"]) if part["type"] == "text" else [part])]


def _pieces(text: str) -> Iterator[dict[str, Any]]:
    for number, piece in enumerate(text.split(PLACE)):
        if number:
            yield {"type": "image", "source": None}
        if piece or not number:
            yield {"type": "text", "text": piece}
