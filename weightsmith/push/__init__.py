"""Pushing: an entry of the catalog becomes files of a model repository on a hub.

1. The entry's files are looked at: plain files of the recorded sizes (with `check` hashed as well).
2. The branch is listed. What it holds already under the same name with the same hash is not sent again.
3. A model card is written if neither the entry nor the branch has a README.md (card.py).
4. Large files are uploaded, and what was uploaded is held against the record before anything is visible; then one
   commit makes all of it appear at once, on top of what was listed: if the branch moved meanwhile, it is refused.
5. The new commit is listed again, and sizes and hashes are compared with the record.

Only the entry's own files go, and the card: never the catalog's record, nothing that lies beside. Nothing is deleted on
the hub. What stops can be run again: large files that have arrived are known there by their SHA-256.
"""

from __future__ import annotations

import logging
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from weightsmith import integrity
from weightsmith._version import __version__
from weightsmith.catalog import Catalog
from weightsmith.errors import IntegrityError, UnsafeInputError, UsageError
from weightsmith.push import card as cards
from weightsmith.push import remote
from weightsmith.safename import resolve_inside
from weightsmith.sizes import spelled
from weightsmith.sources import hub
from weightsmith.sources.listing import Listed, Listing, prove
from weightsmith.sources.source import COMMIT, Source, parse
from weightsmith.store import RECORD, Entry, File

log = logging.getLogger(__name__)

README = "README.md"
State = Literal["new", "there", "elsewhere", "replaced"]


@dataclass(frozen=True, slots=True)
class Item:
    """A file of the entry, and what the branch has: nothing, the same, the same elsewhere, or others by that name."""

    file: File
    state: State


@dataclass(frozen=True, slots=True)
class Planned:
    """What a push would do. commit: the branch as it was listed; None where there is no repository or no branch yet.

    exists: whether there is a repository. card: the model card to write. readme: "own" (the entry's), "kept" (the
    branch's), "written", "replaced".
    """

    repo: str
    branch: str
    endpoint: str
    exists: bool
    commit: str | None
    items: tuple[Item, ...]
    card: str | None
    readme: str

    @property
    def nbytes(self) -> int:
        """Bytes that the hub does not have under this name."""
        return sum(item.file.size for item in self.items if item.state != "there")


@dataclass(frozen=True, slots=True)
class Pushed:
    """What was done, and the commit that holds it. changed: False if the branch held everything already."""

    planned: Planned
    commit: str
    changed: bool


def target_of(text: str) -> Source:
    """The repository and branch that `text` names, hf://org/repo[@branch]; UsageError for anything else."""
    found = parse(text)
    if found.kind != "hf":
        raise UsageError(f"{text!r} is no repository of a hub", hint="Written hf://org/repo or hf://org/repo@branch.")
    if found.revision is not None and COMMIT.fullmatch(found.revision):
        raise UsageError(f"{found.revision} is a commit, and cannot be added to", hint="Name a branch.")
    return found


def plan(
    catalog: Catalog, entry: Entry, target: Source, *, check: bool = False, card: bool = False, dry: bool = False
) -> Planned:
    """Look at the entry and at the hub; nothing is changed on either.

    check: hash the entry's files. card: write a card even where the branch has a README.md. dry: no token is needed.
    Raises IntegrityError (the entry), AccessError, NotFoundError, UsageError and what a failing network raises.
    """
    _check_files(catalog, entry, full=check)
    own = any(file.path == README for file in entry.files)
    if own and card:
        raise UsageError("the entry has a README.md, which is the card", hint="Leave --card out.")
    endpoint = remote.ready(target.target, need_token=not dry)
    exists, listing = remote.look(target.target, target.revision or "main")
    if listing is not None:
        hub.warn_of_redirect(listing, f"hf://{target.target}")
    items = tuple(Item(file, _state(entry, file, listing)) for file in entry.files)
    there = listing is not None and README in listing.files
    readme = "own" if own else "kept" if there and not card else "replaced" if there else "written"
    text = cards.card(entry, catalog.lineage(entry.ref)[1:], repo=target.target, endpoint=endpoint)
    return Planned(
        repo=target.target,
        branch=target.revision or "main",
        endpoint=endpoint,
        exists=exists,
        commit=listing.commit if listing is not None else None,
        items=items,
        card=text if readme in ("written", "replaced") else None,
        readme=readme,
    )


