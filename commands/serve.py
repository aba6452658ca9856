"""`lowbit serve`: a checkpoint behind the OpenAI protocol."""

import logging
from pathlib import Path

import click

from lowbit import __version__, engine
from lowbit.commands.common import REVISION, run_command, say
from lowbit.commands.parts import SETTINGS
from lowbit.errors import UsageError
from lowbit.models.devices import check_device
from lowbit.models.source import model_directory

try:
    from lowbit.serve.limits import read_keys
    from lowbit.serve.run import Options, defaults_of
    from lowbit.serve.run import serve as serve_engine
except ModuleNotFoundError as error:
    MISSING: str | None = error.name
else:
    MISSING = None


def main() -> None:
    """Entry point of the console script."""
    run_command(serve, "Stopped.")


@click.command(context_settings=SETTINGS)
@click.version_option(__version__, prog_name="lowbit")
@click.argument("checkpoint")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address; any but this machine's own needs keys.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--name", help="Name of the model for clients.  [default: the last part of CHECKPOINT]")
@click.option("--api-keys", type=click.Path(path_type=Path), help="File with one API key a line.")
@click.option("--api-key", envvar="LOWBIT_API_KEYS", help="Keys with commas between; or in LOWBIT_API_KEYS.")
@click.option(
    "--max-sequences",
    type=click.IntRange(1, 64),
    help="Requests served at a time; each has memory for --context tokens.  [default: 4, on a GPU up to 8]",
)
@click.option(
    "--queue", "waiting", type=click.IntRange(0), default=64, show_default=True, help="Most requests that wait."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")
@click.option("--context", type=int, help="Longest sequence, prompt and output.  [default: 4096, or the model's]")
@click.option("--cache", type=click.Choice(["same", "int8"]), default="same", help="Type of keys and values.")
@click.option("--head", default="dense", help="Scheme of the output head: dense or int8.")
@REVISION
@click.option("--quiet", "-q", is_flag=True, help="Log errors alone.")
def serve(
    checkpoint: str,
    host: str,
    port: int,
    name: str | None,
    api_keys: Path | None,
    api_key: str | None,
    max_sequences: int | None,
    waiting: int,
    device: str,
    context: int | None,
    cache: str,
    head: str,
    revision: str | None,
    quiet: bool,
) -> None:
    """Serve CHECKPOINT (a directory, demo, or a hub id) to clients of the OpenAI protocol."""
    if MISSING is not None:
        raise UsageError(f"lowbit serve needs {MISSING}: in a clone of lowbit, pip install '.[serve]'")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("lowbit.serve").setLevel(logging.WARNING if quiet else logging.INFO)
    keys, directory = read_keys(api_keys, api_key), model_directory(checkpoint, revision=revision)
    options = Options(
        name=name or Path(checkpoint).resolve().name,
        host=host,
        port=port,
        keys=keys,
        defaults=defaults_of(directory),
        sequences=max_sequences,
        waiting=waiting,
    )
    model = engine.load(directory, check_device(device), None, context, cache, head)
    serve_engine(model, options, say)
