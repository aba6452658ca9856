"""Tokenizers in GGUF: refused where llama.cpp would apply them otherwise, with the special tokens of tokenizer.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from lowbit.errors import CheckpointError
from lowbit.export.gguf.foreign import _write_tokenizer
from lowbit.export.gguf.tokens import SPACE, SPACE_BEFORE, SPACES_REPLACED, token_keys

ROWS = 16
POST = "post_processor"


def added(content: str, place: int, **flags: Any) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content, "id": place, "special": True} | plain | flags


def around(*parts: str | None) -> dict[str, Any]:
    """A post-processor: special tokens around None, the text."""
    names = {"<s>": 10, "</s>": 11}
    single = [{"Sequence": {"id": "A"}} if part is None else {"SpecialToken": {"id": part}} for part in parts]
    special = {name: {"id": name, "ids": [place], "tokens": [name]} for name, place in names.items()}
    return {POST: {"type": "TemplateProcessing", "single": single, "special_tokens": special}}


ENDS = [added("<s>", 10), added("</s>", 11)]
OF_BYTES = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    "added_tokens": ENDS,
    "pre_tokenizer": {"type": "ByteLevel"},
}
OF_PIECES = {
    "model": {
        "type": "BPE", "byte_fallback": True, "unk_token": "<unk>",
        "vocab": {"<unk>": 0, "<0x0A>": 1, SPACE: 2, "a": 3, SPACE + "a": 4, "aa": 5},
        "merges": [[SPACE, "a"], ["a", "a"]],
    },
    "added_tokens": [added("<unk>", 0), *ENDS],
    "normalizer": {"type": "Sequence", "normalizers": [SPACE_BEFORE, SPACES_REPLACED]},
}  # fmt: skip


def keys_of(place: Path, found: dict[str, Any], name: str = "model", **settings: Any) -> dict[str, Any]:
    (place / "tokenizer.json").write_text(json.dumps(found))
    (place / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"} | settings))
    return token_keys(place, {}, ROWS, name)


@pytest.mark.parametrize(
    ("found", "change", "reason"),
    [
        (OF_BYTES, {"normalizer": {"type": "Lowercase"}}, r"normalizes texts \(Lowercase\)"),
        (OF_BYTES, {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "a space before a text"),
        (
            OF_BYTES,
            {"model": {**OF_BYTES["model"], "vocab": {"a": 0, "b": 1, "ab": 2, "ba": 3}, "ignore_merges": True}},
            "'ba' differs",
        ),
        (OF_BYTES, {"added_tokens": [*ENDS, added("<mask>", 12, lstrip=True)]}, "'<mask>' takes the spaces beside it"),
        (OF_BYTES, {"added_tokens": [*ENDS, added("<end>", 12, rstrip=True)]}, "'<end>' takes the spaces beside it"),
        (OF_BYTES, {"added_tokens": [*ENDS, added("word", 12, single_word=True)]}, "'word' is a whole word"),
        (OF_BYTES, around("<s>", "<s>", None), "one token at most"),
        (OF_BYTES, around("</s>", None), "puts token 11 around texts, and its bos_token is 10"),
        (OF_BYTES, {"post_processor": {"type": "BertProcessing"}}, "post-processor is a BertProcessing"),
        (OF_PIECES, {"normalizer": {"type": "NFKC"}}, "not changed as SentencePiece does it"),
        (OF_PIECES, {"pre_tokenizer": {"type": "Digits"}}, "not changed as SentencePiece does it"),
        (OF_PIECES, {"normalizer": None}, "spaces stay"),
        (OF_PIECES, {"model": {**OF_PIECES["model"], "merges": [["a", "a"]]}}, f"no merge makes '{SPACE}a'"),
        (OF_PIECES, {"model": {**OF_PIECES["model"], "ignore_merges": True}}, "ignore_merges is True"),
        (
            OF_PIECES,
            {"added_tokens": [*ENDS, added("<x>", 12, normalized=True, special=False)]},
            "'<x>' is normalized",
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_applies_otherwise_is_refused(
    found: dict[str, Any], change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    keys_of(tmp_path, found)
    with pytest.raises(CheckpointError, match=reason):
        keys_of(tmp_path, found | change)


def test_a_normalizer_without_steps_is_none(tmp_path: Path) -> None:
    """transformers 5.17 writes one."""
    empty = {"type": "Sequence", "normalizers": []}
    assert keys_of(tmp_path, OF_BYTES | {"normalizer": empty}) == keys_of(tmp_path, OF_BYTES)


def test_merges_may_be_ignored_where_each_token_is_their_result(tmp_path: Path) -> None:
    model = OF_BYTES["model"] | {"ignore_merges": True}
    assert keys_of(tmp_path, OF_BYTES | {"model": model}) == keys_of(tmp_path, OF_BYTES)


def test_steps_may_be_in_sequences_and_sequences_empty(tmp_path: Path) -> None:
    """transformers 5.17 writes an empty one where there is no normalizer."""
    nested = {"type": "Sequence", "processors": [{"type": "Sequence", "processors": []}, around("<s>", None)[POST]]}
    empty = {"type": "Sequence", "normalizers": []}
    keys = keys_of(tmp_path, OF_BYTES | {"normalizer": empty, POST: nested})
    assert keys == keys_of(tmp_path, OF_BYTES | around("<s>", None))
    spaces = {"type": "Sequence", "normalizers": [empty, OF_PIECES["normalizer"]]}
    assert keys_of(tmp_path, OF_PIECES | {"normalizer": spaces}) == keys_of(tmp_path, OF_PIECES)


def test_tokens_around_a_text_are_those_of_the_post_processor(tmp_path: Path) -> None:
    """transformers 5.23 goes by it alone, whatever add_bos_token says."""
    for said in (True, False):
        keys = keys_of(tmp_path, OF_BYTES | around("<s>", None), add_bos_token=said)
        assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]) == (True, False)
        keys = keys_of(tmp_path, OF_BYTES | around(None, "</s>"), add_bos_token=said)
        assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]) == (False, True)
    keys = keys_of(tmp_path, OF_BYTES | around("<s>", None), bos_token=None)
    assert keys["tokenizer.ggml.bos_token_id"] == 10


def test_a_space_at_the_beginning_alone_gives_way_to_dialogues(tmp_path: Path) -> None:
    """llama.cpp would put one behind each special token of a dialogue too."""
    space = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    pieces = OF_PIECES | {"normalizer": None, "pre_tokenizer": space}
    assert keys_of(tmp_path, pieces)["tokenizer.ggml.add_space_prefix"] is True
    assert keys_of(tmp_path, pieces, chat_template="{{ messages }}")["tokenizer.ggml.add_space_prefix"] is False
    wide = {**OF_PIECES["model"], "vocab": {**OF_PIECES["model"]["vocab"], SPACE * 2: 6}}
    wide["merges"] = [*wide["merges"], [SPACE, SPACE]]
    with pytest.raises(CheckpointError, match="splits texts at spaces"):
        keys_of(tmp_path, pieces | {"model": wide, "pre_tokenizer": space | {"split": True}})


def test_a_name_says_phi_3_where_its_tokens_take_spaces(tmp_path: Path) -> None:
    """llama.cpp has that rule by the model's name, and ends if it lacks a token of Phi 3 then."""
    assert keys_of(tmp_path, OF_PIECES, "my-phi3-like")["general.name"] == "my-Phi 3-like"
    strict = [added("<s>", 10), added("<|endoftext|>", 12), added("<unk>", 0)]
    taking = [added("</s>", 11, rstrip=True), added("<|end|>", 13, rstrip=True)]
    phi = OF_PIECES | {"added_tokens": strict + taking}
    assert keys_of(tmp_path, phi, "mine")["general.name"] == "Phi-3 mine"
    assert keys_of(tmp_path, phi, "Phi-3-mini")["general.name"] == "Phi-3-mini"
    with pytest.raises(CheckpointError, match="knows of Phi 3 alone"):
        keys_of(tmp_path, OF_PIECES | {"added_tokens": [*strict, taking[0], added("<|end|>", 13)]})


