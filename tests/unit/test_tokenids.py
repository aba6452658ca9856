"""Token ids of tokenizer files, checked before the tokenizers library takes memory for all of them."""

import json

import pytest

from lowbit.errors import CheckpointError
from lowbit.models.tokenids import MOST_IDS, require_small_ids

HUGE = {
    "tokenizer.json": {"model": {"vocab": {"a": 0, "b": 2**31}}},
    "vocab.json": {"a": 0, "b": MOST_IDS},
    "added_tokens.json": {"<x>": 99_999_999},
    "tokenizer_config.json": {"added_tokens_decoder": {"4000000000": {"content": "<x>"}}},
}
HONEST = {
    "tokenizer.json": {"model": {"vocab": {"12345678901": 0, "b": 262_143}}, "added_tokens": [{"id": MOST_IDS - 1}]},
    "vocab.json": {"99999999": 7},
    "tokenizer_config.json": {"model_max_length": int(1e30), "added_tokens_decoder": {"5": {"content": "99999999"}}},
}


@pytest.mark.parametrize("name", HUGE)
def test_an_id_that_would_fill_the_memory_is_refused(name, tmp_path):
    (tmp_path / name).write_text(json.dumps(HUGE[name]))
    with pytest.raises(CheckpointError, match=rf"{name}: token id [0-9]+; ids end below 10,000,000"):
        require_small_ids(tmp_path)


def test_an_added_token_of_the_tokenizer_counts_too(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": []}, "added_tokens": [{"id": 10**9}]}))
    with pytest.raises(CheckpointError, match="token id 1000000000"):
        require_small_ids(tmp_path)


@pytest.mark.parametrize("name", HONEST)
def test_long_numbers_elsewhere_are_no_ids(name, tmp_path):
    (tmp_path / name).write_text(json.dumps(HONEST[name]))
    require_small_ids(tmp_path)
