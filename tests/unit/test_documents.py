"""calibrate/documents.py: which columns hold the text, chats through the template, and rows that are no use."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from lowbit.calibrate.documents import Layout, Reading, choose_layout, documents
from lowbit.calibrate.tables import BadRow
from lowbit.errors import CheckpointError, DatasetError
from tests.builders import make_tokenizer

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)
PARTS = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)
TOOLS = "{% for tool in tools or [] %}<{{ tool | tojson }}>{% endfor %}" + PLAIN
USER = {"role": "user", "content": "Who?"}
ASSISTANT = {"role": "assistant", "content": "Me."}
SYSTEM = {"role": "system", "content": "Be brief."}


def read(*rows: Any, template: str | None = PLAIN, column: str | None = None) -> tuple[list[str], Reading]:
    """The texts of `rows`, and what became of them."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    reading = Reading("rows")
    return list(documents(enumerate(rows, 1), tokenizer, reading, column)), reading


@pytest.mark.parametrize(
    ("row", "wanted", "expected"),
    [
        ({"text": "a", "content": "b"}, None, "text"),
        ({"title": "a", "content": "b"}, None, "content"),
        ({"prompt": "a", "messages": [USER]}, None, "messages"),
        ({"prompt": "a", "conversation": [USER], "answer": "b"}, None, "conversation"),
        ({"number": 1, "story": "a"}, None, "story"),
        ({"number": "17", "story": "a"}, None, "story"),
        ({"text": "17"}, None, "text"),
        ({"text": None, "story": "a"}, None, "story"),
        ({"text": {"en": "a"}, "story": "a"}, None, "story"),
        ({"title": "a", "text": "b"}, "title", "title"),
        ({"question": "a", "answer": "b"}, "answer", "answer"),
    ],
)
def test_the_text_column_is_found(row: dict[str, Any], wanted: str | None, expected: str) -> None:
    assert choose_layout(row, wanted, "rows") == Layout(expected)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "a", "input": "", "output": "b"}, Layout(None, "instruction", "output")),
        ({"instruction": "a", "input": "c", "output": "b"}, Layout(None, "instruction", "output", "input")),
        ({"id": "x", "question": "a", "answer": "b"}, Layout(None, "question", "answer")),
        ({"prompt": [USER], "completion": [ASSISTANT]}, Layout(None, "prompt", "completion")),
        (
            {"system_prompt": "s", "question": "a", "response": "b"},
            Layout(None, "question", "response", system="system_prompt"),
        ),
    ],
)
def test_a_question_and_its_answer_are_found(row: dict[str, Any], expected: Layout) -> None:
    assert choose_layout(row, None, "rows") == expected


@pytest.mark.parametrize(
    ("row", "wanted", "told"),
    [
        ({"title": "a", "text": "b"}, "body", "no column 'body'; its columns are: title, text"),
        ({"title": "a", "story": "b"}, None, "Name one of: title, story"),
        ({"question": "a", "story": "b"}, None, "Name one of: question, story"),
        ({"number": 1}, None, "Name one of: number"),
    ],
)
def test_an_unclear_column_is_an_error_that_lists_them(row: dict[str, Any], wanted: str | None, told: str) -> None:
    with pytest.raises(DatasetError, match=told):
        choose_layout(row, wanted, "rows")


def test_rows_of_nulls_come_first() -> None:
    texts, reading = read(*[{"body": None, "n": None}] * 200, {"body": "text", "n": 1})
    assert [text for text in texts if text] == ["text"]
    assert (reading.rows, reading.skipped) == (201, [])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Do.", "input": "", "output": "Done."}, "[user]Do.[assistant]Done."),
        ({"instruction": "Do.", "input": "This", "output": "Done."}, "[user]Do.\n\nThis[assistant]Done."),
        ({"system": "Be.", "question": "Who?", "answer": "Me."}, "[system]Be.[user]Who?[assistant]Me."),
        ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, "[system]Be brief.[user]Who?[assistant]Me."),
    ],
)
def test_a_question_and_its_answer_are_a_chat(row: dict[str, Any], expected: str) -> None:
    assert read(row)[0] == [expected]


def test_without_a_template_they_are_plain_text() -> None:
    row = {"instruction": "Do.", "input": "This", "output": "Done."}
    assert read(row, {"instruction": "Do.", "output": ""}, template=None)[0] == ["Do.\n\nThis\n\nDone.", ""]


