"""Benchmarks of lm-evaluation-harness, with its tasks, prompts and metrics, computed by our backends.

The harness is an optional extra (`pip install "lowbit[tasks]"`), imported on first use. Unless the user allows code,
task files that run code are refused, and the templates of tasks run in Jinja's sandbox. Tests compare the results,
number by number, with the harness's own adapter for transformers.
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from functools import wraps
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from jinja2 import Template
from jinja2.sandbox import SandboxedEnvironment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lowbit.errors import CheckpointError, UsageError, nearest
from lowbit.evaluation.backend import Backend, token_log_likelihoods
from lowbit.evaluation.journal import Journal, Library
from lowbit.evaluation.perplexity import OnStep, silent
from lowbit.evaluation.task_files import YAML, Harness, require_data_alone, require_own_data
from lowbit.evaluation.text import BATCH_LOGITS, BATCH_TOKENS
from lowbit.export.limits import limited
from lowbit.export.untrusted import untrusted
from lowbit.models.chat import NBYTES, SECONDS, render_chat

LONGEST = 4096  # longest context with continuation, if the model has enough positions
MOST_WRITTEN = 256  # longest answer in tokens, unless a task sets it
STEP_BYTES, STEP_SECONDS = 16 << 30, 300  # limits for the filters of a task, and for the metrics of a question
MADE = "it is damaged, or made to stall"


class Adapter:
    """A backend with the interface of the harness; `harness_model` makes it a subclass of the harness's TemplateLM.

    Requests are scored longest first, in batches padded on the right, which causal attention does not see.
    """

    def __init__(self, backend: Backend, library: Library, on_step: OnStep) -> None:
        super().__init__()
        self.scored = backend
        self.library, self.on_step = library, on_step
        self.tokenizer = backend.source.tokenizer()
        self._device = torch.device(backend.device)
        self.max_length = min(backend.source.positions or LONGEST, LONGEST)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.scored.source.directory.name)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return render_chat(
            self.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids with the tokenizer's own special tokens, unless told otherwise or `string` already begins with
        BOS."""
        if add_special_tokens is None and self.tokenizer.bos_token and string.startswith(self.tokenizer.bos_token):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **special))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each (_, context, continuation): log-likelihood of the continuation, and whether greedy decoding gives
        it.

        A long context is cut on the left. CheckpointError if a continuation alone is too long.
        """
        tokens = [(context + answer)[-(self.max_length + 1) :] for _, context, answer in requests]
        answers = [len(answer) for _, _, answer in requests]
        if max(answers) > self.max_length:
            raise CheckpointError(f"an answer of {max(answers)} tokens: the model has positions for {self.max_length}")
        journal = self.library.journal("tasks", [self.scored], tokens=tokens, answers=answers)
        self.on_step(len(journal.rows), len(tokens))
        order = sorted((i for i in range(len(tokens)) if i not in journal.rows), key=lambda i: -len(tokens[i]))
        batches = list(self._batches(order, tokens))
        rows = [[torch.tensor(tokens[i]) for i in batch] for batch in batches]
        logits = self.scored.logits(pad_sequence(ids, batch_first=True) for ids in rows)
        for batch, ids, out in zip(batches, rows, logits, strict=True):
            for index, row, own in zip(batch, ids, out, strict=True):
                journal.add(index, _answer_row(own[: len(row)], row, answers[index]))
            self.on_step(len(journal.rows), len(tokens))
        return [(row["sum"], row["greedy"]) for row in (journal.rows[i] for i in range(len(tokens)))]

    def _batches(self, order: list[int], tokens: list[list[int]]) -> Iterable[list[int]]:
        most = min(BATCH_TOKENS, BATCH_LOGITS // self.scored.source.vocabulary)
        while order:
            count = max(most // len(tokens[order[0]]), 1)
            yield order[:count]
            order = order[count:]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, in windows without overlap, with BOS before its first token."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        owners, windows = [], []
        for index, (text,) in enumerate(request.args for request in requests):
            ids = self.tok_encode(text)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                owners.append(index)
                windows.append((None, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        for index, (total, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[index] += total
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy answer to each request, up to the first of its stop strings."""
        asked = [(text, *_greedy(settings)) for text, settings in (request.args for request in requests)]
        journal: Journal = self.library.journal("tasks-written", [self.scored], asked=asked)
        for index, (text, stops, most) in enumerate(asked):
            self.on_step(index, len(asked))
            if index not in journal.rows:
                ids = self.tok_encode(text)[-(self.max_length - most) :]
                written = self.tokenizer.decode(self.scored.generate(ids, most, stops), skip_special_tokens=True)
                journal.add(index, {"text": _until(written, stops)})
        self.on_step(len(asked), len(asked))
        return [journal.rows[index]["text"] for index in range(len(asked))]


