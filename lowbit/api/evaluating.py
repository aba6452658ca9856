"""`lowbit.perplexity`, `lowbit.divergence` and `lowbit.evaluate`: the cost of a checkpoint, as values."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from lowbit.api.session import Scored, Setup, TextSetup, make_session, split_text
from lowbit.calibrate.documents import Reading
from lowbit.errors import UsageError
from lowbit.evaluation.code import pass_at_1, read_problems, solve
from lowbit.evaluation.divergence import Divergence, require_comparable
from lowbit.evaluation.divergence import divergence as compare_distributions
from lowbit.evaluation.generate import PROMPTS, TOKENS, Prompt, texts_row
from lowbit.evaluation.generate import continuations as write_on
from lowbit.evaluation.perplexity import Score, difference
from lowbit.evaluation.perplexity import perplexity as score_text
from lowbit.evaluation.sandbox import Limits, require_containment
from lowbit.evaluation.tasks import TaskList, run_tasks
from lowbit.evaluation.text import cut, require_same_tokens

Row = dict[str, Any]


@dataclass(frozen=True)
class Perplexity:
    """A score on a text, and the baseline's on the same tokens.

    row  all of it as JSON values
    """

    score: Score
    baseline: Score | None
    row: Row

    @property
    def value(self) -> float:
        """The checkpoint's perplexity."""
        return self.score.perplexity

    @property
    def loss(self) -> float | None:
        """The paired difference from the baseline in nats a token; None without a baseline."""
        return None if self.baseline is None else difference(self.score, self.baseline)[0]


@dataclass(frozen=True)
class Compared:
    """The divergence of two models, with all of it as JSON values in `row`."""

    divergence: Divergence
    row: Row


def perplexity(
    checkpoint: str | Path, *, baseline: str | Path | None = None, **options: Unpack[TextSetup]
) -> Perplexity:
    """Perplexity of a model, quantized or not, on a text.

    >>> import lowbit
    >>> found = lowbit.perplexity("my-model", context=64, windows=2, keep=False)
    >>> found.score.tokens
    126

    baseline  a second model, scored on the same tokens
    options   the keywords of Setup and TextSetup

    Raises UsageError for bad arguments, CheckpointError for a model, DatasetError for a text that cannot be used.
    """
    text, setup = split_text(dict(options))
    session, protocol = make_session(checkpoint, baseline, setup), text.cut_by()
    sources = [session.source(name) for name in session.models()]
    content, read = text.read(sources[0])
    cuts = [cut(content, source, protocol) for source in sources]
    session.note_text(cuts[0], read)
    for source, its_cut in zip(sources[1:], cuts[1:], strict=True):
        require_same_tokens(sources[0], source, cuts[0], its_cut)
    scores = []
    for source, its_cut in zip(sources, cuts, strict=True):
        backend = session.open(source)
        with session.watched(backend) as on_step:
            scores.append(score_text(backend, its_cut, session.library, on_step))
        session.progress(Scored(scores[-1]))
    row = session.finish({"evaluation": "perplexity", "text": text.text} | _rows_of(read) | _score_row(scores))
    return Perplexity(scores[0], scores[1] if baseline is not None else None, row)


def divergence(checkpoint: str | Path, *, baseline: str | Path, **options: Unpack[TextSetup]) -> Compared:
    """Kullback-Leibler divergence of a model's distributions from those of `baseline`, token by token.

    >>> import lowbit
    >>> done = lowbit.quantize("my-model", "my-model-int8", method="int8", eval_windows=0)
    >>> found = lowbit.divergence("my-model-int8", baseline="my-model", context=64, windows=2, keep=False)
    >>> 0 < found.divergence.mean < 0.1
    True

    options  the keywords of Setup and TextSetup

    Raises UsageError for bad arguments, CheckpointError for models that do not share a tokenization.
    """
    text, setup = split_text(dict(options))
    session, protocol = make_session(checkpoint, baseline, setup), text.cut_by()
    ours, theirs = (session.open(session.source(name), together=2) for name in session.models())
    content, read = text.read(ours.source)
    cuts = [cut(content, backend.source, protocol) for backend in (ours, theirs)]
    session.note_text(cuts[0], read)
    require_comparable(ours, theirs, *cuts)
    with session.watched(ours, theirs) as on_step:
        found = compare_distributions(ours, theirs, cuts[0], session.library, on_step)
    scores = [found.quantized, found.baseline]
    for score in scores:
        session.progress(Scored(score))
    row = {"evaluation": "divergence", "text": text.text} | _rows_of(read) | _score_row(scores) | found.as_json()
    return Compared(found, session.finish(row))


