"""The hub's side of a push, by huggingface_hub: what is there, making repositories and branches, uploading, one commit.

The token is found and sent as for a pull (sources/hub.py): to the configured endpoint, and written nowhere. Large files
go where the hub says, to addresses that it signed, without the token. On huggingface.co the library sends them to Xet
storage where hf_xet is installed, with a token of its own that the hub makes for it. With Xet the library does not fall
back to LFS, and asks a hub that has no Xet again and again for minutes; so for other hubs it is off unless the user
says HF_HUB_DISABLE_XET=0.

A write is refused for other reasons than a read: the repository may be public and the token may only read. So what the
hub says to a write is told here, and the rest by hub_errors.py.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from weightsmith import store
from weightsmith.errors import AccessError, IntegrityError, NotFoundError, UsageError, WeightsmithError
from weightsmith.progress import bars
from weightsmith.sources import hub
from weightsmith.sources.hub_errors import connection_errors, explain
from weightsmith.sources.listing import Listing
from weightsmith.sources.source import COMMIT

T = TypeVar("T")

_HUB = "https://huggingface.co"
_AGAIN = "Run the same command again: large files that have arrived are not sent twice."
_WRITE = "It needs a token with write access: `hf auth login`, or HF_TOKEN; see your hub's settings/tokens."


@dataclass(frozen=True, slots=True)
class Upload:
    """One file to commit: its path in the repository, where it lies or what it holds, and the SHA-256 it must have."""

    path: str
    content: Path | bytes
    sha256: str | None


def ready(repo: str, *, need_token: bool) -> str:
    """The hub's address. Raises UsageError when offline, AccessError if there is no token to write with."""
    from huggingface_hub.utils import build_hf_headers  # noqa: PLC0415  (other verbs start without it)

    address = hub.endpoint()
    if hub.offline_mode():
        raise UsageError("HF_HUB_OFFLINE is set, and a push needs the network", path=f"hf://{repo}")
    if need_token and not any(name.lower() == "authorization" for name in build_hf_headers()):
        raise AccessError("a push needs a token and none was found", path=f"hf://{repo}", hint=_WRITE)
    return address


def look(repo: str, revision: str) -> tuple[bool, Listing | None]:
    """Whether there is such a repository, and its files at `revision`, None without that. Raises as `sources.fetch`."""
    from huggingface_hub import errors  # noqa: PLC0415

    try:
        return True, hub.look(repo, revision, home=store.home())
    except NotFoundError as error:
        if isinstance(error.__cause__, errors.RevisionNotFoundError):
            return True, None
        if isinstance(error.__cause__, errors.RepositoryNotFoundError):
            return False, None
        raise


def need_private(repo: str) -> None:
    """UsageError unless the repository is private already."""
    if not _calling(repo, "main", lambda api: api.model_info(repo)).private:
        hint = "Change that in its settings first, or leave --private out."
        raise UsageError("the repository is there, and public", path=f"hf://{repo}", hint=hint)


def make(repo: str, branch: str, *, private: bool, exists: bool) -> None:
    """Make the repository, if there is none, and the branch. Raises AccessError where that is not allowed."""
    if not exists:
        _calling(repo, branch, lambda api: api.create_repo(repo, private=private or None, exist_ok=True))
    if branch != "main" and not branch.startswith("refs/"):
        _calling(repo, branch, lambda api: api.create_branch(repo, branch=branch, exist_ok=True))


