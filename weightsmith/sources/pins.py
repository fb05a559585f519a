"""What a lock says a checkpoint consists of, held against what a source offers or delivered."""

from __future__ import annotations

from collections.abc import Mapping

from weightsmith.errors import IntegrityError

# Bytes and SHA-256 by path; a hash that the source does not list is None and is compared when the bytes are here.
Files = Mapping[str, tuple[int, str | None]]


def check(expected: Files, found: Files, *, where: str) -> None:
    """Raise IntegrityError naming the first path in which `found` differs from `expected`, and how."""
    for path in sorted({*expected, *found}):
        if path not in found:
            raise _drift(where, path, "missing", _shown(expected[path]))
        if path not in expected:
            raise _drift(where, path, _shown(found[path]), "no such file")
        (size, sha256), (wanted_size, wanted) = found[path], expected[path]
        if size != wanted_size or (sha256 is not None and wanted is not None and sha256 != wanted):
            raise _drift(where, path, _shown(found[path]), _shown(expected[path]))


def _drift(where: str, path: str, found: str, expected: str) -> IntegrityError:
    return IntegrityError(
        f"{path}: found {found}, the lock says {expected}",
        path=where,
        hint="Nothing was changed. If the new files are wanted, pull them without --locked and write the lock anew.",
    )


def _shown(file: tuple[int, str | None]) -> str:
    return f"{file[0]} bytes" + (f" with sha256 {file[1]}" if file[1] else "")
