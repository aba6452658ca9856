"""calibrate/data.py: the grammar of --dataset, the documents of every kind of source, and the windows cut from them."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lowbit.calibrate import data
from lowbit.calibrate.data import DatasetSpec, builtin_text, calibration_tokens, parse_datasets, share_samples
from lowbit.errors import DatasetError

WORDS = [f"w{number}" for number in range(2000)]
CHATML = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<s> {{ m.role }} {{ m.content }} {% endfor %}"
)


def make_tokenizer(bos: bool = False, template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a word: w0 ... w1999, everything else <unk>."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "user", "assistant", *WORDS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    if bos:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")
    tokenizer.chat_template = template
    return tokenizer


def words(first: int, count: int) -> str:
    return " ".join(WORDS[first : first + count])


def ids_of(first: int, count: int) -> list[int]:
    return list(range(first + 4, first + count + 4))


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    """The rows in the format that the file's ending names; the path as text."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        table = datasets.Dataset.from_list(rows)
        table.to_parquet(path) if path.suffix == ".parquet" else table.to_csv(path)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """datasets keeps the tables it has read; let it keep these for this run only."""
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


# The grammar.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("builtin", [DatasetSpec("builtin")]),
        ("builtin:64", [DatasetSpec("builtin", samples=64)]),
        ("a.jsonl:8, builtin", [DatasetSpec("a.jsonl", samples=8), DatasetSpec("builtin")]),
        ("dir/a.json:num=8", [DatasetSpec("dir/a.json", samples=8)]),
        ("org/name", [DatasetSpec("org/name")]),
        ("org/name:32", [DatasetSpec("org/name", samples=32)]),
        ("org/name:train", [DatasetSpec("org/name", split="train")]),
        ("org/name:train_sft:9", [DatasetSpec("org/name", split="train_sft", samples=9)]),
        ("org/name:validation+test", [DatasetSpec("org/name", split="validation+test")]),
        ("org/name:en", [DatasetSpec("org/name", config="en")]),
        ("wikitext:wikitext-2-raw-v1:validation:5", [DatasetSpec("wikitext", "wikitext-2-raw-v1", "validation", 5)]),
        ("org/name:train[:10%]", [DatasetSpec("org/name", split="train[:10%]")]),
        ("org/name:20220301.en:train[5:9]:7,builtin:1", [
            DatasetSpec("org/name", "20220301.en", "train[5:9]", 7), DatasetSpec("builtin", samples=1),
        ]),
        ("org/name:config=train:split=held:num=2", [DatasetSpec("org/name", "train", "held", 2)]),
        ("org/name:name=2024:split=train", [DatasetSpec("org/name", "2024", "train")]),
    ],
)  # fmt: skip
def test_a_spec_is_read(text: str, expected: list[DatasetSpec]) -> None:
    assert parse_datasets(text) == tuple(expected)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no name"),
        ("builtin,", "no name"),
        (":5", "no name"),
        ("builtin:0", "'0'"),
        ("builtin:-3", "'-3'"),
        ("builtin:num=many", "'many'"),
        ("builtin:train", "no configs"),
        ("a.txt:en:train", "no configs"),
        ("org/name:en:train:other", "'other'"),
        ("org/name:train:8:9", "'8'"),
        ("org/name::train", "''"),
        ("org/name:column=text", "'column=text'"),
        ("org/name:num=3:4", "'4'"),
    ],
)
def test_a_wrong_spec_is_refused(text: str, told: str) -> None:
    with pytest.raises(DatasetError, match="dataset") as error:
        share_samples(parse_datasets(text), 128)
    assert told in str(error.value)


def test_a_file_whose_name_has_colons_and_commas_is_still_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a,b:3.txt"
    path.write_text("x")
    assert parse_datasets(str(path)) == (DatasetSpec(str(path)),)


@pytest.mark.parametrize(
    ("asked", "total", "expected"),
    [
        ([None], 128, [128]),
        ([None, None, None], 8, [3, 3, 2]),
        ([100, None], 128, [100, 28]),
        ([3, 4], 128, [3, 4]),
    ],
)
def test_windows_are_shared_out(asked: list[int | None], total: int, expected: list[int]) -> None:
    parts = tuple(DatasetSpec(f"org/{index}", samples=samples) for index, samples in enumerate(asked))
    assert [part.samples for part in share_samples(parts, total)] == expected


@pytest.mark.parametrize("asked", [[128, None], [200, None], [127, None, None]])
def test_a_share_of_nothing_is_refused(asked: list[int | None]) -> None:
    parts = tuple(DatasetSpec(f"org/{index}", samples=samples) for index, samples in enumerate(asked))
    with pytest.raises(DatasetError, match=r"128 windows leave -?\d+ for org/1"):
        share_samples(parts, 128)


# The builtin text.


