"""Imports point one way: down the floors, and down the ground floor's own order."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.house.tree import NAME, PACKAGES, Import, Module, imports, modules

# A package imports from lower floors and from itself. calibrate and engine stand side by side.
FLOORS = {"quant": 0, "export": 1, "models": 2, "calibrate": 3, "engine": 3, "evaluation": 4, "serve": 4, "commands": 6}
FLOORS |= {"integrations": 6}  # beside commands: other programs import it, nothing of ours does
OWN = {"errors": -2, "extras": -1, "ahead": -1, "progress": -1, "arguments": -1, "api": 5}  # modules of lowbit/ itself

# On the ground floor a module imports what stands before it here ...
CHAIN = ("numbers", "scheme", "numerics", "packing", "qtensor", "kernels", "linear")
TYPES = ("numbers", "scheme")
# ... or, off the chain, what is listed for it.
BESIDE = {
    "naming": TYPES,
    "site": TYPES,
    "stats": (*TYPES, "site"),
    "recipe": TYPES,
    "algos": (*TYPES, "numerics", "packing", "qtensor", "site", "stats", "kernels.ops"),
}
GROUND = {name: CHAIN[:i] for i, name in enumerate(CHAIN)} | BESIDE

EXTENSION = "lowbit.quant._C"  # compiled, so no file of the tree
KNOWN = frozenset(module.name for module in modules()) | {EXTENSION}
INITS = frozenset(module.name for module in modules() if module.is_package)


def reason_against(importer: str, found: Import) -> str | None:
    """The reason why `importer` must not hold this import, or None."""
    if found.target.startswith("."):
        return "a relative import"
    first, *target = found.target.split(".")
    if first in ("tests", "benchmarks"):
        return f"{first} is not installed"
    if first in FLOORS:
        return f"{first} without {NAME}: the import name is {NAME}.{first}"
    if first != NAME or not target:
        return None  # another's, or lowbit.__version__
    source = importer.split(".")[1:]
    if found.in_function:
        return f"{found.target} imported inside a function"
    if found.target in INITS and is_inside(importer, found.target):
        return f"a name from the __init__ of {found.target}, from inside it"
    if not source:
        return None  # lowbit/__init__.py: test_one_name.py shows that it stays quick
    floors = FLOORS | OWN
    if source[0] != target[0]:
        if floors[source[0]] <= floors[target[0]]:
            return f"{source[0]} (floor {floors[source[0]]}) imports {target[0]} (floor {floors[target[0]]})"
        return None
    return reason_on_the_ground(source, target) if source[0] == "quant" else None


def reason_on_the_ground(source: list[str], target: list[str]) -> str | None:
    """The reason why quant's module `source` must not import its module `target`, or None."""
    if len(source) == 1:
        return "quant/__init__.py imports nothing: import quant stays cheap"
    if source[1] == target[1]:
        return None
    if target[1] == "_C":
        return None if source[1] == "kernels" else f"quant.{source[1]} reaches past quant.kernels to the extension"
    if source[1] not in GROUND:
        return f"quant.{source[1]} has no place yet: give it one in {__name__.rpartition('.')[2]}.py"
    allowed = GROUND[source[1]]
    if is_inside(".".join(target[1:]), *allowed):
        return None
    return f"quant.{source[1]} imports {'.'.join(target)}; it may import {', '.join(allowed) or 'nothing'}"


def is_inside(name: str, *packages: str) -> bool:
    """True if `name` is one of `packages` or lies below one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def offences(module: Module) -> Iterator[str]:
    for found in imports(module.tree(), KNOWN):
        if reason := reason_against(module.name, found):
            yield f"{module.file}:{found.line}: {reason}"


def test_imports_point_down() -> None:
    found = [offence for module in modules() for offence in offences(module)]
    assert not found, "\n".join(found)


def test_the_cell_needs_nothing_installed() -> None:
    """It runs in an interpreter without site-packages."""
    cell = [module for module in modules() if module.file.startswith("evaluation/cell/")]
    named = {(module.file, each.target) for module in cell for each in imports(module.tree(), KNOWN)}
    ours = f"{NAME}.evaluation.cell"
    found = [
        f"{file}: {target}"
        for file, target in sorted(named)
        if not is_inside(target, ours) and target.split(".")[0] not in sys.stdlib_module_names
    ]
    assert cell
    assert not found, "\n".join(found)


def test_no_cycles() -> None:
    inner = KNOWN - {NAME}  # lowbit/__init__.py names its modules for a type checker, and they take its version
    graph = {module.name: {found.target for found in imports(module.tree(), KNOWN)} & inner for module in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_every_package_has_a_floor() -> None:
    assert set(FLOORS) == set(PACKAGES)


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("lowbit.quant.numbers", "from lowbit.quant.scheme import Scheme"),
        ("lowbit.quant.numbers", "import lowbit.quant.scheme"),
        ("lowbit.quant.numbers", "import torch\nimport quant.numerics"),
        ("lowbit.quant.numerics", "from lowbit.quant import SOMETHING"),
        ("lowbit.quant.algos.awq", "from lowbit.quant.kernels.registry import KERNELS"),
        ("lowbit.quant.linear", "import lowbit.quant._C"),
        ("lowbit.quant.somewhere", "from lowbit.quant.scheme import Scheme"),
        ("lowbit.quant", "from lowbit.quant.scheme import Scheme"),
        ("lowbit.quant.scheme", "from lowbit.export.checkpoint import Checkpoint"),
        ("lowbit.calibrate.walk", "from lowbit.engine.loader import load"),
        ("lowbit.engine.loader", "from lowbit import calibrate"),
        ("lowbit.models.skeleton", "import importlib\nimportlib.import_module('lowbit.commands.quantize')"),
        ("lowbit.evaluation.perplexity", "def f():\n    from lowbit.quant.scheme import Scheme"),
        ("lowbit.evaluation.perplexity", "from .report import line"),
        ("lowbit.commands.quantize", "from tests.house import tree"),
    ],
)
def test_a_wrong_import_is_seen(importer: str, line: str) -> None:
    found = imports(ast.parse(line), KNOWN)
    assert [reason for each in found if (reason := reason_against(importer, each))]


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("lowbit.quant.qtensor", "from lowbit.quant import numerics"),
        ("lowbit.quant.algos.awq", "from lowbit.quant.kernels.ops import linear"),
        ("lowbit.quant.kernels.w4a16_gemv", "from lowbit.quant import _C"),
        ("lowbit.quant.linear", "from lowbit.quant.kernels.registry import KERNELS"),
        ("lowbit.commands.quantize", "from lowbit import __version__"),
        ("lowbit.evaluation.perplexity", "def f():\n    import datasets"),
    ],
)
def test_a_right_import_passes(importer: str, line: str) -> None:
    assert all(reason_against(importer, each) is None for each in imports(ast.parse(line), KNOWN))
