"""Calibration data: from dataset names to a matrix of token ids, reproducible bit by bit.

    dataset := source {"," source}
    source  := name [":" config] [":" split] [":" windows]

    builtin                                CPython's English documentation, in every Python: no network, no package
    notes.txt chats.jsonl rows.csv.gz      a local .txt, .jsonl, .json, .parquet or .csv file, compressed or not
    org/name:config:split                  a dataset on the hub, streamed; the default `split` is `train`
    builtin:64,chats.jsonl:64              a mixture; a bare number is the number of windows from that source

A single word after a hub id is a split if it starts like one (train, validation, test, ...), otherwise a config;
`config=`, `split=` and `num=` are explicit. Sources without a number share the rest of `num_samples`. If every source
has a number, `num_samples` is ignored. Colons inside brackets belong to the split: `org/name:train[:1000]`.

`calibrate/tables.py` documents the file types, `calibrate/documents.py` the columns that hold the text.
For a model that takes images, rows with images become samples of both (`calibrate/seeing.py`), one row each, at most a
window long.
"""

import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from lowbit.calibrate.documents import SEPARATOR, Reading, Table, open_table, texts
from lowbit.calibrate.seeing import Viewer, has_images, marks_of, samples_of
from lowbit.calibrate.tables import COMPRESSED, TABLES, Numbered, hub_rows, kind_of, local_rows, read_utf8
from lowbit.errors import DatasetError
from lowbit.models.imagetext import Batch, ImageText, words_of
from lowbit.models.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILTIN = "builtin"
SUFFIXES = (".txt", *TABLES)
SPLIT_WORDS = ("train", "valid", "val", "test", "dev", "eval", "all")
CALIBRATION_SHARE = 0.8  # of the builtin topics; the rest is held out
OVERSAMPLE = 4  # read up to this many times the tokens needed, and draw from them
MAX_REUSE = 4  # windows may overlap until each token is used this often on average
PIECE_CHARS = 1 << 15  # approximate size of the pieces in which a text file is shuffled and tokenized
BATCH = 64  # documents per tokenizer call
LONGEST = 1 << 20  # most characters of a document, and of all documents in one tokenizer call: a long novel

NO_WINDOWS = torch.empty(0, 0, dtype=torch.int64)

BuiltinPart = Literal["calibration", "heldout", "all"]


@dataclass(frozen=True)
class DatasetSpec:
    """One requested source. `samples` is None until windows are distributed over sources."""

    name: str
    config: str | None = None
    split: str | None = None
    samples: int | None = None

    @property
    def kind(self) -> str:
        """The file name's ending without compression, such as ".jsonl"."""
        return kind_of(self.name)

    @property
    def is_table(self) -> bool:
        """True for sources with rows and columns: everything but the builtin text and text files."""
        return self.name != BUILTIN and self.kind != ".txt"

    @property
    def label(self) -> str:
        """The name for reports, without directories, which would disclose local paths in a published recipe."""
        name = Path(self.name).name if self.kind in SUFFIXES else self.name
        return ":".join(filter(None, (name, self.config, self.split)))


