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

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from weightsmith import oci, store
from weightsmith.catalog import Catalog
from weightsmith.store import Entry

DAY = 24 * 3600
TWICE = "a second copy of a blob"


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


def by_entry(catalog: Catalog, names: Collection[str] = ()) -> tuple[list[Usage], dict[str, int]]:
    """The usage of every entry in the catalog's order, and the bytes that removing all tags of a model frees, by name.

    names: only these models (`name`) and entries (`name:tag`); a model is counted with all its tags.
    """
    entries = catalog.entries()
    blobs = oci.holders(catalog.home, entries)
    held: defaultdict[str, list[Path]] = defaultdict(list)
    for path, holders in blobs.items():
        for ref in holders:
            held[ref].append(path)

    def going(refs: set[str]) -> list[Path]:
        """The blobs that go when the entries `refs` go."""
        return [path for path in {path for ref in refs for path in held[ref]} if blobs[path] <= refs]

    found, models = [], defaultdict[str, list[Entry]](list)
    for entry in entries:
        models[entry.name].append(entry)
        if names and entry.name not in names and entry.ref not in names:
            continue
        own = {oci.blob_path(catalog.home, file.sha256) for file in entry.files}
        nbytes, gone = on_disk([entry.folder]), going({entry.ref})
        freed = store.freed_bytes([*(path for path, _ in _files(entry.folder)), *gone])
        beside = store.freed_bytes(path for path in gone if path not in own)  # its manifest, and statements about it
        found.append(Usage(entry, nbytes, nbytes - (freed - beside), freed))
    freed_by_model = {}
    for name in dict.fromkeys(usage.entry.name for usage in found):
        inside = [path for entry in models[name] for path, _ in _files(entry.folder)]
        freed_by_model[name] = store.freed_bytes([*inside, *going({entry.ref for entry in models[name]})])
    return found, freed_by_model


def on_disk(folders: Iterable[Path]) -> int:
    """Bytes of all files below `folders`, each inode once."""
    seen: dict[tuple[int, int], int] = {}
    for folder in folders:
        for _, status in _files(folder):
            seen[status.st_dev, status.st_ino] = status.st_size
    return sum(seen.values())


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


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.is_symlink())
    except (FileNotFoundError, NotADirectoryError):
        return []
