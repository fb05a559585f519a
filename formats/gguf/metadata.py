"""GGUF's key-value metadata, decoded when asked for.

Types are strict in the reference loader (a u32 key stored as u64 fails there), so `pack` writes exactly the expected
ones. Reading is milder: any integer type will do for an integer, either float type for a float; what cannot be meant
(a negative count, a string where a number belongs) is damage and names its key.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats.gguf.parse import AGAIN, ARRAY, BOOL, F64, SCALARS, STRING, Entry, Header

MAX_LAYERS = 65536

_U64 = struct.Struct("<Q").unpack_from


class Metadata(Mapping[str, Any]):
    """The keys of one header in file order: int, float, bool, str, or a list of one of them.

    A string that is not UTF-8 is shown with replacement characters here, and is damage to `text` and `texts`.
    """

    def __init__(self, header: Header) -> None:
        self.header = header
        self._known: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.header.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.header.entries)

    def __contains__(self, key: object) -> bool:
        return key in self.header.entries

    def __getitem__(self, key: str) -> Any:
        if key not in self._known:
            self._known[key] = self._decode(key, self.header.entries[key], "replace")
        return self._known[key]

    def raw(self, key: str) -> bytes:
        """The whole entry as it lies in the file: key, type and value."""
        entry = self.header.entries[key]
        return self._bytes(entry.start, entry.stop)

    def count(self, key: str) -> int | None:
        """Items of an array, without decoding it; None if `key` is absent or no array."""
        entry = self.header.entries.get(key)
        return entry.count if entry is not None and entry.kind == ARRAY else None

    def integer(self, key: str, default: int | None = None) -> int | None:
        """A count; a per-layer array of equal counts is one count. UnsupportedError where layers differ."""
        value = self._number(key)
        if value is None:
            return default
        if not isinstance(value, int) or value < 0:
            raise self.damaged(key, f"is {value!r}, expected a count")
        return value

    def number(self, key: str, default: float | None = None) -> float | None:
        """A float. A float32 comes back as the shortest decimal that is stored the same, so 1e-5 stays 1e-05."""
        value = self._number(key)
        if value is None:
            return default
        if not np.isfinite(value):
            raise self.damaged(key, f"is {value!r}, expected a finite number")
        if isinstance(value, float) and self.header.entries[key].kind != F64:
            return shortest(value)
        return float(value)

    def flag(self, key: str) -> bool | None:
        """A bool, None if absent."""
        entry = self.header.entries.get(key)
        if entry is None:
            return None
        if entry.kind != BOOL:
            raise self.damaged(key, f"has value type {entry.kind}, expected {BOOL} (bool)")
        return bool(self[key])

    def text(self, key: str) -> str | None:
        """A string, None if absent."""
        entry = self.header.entries.get(key)
        if entry is None:
            return None
        if entry.kind != STRING:
            raise self.damaged(key, f"has value type {entry.kind}, expected {STRING} (string)")
        value: str = self._decode(key, entry, "strict")
        return value

    def texts(self, key: str) -> list[str] | None:
        """An array of strings, None if absent."""
        entry = self.header.entries.get(key)
        if entry is None:
            return None
        if entry.kind != ARRAY or entry.item != STRING:
            raise self.damaged(key, "is no array of strings")
        value: list[str] = self._decode(key, entry, "strict")
        return value

    def numbers(self, key: str) -> list[Any] | None:
        """An array of integers or floats, None if absent."""
        entry = self.header.entries.get(key)
        if entry is None:
            return None
        if entry.kind != ARRAY or entry.item in (STRING, BOOL):
            raise self.damaged(key, "is no array of numbers")
        value: list[Any] = self._decode(key, entry, "strict")
        return value

    def damaged(self, key: str, message: str) -> IntegrityError:
        """An error that names the file and `key`."""
        return IntegrityError(f"key {key!r}: {message}", path=self.header.path, hint=AGAIN)

    def _number(self, key: str) -> int | float | None:
        entry = self.header.entries.get(key)
        if entry is None:
            return None
        kind = entry.item if entry.kind == ARRAY else entry.kind
        if kind in (STRING, BOOL):
            raise self.damaged(key, f"has value type {kind}, expected a number")
        if entry.kind != ARRAY:
            value: int | float = self[key]
            return value
        if not 1 <= entry.count <= MAX_LAYERS:
            raise self.damaged(key, f"has {entry.count} items, expected one for each layer")
        values = set(self._decode(key, entry, "strict"))
        if len(values) != 1:
            raise UnsupportedError(f"key {key!r}: layers differ, which no known family does", path=self.header.path)
        return next(iter(values))  # type: ignore[no-any-return]

    def _decode(self, key: str, entry: Entry, errors: str) -> Any:
        raw = self._bytes(entry.body, entry.stop)
        kind = entry.item if entry.kind == ARRAY else entry.kind
        values: list[Any]
        try:
            if kind == STRING:
                values = _strings(raw, entry.count, errors)
            else:
                values = np.frombuffer(raw, SCALARS[kind], entry.count).tolist()
                if kind == BOOL:
                    values = [bool(value) for value in values]
        except UnicodeDecodeError as error:
            raise self.damaged(key, f"is not UTF-8: {error.object[error.start : error.start + 8]!r}") from None
        return values if entry.kind == ARRAY else values[0]

    def _bytes(self, start: int, stop: int) -> bytes:
        # The file is opened anew, so metadata outlives the reader and holds no handle.
        with self.header.path.open("rb") as file:
            file.seek(start)
            raw = file.read(stop - start)
        if len(raw) != stop - start:
            raise IntegrityError("the file became shorter while it was read", path=self.header.path)
        return raw


def _strings(raw: bytes, count: int, errors: str) -> list[str]:
    values, at = [], 0
    for _ in range(count):
        begin = at + 8
        at = begin + _U64(raw, at)[0]
        values.append(raw[begin:at].decode("utf-8", errors))
    return values


def shortest(value: float) -> float:
    """The float64 whose decimal form is the shortest that rounds to the float32 `value`."""
    return float(str(np.float32(value)))
