"""Programs that people point at the server get the texts and the numbers of the engine.

LOWBIT_PEERS/clients has `bin/python` and `bin/llm`, with llm, langchain-openai, litellm, and lm-eval[api] with
transformers; tests of clients that are missing are skipped.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from lowbit.engine.sampling import Sampling
from lowbit.evaluation.backend import open_backend
from lowbit.evaluation.tasks import harness_model
from lowbit.models.source import open_source
from tests.engine.make import tiny
from tests.serve.conftest import Served, serving

MESSAGES = [{"role": "user", "content": "hello"}]
PAIRS = [("ab", "red"), ("Q: ", "seven"), ("The sky is", " blue, mostly"), ("a", "b" * 60), ("space ", "d out")]
LANGCHAIN = """
import json, sys
from langchain_openai import ChatOpenAI, OpenAI
model = ChatOpenAI(base_url=sys.argv[1], api_key="none", model="tiny", temperature=0, max_tokens=12)
whole = model.invoke("hello")
parts = list(model.stream("hello"))
text = OpenAI(base_url=sys.argv[1], api_key="none", model="tiny", temperature=0, max_tokens=12).invoke("hello")
usage = whole.usage_metadata["output_tokens"]
print(json.dumps([whole.content, "".join(part.content for part in parts), text, usage]))
"""
LITELLM = """
import json, sys
import litellm
asked = {"api_base": sys.argv[1], "api_key": "none", "temperature": 0, "max_tokens": 12}
messages = [{"role": "user", "content": "hello"}]
whole = litellm.completion("openai/tiny", messages, **asked)
parts = list(litellm.completion("openai/tiny", messages, stream=True, **asked))
text = litellm.text_completion(model="text-completion-openai/tiny", prompt="hello", **asked)
streamed = "".join(part.choices[0].delta.content or "" for part in parts)
print(json.dumps([whole.choices[0].message.content, streamed, text.choices[0].text, whole.usage.completion_tokens]))
"""
HARNESS = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
sizes = {"max_length": 128, "batch_size": 2, "tokenizer": sys.argv[2], "tokenizer_backend": "huggingface"}
model = LocalCompletionsAPI(base_url=sys.argv[1] + "/completions", model="tiny", **sizes)
asked = [Instance("loglikelihood", {}, tuple(pair), index) for index, pair in enumerate(json.loads(sys.argv[3]))]
writing = [Instance("generate_until", {}, ("abc", {"until": [chr(10)], "max_gen_toks": 12}), 0)]
print(json.dumps([model.loglikelihood(asked), model.generate_until(writing)]))
"""
LLM_MODELS = """
- model_id: tiny
  model_name: tiny
  api_base: {base}
  api_key: none
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("clients")


@pytest.fixture(scope="module")
def served(directory):
    with serving(tiny(directory)[0]) as found:
        yield found


def base(served: Served) -> str:
    return f"http://127.0.0.1:{served.port}/v1"


def program(name: str) -> str:
    """A program of the clients' environment; the test is skipped without it."""
    found = Path(os.environ.get("LOWBIT_PEERS", "/nowhere")) / "clients" / "bin" / name
    if not found.exists():
        pytest.skip(f"no {name} in an environment `clients` under LOWBIT_PEERS")
    return str(found)


def ended(command: list[str], **environment: str) -> str:
    """The output of a program that ends without an error."""
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.peer
def test_the_harness_measures_the_same_over_http(served, directory):
    """Each log-likelihood, each verdict about greedy tokens, and a written answer."""
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    asked = [instance("loglikelihood", {}, pair, index) for index, pair in enumerate(PAIRS)]
    writing = [instance("generate_until", {}, ("abc", {"until": ["\n"], "max_gen_toks": 12}), 0)]
    ours = harness_model(open_backend("engine", open_source(str(directory)), "cpu"))
    command = [program("python"), "-c", HARNESS, base(served), str(directory), json.dumps(PAIRS)]
    likelihoods, written = json.loads(ended(command).splitlines()[-1])
    for (value, greedy), (expected, expected_greedy) in zip(likelihoods, ours.loglikelihood(asked), strict=True):
        assert value == pytest.approx(expected, rel=1e-5)
        assert greedy == expected_greedy
    assert written == ours.generate_until(writing)


@pytest.mark.peer
@pytest.mark.parametrize("script", [LANGCHAIN, LITELLM], ids=["langchain", "litellm"])
def test_libraries_over_the_protocol_get_the_engines_texts(served, script):
    answer = served.model.chat(MESSAGES, Sampling(max_new_tokens=12))
    [text] = served.model.generate(["hello"], max_new_tokens=12)
    found = json.loads(ended([program("python"), "-c", script, base(served)]).splitlines()[-1])
    assert found == [answer.text, answer.text, text.text, len(answer.tokens)]


@pytest.mark.peer
@pytest.mark.parametrize("flags", [[], ["--no-stream"]])
def test_a_clients_command_line_gets_the_engines_text(served, tmp_path, flags):
    (tmp_path / "extra-openai-models.yaml").write_text(LLM_MODELS.format(base=base(served)))
    command = [program("llm"), "-m", "tiny", "-o", "temperature", "0", "-o", "max_tokens", "12", *flags, "hello"]
    expected = served.model.chat(MESSAGES, Sampling(max_new_tokens=12)).text
    assert ended(command, LLM_USER_PATH=str(tmp_path)).rstrip("\n") == expected.rstrip("\n")
