"""Tool calls and reasoning: read from each family's way of writing them, in pieces of any size, and required."""

import json

import pytest
from tokenizers import AddedToken

from lowbit.engine.sampling import Sampling
from lowbit.serve.answers import merge
from lowbit.serve.dialects import DIALECTS, REASONING, Reader, dialect_of, reasoning_of
from tests.engine.make import tiny
from tests.serve.conftest import serving

WEATHER = ("weather", {"city": "Köln"})
TIME = ("time", {})
WRITTEN = {
    "qwen": [
        (
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>',
            "",
            [WEATHER, TIME],
        ),
        ('Let me see.\n<tool_call>{"name": "time", "arguments": {}}</tool_call>', "Let me see.\n", [TIME]),
        ("<tool_call>no JSON</tool_call>!", "<tool_call>no JSON</tool_call>!", []),
        ('a < b <tool_cal> {"name": 1}', 'a < b <tool_cal> {"name": 1}', []),
    ],
    "mistral": [
        (
            '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Köln"}}, {"name": "time", "arguments": {}}]',
            "",
            [WEATHER, TIME],
        ),
        ('[TOOL_CALLS]weather[ARGS]{"city": "Köln"}[TOOL_CALLS]time{}', "", [WEATHER, TIME]),
        ("plain [TOOL", "plain [TOOL", []),
    ],
    "llama": [
        ('{"name": "weather", "parameters": {"city": "Köln"}}', "", [WEATHER]),
        (
            '<|python_tag|>{"name": "weather", "parameters": {"city": "Köln"}}; {"name": "time", "parameters": {}}',
            "",
            [WEATHER, TIME],
        ),
        ('{"not": "a call"}', '{"not": "a call"}', []),
        ("A text {1}", "A text {1}", []),
    ],
}
WRITTEN["llama-3.2"] = WRITTEN["llama"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "d",
            "parameters": {
                "type": "object",
                "properties": {"c": {"enum": ["Ä", "B"]}},
                "required": ["c"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("w", "t")
]
TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}\n{% endfor %}"
    "{% if open %}<think>{% endif %}{# SIGN #}"
)


def read(reader: Reader, text: str, size: int) -> dict:
    """The message of a text that comes in pieces of `size` characters."""
    message = {}
    for at in range(0, len(text), size):
        for delta in reader.feed(text[at : at + size], at + size >= len(text)):
            merge(message, delta)
    return message


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("name", DIALECTS)
def test_calls_are_read_in_pieces_of_any_size(name, size):
    for text, content, calls in WRITTEN[name]:
        reader = Reader(DIALECTS[name])
        message = read(reader, text, size)
        found = [call["function"] for call in message.get("tool_calls", ())]
        assert [(call["name"], json.loads(call["arguments"])) for call in found] == calls
        assert message.get("content", "").strip("\n") == content.strip("\n")
        assert reader.finish("stop") == ("tool_calls" if calls else "stop")


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("marks", REASONING)
def test_reasoning_is_separated(marks, size):
    begin, end = marks
    for thinking, text in ((False, f"{begin}a\nb{end}\n\nc"), (True, f"a\nb{end}\n\nc")):
        message = read(Reader(None, marks, thinking), text, size)
        assert message["reasoning_content"] == "a\nb"
        assert message["content"] == "c"
    assert read(Reader(None, marks, True), "unfinished", size) == {"reasoning_content": "unfinished"}
    assert read(Reader(None, marks), "no thought", size) == {"content": "no thought"}


def test_a_template_tells_its_dialect():
    for name, dialect in DIALECTS.items():
        assert dialect_of(f"{{# {dialect.sign} #}}") == DIALECTS[name]
    assert dialect_of("plain") is None
    assert reasoning_of("{{ '</think>' }}") == REASONING[0]
    assert reasoning_of("plain") is None


@pytest.fixture(scope="module", params=["qwen", "mistral", "llama"])
def dialect(request):
    return DIALECTS[request.param]


