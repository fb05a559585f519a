"""Importance matrices: how strongly each input channel of each matrix is used, as llama-imatrix measures it.

For a matrix with input x the file holds, per channel, the sum of x^2 over tokens, and the number of tokens: the
diagonal of the input's second moment. Routed experts see different tokens, so a stack of them has one row of sums and
one count for each. Names are GGUF's.

| GGUF form | |
|---|---|
| general.type | "imatrix" |
| imatrix.datasets, .chunk_count, .chunk_size | array of strings, u32, u32: texts, windows, tokens of a window |
| NAME.in_sum2 | F32 [n_mat, n_in], sums of squares |
| NAME.counts | F32 [n_mat, 1], tokens |

Tensors are sorted by name, a trailing dimension of 1 is left out as ggml does. The legacy form (.dat, little endian):

    i32 n_entries, then for each: i32 length, name, i32 calls, i32 n_values, n_values x f32 (mean of x^2, times calls)
    optional: i32 chunk_count, optional: i32 length, dataset

It counts windows, not tokens, knows no experts (their rows follow each other under one count) and leaves `chunk_size`
0. Both are read, GGUF is written. Every count is held against the file's size before anything is allocated.

Ref: llama.cpp tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp, tools/quantize/quantize.cpp (load_imatrix).
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from weightsmith.atomic import AtomicFile
from weightsmith.errors import AccessError, IntegrityError, NotFoundError, UnsupportedError, UsageError
from weightsmith.formats.gguf import pack
from weightsmith.formats.gguf.metadata import Metadata
from weightsmith.formats.gguf.parse import MAGIC, MAX_NAME, STRING, padded, read_header
from weightsmith.types import TensorInfo

Floats = NDArray[np.float32] | NDArray[np.float64]

DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
SUMS, COUNTS = ".in_sum2", ".counts"
MAX_COUNT = 1 << 53  # tokens; more is no count
MAX_DATASET = 1 << 16  # bytes
SMALLEST_LEGACY = 4 + 1 + 4 + 4 + 4
AGAIN = "Measure it again; it cannot be repaired."


class Entry(NamedTuple):
    """What was measured of one tensor. sums: float [n_mat, n_in], of squares; counts: int64 [n_mat]."""

    sums: Floats
    counts: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Imatrix:
    """entries: by GGUF name. datasets: what was read. chunk_count: windows; chunk_size: tokens of one, 0 if unknown."""

    entries: Mapping[str, Entry]
    datasets: Sequence[str] = field(default_factory=tuple)
    chunk_count: int = 0
    chunk_size: int = 0

    def importance(self, name: str, row_len: int, *, matrices: int | None = None) -> NDArray[np.float32]:
        """Mean squares of tensor `name`: float32 [row_len], or [n_mat, row_len] for a stack; ones where none was seen.

        `matrices` is the stack's height where the tensor's shape says it; else what the entry says.
        Raises NotFoundError (nothing was measured) and UsageError (measured on a tensor of another shape).
        """
        entry = self.entries.get(name)
        if entry is None:
            raise NotFoundError("the imatrix has no entry for it", tensor=name, hint="Was it made from this model?")
        sums, counts = entry
        height = len(counts) if matrices is None else matrices
        if sums.size != height * row_len or len(counts) not in (1, height):
            stack = f"{len(counts)} x " if len(counts) > 1 else ""
            raise UsageError(
                f"the imatrix has {stack}{sums.shape[1]} values for it, expected {height} x {row_len}",
                tensor=name,
                hint="It was made from another model.",
            )
        # In float32, as llama-quantize divides.
        seen = np.broadcast_to(counts, (height,)).astype(np.float32)[:, None]
        squares = sums.reshape(height, row_len).astype(np.float32)
        means = np.divide(squares, seen, out=np.ones_like(squares), where=seen > 0)
        return means[0] if height == 1 else means

    def digest(self) -> str:
        """SHA-256 over what was measured (names, sums, counts as they are stored), not over where or of what."""
        found = hashlib.sha256()
        for name in _sorted(self.entries):
            sums, counts = self.entries[name]
            found.update(struct.pack("<QQQ", len(name.encode()), *sums.shape) + name.encode())
            found.update(np.ascontiguousarray(sums, "<f4").tobytes() + counts.astype("<f4").tobytes())
        return found.hexdigest()


def read(path: Path) -> Imatrix:
    """Read a GGUF or a legacy file.

    Raises NotFoundError, AccessError, UnsupportedError (GGUF, but no imatrix), IntegrityError (damaged or hostile,
    or values that are no sums of squares, naming the entry).
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not S_ISREG(status.st_mode):
                raise UnsupportedError("not a regular file", path=path)
            if file.read(len(MAGIC)) == MAGIC:
                return _read_gguf(path)
            if status.st_size < 4:
                raise IntegrityError(f"{status.st_size} bytes are no imatrix", path=path, hint=AGAIN)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _legacy(_Cursor(data, path))
    except FileNotFoundError as error:
        raise NotFoundError("no such file", path=path) from error
    except OSError as error:
        raise AccessError(f"cannot read: {error.strerror or error}", path=path) from error


