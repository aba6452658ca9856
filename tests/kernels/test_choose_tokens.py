"""choose_tokens: torch's own argmax and a step of counting, on two devices."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.quant.kernels import ops
from lowbit.quant.kernels.choose_tokens import (
    MAX_BLOCKS,
    ChoiceCall,
    Cursor,
    Mailbox,
    Noise,
    choose_blocks,
    mix,
    perturbed,
)
from tests.kernels.make import opcheck

NAN, INF = float("nan"), float("inf")
LAST = 9


def make_choice(scores: Tensor, moves: bool = True) -> ChoiceCall:
    """A choice among these scores, rows at positions 0, 1, ... of sequences a hundred slots apart."""
    m, device = len(scores), scores.device
    positions = torch.arange(m, device=device)
    cursor = Cursor(positions, positions * 101, LAST) if moves else None
    return ChoiceCall(scores, torch.full((m,), -1, device=device), torch.arange(m, device=device) + 5, cursor)


def awkward_scores(n: int) -> Tensor:
    """Rows whose largest score stands first, last, twice, everywhere, or is none."""
    rows = torch.randn(12, n)
    rows[1, [0, -1]] = 50.0
    rows[2, -1] = 50.0
    rows[3] = 0.0
    rows[4] = -0.0
    rows[4, n // 2 :] = 0.0
    rows[5] = -INF
    rows[6, n // 2] = NAN
    rows[7, [n // 3, n - 1]] = NAN
    rows[8, [n // 4, n // 2]] = INF
    rows[9] = -torch.rand(n) - 1e30
    rows[10, 0] = NAN
    rows[10, -1] = INF
    rows[11] = torch.randint(0, 3, (n,))
    return rows


def first_largest(row: Tensor) -> int:
    """The index chosen if NaN is above all numbers and the lower index wins ties, number by number."""
    values = row.tolist()
    return min(range(len(values)), key=lambda i: (values[i] == values[i], -values[i] if values[i] == values[i] else 0))


@pytest.mark.parametrize("n", [1, 2, 100, 1025])
def test_the_first_of_the_largest_is_chosen(n):
    call = make_choice(awkward_scores(n))
    ops.choose(call)
    assert call.tokens.tolist() == [first_largest(row) for row in call.scores]


def test_rows_move_on_and_stay_at_the_last_position():
    call = make_choice(torch.randn(12, 7))
    assert call.cursor is not None
    starts = call.cursor.slots - call.cursor.positions
    ops.choose(call)
    assert call.written.tolist() == list(range(6, 18))
    assert call.cursor.positions.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9]
    assert torch.equal(call.cursor.slots, starts + call.cursor.positions)


def test_without_a_cursor_tokens_are_chosen_alone():
    call = make_choice(torch.eye(4), moves=False)
    ops.choose(call)
    assert call.tokens.tolist() == [0, 1, 2, 3]
    assert call.written.tolist() == [6, 7, 8, 9]


def test_a_mailbox_has_the_last_steps():
    call = make_choice(torch.eye(4), moves=False)
    call = replace(call, mailbox=Mailbox(torch.full((3, 4), -1), torch.full((4,), 5)))
    assert call.mailbox is not None
    for turn in range(5, 9):
        call.scores.copy_(torch.eye(4).roll(turn, 1))
        ops.choose(call)
        assert call.mailbox.tokens[turn % 3].tolist() == call.tokens.tolist() == [(row + turn) % 4 for row in range(4)]
    assert call.mailbox.turns.tolist() == [9] * 4
    assert call.mailbox.tokens[6 % 3].tolist() == [2, 3, 0, 1]


def splitmix(value: int) -> int:
    """SplitMix64's finalizer in Python's integers."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
    return value ^ (value >> 31)


def test_the_hash_is_splitmix64s():
    values = torch.randint(-(2**63), 2**63 - 1, (100,))
    assert [value % 2**64 for value in mix(values).tolist()] == [splitmix(value % 2**64) for value in values.tolist()]


def noisy(call: ChoiceCall) -> ChoiceCall:
    """Every third row without a temperature."""
    m, device = len(call.scores), call.scores.device
    temperature = 0.4 * (torch.arange(m, device=device) % 3).float()
    return replace(call, noise=Noise(temperature, torch.arange(m, device=device) * 977 - 3))


def test_noise_is_for_rows_with_a_temperature_and_changes_by_step():
    call = noisy(make_choice(torch.zeros(30, 1000), moves=False))
    ops.choose(call)
    first = call.tokens.clone()
    assert (first[::3] == 0).all()
    assert len(set(first.tolist())) > 15
    ops.choose(call)
    assert (call.tokens != first).sum() > 15


def test_no_rows_are_no_work():
    ops.choose(make_choice(torch.empty(0, 5)))


