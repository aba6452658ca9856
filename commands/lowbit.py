"""`lowbit COMMAND`: every command under one name. Each is also a console script of its own."""

import importlib
import sys

import click

from lowbit import __version__

# Name -> module in this folder, its click command, and a line of help. A command is imported when it is called.
COMMANDS = {
    "quantize": ("quantize", "quantize", "Quantize a model and write a checkpoint that engines load."),
    "eval": ("quantize_eval", "evaluate", "Measure a checkpoint: perplexity, divergence, tasks, text, code."),
    "generate": ("quantize_generate", "generate", "Continue a text, or chat, with lowbit's own engine."),
    "bench": ("quantize_bench", "bench", "Measure decode speed and its share of the memory's speed."),
    "convert": ("quantize_convert", "quantize_convert", "Write a quantized checkpoint in another format."),
    "inspect": ("quantize_inspect", "quantize_inspect", "Show schemes, sizes, coverage and kernels of a checkpoint."),
    "report": ("quantize_report", "report", "Write a page about a checkpoint, or compare several."),
    "push": ("push", "push", "Upload a checkpoint and its card to the hub."),
    "doctor": ("doctor", "doctor", "Show versions, GPU, kernels and optional packages of this installation."),
}


class Commands(click.Group):
    """A group that imports a command on use, and lists commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(f"lowbit.commands.{module}"), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, _, help_line) in COMMANDS.items()])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="lowbit")
def lowbit() -> None:
    """Quantize language models, measure the loss in quality, and generate text with them.

    Shell completion: eval "$(_LOWBIT_COMPLETE=bash_source lowbit)"; zsh_source and fish_source likewise.
    """


def main() -> None:
    """Entry point of the console script: calls the entry point of the named command, or shows help."""
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name in COMMANDS:
        sys.argv[:2] = [f"{sys.argv[0]} {name}"]
        importlib.import_module(f"lowbit.commands.{COMMANDS[name][0]}").main()
    lowbit()
