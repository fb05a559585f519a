"""One file over HTTP: in chunks on several connections, resumed by chunk, hashed while it arrives.

    part      |#### 0 ####|#### 1 ####|.... 2 ....|#### 3 ####|           `data.part`, written at offsets
    threads               take the first chunk that is missing, `Range: bytes=START-STOP`, write, hash, note in journal
    caller    ----------> follows from the front: reads what is written, hashes the whole, checks old chunks on the way

So a process that dies loses at most one chunk for each connection, and the file's own hash is known a moment after its
last byte. A chunk that breaks off goes on where it stopped. What must not be mixed is not:

- `identity`, a hash of the content that the source lists or the user pinned, says that all bytes belong together;
- else the server's strong ETag does, sent along as `If-Range` (RFC 9110, section 13.1.5); it answers a changed file
  with all of it (200), and the part starts over;
- with neither, or where ranges are not served, the file comes as one stream and nothing of it is resumed.

What may pass is tried again after `WAITS`, or after what the server asks for (`Retry-After`). A connection that brings
nothing any more is given up alone while there are others, so a server that allows two gets two.

The caller holds a lock on the part and compares the hash: until then the bytes are only what somebody sent.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightsmith.atomic import disk_errors, need_space
from weightsmith.errors import IntegrityError, UnsafeInputError, WeightsmithError
from weightsmith.progress import Ticker
from weightsmith.sources.chunks import Board, Chunk, Journal, Stopped, cut, drop, head_of
from weightsmith.sources.connection import Answer, Client, Passing, Refused, origin

log = logging.getLogger(__name__)

CHUNK = 16 << 20
CONNECTIONS = 4
WAITS = (1.0, 4.0, 15.0)  # seconds before each further try that brought nothing new
MAX_BYTES = 1 << 42
_BLOCK = 256 << 10
_RESTARTS = 4
_PATIENCE = 5.0  # seconds for a thread to notice that the download has ended
_RANGE = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15})")
_EXPIRED = (400, 401, 403)  # what a signed address answers when its time is over


def _refused(refusal: Refused) -> WeightsmithError:
    return WeightsmithError(str(refusal))


@dataclass(frozen=True, slots=True)
class Remote:
    """A file to download. where: its name in messages. size: bytes, None if only the server knows.

    identity: hash of the content, if it is known beforehand. secret: headers for the host of `url` alone. refuse: words
    for a refusal. git: also compute git's hash of a blob, by this algorithm.
    """

    url: str
    where: str
    size: int | None = None
    identity: str | None = None
    secret: Mapping[str, str] = field(default_factory=dict, repr=False)
    refuse: Callable[[Refused], WeightsmithError] = _refused
    git: str | None = None


@dataclass(frozen=True, slots=True)
class Arrived:
    """A part that is complete: bytes, SHA-256, git's blob hash if it was asked for, and the server's ETag."""

    size: int
    sha256: str
    git: str | None
    etag: str | None


class _Changed(Exception):  # noqa: N818  (a signal: the part is dropped and begun anew)
    """The server sends another file than before, or no ranges (single)."""

    def __init__(self, *, single: bool) -> None:
        super().__init__()
        self.single = single


def download(remote: Remote, part: Path, ticker: Ticker | None = None) -> Arrived:
    """Bring the file `remote` to `part`, going on from what an earlier run left there; its lock is the caller's.

    Raises what `remote.refuse` makes of a refusal, IntegrityError (the server's size is not the listed one),
    UnsafeInputError (a size that makes no sense, a redirect to where it must not lead), ResourceError (disk), and
    WeightsmithError when the network failed: the part then waits for the next run.
    """
    count = _Counter(ticker)
    single = False
    with disk_errors(part):
        part.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(_RESTARTS):
        try:
            if single:
                return _in_one_stream(remote, part, count, None)
            return _in_chunks(remote, part, count)
        except _Changed as change:
            log.warning("%s: the server %s", remote.where, "sends no ranges" if change.single else "has another file")
            drop(part)
            single = change.single
            count.back()
    raise WeightsmithError("the file keeps changing on the server", path=remote.where, hint="Try again later.")


class _Counter:
    """Bytes on the progress bar, from several threads."""

    def __init__(self, ticker: Ticker | None) -> None:
        self.ticker, self.done = ticker, 0
        self._lock = threading.Lock()

    def __call__(self, nbytes: int) -> None:
        with self._lock:
            self.done += nbytes
            if self.ticker is not None:
                self.ticker.update(nbytes)

    def back(self) -> None:
        self(-self.done)


def _in_chunks(remote: Remote, part: Path, count: _Counter) -> Arrived:
    client, first = Client(), None
    try:
        size: Any = remote.size
        etag: str | None = None
        if remote.identity is None or size is None:
            head = head_of(part) or {}
            size, etag = head.get("size"), head.get("etag")
            if not isinstance(size, int) or (remote.identity is None and not _strong(etag)):
                first = _probe(remote, client)
                size, etag = _announced(first, remote), first.header("ETag")
        by_etag = remote.identity is None
        if first is not None and (first.status == 200 or (by_etag and not _strong(etag))):
            return _in_one_stream(remote, part, count, first)
        together = {"identity": remote.identity, "etag": etag if by_etag else None}
        journal = Journal(part, {"size": size, "chunk": CHUNK, **together})
        try:
            return _Transfer(remote, part, int(size or 0), etag, journal, count).run(client, first)
        finally:
            journal.close()
    finally:
        client.close()


def _probe(remote: Remote, client: Client) -> Answer:
    """The first answer for a file of which only the server knows the size: its first chunk, or all of it."""
    return _patiently(remote, lambda: client.get(remote.url, {"Range": f"bytes=0-{CHUNK - 1}"}, remote.secret))


def _announced(answer: Answer, remote: Remote) -> int | None:
    """The size of the whole file, from a 200 or 206 answer; None when the server does not say."""
    if answer.status == 206:
        match = _RANGE.fullmatch(answer.header("Content-Range") or "")
        if not match or match[1] != "0":
            raise WeightsmithError("the server sends another range than was asked for", path=remote.where)
        size = int(match[3])
    else:
        length = answer.header("Content-Length")
        if length is None:
            return None
        size = int(length) if length.isascii() and length.isdigit() and len(length) < 16 else -1
    if not 0 <= size <= MAX_BYTES:
        raise UnsafeInputError("the announced size makes no sense", path=remote.where)
    return size


def _patiently(remote: Remote, ask: Callable[[], Answer]) -> Answer:
    for wait in (*WAITS, None):
        try:
            return ask()
        except Refused as refusal:
            if refusal.status == 416:
                raise _Changed(single=True) from refusal
            raise remote.refuse(refusal) from refusal
        except Passing as stop:
            if wait is None:
                raise _stopped(remote, stop, 0) from stop
            _told(remote, stop, wait)
            threading.Event().wait(max(wait, stop.wait or 0.0))
    raise AssertionError("unreachable")


def _told(remote: Remote, stop: Passing, wait: float) -> None:
    log.warning("%s: %s; trying again in %.0f s", remote.where, stop, max(wait, stop.wait or 0.0))


def _stopped(remote: Remote, stop: Passing, kept: int) -> WeightsmithError:
    return WeightsmithError(
        f"the transfer stopped: {stop}",
        path=remote.where,
        hint=f"Run the same command again; {kept} bytes of this file are kept and will not be fetched twice.",
    )


class _Transfer:
    """The threads that fetch one file of known size, and the caller's that follows them."""

    def __init__(
        self, remote: Remote, part: Path, size: int, etag: str | None, journal: Journal, count: _Counter
    ) -> None:
        self.remote, self.part, self.size, self.etag = remote, part, size, etag
        self.journal, self.count = journal, count
        self.chunks = cut(size, CHUNK)
        self.old = {chunk: journal.known[chunk] for chunk in self.chunks if chunk in journal.known}
        self.board = Board(self.chunks, set(self.old))
        self.clients: list[Client] = []
        self.located: str | None = None  # where redirects led, off the host of the token
        self.handle = -1

    def run(self, client: Client, first: Answer | None) -> Arrived:
        """Fetch what is missing and return the hashes of the whole; `first` is the answer for the first chunk."""
        with disk_errors(self.part):
            self.handle = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        threads: list[threading.Thread] = []
        try:
            need_space(self.part.parent, self.size - 512 * os.fstat(self.handle).st_blocks)
            with disk_errors(self.part):
                os.ftruncate(self.handle, self.size)
            self.count(sum(chunk.size for chunk in self.old))
            threads = self._start(client, first)
            found = self._follow()
            with disk_errors(self.part):
                os.fsync(self.handle)
            return found
        except BaseException as error:
            self.board.fail(error)
            for one in self.clients:
                one.interrupt()
            raise
        finally:
            self.board.end()
            for thread in threads:
                thread.join(_PATIENCE)
            for one in self.clients:
                one.close()
            if not any(thread.is_alive() for thread in threads):  # else it might still write where the handle leads
                os.close(self.handle)

    def _start(self, client: Client, first: Answer | None) -> list[threading.Thread]:
        threads = []
        # One more thread than chunks are missing would only wait; but an old chunk may turn out bad, so one at least.
        for number in range(max(1, min(CONNECTIONS, self.board.missing))):
            self.clients.append(client if number == 0 else Client())
            answer = first if number == 0 and self.chunks and self.chunks[0] not in self.old else None
            thread = threading.Thread(target=self._work, args=(self.clients[-1], answer), daemon=True)
            self.board.join()
            thread.start()
            threads.append(thread)
        return threads

    def _work(self, client: Client, first: Answer | None) -> None:
        try:
            while (chunk := self.board.take()) is not None:
                if not self._fetch(client, chunk, first):
                    return
                first = None
                self.board.finish(chunk)
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001  (the caller's thread raises it)
            self.board.fail(error)

    def _fetch(self, client: Client, chunk: Chunk, answer: Answer | None) -> bool:
        """Fetch one chunk, as often as it takes; False if this connection was given up and others go on."""
        digest, at, waits = hashlib.sha256(), chunk.start, list(WAITS)
        while at < chunk.stop:
            before = at
            try:
                answer = answer or self._ask(client, at, chunk)
                for nbytes in self._copied(answer, at, chunk.stop, digest):
                    at += nbytes
                if at < chunk.stop:
                    raise Passing(f"the body ended {chunk.stop - at} bytes early")
            except Passing as stop:
                if answer is not None:
                    client.drop(answer.url)
                waits = list(WAITS) if at > before else waits
                if not waits:
                    if self.board.leave(chunk):
                        self.count(chunk.start - at)
                        log.info("%s: %s; going on with fewer connections", self.remote.where, stop)
                        return False
                    raise _stopped(self.remote, stop, self._kept()) from stop
                _told(self.remote, stop, waits[0])
                self.board.pause(max(waits.pop(0), stop.wait or 0.0))
            answer = None
        self.journal.add(chunk, digest.hexdigest())
        return True

    def _kept(self) -> int:
        return sum(chunk.size for chunk in self.chunks if self.board.is_done(chunk))

    def _ask(self, client: Client, at: int, chunk: Chunk) -> Answer:
        """The answer with the bytes from `at` to the end of `chunk`."""
        whole = at == 0 and chunk.stop == self.size
        headers = {} if whole else {"Range": f"bytes={at}-{chunk.stop - 1}"}
        if self.remote.identity is None and self.etag is not None and not whole:
            headers["If-Range"] = self.etag
        located = self.located
        try:
            answer = client.get(located or self.remote.url, headers, None if located else self.remote.secret)
        except Refused as refusal:
            signed = origin(refusal.url) != origin(self.remote.url) and refusal.status in _EXPIRED
            if located or signed:
                self.located = None  # the next try is told a fresh one
                raise Passing(f"the address that was given has expired ({refusal})") from refusal
            if refusal.status == 416:
                raise self._other_size("less than was asked for") from refusal
            raise self.remote.refuse(refusal) from refusal
        if self.located is None and origin(answer.url) != origin(self.remote.url):
            self.located = answer.url
        self._check(answer, at, chunk, whole=whole)
        return answer

    def _check(self, answer: Answer, at: int, chunk: Chunk, *, whole: bool) -> None:
        """Raise unless `answer` brings what was asked for."""
        if answer.status == 200 and not whole:
            etag = answer.header("ETag")
            raise _Changed(single=self.remote.identity is not None or etag is None or etag == self.etag)
        if answer.status == 206:
            match = _RANGE.fullmatch(answer.header("Content-Range") or "")
            if not match or int(match[1]) != at or int(match[2]) >= chunk.stop:
                raise WeightsmithError("the server sends another range than was asked for", path=self.remote.where)
            if int(match[3]) != self.size:
                raise self._other_size(match[3])
        else:
            length = answer.header("Content-Length")
            if length is not None and length != str(self.size):
                raise self._other_size(length)
        if self.remote.identity is None and answer.header("ETag") not in (None, self.etag):
            raise _Changed(single=False)

    def _other_size(self, found: str) -> Exception:
        if self.remote.identity is None:
            return _Changed(single=False)
        return IntegrityError(
            f"the server has {found[:20]} bytes, {self.size} are listed",
            path=self.remote.where,
            hint="The server or something between delivers another file than it lists. Nothing was kept.",
        )

    def _copied(self, answer: Answer, at: int, stop: int, digest: Any) -> Iterator[int]:
        """Write the body from `at` on, but not beyond `stop`; yields the bytes of each block."""
        buffer = memoryview(bytearray(min(_BLOCK, stop - at)))
        while at < stop:
            nbytes = answer.read_into(buffer[: stop - at])
            if not nbytes:
                return
            digest.update(buffer[:nbytes])
            with disk_errors(self.part):
                written = 0
                while written < nbytes:
                    written += os.pwrite(self.handle, buffer[written:nbytes], at + written)
            at += nbytes
            self.count(nbytes)
            self.board.go_on()
            yield nbytes
        if answer.read_into(memoryview(bytearray(1))):
            raise self._other_size("more")

    def _follow(self) -> Arrived:
        """Hash the file from its front as far as it is written; prove chunks of earlier runs on the way."""
        whole, git = hashlib.sha256(), _git(self.remote.git, self.size)
        for chunk in self.chunks:
            self.board.wait_for(chunk)
            if chunk in self.old:
                found = hashlib.sha256()
                for block in self._read(chunk):
                    found.update(block)
                if found.hexdigest() != self.old.pop(chunk):
                    log.warning("%s: kept bytes are damaged; fetching them again", self.remote.where)
                    self.count(-chunk.size)
                    self.board.redo(chunk)
                    self.board.wait_for(chunk)
            for block in self._read(chunk):
                whole.update(block)
                if git is not None:
                    git.update(block)
        return Arrived(self.size, whole.hexdigest(), git.hexdigest() if git is not None else None, self.etag)

    def _read(self, chunk: Chunk) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(min(_BLOCK, chunk.size)))
        at = chunk.start
        while at < chunk.stop:
            with disk_errors(self.part):
                nbytes = os.preadv(self.handle, [buffer[: chunk.stop - at]], at)
            if not nbytes:
                raise IntegrityError("the unfinished download was cut short", path=self.part, hint="Run it again.")
            yield buffer[:nbytes]
            at += nbytes


def _in_one_stream(remote: Remote, part: Path, count: _Counter, first: Answer | None) -> Arrived:
    """The file from its first byte to its last in one answer, again and again until it is whole."""
    client = Client()
    waits = list(WAITS)
    drop(part)
    if first is not None and first.status != 200:
        first = None  # an answer with a range of a file that cannot be resumed
    try:
        while True:
            try:
                answer = first or client.get(remote.url, {}, remote.secret)
                return _streamed(remote, part, count, answer)
            except Refused as refusal:
                raise remote.refuse(refusal) from refusal
            except Passing as stop:
                first = None
                client.close()
                count.back()
                if not waits:
                    raise _stopped(remote, stop, 0) from stop
                _told(remote, stop, waits[0])
                threading.Event().wait(max(waits.pop(0), stop.wait or 0.0))
    finally:
        client.close()


def _streamed(remote: Remote, part: Path, count: _Counter, answer: Answer) -> Arrived:
    size = _announced(answer, remote)
    if remote.size is not None and size is not None and size != remote.size:
        raise IntegrityError(f"the server has {size} bytes, {remote.size} are listed", path=remote.where)
    limit = remote.size if size is None else size
    need_space(part.parent, limit or 0)
    whole, git, done = hashlib.sha256(), _git(remote.git, limit or 0), 0
    buffer = memoryview(bytearray(_BLOCK))
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with disk_errors(part):
        handle = os.open(part, flags, 0o666)
    try:
        while nbytes := answer.read_into(buffer):
            done += nbytes
            if done > (MAX_BYTES if limit is None else limit):
                raise IntegrityError(f"the server sends more than {limit} bytes", path=remote.where)
            whole.update(buffer[:nbytes])
            if git is not None:
                git.update(buffer[:nbytes])
            with disk_errors(part):
                written = 0
                while written < nbytes:
                    written += os.write(handle, buffer[written:nbytes])
            count(nbytes)
        with disk_errors(part):
            os.fsync(handle)
    finally:
        os.close(handle)
    if limit is not None and done != limit:
        raise Passing(f"{done} of {limit} bytes arrived")
    return Arrived(done, whole.hexdigest(), git.hexdigest() if git is not None else None, answer.header("ETag"))


def _git(algorithm: str | None, size: int) -> Any:
    """Git's hash of a blob, begun; None if nobody asks for it."""
    return None if algorithm is None else hashlib.new(algorithm, b"blob %d\0" % size, usedforsecurity=False)


def _strong(etag: object) -> bool:
    return isinstance(etag, str) and len(etag) <= 1024 and etag.startswith('"') and etag.isprintable()
