"""Following a branch: where it points now, what that changes, and whether it is still the same repository.

A name on a hub is not an owner. It can be given up and registered by somebody else, or lead to where the repository was
moved ("model namespace reuse"). So what was pulled is pinned by commit and hashes, and records besides whose the
repository was, when it was made and its number on the hub. `update` is the one place that asks a name again, and it
goes on only while these are what they were. Otherwise it says what differs and fetches nothing, until the user says
that the new one is meant (`accept_owner`); after a redirect the name that answers is recorded instead of the old one,
which anybody may register.

A hub that says less is held to what it says: what either side lacks is not compared.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from weightsmith import lock as locks
from weightsmith.catalog import Catalog
from weightsmith.errors import NotFoundError, OwnerChangedError, UsageError, WeightsmithError
from weightsmith.locate import locate
from weightsmith.lock import Locked, locked_form
from weightsmith.pull import pull_commit
from weightsmith.sources import choose, parse
from weightsmith.sources.listing import Listed, Listing
from weightsmith.sources.source import COMMIT
from weightsmith.store import Entry, File

log = logging.getLogger(__name__)

Status = Literal["same", "pinned", "moved", "updated", "refused", "failed"]


@dataclass(frozen=True, slots=True)
class Followed:
    """A hub model, as the lock has it (else as the catalog has), and that lock."""

    model: Locked
    lock: Path | None = None


@dataclass(frozen=True, slots=True)
class FileChange:
    """One file. old, new: bytes before and now, None where it is not there."""

    path: str
    old: int | None
    new: int | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one model.

    status: "same" (nothing to do), "pinned" (asked for by commit), "moved" (would be pulled), "updated", "refused"
    (another owner or repository), "failed". old, new: commits. source: hf:// of what is followed from now on. reasons:
    what is not as it was. derived: entries that were made from the old files.
    """

    ref: str
    source: str
    revision: str
    status: Status
    old: str
    new: str | None = None
    changes: tuple[FileChange, ...] = ()
    reasons: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()
    error: WeightsmithError | None = None


def choose_models(catalog: Catalog, names: Sequence[str], lock: Path | None) -> list[Followed]:
    """The hub models that `names` mean, in the lock first, then in the catalog; without names all of the lock, or of
    the catalog where there is no lock.

    Raises NotFoundError and UsageError (a name that is no model pulled from a hub).
    """
    locked = locks.read(lock) if lock is not None else []
    if not names and lock is not None:
        return [Followed(one, lock) for one in locked if parse(one.source).kind == "hf"]
    if not names:
        pulled = [entry for entry in catalog.entries() if entry.parent is None and entry.alias_of is None]
        return [Followed(locked_form(entry)) for entry in pulled if entry.origin.get("kind") == "hf"]
    found: dict[str, Followed] = {}
    for name in names:
        hits = [Followed(one, lock) for one in locked if name in (one.asked[0], one.source, one.name, one.ref)]
        for one in hits or [Followed(locked_form(_entry(catalog, name)))]:
            if parse(one.model.source).kind != "hf":
                raise UsageError(f"{one.model.ref} is not from a hub", hint="Only branches of a hub are followed.")
            found[one.model.ref] = one
    return list(found.values())


def update(
    catalog: Catalog,
    models: Iterable[Followed],
    *,
    dry_run: bool = False,
    accept_owner: bool = False,
    allow_pickle: bool = False,
) -> list[Outcome]:
    """Follow each model's revision to its commit of now; one that fails does not keep the others from it.

    accept_owner: go on where the repository is not the one that it was.
    """
    done = []
    for one in models:
        try:
            done.append(_follow(catalog, one, dry_run=dry_run, accept=accept_owner, allow_pickle=allow_pickle))
        except WeightsmithError as error:
            model = one.model
            revision = model.pins.get("revision", "main")
            done.append(Outcome(model.ref, model.source, revision, "failed", model.pins["commit"], error=error))
    return done


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """8 if any was refused, else that of the first failure, else 0."""
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    refused = [error for error in errors if isinstance(error, OwnerChangedError)]
    return next((error.exit_code for error in [*refused, *errors]), 0)


def _entry(catalog: Catalog, name: str) -> Entry:
    entry = locate(name, catalog).entry
    if entry is None:
        raise NotFoundError(f"{name!r} is neither in a lock nor in the catalog", hint=f"Run: weightsmith pull {name}")
    if entry.alias_of is not None:
        raise UsageError(f"{entry.ref} is an alias of {entry.name}:{entry.alias_of}", hint="Update that.")
    return entry


