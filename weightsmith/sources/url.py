"""One file over https, resumed across runs, with the standard library's client.

What has arrived lies in HOME/downloads/KEY/ (KEY: hash of the URL) with the server's strong ETag beside it. A further
run asks for the rest with `Range` and `If-Range` (RFC 9110, sections 13.1.5 and 14.2): a server whose file has changed
then sends all of it, and the part starts over, so a file is never spliced from two versions. Without a strong ETag
nothing is resumed. The result is checked against the announced size and the pin `#sha256=`, if there is one.

No token, cookie or password is ever sent. Redirects lead to https only, and from the outside never into this machine.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from weightsmith._version import __version__
from weightsmith.atomic import disk_errors, need_space, write_text
from weightsmith.errors import AccessError, IntegrityError, NotFoundError, UnsafeInputError, WeightsmithError
from weightsmith.progress import Ticker, progress
from weightsmith.safename import check_name
from weightsmith.sources.source import Fetched, FetchedFile, Source, bare_url, check_url, is_loopback
from weightsmith.store import CHUNK, locked, sha256_file

log = logging.getLogger(__name__)

WAITS = (1.0, 4.0, 15.0)  # seconds before each further try that brought nothing new
TIMEOUT = 60.0
MAX_BYTES = 1 << 42
MAX_REDIRECTS = 5
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class _Passing(Exception):  # noqa: N818  (a signal, not an error: the loop in `fetch` tries again)
    """The transfer stopped for a reason that may pass."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A download in the making: the bytes so far, and what they are a part of."""

    path: Path
    note: Path

    def have(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def etag(self) -> str | None:
        try:
            note = json.loads(self.note.read_text("utf-8"))
        except (OSError, ValueError):
            return None
        etag = note.get("etag") if isinstance(note, dict) else None
        return etag if isinstance(etag, str) and _strong(etag) else None

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = MAX_REDIRECTS

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        check_url(newurl, from_loopback=is_loopback(req.full_url))
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(source: Source, into: Path, *, home: Path, offline: bool = False) -> Fetched:
    """Fetch the one file of `source` (kind "url") into folder `into`; `home` is the catalog's folder.

    Raises NotFoundError, AccessError, IntegrityError (pin or size), UnsafeInputError (a redirect to where it must not
    lead, or no weights), and WeightsmithError when the network failed; the part is then kept for the next run.
    """
    where = bare_url(source.target)
    name = str(check_name(unquote(urlsplit(source.target).path.rsplit("/", 1)[-1]), path=where))
    if not name.endswith((".gguf", ".safetensors")):
        raise UnsafeInputError(
            f"{name!r} is neither .gguf nor .safetensors", path=where, hint="Others are not fetched."
        )
    if offline:
        raise NotFoundError("offline", path=where, hint="Run without --offline.")
    folder = home / "downloads" / hashlib.sha256(source.target.encode()).hexdigest()[:32]
    with locked(folder / ".lock"):
        part = _Part(folder / "data.part", folder / "note.json")
        with progress(f"pull {name}", 0) as ticker:
            etag = _until_done(source.target, part, ticker)
        size, sha256 = part.have(), sha256_file(part.path)
        if source.sha256 is not None and sha256 != source.sha256:
            part.drop()
            raise IntegrityError(
                f"sha256 is {sha256}, {source.sha256} is pinned", path=where, hint="The server's file is another one."
            )
        with disk_errors(into / name):
            shutil.move(part.path, into / name)
        part.drop()
    origin = {"kind": "url", "source": where, "url": where, "etag": etag, "pinned": source.sha256 is not None}
    return Fetched(into, (FetchedFile(name, size, sha256),), origin)


def _until_done(url: str, part: _Part, ticker: Ticker) -> str | None:
    waits = list(WAITS)
    while True:
        before = part.have()
        try:
            return _transfer(url, part, ticker)
        except _Passing as stop:
            if part.have() > before and part.etag() is not None:
                waits = list(WAITS)  # it moves: patience starts over
            if not waits:
                kept = part.have() if part.etag() is not None else 0
                raise WeightsmithError(
                    f"the transfer stopped: {stop}",
                    path=bare_url(url),
                    hint=f"Run the same command again; {kept} bytes are kept and will not be fetched twice.",
                ) from stop
            wait = waits.pop(0)
            log.warning("%s: %s; trying again in %.0f s", bare_url(url), stop, wait)
            time.sleep(wait)


def _transfer(url: str, part: _Part, ticker: Ticker) -> str | None:
    """One request for what is missing; returns the ETag once the part is whole, raises _Passing when it is not."""
    have, etag = part.have(), part.etag()
    headers = {"Accept-Encoding": "identity", "User-Agent": f"weightsmith/{__version__}"}
    if have and etag:
        headers |= {"Range": f"bytes={have}-", "If-Range": etag}
    with _open(urllib.request.Request(url, headers=headers), part) as response:
        coding = response.headers.get("Content-Encoding", "identity")
        if coding != "identity":
            raise WeightsmithError(f"the server insists on encoding {coding!r}", path=bare_url(url))
        new_etag = response.headers.get("ETag")
        size = _announced(response, have, url)
        if response.status != 206:
            part.drop()
            have = 0
        elif new_etag not in (None, etag):
            part.drop()
            raise _Passing("the file changed on the server")
        if new_etag is not None and _strong(new_etag):
            write_text(part.note, json.dumps({"etag": new_etag, "url": bare_url(url)}))
        if size is not None:
            need_space(part.path.parent, size - have)
        _copy(response, part, (MAX_BYTES if size is None else size) - have, ticker)
    if size is not None and part.have() != size:
        raise _Passing(f"{part.have()} of {size} bytes arrived")
    return new_etag or etag


def _open(request: urllib.request.Request, part: _Part) -> http.client.HTTPResponse:
    where = bare_url(request.full_url)
    try:
        opened: http.client.HTTPResponse = urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT)
        return opened
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            part.drop()
            raise _Passing("the server has no such range") from error
        if error.code in (401, 403):
            raise AccessError(f"the server refuses (HTTP {error.code})", path=where) from error
        if error.code in (404, 410):
            raise NotFoundError(f"no such file (HTTP {error.code})", path=where) from error
        if error.code in (408, 429) or error.code >= 500:
            raise _Passing(f"HTTP {error.code}") from error
        raise WeightsmithError(f"HTTP {error.code}", path=where) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Passing(f"no connection ({type(getattr(error, 'reason', error)).__name__})") from error