def push(
    catalog: Catalog,
    entry: Entry,
    target: Source,
    *,
    private: bool = False,
    message: str | None = None,
    check: bool = False,
    card: bool = False,
) -> Pushed:
    """Upload `entry` to `target`, making repository and branch where they are missing; see the module's text.

    private: a new repository is private; one that is there must be. Raises what `plan` raises, and IntegrityError
    where the hub lists other bytes in the end.
    """
    planned = plan(catalog, entry, target, check=check, card=card)
    if private and planned.exists:
        remote.need_private(planned.repo)
    if planned.commit is None:
        remote.make(planned.repo, planned.branch, private=private, exists=planned.exists)
        made = plan(catalog, entry, target, card=card)
        planned = replace(made, exists=planned.exists)
    uploads = [
        remote.Upload(item.file.path, entry.folder / item.file.path, item.file.sha256)
        for item in planned.items
        if item.state != "there"
    ]
    if planned.card is not None:
        uploads.append(remote.Upload(README, planned.card.encode(), None))
    commit = planned.commit
    if uploads:
        log.info("push %s to %s: %d files, %s", entry.ref, planned.repo, len(uploads), spelled(planned.nbytes))
        said = message or f"{entry.ref}, by weightsmith {__version__}"
        commit = remote.upload(planned.repo, planned.branch, uploads, message=said, parent=planned.commit)
    if commit is None:
        raise IntegrityError("the hub names no commit of the branch", path=f"hf://{planned.repo}@{planned.branch}")
    _compare(entry, remote.look(planned.repo, commit)[1], f"hf://{planned.repo}@{commit}")
    return Pushed(planned, commit, bool(uploads) and commit != planned.commit)


def _check_files(catalog: Catalog, entry: Entry, *, full: bool) -> None:
    """IntegrityError if a file of the entry is not there as recorded; UnsafeInputError for what is no file of it."""
    hint = f"See weightsmith verify --integrity {entry.ref}, and --repair."
    for file in entry.files:
        path = resolve_inside(entry.folder, file.path)
        if file.path == RECORD:
            raise UnsafeInputError("the catalog's record is no file of a model", path=path)
        try:
            status = path.lstat()
        except FileNotFoundError as error:
            raise IntegrityError("is gone from the catalog", path=path, hint=hint) from error
        if not stat.S_ISREG(status.st_mode):
            raise IntegrityError("is no plain file", path=path, hint=hint)
        if status.st_size != file.size:
            raise IntegrityError(f"has {status.st_size} bytes, the record says {file.size}", path=path, hint=hint)
    if full:
        for damage in integrity.check(catalog, [entry]).damaged:
            raise IntegrityError(damage.wrong, path=damage.path, hint=hint)


def _state(entry: Entry, file: File, listing: Listing | None) -> State:
    if listing is None:
        return "new"
    listed = listing.files.get(file.path)
    if listed is not None and listed.size == file.size:
        same = listed.sha256 == file.sha256 if listed.sha256 else not prove(entry.folder / file.path, listed)[1]
        if same:
            return "there"
    if any(other.sha256 == file.sha256 for other in listing.files.values()):
        return "elsewhere"
    return "new" if listed is None else "replaced"


def _compare(entry: Entry, listing: Listing | None, where: str) -> None:
    """IntegrityError unless the hub lists every file of `entry` with its size and hash."""
    for file in entry.files:
        listed = listing.files.get(file.path) if listing is not None else None
        fault = "is not there" if listed is None else _fault(entry.folder / file.path, file, listed)
        if fault:
            hint = "What the hub lists is not what was pushed; take that commit back, or push again."
            raise IntegrityError(fault, path=f"{where}/{file.path}", hint=hint)


def _fault(path: Path, file: File, listed: Listed) -> str:
    if listed.sha256 is not None:
        return listed.fault(file.size, file.sha256, None)
    return prove(path, listed)[1]
