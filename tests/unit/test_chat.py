"""Chat templates: the same text as transformers, and limits of time and memory for every template."""

import time
from functools import cache

import pytest
from transformers import PreTrainedTokenizerFast

from lowbit.errors import CheckpointError
from lowbit.models.chat import Renderer, TemplateRefusal, render_chat
from tests.builders import CHAT_TEMPLATE, make_tokenizer

MESSAGES = [{"role": "system", "content": "be é brief"}, {"role": "user", "content": "hi\n<|x|>", "name": None}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
EVERYTHING = """{{ bos_token }}{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}
[{{ m.role }}] {{ m.content | trim }}{{ 'name' in m }}{% endfor %}
{{ tools | tojson if tools else 'none' }}{% if add_generation_prompt %}[assistant]{% endif %}"""
HOSTILE = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a text of 10^10": "{{ 'a' * 10000000000 }}",
    "a padded text": "{{ 'a'.ljust(10 ** 11) }}",
    "a doubling text": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "a text longer than the limit": "{{ 'a' * 20000000 }}",
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("begun", [False, True])
def test_it_is_the_text_of_transformers(tokenizer, tools, begun):
    for template in (tokenizer.chat_template, EVERYTHING):
        tokenizer.chat_template = template
        expected = tokenizer.apply_chat_template(MESSAGES, tools=tools, tokenize=False, add_generation_prompt=begun)
        assert render_chat(tokenizer, MESSAGES, tools, begun) == expected


def test_a_message_is_continued(tokenizer):
    messages = [*MESSAGES, {"role": "assistant", "content": "well"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert render_chat(tokenizer, messages, continue_final_message=True) == expected


@pytest.mark.parametrize("what", HOSTILE)
def test_a_template_ends_in_time_and_memory(tokenizer, what, monkeypatch):
    monkeypatch.setattr("lowbit.models.chat.SECONDS", 1)
    monkeypatch.setattr("lowbit.models.chat._renderer", cache(Renderer))
    good, tokenizer.chat_template = tokenizer.chat_template, HOSTILE[what]
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=r"the model's chat template (takes|writes) more than") as caught:
        render_chat(tokenizer, MESSAGES)
    assert not isinstance(caught.value, TemplateRefusal)
    assert time.monotonic() - begun < 120  # of a second of the processor's, on a machine that does other work too
    tokenizer.chat_template = good
    assert "be é brief" in render_chat(tokenizer, MESSAGES)  # the next chat is served


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{", "unexpected 'end of template'"),
        ("{{ messages[0].gone.deeper }}", "no attribute 'gone'"),
        ("{{" + "(" * 100000 + "}}", "recursion"),
        ("{{ '\\ud800' }}", "it writes half a surrogate pair"),
        ("{{ cycler.__init__.__globals__.os.mkdir('ran') }}", "unsafe"),
    ],
)
def test_what_a_template_raises_is_a_refusal(tokenizer, template, message):
    tokenizer.chat_template = template
    with pytest.raises(TemplateRefusal, match=message):
        render_chat(tokenizer, MESSAGES)


def test_messages_that_are_no_json(tokenizer):
    with pytest.raises(TemplateRefusal, match="they hold what is not JSON"):
        render_chat(tokenizer, [{"role": "user", "content": object()}])


def test_no_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(CheckpointError, match="the model has no chat template"):
        render_chat(tokenizer, MESSAGES)
