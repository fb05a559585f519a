"""The chunks of a download: which are done, who fetches which, and the journal that outlives the process.

A part of known size is cut into chunks. Beside `data.part` lies `data.part.journal`: its first line says what the part
is a part of (size, and a hash of the content or the server's ETag), each further line is `[start, stop, sha256]` of a
chunk that was written. What an earlier run left is believed only after its bytes were read again and hashed; a torn
last line, pages that never reached the disk or a part that somebody edited cost their chunks and nothing more, so
nothing is flushed on the way.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.atomic import disk_errors

MAX_LINE = 4096


@dataclass(frozen=True, slots=True, order=True)
class Chunk:
    """Bytes [start, stop) of a file."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Bytes in it."""
        return self.stop - self.start


def cut(size: int, step: int) -> list[Chunk]:
    """A file of `size` bytes in chunks of `step` bytes, the last one shorter."""
    return [Chunk(start, min(start + step, size)) for start in range(0, size, step)]


class Journal:
    """Finished chunks of `part` by their SHA-256; safe from several threads.

    head: what the part is a part of. A journal with another head is dropped, and the part with it.
    """

    def __init__(self, part: Path, head: Mapping[str, Any]) -> None:
        self.path = journal_path(part)
        first = json.dumps(dict(head), sort_keys=True)
        self.known = _read(self.path, first)
        if not self.known:
            part.unlink(missing_ok=True)
        self._lock = threading.Lock()
        with disk_errors(self.path):
            # Written anew, so that a torn last line cannot swallow the next one; by rename, so that nothing is lost.
            fresh = self.path.with_name(self.path.name + ".new")
            self._file = open(fresh, "w", encoding="utf-8")  # noqa: SIM115  (closed by close)
            self._file.write("".join(f"{line}\n" for line in [first, *map(_line, self.known.items())]))
            self._file.flush()
            os.replace(fresh, self.path)

    def add(self, chunk: Chunk, sha256: str) -> None:
        """Note that `chunk` was written."""
        with self._lock, disk_errors(self.path):
            self._file.write(_line((chunk, sha256)) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Keep it for the next run."""
        self._file.close()


def journal_path(part: Path) -> Path:
    """Where the journal of `part` lies."""
    return part.with_name(part.name + ".journal")


def head_of(part: Path) -> dict[str, Any] | None:
    """What an unfinished `part` says it is a part of; None without a journal."""
    path = journal_path(part)
    if path.is_symlink() or not path.is_file() or not part.is_file():
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        try:
            head = json.loads(file.readline(MAX_LINE))
        except ValueError:
            return None
    return head if isinstance(head, dict) else None


def drop(part: Path) -> None:
    """Forget an unfinished `part`."""
    part.unlink(missing_ok=True)
    journal_path(part).unlink(missing_ok=True)


def _line(item: tuple[Chunk, str]) -> str:
    return json.dumps([item[0].start, item[0].stop, item[1]])


def _read(path: Path, first: str) -> dict[Chunk, str]:
    if path.is_symlink() or not path.is_file():
        return {}
    known: dict[Chunk, str] = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        if file.readline(MAX_LINE).rstrip("\n") != first:
            return {}
        for line in file:
            try:
                start, stop, sha256 = json.loads(line)
                known[Chunk(int(start), int(stop))] = str(sha256)
            except (ValueError, TypeError):
                continue  # a line torn by a kill; its chunk is simply fetched again
    return known


class Stopped(Exception):  # noqa: N818  (a signal)
    """Another thread has failed; its reason is told elsewhere."""


class Board:
    """Which chunks are still to be fetched, shared by the threads of one download.

    The first chunks come first, so that the file can be hashed from its front while it arrives.
    """

    def __init__(self, chunks: list[Chunk], done: set[Chunk]) -> None:
        self._todo = [chunk for chunk in reversed(chunks) if chunk not in done]
        self._done = set(done)
        self._ended = False
        self._workers = 0
        self._failure: BaseException | None = None
        self._changed = threading.Condition()

    @property
    def missing(self) -> int:
        """How many chunks nobody has taken yet."""
        return len(self._todo)

    def is_done(self, chunk: Chunk) -> bool:
        """Whether `chunk` is written."""
        return chunk in self._done

    def go_on(self) -> None:
        """Raise Stopped if the download has failed."""
        if self._failure is not None:
            raise Stopped

    def join(self) -> None:
        """One more thread fetches."""
        with self._changed:
            self._workers += 1

    def leave(self, chunk: Chunk) -> bool:
        """Give `chunk` back and go, if others go on; False when this is the last thread."""
        with self._changed:
            if self._workers < 2:
                return False
            self._workers -= 1
            self._give_back(chunk)
        return True

    def take(self) -> Chunk | None:
        """The next chunk to fetch; waits while one may come back, None when all is proved or the download failed."""
        with self._changed:
            while not self._todo and self._failure is None and not self._ended:
                self._changed.wait()
            return None if self._failure is not None or not self._todo else self._todo.pop()

    def end(self) -> None:
        """Everything is written and proved: let the threads go."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def finish(self, chunk: Chunk) -> None:
        """`chunk` is written."""
        with self._changed:
            self._done.add(chunk)
            self._changed.notify_all()

    def redo(self, chunk: Chunk) -> None:
        """`chunk`, which an earlier run noted, is not what it was: fetch it again."""
        with self._changed:
            self._done.discard(chunk)
            self._give_back(chunk)

    def fail(self, reason: BaseException) -> None:
        """End the download for all threads; the first reason counts."""
        with self._changed:
            self._failure = self._failure or reason
            self._changed.notify_all()

    def wait_for(self, chunk: Chunk) -> None:
        """Wait until `chunk` is written; raises what `fail` was given."""
        with self._changed:
            while chunk not in self._done and self._failure is None:
                self._changed.wait()
            if self._failure is not None:
                raise self._failure

    def pause(self, seconds: float) -> None:
        """Sleep, but wake when the download fails; raise Stopped then."""
        with self._changed:
            if self._failure is None and seconds > 0:
                self._changed.wait_for(lambda: self._failure is not None, timeout=seconds)
            if self._failure is not None:
                raise Stopped

    def _give_back(self, chunk: Chunk) -> None:
        self._todo.append(chunk)
        self._todo.sort(reverse=True)
        self._changed.notify_all()
