"""Whether the catalog's bytes are still what was recorded, and making them so again. Needs no network.

`check` reads every file of the given entries once (a file with several names counts once), hashes it and holds it
against its record. Disks rot without a word: a flipped bit changes neither size nor time.

`repair` looks for the same content, in this order, and believes nobody: what it takes is hashed first.

1. files or folders that the user names
2. another file of the catalog with that SHA-256: another entry's, or the blob
3. where it was pulled from, at the commit, version or hash that the record pins; only what is damaged is fetched, since
   the sound files of the entry are found on the shelf

4. what was made here and lies nowhere else is made again from its parent, if that is sound and the record has all of
   the recipe (rebuild.py); a text or an imatrix is in no record, so what needs one is left

The sound file takes every name of the damaged one by rename: in all entries, and the blob.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weightsmith import oci, store
from weightsmith.atomic import disk_errors, sync_folder
from weightsmith.catalog import Catalog
from weightsmith.errors import UnsafeInputError, WeightsmithError
from weightsmith.lock import locked_form
from weightsmith.progress import Ticker, progress
from weightsmith.sources import fetch
from weightsmith.store import Entry, File

log = logging.getLogger(__name__)

Inode = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Damage:
    """A file that is not what its record says. wrong: how. repaired: from where, once it was."""

    entry: Entry
    file: File
    wrong: str
    repaired: str | None = None

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.entry.folder / self.file.path


@dataclass(frozen=True, slots=True)
class Checked:
    """What was read: entries, files, bytes of different inodes; and what is damaged."""

    entries: int
    files: int
    nbytes: int
    damaged: tuple[Damage, ...]


def check(catalog: Catalog, entries: Sequence[Entry]) -> Checked:
    """Read and hash every file of `entries`, and its blob where that is another file. Changes nothing."""
    known: dict[Inode, str] = {}
    damaged, total = [], 0
    sizes = {_inode(path): file.size for entry in entries for file in entry.files if (path := entry.folder / file.path)}
    with progress("check", sum(sizes.values())) as ticker:
        for entry in entries:
            for file in entry.files:
                wrong = _wrong(entry.folder / file.path, file, known, ticker)
                wrong = wrong or _wrong_blob(catalog.home, file, known, ticker)
                if wrong:
                    damaged.append(Damage(entry, file, wrong))
    total = sum(size for inode, size in sizes.items() if inode in known)
    return Checked(len(entries), sum(len(entry.files) for entry in entries), total, tuple(damaged))


def repair(
    catalog: Catalog, damaged: Sequence[Damage], *, given: Sequence[Path] = (), offline: bool = False
) -> list[Damage]:
    """Put sound files in the place of damaged ones, as far as any can be had; returns `damaged`, told by `repaired`."""
    fixed: dict[str, str] = {}
    for one in damaged:
        if one.file.sha256 in fixed:
            continue
        with catalog.reserve(one.entry.name, one.entry.tag) as reservation:
            found = _sound(catalog, one, damaged, reservation.folder / "sound", given, offline)
            if found is not None:
                put(catalog, one.file, reservation.folder / "sound")
                fixed[one.file.sha256] = found
    made: set[str] = set()
    while _make_again(catalog, [one for one in damaged if one.file.sha256 not in fixed], fixed, made):
        pass  # what was made from what was just made may come out now
    return [replace(one, repaired=fixed.get(one.file.sha256)) for one in damaged]


def put(catalog: Catalog, file: File, sound: Path) -> None:
    """Give every name that `file` has in the catalog to the file `sound`, where another file of other bytes has it."""
    scratch = catalog.models / ".sound"
    known: dict[Inode, str] = {}
    with store.locked(catalog.models / ".lock"):
        for entry in catalog.entries():
            for mine in entry.files:
                path = entry.folder / mine.path
                if mine.sha256 != file.sha256:
                    continue
                if _wrong(path, mine, known):
                    with disk_errors(path):
                        path.parent.mkdir(parents=True, exist_ok=True)
                        scratch.unlink(missing_ok=True)
                        store.take_in(sound, scratch, own=True)
                        os.replace(scratch, path)
                        sync_folder(path.parent)
                with contextlib.suppress(oci.CannotLinkError):  # such a home has no blobs
                    oci.share(catalog.home, path, mine, scratch)


def _make_again(catalog: Catalog, left: Sequence[Damage], fixed: dict[str, str], made: set[str]) -> int:
    """Make entries again that have files in `left`, put what comes out right in place, note it in `fixed`; how many.

    made: digests of entries that were made again; none is twice, whatever came out.
    """
    from weightsmith import rebuild  # noqa: PLC0415  (containers and codecs are needed only here)

    before = len(fixed)
    for entry in {one.entry.digest: one.entry for one in left}.values():
        if entry.digest in made or not rebuild.is_repeatable(entry):
            continue
        with catalog.reserve(entry.name, entry.tag) as reservation:
            try:
                parent = rebuild.parent_of(catalog, entry)
                folder = rebuild.make(catalog, entry, rebuild.Brought(), reservation.folder)
            except WeightsmithError as error:
                log.warning("%s cannot be made again: %s", entry.ref, error)
                continue
            made.add(entry.digest)
            for one in left:
                path = folder / one.file.path
                same = one.entry.digest == entry.digest and one.file.sha256 not in fixed and path.is_file()
                if same and store.sha256_file(path) == one.file.sha256:
                    put(catalog, one.file, path)
                    fixed[one.file.sha256] = f"made again from {parent.ref}"
    return len(fixed) - before


def _wrong(path: Path, file: File, known: dict[Inode, str], ticker: Ticker | None = None) -> str:
    """What is wrong with the file `path`, "" if nothing is. known: hashes by inode, added to."""
    try:
        status = path.lstat()
    except OSError:
        return "is gone"
    if not stat.S_ISREG(status.st_mode):
        return "is no plain file"
    if status.st_size != file.size:
        return f"has {status.st_size} bytes, not {file.size}"
    inode = status.st_dev, status.st_ino
    if inode not in known:
        try:
            known[inode] = store.sha256_file(path, ticker)
        except WeightsmithError as error:
            return f"cannot be read: {error.message}"
    return "" if known[inode] == file.sha256 else f"has sha256 {known[inode]}, not {file.sha256}"


def _wrong_blob(home: Path, file: File, known: dict[Inode, str], ticker: Ticker) -> str:
    blob = oci.blob_path(home, file.sha256)
    if not os.path.lexists(blob):
        return ""  # a home without hard links; the next write makes up for it elsewhere
    wrong = _wrong(blob, file, known, ticker)
    return f"is sound, but its blob {wrong}" if wrong else ""


def _inode(path: Path) -> Inode | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _sound(
    catalog: Catalog, one: Damage, damaged: Iterable[Damage], into: Path, given: Sequence[Path], offline: bool
) -> str | None:
    """Bring a sound copy of the damaged file to `into`; returns where from, None if there is none."""
    bad = {_inode(other.path) for other in damaged}
    origin = one.entry.origin
    for path in _candidates(catalog, one.file, given, origin):
        if (_inode(path) not in bad or "is sound" in one.wrong) and _taken(path, one.file, into):
            return str(path)
    if one.entry.parent is not None or origin.get("kind") in (None, "path"):
        return None
    where = str(origin.get("source"))
    try:
        with catalog.reserve(one.entry.name, one.entry.tag) as scratch:
            source = locked_form(one.entry)
            fetch(source.to_source(), scratch.folder, include=source.include, offline=offline, home=catalog.home)
            return where if _taken(scratch.folder / one.file.path, one.file, into) else None
    except WeightsmithError as error:
        log.warning("%s cannot be had from %s: %s", one.path, where, error)
        return None


def _candidates(catalog: Catalog, file: File, given: Sequence[Path], origin: Mapping[str, Any]) -> Iterator[Path]:
    """Files that should be `file` by size and record, to be proved."""
    told = [Path(str(origin["path"]))] if origin.get("kind") == "path" and "path" in origin else []
    for path in [*given, *told]:
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (one for one in inside if one.is_file() and one.stat().st_size == file.size)
    yield oci.blob_path(catalog.home, file.sha256)
    for entry in catalog.entries():
        yield from (entry.folder / mine.path for mine in entry.files if mine.sha256 == file.sha256)


def _taken(path: Path, file: File, into: Path) -> bool:
    """Take `path` in if it is `file`, byte for byte."""
    try:
        if path.stat().st_size != file.size:
            return False
        into.unlink(missing_ok=True)
        store.take_in(path, into)
        if store.sha256_file(into) == file.sha256:
            return True
        into.unlink()
    except (OSError, UnsafeInputError):
        pass  # a candidate that cannot be read is none
    return False
