"""Rows of a local table, in the file's order or a seeded one, and of a hub dataset.

    .jsonl             one JSON value per line
    .json              one list of rows, alone or in an object ({"data": [...]}); or lines, as in .jsonl
    .csv               a line of names, then rows
    .parquet
    .gz, .zst, .bz2    compressed, after any of the above

A row is an object, a string (a text) or a list of objects (a chat). A row that cannot be read is returned as a BadRow
and stops nothing. Nothing is written except a temporary file for decompression.
"""

import codecs
import csv
import sys
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow
from pyarrow import parquet

from lowbit.errors import CheckpointError, DatasetError
from lowbit.export.files import open_regular, read_at_most
from lowbit.export.plain import plain_json

MOST_UNPACKED = 100  # largest ratio of decompression beyond MOST_HELD; texts compress to a tenth at best
MOST_HELD, MOST_EXPANSION = 1 << 28, 1000  # bytes of a row group in memory, and largest ratio to its size in the file
MOST_WHOLE = 1 << 30  # bytes of a text, a JSON document or a line: they are in memory at once
TEXT = "BYTE_ARRAY"  # parquet's type for strings
TABLES = (".jsonl", ".json", ".parquet", ".csv")
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
ROWS_NAMES = ("data", "train", "rows")  # names of the list of rows in an object with several lists

Row = dict[str, Any]


class BadRow(ValueError):
    """A row that cannot be used; the message gives the reason."""


Numbered = tuple[int, Row | BadRow]  # a row's number from 1, and the row


def kind_of(name: str) -> str:
    """The file name's ending without compression, in lower case."""
    path = Path(name)
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path.name).suffix.lower()


