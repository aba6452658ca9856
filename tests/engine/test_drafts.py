"""Drafts change the number of steps and nothing else: whatever is drafted, whatever the sampling, at any batch."""

import random
from collections.abc import Sequence

import pytest
import torch

from lowbit import engine
from lowbit.engine.drafts.automaton import Automaton
from lowbit.engine.drafts.check import Check
from lowbit.engine.drafts.drafter import Proposal
from lowbit.engine.drafts.drafting import Drafting, run_drafted
from lowbit.engine.drafts.gauge import Costs, Gauge
from lowbit.engine.drafts.suffix import Store, Suffixes
from lowbit.engine.engine import Engine
from lowbit.engine.sampler import Constraints, Features, Sampler
from lowbit.engine.sampling import Completion, Sampling
from lowbit.errors import EngineError
from lowbit.quant.scheme import parse_scheme
from tests.engine.make import CHEAP_ROWS, quantized, tiny

PROMPTS = [list(range(3, 20)), [7, 8, 9, 10] * 5, [250, 3, 3, 3, 3, 9], list(range(40, 90))]
SAMPLINGS = {
    "greedy": Sampling(),
    "sampled": Sampling(temperature=1.0, seed=1),
    "truncated": Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=2),
    "penalized": Sampling(repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1),
    "all": Sampling(temperature=1.0, repetition_penalty=1.1, bias=((5, 2.0),), bad_words=((7, 8), (9,)), seed=3),
    "late": Sampling(temperature=1.5, min_new_tokens=9, stop_tokens=tuple(range(0, 260, 3)), seed=4),
    "logprobs": Sampling(logprobs=3, temperature=0.5, seed=5),
}


class Oracle:
    """Proposes known texts, and a wrong token wherever chance wants it."""

    taps: tuple[int, ...] = ()
    usual: Proposal | None = None
    steady = True
    most = 7

    def __init__(self, texts: Sequence[Sequence[int]], wrong: float, vocabulary: int = 260) -> None:
        self.texts, self.wrong, self.vocabulary = texts, wrong, vocabulary
        self.lengths: dict[int, int] = {}
        self.chance = random.Random(0)
        self.ended: list[int] = []

    def begin(self, sequence: int, tokens: Sequence[int]) -> None:
        assert list(tokens) == list(self.texts[sequence][: len(tokens)])
        self.lengths[sequence] = len(tokens)

    def extend(self, sequence: int, tokens: Sequence[int], features: torch.Tensor | None) -> None:
        at = self.lengths[sequence]
        assert list(tokens) == list(self.texts[sequence][at : at + len(tokens)])
        self.lengths[sequence] += len(tokens)

    def propose(self, sequences: Sequence[int], most: int) -> list[Proposal]:
        return [self.draft(sequence, most) for sequence in sequences]

    def draft(self, sequence: int, most: int) -> Proposal:
        known = self.texts[sequence][self.lengths[sequence] :][: self.chance.randrange(most + 1)]
        wrong = (self.chance.randrange(self.vocabulary), self.wrong)
        return Proposal(tuple(wrong[0] if self.chance.random() < wrong[1] else token for token in known))

    def end(self, sequence: int) -> None:
        self.ended.append(sequence)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("tiny"))[0]


def drafted(model: Engine, drafter, prompts: Sequence[list[int]], sampling: Sampling, most: int = 7, **changes):
    """The completions of one batch with this drafter."""
    requests = model.requests(prompts, sampling, **changes)
    with model.spaces.lent() as space, torch.inference_mode():
        drafting = Drafting(space, drafter, most)
        drafting.gauge.costs = CHEAP_ROWS
        for _ in run_drafted(drafting, requests):
            pass
    return [request.completion() for request in requests]


