"""What the catalog takes on disk, and what of it may go.

Bytes are counted once however many names a file has (inode), and a file is counted as freed by removing an entry only
if all its names go with that entry, its blob's among them: links of an alias, of another tag, or of the user's own
folder keep the bytes alive. Copies that share blocks below the file system (reflinks) look like separate files and are
counted as such.

Garbage is what no entry refers to and nobody works on: staging folders whose maker is gone, unfinished work and
downloads that nobody touched for a while (until then the same command goes on with them), what an interrupted removal
left, blobs and statements that no entry reaches, and second copies of a blob. Entries are never garbage, nor is
anything whose purpose is not known.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from weightsmith import oci, store
from weightsmith.catalog import Catalog
from weightsmith.index import Summary

DAY = 24 * 3600
TWICE = "a second copy of a blob"

Inode = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of an entry's files, those it shares with names elsewhere, and those that removing it frees.

    inodes: the bytes of each file, by device and inode.
    """

    entry: Summary
    nbytes: int
    shared: int
    freed: int
    inodes: dict[Inode, int] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Garbage:
    """Something that may go: where it lies, what it is, its bytes, its age in seconds."""

    path: Path
    what: str
    nbytes: int
    age: float


def by_entry(catalog: Catalog, names: Collection[str] = ()) -> tuple[list[Usage], dict[str, int]]:
    """The usage of every entry in the catalog's order, and the bytes that removing all tags of a model frees, by name.

    names: only these models (`name`) and entries (`name:tag`); a model is counted with all its tags.
    """
    entries = catalog.summaries()
    held = oci.holdings(catalog.home, [(entry.ref, entry.folder) for entry in entries])
    holders: defaultdict[str, set[str]] = defaultdict(set)
    for ref, holding in held.items():
        for name in holding.files | holding.beside:
            holders[name].add(ref)
    known = _blobs(catalog.home)

    def going(refs: set[str], *, beside: bool = False) -> list[os.stat_result]:
        """The blobs that go when the entries `refs` go (beside: without those of their files)."""
        mine: set[str] = set()
        for ref in refs:
            mine |= held[ref].beside - held[ref].files if beside else held[ref].beside | held[ref].files
        return [known[name] for name in mine if name in known and holders[name] <= refs]

    found, models = [], defaultdict[str, list[Summary]](list)
    inside: dict[str, list[os.stat_result]] = {}
    for entry in entries:
        models[entry.name].append(entry)
    wanted = {entry.name for entry in entries if not names or entry.name in names or entry.ref in names}
    for entry in entries:
        if entry.name in wanted:
            inside[entry.ref] = list(_stats(entry.folder))
        if names and entry.name not in names and entry.ref not in names:
            continue
        bytes_of = {(status.st_dev, status.st_ino): status.st_size for status in inside[entry.ref]}
        freed = _freed([*inside[entry.ref], *going({entry.ref})])
        beside = _freed(going({entry.ref}, beside=True))  # its manifest, and statements about it
        nbytes = sum(bytes_of.values())
        found.append(Usage(entry, nbytes, nbytes - (freed - beside), freed, bytes_of))
    freed_by_model = {}
    for name in dict.fromkeys(usage.entry.name for usage in found):
        refs = {entry.ref for entry in models[name]}
        freed_by_model[name] = _freed([*(status for ref in refs for status in inside[ref]), *going(refs)])
    return found, freed_by_model


def total(found: Iterable[Usage]) -> int:
    """Bytes of all files of `found`, each inode once."""
    seen: dict[Inode, int] = {}
    for one in found:
        seen.update(one.inodes)
    return sum(seen.values())


def on_disk(folders: Iterable[Path]) -> int:
    """Bytes of all files below `folders`, each inode once."""
    seen: dict[Inode, int] = {}
    for folder in folders:
        for status in _stats(folder):
            seen[status.st_dev, status.st_ino] = status.st_size
    return sum(seen.values())


def _blobs(home: Path) -> dict[str, os.stat_result]:
    """The status of every blob, by SHA-256."""
    found: dict[str, os.stat_result] = {}
    try:
        inside = list(os.scandir(home / "blobs" / "sha256"))
    except OSError:
        return found  # a home without hard links
    for one in inside:
        with contextlib.suppress(FileNotFoundError):  # it went meanwhile
            if one.is_file(follow_symlinks=False):
                found[one.name] = one.stat(follow_symlinks=False)
    return found


def _freed(names: Iterable[os.stat_result]) -> int:
    """As `store.freed_bytes`, of names whose status is known; each name once."""
    counted: dict[Inode, list[int]] = {}
    for status in names:
        counted.setdefault((status.st_dev, status.st_ino), [status.st_size, status.st_nlink])[1] -= 1
    return sum(size for size, left in counted.values() if left <= 0)