def upload(repo: str, branch: str, files: Sequence[Upload], *, message: str, parent: str | None) -> str:
    """Bring `files` to the hub and commit them on top of `parent`; returns the commit.

    Raises IntegrityError, before anything is visible, for a file with another hash than it must have.
    """
    from huggingface_hub import CommitOperationAdd  # noqa: PLC0415

    try:
        additions = [CommitOperationAdd(one.path, one.content) for one in files]
    except ValueError as error:
        raise UsageError("a hub refuses the name of a file", path=f"hf://{repo}", hint=str(error)[:300]) from error
    _calling(repo, branch, lambda api: api.preupload_lfs_files(repo, additions, revision=branch, free_memory=False))
    for one, addition in zip(files, additions, strict=True):
        found = addition.upload_info.sha256.hex()
        if one.sha256 is not None and found != one.sha256:
            hint = "Nothing was committed. See weightsmith verify --integrity, and --repair."
            raise IntegrityError(f"sha256 is {found}, the record says {one.sha256}", path=str(one.content), hint=hint)
    done = _calling(
        repo,
        branch,
        lambda api: api.create_commit(
            repo, additions, commit_message=message, revision=branch, parent_commit=parent, repo_type="model"
        ),
    )
    commit = str(done.oid)
    if not COMMIT.fullmatch(commit):
        raise IntegrityError("the hub names no commit for what was pushed", path=f"hf://{repo}@{branch}")
    return commit


def _calling(repo: str, branch: str, call: Callable[[Any], T]) -> T:
    """Run `call` with the library's client; raise what went wrong in our words."""
    from huggingface_hub import HfApi  # noqa: PLC0415

    api = HfApi(endpoint=hub.endpoint(), library_name="weightsmith")
    with _hushed(), _by_lfs(hub.endpoint()):
        try:
            return call(api)
        except connection_errors() as error:
            raise _explained(error, repo, branch) from error


@contextmanager
def _hushed() -> Iterator[None]:
    """Without the library's bars where ours would not be shown, and without its warnings, which quote signed URLs."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars  # noqa: PLC0415

    logger, off = logging.getLogger("huggingface_hub"), are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    if not bars():
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not off and not bars():
            enable_progress_bars()


@contextmanager
def _by_lfs(address: str) -> Iterator[None]:
    """Without Xet storage where the hub may lack it and nobody said to use it."""
    from huggingface_hub import constants  # noqa: PLC0415

    before = constants.HF_HUB_DISABLE_XET
    if address != _HUB and not os.environ.get("HF_HUB_DISABLE_XET"):
        constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


def _explained(error: BaseException, repo: str, branch: str) -> WeightsmithError:
    """What the hub's refusal of a write means."""
    from huggingface_hub import errors  # noqa: PLC0415

    where = f"hf://{repo}@{branch}"
    if isinstance(error, ValueError) and str(error).startswith("Invalid metadata"):
        return UsageError(str(error)[:500], path=where, hint="Correct the front matter of the entry's README.md.")
    cause = _root(error)
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status in (401, 403) or isinstance(cause, errors.RepositoryNotFoundError):
        said = _said(cause)
        return AccessError(f"the hub does not let this token write here{said}", path=where, hint=_WRITE)
    if status in (409, 412):
        hint = "Somebody else pushed there. Look at it, then run the same command again."
        return WeightsmithError(
            "the branch moved while this was uploaded; nothing was committed", path=where, hint=hint
        )
    if isinstance(status, int) and status not in (408, 429) and 400 <= status < 500:
        return WeightsmithError(f"the hub refuses (HTTP {status}){_said(cause)}", path=where)
    found = explain(cause, repo=repo, revision=branch, where=where)
    return type(found)(found.message, path=found.path, hint=_AGAIN)


def _root(error: BaseException) -> BaseException:
    """What an upload failed of, under the library's "Error while uploading"."""
    for _ in range(4):
        if getattr(error, "response", None) is not None or error.__cause__ is None:
            break
        error = error.__cause__
    return error


def _said(error: BaseException) -> str:
    """The hub's own words, if it has any: printable, short, and without the token."""
    from huggingface_hub import get_token  # noqa: PLC0415

    headers = getattr(getattr(error, "response", None), "headers", {})
    text = "".join(c for c in str(headers.get("X-Error-Message") or "") if c.isprintable())[:200]
    text = text.replace(get_token() or "\0", "...")
    return f": {text}" if text else ""
