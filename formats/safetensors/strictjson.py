"""Files and JSON from outside: opened inside their folder only, and read as every parser would read them.

Refused: bytes that are no UTF-8, raw control characters (no JSON string may hold one), duplicate keys (parsers differ
in which of the two they believe), nesting beyond the interpreter's stack, numbers of thousands of digits, and
anything but an object at the top.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from weightsmith.errors import IntegrityError, NotFoundError, UnsafeInputError, WeightsmithError

_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_CHUNK = 1 << 20


def open_regular(path: Path) -> tuple[int, int]:
    """Open `path` for reading: (handle, size in bytes). Refuses pipes and devices, which would block or never end."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        status = os.fstat(handle)
    except FileNotFoundError as error:
        raise NotFoundError("no such file", path=path, hint="Pull the checkpoint again.") from error
    except OSError as error:
        raise WeightsmithError(f"cannot read: {error.strerror}", path=path) from error
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise UnsafeInputError("not a regular file", path=path)
    return handle, status.st_size


def read_text(handle: int, offset: int, nbytes: int, *, path: Path) -> bytes:
    """Read `nbytes` of JSON at `offset`; IntegrityError as soon as a piece holds what no JSON text can hold."""
    pieces = []
    while nbytes:
        piece = os.pread(handle, min(nbytes, _CHUNK), offset)
        if not piece:
            raise IntegrityError("the file ends early", path=path)
        # Piece by piece, so that a large length over a file full of holes costs one piece and not all of it.
        if found := _CONTROL.search(piece):
            raise IntegrityError(f"byte {offset + found.start()} is a control character and no JSON", path=path)
        pieces.append(piece)
        offset, nbytes = offset + len(piece), nbytes - len(piece)
    return b"".join(pieces)


def parse_object(data: bytes, *, path: Path, what: str) -> dict[str, Any]:
    """Parse `data` as one JSON object; IntegrityError names `path` and `what` was being read."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise IntegrityError(f"{what}: the key {twice[:200]!r} occurs twice", path=path)
        return found

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError as error:
        raise IntegrityError(f"{what}: nested too deeply", path=path) from error
    except ValueError as error:
        raise IntegrityError(f"{what} is not valid JSON: {str(error)[:200]}", path=path) from error
    if not isinstance(value, dict):
        raise IntegrityError(f"{what} is a {type(value).__name__}, expected an object", path=path)
    return value


def read_object(path: Path, *, limit: int) -> dict[str, Any]:
    """Read a JSON file of at most `limit` bytes; IntegrityError, NotFoundError or UnsafeInputError."""
    handle, size = open_regular(path)
    try:
        if size > limit:
            raise IntegrityError(f"{size} bytes, expected at most {limit}", path=path)
        data = read_text(handle, 0, size, path=path)
    finally:
        os.close(handle)
    return parse_object(data, path=path, what=path.name)
