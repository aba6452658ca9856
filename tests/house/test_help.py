"""Help of every command: options in parts, sentences, a default for each, one meaning for a name, and examples."""

import importlib
import re
import shlex
from collections import defaultdict
from collections.abc import Iterator

import click
import pytest

from lowbit.calibrate.methods import METHODS
from lowbit.commands.lowbit import COMMANDS, lowbit
from lowbit.commands.parts import LAST
from tests.e2e.cli import run_quantize

MOST_IN_A_PART = 10
# The imperative that begins an option's sentence. A new one belongs here.
VERBS = re.compile(
    r"(?:Accept|Answer|Apply|Ask|Avoid|Begin|Calibrate|Call|Choose|Commit|Compute|Continue|"
    r"Cut|Damp|Decode|Divide|Draft|Drop|Find|Ignore|Keep|Learn|Leave|List|Listen|Make|"
    r"Measure|Move|Name|Print|Quantize|Read|Replace|Reuse|Round|Run|Sample|Score|Search|"
    r"Seed|Serve|Share|Show|Solve|Spend|Stop|Store|Subtract|Take|Time|Tune|Upload|Use|"
    r"Write"
    r") "
)
DEFAULT = re.compile(r"\s*\[(?:default|required|x).*\]$")


def command_of(name: str) -> click.Command:
    module, attribute, _ = COMMANDS[name]
    found: click.Command = getattr(importlib.import_module(f"lowbit.commands.{module}"), attribute)
    return found


def below(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """A command and those below it, by their names."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from below(inner, (*path, name))


COMMANDS_BY_PATH = dict(found for name in COMMANDS for found in below(command_of(name), (name,)))


def options_of(command: click.Command) -> Iterator[tuple[click.Option, str]]:
    """The options of a command, with their help as it is shown."""
    context = command.make_context("x", [], resilient_parsing=True)
    for option in command.params:
        record = option.get_help_record(context) if isinstance(option, click.Option) else None
        if record is not None:
            yield option, record[1]


OPTIONS = [
    (" ".join((*path, option.opts[0])), option, text)
    for path, command in COMMANDS_BY_PATH.items()
    for option, text in options_of(command)
]


def test_every_option_is_a_sentence_that_says_what_to_do() -> None:
    wrong = [
        f"{where}: {text}"
        for where, _, text in OPTIONS
        if not VERBS.match(text) or not DEFAULT.sub("", text).endswith(".")
    ]
    assert not wrong, "\n".join(wrong)


def test_every_option_shows_its_default() -> None:
    told = ("[default: ", "[required]")
    silent = [where for where, option, text in OPTIONS if not option.is_flag and not any(word in text for word in told)]
    assert not silent


def test_a_name_means_the_same_in_every_command() -> None:
    meanings: dict[str, dict[str, str]] = defaultdict(dict)
    for where, _, text in OPTIONS:
        path, _, name = where.rpartition(" ")
        meanings[name][path] = re.split(r"[.:;,]", text)[0]
    different = {name: found for name, found in meanings.items() if len(set(found.values())) > 1}
    assert not different
    assert len(meanings["--revision"]) > 5


@pytest.mark.parametrize("path", COMMANDS_BY_PATH, ids=" ".join)
def test_options_stand_in_small_parts(path: tuple[str, ...]) -> None:
    command = COMMANDS_BY_PATH[path]
    if isinstance(command, click.Group):
        return
    parts: dict[str, list[str]] = defaultdict(list)
    for option, _ in options_of(command):
        parts[getattr(option, "part", "")].append(option.opts[0])
    assert {"--version"} <= set(parts.pop(LAST)) <= {"--version", "--list-methods"}
    assert "" not in parts
    assert max(map(len, parts.values())) <= MOST_IN_A_PART


@pytest.mark.parametrize("path", [(), *COMMANDS_BY_PATH], ids=" ".join)
def test_examples_end_the_help_and_can_be_typed(path: tuple[str, ...]) -> None:
    command = COMMANDS_BY_PATH[path] if path else lowbit
    shown = command.get_help(command.make_context("x", [], resilient_parsing=True, terminal_width=200))
    heading, *examples = shown[shown.index("Examples:") :].splitlines()
    assert heading == "Examples:"
    assert examples
    for example in examples:
        words = shlex.split(example.rpartition("| ")[2])
        assert words[: len(path) + 1] == ["lowbit", *path]
        found, rest = lowbit, words[1:]
        while isinstance(found, click.Group):
            found = command_of(rest[0]) if found is lowbit else found.commands[rest[0]]
            rest = rest[1:]
        found.make_context("x", rest)


def test_the_list_of_methods_fits_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = run_quantize("--list-methods").out
    assert max(map(len, text.splitlines())) <= 80
    assert re.findall(r"^(\w+):$", text, re.M) == list(METHODS)
    for method in METHODS.values():
        found = text[text.index(f"{method.name}:\n") :]
        for word, told in (("does", method.summary), ("costs", method.cost), ("use it", method.use)):
            assert re.search(rf"^ +{word} +{re.escape(told.split()[0])}", found, re.M)
    columns = {match.start(1) for match in re.finditer(r"^ +(?:does|costs|use it) +(\S)", text, re.M)}
    assert len({column - text.rfind("\n", 0, column) for column in columns}) == 1
