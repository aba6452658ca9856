"""pass@1 on programming problems: the share of generated functions that pass their tests.

Problems are JSON lines in HumanEval's layout (Chen et al. 2021, section 2): a prompt that ends in a function's
signature and docstring, tests that define check(candidate), and the function's name. The model completes the prompt
once, greedily; its text is cut at the end of the function. The program runs in one process and its tests in another.
The test process calls the function and compares plain values (numbers, texts, bytes, lists, tuples, sets, dictionaries,
ranges; an iterator as the values it yields).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError, DatasetError
from lowbit.evaluation.backend import Backend
from lowbit.evaluation.journal import Library
from lowbit.evaluation.perplexity import OnStep, silent
from lowbit.evaluation.sandbox import Limits, Program, run_program
from lowbit.export.files import read_text
from lowbit.export.plain import parse_json

FIELDS = ("task_id", "prompt", "entry_point", "test")
# A line at the margin ends the function: the stop strings of Chen et al., and a Markdown fence.
MARGIN = re.compile(r"^(?:class |def |#|if |print|@|assert |import |from |```)", re.MULTILINE)


@dataclass(frozen=True)
class CodeProblem:
    """One problem; `entry_point` is the function that the tests call."""

    task_id: str
    prompt: str
    entry_point: str
    test: str

    def program(self, completion: str) -> Program:
        """The prompt with its completion, and the tests that a correct one passes."""
        tests = f"{self.test}\n\ncheck({self.entry_point})\n"
        return Program(self.prompt + completion, self.entry_point, tests, self._helpers())

    def _helpers(self) -> str:
        """The part of the prompt before the function: imports, and functions that tests may call too."""
        heads = list(re.finditer(rf"^(?:@.*\n)*(?:async )?def {self.entry_point}\b", self.prompt, re.MULTILINE))
        return self.prompt[: heads[-1].start()] if heads else ""


def read_problems(path: Path) -> list[CodeProblem]:
    """The problems in a .jsonl file. DatasetError names the line and the missing fields."""
    try:
        lines = read_text(path).splitlines()
    except (FileNotFoundError, CheckpointError) as error:
        raise DatasetError(f"{error}; problems are a UTF-8 .jsonl file in HumanEval's layout") from error
    problems = [_parsed(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not problems:
        raise DatasetError(f"{path}: no problem in it")
    return problems


def _parsed(where: str, line: str) -> CodeProblem:
    try:
        row = parse_json(line.encode("utf-8", "surrogatepass"), where)
    except CheckpointError as error:
        raise DatasetError(str(error)) from error
    lacking = [name for name in FIELDS if not isinstance(row, dict) or not isinstance(row.get(name), str)]
    if lacking:
        raise DatasetError(f"{where}: no text called {', '.join(lacking)}; HumanEval's layout has {', '.join(FIELDS)}")
    if not row["entry_point"].isidentifier():
        raise DatasetError(f"{where}: entry_point {row['entry_point']!r} is no function's name")
    return CodeProblem(*(row[name] for name in FIELDS))


def function_body(text: str) -> str:
    """`text` up to the first line at the margin that cannot belong to the function."""
    found = MARGIN.search(text)
    return text[: found.start()] if found else text


def solve(
    backend: Backend,
    problems: Sequence[CodeProblem],
    tokens: int,
    limits: Limits,
    library: Library | None = None,
    on_step: OnStep = silent,
) -> list[dict[str, Any]]:
    """One row per problem: task_id, passed, the reason if it failed, and the completion.

    tokens   longest completion
    limits   of each program
    library  cache of finished problems
    """
    facts = {"problems": [vars(problem) for problem in problems], "tokens": tokens, "limits": vars(limits)}
    journal = (library or Library()).journal("programs", [backend], **facts)
    tokenizer = backend.source.tokenizer()
    for index, problem in enumerate(problems):
        on_step(index, len(problems))
        if index in journal.rows:
            continue
        ids = backend.generate(list(tokenizer(problem.prompt).input_ids), tokens)
        completion = function_body(tokenizer.decode(ids, skip_special_tokens=True))
        outcome = run_program(problem.program(completion), limits)
        row = {"task_id": problem.task_id, "passed": outcome.passed, "reason": outcome.reason}
        journal.add(index, row | {"completion": completion})
    on_step(len(problems), len(problems))
    return [journal.rows[index] for index in range(len(problems))]


def pass_at_1(rows: Sequence[dict[str, Any]]) -> float:
    """Share of problems whose completion passes."""
    return sum(row["passed"] for row in rows) / len(rows)
