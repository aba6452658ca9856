"""Text side by side: both models' own text, and prompt files with correct and wrong layouts."""

import json

import pytest

from lowbit.errors import CheckpointError, DatasetError
from lowbit.evaluation.generate import Prompt, read_prompts, side_by_side
from tests.builders import make_tokenizer
from tests.e2e.cli import run_quantize_eval


def test_prompts_from_text_and_from_lines_of_json(tmp_path):
    (tmp_path / "p.txt").write_text("One\n\nTwo words\n")
    assert read_prompts(tmp_path / "p.txt") == [Prompt("One"), Prompt("Two words")]
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "One"}) + "\n" + json.dumps(chat) + "\n")
    one, two = read_prompts(tmp_path / "p.jsonl")
    assert one == Prompt("One")
    assert two.as_text() == "Hi"


def test_a_chat_goes_through_the_template():
    from tests.builders import CHAT_TEMPLATE

    tokenizer = make_tokenizer()
    prompt = Prompt(messages=({"role": "user", "content": "Hi"},))
    with pytest.raises(CheckpointError, match="no chat template"):
        prompt.ids(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    assert tokenizer.decode(prompt.ids(tokenizer)) == "user: Hi\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n\n", "no prompt in it"),
        ("p.csv", "a,b\n", r"not '\.csv'"),
        ("p.jsonl", '{"prompt": "a"}\nnot json\n', r"p\.jsonl:2: not JSON"),
        ("p.jsonl", '{"question": "a"}\n', r"p\.jsonl:1: an object with question; write"),
        ("p.jsonl", '["a"]\n', r"p\.jsonl:1: list; write"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}\n', r"p\.jsonl:1: an object with messages"),
        ("p.jsonl", '{"prompt": 3}\n', r"p\.jsonl:1: an object with prompt"),
    ],
)
def test_a_prompt_file_in_the_wrong_layout(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DatasetError, match=message):
        read_prompts(tmp_path / name)
    with pytest.raises(DatasetError, match=r"gone\.txt"):
        read_prompts(tmp_path / "gone.txt")


def test_where_two_texts_part():
    tokenizer = make_tokenizer()
    written = [tokenizer("blue sky").input_ids, tokenizer("blue sea").input_ids]
    row = side_by_side(Prompt("The"), written, [tokenizer, tokenizer])
    assert (row["agreed"], row["common"], row["equal"]) == (6, "blue s", False)
    assert row["texts"] == ["blue sky", "blue sea"]
    same = side_by_side(Prompt("The"), [written[0]] * 2, [tokenizer, tokenizer])
    assert (same["agreed"], same["equal"]) == (8, True)
    assert "agreed" not in side_by_side(Prompt("The"), written[:1], [tokenizer])


def test_the_command_writes_a_line_for_each(models, tmp_path):
    directory = models("llama")[1]
    (tmp_path / "prompts.txt").write_text("abc\nxyz\n")
    args = ["--baseline", directory, "--prompts", tmp_path / "prompts.txt", "--tokens", 4]
    done = run_quantize_eval("generate", directory, *args)
    assert done.code == 0, done.err
    lines = [line for line in done.out.splitlines() if line.startswith(f"  {directory}: ")]
    assert len(lines) == 4
    assert lines[0] == lines[1]
    row = json.loads(done.out.splitlines()[-1])
    assert (row["equal"], row["prompts"]) == (2, 2)
    one = run_quantize_eval("generate", directory, "--prompt", "abc", "--tokens", 4)
    assert json.loads(one.out.splitlines()[-1])["rows"][0]["texts"][0] == row["rows"][0]["texts"][0]
    alone = run_quantize_eval("generate", directory, "--backend", "blocks")
    assert "generate with --backend transformers" in alone.complaint


def test_a_prompt_that_fills_the_positions_is_refused_before_a_step(models, tmp_path):
    directory = models("llama")[1]
    (tmp_path / "prompts.txt").write_text("abc\n" + "x" * 5000 + "\n")
    done = run_quantize_eval("generate", directory, "--prompts", tmp_path / "prompts.txt", "--tokens", 4)
    assert "prompt 2 has 5000 tokens" in done.complaint
    assert "has positions for" in done.complaint


def test_a_model_that_names_no_positions_has_a_bound_too(models, tmp_path, monkeypatch):
    monkeypatch.setattr("lowbit.models.source.Source.positions", None)
    (tmp_path / "prompts.txt").write_text("x" * 16384 + "\n")
    done = run_quantize_eval("generate", models("llama")[1], "--prompts", tmp_path / "prompts.txt", "--tokens", 4)
    assert "names no number of positions, 16384 are the most" in done.complaint