def test_heldout_text_repeats_nothing_of_the_calibration_text() -> None:
    used = {" ".join(paragraph.split()) for paragraph in builtin_text("calibration").split("\n\n")}
    held = [" ".join(paragraph.split()) for paragraph in builtin_text("heldout").split("\n\n")]
    assert not [paragraph for paragraph in held if paragraph in used]
    assert len(builtin_text("heldout")) > 50_000


def test_all_of_the_builtin_text_is_there_and_stays_the_same() -> None:
    assert builtin_text("all").startswith(builtin_text("calibration"))
    assert builtin_text() == builtin_text("all")
    assert "Assert statements are a convenient way" in builtin_text("calibration")


def test_builtin_needs_no_datasets(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    found = calibration_tokens("builtin", tokenizer, 4, 32, 0)
    assert found.ids.shape == (4, 32)
    assert found.source.startswith("builtin (4 windows of 32, documentation of CPython 3.")


def test_a_python_without_its_documentation_says_so(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DatasetError, match="no pydoc_data"):
        calibration_tokens("builtin", tokenizer, 4, 32, 0)


# Windows.


def test_windows_do_not_overlap_where_there_is_enough_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_text(words(0, 100))
    found = calibration_tokens(str(tmp_path / "a.txt"), tokenizer, 10, 10, 0)
    assert found.ids.dtype == torch.int64
    assert found.tokens == 100
    assert sorted(found.ids.flatten().tolist()) == ids_of(0, 100)
    assert all((row.diff() == 1).all() for row in found.ids)
    assert found.source == "a.txt (10 windows of 10)"


def test_windows_overlap_evenly_where_the_text_is_short(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_text(words(0, 25))
    found = calibration_tokens(str(tmp_path / "a.txt"), tokenizer, 10, 10, 0)
    assert found.ids.unique().tolist() == ids_of(0, 25)
    assert found.source == "a.txt (10 windows of 10, overlapping: 25 tokens of text)"


@pytest.mark.parametrize(
    ("count", "samples", "length", "told"),
    [
        (24, 10, 10, "24 tokens found, 100 needed for 10 windows of 10 .* at most 9 samples"),
        (9, 1, 10, "9 tokens found, 10 needed for 1 windows of 10 .* seqlen of at most 4"),
        (0, 1, 10, "0 tokens found, 10 needed .* another dataset"),
    ],
)
def test_too_little_text_is_an_error_with_the_numbers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, count: int, samples: int, length: int, told: str
) -> None:
    (tmp_path / "a.txt").write_text(words(0, count) + "\n \n")
    with pytest.raises(DatasetError, match=f"a.txt is too short: {told}"):
        calibration_tokens(str(tmp_path / "a.txt"), tokenizer, samples, length, 0)


def test_one_seed_gives_one_set_of_ids_and_another_seed_another(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    for name, first in (("a", 0), ("b", 1000)):
        (tmp_path / f"{name}.txt").write_text(words(first, 1000))
    sources = f"{tmp_path}/a.txt:3,{tmp_path}/b.txt:2"
    tables = [calibration_tokens(sources, tokenizer, 0, 64, seed) for seed in (1, 1, 2)]
    assert torch.equal(tables[0].ids, tables[1].ids)
    assert tables[0].sha256 == tables[1].sha256 != tables[2].sha256
    assert tables[0].ids.shape == (5, 64)


def test_the_hash_is_of_the_ids_in_a_fixed_byte_order() -> None:
    found = data.CalibrationSet(torch.tensor([[1, 2], [3, 258]]), "here")
    expected = b"".join(value.to_bytes(8, "little") for value in (1, 2, 3, 258))
    assert found.sha256 == hashlib.sha256(expected).hexdigest()


def test_a_saved_set_can_be_read_by_others(tmp_path: Path) -> None:
    found = data.CalibrationSet(torch.arange(6).reshape(2, 3), "here")
    found.save(tmp_path / "ids.safetensors")
    with safe_open(tmp_path / "ids.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("ids"), found.ids)
        assert file.metadata() == {"source": "here", "sha256": found.sha256}


def test_every_window_begins_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(words(0, 90))
    found = calibration_tokens(str(tmp_path / "a.txt"), make_tokenizer(bos=True), 10, 10, 0)
    assert found.ids[:, 0].tolist() == [1] * 10
    assert sorted(found.ids[:, 1:].flatten().tolist()) == ids_of(0, 90)


def test_a_window_of_one_token_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DatasetError, match="seqlen 1"):
        calibration_tokens("builtin", tokenizer, 4, 1, 0)


def test_large_text_is_shuffled_in_pieces_that_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PIECE_CHARS", 50)
    text = "".join(f"line {number} of the text\n" for number in range(40)) + "no end"
    (tmp_path / "a.txt").write_text(text)
    pieces = data.text_pieces(tmp_path / "a.txt")
    assert "".join(pieces) == text
    assert len(pieces) > 10
    assert all(piece.endswith("\n") for piece in pieces[:-1])


def test_reading_stops_once_there_is_plenty(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = iter([words(0, 100)] * 1000)
    stream = data.token_stream(documents, tokenizer, enough=500)
    assert len(stream) == data.BATCH * 100
    assert len(list(documents)) == 1000 - data.BATCH


# Tables.


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_a_local_table_is_read(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, suffix: str) -> None:
    rows = [{"id": number, "text": words(number * 50, 50), "note": "w1999"} for number in range(8)]
    name = written(tmp_path / f"rows{suffix}", rows)
    found = calibration_tokens(name, tokenizer, 40, 10, 3)
    assert sorted(found.ids.flatten().tolist()) == ids_of(0, 400)
    assert torch.equal(found.ids, calibration_tokens(name, tokenizer, 40, 10, 3).ids)


def test_a_mixture_takes_from_each_what_was_asked(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "low.txt").write_text(words(0, 500))
    high = written(tmp_path / "high.jsonl", [{"text": words(1000, 500)}])
    found = calibration_tokens(f"{tmp_path / 'low.txt'}:30,{high}", tokenizer, 40, 10, 0)
    assert found.ids.shape == (40, 10)
    assert int((found.ids < 1000).all(1).sum()) == 30
    assert found.source == "low.txt (30 windows of 10) + high.jsonl (10 windows of 10)"


def test_a_missing_column_of_a_file_is_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    name = written(tmp_path / "rows.jsonl", [{"text": words(0, 50), "id": 1}])
    with pytest.raises(DatasetError, match="no column 'body'; its columns are: text, id"):
        calibration_tokens(name, tokenizer, 1, 10, 0, text_column="body")


def test_a_column_of_plain_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DatasetError, match="plain text has no column 'body'"):
        calibration_tokens("builtin", tokenizer, 1, 10, 0, text_column="body")


def test_empty_cells_are_passed_over_and_numbers_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": None, "n": 1}, {"text": "  ", "n": 2}, {"text": words(0, 20), "n": 3}]
    name = written(tmp_path / "rows.jsonl", rows)
    found = calibration_tokens(name, tokenizer, 2, 10, 0)
    assert sorted(found.ids.flatten().tolist()) == ids_of(0, 20)
    with pytest.raises(DatasetError, match="column 'n': none of 3 rows can be used; row 1: holds int, neither text"):
        calibration_tokens(name, tokenizer, 2, 10, 0, text_column="n")


# Files.


def test_a_directory_is_no_dataset(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DatasetError, match="is a directory"):
        calibration_tokens(str(tmp_path), tokenizer, 1, 10, 0)


def test_a_mixture_may_be_longer_than_a_file_name() -> None:
    assert len(parse_datasets(",".join(["organization/dataset:train:1"] * 40))) == 40


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.txt", None, "cannot read .*none.txt: No such file"),
        ("a\0b.txt", None, "cannot be read .*embedded null"),
        ("none.jsonl", None, "no such file: .*none.jsonl"),
        ("latin.txt", b"caf\xe9 cr\xe8me", "no UTF-8 text"),
        ("notes.md", b"text", "the endings read are .txt, .jsonl"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "1 of 2 rows read skipped .row 2: not JSON"),
        ("broken.parquet", b"no parquet at all", "cannot read .*broken.parquet as parquet"),
        ("empty.txt", b"", "0 tokens found"),
        ("empty.jsonl", b"", "empty.jsonl is empty"),
        ("blank.jsonl", b"\n", "blank.jsonl has no rows"),
        ("header.csv", b"text\n", "header.csv has no rows"),
    ],
)
def test_bad_files_are_errors(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str, content: bytes | None, told: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match=told):
        calibration_tokens(str(path), tokenizer, 1, 10, 0)