def evaluate(
    checkpoint: str | Path,
    *,
    tasks: Sequence[str],
    baseline: str | Path | None = None,
    include: str | Path | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
    allow_code: bool = False,
    **options: Unpack[Setup],
) -> list[Row]:
    """A row for each task and metric of lm-evaluation-harness.

    >>> import lowbit
    >>> lowbit.evaluate("my-model", tasks=["arc_esay"])
    Traceback (most recent call last):
        ...
    lowbit.errors.UsageError: unknown task 'arc_esay'; did you mean 'arc_easy'?

    tasks       names, patterns or YAML files
    include     a directory with task files
    fewshot     examples before a question; default: the task's own number
    limit       questions per task; default: all
    allow_code  run the Python code in task files
    options     the keywords of Setup

    Raises UsageError if the harness or a task is missing, CheckpointError if a task cannot be run.
    """
    session = make_session(checkpoint, baseline, dict(options))
    known = TaskList(list(tasks), None if include is None else Path(include), allow_code)
    found: list[list[Row]] = []
    for name in session.models():
        backend = session.open(session.source(name))
        with session.watched(backend) as on_step:
            rows = run_tasks(backend, known, fewshot, limit, session.library, on_step)
        found.append([{"evaluation": "task", "model": name, "backend": backend.name} | row for row in rows])
    rows = found[0]
    if len(found) == 2:
        rows = [row | {"baseline": other} for row, other in zip(*found, strict=True)]
    session.finish({}, rows)
    return rows


def continuations(
    checkpoint: str | Path,
    *,
    prompts: Sequence[Prompt] = (),
    tokens: int = TOKENS,
    baseline: str | Path | None = None,
    **options: Unpack[Setup],
) -> Row:
    """One row with the greedy continuations of `prompts`, by the checkpoint and by the baseline."""
    session = make_session(checkpoint, baseline, dict(options))
    asked = list(prompts) or [Prompt(text) for text in PROMPTS]
    sources = [session.source(name) for name in session.models()]
    written = []
    for source in sources:
        backend = session.open(source)
        with session.watched(backend) as on_step:
            written.append(write_on(backend, asked, tokens, session.library, on_step))
    tokenizers = [source.tokenizer() for source in sources]
    row = {"model": session.checkpoint} | texts_row(asked, written, tokenizers, tokens)
    if session.baseline:
        row["baseline"] = {"model": session.baseline}
    return session.finish(row)


def programs(
    checkpoint: str | Path,
    *,
    problems: str | Path,
    allow_code: bool = False,
    tokens: int = 512,
    limits: Limits | None = None,
    limit: int | None = None,
    baseline: str | Path | None = None,
    **options: Unpack[Setup],
) -> Row:
    """pass@1 on programming problems in HumanEval's layout, as a row.

    allow_code  must be True: programs that the model writes run on this machine, in the sandbox of SECURITY.md
    tokens      longest answer
    limits      seconds and bytes of a program; default: 10 s and 1 GB
    limit       number of problems; default: all
    """
    if not allow_code:
        raise UsageError(
            "this runs programs that a model writes, behind walls (SECURITY.md says what they hold); pass --allow-code "
            "if you want that"
        )
    session = make_session(checkpoint, baseline, dict(options))
    known = read_problems(Path(problems))[:limit]
    session.note(f"programs run behind {', '.join(require_containment())}")
    found = []
    for name in session.models():
        backend = session.open(session.source(name))
        with session.watched(backend) as on_step:
            rows = solve(backend, known, tokens, limits or Limits(10, 10**9), session.library, on_step)
        found.append({"model": name, "pass_at_1": round(pass_at_1(rows), 6), "rows": rows})
    digest = hashlib.sha256(json.dumps([vars(problem) for problem in known]).encode()).hexdigest()
    row = {"evaluation": "code", "problems": str(problems), "problems_sha256": digest} | found[0]
    if len(found) == 2:
        row["baseline"] = found[1]
    return session.finish(row)


def _score_row(scores: list[Score]) -> Row:
    """The row of one score, or of a score and its baseline's."""
    row = scores[0].as_json()
    if len(scores) == 2:
        delta, error = difference(*scores)
        row |= {
            "baseline": scores[1].as_json(),
            "delta_nll": round(delta, 6),
            "delta_nll_se": None if error is None else round(error, 6),
        }
    return row


def _rows_of(read: Reading | None) -> dict[str, int]:
    """Counts of table rows that were read and skipped; empty for plain text."""
    return {"text_rows": read.rows - len(read.skipped), "text_rows_skipped": len(read.skipped)} if read else {}
