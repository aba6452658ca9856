"""Helpers of the console scripts: errors as one line, aliases, sizes, quiet libraries."""

import logging
import os
import re
import signal
import sys
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any, NoReturn

import click
import torch
from huggingface_hub import constants
from huggingface_hub.utils.tqdm import enable_progress_bars
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from lowbit.calibrate import ranks
from lowbit.commands.parts import flag, value
from lowbit.errors import LowbitError
from lowbit.export.escape import one_line, visible

UNITS = {"": 1, "B": 1} | {f"{unit}B": 1000**power for power, unit in enumerate("KMGT", 1)}
UNITS |= {f"{unit}IB": 1024**power for power, unit in enumerate("KMGT", 1)}


class Terminal(Console):
    """A console for untrusted text: markup is not interpreted, control characters are shown escaped."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments to print, with control characters escaped."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def make_console(quiet: bool = False) -> Terminal:
    """The console for results. A pipe gets plain lines without folding. Only the leading rank prints."""
    if sys.stdout.isatty() and ranks.leads():
        return Terminal(quiet=quiet)
    return Terminal(width=200, soft_wrap=True, highlight=False, quiet=quiet or not ranks.leads())


def say(text: str = "", nl: bool = True, err: bool = False) -> None:
    """Print untrusted text with its control characters escaped."""
    click.echo(visible(text), nl=nl, err=err)


class Size(click.ParamType):
    """A number of bytes: 5GB, 500MB, 12GiB, 1000000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B|[KMGT]IB)?", value.strip().upper())
        if not match or not 0 < float(match[1]) < float("inf"):
            self.fail(f"{value!r} is no size; write 5GB or 500MB", param, ctx)
        return int(float(match[1]) * UNITS[match[2] or ""])


def say_loaded(expanded: Mapping[str, int], cache: str | None) -> None:
    """Say on stderr what of a checkpoint lowbit's engine does not use as it is.

    expanded  scheme -> number of its linears, which have no kernel and were dequantized
    cache     the key-value cache that the checkpoint has scales for and that is not written, or None
    """
    if cache is not None:
        say(f"the checkpoint's scales for an {cache} key-value cache are not used here", err=True)
    for scheme, count in expanded.items():
        say(f"{count} x {scheme} has no kernel here: dequantized while loading", err=True)


# Options of several commands. A name means the same in all of them.
REVISION = click.option("--revision", help="Take this branch, tag or commit of a hub id.  [default: main]")
BASELINE = click.option(
    "--baseline", help="Measure this model in the same run: a directory, a hub id, or demo.  [default: none]"
)
BASELINE_REVISION = click.option(
    "--baseline-revision", help="Take this branch, tag or commit of --baseline.  [default: main]"
)
DEVICE = value("--device", default="auto", text="Compute on this device: auto, cpu, cuda, cuda:1.")
TRUST = flag("--trust-remote-code", text="Run Python code from the model's repository.")
OVERWRITE = flag("--overwrite", text="Replace an output that is there already.")
SHARD = click.option("--max-shard-size", type=Size(), help="Write weight files of at most this size.  [default: 5GB]")
CONTEXT = click.option(
    "--context",
    type=int,
    help="Read at most this many tokens at once: prompt and output.  [default: 4096, or the model's]",
)
CACHE = value(
    "--cache",
    type=click.Choice(["auto", "same", "int8", "fp8", "int4"]),
    default="auto",
    text="Keep keys and values in this type: auto is fp8 if the checkpoint declares it, else the activations' own.",
)
DENSE_HEAD = value("--head", default="dense", text="Round the output head to this scheme: int8, or dense for none.")


def run_command(command: click.Command, interrupted: str = "Interrupted; nothing was written.") -> NoReturn:
    """Run a console script: exit 2 with a one-line error that the user can fix, 130 when interrupted."""
    if "transformers" in sys.modules:  # not in a server, nor in what writes texts
        quiet_transformers()
    if not constants.HF_HUB_DISABLE_PROGRESS_BARS:  # transformers' switch turns off those of downloads too
        enable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        command(standalone_mode=False)
    except click.ClickException as error:
        if ranks.first_to_fail():
            vars(error)["message"] = one_line(error.message)  # usage and hints are ours, of several lines
            error.show()
        sys.exit(error.exit_code)
    except LowbitError as error:
        _fail(f"Error: {error}", 2)
    except torch.OutOfMemoryError as error:
        _fail(f"Error: the GPU's memory is full ({error}); use --device cpu, or fewer --num-samples", 2)
    except ranks.Lost as error:
        _fail(f"Error: {error}", 1)
    except (click.Abort, KeyboardInterrupt) as error:
        told = error.__cause__ or error  # click raises Abort from the interrupt
        _fail(str(told) or interrupted, 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a directory that cannot be created, a file that cannot be read, a full disk
        if error.filename is None or error.strerror is None:
            raise
        _fail(f"Error: {error.filename}: {error.strerror}", 2)
    sys.exit(0)


def quiet_transformers() -> None:
    """Let transformers print errors alone, and no progress bars."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _fail(message: str, code: int) -> NoReturn:
    if ranks.first_to_fail():
        say(one_line(message), err=True)
    sys.exit(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
