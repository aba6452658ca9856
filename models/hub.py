"""The hub: download of models into its cache, and upload of checkpoints, with advice in every error."""

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import DryRunFileInfo, HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is of the library under the hub's
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from rich.console import Console

from lowbit.errors import CheckpointError, UsageError, nearest

MALFORMED = (KeyError, TypeError, ValueError)  # answers of a mirror that is no hub: a library's errors on them
FAILURES = (HTTPError, HFValidationError, OSError, *MALFORMED)
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
ANSWER_SECONDS = 5.0
MOST_SEARCHED = 100  # models listed to find the nearest name


def download(name: str, revision: str | None, patterns: Iterable[str]) -> Path:
    """The snapshot of the model `name` in the hub's cache, downloaded if it is not there.

    Shows progress bars on a terminal and one line elsewhere, unless the hub's bars are disabled. Files finished by an
    interrupted download are kept. CheckpointError with the reason and advice.
    """
    try:
        with _bars_or_a_line(name, revision, list(patterns)):
            return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except FAILURES as error:
        raise CheckpointError(_reason(name, revision, error)) from error


def download_if_it_answers(name: str, patterns: Iterable[str]) -> Path | None:
    """The snapshot of the model `name`, if it is whole in the cache, or if the hub answers in time and has it."""
    wanted = list(patterns)
    with suppress(*FAILURES):
        found = Path(snapshot_download(name, local_files_only=True, allow_patterns=wanted))
        if (found / "model.safetensors").exists():
            return found
    try:
        HfApi().model_info(name, timeout=ANSWER_SECONDS)
    except FAILURES:
        return None
    return download(name, None, wanted)


@contextmanager
def _bars_or_a_line(name: str, revision: str | None, patterns: list[str]) -> Iterator[None]:
    """A context with the hub's bars on a terminal. Elsewhere there are none, after one line about the download."""
    with _bars_on_a_terminal() as as_wanted:
        if not as_wanted:
            _announce(name, revision, patterns)
        yield


@contextmanager
def _bars_on_a_terminal() -> Iterator[bool]:
    """A context without the hub's bars where no terminal is. True if bars are shown, or turned off by the user."""
    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield True
        return
    disable_progress_bars()
    try:
        yield False
    finally:
        enable_progress_bars()


def _announce(name: str, revision: str | None, patterns: list[str]) -> None:
    """Print one line about the download, if there is something to download."""
    if constants.HF_HUB_OFFLINE:
        return
    try:
        found = snapshot_download(name, revision=revision, allow_patterns=patterns, dry_run=True)
    except FAILURES:  # the download itself fails in the same way, or is served from the cache
        return
    wanted = [file for file in found if isinstance(file, DryRunFileInfo) and file.will_download]
    if wanted:
        size = sum(file.file_size or 0 for file in wanted)
        commit = wanted[0].commit_hash[:12]
        line = f"downloading {name} at {commit} from {constants.ENDPOINT}: {len(wanted)} files, {size / 1e6:.1f} MB"
        Console(file=sys.stderr, markup=False, soft_wrap=True).print(line, highlight=False)


def _reason(name: str, revision: str | None, error: Exception) -> str:
    """The reason why the model `name` could not be downloaded, with advice."""
    page = f"{constants.ENDPOINT}/{name}"
    if isinstance(error, HFValidationError):
        return f"{name!r} is no directory here, and not a hub id (org/model)"
    if isinstance(error, GatedRepoError):
        if get_token() is None:
            return f"{name!r} is gated: accept its licence at {page}, then {LOG_IN}"
        return (
            f"{name!r} is gated, and the account of your token has no access: accept its licence at {page}, or wait "
            "until its owners grant it"
        )
    if isinstance(error, RepositoryNotFoundError):
        unseen = f"if it is private, {LOG_IN}" if get_token() is None else "if it is private, your token has no access"
        return f"{name!r} is no directory here and no model that the hub shows you{_like(name)}; {unseen}"
    if isinstance(error, RevisionNotFoundError):
        return f"{name!r} has no revision {revision!r}; {nearest(revision, _revisions(name))}"
    if isinstance(error, LocalEntryNotFoundError):
        return _unreached(name, revision)
    return _failed("downloading", name, error) + "; files that came whole are kept: the same command goes on from there"


def _unreached(name: str, revision: str | None) -> str:
    """The reason why neither the hub nor its cache has the model."""
    what = f"{name!r}" + (f" at {revision}" if revision else "")
    if constants.HF_HUB_OFFLINE:
        return (
            f"{what} is no directory here, and not whole in the cache ({constants.HF_HUB_CACHE}); HF_HUB_OFFLINE keeps "
            f"it from being downloaded: unset it, or run `hf download {name}` where there is a network"
        )
    return (
        f"{what} is no directory here, not whole in the cache ({constants.HF_HUB_CACHE}), and {constants.ENDPOINT} "
        "cannot be reached: check the network, the proxy and HF_ENDPOINT"
    )


def _failed(doing: str, name: str, error: Exception) -> str:
    said = getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{doing} {name!r} failed ({said})"


def _like(name: str) -> str:
    """A question with the nearest name of a model on the hub; empty if there is none."""
    owner, _, model = name.rpartition("/")
    try:
        api = HfApi()
        asked = {"author": owner} if owner else {"search": model}
        known = [found.id for found in api.list_models(**asked, limit=MOST_SEARCHED)]  # type: ignore[arg-type]
    except FAILURES:
        return ""
    close = difflib.get_close_matches(name, known, n=1) or [each for each in known if each.endswith(f"/{model}")]
    return f" (did you mean {close[0]!r}?)" if close else ""


def _revisions(name: str) -> list[str]:
    """Branches and tags of a repository; only main if they are not available."""
    try:
        refs = HfApi().list_repo_refs(name)
    except FAILURES:
        return ["main"]
    return [ref.name for ref in (*refs.branches, *refs.tags)]


def require_account(repo: str) -> None:
    """Raise UsageError if there is no token, or if its account cannot write to `repo`."""
    owner, _, model = repo.rpartition("/")
    if not owner or not model or "/" in owner:
        raise UsageError(
            f"{repo!r} is no repository of the hub; write NAME/MODEL, with your account's or an org's name"
        )
    try:
        found = HfApi().whoami()
    except LocalTokenNotFoundError:
        raise UsageError(f"uploading to {repo!r} needs an account: {LOG_IN} (a token that may write)") from None
    except FAILURES as error:
        raise UsageError(_failed("asking for the account that uploads", repo, error) + f"; {LOG_IN}") from error
    names = [found["name"], *(org["name"] for org in found.get("orgs", ()))]
    if owner not in names:
        raise UsageError(f"{repo!r}: your token is of {names[0]}, who writes under {', '.join(names)}")


@contextmanager
def uploading(repo: str) -> Iterator[HfApi]:
    """A context for writing to `repo`. CheckpointError if the hub refuses or cannot be reached."""
    try:
        with _bars_on_a_terminal():
            yield HfApi()
    except FAILURES as error:
        forbidden = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)
        cure = "the token may not write there" if forbidden else "the same command goes on with what is missing"
        raise CheckpointError(f"{_failed('uploading to', repo, error)}; {cure}") from error
