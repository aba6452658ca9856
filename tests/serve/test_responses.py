"""POST /v1/responses through OpenAI's own client: the texts of chat completions, as items and as events."""

import json

import openai
import pytest

from lowbit.engine.sampling import Piece
from lowbit.serve import responses
from lowbit.serve.answers import Choice
from lowbit.serve.dialects import DIALECTS, Reader
from lowbit.serve.items import ItemsAnswer
from lowbit.serve.job import Update
from lowbit.serve.responses import ResponsesBody, messages_of
from lowbit.serve.vocabulary import Vocabulary

ASKED = {"model": "tiny", "input": "hello", "max_output_tokens": 12, "temperature": 0}
HELLO = [{"role": "user", "content": "hello"}]


def test_a_response_is_the_engines(served):
    expected = served.model.chat(HELLO, max_new_tokens=12)
    got = served.client.responses.create(**ASKED)
    assert got.output_text == expected.text
    assert (got.status, got.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert got.usage.output_tokens == len(expected.tokens)
    assert got.output[0].role == "assistant"
    events = list(served.client.responses.create(**ASKED, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert events[-1].response.output_text == expected.text


def test_a_conversation_has_instructions_and_earlier_items(served):
    turns = [*HELLO, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "again"}]
    expected = served.model.chat([{"role": "system", "content": "be brief"}, *turns], max_new_tokens=5)
    parts = [{"type": "input_text", "text": "ag"}, {"type": "input_text", "text": "ain"}]
    got = served.client.responses.create(
        model="tiny",
        instructions="be brief",
        input=[*turns[:2], {"type": "message", "role": "user", "content": parts}],
        max_output_tokens=5,
        temperature=0,
    )
    assert got.output_text == expected.text
    assert got.instructions == "be brief"


def test_system_messages_join_and_tools_of_other_servers_are_left_out(served):
    found = messages_of(
        ResponsesBody.model_validate(
            {
                "model": "x",
                "instructions": "a",
                "input": [{"role": "developer", "content": "b"}, {"role": "user", "content": "c"}],
            }
        )
    )
    assert found == [{"role": "system", "content": "a\n\nb"}, {"role": "user", "content": "c"}]
    got = served.client.responses.create(**ASKED, tools=[{"type": "web_search"}], extra_body={"client_metadata": {}})
    assert got.tools == []
    assert got.output_text == served.model.chat(HELLO, max_new_tokens=12).text


def test_calls_and_reasoning_join_the_message_around_them():
    items = [
        {"role": "user", "content": "time?"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "a", "name": "time", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "place", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "noon"},
    ]
    user, assistant, tool = messages_of(ResponsesBody.model_validate({"model": "x", "input": items}))
    assert user == {"role": "user", "content": "time?"}
    assert [call["id"] for call in assistant["tool_calls"]] == ["a", "b"]
    assert assistant["reasoning_content"] == "hm"
    assert tool == {"role": "tool", "tool_call_id": "a", "content": "noon"}


def test_the_effort_of_reasoning_is_a_variable_of_the_template():
    asked = {"model": "x", "input": "a", "reasoning": {"effort": "none"}}
    variables = ResponsesBody.model_validate(asked).as_chat().variables()
    assert variables == {"reasoning_effort": "none", "enable_thinking": False}
    asked |= {"reasoning": {"effort": "high"}, "chat_template_kwargs": {"enable_thinking": False, "x": 1}}
    variables = ResponsesBody.model_validate(asked).as_chat().variables()
    assert variables == {"reasoning_effort": "high", "enable_thinking": False, "x": 1}
    assert ResponsesBody.model_validate({"model": "x", "input": "a"}).as_chat().variables() == {}


def test_items_follow_one_another_in_a_stream(served):
    text = 'a<think>b</think>c<tool_call>{"name": "time", "arguments": {"at": 1}}</tool_call>'
    choice = Choice(0, 0, Reader(DIALECTS["qwen"], ("<think>", "</think>")))
    answer = ItemsAnswer("tiny", Vocabulary(served.model), False, {"tools": []})
    events = answer.opening(choice)
    for at, letter in enumerate(text):
        update = Update(Piece(0, letter, (1,), "stop" if at == len(text) - 1 else None))
        events += answer.chunks(choice, choice.take(update), update)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [item["type"] for item in done] == ["message", "reasoning", "message", "function_call"]
    assert [item["content"][0]["text"] for item in done[:3]] == ["a", "b", "c"]
    assert json.loads(done[3]["arguments"]) == {"at": 1}
    last = events[-1]
    assert last["type"] == "response.completed"
    assert last["response"]["output"] == done
    assert last["response"]["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


def test_a_form_is_kept_and_log_probabilities_come(served):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "name": "x", "schema": schema}
    got = served.client.responses.create(**ASKED | {"max_output_tokens": 40}, text={"format": form})
    assert json.loads(got.output_text)["a"] in (1, 2)
    got = served.client.responses.create(**ASKED, top_logprobs=2, include=[responses.LOGPROBS])
    assert len(got.output[0].content[0].logprobs) == 12
    assert len(got.output[0].content[0].logprobs[0].top_logprobs) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"previous_response_id": "resp_1"}, "send the whole conversation as input"),
        ({"background": True}, "background"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "'input_image': only text is read here"),
        ({"input": [{"type": "web_search_call"}]}, "input.type"),
        ({"input": [{"type": "function_call", "call_id": "a"}]}, "an item of type function_call needs name"),
        ({"input": []}, "input: List should have at least 1 item"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input: List should have at least 1 item"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format: type json_schema needs"),
        ({"text": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "Unimplemented keys"),
        ({"tools": [{"type": "function", "name": ""}]}, "tools.name"),
        ({"truncation": "auto"}, "truncation"),
        ({"temperature": 1000}, "temperature is 1000.0"),
        ({"top_logprob": 3}, "did you mean 'top_logprobs'?"),
        ({"input": "a" * 300}, "the engine's context is 128"),
    ],
)
def test_what_is_not_served_is_refused(served, changes, message):
    with pytest.raises(openai.BadRequestError) as found:
        served.client.responses.create(**ASKED | {"extra_body": changes})
    assert message in found.value.body["message"]
    assert found.value.param not in ("messages", "response_format", "max_completion_tokens")
