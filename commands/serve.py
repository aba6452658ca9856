"""`lowbit serve`: a checkpoint behind the OpenAI protocol."""

import logging
from pathlib import Path

import click

from lowbit import engine
from lowbit.commands.common import CACHE, CONTEXT, DENSE_HEAD, DEVICE, REVISION, run_command, say, say_loaded
from lowbit.commands.drafters import DRAFTER, DRAFTER_OPTIONAL, DRAFTER_SCHEME, drafter_of
from lowbit.commands.lowbit import BEGUN
from lowbit.commands.parts import FIRST, Parts, by_part, flag, frame, value
from lowbit.errors import UsageError
from lowbit.extras import missing
from lowbit.models.files import model_directory
from lowbit.progress import Stages, Step, tell, watched_by

try:
    from lowbit.serve.drafts import Lookup
    from lowbit.serve.limits import read_keys
    from lowbit.serve.run import Options, defaults_of, listen
    from lowbit.serve.run import serve as serve_engine
except ModuleNotFoundError as error:
    MISSING: UsageError | None = missing("lowbit serve", error)
else:
    MISSING = None

LOG = logging.getLogger("lowbit.serve")


def main() -> None:
    """Entry point of the console script."""
    run_command(serve, "Stopped.")


PARTS: Parts = {
    FIRST: (
        value("--host", default="127.0.0.1", text="Listen at this address; any but this machine's own needs keys."),
        value("--port", type=click.IntRange(0, 65535), default=8000, text="Listen at this port; 0 takes a free one."),
        click.option("--name", help="Call the model so for clients.  [default: the last part of CHECKPOINT]"),
        click.option(
            "--api-keys",
            type=click.Path(path_type=Path),
            help="Read API keys from this file, one a line.  [default: none]",
        ),
        click.option(
            "--api-key",
            envvar="LOWBIT_API_KEYS",
            help="Accept these API keys, with commas between; LOWBIT_API_KEYS names them too.  [default: none]",
        ),
    ),
    "Load": (
        click.option(
            "--max-sequences",
            type=click.IntRange(1, 64),
            help="Serve this many requests at a time; each has memory for --context tokens.  "
            "[default: 4, on a GPU up to 8]",
        ),
        value(
            "--queue", "waiting", type=click.IntRange(0), default=64, text="Keep at most this many requests waiting."
        ),
        value(
            "--lookup",
            type=click.IntRange(0, 7),
            default=0,
            text="Draft up to this many tokens a step from the text so far, while at most 4 requests write.",
        ),
        value(
            "--lookup-store",
            type=click.IntRange(0),
            default=0,
            text="Keep this many tokens of earlier requests to draft from, some 150 bytes each; the time of an answer "
            "may then tell that a text occurred before.",
        ),
        DRAFTER,
        DRAFTER_SCHEME,
        DRAFTER_OPTIONAL,
    ),
    "Engine": (DEVICE, CONTEXT, CACHE, DENSE_HEAD, REVISION),
    "Output on the screen": (flag("--quiet", "-q", text="Print warnings and errors alone."),),
}


@click.command(
    **frame(
        "lowbit serve demo-awq", "lowbit serve demo-awq --host 0.0.0.0 --port 80 --api-keys keys.txt --context 8192"
    )
)
@click.argument("checkpoint")
@by_part(PARTS)
def serve(
    checkpoint: str,
    host: str,
    port: int,
    name: str | None,
    api_keys: Path | None,
    api_key: str | None,
    max_sequences: int | None,
    waiting: int,
    lookup: int,
    lookup_store: int,
    drafter: str | None,
    drafter_scheme: str,
    drafter_optional: bool,
    device: str,
    context: int | None,
    cache: str,
    head: str,
    revision: str | None,
    quiet: bool,
) -> None:
    """Serve CHECKPOINT (a directory, demo, or a hub id) to clients of the OpenAI protocol."""
    if MISSING is not None:
        raise MISSING
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    LOG.setLevel(logging.WARNING if quiet else logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns of bad requests: any client could fill a log
    if lookup and drafter is not None:
        raise UsageError(f"--lookup {lookup} and --drafter {drafter}: drafts come from one of them")
    if lookup_store and not lookup:
        raise UsageError(
            f"--lookup-store {lookup_store} keeps texts to draft from: say how many tokens with --lookup 7"
        )
    keys = read_keys(api_keys, api_key)
    drafts = drafter_of(drafter, drafter_scheme, drafter_optional)
    stages = Stages("imports", BEGUN)

    def ready(line: str) -> None:
        LOG.info("ready after %s", stages)
        say(line)

    with watched_by(stages), listen(host, port, keys) as listening:  # before the model is loaded, which takes a while
        tell(Step("files", 0, None))
        directory = model_directory(checkpoint, revision=revision)
        options = Options(
            name=name or Path(checkpoint).resolve().name,
            host=host,
            port=port,
            keys=keys,
            defaults=defaults_of(directory),
            sequences=max_sequences,
            waiting=waiting,
            lookup=Lookup(lookup, lookup_store),
        )
        model = engine.load(directory, device, None, context, cache, head, drafter=drafts)
        say_loaded(model.decoder.weights.expanded, model.decoder.weights.unused_cache)
        serve_engine(model, options, listening, ready)