def _follow(catalog: Catalog, one: Followed, *, dry_run: bool, accept: bool, allow_pickle: bool) -> Outcome:
    from weightsmith.sources import hub  # noqa: PLC0415  (a hub is asked, and its client loaded, only here)

    model, repo = one.model, parse(one.model.source).target
    revision, old = model.pins.get("revision", "main"), model.pins["commit"]
    if COMMIT.fullmatch(revision):
        return Outcome(model.ref, model.source, revision, "pinned", old)
    now = hub.look(repo, revision, home=catalog.home)
    reasons = _differences(model, repo, now)
    if reasons and not accept:
        return Outcome(
            *(model.ref, model.source, revision, "refused", old, now.commit),
            reasons=reasons,
            error=_refusal(model, reasons),
        )
    if now.commit == old and not reasons:
        return Outcome(model.ref, model.source, revision, "same", old, old)
    source = f"hf://{now.answers or repo}"
    derived = _derived(catalog, model)
    if dry_run:
        changes = _foreseen(catalog, model, repo, now, allow_pickle=allow_pickle)
        return Outcome(model.ref, source, revision, "moved", old, now.commit, changes, reasons, derived)
    licence = model.pins.get("licence") if now.licence is None else None
    target = parse(source).target
    entry = pull_commit(catalog, model, target, now.commit, licence=licence, allow_pickle=allow_pickle)
    if target == repo:
        hub.point(now, revision, home=catalog.home)
    if one.lock is not None:
        locks.write(one.lock, [entry])
    return Outcome(model.ref, source, revision, "updated", old, now.commit, _happened(model, entry), reasons, derived)


def _differences(model: Locked, repo: str, now: Listing) -> tuple[str, ...]:
    """In what the repository that answers now is not the one that was pulled from."""
    was, found = model.pins, []
    before = was.get("answers") or repo
    after = now.answers or repo
    if before.casefold() != after.casefold():
        found.append(f"{repo} leads to {after}: it was renamed, or handed to somebody else")
    said = {"created": now.created, "author": now.author, "repository": now.repository}
    words = {
        "created": "the repository was made on {new}, the one that was pulled from on {old}",
        "author": "its author is {new}, it was {old}",
        "repository": "its number on the hub is {new}, it was {old}",
    }
    for key, text in words.items():
        new, old = said[key], was.get(key)
        if new is not None and old is not None and new != old:
            found.append(text.format(new=new, old=old))
    return tuple(found)


def _refusal(model: Locked, reasons: Sequence[str]) -> OwnerChangedError:
    hint = (
        "A name that was given up can be taken by anybody. Look at who it is now; if that is whom you mean, run: "
        f"weightsmith update {model.ref} --accept-owner. `pull --locked` still takes the old commit, or nothing."
    )
    return OwnerChangedError("; ".join(reasons), path=model.source, hint=hint)


def _derived(catalog: Catalog, model: Locked) -> tuple[str, ...]:
    if not catalog.has(model.name, model.tag):
        return ()
    digest = catalog.get(model.ref).digest
    return tuple(entry.ref for entry in catalog.summaries() if entry.parent == digest)


def _happened(model: Locked, entry: Entry) -> tuple[FileChange, ...]:
    old, new = {file.path: file for file in model.files}, {file.path: file for file in entry.files}
    same = {path for path in old.keys() & new.keys() if old[path].sha256 == new[path].sha256}
    return _changes(
        {path: old[path].size for path in old if path not in same},
        {path: new[path].size for path in new if path not in same},
    )


def _foreseen(
    catalog: Catalog, model: Locked, repo: str, now: Listing, *, allow_pickle: bool
) -> tuple[FileChange, ...]:
    """What pulling the commit `now` would change, by its listing alone."""
    from weightsmith.sources import hub  # noqa: PLC0415  (see _follow)

    new = _chosen(model, now, allow_pickle=allow_pickle)
    old = {file.path: file for file in model.files}
    back = hub.look_back(repo, model.pins["commit"], home=catalog.home)
    before = _chosen(model, back, allow_pickle=allow_pickle) if back is not None else {}
    same = {path for path in old.keys() & new.keys() if _is_same(old[path], before.get(path), new[path])}
    return _changes(
        {path: old[path].size for path in old if path not in same},
        {path: new[path].size for path in new if path not in same},
    )


def _chosen(model: Locked, listing: Listing, *, allow_pickle: bool) -> dict[str, Listed]:
    """The files that a pull takes of `listing`, by the path that they get."""
    where = f"hf://{listing.repo}@{listing.commit}"
    names = choose.select(listing.files, include=model.include, where=where, allow_pickle=allow_pickle)
    return {place: listing.files[name] for name, place in choose.placed(names).items()}


def _is_same(old: File, before: Listed | None, new: Listed) -> bool:
    if new.sha256 is not None:
        return (old.size, old.sha256) == (new.size, new.sha256)
    return before is not None and before.identity == new.identity  # small files: the hub knows git's hash alone


def _changes(old: dict[str, int], new: dict[str, int]) -> tuple[FileChange, ...]:
    return tuple(FileChange(path, old.get(path), new.get(path)) for path in sorted(old.keys() | new.keys()))
