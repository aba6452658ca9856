"""`lowbit COMMAND`: every command under one name. Each is also a console script of its own."""

import gc
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import ModuleType
from typing import NoReturn

import click

from lowbit import __version__
from lowbit.commands import surface
from lowbit.commands.parts import SETTINGS, Named, epilog
from lowbit.export.escape import one_line
from lowbit.extras import missing

ASKS = {"--help", "-h", "--version"}
BEGUN = time.time()  # before the imports of a command

# Name -> module in this folder, its click command, and a line of help. A command is imported when it is called.
COMMANDS = {
    "quantize": ("quantize", "quantize", "Quantize a model and write a checkpoint that engines load."),
    "eval": ("quantize_eval", "evaluate", "Measure a checkpoint: perplexity, divergence, tasks, text, code."),
    "generate": ("quantize_generate", "generate", "Continue a text, or chat, with lowbit's own engine."),
    "serve": ("serve", "serve", "Serve a checkpoint to clients of the OpenAI protocol."),
    "bench": ("quantize_bench", "bench", "Measure decode speed and its share of the memory's speed."),
    "convert": ("quantize_convert", "quantize_convert", "Write a quantized checkpoint in another format."),
    "inspect": ("quantize_inspect", "quantize_inspect", "Show schemes, sizes, coverage and kernels of a checkpoint."),
    "report": ("quantize_report", "report", "Write a page about a checkpoint, or compare several."),
    "push": ("push", "push", "Upload a checkpoint and its card to the hub."),
    "doctor": ("doctor", "doctor", "Show versions, GPU, kernels and optional packages of this installation."),
}


class Commands(Named):
    """A group that lists all commands without importing any."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return None if cmd_name not in COMMANDS else surface.read(cmd_name) or command(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, _, help_line) in COMMANDS.items()])


@click.group(
    cls=Commands,
    context_settings=SETTINGS,
    epilog=epilog(
        "lowbit quantize demo --output demo-awq", "lowbit report demo-awq", "lowbit generate demo-awq --chat"
    ),
)
@click.version_option(__version__, prog_name="lowbit")
def lowbit() -> None:
    """Quantize language models, measure the loss in quality, and generate text with them.

    Shell completion: eval "$(_LOWBIT_COMPLETE=bash_source lowbit)"; zsh_source and fish_source likewise.
    """


def command(name: str) -> click.Command:
    """The command itself. Imports everything that it needs."""
    found: click.Command = getattr(imported(name), COMMANDS[name][1])
    return found


def main() -> None:
    """Entry point of the console script: calls the named command, or shows help."""
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name in COMMANDS:
        sys.argv[:2] = [f"{sys.argv[0]} {name}"]
        start(name)
    finish(lowbit)


def start(name: str) -> None:
    """Run a command. Its surface alone answers --help, --version, a misspelt option and shell completion."""
    seen = surface.read(name)
    if seen is not None:
        answer(seen)
    elif ASKS & set(sys.argv):
        with suppress(OSError):  # cache not writable: the next call is slow again
            surface.write(COMMANDS)
    imported(name).main()


def imported(name: str) -> ModuleType:
    """The module of a command. Ends with an error if a package that it needs is not installed."""
    try:
        with uncollected():
            return importlib.import_module(f"lowbit.commands.{COMMANDS[name][0]}")
    except ModuleNotFoundError as error:
        click.ClickException(one_line(str(missing(f"lowbit {name}", error)))).show()
        sys.exit(2)


@contextmanager
def uncollected() -> Iterator[None]:
    """A context without garbage collection, nor later of the objects that it leaves.

    The collector visits those of an import, 400,000 that stay, again and again: 0.5 of 2.7 s of processor time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def answer(seen: click.Command) -> None:
    """Exit if a command's surface can answer these arguments; return if they need the command itself."""
    try:
        done = seen.main(standalone_mode=False)
    except click.ClickException as error:
        vars(error)["message"] = one_line(error.message)  # usage and hints are ours, of several lines
        error.show()
        sys.exit(error.exit_code)
    if done is not None:
        sys.exit(done)


def finish(group: click.Command) -> NoReturn:
    """Let `group` answer, and exit."""
    answer(group)
    sys.exit(0)


def __getattr__(name: str) -> Callable[[], None]:
    """Entry points of the commands' own console scripts: quantize, quantize_eval and so on."""
    for each, (module, _, _) in COMMANDS.items():
        if module == name:
            return partial(start, each)
    raise AttributeError(name)
