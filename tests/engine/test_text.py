"""Streamed text is final: whole characters, no part of a stop string, spaces as in the whole text."""

import pytest

from lowbit.engine.text import TextStream, overlap
from tests.builders import make_tokenizer

TEXT = "naïve café: 你好 🎉 end"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()  # a token a byte: most of TEXT's characters are several


def test_characters_come_whole(tokenizer):
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(TEXT)]
    assert "".join(pieces) == TEXT
    assert "\ufffd" not in "".join(pieces)
    assert [piece for piece in pieces if piece] == list(TEXT)


def test_bytes_that_never_become_a_character_come_at_the_end(tokenizer):
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in tokenizer.encode("aé")[:2]] == ["a", ""]
    assert stream.finish() == "\ufffd"
    assert stream.text == "a\ufffd"


def test_what_may_become_a_stop_string_is_held_back(tokenizer):
    stream = TextStream(tokenizer, ("END", "nothing"))
    given = [stream.push(token) for token in tokenizer.encode("an E, an EN, the END.")]
    assert "".join(given) == "an E, an EN, the "
    assert stream.stopped
    assert stream.finish() == ""
    assert given[3] == ""  # the first E
    assert given[4] == "E,"


def test_a_stop_string_that_ends_too_early_is_text(tokenizer):
    stream = TextStream(tokenizer, ("END", "x"))
    text = "an END, EN" + "D. END"
    given = [stream.push(token, stopping=count >= 10) for count, token in enumerate(tokenizer.encode(text))]
    assert "".join(given) == "an END, "  # the second one began before, and ends after
    assert stream.stopped


def test_what_was_held_back_is_given_at_the_end(tokenizer):
    stream = TextStream(tokenizer, ("END",))
    assert "".join(stream.push(token) for token in tokenizer.encode("the EN")) + stream.finish() == "the EN"


def test_special_tokens_are_no_text(tokenizer):
    stream = TextStream(tokenizer)
    assert "".join(stream.push(token) for token in [*tokenizer.encode("a"), 257, *tokenizer.encode("b")]) == "ab"


@pytest.mark.parametrize(
    ("text", "stop", "length"), [("abc", "cd", 1), ("abc", "bcd", 2), ("abc", "x", 0), ("", "a", 0)]
)
def test_overlap_is_the_longest_beginning(text, stop, length):
    assert overlap(text, stop) == length


@pytest.mark.demo
def test_a_tokenizer_that_marks_spaces_keeps_them(demo_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    tokens = tokenizer.encode("Hello there, general world", add_special_tokens=False)
    stream = TextStream(tokenizer, (), tokens[:1])
    assert "".join(stream.push(token) for token in tokens[1:]) == " there, general world"
