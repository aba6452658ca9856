"""The OpenAI protocol, through OpenAI's own client: the same texts as the engine alone, in every form of answer."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lowbit.engine.sampling import Sampling

MESSAGES = [{"role": "user", "content": "hello"}]
SETTINGS = {
    "greedy": ({"temperature": 0}, {}),
    "seeded": ({"temperature": 1.3, "seed": 5, "top_p": 0.9}, {"temperature": 1.3, "seed": 5, "top_p": 0.9}),
    "top k": (
        {"temperature": 1.0, "seed": 6, "extra_body": {"top_k": 20, "min_p": 0.01}},
        {"temperature": 1.0, "seed": 6, "top_k": 20, "min_p": 0.01},
    ),
    "penalties": (
        {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5},
    ),
    "repetition": (
        {"temperature": 0, "extra_body": {"repetition_penalty": 1.4, "ignore_eos": True, "min_tokens": 3}},
        {"repetition_penalty": 1.4, "ignore_eos": True, "min_new_tokens": 3},
    ),
    "biases": (
        {"temperature": 0, "logit_bias": {"65": 100, "66": -100}, "presence_penalty": 100},
        {"bias": ((65, 100.0), (66, -100.0)), "presence_penalty": 100.0},
    ),
    "stop": ({"temperature": 0, "stop": ["e", "\\"]}, {"stop": ("e", "\\")}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_completion_is_the_engines(served, name):
    asked, settings = SETTINGS[name]
    [expected] = served.model.generate(["hello"], Sampling(max_new_tokens=20, **settings))
    got = served.client.completions.create(model="tiny", prompt="hello", max_tokens=20, **asked)
    assert (got.choices[0].text, got.choices[0].finish_reason) == (expected.text, expected.finish_reason)
    assert got.usage.completion_tokens == len(expected.tokens)
    stream = served.client.completions.create(model="tiny", prompt="hello", max_tokens=20, stream=True, **asked)
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == expected.text
    assert [chunk.finish_reason for chunk in chunks][-1] == expected.finish_reason


def test_null_is_a_field_that_is_left_out(served):
    """Clients whose types have a null for each field send them."""
    for path, body in (("completions", {"prompt": "hello"}), ("chat/completions", {"messages": MESSAGES})):
        plain = {"model": "tiny", "max_tokens": 5, "temperature": 0} | body
        fields = ("n", "stream", "stream_options", "stop", "seed", "logprobs", "logit_bias", "user", "response_format")
        fields += ("echo", "suffix", "best_of") if path == "completions" else ("tools", "tool_choice", "modalities")
        nulls = dict.fromkeys((*fields, "ignore_eos", "stop_token_ids"))
        answers = [served.send("POST", f"/v1/{path}", asked) for asked in (plain, plain | nulls)]
        assert [status for status, _ in answers] == [200, 200]
        assert json.loads(answers[0][1])["choices"] == json.loads(answers[1][1])["choices"]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_chat_completion_is_the_engines(served, name):
    asked, settings = SETTINGS[name]
    expected = served.model.chat(MESSAGES, Sampling(max_new_tokens=20, **settings))
    got = served.client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=20, **asked)
    [choice] = got.choices
    assert (choice.message.content, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert choice.message.role == "assistant"
    stream = served.client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=20, stream=True, stream_options={"include_usage": True}, **asked
    )
    *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == expected.finish_reason
    assert not last.choices
    assert last.usage.completion_tokens == len(expected.tokens)
    assert last.usage.total_tokens == expected.prompt_tokens + len(expected.tokens)


def test_choices_have_seeds_of_their_own_and_their_prompt_counts_once(served):
    got = served.client.completions.create(
        model="tiny", prompt=["hello", "other"], n=2, seed=3, max_tokens=8, temperature=1.5
    )
    expected = [
        served.model.generate([prompt], max_new_tokens=8, temperature=1.5, seed=3 + choice)[0].text
        for prompt in ("hello", "other")
        for choice in range(2)
    ]
    assert [choice.text for choice in got.choices] == expected
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    assert got.usage.prompt_tokens == 10
    stream = served.client.chat.completions.create(
        model="tiny", messages=MESSAGES, n=3, seed=1, max_tokens=6, temperature=1.0, stream=True
    )
    texts = ["", "", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [
        served.model.chat(MESSAGES, max_new_tokens=6, temperature=1.0, seed=1 + at).text for at in range(3)
    ]


def test_log_probabilities_of_a_chat(served):
    expected = served.model.chat(MESSAGES, max_new_tokens=6, logprobs=3)
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6, "temperature": 0, "logprobs": True}
    whole = served.client.chat.completions.create(**asked, top_logprobs=3).choices[0].logprobs.content
    streamed = [
        entry
        for chunk in served.client.chat.completions.create(**asked, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    for found in (whole, streamed):
        assert len(found) == len(expected.tokens)
        for entry, other in zip(found, expected.logprobs, strict=True):
            assert entry.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [each.logprob for each in entry.top_logprobs] == pytest.approx(list(other.top.values()), abs=1e-4)
    text = b"".join(bytes(entry.bytes) for entry in whole)
    assert text.decode(errors="replace") == expected.text


def test_a_prompt_is_scored_and_echoed(served):
    tokens = served.model.encode("hello")
    asked = {"model": "tiny", "prompt": [tokens], "echo": True, "logprobs": 1, "temperature": 0}
    [expected] = served.model.generate([tokens], max_new_tokens=1, logprobs=1, prompt_logprobs=True)
    [choice] = served.client.completions.create(max_tokens=1, **asked).choices
    assert choice.text == "hello" + expected.text
    assert choice.logprobs.tokens[:5] == list("hello")
    assert choice.logprobs.text_offset[:6] == [0, 1, 2, 3, 4, 5]
    assert choice.logprobs.token_logprobs[0] is None
    scores = [each.logprob for each in (*expected.prompt_logprobs, *expected.logprobs)]
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(scores, abs=1e-4)
    assert list(choice.logprobs.top_logprobs[1].values()) == pytest.approx(
        list(expected.prompt_logprobs[0].top.values())
    )
    alone = served.client.completions.create(max_tokens=0, **asked)
    assert alone.choices[0].text == "hello"
    assert len(alone.choices[0].logprobs.tokens) == 5
    assert alone.usage.completion_tokens == 0
    chunks = list(served.client.completions.create(max_tokens=1, stream=True, **asked))
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    streamed = [score for chunk in chunks for score in chunk.choices[0].logprobs.token_logprobs]
    assert streamed == choice.logprobs.token_logprobs


def test_the_model_and_its_tokens(served):
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    assert served.client.models.retrieve("tiny").owned_by == "lowbit"
    status, body = served.send("POST", "/tokenize", {"model": "tiny", "prompt": "héllo"})
    tokens = json.loads(body)["tokens"]
    assert (status, tokens) == (200, served.model.encode("héllo"))
    assert json.loads(served.send("POST", "/detokenize", {"tokens": tokens})[1]) == {"prompt": "héllo"}
    chat = json.loads(served.send("POST", "/tokenize", {"messages": MESSAGES})[1])
    assert chat == {"tokens": served.model.encode_chat(MESSAGES), "count": 12, "max_model_len": 128}
    assert served.send("GET", "/health") == (200, b'{"status":"ok"}')


def test_metrics_count_what_was_written(served):
    def counts() -> dict[str, float]:
        _, body = served.send("GET", "/metrics")
        families = text_string_to_metric_families(body.decode())
        return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}

    before = counts()
    served.client.completions.create(model="tiny", prompt="metrics", max_tokens=7, extra_body={"ignore_eos": True})
    after = counts()
    assert after["lowbit_generated_tokens_total"] - before["lowbit_generated_tokens_total"] == 7
    assert after["lowbit_prompt_tokens_total"] - before["lowbit_prompt_tokens_total"] == 7
    assert after["lowbit_first_token_seconds_count"] - before["lowbit_first_token_seconds_count"] == 1
    assert after["lowbit_slots"] == 3


def test_many_clients_at_once_get_what_each_gets_alone(served):
    prompts = [f"{'long ' * (number % 5)}prompt {number}" for number in range(12)]
    expected = [served.model.generate([prompt], max_new_tokens=12)[0].text for prompt in prompts]

    def ask(prompt: str) -> str:
        asked = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0}
        if len(prompt) % 2:
            return served.client.completions.create(**asked).choices[0].text
        return "".join(chunk.choices[0].text for chunk in served.client.completions.create(stream=True, **asked))

    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(ask, prompts)) == expected


def test_a_client_that_leaves_frees_its_slot(served):
    for _ in range(6):
        stream = served.client.completions.create(
            model="tiny", prompt="x", max_tokens=120, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
    impatient = served.client.with_options(timeout=0.2)
    with pytest.raises(openai.APITimeoutError):
        impatient.completions.create(
            model="tiny", prompt="x", n=40, max_tokens=120, extra_body={"ignore_eos": True, "min_tokens": 100}
        )
    served.client.completions.create(model="tiny", prompt="x", max_tokens=4)
    assert not served.session.queue


def test_a_stream_that_waits_says_that_it_is_alive(served, monkeypatch):
    monkeypatch.setattr("lowbit.serve.flow.QUIET", 0.05)
    monkeypatch.setattr("lowbit.serve.batch.Batch.read", slowed(served.session.batch.read))
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 3, "temperature": 0, "stream": True}
    status, answer = served.send("POST", "/v1/completions", body)
    assert status == 200
    assert answer.startswith(b": the request waits, or its prompt is read\n\n")
    [alone] = served.model.generate(["hello"], max_new_tokens=3)
    texts = [json.loads(line[6:])["choices"][0]["text"] for line in answer.decode().split("\n\n") if line[6:7] == "{"]
    assert "".join(texts) == alone.text
    assert served.client.completions.create(**body | {"stream": False}).choices[0].text == alone.text
    asked = {"model": "tiny", "input": "hello", "max_output_tokens": 3, "temperature": 0, "stream": True}
    kinds = [event.type for event in served.client.responses.create(**asked)]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds.count("response.created") == 1
    assert kinds.count("response.in_progress") > 2


def slowed(read):
    """A reader of prompts that needs a while."""

    def later(batch, job) -> None:
        time.sleep(0.3)
        read(job)

    return later