def same(found: Sequence[Completion], expected: Sequence[Completion]) -> None:
    for mine, plain in zip(found, expected, strict=True):
        assert mine.tokens == plain.tokens
        assert (mine.text, mine.finish_reason) == (plain.text, plain.finish_reason)
        assert [each.token for each in mine.logprobs or ()] == [each.token for each in plain.logprobs or ()]
        for one, other in zip(mine.logprobs or (), plain.logprobs or (), strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert one.top == pytest.approx(other.top, abs=1e-4)


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_no_draft_changes_a_token(model, name, wrong):
    """Right drafts save steps; wrong ones cost nothing but time."""
    ignore = name != "late"
    settings = {"max_new_tokens": 24, "ignore_eos": ignore}
    plain = model.generate(PROMPTS, SAMPLINGS[name], **settings)
    texts = [prompt + list(each.tokens) for prompt, each in zip(PROMPTS, plain, strict=True)]
    for count in (1, 3, 4):
        oracle = Oracle(texts, wrong)
        found = drafted(model, oracle, PROMPTS[:count], SAMPLINGS[name], **settings)
        same(found, plain[:count])
        assert sorted(oracle.ended) == list(range(count))
        if not wrong and ignore:
            assert all(each.steps < len(each.tokens) for each in found)
            assert all(checked == right for each in found for checked, right in each.drafts)


@pytest.mark.parametrize(
    ("scheme", "dtype"), [("int4-g32", "bfloat16"), ("int8-channel", "float16"), (None, "bfloat16")]
)
def test_no_draft_changes_a_token_of_a_quantized_model(tmp_path, scheme, dtype):
    if scheme is None:
        tiny(tmp_path)
    else:
        quantized(tmp_path, parse_scheme(scheme))
    model = engine.load(tmp_path, device="cpu", dtype=getattr(torch, dtype), context=128)
    chance = random.Random(1)
    prompts = [[chance.randrange(3, 260) for _ in range(chance.randrange(2, 30))] for _ in range(12)]
    plain = model.generate(prompts, max_new_tokens=16, ignore_eos=True)
    texts = [prompt + list(each.tokens) for prompt, each in zip(prompts, plain, strict=True)]
    for first in range(0, len(prompts), 2):
        pair, oracle = prompts[first : first + 2], Oracle(texts[first:], 0.2)
        found = drafted(model, oracle, pair, Sampling(max_new_tokens=16, ignore_eos=True))
        same(found, plain[first : first + 2])


def test_tokens_behind_drafts_are_drawn_from_the_models_distribution():
    """One draft: the first token has the model's probabilities, and so has the second where the draft was right."""
    sequences, vocabulary = 6000, 6
    logits = torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(0))
    draft = int(logits[0].argmax())
    base = Sampler(Features(sampled=True), sequences, vocabulary, torch.device("cpu"))
    base.start([Constraints(Sampling(temperature=0.7), seed, [0], ()) for seed in range(sequences)])
    check = Check(base, 2)
    check.place([1] * sequences, [[]] * sequences)
    tokens = torch.tensor([0, draft]).repeat(sequences)
    chosen = check(logits.repeat(sequences, 1), tokens).tokens.view(sequences, 2)
    kept = chosen[chosen[:, 0] == draft]
    for found, row in ((chosen[:, 0], logits[0]), (kept[:, 1], logits[1])):
        expected = (row / 0.7).softmax(-1) * len(found)
        chi_square = ((found.bincount(minlength=vocabulary) - expected) ** 2 / expected).sum()
        assert chi_square < 20.5  # exceeded by chance once in 1000, with 5 degrees of freedom
    assert len(kept) > 500


def test_a_stop_within_a_draft_ends_the_text_there(model):
    [plain] = model.generate([PROMPTS[0]], max_new_tokens=24, ignore_eos=True)
    stop = next(token for token in plain.tokens[6:] if token not in plain.tokens[:6])
    [short] = drafted(model, Oracle([PROMPTS[0] + list(plain.tokens)], 0.0), PROMPTS[:1], Sampling(stop_tokens=(stop,)))
    assert short.tokens == plain.tokens[: plain.tokens.index(stop) + 1]
    assert short.finish_reason == "stop"