@dataclass(frozen=True)
class CalibrationSet:
    """Token ids for calibration, and their origin.

    ids     (samples, seqlen) int64
    source  text for people: each source with its windows, and whether they overlap
    readings  rows read and skipped, per source
    seen    samples with images, in addition to the windows of text
    further  (n, seqlen) int64  windows of the model's own text for tuning alone
    """

    ids: Tensor
    source: str
    readings: tuple[Reading, ...] = ()
    seen: tuple[ImageText, ...] = ()
    further: Tensor = NO_WINDOWS

    @property
    def tokens(self) -> int:
        return self.ids.numel() + sum(sample.ids.numel() for sample in self.seen)

    @property
    def sha256(self) -> str:
        """SHA-256 of the ids as little-endian int64, row by row, those for tuning alone last, then of every sample with
        images. Runs with equal hashes calibrate on the same tokens."""
        digest = hashlib.sha256(self.ids.numpy().astype("<i8").tobytes())
        digest.update(self.further.numpy().astype("<i8").tobytes())
        for sample in self.seen:
            digest.update(bytes.fromhex(sample.sha256))
        return digest.hexdigest()

    @property
    def words(self) -> Tensor:
        """All token ids (t,) of text."""
        return torch.cat([self.ids.flatten(), *map(words_of, self.seen)])

    def batches(self, tokens: int) -> list[Batch]:
        """All samples in batches of about `tokens` tokens. A sample with images is a batch of its own."""
        windows = self.ids.split(max(tokens // self.ids.shape[1], 1)) if len(self.ids) else ()
        return [*windows, *self.seen]

    def with_own(self, ids: Tensor, further: Tensor = NO_WINDOWS) -> "CalibrationSet":
        """This set with the windows `ids` (n, seqlen) of the model's own text, spread evenly among the others, and the
        windows `further` (n, seqlen) for tuning alone."""
        counts = (len(self.ids), len(ids))
        order = sorted(
            ((place + 0.5) / count, part, place) for part, count in enumerate(counts) for place in range(count)
        )
        rows = torch.stack([(self.ids, ids)[part][place] for _, part, place in order])
        told = f"{self.source}; {len(ids)} windows of the model's own text"
        told += f", {len(further)} for tuning alone" if len(further) else ""
        return replace(self, ids=rows, source=told, further=further)

    def save(self, path: Path) -> None:
        """Write `ids` as a safetensors file, for calibration with another tool on the same tokens."""
        save_file({"ids": self.ids}, path, metadata={"source": self.source, "sha256": self.sha256})


def calibration_tokens(
    spec: str,
    tokenizer: "PreTrainedTokenizerBase",
    num_samples: int,
    seqlen: int,
    seed: int,
    text_column: str | None = None,
    eyes: Source | None = None,
) -> CalibrationSet:
    """Token ids drawn from the datasets in `spec`; the module's docstring has its grammar.

    num_samples  total number of windows, unless every source in `spec` has its own
    seqlen       tokens per window, including BOS if the tokenizer starts every text with it
    seed         of the order of documents and the choice of windows; same seed and data give the same ids
    text_column  column of tables with the text; None to detect it, and to read images if a table has any
    eyes         the model if it takes images, else None

    Documents are shuffled, joined by a blank line and cut into windows without overlap. If the text is too short,
    windows overlap evenly; a quarter of the tokens is the least. DatasetError if the text is shorter still, if a source
    cannot be read, or if the column does not exist.
    """
    parts = share_samples(parse_datasets(spec), num_samples)
    if seqlen < 2:
        raise DatasetError(f"seqlen {seqlen}: a window needs at least 2 tokens; 512 and 2048 are usual")
    if text_column is not None and not any(part.is_table for part in parts):
        raise DatasetError(f"{spec}: plain text has no column {text_column!r}; leave the text column out")
    generator = torch.Generator().manual_seed(seed)
    windows, seen, sources, readings = [torch.empty(0, seqlen, dtype=torch.int64)], [], [], []
    for part in parts:
        reading = Reading(part.label)
        table = shuffled_table(part, generator, text_column) if part.is_table else None
        if table and eyes and text_column is None and has_images(table):
            seen += view(part, table, reading, eyes, seqlen)
            source = f"{part.label} ({part.samples} samples with their images, of {seqlen} tokens at most)"
        else:
            documents = texts(table, tokenizer, reading) if table else shuffled_texts(part, generator)
            ids, source = draw(part, documents, reading, tokenizer, seqlen, generator)
            windows.append(ids)
        sources.append(source)
        readings.append(reading)
    ids = torch.cat(windows)
    shuffled = ids[torch.randperm(len(ids), generator=generator)].contiguous()
    return CalibrationSet(shuffled, " + ".join(sources), tuple(readings), tuple(seen))


# Parsing of dataset names.


def parse_datasets(spec: str) -> tuple[DatasetSpec, ...]:
    """The sources in `spec`, in order. DatasetError for a syntax error."""
    items = [spec] if os.path.isfile(spec) else re.split(r",(?![^\[]*\])", spec)
    return tuple(parse_dataset(item.strip()) for item in items)


def parse_dataset(item: str) -> DatasetSpec:
    """One source of a mixture."""
    if os.path.isfile(item):  # False, not an error, if too long for a path
        return DatasetSpec(item)
    name, *fields = re.split(r":(?![^\[]*\])", item)
    if not name:
        raise DatasetError(f"dataset {item!r}: a source has no name; write for example {BUILTIN}:64,chats.jsonl:64")
    part = DatasetSpec(name)
    for position, field in enumerate(fields):
        part = with_field(part, field.strip(), item, last=position == len(fields) - 1)
    if (part.config or part.split) and (name == BUILTIN or part.kind in SUFFIXES):
        raise DatasetError(f"dataset {item!r}: {name} has no configs or splits, only a number of windows, as {name}:64")
    return part


def with_field(part: DatasetSpec, field: str, item: str, last: bool) -> DatasetSpec:
    """`part` with one colon-separated `field` of `item` applied."""
    key, equals, value = field.partition("=")
    if not equals:
        key, value = meaning(part, field, last), field
    key = {"num": "samples", "name": "config"}.get(key, key)
    if key not in ("config", "split", "samples") or not value or getattr(part, key) is not None:
        raise DatasetError(
            f"dataset {item!r}: cannot read {field!r}; the form is name[:config][:split][:windows], for example "
            "org/name:en:train:128, or with config=, split= and num="
        )
    if key == "samples":
        if not re.fullmatch("[1-9][0-9]*", value):
            raise DatasetError(f"dataset {item!r}: {value!r} is no number of windows; give a whole number from 1 up")
        return replace(part, samples=int(value))
    return replace(part, config=value) if key == "config" else replace(part, split=value)


def meaning(part: DatasetSpec, field: str, last: bool) -> str:
    """The meaning of a bare `field`: "samples", "split" or "config"."""
    if last and re.fullmatch("-?[0-9]+", field):
        return "samples"
    config_known = part.config is not None or part.split is not None
    return "split" if config_known or field.lower().startswith(SPLIT_WORDS) else "config"


def share_samples(parts: tuple[DatasetSpec, ...], num_samples: int) -> tuple[DatasetSpec, ...]:
    """`parts` with a number of windows each: their own, or an equal share of the rest of `num_samples`."""
    open_parts = [index for index, part in enumerate(parts) if part.samples is None]
    left = num_samples - sum(part.samples or 0 for part in parts)
    if open_parts and left < len(open_parts):
        named = ", ".join(parts[index].label for index in open_parts)
        raise DatasetError(f"{num_samples} windows leave {left} for {named}; ask for more, or give each source its own")
    shared = list(parts)
    for order, index in enumerate(open_parts):
        count = left // len(open_parts) + (order < left % len(open_parts))
        shared[index] = replace(parts[index], samples=count)
    return tuple(shared)


# Sources to documents.


def builtin_text(part: BuiltinPart = "all") -> str:
    """English prose and code from CPython's own documentation: the topics that `help()` prints.

    part    "calibration": the first 80% of the topics by name; "heldout": the others, without paragraphs that also
            occur in the first 80% (some topics quote others); "all": every topic

    The text comes from the running interpreter (`pydoc_data.topics`, about 460 KB), and changes a little with every
    version of Python: compare the hash of the tokens between runs. License as CPython (PSF-2.0). DatasetError if this
    Python lacks the module.
    """
    return SEPARATOR.join(builtin_documents(part))


def builtin_documents(part: BuiltinPart) -> list[str]:
    """The topics of `builtin_text(part)`, sorted by name."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DatasetError(f"this Python has no pydoc_data, so there is no {BUILTIN} text; pass a text file") from error
    texts = [topics[name].strip() for name in sorted(topics)]
    first = int(len(texts) * CALIBRATION_SHARE)
    if part == "all":
        return texts
    if part == "calibration":
        return texts[:first]
    seen = {squeeze(paragraph) for text in texts[:first] for paragraph in text.split(SEPARATOR)}
    kept = ([p for p in text.split(SEPARATOR) if squeeze(p) not in seen] for text in texts[first:])
    return [SEPARATOR.join(paragraphs) for paragraphs in kept if paragraphs]


def squeeze(text: str) -> str:
    """`text` without indentation and line breaks, which differ between quotations."""
    return " ".join(text.split())


def shuffled_table(part: DatasetSpec, generator: torch.Generator, text_column: str | None) -> Table:
    """The rows of one source in a seeded order."""
    seed = int(torch.randint(2**31, (1,), generator=generator))
    return open_table(table_rows(part, seed), part.label, text_column)


def shuffled_texts(part: DatasetSpec, generator: torch.Generator) -> Iterator[str]:
    """The texts of a source without rows in a seeded order."""
    pieces = builtin_documents("calibration") if part.name == BUILTIN else text_pieces(Path(part.name))
    return (pieces[index] for index in torch.randperm(len(pieces), generator=generator))


def view(part: DatasetSpec, table: Table, reading: Reading, eyes: Source, seqlen: int) -> list[ImageText]:
    """The samples of one source with images in its rows."""
    home = Path(part.name).parent if os.path.exists(part.name) else Path()
    viewer = Viewer(eyes.processor(), marks_of(eyes.config), seqlen, home)
    return samples_of(table, viewer, reading, part.samples or 0)


def text_pieces(path: Path) -> list[str]:
    """The text file cut at line ends into pieces of about PIECE_CHARS characters."""
    text = read_utf8(path)
    pieces, start = [], 0
    while start < len(text):
        end = text.find("\n", start + PIECE_CHARS) + 1 or len(text)
        pieces.append(text[start:end])
        start = end
    return pieces


def table_rows(part: DatasetSpec, seed: int) -> Iterator[Numbered]:
    """The shuffled rows of a local file or a hub dataset. DatasetError if it cannot be read."""
    if part.kind in TABLES or os.path.exists(part.name):
        yield from local_rows(local_table(part), seed)
        return
    from datasets.exceptions import DatasetsError

    try:
        yield from hub_rows(part.name, part.config, part.split or "train", seed)
    except (OSError, ValueError, RuntimeError, StopIteration, DatasetsError) as error:  # StopIteration: no rows
        reason = " ".join(str(error).split())[:400]
        raise DatasetError(
            f"cannot read the dataset {part.label} ({type(error).__name__}: {reason}). Pass a file "
            f"({', '.join(SUFFIXES)}), a hub id as org/name:config:split, or {BUILTIN}, which needs no network"
        ) from error


def local_table(part: DatasetSpec) -> Path:
    """The path `part.name`. DatasetError if it is not a file, or not of a known type."""
    path = Path(part.name)
    if path.is_dir():
        raise DatasetError(f"{path} is a directory; name the file in it")
    if not path.is_file():
        raise DatasetError(f"no such file: {path}")
    if part.kind not in TABLES:
        raise DatasetError(
            f"{path}: cannot tell what it holds by its name; the endings read are {', '.join(SUFFIXES)}, each also "
            f"behind {', '.join(COMPRESSED)}"
        )
    return path


# Documents to windows.


def draw(
    part: DatasetSpec,
    documents: Iterable[str],
    reading: Reading,
    tokenizer: "PreTrainedTokenizerBase",
    seqlen: int,
    generator: torch.Generator,
) -> tuple[Tensor, str]:
    """The windows of one source, (part.samples, seqlen) int64, and their description."""
    samples = part.samples or 0
    bos = leading_bos(tokenizer)
    stream = token_stream(documents, tokenizer, OVERSAMPLE * samples * seqlen)
    length = seqlen - len(bos)
    require_tokens(reading, len(stream), samples, length)
    windows = cut_windows(stream, samples, length, generator)
    source = f"{part.label} ({samples} windows of {seqlen}"
    if part.name == BUILTIN:
        source += f", documentation of CPython {sys.version_info.major}.{sys.version_info.minor}"
    if len(stream) // length < samples:
        source += f", overlapping: {len(stream)} tokens of text"
    return torch.cat([bos.expand(samples, -1), windows], dim=1), source + ")"


def leading_bos(tokenizer: "PreTrainedTokenizerBase") -> Tensor:
    """The BOS token that this tokenizer puts before every text, (1,) int64, or an empty tensor if none.

    Models trained with BOS (Gemma above all) have unusual activations without it.
    """
    ids = tokenizer("a")["input_ids"]
    begins = bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    return torch.tensor(ids[:1] if begins else [], dtype=torch.int64)


def token_stream(documents: Iterable[str], tokenizer: "PreTrainedTokenizerBase", enough: int) -> Tensor:
    """Tokens of the documents in order, (t,) int64. Reading stops once t >= `enough`.

    At most LONGEST characters of a document are read, since a document of gigabytes would not fit in memory as tokens.
    """
    ids: list[int] = []
    texts = (text[:LONGEST].rstrip() + SEPARATOR for text in documents if text[:LONGEST].strip())
    while len(ids) < enough and (batch := _some(texts)):
        encoded = tokenizer(batch, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        ids.extend(chain.from_iterable(encoded))
    return torch.tensor(ids, dtype=torch.int64)


def _some(texts: Iterator[str]) -> list[str]:
    """The next texts: at most BATCH, with about LONGEST characters in total."""
    batch: list[str] = []
    size = 0
    while len(batch) < BATCH and size < LONGEST and (text := next(texts, None)) is not None:
        batch.append(text)
        size += len(text)
    return batch


def require_tokens(reading: Reading, found: int, samples: int, length: int) -> None:
    """DatasetError if `found` tokens cannot fill `samples` windows of `length`, even with overlap."""
    needed = samples * length
    if found >= length and found * MAX_REUSE >= needed:
        return
    if found < 4:
        advice = "pass another dataset or text column"
    elif found < length:
        advice = f"pass a seqlen of at most {found // 2}, fewer samples, or more text"
    else:
        advice = f"pass at most {found * MAX_REUSE // length} samples, a shorter seqlen, or more text"
    if reading.skipped:
        advice += f". {reading.describe()}"
    raise DatasetError(
        f"{reading.label} is too short: {found} tokens found, {needed} needed for {samples} windows of {length} "
        f"(overlapping windows would do with {max(length, -(-needed // MAX_REUSE))}); {advice}"
    )


def cut_windows(stream: Tensor, samples: int, length: int, generator: torch.Generator) -> Tensor:
    """Windows of a stream, (samples, length): a seeded choice of disjoint ones, or evenly overlapping ones if too
    short."""
    disjoint = len(stream) // length
    if disjoint >= samples:
        starts = torch.randperm(disjoint, generator=generator)[:samples] * length
    else:
        starts = torch.linspace(0, len(stream) - length, samples, dtype=torch.float64).long()
    return torch.stack([stream[start : start + length] for start in starts.tolist()])
