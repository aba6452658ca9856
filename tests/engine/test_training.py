"""Heads are trained on what the model itself writes: lessons are the engine's own features and choices, and a head that
learned them drafts more tokens that are right."""

import pytest
import torch

from benchmarks.train_drafter import config_for, frequent, write_head
from lowbit import engine
from lowbit.engine.drafts.eagle import eagle_taps
from lowbit.engine.drafts.lessons import DEEPEST, SHARPENED, Writer
from lowbit.engine.drafts.training import Eagle3, Plan, shares_of, train, unrolled
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
    targets, taps = torch.arange(258, -1, -2), eagle_taps({}, LAYERS)
    writer = Writer(found, taps, 4, 48)
    texts = writer.write([PROMPTS[0] * 4, PROMPTS[1]], NEW, [0.0, 1.0])
    assert texts.prompts.tolist() == [3, 12]
    [greedy] = found.generate(PROMPTS[0] * 4, max_new_tokens=NEW, ignore_eos=True)
    assert texts.written[1].tolist() == list(greedy.tokens)
    [lesson] = writer.lessons(texts, targets, 2)
    assert lesson.tokens.shape == (2, 32)
    at = 0
    for row, prompt in enumerate((PROMPTS[1], PROMPTS[0] * 4)):
        count = len(prompt) + NEW
        assert lesson.tokens[row, : len(prompt)].tolist() == prompt
        with torch.no_grad():
            out = model(lesson.tokens[row : row + 1, : count - 1], output_hidden_states=True)
        features = torch.cat([out.hidden_states[tap + 1][0] for tap in taps], -1)
        torch.testing.assert_close(lesson.taken[row, : count - 1], features, atol=1e-4, rtol=1e-4)
        first = max(len(prompt) - 1, DEEPEST)
        mine, logits = slice(at, at + count - 1 - first), out.logits[0, first:]
        assert (lesson.rows[mine] - 32 * row).tolist() == list(range(first, count - 1))
        likely = logits[:, targets].topk(32)
        torch.testing.assert_close(lesson.chances[mine], (likely.values / SHARPENED).softmax(-1), atol=1e-4, rtol=1e-3)
        assert (lesson.likely[mine, 0] == likely.indices[:, 0]).all()
        best = [129 - token // 2 if token % 2 == 0 else -1 for token in logits.argmax(-1).tolist()]
        assert lesson.best[mine].tolist() == best
        at = mine.stop
    assert at == len(lesson.rows)


@torch.no_grad()
def test_a_head_is_unrolled_as_it_drafts(made):
    """Step j of a lesson proposes what the head does behind its own features of j tokens: one row after another."""
    _, model, found = made
    targets, taps, steps = torch.arange(260), eagle_taps({}, LAYERS), 3
    writer = Writer(found, taps, 2, 48)
    [lesson] = writer.lessons(writer.write([PROMPTS[0] * 4, PROMPTS[1] * 3], NEW), targets, 2)
    torch.manual_seed(0)
    head = Eagle3(config_for(model.config.to_dict(), 260), model.get_input_embeddings().weight.detach())
    right = torch.zeros(steps)
    for place, best in zip(lesson.rows.tolist(), lesson.best.tolist(), strict=True):
        row, behind = divmod(place, lesson.tokens.shape[1])
        for step in range(steps):
            known = behind - step  # positions with features of the model
            features, tokens = head.fc(lesson.taken[row : row + 1, :known]), lesson.tokens[row : row + 1, 1:]
            for count in range(known, behind + 1):
                out = head(tokens[:, :count], features, [])
                features = torch.cat([features, out[:, -1:]], 1)
            right[step] += float(head.logits(out[:, -1]).argmax() == best)
    _, shares = unrolled(head, lesson, steps)
    torch.testing.assert_close(shares, right / len(lesson.rows))


def test_a_trained_head_is_right_more_often(made, tmp_path):
    directory, model, found = made
    greedy = found.generate(PROMPTS[::2], max_new_tokens=NEW)
    writer = Writer(found, eagle_taps({}, LAYERS), len(PROMPTS), 48)
    texts = [writer.write(PROMPTS, NEW, [0.0, 0.8] * (len(PROMPTS) // 2))]
    targets = frequent(texts, 260, 130)
    config = config_for(model.config.to_dict(), len(targets))
    lessons = writer.lessons(texts[0], targets, len(PROMPTS))
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
