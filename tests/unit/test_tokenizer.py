"""Tokenizers that are read from tokenizer.json alone do what transformers' own do; all others are transformers'."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, PretrainedConfig

from lowbit.engine.families import FAMILIES
from lowbit.export.checkpoint import open_checkpoint
from lowbit.models.chat import render_chat
from lowbit.models.tokenizer import REPAIRED, PlainTokenizer, load_tokenizer, transformers_tokenizer
from tests.builders import make_tokenizer, save_family

TEXTS = ("hello", " two  spaces", "äöü 漢字 \U0001f600", "<s>a</s> <pad>", "a<tool>b", "", "\n\n", "1969")
MESSAGES = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_family("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def directory(model, tmp_path):
    """A model directory whose tokenizer a test writes."""
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).hardlink_to(model / file)
    return tmp_path


def changed(directory: Path, **changes: object) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def check(directory: Path) -> PlainTokenizer:
    """The plain tokenizer of a directory, compared with transformers'."""
    checkpoint = open_checkpoint(directory)
    ours, theirs = load_tokenizer(checkpoint), transformers_tokenizer(checkpoint)
    assert isinstance(ours, PlainTokenizer)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (True, False):
                expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
                assert ours.decode(ids, skip_special_tokens=skip) == expected
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.get_added_vocab() == theirs.get_added_vocab()
    assert str(ours.added_tokens_decoder) == str(theirs.added_tokens_decoder)
    assert ours.chat_template == theirs.chat_template
    if ours.chat_template is not None:
        for tools in (None, [TOOL]):
            assert render_chat(ours, MESSAGES, tools) == render_chat(theirs, MESSAGES, tools)
    return ours


TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"
USING = "{{ tools[0].function.name }}{{ eos_token }}"
WRITTEN = {
    "as it is": {},
    "older class": {"tokenizer_class": "PreTrainedTokenizerFast"},
    "dicts": {"bos_token": {"content": "<s>", "lstrip": False, "special": True, "__type": "AddedToken"}},
    "template in the settings": {"chat_template": TEMPLATE},
    "several templates": {
        "chat_template": [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": USING}]
    },
    "more special ones": {"additional_special_tokens": ["<pad>"], "add_bos_token": True},
    "tokens of both files": {"added_tokens_decoder": {"256": {"content": "<s>", "special": True, "normalized": False}}},
}


@pytest.mark.parametrize("settings", WRITTEN)
def test_a_plain_tokenizer_is_transformers(settings, directory):
    make_tokenizer().save_pretrained(directory)
    changed(directory, **WRITTEN[settings])
    check(directory)


def test_templates_in_files_come_first(directory):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool>", special=False, lstrip=True)])
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": USING}
    tokenizer.save_pretrained(directory)
    assert (directory / "additional_chat_templates").is_dir()
    changed(directory, chat_template="another")
    check(directory)


@pytest.mark.demo
def test_the_demos_tokenizer_is_plain(demo_model):
    check(demo_model)


ADDED = {"260": {"content": "<new>", "special": True}}
OTHERS = {
    "another class": {"tokenizer_class": "GPT2Tokenizer"},
    "no class": {"tokenizer_class": None},
    "a special token that the file lacks": {"cls_token": "<cls>"},
    "more of them": {"additional_special_tokens": ["<new>"]},
    "named ones": {"extra_special_tokens": {"image_token": "<image>"}},
    "added tokens": {"added_tokens_decoder": ADDED},
    "other flags": {"added_tokens_decoder": {"256": {"content": "<s>", "special": True, "lstrip": True}}},
    "special ones split": {"split_special_tokens": True},
}


@pytest.mark.parametrize("settings", OTHERS)
def test_any_other_is_left_to_transformers(settings, directory):
    make_tokenizer().save_pretrained(directory)
    changed(directory, **OTHERS[settings])
    assert not isinstance(load_tokenizer(open_checkpoint(directory)), PlainTokenizer)


def test_older_files_with_tokens_are_left_to_transformers(directory):
    make_tokenizer().save_pretrained(directory)
    (directory / "added_tokens.json").write_text('{"<new>": 260}')
    assert not isinstance(load_tokenizer(open_checkpoint(directory)), PlainTokenizer)


@pytest.mark.parametrize("kind", sorted(set(FAMILIES) - set(REPAIRED)))
def test_transformers_takes_the_class_that_a_plain_file_names(kind, tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    changed(tmp_path, tokenizer_class="PreTrainedTokenizerFast")
    found = AutoTokenizer.from_pretrained(tmp_path, config=PretrainedConfig(model_type=kind))
    assert type(found).__name__ == "TokenizersBackend"
