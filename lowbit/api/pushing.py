"""`lowbit.push`: a checkpoint and its card in a repository of the hub."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import metadata_load
from huggingface_hub.errors import RepositoryNotFoundError
from yaml import YAMLError

from lowbit import __version__
from lowbit.api.shared import Note, ignore
from lowbit.arguments import typed
from lowbit.errors import CheckpointError
from lowbit.evaluation.report.card import CARD, name_card
from lowbit.export.checkpoint import SUMS_NAME, open_checkpoint, refresh_sums, verify_checksums
from lowbit.export.files import survey
from lowbit.models.hub import require_account, uploading


@dataclass(frozen=True)
class Pushed:
    """A checkpoint on the hub.

    repo, url  the repository's id, and its page
    files      bytes of each file, by name
    private    True if the repository is not public
    created    True if the repository did not exist before
    commit     of the repository afterwards; None after a dry run
    """

    repo: str
    url: str
    files: dict[str, int]
    private: bool
    created: bool
    commit: str | None


@typed()
def push(
    checkpoint: str | Path,
    repo: str,
    *,
    private: bool = True,
    message: str | None = None,
    dry_run: bool = False,
    progress: Callable[[Note], None] = ignore,
) -> Pushed:
    """Upload the quantized checkpoint in the directory `checkpoint` to `repo` on the hub, its card included.

    >>> import lowbit
    >>> lowbit.push("my-model", "me/my-model")
    Traceback (most recent call last):
        ...
    lowbit.errors.CheckpointError: my-model: not quantized; only quantized checkpoints are uploaded

    repo      id NAME/MODEL; created if it does not exist
    private   visibility of a new repository; that of an existing one does not change
    message   commit message
    dry_run   check with the hub, but upload nothing
    progress  called with each Note

    Files that an interrupted upload has finished are not sent again. Raises UsageError without an account that can
    write to `repo`, CheckpointError for a damaged checkpoint, or if the hub refuses.
    """
    directory = Path(checkpoint)
    files = _whole(directory, None if dry_run else repo)
    require_account(repo)
    for lack in _lacks(directory):
        progress(Note(lack, warning=True))
    with uploading(repo) as api:
        try:
            created, private = False, bool(api.model_info(repo).private)
        except RepositoryNotFoundError:
            created = True
        commit, url = None, f"{api.endpoint}/{repo}"
        if not dry_run:
            progress(Note(f"uploading {len(files)} files, {sum(files.values()) / 1e6:.1f} MB, to {url}"))
            api.create_repo(repo, private=private, exist_ok=True)
            told = message or f"Upload a checkpoint of lowbit {__version__}"
            commit = api.upload_folder(
                repo_id=repo, folder_path=directory, commit_message=told, allow_patterns=list(files)
            ).oid
    return Pushed(repo, url, files, private, created, commit)


def _whole(directory: Path, repo: str | None) -> dict[str, int]:
    """Bytes of each file of a quantized checkpoint with verified weights.

    repo  its repository, which the card's commands get, and checksums of edited papers are updated; None to write
          nothing
    """
    opened = open_checkpoint(directory)
    if opened.quantization is None:
        raise CheckpointError(f"{directory}: not quantized; only quantized checkpoints are uploaded")
    verify_checksums(opened)
    if repo is not None:
        name_card(directory, repo)
        weights = {entry.path.name for entry in opened.entries.values()}
        refresh_sums(directory, opened.files.keys() - weights - {SUMS_NAME})
    return {name: identity.size for name, identity in survey(directory).items()}


def _lacks(directory: Path) -> list[str]:
    """Sentences about facts missing from the card. CheckpointError if the hub would reject the card."""
    path = directory / CARD
    try:
        metadata = (metadata_load(path) if path.exists() else None) or {}
    except (ValueError, YAMLError) as error:
        raise CheckpointError(f"{path}: its front matter is not that of a model card ({error})") from error
    cures = {
        "license": "no licence: a derivative is published under its original's; write `license:` into the front matter",
        "base_model": "no base model: write `base_model:` into the front matter, or quantize with --base-model",
    }
    return [f"{path}: {cure}" for key, cure in cures.items() if key not in metadata]