def test_a_batch_goes_on_as_its_texts_end(model):
    longest = 100 - len(PROMPTS[3])
    lengths = [3, 17, 9, longest]
    plain = [model.generate([p], max_new_tokens=n, ignore_eos=True)[0] for p, n in zip(PROMPTS, lengths, strict=True)]
    texts = [prompt + list(each.tokens) for prompt, each in zip(PROMPTS, plain, strict=True)]
    settings = [Sampling(max_new_tokens=n, ignore_eos=True) for n in lengths]
    same(drafted(model, Oracle(texts, 0.1), PROMPTS, settings), plain)


def test_texts_of_a_batch_are_looked_up(model):
    prompts = [[7, 8, 9, 10, 11, 12] * 5, *PROMPTS, [3, 4] * 9]
    settings = [Sampling(max_new_tokens=30, ignore_eos=True, temperature=i % 2, seed=i) for i in range(len(prompts))]
    plain = model.generate(prompts, settings)
    same(model.generate(prompts, settings, lookup=5), plain)


@pytest.mark.parametrize("token", [260, -1])
def test_a_token_outside_the_vocabulary_is_named(model, token):
    class Wild(Oracle):
        def begin(self, sequence: int, tokens: Sequence[int]) -> None:
            pass

        def extend(self, sequence: int, tokens: Sequence[int], features: torch.Tensor | None) -> None:
            pass

        def draft(self, sequence: int, most: int) -> Proposal:
            return Proposal((5, token))

    with pytest.raises(EngineError, match=f"the drafter proposes token {token}, none of the model's 260"):
        drafted(model, Wild([], 0.0), PROMPTS[:1], Sampling(max_new_tokens=4, ignore_eos=True))
    assert model.generate([[1, 2]], max_new_tokens=2)


def test_a_stream_dropped_between_draft_and_check_leaves_the_engine_usable(model):
    prompt = [7, 8, 9, 10, 11, 12] * 5
    expected = model.generate([prompt], max_new_tokens=30, lookup=4)[0]
    stream = model.stream([prompt], max_new_tokens=30, lookup=4)
    for _ in range(3):
        next(stream)
    stream.close()
    assert model.generate([prompt], max_new_tokens=30, lookup=4)[0].tokens == expected.tokens


def test_drafts_are_left_where_they_do_not_pay():
    dear = Gauge(Costs({(1, 1): 1.0, (1, 2): 1.9, (1, 4): 3.5, (1, 8): 7.0}, fixed=True))
    doubtful, certain = Proposal((1,) * 7, 0, 0.5), Proposal((1,) * 7, 1, 0.99)
    assert dear.width([doubtful], (1, 2, 4, 8)) == 1
    assert dear.width([certain], (1, 2, 4, 8)) == 4
    cheap = Gauge(CHEAP_ROWS)
    assert cheap.width([doubtful], (1, 2, 4, 8)) == 4
    assert cheap.width([certain], (1, 2, 4, 8)) == 8
    for _ in range(60):
        cheap.note(doubtful, 7, 0)
    assert cheap.width([doubtful], (1, 2, 4, 8)) == 1
    widths = []
    for _ in range(100):
        widths.append(cheap.width([doubtful], (1, 2, 4, 8)))
        cheap.note(doubtful, widths[-1] - 1, 0)
    assert 0 < sum(width > 1 for width in widths) < 60  # tried again, now and then
    for _ in range(40):
        dear.width([doubtful], (1, 2, 4, 8))
    assert dear.rest  # steps between which nobody asks


def test_a_step_that_captured_a_drafters_graph_is_no_measure(model):
    """Else its second would keep drafts of that width off for good."""
    [plain] = model.generate(PROMPTS[:1], max_new_tokens=20, ignore_eos=True)
    for steady in (False, True):
        oracle = Oracle([PROMPTS[0] + list(plain.tokens)], 0.0)
        oracle.steady = steady
        [request] = model.requests(PROMPTS[:1], Sampling(max_new_tokens=20, ignore_eos=True))
        with model.spaces.lent() as space, torch.inference_mode():
            drafting = Drafting(space, oracle, 7)
            drafting.gauge.costs = Costs()
            list(run_drafted(drafting, [request]))
        assert any(width > 1 for _, width in drafting.gauge.costs.seconds) == steady