def test_a_token_with_the_name_of_padding_stays_the_only_one(tmp_path: Path) -> None:
    texts = keys_of(tmp_path, OF_BYTES | {"added_tokens": [*ENDS, added("[PAD5]", 12)]})["tokenizer.ggml.tokens"]
    assert len(set(texts)) == ROWS


@pytest.mark.parametrize("parts", [(None,), ("<s>", None), (None, "</s>"), ("<s>", None, "</s>")])
def test_special_tokens_come_back_from_a_file_alone(parts: tuple[str | None, ...], tmp_path: Path) -> None:
    strict = [added("<s>", 10), added("<|endoftext|>", 12), added("<unk>", 0)]
    taking = [added("</s>", 11, rstrip=True), added("<|end|>", 13, rstrip=True)]
    for found in (OF_BYTES, OF_PIECES, OF_PIECES | {"added_tokens": strict + taking}):
        keys = keys_of(tmp_path, found | around(*parts))
        _write_tokenizer(keys, tmp_path)
        again = token_keys(tmp_path, {}, ROWS, keys["general.name"])
        for name in ("add_bos_token", "add_eos_token", "bos_token_id", "eos_token_id", "add_space_prefix"):
            assert again.get(f"tokenizer.ggml.{name}") == keys.get(f"tokenizer.ggml.{name}"), name
        assert again["general.name"] == keys["general.name"]
