"""Answers of a form: they always parse, whatever the model would write, and other requests are not touched."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from lowbit.engine.sampler import Constraints, Features, Sampler
from lowbit.engine.sampling import Sampling
from lowbit.serve import app
from tests.serve.conftest import serving

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "size": {"enum": ["small", "large"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "size", "count", "tags"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}


def chat(served, **settings):
    settings = {"temperature": 1.0, "max_tokens": 110} | settings
    messages = [{"role": "user", "content": "a"}]
    return served.client.chat.completions.create(model="tiny", messages=messages, **settings)


@pytest.mark.parametrize("seed", range(4))
def test_a_schema_is_kept(served, seed):
    got = chat(served, response_format=FORMAT, seed=seed, n=2)
    for choice in got.choices:
        found = json.loads(choice.message.content)
        assert choice.finish_reason == "stop"
        assert set(found) == set(SCHEMA["properties"])
        assert found["size"] in ("small", "large")
        assert 0 <= found["count"] <= 9
        assert len(found["name"]) <= 5
    assert got.choices[0].message.content != got.choices[1].message.content


def test_a_json_object_begins_as_one(served):
    got = chat(served, response_format={"type": "json_object"}, seed=1)
    text = got.choices[0].message.content
    assert text.startswith("{")
    if got.choices[0].finish_reason == "stop":
        json.loads(text)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[a-c]{3}-[0-9]{2}"}, "[a-c]{3}-[0-9]{2}"),
        ({"choice": ["yes", 'a "no"', "perhaps"]}, 'yes|a "no"|perhaps'),
        ({"grammar": 'start: "<" WORD ("," WORD)~1..2 ">"\nWORD: /[a-z]{1,3}/'}, "<[a-z]{1,3}(,[a-z]{1,3}){1,2}>"),
        ({"json": {"const": 5}}, "5"),
    ],
)
def test_other_forms(served, form, pattern):
    for seed in range(3):
        got = served.client.completions.create(
            model="tiny", prompt="a", max_tokens=60, seed=seed, extra_body={"structured_outputs": form}
        )
        assert re.fullmatch(pattern, got.choices[0].text)
        assert got.choices[0].finish_reason == "stop"


def test_requests_without_a_form_write_the_same_beside_one(served):
    expected = served.model.generate(["beside"], max_new_tokens=40, temperature=1.0, seed=3, ignore_eos=True)[0].text
    streams = [
        served.client.completions.create(
            model="tiny",
            prompt="beside",
            max_tokens=40,
            seed=3,
            temperature=1.0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
    ]
    streams.append(chat(served, response_format=FORMAT, seed=0, stream=True))
    texts = ["", ""]
    for at, stream in enumerate(streams):
        for chunk in stream:
            choice = chunk.choices[0]
            texts[at] += (choice.text if at == 0 else choice.delta.content) or ""
    assert texts[0] == expected
    assert texts[1] == chat(served, response_format=FORMAT, seed=0).choices[0].message.content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"response_format": {"type": "json_schema"}}, "needs the field json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": FORMAT | {"json_schema": {"schema": {"type": "nope"}}}}, "Invalid type: nope"),
        ({"response_format": FORMAT | {"json_schema": {"schema": {"not": {}}}}}, "Unimplemented keys"),
        ({"response_format": FORMAT | {"json_schema": {"schema": {"$ref": "http://a.b/c"}}}}, "does not fetch"),
        ({"structured_outputs": {"regex": "("}}, "the grammar cannot be followed"),
        ({"structured_outputs": {"regex": "a{1000}{1000}{1000}"}}, "the grammar cannot be followed"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "the grammar cannot be followed"),
        ({"structured_outputs": {"grammar": "start: start"}}, "the grammar cannot be followed: no text follows it"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "give one of json, regex, choice and grammar"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 5}, "min_tokens goes with no form"),
    ],
)
def test_a_form_that_cannot_be_kept_is_refused(served, changes, message):
    status, answer = served.send("POST", "/v1/completions", {"model": "tiny", "prompt": "a"} | changes)
    assert status == 400
    assert message in json.loads(answer)["error"]["message"]


def test_slow_forms_hold_no_other_request(served, monkeypatch):
    """There are 40 threads for all requests."""
    begun, go = threading.Semaphore(0), threading.Event()

    def made(vocabulary, body):
        if body.has_form:
            begun.release()
            go.wait(60)

    monkeypatch.setattr("lowbit.serve.work.grammar_of", made)
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    with ThreadPoolExecutor(50) as threads:
        forms = [
            threads.submit(served.send, "POST", "/v1/completions", asked | {"response_format": FORMAT})
            for _ in range(50)
        ]
        try:
            assert all(begun.acquire(timeout=30) for _ in range(app.SLOW))
            assert served.send("POST", "/v1/completions", asked)[0] == 200
            assert not any(form.done() for form in forms)
        finally:
            go.set()
        assert {form.result()[0] for form in forms} == {200}


def test_a_schema_that_is_true_allows_any_json(served):
    texts = [
        served.client.completions.create(
            model="tiny", prompt="a", max_tokens=10, temperature=0, extra_body={"structured_outputs": {"json": schema}}
        )
        .choices[0]
        .text
        for schema in (True, {})
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"anyOf": [{"type": "string", "pattern": "(a+)+b"}] * 200},
    ],
)
def test_a_schema_without_an_end_ends_itself_alone(served, schema):
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    body = {"model": "tiny", "prompt": "a", "max_tokens": 30, "response_format": form}
    status, _ = served.send("POST", "/v1/completions", body)
    assert status in (200, 400)
    assert served.client.completions.create(model="tiny", prompt="a", max_tokens=2).choices


def chain(rule: str, end: str) -> str:
    """A grammar of rules that each name the next."""
    return "start: r0\n" + "".join(f"r{i}: {rule} r{i + 1}\n" for i in range(4000)) + f"r4000: {end}"


CHAIN = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(8000)} | {"a8000": {"type": "string"}}
HOSTILE = {
    "a chain of rules": {"grammar": chain("", '"a"')},
    "a chain of texts": {"grammar": chain('"x"', '"a"')},
    "a chain of references": {"json": {"$ref": "#/$defs/a0", "$defs": CHAIN}},
    "an intersection": {"grammar": "start: A\nA: " + " & ".join(f"/([ab]*a[ab]{{{i}}})*/" for i in range(3, 14))},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_grammar_that_overflows_or_takes_hours_ends_a_process_of_its_own(served, what):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 3, "structured_outputs": HOSTILE[what]}
    status, answer = served.send("POST", "/v1/completions", body)
    assert status == 400
    assert "the grammar takes more than 2 s or 1024 MiB" in json.loads(answer)["error"]["message"]
    test_a_schema_is_kept(served, 0)  # by the same processes


def test_a_grammar_that_is_slow_later_ends_alone(served, monkeypatch):
    monkeypatch.setattr("lowbit.serve.grammar.STEP_SECONDS", 0)
    status, answer = served.send(
        "POST", "/v1/completions", {"model": "tiny", "prompt": "a"} | {"response_format": FORMAT}
    )
    assert status == 400
    assert "for one token: make it simpler" in json.loads(answer)["error"]["message"]
    assert served.client.completions.create(model="tiny", prompt="a", max_tokens=2).choices


def test_deep_schemas_are_refused(served):
    schema = '{"items": ' * 150 + "{}" + "}" * 150
    body = b'{"model": "tiny", "prompt": "a", "structured_outputs": {"json": %s}}' % schema.encode()
    status, _ = served.send("POST", "/v1/completions", body)
    assert status in (200, 400)
    body = body.replace(b'{"items": ', b'{"items": ' * 3)
    assert served.send("POST", "/v1/completions", body)[0] == 400


@pytest.mark.parametrize("vocabulary", [32, 50, 260])
def test_a_mask_leaves_the_allowed_tokens_alone(vocabulary):
    sampler = Sampler(Features(masked=True), 2, vocabulary, torch.device("cpu"))
    sampler.start([Constraints(Sampling(), 0, [1], ())] * 2)
    sampler.allowed[0] = 0
    for token in (3, 31, vocabulary - 1):
        word, bit = divmod(token, 32)
        sampler.allowed[0, word] |= 1 << bit if bit < 31 else -(1 << 31)
    scores = torch.randn(2, vocabulary)
    masked = sampler.mask(scores)
    assert torch.equal(masked[1], scores[1])
    assert (masked[0] > float("-inf")).nonzero().flatten().tolist() == sorted({3, 31, vocabulary - 1})


def test_a_tokenizer_that_has_no_masks_has_no_forms_but_all_else(engine_of_tests, monkeypatch):
    words = Tokenizer(WordLevel({f"w{token}": token for token in range(260)}, "w0"))
    monkeypatch.setattr(engine_of_tests, "tokenizer", PreTrainedTokenizerFast(tokenizer_object=words))
    with serving(engine_of_tests) as served:
        asked = {"model": "tiny", "prompt": [5], "max_tokens": 3, "extra_body": {"ignore_eos": True}}
        got = served.client.completions.create(**asked, logprobs=1)
        assert len(got.choices[0].logprobs.tokens) == 3
        assert got.choices[0].logprobs.tokens[0].startswith("w")
        with pytest.raises(openai.BadRequestError, match="does not read the model's tokenizer"):
            served.client.completions.create(model="tiny", prompt=[5], extra_body={"response_format": FORMAT})