def _announced(response: http.client.HTTPResponse, have: int, url: str) -> int | None:
    """The size of the whole file, from a 200 or 206 answer; None when the server does not say."""
    if response.status == 206:
        match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if not match or int(match[1]) != have or int(match[2]) + 1 != int(match[3]):
            raise WeightsmithError("the server sends another range than was asked for", path=bare_url(url))
        size = int(match[3])
    elif response.status == 200:
        length = response.headers.get("Content-Length")
        if length is None:
            return None
        size = int(length) if length.isascii() and length.isdigit() else -1
    else:
        raise WeightsmithError(f"HTTP {response.status} instead of a file", path=bare_url(url))
    if not 0 <= size <= MAX_BYTES:
        raise UnsafeInputError("the announced size makes no sense", path=bare_url(url))
    return size


def _copy(response: http.client.HTTPResponse, part: _Part, limit: int, ticker: Ticker) -> None:
    with disk_errors(part.path):
        out = os.open(part.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        while limit > 0:
            try:
                block = response.read(min(CHUNK, limit))
            except (OSError, http.client.HTTPException) as error:
                raise _Passing(f"the connection broke ({type(error).__name__})") from error
            if not block:
                return
            with disk_errors(part.path):
                view = memoryview(block)
                while view:
                    view = view[os.write(out, view) :]
            limit -= len(block)
            ticker.update(len(block))
    finally:
        with disk_errors(part.path):
            os.fsync(out)
            os.close(out)


def _strong(etag: str) -> bool:
    return len(etag) <= 1024 and etag.startswith('"') and etag.isprintable()
