"""The files around the code: what the README says, what is pinned, and what must not be written anywhere."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.house.tree import NAME, ROOT, imports, modules

LARGEST = 4_000_000
# Spelled so that this file does not match itself.
FORBIDDEN = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|X{3})\b|(?<![\w.$}~])/(?:root|home|work|Users)/")
SOURCES = {".cu", ".cuh", ".cpp", ".h", ".md", ".toml"}
LONGEST_LINE = 120  # ruff sees to Python


@cache
def tracked() -> tuple[Path, ...]:
    """The files that git tracks; the test is skipped outside a checkout."""
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("not a git checkout")
    return tuple(ROOT / name for name in found.stdout.split("\0") if name and (ROOT / name).is_file())


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """(file:line, text) for each line of `path`; none where it is not text."""
    if path.stat().st_size > LARGEST:
        return
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        return
    for number, line in enumerate(text.splitlines(), 1):
        yield f"{path.relative_to(ROOT)}:{number}", line


def test_no_machine_path_and_nothing_left_for_later() -> None:
    found = [f"{where}: {line.strip()}" for path in tracked() for where, line in lines(path) if FORBIDDEN.search(line)]
    assert not found, "\n".join(found)


def test_lines_are_short() -> None:
    sources = [path for path in tracked() if path.suffix in SOURCES]
    found = [where for path in sources for where, line in lines(path) if len(line) > LONGEST_LINE]
    assert not found, "\n".join(found)


def test_readme_says_the_two_commands_first() -> None:
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    commands = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    assert commands[:2] == ["make demo", "make test"]


def requirements(*extras: str) -> list[Requirement]:
    """The requirements in pyproject.toml: the dependencies, and those of `extras`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [line for extra in extras for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in (*project["dependencies"], *optional)]


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    constraints = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    pins = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in constraints}
    wrong = [
        str(r)
        for r in requirements("quantize", "report", "test", "serve")
        if pins.get(canonicalize_name(r.name), "0") not in r.specifier
    ]
    assert not wrong, f"not pinned, or outside the bounds, in constraints.txt: {', '.join(wrong)}"


def test_every_import_is_declared() -> None:
    declared = {
        canonicalize_name(requirement.name)
        for requirement in requirements("quantize", "report", "test", "tasks", "serve", "vllm")
    }
    distributions = packages_distributions()
    ours = sys.stdlib_module_names | {NAME}
    found = [
        f"{module.file}:{each.line}: {name}"
        for module in modules()
        for each in imports(module.tree(), frozenset())
        if (name := each.target.split(".")[0]) not in ours
        and not {canonicalize_name(distribution) for distribution in distributions.get(name, (name,))} & declared
    ]
    assert not found, "imported, but not among the dependencies:\n" + "\n".join(found)


def test_every_promise_of_security_names_a_test_that_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    promised = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    promised += [("tests/evaluation/test_sandbox.py", name) for name in re.findall(r"`(test_\w+)`", text)]
    assert len(promised) > 30
    found = [f"{file}::{name}" for file, name in promised if f"def {name}(" not in (ROOT / file).read_text()]
    assert not found, "promised in SECURITY.md, and no test: " + ", ".join(found)