def write(path: Path, imatrix: Imatrix, *, overwrite: bool = False) -> Path:
    """Write the GGUF form, by rename; the same content gives the same bytes.

    Raises UsageError (nothing to write), IntegrityError (values that are no sums of squares), UnsupportedError (a name
    that is too long), OutputExistsError, ResourceError.
    """
    if not imatrix.entries:
        raise UsageError("an imatrix without entries", path=path)
    keys = [
        pack.text("general.type", "imatrix"),
        pack.array(DATASETS, STRING, imatrix.datasets),
        pack.u32(CHUNK_COUNT, imatrix.chunk_count),
        pack.u32(CHUNK_SIZE, imatrix.chunk_size),
    ]
    parts: list[tuple[TensorInfo, NDArray[np.float32]]] = []
    for name in _sorted(imatrix.entries):
        sums, counts = imatrix.entries[name]
        with np.errstate(over="ignore"):
            stored = np.asarray(sums, "<f4"), np.asarray(counts, "<f4")
        _check(name, stored[0], stored[1], path)
        for suffix, value, width in zip((SUMS, COUNTS), stored, (sums.shape[1], 1), strict=True):
            shape = (len(counts), width) if len(counts) > 1 else (width,)
            parts.append((TensorInfo(name + suffix, shape, "F32", value.nbytes), value))
    header = pack.header([key.pack() for key in keys], [info for info, _ in parts])
    file = AtomicFile(path, len(header) + sum(padded(info.nbytes) for info, _ in parts), overwrite=overwrite)
    try:
        file.write(0, header)
        offset = len(header)
        for info, value in parts:
            file.write(offset, value.tobytes())
            offset += padded(info.nbytes)
    except BaseException:
        file.abort()
        raise
    return file.commit()


def merge(imatrices: Sequence[Imatrix]) -> Imatrix:
    """One imatrix as if measured on all texts in turn: sums (in float64) and counts add up.

    A legacy file counts windows; beside others its windows are taken to have the others' length.
    Raises UsageError (none, or entries of different shapes).
    """
    if not imatrices:
        raise UsageError("no imatrix to merge")
    size = next((one.chunk_size for one in imatrices if one.chunk_size), 0)
    total: dict[str, Entry] = {}
    for one in imatrices:
        scale = 1 if one.chunk_size else size or 1
        for name, (sums, counts) in one.entries.items():
            entry = Entry(sums.astype(np.float64) * scale, counts * scale)
            total[name] = _added(name, total[name], entry) if name in total else entry
    datasets = [text for one in imatrices for text in one.datasets]
    chunks = sum(one.chunk_count * (one.chunk_size or size or 1) for one in imatrices) // (size or 1)
    return Imatrix({name: total[name] for name in _sorted(total)}, datasets, chunks, size)


def _added(name: str, one: Entry, other: Entry) -> Entry:
    # A legacy stack of experts lies in one row under one count; that count then holds for each.
    if len(other.counts) > len(one.counts):
        one, other = other, one
    height, width = one.sums.shape
    if other.sums.size != one.sums.size or len(other.counts) not in (1, height):
        raise UsageError(
            f"measured as {one.sums.shape} and as {other.sums.shape}", tensor=name, hint="Merge files of one model."
        )
    return Entry(one.sums + other.sums.reshape(height, width), one.counts + other.counts)


def _sorted(names: Mapping[str, Entry]) -> list[str]:
    return sorted(names, key=str.encode)


def _check(name: str, sums: Floats, counts: Floats, path: Path) -> None:
    """Raise IntegrityError for what is no sum of squares and no count."""
    for values, what in ((sums, "sums"), (counts, "counts")):
        bad = ~(np.isfinite(values) & (values >= 0))
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            text = f"its {what} hold {values.flat[at]} at {at}, expected finite numbers from 0 on"
            raise IntegrityError(text, path=path, tensor=name, hint=AGAIN)
    if counts.max(initial=0) > MAX_COUNT:
        raise IntegrityError(f"{counts.max()} is no count", path=path, tensor=name, hint=AGAIN)


