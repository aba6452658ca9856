"""`lowbit COMMAND`: one name for every command."""

import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import pytest

from lowbit import __version__
from lowbit.commands import doctor, surface
from lowbit.commands.lowbit import COMMANDS
from lowbit.commands.quantize_options import PARTS
from tests.e2e.cli import run_lowbit, run_quantize
from tests.house.tree import ROOT

PROGRAM = "from lowbit.commands.lowbit import main; main()"


def test_help_lists_every_command_without_importing_one() -> None:
    code = f"import sys; sys.argv = ['lowbit', '--help']\ntry:\n    exec({PROGRAM!r})\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.endswith("False\n")
    for name, (_, _, line) in COMMANDS.items():
        assert f"{name} {line}" in " ".join(found.stdout.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_the_one_of_its_own_script(name: str) -> None:
    module, attribute, _ = COMMANDS[name]
    command = getattr(importlib.import_module(f"lowbit.commands.{module}"), attribute)
    found = run_lowbit(name, "--help")
    assert found.code == 0
    assert f"lowbit {name} [OPTIONS]" in found.out.splitlines()[0]
    assert command.help.split("\n")[0].split(".")[0] in " ".join(found.out.split())


def test_errors_and_exit_codes_are_those_of_the_command(tmp_path) -> None:
    ours = run_lowbit("quantize", tmp_path, "-o", tmp_path / "out")
    theirs = run_quantize(tmp_path, "-o", tmp_path / "out")
    assert (ours.code, ours.complaint) == (theirs.code, theirs.complaint)
    unknown = run_lowbit("quantise")
    assert unknown.code == 2
    assert "no command 'quantise'; did you mean 'quantize'?" in unknown.err
    assert "no command 'kl'; known: code, divergence" in run_lowbit("eval", "kl").err
    assert run_lowbit("--version").out == f"lowbit, version {__version__}\n"


def test_the_shell_completes_commands_and_options() -> None:
    def completed(words: str, index: int) -> list[str]:
        environment = {"_LOWBIT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(index)}
        code = f"import sys; sys.argv = ['lowbit']; {PROGRAM}"
        command = [sys.executable, "-c", code]
        found = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | environment
        )
        return [line.partition(",")[2] for line in found.stdout.splitlines()]

    assert completed("lowbit in", 1) == ["inspect"]
    assert completed("lowbit inspect --ch", 2) == ["--check"]


def test_the_doctor_says_what_is_here_and_what_is_not() -> None:
    found = run_lowbit("doctor", "--kernels")
    assert found.code == 0, found.err
    assert f"lowbit {__version__}, Python {sys.version.split()[0]}" in found.out
    assert "lowbit.quant._C" in found.out
    assert "gptqmodel" in found.out


@pytest.mark.parametrize("installed", [True, False])
def test_the_doctor_knows_if_vllm_finds_the_plugin(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    plugin = EntryPoint("lowbit", doctor.PLUGIN, "vllm.general_plugins")
    monkeypatch.setattr(doctor, "entry_points", lambda group: [plugin] if installed else [])
    monkeypatch.setattr(doctor, "_version", lambda package: "0.33.0" if package == "vllm" else None)
    wanted = "vllm serve DIR --quantization lowbit" if installed else "in a clone of lowbit: pip install ."
    assert wanted in str(doctor._plugin())
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    assert doctor._plugin() is None


def test_the_help_of_quantize_goes_by_part() -> None:
    text = run_lowbit("quantize", "--help").out
    places = [text.index(f"\n{part}:\n") for part in PARTS]
    assert places == sorted(places)
    shown = text[: places[1]].split()
    assert {"--method", "--scheme", "--output", "--dataset"} <= {word.strip(",") for word in shown}
    assert "Other" not in text


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory that holds the surface of every command."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    return surface.write(COMMANDS)


def walked(command: click.Command, ctx: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    yield command, ctx
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from walked(inner, inner.make_context(name, [], ctx, resilient_parsing=True))


def helps(command: click.Command) -> list[str]:
    top = command.make_context("it", [], resilient_parsing=True, terminal_width=100)
    return [found.get_help(ctx) for found, ctx in walked(command, top)]


def test_a_surface_looks_like_its_command(kept: Path) -> None:
    for name, (module, attribute, _) in COMMANDS.items():
        real = getattr(importlib.import_module(f"lowbit.commands.{module}"), attribute)
        seen = surface.read(name)
        assert seen is not None
        for shown, wanted in zip(helps(seen), helps(real), strict=True):
            assert shown.splitlines() == wanted.splitlines()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("quantize --help", "Options that people set first"),
        ("eval perplexity --help", "--protocol"),
        ("quantize --version", __version__),
        ("quantize demo --metod awq", "--method"),
        ("bench --batch many", "many"),
        ("generate", "CHECKPOINT"),
    ],
)
def test_what_needs_no_torch_imports_none(kept: Path, words: str, said: str) -> None:
    code = f"import sys; sys.argv = {['lowbit', *words.split()]!r}\n"
    code += f"try:\n    exec({PROGRAM!r})\nexcept SystemExit as end:\n    print('torch' in sys.modules, end.code)\n"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    asked = {"--help", "--version"} & set(words.split())
    assert found.stdout.endswith(f"False {0 if asked else 2}\n")
    assert said in found.stdout + found.stderr


def test_a_surface_of_other_sources_is_not_believed(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surface, "key", lambda: "another")
    assert surface.read("quantize") is None
    kept.write_text("no JSON")
    monkeypatch.undo()
    monkeypatch.setenv("LOWBIT_CACHE", str(kept.parent))
    assert surface.read("quantize") is None


def test_every_script_starts_its_command() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for script, target in scripts.items():
        module, _, name = target.partition(":")
        entry = getattr(importlib.import_module(module), name)
        assert callable(entry)
        assert script == "lowbit" or entry.args[0] in script
    with pytest.raises(AttributeError):
        importlib.import_module("lowbit.commands.lowbit").nothing  # noqa: B018
