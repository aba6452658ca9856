"""The runner on a CPU: its mailbox, whose tokens the next steps do not overwrite, and the steps before a capture."""

from types import SimpleNamespace

import pytest
import torch

from lowbit.engine.capture import WARM_UP
from lowbit.engine.runner import SENT, Written
from lowbit.engine.sampler import Features
from lowbit.engine.sampling import Sampling
from lowbit.quant.kernels.choose_tokens import Mailbox
from tests.engine.make import tiny


def test_the_last_steps_are_in_the_mailbox_and_later_ones_are_refused(tmp_path):
    model, _ = tiny(tmp_path)
    with torch.inference_mode(), model.spaces.lent() as space:
        runner = space.runner(2, 2, 40, Features())
        runner.place([5, 9], [3, 7], [runner.cache.start(b) for b in range(2)])
        runner.mailbox = Mailbox(torch.zeros(SENT, 2, dtype=torch.int64), torch.zeros_like(runner.tokens))
        wanted = [runner.launch().wait().tokens.tolist() for _ in range(SENT + 2)]
        assert len({tuple(row) for row in wanted}) > 1
        for turn in range(2, SENT + 2):
            assert Written(runner, turn).wait().tokens.tolist() == wanted[turn]
        with pytest.raises(
            RuntimeError, match=f"step 1 is read after {SENT + 2} steps: the mailbox holds the last {SENT}"
        ):
            runner.sent(1)


def test_the_warm_up_of_a_capture_can_be_the_first_steps(tmp_path, monkeypatch):
    model, _ = tiny(tmp_path)
    warm_ups, found = [], []

    def capture(parts, kept, warm_up):
        warm_ups.append((warm_up, runner.turn))
        return [SimpleNamespace(replay=part) for part in parts]

    monkeypatch.setattr("lowbit.engine.runner.capture", capture)
    with torch.inference_mode(), model.spaces.lent() as space:
        for features in (Features(), Features(masked=True)):
            for spread in (False, True):
                space.clear()
                runner = space.runner(2, 2, 40, features)
                for each in space.runners.values():
                    each.captures = True
                runner.mailbox = Mailbox(torch.zeros(SENT, 2, dtype=torch.int64), torch.zeros_like(runner.tokens))
                monkeypatch.setattr(runner, "written", lambda runner=runner: runner.sent(runner.turn - 1))
                if features.masked:
                    runner.sampler.allowed.fill_(-1)
                runner.place([5, 9], [3, 7], [runner.cache.start(b) for b in range(2)])
                if spread:
                    runner.spread()
                found.append([runner.launch().tolist() for _ in range(5)])
                runner.spread()  # nothing is left to capture
                assert runner.plain == 0
    assert warm_ups == [(WARM_UP, 1), (0, 3), (WARM_UP, 0), (WARM_UP, 1), (0, 2), (0, 3)]  # twice with a source
    assert all(tokens == found[0] for tokens in found)


FEATURES = (
    Features(),
    Features(sampled=True),
    Features(logprobs=True),
    Features(penalized=True),
    Features(sampled=True, truncated=True),
    Features(masked=True, logprobs=True),
)


def test_choices_by_more_than_one_kernel_share_the_graph_of_the_logits(tmp_path, monkeypatch):
    """A request with a feature that is new to the batch would wait for the whole model's capture otherwise."""
    model, _ = tiny(tmp_path)
    captured, chosen = [], {}

    def capture(parts, kept, warm_up):
        captured.append([part.__name__ for part in parts])
        return [SimpleNamespace(replay=part) for part in parts]

    monkeypatch.setattr("lowbit.engine.runner.capture", capture)
    with torch.inference_mode(), model.spaces.lent() as space:
        for features in FEATURES:
            runner = space.runner(2, 2, 40, features)
            for each in space.runners.values():
                each.captures = True
            monkeypatch.setattr(runner, "written", lambda runner=runner: runner.tokens.tolist())
            runner.sampler.start([model.request(0, [5], Sampling()).constraints] * 2)
            runner.place([5, 9], [3, 7], [runner.cache.start(b) for b in range(2)])
            runner.spread()
            chosen[features] = [runner.launch() for _ in range(5)]
        assert space.runner(2, 2, 40).graphs
    assert captured == [["compute"], ["compute"], ["compute"], *[["choose"]] * 4]
    assert all(tokens == chosen[Features()] for tokens in chosen.values())


def test_a_source_stays_while_its_choices_are_used(tmp_path):
    model, _ = tiny(tmp_path)
    with torch.inference_mode(), model.spaces.lent() as space:
        space.most = 3
        first = space.runner(2, 2, 40, Features(logprobs=True))
        space.runner(1, 2, 40, Features())
        assert space.runner(2, 2, 40, Features(logprobs=True)) is first
        space.runner(1, 2, 40, Features(sampled=True))
        assert space.runner(2, 2, 40, Features(penalized=True)).source is first.source
        assert len(space.runners) <= space.most


@pytest.mark.parametrize("adjacent", [1, 4])
def test_rows_of_a_sequence_are_said_to_be_adjacent(tmp_path, monkeypatch, adjacent):
    model, _ = tiny(tmp_path)
    hidden, seen = model.decoder.hidden, []
    monkeypatch.setattr(model.decoder, "hidden", lambda step, cache: seen.append(step) or hidden(step, cache))
    with torch.inference_mode(), model.spaces.lent() as space:
        runner = space.runner(adjacent, 1, 40, Features(), adjacent)
        runner.place(range(5, 5 + adjacent), range(adjacent), [0] * adjacent)
        runner.advance()
    [step] = seen
    assert (step.adjacent, step.alone, step.prompts) == (adjacent, adjacent == 1, 1)