def test_drafts_that_cost_more_than_they_save_are_left(model, monkeypatch):
    """A drafter that is always right for one token and takes as long as ten steps, by a clock of our own."""
    clock = iter(range(10**9))
    monkeypatch.setattr("lowbit.engine.drafts.drafting.time.perf_counter", lambda: float(next(clock)))
    [plain] = model.generate([PROMPTS[0]], max_new_tokens=90, ignore_eos=True)

    class Slow(Oracle):
        usual = Proposal((0,) * 7)

        def draft(self, sequence: int, most: int) -> Proposal:
            for _ in range(20):
                next(clock)
            text = self.texts[sequence][self.lengths[sequence] :][:most]
            return Proposal((text[0], *[(token + 1) % 260 for token in text[1:]]))

    slow = Slow([PROMPTS[0] + list(plain.tokens)], 0.0)
    [request] = model.requests(PROMPTS[:1], Sampling(max_new_tokens=90, ignore_eos=True))
    with model.spaces.lent() as space, torch.inference_mode():
        drafting = Drafting(space, slow, 7)
        drafting.gauge.costs = Costs()
        list(run_drafted(drafting, [request]))
    assert request.tokens == list(plain.tokens)
    assert sum(checked > 0 for checked in request.drafts.checked) > 0
    assert request.drafts.checked[0] < 9  # of some eighty steps
    assert request.steps > 80


def test_costs_are_measured_and_outliers_count_little():
    costs = Costs()
    for width, seconds in ((1, 1.0), (8, 2.0), (8, 1000.0)):
        costs.note(1, width, seconds)
    assert costs.of(1, 1) == 1.0
    assert 2.0 < costs.of(1, 8) < 2.5
    assert costs.of(1, 1) < costs.of(1, 4) < costs.of(1, 8)


def test_the_automaton_finds_the_longest_end_that_occurred_before():
    chance = random.Random(0)
    for _ in range(200):
        tokens, automaton = [chance.randrange(chance.choice([1, 2, 3, 5])) for _ in range(40)], Automaton()
        for count in range(1, len(tokens) + 1):
            automaton.append(tokens[count - 1])
            text = tokens[:count]
            longest = max(n for n in range(count) if any(text[e - n : e] == text[count - n :] for e in range(n, count)))
            length, place = automaton.repeated()
            assert length == longest
            assert text[place - length : place] == text[count - length :]
            assert place < count or not length


def test_a_draft_is_what_followed_last_time():
    drafter = Suffixes()
    drafter.begin(0, [1, 2, 3, 4, 9, 2, 3, 5, 6, 2, 3])
    assert drafter.propose([0], 2)[0].tokens == (5, 6)
    drafter.extend(0, [4], None)
    [proposal] = drafter.propose([0], 7)
    assert proposal.tokens == (9, 2, 3, 5, 6, 2, 3)
    drafter.begin(0, [1, 2])
    assert drafter.propose([0], 3)[0].tokens == ()


def test_earlier_requests_are_looked_up_in_a_store():
    drafter = Suffixes(store=Store(most=64))
    drafter.begin(0, [5, 6, 7, 8, 9])
    drafter.end(0)
    drafter.begin(0, [1, 6, 7])
    assert drafter.propose([0], 7)[0].tokens == (8, 9)  # no text goes on into the next one
    drafter.extend(0, [8, 2, 6], None)
    assert drafter.propose([0], 2)[0].tokens == (7, 8)
    for _ in range(9):
        drafter.begin(1, [*range(100, 110)])
        drafter.end(1)
    store = drafter.store
    assert store is not None
    assert len(store.automaton) <= 64
    drafter.extend(0, [7], None)
    drafter.begin(1, [104, 105])
    assert drafter.propose([1], 2)[0].tokens == (106, 107)
    drafter.begin(1, [5, 6])
    assert drafter.propose([1], 2)[0].tokens == ()  # forgotten