# The hub, without a network.


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("org/name", ("org/name", None, "train")),
        ("org/name:en:test[:50%]:2", ("org/name", "en", "test[:50%]")),
        ("org/name:validation", ("org/name", None, "validation")),
    ],
)
@pytest.mark.parametrize("offline", [False, True])
def test_the_hub_is_asked_for_what_the_spec_says(
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: PreTrainedTokenizerFast,
    spec: str,
    expected: tuple[str, str | None, str],
    offline: bool,
) -> None:
    calls = []

    def load_dataset(path: str, name: str | None, split: str, streaming: bool) -> Any:
        calls.append((path, name, split))
        table = datasets.Dataset.from_list([{"text": words(number * 20, 20)} for number in range(4)])
        assert streaming is not offline
        return table.to_iterable_dataset() if streaming else table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    found = calibration_tokens(spec, tokenizer, 2, 10, 0)
    assert calls == [expected]
    assert found.ids.shape == (2, 10)
    assert found.source.startswith(spec.removesuffix(":2") + " (")


@pytest.mark.parametrize(
    "error", [ConnectionError("no route"), ValueError("Unknown split"), RuntimeError("scripts are no longer supported")]
)
def test_a_hub_that_fails_is_an_error_for_people(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast, error: Exception
) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DatasetError, match=f"cannot read the dataset org/name .*{error}.*builtin"):
        calibration_tokens("org/name", tokenizer, 2, 10, 0)
