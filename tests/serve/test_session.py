"""A session: many requests in one batch write what each writes alone; slots, prefixes, order and errors."""

import queue
import random
import threading
import time
from collections import Counter, deque
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lowbit.engine.passes import LENGTHS
from lowbit.engine.sampling import Sampling
from lowbit.errors import EngineError
from lowbit.serve.batch import Batch
from lowbit.serve.drafts import Lookup
from lowbit.serve.pace import Pace
from lowbit.serve.session import Busy, Ended, Failed, Session
from lowbit.serve.warm import RESTED, Choice, Chunk, Graph, expected
from tests.engine.make import tiny

SETTINGS = (
    Sampling(max_new_tokens=14, ignore_eos=True),
    Sampling(max_new_tokens=9, temperature=1.2, top_k=40, seed=4, ignore_eos=True),
    Sampling(max_new_tokens=11, repetition_penalty=1.4, logprobs=2, ignore_eos=True),
    Sampling(max_new_tokens=12, temperature=0.8, frequency_penalty=0.5, seed=9, stop=("e",)),
    Sampling(max_new_tokens=3, prompt_logprobs=True, logprobs=3, ignore_eos=True),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("llama"))[0]


@pytest.fixture
def session(model):
    with Session(model, sequences=3) as session:
        yield session


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(256) for _ in range(draw.choice((1, 4, 30, 90)))] for _ in range(count)]


def ask(session, requests, grammars=()):
    """Submit requests together, and wait until all have ended: their results or errors by index."""
    updates = queue.SimpleQueue()
    jobs = session.submit(requests, lambda job, update: updates.put((job, update)), grammars=grammars)
    ended, left = {}, {job.request.index for job in jobs}
    while left:
        job, update = updates.get(timeout=60)
        if isinstance(update, EngineError) or update.piece.finish_reason:
            left.remove(job.request.index)
            ended[job.request.index] = update if isinstance(update, EngineError) else job
    return [ended[request.index] for request in requests]


def test_requests_in_one_batch_write_what_each_writes_alone(model, session):
    texts = prompts(20)
    settings = [SETTINGS[i % len(SETTINGS)] for i in range(len(texts))]
    jobs = ask(session, model.requests(texts, settings))
    for text, sampling, job in zip(texts, settings, jobs, strict=True):
        [alone] = model.generate([text], sampling)
        got = job.request.completion()
        assert (got.text, got.tokens, got.finish_reason) == (alone.text, alone.tokens, alone.finish_reason)
        for ours, theirs in ((got.logprobs, alone.logprobs), (got.prompt_logprobs, alone.prompt_logprobs)):
            assert (ours is None) == (theirs is None)
            for one, other in zip(ours or (), theirs or (), strict=True):
                assert (one.token, list(one.top)) == (other.token, list(other.top))
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_threads_share_the_batch_and_the_engine(model, session):
    texts, found = prompts(6, seed=1), {}
    expected = [model.generate([text], SETTINGS[0])[0].text for text in texts]

    def work(i: int) -> None:
        if i % 2:
            found[i] = "".join(piece.text for piece in session.stream(texts[i], SETTINGS[0]))
        else:
            found[i] = model.generate([texts[i]], SETTINGS[0])[0].text

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[i] for i in range(len(texts))] == expected


def test_an_open_session_starves_no_call_of_the_engine(model, session):
    endless = session.stream([5], Sampling(max_new_tokens=120, ignore_eos=True))
    next(endless)
    model.generate([[7]], max_new_tokens=2, ignore_eos=True)
    assert sum(len(piece.tokens) for piece in endless) == 119


def test_a_dropped_stream_frees_its_slot(model, session):
    streams = [session.stream([i], Sampling(max_new_tokens=120, ignore_eos=True)) for i in range(3)]
    for stream in streams:
        next(stream)
    for stream in streams:
        stream.close()
    deadline = time.monotonic() + 10
    while session.batch.jobs and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(session.batch.slots.free) == 3
    assert len(list(session.stream([3], SETTINGS[0]))) == 14


def test_a_prefix_is_computed_once(model, session):
    history = list(range(10))
    for _ in range(3):  # turns of a dialogue
        [job] = ask(session, model.requests([history], SETTINGS[0]))
        assert list(job.request.tokens) == list(model.generate([history], SETTINGS[0])[0].tokens)
        before, history = len(history) + len(job.request.tokens) - 1, [*job.request.sequence, 7, 8, 9]
        [job] = ask(session, model.requests([history], SETTINGS[0]))
        assert job.reused == before
        history = job.request.sequence


