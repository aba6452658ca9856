"""One import name: nothing of ours answers to, or is disturbed by, a generic name such as `models`."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.house.tree import NAME, PACKAGES, ROOT, modules

SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
LOADS = """
import importlib, sys
for place in sys.argv[1:]:
    module, _, function = place.partition(":")
    getattr(importlib.import_module(module), function)
"""
IMPORTED = """
import sys, time
before, begun = set(sys.modules), time.process_time()
import lowbit
seconds = time.process_time() - begun
brought = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
print(seconds, *brought)
"""
TOP_LEVEL = {"benchmarks", "docs", "lowbit", "scripts", "tests", ".ci", ".github", *PACKAGES}
TOP_FILES = {
    ".dockerignore", ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "CITATION.cff", "CODE_OF_CONDUCT.md",
    "Dockerfile", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "SECURITY.md",
    "constraints.txt", "mkdocs.yml", "pyproject.toml", "setup.py",
}  # fmt: skip


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A directory whose folders have our folders' names, half of them packages."""
    for number, name in enumerate(PACKAGES):
        (tmp_path / name).mkdir()
        if number % 2:
            (tmp_path / name / "__init__.py").write_text("raise RuntimeError('a foreign package')")
    return tmp_path


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A run of this Python in `cwd`, with the checkout findable by the name lowbit alone."""
    path = cwd / "path"
    path.mkdir(exist_ok=True)
    (path / NAME).symlink_to(ROOT / NAME)
    command = [sys.executable, *arguments]
    environment = os.environ | {"PYTHONPATH": str(path)}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment)


def test_every_script_starts_beside_folders_of_the_same_names(foreign: Path) -> None:
    found = python("-c", LOADS, *SCRIPTS.values(), cwd=foreign)
    assert found.returncode == 0, found.stderr


def test_importing_lowbit_is_quick_and_brings_nothing_of_others(foreign: Path) -> None:
    found = python("-c", IMPORTED, cwd=foreign)
    seconds, *brought = found.stdout.split()
    assert float(seconds) < 0.3, "of the processor, so that other work on the machine does not count"
    assert brought == [NAME], "and no torch"


@pytest.mark.parametrize("name", PACKAGES)
def test_an_old_import_says_the_new_name(name: str) -> None:
    found = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert f"write {NAME}.{name} instead of {name}" in found.stderr


def test_a_wheel_holds_one_name_and_everything_below_it(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "*.so", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "..", "."]
    environment = os.environ | {"LOWBIT_CUDA": "0"}
    found = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False, env=environment)
    assert found.returncode == 0, found.stdout + found.stderr
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {NAME}
    missing = {module.file for module in modules()} - {name.removeprefix(f"{NAME}/") for name in names} - set(names)
    assert not missing
    assert {f"{NAME}/quant/kernels/csrc/bindings.cpp", f"{NAME}/py.typed"} <= set(names)


def test_links_and_setup_agree() -> None:
    assert {path.name for path in (ROOT / NAME).iterdir() if path.is_symlink()} == set(PACKAGES)
    assert all((ROOT / NAME / name).resolve() == ROOT / name for name in PACKAGES)
    tree = ast.parse((ROOT / "setup.py").read_text())
    folders = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FOLDERS"
    ]
    assert folders == [PACKAGES]


def test_every_name_at_the_top_is_known() -> None:
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("not a git checkout")
    tops = {line.partition("/")[0] for line in found.stdout.splitlines()}
    assert tops <= TOP_LEVEL | TOP_FILES
