"""Things that belong together: a kernel with its test and benchmark, a table's row with a test."""

import ast
import importlib
import importlib.util
from collections.abc import Mapping
from functools import cache

import pytest

from tests.house.tree import ROOT

# The tables of CONTRIBUTING.md. A row is tested by tests/**/test_<row>.py, by a test that names the row in a string, or
# by one that runs through the whole table.
TABLES = (
    ("lowbit.calibrate.methods", "METHODS"),
    ("lowbit.calibrate.transforms", "TRANSFORMS"),
    ("lowbit.calibrate.rounding", "ROUNDERS"),
    ("lowbit.export.dialects", "FORMATS"),
    ("lowbit.engine.families", "FAMILIES"),
)
KERNELS = ROOT / "quant" / "kernels"
STEMS = sorted(path.stem for path in (KERNELS / "csrc").glob("*.cu"))


@cache
def names_in_tests() -> frozenset[str]:
    """Every string, imported name and file stem of the tests outside tests/house."""
    names: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        if path.parent.name == "house":
            continue
        names.add(path.stem.removeprefix("test_"))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
            elif isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


@pytest.mark.parametrize(("module", "table"), TABLES)
def test_every_row_of_a_table_has_a_test(module: str, table: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"no {module} yet")
    rows = getattr(importlib.import_module(module), table)
    names = [str(row) if isinstance(rows, Mapping) else row.name for row in rows]
    assert names, f"{module}.{table} is empty"
    if f"{module}.{table}" in names_in_tests():
        return
    missing = [name for name in names if not {name, name.replace("-", "_")} & names_in_tests()]
    assert not missing, f"rows of {module}.{table} that no test names: {', '.join(missing)}"


@pytest.mark.skipif(not STEMS, reason="no kernels yet")
def test_a_kernel_lives_in_four_places() -> None:
    wanted = [
        path
        for stem in STEMS
        for path in (
            KERNELS / f"{stem}.py",
            ROOT / "tests" / "kernels" / f"test_{stem}.py",
            ROOT / "benchmarks" / f"bench_{stem}.py",
        )
    ]
    missing = [str(path.relative_to(ROOT)) for path in wanted if not path.exists()]
    assert not missing, f"missing beside csrc: {', '.join(missing)}"
