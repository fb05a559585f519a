"""What a list of the catalog needs of each entry, kept in one file so that ten thousand records need not be parsed.

    HOME/models/.index        one line: CRC-32 of the rest; then JSON: {"format", "rows": [[stamp, summary], ...]}

A row counts only while its record is the file that was read: `stamp` is that file's times of change (of contents and of
inode), size and inode number. Records are replaced by rename, so a new one has another inode; one that is edited in
place has another time of change, which no program can set. One blind spot is left, that of every such cache (git calls
it "racily clean"): a change within the clock tick of the reading. So a record younger than `SETTLED` is not kept, and
read again next time. The folders are walked every time: what exists is never taken from the index.

Whatever is wrong with the file (another version, cut off, no right to write it), it is as if there was none.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from weightsmith._version import __version__
from weightsmith.atomic import AtomicFile
from weightsmith.errors import WeightsmithError
from weightsmith.store import Entry

NAME = ".index"
SETTLED = 2 * 10**9  # nanoseconds; file systems round times to as much as this
MAX_BYTES = 256 << 20
_FORMAT = [1, __version__]
_ORIGIN = ("repo", "commit", "revision", "package", "version", "url")

Stamp = list[int]


class Summary(NamedTuple):
    """An entry without its files, recipe and evaluations. file: what to open in its folder ("" the folder itself).

    origin: only what a URL is looked up by. models: the folder that all entries lie in. For the rest see `Entry`.
    """

    models: str
    name: str
    tag: str
    container: str
    type: str
    digest: str
    created: str
    nbytes: int
    file: str
    parent: str | None
    parent_ref: str | None
    licence: str | None
    alias_of: str | None
    origin: dict[str, Any]

    @property
    def ref(self) -> str:
        """`name:tag`."""
        return f"{self.name}:{self.tag}"

    @property
    def folder(self) -> Path:
        """The entry's folder."""
        return Path(self.models, self.name, self.tag)

    @property
    def path(self) -> Path:
        """What to open, as `Entry.path`."""
        return Path(self.models, self.name, self.tag, self.file)


def summary_of(entry: Entry) -> Summary:
    """The short form of `entry`."""
    where = entry.path
    return Summary(
        str(entry.folder.parent.parent),
        entry.name,
        entry.tag,
        entry.container,
        entry.type,
        entry.digest,
        entry.created,
        entry.nbytes,
        where.relative_to(entry.folder).as_posix() if where != entry.folder else "",
        entry.parent,
        entry.parent_ref,
        entry.licence,
        entry.alias_of,
        {key: entry.origin[key] for key in _ORIGIN if key in entry.origin},
    )


def stamp_of(status: os.stat_result) -> Stamp:
    """What tells a record from any other that lay, or will lie, in its place."""
    return [status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino]


def load(models: Path) -> dict[tuple[str, str], tuple[Stamp, list[Any]]]:
    """Stamp and summary of each entry as kept; empty if there is no index, or none that can be used."""
    try:
        with open(models / NAME, "rb") as file:
            head, _, body = file.read(MAX_BYTES).partition(b"\n")
        if head != b"%08x" % zlib.crc32(body):
            return {}
        kept = json.loads(body)
        if kept["format"] != _FORMAT:
            return {}
        return {(row[0], row[1]): (stamp, row) for stamp, row in kept["rows"]}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return {}


def save(models: Path, found: list[tuple[Stamp, Summary]]) -> None:
    """Keep the summaries whose records have been still for a while; a failure to do so is no failure."""
    before = time.time_ns() - SETTLED
    rows = [(stamp, summary[1:]) for stamp, summary in found if max(stamp[0], stamp[1]) < before]
    body = json.dumps({"format": _FORMAT, "rows": rows}, ensure_ascii=False, separators=(",", ":")).encode()
    data = b"%08x\n" % zlib.crc32(body) + body
    try:
        file = AtomicFile(models / NAME, len(data), overwrite=True)
    except (WeightsmithError, OSError):
        return  # another process keeps one just now, or this one may not
    try:
        file.write(0, data)
        file.commit()
    except (WeightsmithError, OSError):
        file.abort()
