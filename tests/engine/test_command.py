"""`quantize-generate` from its arguments to its text."""

import re

import pytest
import torch
from click.testing import CliRunner

from benchmarks.train_drafter import config_for, write_head
from lowbit import engine
from lowbit.commands.quantize_generate import generate
from lowbit.engine.drafts.training import Eagle3
from lowbit.errors import CheckpointError
from lowbit.export.escape import visible
from tests.builders import make_model, save, save_family


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_family("llama", tmp_path_factory.mktemp("llama"))


def run(*arguments: str, stdin: str = ""):
    return CliRunner().invoke(generate, [*map(str, arguments), "--device", "cpu"], input=stdin)


def test_a_prompt_is_continued_and_streaming_writes_the_same(directory):
    expected = visible(engine.load(directory, device="cpu").generate(["hello"], max_new_tokens=12)[0].text)
    assert run(directory, "-p", "hello", "--max-new-tokens", "12").output == f"hello{expected}\n"
    assert run(directory, "-p", "hello", "--max-new-tokens", "12", "--stream").output == f"{expected}\n"
    assert run(directory, "-p", "-", "--max-new-tokens", "12", stdin="hello").output == f"hello{expected}\n"


def test_chat_answers_by_the_template(directory):
    model = engine.load(directory, device="cpu")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    expected = visible(model.generate([model.encode_chat(messages)], max_new_tokens=8)[0].text)
    got = run(directory, "--chat", "--system", "be brief", "-p", "hi", "--max-new-tokens", "8", "--verbose")
    assert got.stdout == f"{expected}\n"
    assert "tokens read, 8 written in 8 steps (length), seed" in got.stderr


def test_a_drafter_changes_no_text_and_its_drafts_are_told(directory, tmp_path):
    model = make_model("llama", num_hidden_layers=8)
    save(model, tmp_path / "model")
    config = config_for(model.config.to_dict(), 260)
    write_head(Eagle3(config, torch.zeros(1)), config, torch.arange(260), tmp_path / "head")
    plain = run(tmp_path / "model", "-p", "hello", "--max-new-tokens", "12")
    got = run(tmp_path / "model", "-p", "hello", "--max-new-tokens", "12", "--drafter", tmp_path / "head", "--verbose")
    assert got.stdout == plain.output
    assert re.search(r"drafts right by place: \d+ of \d+", got.stderr)
    refused = run(directory, "-p", "hello", "--drafter-scheme", "int8")
    assert "--drafter-scheme int8 rounds a drafter: name one with --drafter" in refused.output


def test_a_conversation_remembers(directory):
    model = engine.load(directory, device="cpu")
    messages = [{"role": "user", "content": "hi"}]
    answers = []
    for question in ("", "more"):
        messages += [{"role": "user", "content": question}] if question else []
        answers.append(model.generate([model.encode_chat(messages)], max_new_tokens=6)[0].text)
        messages.append({"role": "assistant", "content": answers[-1]})
    assert run(directory, "--chat", "--max-new-tokens", "6", stdin="hi\nmore\n\n").stdout == "\n".join(
        map(visible, [*answers, ""])
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no text to continue: lowbit generate CHECKPOINT TEXT"),
        (("-p", "a", "-p", "b", "--stream"), "2 prompts were given"),
        (("-p", "a", "--temperature", "-1"), "temperature is -1.0"),
        (("-p", ""), "the prompt is empty"),
        (("-p", "a" * 50, "--context", "40"), "50 tokens, the engine's context is 40"),
    ],
)
def test_what_is_wrong_is_said(directory, arguments, message):
    result = run(directory, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_text_may_stand_without_its_option(directory):
    assert (
        run(directory, "hi", "--max-new-tokens", "4").stdout
        == run(directory, "-p", "hi", "--max-new-tokens", "4").stdout
    )


def test_a_directory_that_is_no_model_is_told(tmp_path):
    assert isinstance(run(tmp_path, "-p", "a").exception, CheckpointError)
