"""The documents: the site builds without a warning, links lead somewhere, and every option explains itself."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from lowbit.commands.lowbit import COMMANDS
from tests.house.test_pairs import STEMS
from tests.house.tree import PACKAGES, ROOT

MOST_README_LINES = 120
KERNEL_HEADINGS = ["## Design", "## Figures now", "## Tried and left", "## Open questions"]
CODE = {".py", ".cu", ".cuh", ".cpp"}


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs_click")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert found.returncode == 0, found.stdout + found.stderr
    commands = (tmp_path / "site" / "reference" / "commands" / "index.html").read_text()
    assert "--group-size" in commands
    assert "eval_windows" in (tmp_path / "site" / "reference" / "python" / "index.html").read_text()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_of_pages_at_the_top_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text())
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_README_LINES


def test_every_kernel_has_its_page() -> None:
    pages = {path.stem: path.read_text().splitlines() for path in (ROOT / "docs" / "kernels").glob("*.md")}
    assert sorted(pages) == STEMS
    for stem, lines in pages.items():
        assert lines[0] == f"# {stem}"
        assert [line for line in lines if line.startswith("## ")] == KERNEL_HEADINGS, stem


def test_pages_that_the_code_cites_exist() -> None:
    files = [path for package in (*PACKAGES, "benchmarks") for path in (ROOT / package).rglob("*.*")]
    cited = {
        (str(path.relative_to(ROOT)), page)
        for path in files
        if path.suffix in CODE
        for page in re.findall(r"\bdocs/[\w./-]*\w", path.read_text())
    }
    assert cited
    assert not [(file, page) for file, page in sorted(cited) if not (ROOT / page).is_file()]
    assert not [file for file, page in sorted(cited) if page.startswith("docs/history")]  # the diary is no reference


def test_lowbit_is_installed_from_a_clone() -> None:
    """It is in no package index: a bare name would find nothing there, or another project."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "commands").rglob("*.py")]
    bare = re.compile(r"pip install [^`\n#|;]*(?<![\w.'\"/-])lowbit(?![\w\[.-])")
    assert not [(page.name, found[0]) for page in pages if (found := bare.search(page.read_text(encoding="utf-8")))]


def options_of(command: click.Command, name: str) -> list[tuple[str, click.Option]]:
    """Every option of a command and of the commands below it, with the command's name."""
    found = [(name, option) for option in command.params if isinstance(option, click.Option)]
    for below, each in getattr(command, "commands", {}).items():
        found += options_of(each, f"{name} {below}")
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name: str) -> None:
    module, attribute, _ = COMMANDS[name]
    command = getattr(importlib.import_module(f"lowbit.commands.{module}"), attribute)
    silent = [f"{where} {option.opts[0]}" for where, option in options_of(command, name) if not option.help]
    assert not silent
