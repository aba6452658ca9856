"""`lowbit push DIR NAME/MODEL`: a checkpoint on the hub."""

from pathlib import Path

import click

from lowbit.api import pushing as api
from lowbit.api.shared import Note
from lowbit.commands.common import run_command, say
from lowbit.commands.parts import FIRST, Parts, by_part, flag, frame
from lowbit.export.escape import one_line


def main() -> None:
    """Entry point of `lowbit push`."""
    run_command(push, "Interrupted; finished uploads are kept, and the same command resumes.")


PARTS: Parts = {
    FIRST: (
        flag("--public", text="Make a new repository public.  [default: private]"),
        click.option("--message", help="Commit with this message.  [default: the version of lowbit]"),
        flag("--dry-run", text="Show the work without doing it: the files, before any is uploaded."),
    ),
}


@click.command(**frame("lowbit push demo-awq me/demo-awq --dry-run", "lowbit push demo-awq me/demo-awq --public"))
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("repo", metavar="NAME/MODEL")
@by_part(PARTS)
def push(checkpoint: Path, repo: str, public: bool, message: str | None, dry_run: bool) -> None:
    """Upload the directory CHECKPOINT, with its card, to the repository NAME/MODEL of the hub.

    A missing repository is created, as private. The same command resumes an interrupted upload.
    """
    done = api.push(checkpoint, repo, private=not public, message=message, dry_run=dry_run, progress=tell)
    if dry_run:
        for name, size in done.files.items():
            say(f"{size:>15,}  {name}")
    say(describe_pushed(done))


def tell(note: Note) -> None:
    """Print a note of an upload."""
    say(f"{'Warning' if note.warning else 'note'}: {one_line(note.text)}", err=True)


def describe_pushed(done: api.Pushed) -> str:
    """A line on what was uploaded, or would be."""
    kind = f"{'private' if done.private else 'public'}{', new' if done.created else ''}"
    size = f"{len(done.files)} files, {sum(done.files.values()) / 1e6:.1f} MB"
    return f"{done.url} ({kind}): {size}" + (f", commit {done.commit[:12]}" if done.commit else ", not uploaded")