def test_choices_of_one_prompt_read_it_once(model, session):
    prompt = prompts(1, seed=3)[0] * 2 + [1, 2, 3]
    jobs = ask(session, model.requests([prompt] * 3, SETTINGS[1]))
    assert sorted(job.reused for job in jobs)[1:] == [len(prompt) - 1] * 2
    assert {job.request.completion().text for job in jobs} == {model.generate([prompt], SETTINGS[1])[0].text}


def test_the_longest_unused_prefix_goes_first(model, session):
    first, second, third, fourth = ([i] * 20 for i in range(4))
    for prompt in (first, second, third, first, fourth):
        [job] = ask(session, model.requests([prompt], SETTINGS[0]))
    for prompt, kept in ((first, True), (third, True), (second, False)):
        [job] = ask(session, model.requests([prompt], SETTINGS[0]))
        assert (job.reused == 19) == kept


def test_a_long_prompt_leaves_room_for_steps_between_its_chunks(model, session, monkeypatch):
    monkeypatch.setattr("lowbit.serve.pace.Pace.rows", lambda pace: 8)
    monkeypatch.setattr("lowbit.serve.batch.BETWEEN_STEPS", 0.0)
    begun, begin = [], session.batch.begin
    monkeypatch.setattr(session.batch, "begin", lambda job: (begun.append(job.request.index), begin(job)))
    order, slow = [], list(range(100))
    first = model.request(0, [1], Sampling(max_new_tokens=60, ignore_eos=True))
    second = model.request(1, slow, SETTINGS[0])
    ended = threading.Semaphore(0)

    def tell(job, update) -> None:
        order.append(job.request.index)
        if update.piece.finish_reason:
            ended.release()

    session.submit([first, second], tell)
    assert all(ended.acquire(timeout=60) for _ in range(2))
    layers = len(model.decoder.architecture.layers)
    assert order.index(1) >= layers * 100 // 8
    assert begun == [0, 1]  # a prompt that is read in parts is looked up once
    assert second.completion().text == model.generate([slow], SETTINGS[0])[0].text


def test_a_slow_chunk_is_forgotten_where_launches_take_the_time():
    pace, sizes = Pace("cuda"), []
    assert pace.rows() == 512
    pace.note(512, 0.2)  # kernels are loaded
    for _ in range(8):
        sizes.append(pace.rows())
        pace.note(sizes[-1], 0.024 if sizes[-1] <= 512 else 0.034)
    assert sizes[0] == 512
    assert sizes[-1] == 8192
    assert Pace("cpu", 10).rows() == 16
    assert Pace("cpu", 1000).rows() == 128


def test_a_prompt_that_is_cancelled_in_the_middle_of_a_chunk_is_forgotten(model, session, monkeypatch):
    monkeypatch.setattr("lowbit.serve.batch.BETWEEN_STEPS", 0.0)
    writer = session.stream([1], Sampling(max_new_tokens=60, ignore_eos=True))
    next(writer)
    prompts_read = [list(range(100)), list(range(100, 190))]
    begun = session.submit(model.requests([prompts_read[0]], SETTINGS[0]), lambda *_: None)
    while session.batch.part is None and not begun[0].read:
        time.sleep(0.001)
    session.cancel(begun)
    [job] = ask(session, model.requests([prompts_read[1]], SETTINGS[0]))
    assert job.request.completion().text == model.generate([prompts_read[1]], SETTINGS[0])[0].text
    assert session.batch.part is None
    writer.close()


def test_clients_take_turns_and_the_queue_has_an_end(model):
    ended, done = [], threading.Semaphore(0)

    def tell(job, update) -> None:
        if update.piece.finish_reason:
            ended.append(job.client)
            done.release()

    long, short = (Sampling(max_new_tokens=count, ignore_eos=True) for count in (120, 40))
    with Session(model, sequences=2, waiting=4) as session:
        blockers = [session.stream([i], long) for i in range(2)]
        for blocker in blockers:
            next(blocker)
        for client, prompts in (("greedy", [[2], [3], [4]]), ("modest", [[5]])):
            session.submit(model.requests(prompts, short), tell, client)
        with pytest.raises(Busy, match="4 requests wait, 1 more would pass the limit of 4"):
            session.submit(model.requests([[6]], short), tell)
        session.cancel(session.batch.writing)
        assert all(done.acquire(timeout=60) for _ in range(4))
    assert sorted(ended[:2]) == ["greedy", "modest"]