def _answer_row(logits: Tensor, ids: Tensor, answer: int) -> dict[str, Any]:
    """Log-likelihood of the last `answer` of ids (T,), from logits (T, vocabulary), and whether all are most likely."""
    begin = len(ids) - answer
    wanted = ids[begin:].to(logits.device)
    likelihoods = token_log_likelihoods(logits[None, begin - 1 :], ids[None, begin - 1 :].to(logits.device))
    return {"sum": float(likelihoods.sum()), "greedy": bool((logits[begin - 1 : -1].argmax(-1) == wanted).all())}


def _greedy(settings: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """Stop strings and longest answer of a request. UsageError if it asks for sampling."""
    if settings.get("do_sample") and settings.get("temperature") != 0:
        raise UsageError("the task asks for sampled answers; this evaluation writes greedily, so that runs agree")
    until = settings.get("until") or []
    return tuple([until] if isinstance(until, str) else until), int(settings.get("max_gen_toks") or MOST_WRITTEN)


def _until(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text


def harness_model(backend: Backend, library: Library | None = None, on_step: OnStep = silent) -> Any:
    """`backend` as a model for lm_eval.simple_evaluate."""
    harness = import_harness()
    model = type("LowbitLM", (Adapter, harness.api.model.TemplateLM), {})
    return model(backend, library or Library(), on_step)


def import_harness() -> Any:
    """The package lm_eval. UsageError with install instructions if it is missing."""
    try:
        import lm_eval
        import lm_eval.api.metrics
        import lm_eval.api.model
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError as error:
        raise UsageError(
            f'tasks need lm-evaluation-harness, which is not here ({error}): pip install "lowbit[tasks]"'
        ) from error
    for name in ("lm_eval", "absl", "sacrebleu"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return lm_eval


class TaskList:
    """The tasks `names`: from `folder`, from the harness, or from YAML files with these paths.

    UsageError with the nearest name for an unknown task, and for a user's file that runs code if `allow_code` is False.
    """

    def __init__(self, names: Sequence[str], folder: Path | None = None, allow_code: bool = False) -> None:
        if folder is not None and not folder.is_dir():
            raise UsageError(f"{folder}: no such directory of task files")
        self.harness = import_harness()
        self._folder, self.allow_code = folder, allow_code
        gone = [name for name in names if name.endswith(YAML) and not Path(name).is_file()]
        if gone:
            raise UsageError(f"unknown task {gone[0]!r}; no such file")
        files = [Path(name) for name in names if name.endswith(YAML)] + ([folder] if folder else [])
        if not allow_code:
            metrics = frozenset(self.harness.api.registry.metric_registry.keys())
            require_data_alone(files, Harness(metrics, frozenset(_PACKAGED_DATASETS_MODULES)))
        self.manager = self._manager(include_defaults=False)
        found = self._expanded(names)
        if "" in found:  # the harness's thousands of files take seconds to read
            self.manager = self._manager(include_defaults=True)
            found = self._expanded(names)
        if "" in found:
            raise UsageError(_complaint(names[found.index("")], self.manager.all_tasks))
        if not allow_code:
            require_own_data(files, self._theirs())
        self.names = [match for matches in found for match in matches]

    def _manager(self, include_defaults: bool) -> Any:
        folder = None if self._folder is None else str(self._folder)
        with untrusted(folder or "lm_eval", "no task files that the harness can read"):
            return self.harness.tasks.TaskManager(include_path=folder, include_defaults=include_defaults)

    def _theirs(self) -> frozenset[str]:
        """The names of the harness's own tasks and groups, and of tags that have one of them."""
        home, index = Path(self.harness.__file__).parent, self.manager.task_index
        own = {name for name, entry in index.items() if entry.yaml_path and entry.yaml_path.is_relative_to(home)}
        return frozenset(own | {name for name, entry in index.items() if not entry.yaml_path and entry.tags & own})

    def _expanded(self, names: Sequence[str]) -> list[Any]:
        """The matching tasks of each name, or "" if there are none."""
        return [[name] if name.endswith(YAML) else self.manager.match_tasks([name]) or "" for name in names]


def _complaint(name: str, known: Sequence[str]) -> str:
    hint = nearest(name, known)
    return f"unknown task {name!r}; {hint if hint.startswith('did') else f'none of {len(known)} is called like it'}"


def run_tasks(
    backend: Backend,
    tasks: TaskList,
    fewshot: int | None = None,
    limit: int | None = None,
    library: Library | None = None,
    on_step: OnStep = silent,
) -> list[dict[str, Any]]:
    """One row per task and metric: task, metric, value, standard error, version, examples, few-shot examples.

    fewshot  examples before each question; None for the task's own number
    limit    most questions per task; None for all
    CheckpointError if a task's data are not available.
    """
    model, where = harness_model(backend, library, on_step), ", ".join(tasks.names)
    templates = nullcontext() if tasks.allow_code else _contained(tasks.harness, where)
    complaint = (
        "the harness could not run it; a data set that is not in the hub's cache needs the network, a local one is "
        "named in the task (dataset_path: json)"
    )
    with (
        untrusted(", ".join(tasks.names), complaint),
        templates,
        warnings.catch_warnings(),
        redirect_stderr(StringIO()),
    ):
        warnings.simplefilter("ignore")
        found: Any = tasks.harness.simple_evaluate(  # its own progress bars go nowhere, besides ours
            model,
            tasks=tasks.names,
            num_fewshot=fewshot,
            limit=limit,
            task_manager=tasks.manager,
            bootstrap_iters=1000,
            log_samples=False,
        )
    return [row for task, values in sorted(found["results"].items()) for row in _rows(task, values, found)]


class LimitedTemplate(Template):
    """A template that renders within limits."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        environment = self.environment
        assert isinstance(environment, LimitedEnvironment)
        with environment.limits():
            return super().render(*args, **kwargs)


class LimitedEnvironment(SandboxedEnvironment):
    """Jinja's sandbox: templates see data, but no Python objects. Compiling and rendering have limits.

    where  what the templates belong to, for an error's text
    """

    template_class = LimitedTemplate

    def __init__(self, where: str, **options: Any) -> None:
        super().__init__(**options)
        self._where = where

    def limits(self) -> AbstractContextManager[None]:
        """The limits of one template."""
        return limited(f"{self._where}: a template", NBYTES, SECONDS, MADE)

    def from_string(self, *args: Any, **kwargs: Any) -> Template:
        with self.limits():
            return super().from_string(*args, **kwargs)


@contextmanager
def _contained(harness: Any, where: str) -> Iterator[None]:
    """A context in which the harness renders templates in the sandbox, and its filters and metrics have a time limit,
    since the patterns in them come from the task. `where` begins an error's text."""
    theirs, kind = harness.utils.env, harness.api.task.ConfigurableTask
    ours = LimitedEnvironment(
        where, loader=theirs.loader, undefined=theirs.undefined, keep_trailing_newline=theirs.keep_trailing_newline
    )
    ours.filters |= theirs.filters
    steps = {name: getattr(kind, name) for name in ("apply_filters", "process_results")}
    harness.utils.env = ours
    for name, step in steps.items():
        setattr(kind, name, _with_limit(step, f"{where}: {name}"))
    try:
        yield
    finally:
        harness.utils.env = theirs
        for name, step in steps.items():
            setattr(kind, name, step)


def _with_limit(step: Callable[..., Any], what: str) -> Callable[..., Any]:
    @wraps(step)
    def within(*args: Any, **kwargs: Any) -> Any:
        with limited(what, STEP_BYTES, STEP_SECONDS, MADE):
            return step(*args, **kwargs)

    return within


def _rows(task: str, values: dict[str, Any], found: dict[str, Any]) -> Iterable[dict[str, Any]]:
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if metric.endswith("_stderr") or isinstance(value, str | bool) or not kind:
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        yield {
            "task": task,
            "metric": metric if kind == "none" else f"{metric} ({kind})",
            "value": round(float(value), 6),
            "stderr": None if error is None or isinstance(error, str) else round(float(error), 6),
            "examples": found.get("n-samples", {}).get(task, {}).get("effective"),
            "fewshot": found.get("n-shot", {}).get(task),
            "version": found.get("versions", {}).get(task),
        }
