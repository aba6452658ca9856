"""Heads are trained on what the model itself writes: lessons are the engine's own features and choices, and a head that
learned them drafts more tokens that are right."""

import pytest
import torch

from benchmarks.train_drafter import config_for, frequent, write_head
from lowbit import engine
from lowbit.engine.drafts.eagle import eagle_taps
from lowbit.engine.drafts.training import Eagle3, Plan, Teacher, Text, shares_of, train, write_texts
from tests.builders import make_model, save
from tests.engine.make import CHEAP_ROWS

LAYERS, NEW = 8, 16
PROMPTS = [[3 + i, 7, (11 * i) % 250] for i in range(24)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model's directory, transformers' model, and an engine for it."""
    directory = tmp_path_factory.mktemp("model")
    model = make_model("llama", num_hidden_layers=LAYERS)
    save(model, directory)
    return directory, model, engine.load(directory, device="cpu", context=64)


def test_a_lesson_is_what_the_model_computes_and_chooses(made):
    _, model, found = made
    targets, taps = torch.arange(0, 260, 2), eagle_taps({}, LAYERS)
    texts = [Text([5, 9, 11, 200, 4], 2), Text([7, 8, 30], 1)]
    [lesson] = Teacher(found, taps, targets).lessons(texts, 2)
    assert lesson.written.tolist() == [[False, True, True, False, False], [False, False, True, True, True]]
    for row, text in enumerate(sorted(texts, key=lambda text: len(text.tokens))):
        with torch.no_grad():
            out = model(torch.tensor([text.tokens]), output_hidden_states=True)
        count, logits = len(text.tokens), out.logits[0]
        assert lesson.tokens[row, :count].tolist() == text.tokens
        features = torch.cat([out.hidden_states[tap + 1][0] for tap in taps], -1)
        torch.testing.assert_close(lesson.taken[row, :count], features, atol=1e-4, rtol=1e-4)
        likely = logits[:, targets].topk(32)
        torch.testing.assert_close(lesson.chances[row, :count], likely.values.softmax(-1), atol=1e-4, rtol=1e-3)
        best = [token // 2 if token % 2 == 0 else -1 for token in logits.argmax(-1).tolist()]
        assert lesson.best[row, :count].tolist() == best


def test_a_trained_head_is_right_more_often(made, tmp_path):
    directory, model, found = made
    texts = write_texts(found, PROMPTS, NEW, 0.8)
    greedy = found.generate(PROMPTS[::2], max_new_tokens=NEW)
    assert [text.tokens[3:] for text in texts[::2]] == [list(each.tokens) for each in greedy]
    targets = frequent(texts, 260, 130)
    config = config_for(model.config.to_dict(), len(targets))
    lessons = Teacher(found, eagle_taps(config, LAYERS), targets).lessons(texts, len(texts))
    torch.manual_seed(0)
    head = Eagle3(config, model.get_input_embeddings().weight.detach())
    before = shares_of(head, lessons, 3)
    after = train(head, lessons, Plan(60.0, rate=3e-3, steps=3, most=50))
    assert after[0] > before[0] + 0.2
    assert len(after) == 3
    write_head(head, config, targets, tmp_path)
    drafted = engine.load(directory, device="cpu", context=64, drafter=tmp_path)
    drafted.spaces.costs = CHEAP_ROWS
    completions = drafted.generate(PROMPTS[::2], max_new_tokens=NEW)
    assert [each.tokens for each in completions] == [each.tokens for each in greedy]
    assert sum(each.steps for each in completions) < sum(len(each.tokens) for each in completions) - len(completions)