def test_opcheck_and_compile():
    for moves in (True, False):
        call = make_choice(torch.randn(2, 9), moves)
        opcheck(ops.choose, call)
    call = noisy(call)
    opcheck(ops.choose, call)
    opcheck(ops.choose, replace(call, mailbox=Mailbox(torch.zeros(2, 2, dtype=torch.int64), torch.arange(2))))
    call = replace(call, noise=None)
    torch.compile(ops.choose, fullgraph=True, backend="aot_eager")(call)
    assert torch.equal(call.tokens, call.scores.argmax(-1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.randn(3, 8).half()}, "rows of torch.float32 are needed"),
        ({"scores": torch.randn(8, 3).T}, "strides"),
        ({"scores": torch.randn(3, 0)}, "rows of torch.float32 are needed"),
        ({"tokens": torch.zeros(2, dtype=torch.int64)}, r"tokens is \(2,\) torch.int64, not \(3,\)"),
        ({"written": torch.zeros(3)}, "written is .* torch.float32, not"),
        ({"cursor": Cursor(torch.zeros(3), torch.zeros(3), 9)}, "positions is"),
        ({"noise": Noise(torch.zeros(3, 1), torch.arange(3))}, r"temperature is \(3, 1\)"),
        ({"tokens": torch.zeros(3, dtype=torch.int64, device="meta")}, "tokens is on meta, the scores on cpu"),
        (
            {"mailbox": Mailbox(torch.zeros(8, 3), torch.arange(3))},
            r"mailbox is \(8, 3\) torch.float32, not \(steps, 3\)",
        ),
        ({"mailbox": Mailbox(torch.zeros(3, 2).long().T, torch.arange(3))}, "contiguous memory of the host"),
        ({"mailbox": Mailbox(torch.zeros(2, 3).long(), torch.arange(2))}, r"turns is \(2,\)"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.choose(replace(make_choice(torch.randn(3, 8)), **change))


def test_blocks_share_long_rows_where_there_are_clusters():
    assert [choose_blocks(n, False, (9, 0)) for n in (1, 16384, 32000, 65024, 1 << 20)] == [1, 1, 2, 4, MAX_BLOCKS]
    assert choose_blocks(16384, True, (9, 0)) == 4
    assert choose_blocks(1 << 20, True, (8, 0)) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("n", [1, 31, 1000, 32000, 65025, 128256, 262147])
def test_the_gpu_chooses_what_the_cpu_does(n, dependent):
    scores = awkward_scores(n)
    found, wanted = make_choice(scores.cuda()), make_choice(scores)
    for _ in range(3):
        ops.choose(replace(found, dependent=dependent))
        ops.choose(wanted)
    assert found.cursor is not None
    assert wanted.cursor is not None
    for name in ("tokens", "written"):
        assert torch.equal(getattr(found, name).cpu(), getattr(wanted, name))
    for name in ("positions", "slots"):
        assert torch.equal(getattr(found.cursor, name).cpu(), getattr(wanted.cursor, name))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [31, 32000, 128257])
def test_the_gpu_draws_what_the_cpu_does(n):
    call = noisy(make_choice(torch.randn(9, n), moves=False))
    expected, found = perturbed(call), noisy(make_choice(call.scores.cuda(), moves=False))
    ops.choose(found)
    chosen = expected.gather(1, found.tokens.cpu().unsqueeze(1))
    assert (chosen >= expected.amax(1, keepdim=True) - 1e-4).all()  # by logf's last bits


@pytest.mark.gpu
def test_captured_choices_reach_memory_of_the_host():
    sent = torch.full((4, 3), -1, pin_memory=True)
    call = make_choice(torch.zeros(3, 32000, device="cuda"), moves=False)
    call = replace(call, mailbox=Mailbox(sent, torch.zeros(3, dtype=torch.int64, device="cuda")), dependent=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.choose(call)
    for turn in range(9):
        hot = [turn, 31999 - turn, 17]
        call.scores.zero_()
        call.scores[range(3), hot] = 1.0
        graph.replay()
        torch.cuda.synchronize()
        assert sent[turn % 4].tolist() == hot
    with pytest.raises(ValueError, match="pinned for a GPU"):
        ops.choose(replace(call, mailbox=replace(call.mailbox, tokens=torch.zeros(4, 3, dtype=torch.int64))))


@pytest.mark.gpu
def test_a_captured_choice_waits_for_the_scores():
    call = make_choice(torch.zeros(3, 32000, device="cuda"), moves=False)
    hot = torch.zeros(3, dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.scores.zero_()
        call.scores.scatter_(1, hot.unsqueeze(1), 1.0)
        ops.choose(replace(call, dependent=True))
    for place in (5, 31999, 16384, 0):
        hot.copy_(torch.tensor([place, 1, (place + 7) % 32000]))
        graph.replay()
        assert torch.equal(call.tokens, hot)