@pytest.mark.parametrize(
    "turn",
    [
        lambda role, text: {"role": {"human": "user", "gpt": "assistant"}[role], "content": text},
        lambda role, text: {"from": role, "value": text},
        lambda role, text: {"role": role, "content": [{"type": "text", "text": text}], "name": None},
    ],
)
def test_chats_go_through_the_template(turn: Callable[[str, str], dict]) -> None:
    chat = [turn("human", "Who?"), turn("gpt", "Me.")]
    for told in (chat, json.dumps(chat)):
        assert read({"prompt": "not this", "messages": told})[0] == ["[user]Who?[assistant]Me."]
    assert read({"text": json.dumps(chat)})[0] == [json.dumps(chat)]


def test_a_list_of_parts_is_its_text() -> None:
    content = [{"type": "text", "text": "Look."}, {"type": "text", "text": "Who?"}]
    assert read({"messages": [{"role": "user", "content": content}]})[0] == ["[user]Look.\nWho?"]


def test_a_template_that_wants_parts_gets_them() -> None:
    assert read({"messages": [USER, ASSISTANT]}, template=PARTS)[0] == ["[user]Who?[assistant]Me."]


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_reach_the_template(as_text: bool) -> None:
    tools = '[{"type": "function", "function": {"name": "now"}}]' if as_text else [
        {"type": "function", "function": {"name": "now", "description": None}}
    ]  # fmt: skip
    [text] = read({"messages": [USER], "tools": tools}, template=TOOLS)[0]
    assert text == '<{"type": "function", "function": {"name": "now"}}>[user]Who?'


def test_a_call_of_a_tool_reaches_the_template() -> None:
    template = "{% for m in messages %}{% if not m.content %}{{ m.tool_calls[0].name }}{% endif %}{% endfor %}"
    turn = {"role": "assistant", "content": None, "tool_calls": [{"name": "now"}]}
    assert read({"messages": [USER, turn]}, template=template)[0] == ["now"]


def test_a_system_turn_that_is_refused_goes_into_the_users() -> None:
    texts, reading = read({"messages": [SYSTEM, USER, ASSISTANT]}, {"messages": [USER]}, template=GEMMA)
    assert texts == ["[user]Be brief.\n\nWho?[assistant]Me.", "[user]Who?"]
    assert reading.describe() == "rows: 1 system turns, which the chat template refuses, put into the user's"


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"messages": [USER, USER]}, r"refuses a chat with roles \['user', 'user'\]: roles must alternate"),
        ({"messages": [SYSTEM]}, r"refuses a chat with roles \['system'\]: System role not supported"),
        ({"messages": [{"speaker": "user", "said": "w1"}]}, "a turn has speaker, said, expected role and content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of type image, and only text"),
        ({"messages": [{"role": "user", "content": 5}]}, "content is int, expected text"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "a turn has role, content"),
        ({"messages": 5}, "holds int, neither text nor a chat"),
        ({"messages": ["a", "b"]}, "holds list, neither text nor a chat"),
        ({"messages": [USER], "tools": "no JSON"}, "Expecting value"),
        ({"messages": [USER], "tools": [5]}, "its tools are no list of objects"),
        ({"messages": "half \ud800"}, "surrogates not allowed"),
        (BadRow("not JSON"), "not JSON"),
    ],
)
def test_a_row_that_is_no_use_is_skipped_and_named(bad: Any, told: str) -> None:
    texts, reading = read({"messages": [USER]}, bad, {"messages": [ASSISTANT | {"role": "user"}]}, template=GEMMA)
    assert texts == ["[user]Who?", "[user]Me."]
    assert reading.rows == 3
    with pytest.raises(DatasetError, match=f"none of 1 rows can be used; row 1: .*{told}"):
        read(bad, template=GEMMA, column=None if isinstance(bad, BadRow) else "messages")
    [line] = reading.skipped
    assert line.startswith("row 2: ")
    assert reading.describe() == f"rows: 1 of 3 rows read skipped ({line})"


def test_a_source_without_a_good_row_is_given_up() -> None:
    def endless() -> Any:
        while True:
            yield 7, {"text": 5}

    with pytest.raises(DatasetError, match="none of 1000 rows can be used; row 7: holds int"):
        list(documents(endless(), make_tokenizer(), Reading("rows"), "text"))


def test_a_template_beyond_its_limits_ends_the_reading_at_once() -> None:
    """The next row would take as long: a thousand of them hours."""
    rows = [{"messages": [USER]} for _ in range(3)]
    reading = Reading("rows")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ 'a' * 10**10 }}"
    with pytest.raises(CheckpointError, match="takes more than 512 MiB of memory"):
        list(documents(enumerate(rows, 1), tokenizer, reading))
    assert reading.rows <= 1


def test_chats_need_a_template() -> None:
    with pytest.raises(DatasetError, match="rows, column 'messages': holds chats, and this tokenizer has no chat tem"):
        read({"messages": [USER]}, template=None)


def test_no_rows_are_an_error() -> None:
    with pytest.raises(DatasetError, match="rows has no rows"):
        read()
