"""The options that name a drafter."""

import click

from lowbit.commands.parts import flag, value
from lowbit.engine.drafts.kinds import Drafter

DRAFTER = click.option(
    "--drafter",
    help="Draft tokens with this head: a directory, a hub id, or mtp for that of CHECKPOINT's own files; no text "
    "changes.  [default: none]",
)
DRAFTER_SCHEME = value(
    "--drafter-scheme",
    default="dense",
    text="Round the drafter's linears to this scheme: int8, int4-g64, or dense for none.",
)
DRAFTER_OPTIONAL = flag("--drafter-optional", text="Write without the drafter if it cannot be loaded or does not fit.")


def drafter_of(name: str | None, scheme: str, optional: bool = False) -> Drafter | None:
    """The drafter that the options name. A usage error for a scheme without a drafter."""
    if name is None and scheme != "dense":
        raise click.UsageError(f"--drafter-scheme {scheme} rounds a drafter: name one with --drafter")
    return None if name is None else Drafter(name, scheme, not optional)