@pytest.fixture(scope="module")
def calling(tmp_path_factory, dialect):
    model, _ = tiny(tmp_path_factory.mktemp("calling"), vocab_size=264)
    tokenizer = model.tokenizer
    marks = [mark for mark in (dialect.begin, dialect.end) if mark]
    tokenizer.backend_tokenizer.add_tokens([AddedToken(mark, special=not dialect.end) for mark in marks])
    tokenizer.chat_template = TEMPLATE.replace("SIGN", dialect.sign)
    with serving(model) as served:
        yield served


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "t"}}])
def test_a_required_call_is_made(calling, choice):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "tools": TOOLS, "tool_choice": choice}
    asked |= {"temperature": 1.0, "seed": 2, "max_tokens": 100}
    [got] = calling.client.chat.completions.create(**asked).choices
    assert got.finish_reason == "tool_calls"
    assert got.message.content is None
    for call in got.message.tool_calls:
        assert call.function.name in (("w", "t") if choice == "required" else ("t",))
        assert json.loads(call.function.arguments)["c"] in ("Ä", "B")
    chunks = [chunk.choices[0] for chunk in calling.client.chat.completions.create(**asked, stream=True)]
    streamed = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert [call.function.arguments for call in streamed] == [c.function.arguments for c in got.message.tool_calls]
    assert chunks[-1].finish_reason == "tool_calls"
    answer = [got.message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": "x", "content": "5"}]
    again = asked | {"messages": [*asked["messages"], *answer], "max_tokens": 1, "tool_choice": "auto"}
    assert calling.client.chat.completions.create(**again).choices


def test_a_required_call_is_an_item_of_a_response(calling):
    tools = [{"type": "function"} | tool["function"] for tool in TOOLS]
    asked = {"model": "tiny", "input": "a", "tools": tools, "tool_choice": {"type": "function", "name": "t"}}
    asked |= {"temperature": 1.0, "max_output_tokens": 100, "extra_body": {"seed": 2}}
    got = calling.client.responses.create(**asked)
    assert {(item.type, item.name) for item in got.output} == {("function_call", "t")}
    assert json.loads(got.output[0].arguments)["c"] in ("Ä", "B")
    events = list(calling.client.responses.create(**asked, stream=True))
    streamed = [event.item.arguments for event in events if event.type == "response.output_item.done"]
    assert streamed == [item.arguments for item in got.output]
    items = [item.model_dump() for item in got.output]
    results = [{"type": "function_call_output", "call_id": item.call_id, "output": "5"} for item in got.output]
    turns = [{"role": "user", "content": "a"}, *items, *results]
    again = asked | {"input": turns, "tool_choice": "auto", "max_output_tokens": 1}
    assert calling.client.responses.create(**again).usage.output_tokens == 1


def test_tools_that_cannot_be_used_are_refused(calling, served):
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
    status, answer = served.send("POST", "/v1/chat/completions", ask | {"tools": TOOLS})
    assert (status, b"no form of tool calls" in answer) == (400, True)
    assert served.send("POST", "/v1/chat/completions", ask | {"tools": TOOLS, "tool_choice": "none"})[0] == 200
    other = {"type": "function", "function": {"name": "other"}}
    for changes in ({"tools": TOOLS, "tool_choice": other}, {"tool_choice": "required"}, {"tools": [{"type": "x"}]}):
        assert calling.send("POST", "/v1/chat/completions", ask | changes)[0] == 400


def test_reasoning_that_the_prompt_begins(calling):
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 5, "temperature": 0}
    body = calling.send("POST", "/v1/chat/completions", ask | {"chat_template_kwargs": {"open": True}})[1]
    message = json.loads(body)["choices"][0]["message"]
    prompt = calling.model.encode_chat(ask["messages"], None, {"open": True})
    expected = calling.model.generate([prompt], Sampling(max_new_tokens=5))[0].text
    assert message["reasoning_content"] == expected.lstrip("\n")
    assert not message["content"]