def open_bytes(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed according to its name. DatasetError if it cannot be read."""
    try:
        stored = open_regular(path)
        if path.suffix.lower() not in COMPRESSED:
            return stored
        file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115, closed by the caller
        with stored, pyarrow.input_stream(stored, compression=COMPRESSED[path.suffix.lower()]) as stream:
            _unpack(stream, file, max(MOST_HELD, MOST_UNPACKED * path.stat().st_size), path)
        file.seek(0)
        return file
    except CheckpointError as error:
        raise DatasetError(str(error)) from error
    except (OSError, ValueError) as error:  # ValueError for a name with a zero byte
        raise DatasetError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _unpack(stream: IO[bytes], file: IO[bytes], most: int, path: Path) -> None:
    """Copy `stream` into `file`. DatasetError beyond `most` bytes."""
    while chunk := stream.read(1 << 20):
        if file.tell() + len(chunk) > most:
            raise DatasetError(f"{path} expands to more than {most} bytes: too much for text; pass another file")
        file.write(chunk)


def read_utf8(path: Path) -> str:
    """The text of a file. DatasetError if it cannot be read or is not UTF-8."""
    try:
        with open_bytes(path) as file:
            return read_whole(file, path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is no UTF-8 text (byte {error.start}); convert it first") from error


def read_whole(file: IO[bytes], path: object) -> bytes:
    """All bytes of `file`, whose name is `path`. DatasetError if there are more than MOST_WHOLE."""
    content = read_at_most(file, MOST_WHOLE + 1)
    if len(content) > MOST_WHOLE:
        raise DatasetError(f"{path} is larger than {MOST_WHOLE >> 20} MiB, the most read at once; cut it into parts")
    return content


def local_rows(path: Path, seed: int | None) -> Iterator[Numbered]:
    """Every row of the table in `path`, shuffled by `seed`, or in the file's order if `seed` is None.

    DatasetError for a file type that the module's docstring does not list.
    """
    with open_bytes(path) as file:
        if not file.read(1):
            raise DatasetError(f"{path} is empty")
        file.seek(0)
        table = _open_table(path, file)
        for index in table.order(None if seed is None else np.random.default_rng(seed)):
            try:
                row: Row | BadRow = as_row(table[index])
            except _Damaged as error:
                raise _unreadable(path, error) from error
            except (ValueError, ArithmeticError, RecursionError, csv.Error, pyarrow.ArrowException) as error:
                row = BadRow(str(error))
            yield index + 1, row


def hub_rows(name: str, config: str | None, split: str, seed: int) -> Iterator[Numbered]:
    """The rows of a hub dataset in a seeded order, streamed because C4 has 300 GB.

    Offline, only datasets from an earlier download are available.
    """
    import datasets

    streaming, shown = not datasets.config.HF_HUB_OFFLINE, not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(name, config, split=split, streaming=streaming).shuffle(seed=seed)
    finally:
        if shown:
            datasets.enable_progress_bars()
    rows = table if streaming else table.to_iterable_dataset()
    # images stay undecoded bytes: calibrate/pictures.py opens them under limits, or not at all
    yield from enumerate(rows.decode(False) if rows.features else rows, 1)


def as_row(value: Any) -> Row:
    """A JSON value as a row. BadRow for any other type."""
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return {"messages": value}
    raise BadRow(f"a JSON {type(value).__name__}, expected an object")


class _Table:
    """Rows read on demand."""

    def __init__(self, size: int) -> None:
        self.size = size

    def order(self, generator: np.random.Generator | None) -> Iterator[int]:
        """Every row's index, shuffled if there is a generator."""
        yield from range(self.size) if generator is None else map(int, generator.permutation(self.size))

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError


class _Listed(_Table):
    """Rows in memory."""

    def __init__(self, rows: Sequence[Any]) -> None:
        super().__init__(len(rows))
        self._rows = rows

    def __getitem__(self, index: int) -> Any:
        return self._rows[index]


class _Records(_Table):
    """Records of a file; `read` parses each from its start position."""

    def __init__(self, file: IO[bytes], starts: Sequence[int], read: Callable[[IO[bytes]], Any]) -> None:
        super().__init__(len(starts))
        self._file, self._starts, self._read = file, starts, read

    def __getitem__(self, index: int) -> Any:
        self._file.seek(self._starts[index])
        return self._read(self._file)


class _Parquet(_Table):
    """Parquet with one row group in memory at a time: groups are shuffled, then the rows in each.

    Strings stay dictionary-encoded as in the file. Otherwise two kilobytes with one repeated string could expand to
    gigabytes.
    """

    def __init__(self, file: IO[bytes]) -> None:
        metadata = parquet.ParquetFile(file).metadata
        _refuse_bomb(metadata)
        schema = metadata.schema
        columns = [schema.column(index) for index in range(len(schema))]
        self._file = parquet.ParquetFile(file, read_dictionary=[c.path for c in columns if c.physical_type == TEXT])
        sizes = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._firsts = [0, *accumulate(sizes)]
        self._group, self._rows = -1, pyarrow.table({})
        super().__init__(self._firsts[-1])

    def order(self, generator: np.random.Generator | None) -> Iterator[int]:
        groups = len(self._firsts) - 1
        for group in range(groups) if generator is None or groups == 1 else map(int, generator.permutation(groups)):
            first, size = self._firsts[group], self._firsts[group + 1] - self._firsts[group]
            yield from (first + row for row in _Table(size).order(generator))

    def __getitem__(self, index: int) -> Any:
        group = bisect_right(self._firsts, index) - 1
        if self._group != group:
            self._group, self._rows = group, self._read_group(group)
        return self._rows.slice(index - self._firsts[group], 1).to_pylist()[0]

    def _read_group(self, group: int) -> pyarrow.Table:
        try:
            return self._file.read_row_group(group)
        except (ValueError, OSError, pyarrow.ArrowException) as error:
            raise _Damaged(str(error)) from error


class _Damaged(Exception):
    """A file of which more than a single row is unreadable."""


def _unreadable(path: Path, error: Exception) -> DatasetError:
    return DatasetError(f"cannot read {path} as {kind_of(path.name)[1:]}: {' '.join(str(error).split())[:300]}")


def _refuse_bomb(metadata: parquet.FileMetaData) -> None:
    """DatasetError for a row group whose size in memory is implausible for its size in the file."""
    for group in (metadata.row_group(index) for index in range(metadata.num_row_groups)):
        columns = [group.column(index) for index in range(group.num_columns)]
        stored, held = (
            sum(getattr(c, f"total_{kind}_size") for c in columns) for kind in ("compressed", "uncompressed")
        )
        if held > MOST_HELD and held > MOST_EXPANSION * stored:
            raise DatasetError(f"{stored} bytes of a row group expand to {held}: too much for text; pass another file")


def _open_table(path: Path, file: IO[bytes]) -> _Table:
    opened = {".parquet": _Parquet, ".csv": _csv, ".jsonl": _lines, ".json": _document}
    try:
        return opened[kind_of(path.name)](file)
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from error
    except (ValueError, RecursionError, pyarrow.ArrowException, csv.Error, OSError) as error:
        raise _unreadable(path, error) from error


def _lines(file: IO[bytes]) -> _Table:
    """One row per line; blank lines are skipped."""
    starts, position = array("q"), 0
    for line in _bounded(file):
        if not line.isspace():
            starts.append(position)
        position += len(line)
    return _Records(file, starts, _json_line)


def _bounded(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of `file`. DatasetError for a line of more than MOST_WHOLE bytes."""
    number = 0
    while line := file.readline(MOST_WHOLE + 1):
        number += 1
        if len(line) > MOST_WHOLE:
            raise DatasetError(f"line {number} is larger than {MOST_WHOLE >> 20} MiB; cut it into rows")
        yield line


def _json_line(file: IO[bytes]) -> Any:
    try:
        return plain_json(file.readline().removeprefix(codecs.BOM_UTF8))
    except ValueError as error:
        raise BadRow(str(error)) from error


def _document(file: IO[bytes]) -> _Table:
    """The rows of one JSON value, or of lines if the file has several values."""
    try:
        value = plain_json(read_whole(file, "the document").removeprefix(codecs.BOM_UTF8))
    except DatasetError:
        raise
    except ValueError as error:
        file.seek(0)
        lines = _lines(file)
        try:
            _ = lines[0] if lines.size else None
        except BadRow:
            raise error from None  # neither one value nor lines
        return lines
    if isinstance(value, dict):
        value = next((value[name] for name in ROWS_NAMES if isinstance(value.get(name), list)), [value])
    return _Listed(value if isinstance(value, list) else [value])


def _csv(file: IO[bytes]) -> _Table:
    """One row per record; quoted fields may contain line ends. The first record has the names."""
    starts, end = array("q"), 0

    def lines() -> Iterator[str]:
        nonlocal end
        for line in _bounded(file):
            end += len(line)
            yield line.decode("utf-8", "surrogateescape")

    with _long_fields():
        begin = 0
        for record in csv.reader(lines()):
            if record:
                starts.append(begin)
            begin = end
    if not starts:
        return _Listed([])
    _require_closed(file, starts[-1])
    file.seek(starts[0])
    names = _record(file)
    names[:1] = [name.removeprefix("\ufeff") for name in names[:1]]
    _require_names(names)

    def read(file: IO[bytes]) -> Row:
        fields = _record(file)
        if len(fields) > len(names):
            raise BadRow(f"{len(fields)} fields, but {len(names)} names in the first line")
        return dict(zip(names, fields, strict=False))

    return _Records(file, starts[1:], read)


def _require_names(names: list[str]) -> None:
    """Raise csv.Error for duplicate column names, or for columns separated by something else than commas."""
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise csv.Error(f"two columns are called {twice!r}; rename one")
    separator = next((each for each in (";", "\t") if each in names[0]), None)
    if len(names) == 1 and separator is not None:
        raise csv.Error(f"its columns are separated by {separator!r}; only commas are supported")


def _require_closed(file: IO[bytes], last: int) -> None:
    """Raise csv.Error if the record at `last` opens a quote that is never closed, and so swallows the rest."""
    file.seek(last)
    try:
        _record(file)
    except UnicodeDecodeError:
        return
    except csv.Error as error:
        if "unexpected end" in str(error):
            raise


def _record(file: IO[bytes]) -> list[str]:
    """The fields of the record at the file's position."""
    with _long_fields():
        return next(csv.reader((line.decode("utf-8") for line in file), strict=True))


@contextmanager
def _long_fields() -> Iterator[None]:
    """A context without csv's limit of 128 KB per field."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)