def garbage(catalog: Catalog, *, older_than: float = 7 * DAY) -> list[Garbage]:
    """What may go. older_than: seconds since unfinished work or a download was last touched.

    The bytes of a file with several names are counted where the last of them would go.
    """
    home, now = catalog.home, time.time()
    found: list[tuple[Path, str, float, list[Path]]] = []

    def add(path: Path, what: str, *, at_least: float = 0) -> None:
        try:
            touched = path.lstat().st_mtime
        except FileNotFoundError:
            return  # somebody finished meanwhile
        files = list(_files(path)) if path.is_dir() else []
        touched = max([touched, *(status.st_mtime for _, status in files)])
        if now - touched >= at_least:
            found.append((path, what, max(0.0, now - touched), [inside for inside, _ in files] or [path]))

    for folder in _children(home / "staging"):
        if folder.is_dir() and store.is_free(folder / ".lock"):
            add(folder, "staging of a run that is gone")
    for folder in _children(home / "work"):
        if folder.is_dir() and not _in_use(folder):
            add(folder, "unfinished work", at_least=older_than)
    for folder in _children(home / "downloads"):
        if folder.is_dir() and not _in_use(folder):
            add(folder, "unfinished download", at_least=older_than)
    for model in _children(catalog.models):
        for left in _children(model) if model.is_dir() else ():
            if left.name.startswith(".") and left.suffix == ".gone":
                add(left, "an interrupted removal")
            elif left.name.startswith(".") and left.suffix == ".old" and (model / left.stem[1:]).exists():
                add(left, "an interrupted replacement")
    for path in oci.stray(home):
        add(path, "a blob of no entry" if path.is_relative_to(home / "blobs") else "a statement about no entry")
    for path, _ in oci.unlinked(home):
        add(path, TWICE)
    return [Garbage(*one) for one in _counted(found)]


def _counted(found: list[tuple[Path, str, float, list[Path]]]) -> Iterator[tuple[Path, str, int, float]]:
    before, freed = [], 0
    for path, what, age, files in found:
        before += files
        total = store.freed_bytes(before)
        yield path, what, total - freed, age
        freed = total


def collect(catalog: Catalog, found: Iterable[Garbage]) -> int:
    """Remove `found`, looking once more that it is nobody's, and bring the image layout up to date.

    Returns the bytes that became free.
    """
    freed, home = 0, catalog.home
    found = list(found)
    for item in found:
        if item.path.parent == home / "staging":
            store.sweep(home)
        elif item.path.parent in (home / "work", home / "downloads") and not _in_use(item.path):
            shutil.rmtree(item.path, ignore_errors=True)
    if catalog.models.is_dir():
        with store.locked(catalog.models / ".lock"):
            for item in found:
                if item.path.is_relative_to(catalog.models) and item.what != TWICE:
                    shutil.rmtree(item.path, ignore_errors=True)
            oci.sync(home)
            oci.done(home)
            oci.unite(home)
            named = {item.path for item in found}
            oci.drop(home, [path for path in oci.stray(home) if path in named])
    twice = {path for path, _ in oci.unlinked(home)}
    for item in found:
        there = item.path in twice if item.what == TWICE else os.path.lexists(item.path)
        freed += 0 if there else item.nbytes
    return freed


def _in_use(folder: Path) -> bool:
    """Whether a process holds a lock in `folder` (unfinished outputs are locked by their writers)."""
    return any(not store.is_free(path) for path in [folder, *_inside(folder)])


def _inside(folder: Path) -> Iterator[Path]:
    """Everything below `folder`; folders that go meanwhile are as if they had been empty."""
    for base, folders, files in os.walk(folder):
        yield from (Path(base, name) for name in (*folders, *files))


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Regular files below `folder`, never through a link."""
    try:
        with os.scandir(folder) as found:
            inside = [] if folder.is_symlink() else list(found)
    except OSError:
        return  # no folder, or one that went meanwhile
    for one in inside:
        try:
            if one.is_dir(follow_symlinks=False):
                yield from _files(Path(one.path))
            elif one.is_file(follow_symlinks=False):
                yield Path(one.path), one.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue  # somebody finished meanwhile


def _stats(folder: Path | str) -> Iterator[os.stat_result]:
    """As `_files`, the status alone: of ten thousand entries the paths would cost more than the reading."""
    try:
        with os.scandir(folder) as found:
            inside = [] if os.path.islink(folder) else list(found)
    except OSError:
        return  # no folder, or one that went meanwhile
    for one in inside:
        try:
            if one.is_dir(follow_symlinks=False):
                yield from _stats(one.path)
            elif one.is_file(follow_symlinks=False):
                yield one.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue  # somebody finished meanwhile


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.is_symlink())
    except (FileNotFoundError, NotADirectoryError):
        return []