def test_a_prompt_that_does_not_fit_ends_alone(model, session, monkeypatch):
    def layers(step, cache, real=model.decoder.layers):
        if step.prefix is not None and int(step.tokens[0]) == 99:
            raise torch.OutOfMemoryError("Tried to allocate 2.50 GiB. 79.1 GiB in all, of which 1.20 GiB is free.")
        return real(step, cache)

    monkeypatch.setattr(model.decoder, "layers", layers)
    good, bad = ask(session, model.requests([[1, 2], [99, 1]], SETTINGS[0]))
    assert "2.50 GiB more were asked for" in str(bad)
    assert good.request.completion().text == model.generate([[1, 2]], SETTINGS[0])[0].text


def test_after_an_error_of_ours_the_next_request_is_served(model, session, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(model.decoder, "hidden", lambda step, cache: 1 / 0)
        [failed] = ask(session, model.requests([[1, 2]], SETTINGS[0]))
    assert isinstance(failed, Failed)
    assert "ZeroDivisionError" in caplog.text
    [job] = ask(session, model.requests([[1, 2]], SETTINGS[0]))
    assert job.request.completion().text == model.generate([[1, 2]], SETTINGS[0])[0].text


def test_a_closed_session_tells_those_who_wait(model):
    session = Session(model, sequences=1)
    streams = [session.stream([i], Sampling(max_new_tokens=120, ignore_eos=True)) for i in range(2)]
    next(streams[0])
    updates = queue.SimpleQueue()
    session.submit([model.request(0, [1], SETTINGS[0])], lambda job, update: updates.put(update))
    session.close()
    assert isinstance(updates.get(timeout=10), Ended)
    with pytest.raises(Ended):
        list(streams[0])
    with pytest.raises(Ended, match="is shutting down"):
        list(streams[1])


def test_a_sequence_that_passes_the_ropes_turn_is_read_again(tmp_path):
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    model, _ = tiny(tmp_path, "phi3", rope_parameters=rope, original_max_position_embeddings=32)
    prompt = list(range(3, 23))
    sampling = Sampling(max_new_tokens=30, ignore_eos=True)
    with Session(model, sequences=2) as session:
        for text in (prompt, prompt, list(range(3, 43))):
            [job] = ask(session, model.requests([text], sampling))
            assert list(job.request.tokens) == list(model.generate([text], sampling)[0].tokens)


def test_drafts_change_no_text_and_save_steps(model):
    repeated = [5, 6, 7, 8] * 8
    sampling = Sampling(max_new_tokens=40, ignore_eos=True)
    [alone] = model.generate([repeated], sampling)
    texts = [*prompts(4, seed=7), repeated]
    settings = [sampling, replace(sampling, temperature=1.0, seed=3, logprobs=2), *[sampling] * 3]
    expected = model.generate(texts, settings)
    with Session(model, sequences=3, lookup=Lookup(4)) as session:
        pieces = list(session.stream(repeated, sampling))
        assert tuple(token for piece in pieces for token in piece.tokens) == alone.tokens
        assert len(pieces) < 40
        jobs = ask(session, model.requests(texts, settings))  # in batches that change
        assert [job.request.completion().tokens for job in jobs] == [each.tokens for each in expected]
        found = jobs[1].request.completion().logprobs
        assert [each.token for each in found] == list(expected[1].tokens)


def test_earlier_requests_are_drafted_from_where_they_are_kept(model):
    """A text that repeats nothing is written in fewer steps the second time, with a store alone."""
    sampling, [text] = Sampling(max_new_tokens=40, temperature=1.0, seed=11, ignore_eos=True), prompts(1, seed=9)
    expected, counts = model.generate([text], sampling)[0].tokens, []
    for stored in (0, 1000):
        with Session(model, sequences=2, lookup=Lookup(4, stored)) as session:
            for _ in range(2):
                pieces = list(session.stream(text, sampling))
                assert tuple(token for piece in pieces for token in piece.tokens) == expected
                counts.append(len(pieces))
    assert counts[1] == counts[0]
    assert counts[3] < 0.6 * counts[2]


class Alternating:
    """A rule that allows even tokens after odd ones and odd ones after even ones, and ends after so many."""

    def __init__(self, left, last=0):
        self.left, self.last = left, last

    def copy(self):
        return Alternating(self.left, self.last)

    def fill(self, row):
        row.fill_(0x55555555 if self.last % 2 else -0x55555556)

    def take(self, token):
        assert token % 2 != self.last % 2
        self.left, self.last = self.left - 1, token

    @property
    def ended(self):
        return not self.left


def test_drafts_obey_a_rule_and_end_with_it(model):
    texts = [[5, 6, 7, 8] * 8, *prompts(2, seed=3)]
    sampling = Sampling(max_new_tokens=60, ignore_eos=True)
    found = []
    for lookup in (0, 4):
        with Session(model, sequences=3, lookup=Lookup(lookup)) as session:
            rules = [Alternating(33), None, Alternating(7)]
            jobs = ask(session, model.requests(texts, sampling), grammars=rules)
            found.append([job.request.tokens for job in jobs])
    assert found[0] == found[1]
    assert [len(tokens) for tokens in found[0]] == [33, 60, 7]
    assert jobs[0].request.steps < 33


def test_the_rest_of_a_prompt_is_read_by_steps_where_graphs_are(model, monkeypatch):
    monkeypatch.setattr("lowbit.serve.batch.STEP_COST", 20)
    with Session(model, sequences=2) as session:
        session.batch.reader().lengths = LENGTHS  # as on a GPU; a context of 128 tokens has none longer
        history, reused = list(range(30)), []
        for new in (1, 16, 17, 40):
            history += list(range(100, 100 + new))
            [job] = ask(session, model.requests([history], replace(SETTINGS[0], max_new_tokens=2)))
            assert job.request.completion().tokens == model.generate([history], SETTINGS[0])[0].tokens[:2]
            reused.append(job.reused)
    # 40 new tokens take three steps, which cost as much as a pass of 60 tokens: fewer than the 104 of the prompt
    assert reused == [0, 31, 47, 64]


def test_short_prompts_that_wait_share_a_pass(model):
    texts = [*(list(range(at, 20 + 2 * at)) for at in range(6)), [9] * 70]
    given = model.requests(texts, [*SETTINGS, SETTINGS[0], SETTINGS[1]])
    rules = [Alternating(6), *[None] * 6]
    with Session(model, sequences=7) as session:
        reader = session.batch.reader()
        reader.lengths = LENGTHS
        ruled, *jobs = ask(session, given, rules)
        assert sorted(reader.shared) == [(64, 4), (128, 2)]  # one prompt's log-probabilities are wanted
    assert [token % 2 for token in ruled.request.tokens] == [1, 0, 1, 0, 1, 0]
    for job in jobs:
        [wanted] = model.generate([job.request.prompt], job.request.sampling)
        got = job.request.completion()
        assert (got.tokens, got.finish_reason) == (wanted.tokens, wanted.finish_reason)
        for ours, theirs in ((got.logprobs, wanted.logprobs), (got.prompt_logprobs, wanted.prompt_logprobs)):
            assert [each.token for each in ours or ()] == [each.token for each in theirs or ()]


def test_expected_graphs_are_captured_while_there_is_no_work(model, monkeypatch):
    monkeypatch.setattr("lowbit.serve.session.RESTED", 0.01)
    with Session(model, sequences=2) as session:
        first = list(session.stream([5] * 20, SETTINGS[0]))
        with session.changed:
            session.batch.cold.extend(
                (
                    Graph(128, 2, SETTINGS[1]),
                    Graph(16),
                    Graph(128, 16),
                    Graph(128, 1, Sampling()),
                    Choice(),
                    Graph(128, 1, loaded=True),
                    Graph(64, prompts=2),
                    Chunk(30),
                )
            )
            session.changed.notify()
        deadline = time.monotonic() + 10
        while session.batch.cold and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not session.batch.cold
        [job] = ask(session, model.requests([[5] * 20], SETTINGS[0]))
        assert job.request.completion().text == "".join(piece.text for piece in first)


@pytest.mark.parametrize(
    ("lengths", "writing", "most"),
    [((8, 2048), [], 2048), ((8, 2048), ["job"], 1024), ((8, 512), ["job"], 512), ((), [], 0)],
)
def test_a_pass_is_shorter_while_other_requests_write(lengths, writing, most):
    batch = SimpleNamespace(reader=lambda: SimpleNamespace(lengths=lengths), writing=writing)
    jobs = [SimpleNamespace(request=SimpleNamespace(sequence=[0] * count)) for count in (most, most + 1)]
    assert [Batch.fits_pass(batch, job) for job in jobs] == [True, False]


def test_graphs_are_expected_for_every_number_of_rows_and_both_reaches():
    cache = SimpleNamespace(batch=3, context=4096)
    reader = SimpleNamespace(cache=cache, lengths=(8, 1024, 8192), longest_shared=128, pool=(0, 0))
    found = expected(reader, (Sampling(), Sampling(temperature=1.0, top_p=0.9)))
    assert found == expected(reader, (Sampling(),))  # the second one's steps begin with that without a sampling
    runs = Counter(found)
    assert found.index(Choice()) < found.index(Chunk(512))
    assert [each.length for each in runs if isinstance(each, Chunk)] == [512, 1024, 2048, 4096]
    graphs = {graph: count for graph, count in runs.items() if isinstance(graph, Graph)}
    assert [graph.length for graph in graphs if not graph.rows and graph.prompts == 1] == [8, 1024]
    assert [(graph.length, graph.prompts) for graph in graphs if graph.prompts > 1] == [(64, 2), (128, 2)]
    assert [graph.length for graph in graphs if graph.rows == 16] == [1024, 4096]
    for sampling, powers in ((Sampling(), (1, 2, 4)), (None, (1, 2, 4, 16))):
        assert {(graph.rows, graph.length) for graph in graphs if graph.rows and graph.sampling == sampling} == {
            (rows, length) for rows in powers for length in (1024, 4096)
        }
    assert all(count == (1 if graph.loaded else 3 if graph.rows else 2) for graph, count in graphs.items())
    order = list(graphs)
    for graph in (each for each in graphs if each.loaded):
        assert order.index(graph) > order.index(Graph(graph.length, graph.rows, Sampling()))
    assert [graph.rows for graph in list(graphs)[:2]] == [1, 1]
    many = SimpleNamespace(cache=SimpleNamespace(batch=16, context=4096), lengths=(8,), longest_shared=0, pool=(0, 0))
    steps = [each for each in expected(many, (Sampling(),)) if isinstance(each, Graph) and each.rows == 16]
    assert [each.loaded for each in steps if not each.sampling] == [False] * 6  # the rest of a prompt has captured it
    assert not expected(SimpleNamespace(pool=None, cache=cache), (Sampling(),))
    mixture = SimpleNamespace(cache=cache, lengths=(), longest_shared=0, pool=(0, 0))  # prompts have no passes
    assert set(runs) - set(expected(mixture, (Sampling(),))) == {
        each for each in graphs if not each.rows or each.rows == 16
    }


def test_cold_runs_wait_until_no_request_came_for_a_while(model, monkeypatch):
    ran = []
    with Session(model, sequences=2) as session:
        monkeypatch.setattr(session.batch, "warm", lambda graph: ran.append((graph, time.monotonic())))
        ask(session, model.requests([[5] * 20], SETTINGS[0]))
        with session.changed:
            session.batch.cold.extend([Graph(8), Graph(16)])
            session.changed.notify()
        for _ in range(4):
            time.sleep(0.1)
            ask(session, model.requests([[5] * 20], SETTINGS[0]))
        assert not ran
        ended, deadline = time.monotonic(), time.monotonic() + 10
        while session.batch.cold and time.monotonic() < deadline:
            time.sleep(0.01)
    assert [graph for graph, _ in ran] == [Graph(8), Graph(16)]
    assert ran[0][1] - ended > RESTED / 2


def test_a_new_session_writes_before_it_prepares(model, monkeypatch):
    ran: list[object] = []
    monkeypatch.setattr("lowbit.serve.batch.expected", lambda reader, usual: deque([Choice()]))
    monkeypatch.setattr(Batch, "warm", lambda batch, run: ran.append(run))
    with Session(model, sequences=2) as session:
        list(session.stream([5], Sampling(max_new_tokens=1)))
        assert not ran
        time.sleep(RESTED + 0.2)
        assert ran == [Choice()]
