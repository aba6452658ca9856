"""The runner's mailbox, filled here by steps on a CPU: tokens that the next steps do not overwrite, and no others."""

import pytest
import torch

from lowbit.engine.runner import SENT, Written
from lowbit.engine.sampler import Features
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
