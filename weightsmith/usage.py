"""What the catalog takes on disk, and what of it may go.

Bytes are counted once however many names a file has (inode), and a file is counted as freed by removing an entry only
if all its names lie in that entry: links of an alias, of another tag, or of the user's own folder keep the bytes alive.
Copies that share blocks below the file system (reflinks) look like separate files and are counted as such.

Garbage is what no entry refers to and nobody works on: staging folders whose maker is gone, unfinished work and
downloads that nobody touched for a while (until then the same command goes on with them), and what an interrupted
removal left. Entries are never garbage, nor is anything whose purpose is not known.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from weightsmith import store
from weightsmith.catalog import Catalog
from weightsmith.store import Entry

DAY = 24 * 3600


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of an entry's files, those it shares with names elsewhere, and those that removing it frees."""

    entry: Entry
    nbytes: int
    shared: int
    freed: int


@dataclass(frozen=True, slots=True)
class Garbage:
    """Something that may go: where it lies, what it is, its bytes, its age in seconds."""

    path: Path
    what: str
    nbytes: int
    age: float


def by_entry(catalog: Catalog) -> list[Usage]:
    """The usage of every entry, in the catalog's order."""
    found = []
    for entry in catalog.entries():
        files = list(_files(entry.folder))
        nbytes = sum(status.st_size for _, status in files)
        freed = _freed(files)
        found.append(Usage(entry, nbytes, nbytes - freed, freed))
    return found


def freed_by_model(catalog: Catalog) -> dict[str, int]:
    """Bytes that removing all tags of a model frees, by name."""
    files: defaultdict[str, list[tuple[Path, os.stat_result]]] = defaultdict(list)
    for entry in catalog.entries():
        files[entry.name] += _files(entry.folder)
    return {name: _freed(found) for name, found in files.items()}


def on_disk(folders: Iterable[Path]) -> int:
    """Bytes of all files below `folders`, each inode once."""
    seen: dict[tuple[int, int], int] = {}
    for folder in folders:
        for _, status in _files(folder):
            seen[status.st_dev, status.st_ino] = status.st_size
    return sum(seen.values())


def garbage(catalog: Catalog, *, older_than: float = 7 * DAY) -> list[Garbage]:
    """What may go. older_than: seconds since unfinished work or a download was last touched."""
    home, now, found = catalog.home, time.time(), []

    def add(path: Path, what: str, *, at_least: float) -> None:
        files = list(_files(path))
        touched = max([path.lstat().st_mtime, *(status.st_mtime for _, status in files)])
        if now - touched >= at_least:
            nbytes = _freed(files)
            found.append(Garbage(path, what, nbytes, max(0.0, now - touched)))

    for folder in _children(home / "staging"):
        if folder.is_dir() and store.is_free(folder / ".lock"):
            add(folder, "staging of a run that is gone", at_least=0)
    for folder in _children(home / "work"):
        if folder.is_dir() and not _in_use(folder):
            add(folder, "unfinished work", at_least=older_than)
    for folder in _children(home / "downloads"):
        if folder.is_dir() and not _in_use(folder):
            add(folder, "unfinished download", at_least=older_than)
    for model in _children(catalog.models):
        for left in _children(model) if model.is_dir() else ():
            if left.name.startswith(".") and left.suffix == ".gone":
                add(left, "an interrupted removal", at_least=0)
            elif left.name.startswith(".") and left.suffix == ".old" and (model / left.stem[1:]).exists():
                add(left, "an interrupted replacement", at_least=0)
    return found


def collect(catalog: Catalog, found: Iterable[Garbage]) -> int:
    """Remove `found`, looking once more that it is nobody's; returns the bytes that became free."""
    freed = 0
    for item in found:
        if item.path.parent == catalog.home / "staging":
            store.sweep(catalog.home)
        elif item.path.is_relative_to(catalog.models):
            with store.locked(catalog.models / ".lock"):
                shutil.rmtree(item.path, ignore_errors=True)
        elif not _in_use(item.path):
            shutil.rmtree(item.path, ignore_errors=True)
        freed += 0 if item.path.exists() else item.nbytes
    return freed


def _in_use(folder: Path) -> bool:
    """Whether a process holds a lock in `folder` (unfinished outputs are locked by their writers)."""
    return any(not store.is_free(path) for path in [folder, *folder.rglob("*")])


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Regular files below `folder`, never through a link."""
    for path in folder.rglob("*") if folder.is_dir() and not folder.is_symlink() else ():
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # somebody finished meanwhile
        if stat.S_ISREG(status.st_mode):
            yield path, status


def _freed(files: list[tuple[Path, os.stat_result]]) -> int:
    names = Counter((status.st_dev, status.st_ino) for _, status in files)
    links = {(status.st_dev, status.st_ino): status for _, status in files}
    return sum(status.st_size for inode, status in links.items() if status.st_nlink <= names[inode])


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.is_symlink())
    except (FileNotFoundError, NotADirectoryError):
        return []