def _read_gguf(path: Path) -> Imatrix:
    header = read_header(path)
    metadata = Metadata(header)
    kind = metadata.text("general.type")
    if kind != "imatrix" and (kind is not None or CHUNK_COUNT not in metadata):
        raise UnsupportedError(f"not an imatrix: general.type is {kind!r}", path=path)
    datasets = metadata.texts(DATASETS)
    chunks, size = metadata.integer(CHUNK_COUNT), metadata.integer(CHUNK_SIZE)
    if datasets is None or chunks is None or size is None:
        missing = next(key for key in (DATASETS, CHUNK_COUNT, CHUNK_SIZE) if key not in metadata)
        raise metadata.damaged(missing, "is missing")
    pairs: dict[str, dict[str, TensorInfo]] = {}
    for full, info in header.tensors.items():
        for suffix in (SUMS, COUNTS):
            if full.endswith(suffix) and full != suffix:
                pairs.setdefault(full.removesuffix(suffix), {})[suffix] = info
    if not pairs:
        raise IntegrityError("holds no entries", path=path, hint=AGAIN)
    with path.open("rb") as file:
        entries = {name: _pair(name, pair, file, path) for name, pair in pairs.items()}
    return Imatrix(entries, datasets, chunks, size)


def _pair(name: str, pair: Mapping[str, TensorInfo], file: BufferedReader, path: Path) -> Entry:
    for suffix in (SUMS, COUNTS):
        if suffix not in pair:
            raise IntegrityError(f"{name + suffix} is missing", path=path, tensor=name, hint=AGAIN)
        if pair[suffix].codec != "F32":
            raise IntegrityError(f"{name + suffix} is {pair[suffix].codec}, expected F32", path=path, tensor=name)
    n_values, height = pair[SUMS].n_weights, pair[COUNTS].n_weights
    if n_values % height:
        raise IntegrityError(f"{n_values} sums for {height} counts", path=path, tensor=name, hint=AGAIN)
    values = []
    for suffix in (SUMS, COUNTS):
        info = pair[suffix]
        value = np.empty(info.n_weights, "<f4")
        file.seek(info.offset)
        if file.readinto(value.view(np.uint8).data) != info.nbytes:
            raise IntegrityError("the file became shorter while it was read", path=path, tensor=name)
        values.append(value)
    _check(name, values[0], values[1], path)
    return Entry(values[0].reshape(height, -1), np.rint(values[1]).astype(np.int64))


class _Cursor:
    """A place in a legacy file that moves forward and never past the end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path = data, path
        self.at = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def damaged(self, message: str, name: str | None = None) -> IntegrityError:
        return IntegrityError(message, path=self.path, tensor=name, hint=AGAIN)

    def take(self, nbytes: int, what: str, name: str | None = None) -> bytes:
        if not 0 <= nbytes <= self.left:
            text = f"{what} claims {nbytes} bytes at byte {self.at}, the file has {self.left} left"
            raise self.damaged(text, name)
        self.at += nbytes
        return self.data[self.at - nbytes : self.at]

    def i32(self, what: str, name: str | None = None) -> int:
        value: int = struct.unpack("<i", self.take(4, what, name))[0]
        return value

    def text(self, what: str, limit: int) -> str:
        length = self.i32(f"the length of {what}")
        if not 0 <= length <= limit:
            raise self.damaged(f"{what} is {length} bytes long, at most {limit} are allowed")
        raw = self.take(length, what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is not UTF-8: {raw[:64]!r}") from None


def _legacy(cursor: _Cursor) -> Imatrix:
    n_entries = cursor.i32("the number of entries")
    if n_entries < 1 or n_entries * SMALLEST_LEGACY > cursor.left:
        text = f"claims {n_entries} entries, but only {cursor.left} bytes follow"
        raise IntegrityError(text, path=cursor.path, hint="It is neither GGUF nor a legacy imatrix, or it is damaged.")
    entries: dict[str, Entry] = {}
    for index in range(n_entries):
        name = cursor.text(f"the name of entry {index}", MAX_NAME)
        if not name or any(unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") for c in name):
            raise cursor.damaged(f"entry {index} has no proper name: {name!r}")
        if name in entries:
            raise cursor.damaged("appears twice", name)
        calls, n_values = cursor.i32("the number of calls", name), cursor.i32("the number of values", name)
        if calls < 0 or n_values < 1:
            raise cursor.damaged(f"claims {calls} calls and {n_values} values", name)
        sums = np.frombuffer(cursor.take(4 * n_values, "its values", name), "<f4").reshape(1, -1)
        # Old files have 0 calls where few tokens were seen; their values are means.
        counts = np.array([max(calls, 1)], np.int64)
        _check(name, sums, counts.astype(np.float64), cursor.path)
        entries[name] = Entry(sums, counts)
    chunks = cursor.i32("the number of chunks") if cursor.left else 0
    datasets = [cursor.text("the dataset", MAX_DATASET)] if cursor.left else []
    if chunks < 0 or cursor.left:
        raise cursor.damaged(f"{chunks} chunks, and {cursor.left} bytes after the last entry that belong to nothing")
    return Imatrix(entries, [text for text in datasets if text], chunks, 0)
