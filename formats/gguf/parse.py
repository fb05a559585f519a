"""The header of one GGUF file, every claim in it checked against the file before anything is allocated.

    "GGUF", u32 version, u64 n_tensors, u64 n_keys
    n_keys times:     string key, u32 value type, value
    n_tensors times:  string name, u32 n_dims, n_dims x u64 dims (fastest first), u32 ggml type, u64 offset
    zeros up to a multiple of general.alignment (default 32), then the tensors' bytes

Little endian. A string is a u64 length and that many bytes of UTF-8; an array is a u32 item type, a u64 count and the
items. Offsets count from the start of the data and are the running sum of the padded sizes: the reference loader
accepts nothing else. Values stay in the file: `Entry` says where each lies (`formats.gguf.metadata` decodes them), so
a header costs memory for its names only, and a key can be copied to another file byte for byte.

Ref: docs/gguf.md of ggml-org/ggml; the checks mirror and exceed gguf_init_from_reader in ggml/src/gguf.cpp.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import struct
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from weightsmith.errors import AccessError, IntegrityError, NotFoundError, UnsupportedError
from weightsmith.quant.blocks import BY_ID
from weightsmith.types import TensorInfo

log = logging.getLogger(__name__)

MAGIC = b"GGUF"
POINTER = b"version https://git-lfs.github.com/spec/"
ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_KEY = 65535  # bytes
MAX_NAME = 63  # bytes; ggml's buffer has 64 with its NUL
MAX_DIMS = 4
MAX_STRING = 1 << 30  # bytes, and items of an array: the reference loader's limits
SMALLEST_KEY = 8 + 1 + 4 + 1
SMALLEST_TENSOR = 8 + 1 + 4 + 4 + 8
AGAIN = "Pull or convert the file again; it cannot be repaired."

U16, U32, I32, F32, BOOL, STRING, ARRAY, F64 = 2, 4, 5, 6, 7, 8, 9, 12  # value types; the rest has no name here
# Value type -> struct format of one little-endian value.
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
SIZES = {kind: struct.calcsize(form) for kind, form in SCALARS.items()}

_U32 = struct.Struct("<I").unpack_from
_U64 = struct.Struct("<Q").unpack_from


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one key's value lies. kind: value type; item: type of an array's items, else 0; count: items, else 1.

    start, body, stop: absolute bytes where the entry starts (its key), its value's content starts (an array's first
    item), and where it ends.
    """

    kind: int
    item: int
    count: int
    start: int
    body: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header. entries: keys in file order. tensors: by name, in file order, with absolute offsets."""

    path: Path
    version: int
    size: int
    entries: dict[str, Entry]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Read and check the header of the file at `path`.

    Raises IntegrityError (damaged or hostile, naming key or tensor), UnsupportedError (another version, big endian,
    an unknown ggml type), NotFoundError and AccessError.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not S_ISREG(status.st_mode):
                raise UnsupportedError("not a regular file", path=path)
            if status.st_size < 24:
                raise IntegrityError(
                    f"{status.st_size} bytes are too few for a GGUF header of 24", path=path, hint=AGAIN
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _header(_Cursor(data, path))
    except FileNotFoundError as error:
        raise NotFoundError("no such file", path=path) from error
    except IsADirectoryError as error:
        raise UnsupportedError("a folder, not a file", path=path) from error
    except OSError as error:
        raise AccessError(f"cannot read: {error.strerror or error}", path=path) from error


class _Cursor:
    """A place in a mapped file that moves forward and never past the end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path = data, path
        self.end, self.at = len(data), 0

    @property
    def left(self) -> int:
        return self.end - self.at

    def damaged(self, message: str, *, key: str | None = None, tensor: str | None = None) -> IntegrityError:
        where = f"key {key!r}: " if key is not None else ""
        return IntegrityError(where + message, path=self.path, tensor=tensor, hint=AGAIN)

    def need(self, nbytes: int, what: str, *, key: str | None = None, tensor: str | None = None) -> None:
        if nbytes > self.left:
            text = f"{what} needs {nbytes} bytes at byte {self.at}, the file has {self.left} left"
            raise self.damaged(text, key=key, tensor=tensor)

    def u32(self, what: str, *, key: str | None = None, tensor: str | None = None) -> int:
        self.need(4, what, key=key, tensor=tensor)
        value: int = _U32(self.data, self.at)[0]
        self.at += 4
        return value

    def u64(self, what: str, *, key: str | None = None, tensor: str | None = None) -> int:
        self.need(8, what, key=key, tensor=tensor)
        value: int = _U64(self.data, self.at)[0]
        self.at += 8
        return value

    def name(self, what: str, limit: int) -> str:
        """A key or tensor name: 1 to `limit` bytes of UTF-8 without control characters."""
        length = self.u64(f"the length of {what}")
        if not 1 <= length <= limit:
            raise self.damaged(f"{what} is {length} bytes long, 1 to {limit} are allowed")
        self.need(length, what)
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is not UTF-8: {raw!r}") from None
        if any(unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") for c in text):
            raise self.damaged(f"{what} holds control characters: {text!r}")
        return text


def _header(cursor: _Cursor) -> Header:
    magic = cursor.data[:4]
    if cursor.data[: len(POINTER)] == POINTER:
        raise IntegrityError(
            "a git-LFS pointer, not the weights it stands for",
            path=cursor.path,
            hint="Run `git lfs pull` where it was cloned, or pull the checkpoint with weightsmith.",
        )
    if magic != MAGIC:
        zeros = " (an unfinished file begins with zeros)" if magic == b"\0\0\0\0" else ""
        raise cursor.damaged(f"begins with {magic!r}, not with {MAGIC!r}{zeros}")
    cursor.at = 4
    version = cursor.u32("the version")
    if version and not version & 0xFFFF:
        raise UnsupportedError(
            "a big-endian GGUF file; only little-endian ones are read",
            path=cursor.path,
            hint="Convert it with gguf-convert-endian of the gguf package.",
        )
    if version not in (2, 3):
        raise UnsupportedError(f"GGUF version {version}; versions 2 and 3 are read", path=cursor.path)
    n_tensors, n_keys = cursor.u64("the tensor count"), cursor.u64("the key count")
    if n_keys * SMALLEST_KEY + n_tensors * SMALLEST_TENSOR > cursor.left:
        raise cursor.damaged(f"claims {n_tensors} tensors and {n_keys} keys, but only {cursor.left} bytes follow")
    entries: dict[str, Entry] = {}
    for index in range(n_keys):
        start = cursor.at
        key = cursor.name(f"the name of key {index}", MAX_KEY)
        if key in entries:
            raise cursor.damaged("appears twice", key=key)
        entries[key] = _entry(cursor, key, start)
    alignment = _alignment(cursor, entries.get("general.alignment"))
    tensors = _tensors(cursor, n_tensors, alignment)
    return Header(cursor.path, version, cursor.end, entries, tensors)


def _entry(cursor: _Cursor, key: str, start: int) -> Entry:
    """Step over one value, checking that it lies in the file."""
    kind, item, count = cursor.u32("its type", key=key), 0, 1
    if kind == ARRAY:
        item, count = cursor.u32("its item type", key=key), cursor.u64("its item count", key=key)
        if item == ARRAY:
            raise cursor.damaged("an array of arrays is not allowed", key=key)
        if count > MAX_STRING:
            raise cursor.damaged(f"an array of {count} items, at most {MAX_STRING} are allowed", key=key)
    what = item if kind == ARRAY else kind
    if what in SIZES:
        body = cursor.at
        cursor.need(count * SIZES[what], "its value", key=key)
        cursor.at += count * SIZES[what]
        if what == BOOL and cursor.data[body : cursor.at].translate(None, b"\0\1"):
            raise cursor.damaged("a bool that is neither 0 nor 1", key=key)
    elif what == STRING:
        cursor.need(8 * count, "its value", key=key)
        body = cursor.at
        _step_over_strings(cursor, key, count)
    else:
        raise cursor.damaged(f"unknown value type {what}", key=key)
    return Entry(kind, item, count, start, body, cursor.at)


def _step_over_strings(cursor: _Cursor, key: str, count: int) -> None:
    # A vocabulary has 400,000 of these, so the loop holds everything in local variables.
    data, at, end, u64 = cursor.data, cursor.at, cursor.end, _U64
    for index in range(count):
        if end - at < 8:
            raise cursor.damaged(f"the file ends before string {index} of {count}", key=key)
        length = u64(data, at)[0]
        at += 8
        if length > end - at or length > MAX_STRING:
            text = f"string {index} of {count} claims {length} bytes at byte {at}, the file has {end - at} left"
            raise cursor.damaged(text, key=key)
        at += length
    cursor.at = at


def _alignment(cursor: _Cursor, entry: Entry | None) -> int:
    if entry is None:
        return ALIGNMENT
    key = "general.alignment"
    if entry.kind != U32:
        raise cursor.damaged(f"has value type {entry.kind}, expected {U32} (u32)", key=key)
    value: int = _U32(cursor.data, entry.body)[0]
    if not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise cursor.damaged(f"{value} is no power of two up to {MAX_ALIGNMENT}", key=key)
    return value


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}  # offsets count from the data's start until all are read
    expected = 0
    for index in range(count):
        info = _tensor(cursor, index)
        if info.name in found:
            raise cursor.damaged("appears twice", tensor=info.name)
        _check_offset(cursor, info, expected, alignment)
        expected = padded(info.offset + info.nbytes, alignment)
        found[info.name] = info
    begin = padded(cursor.at, alignment)
    stop = begin
    for name, info in found.items():
        stop = begin + info.offset + info.nbytes
        if stop > cursor.end:
            text = f"needs {info.nbytes} bytes at byte {begin + info.offset}, but the file ends at {cursor.end}"
            raise cursor.damaged(text, tensor=name)
        found[name] = TensorInfo(name, info.shape, info.codec, info.nbytes, cursor.path, begin + info.offset)
    extra = cursor.end - padded(stop, alignment)
    if extra > 0 and found:
        log.warning("%s: %d bytes after the last tensor belong to nothing", cursor.path, extra)
    return found


def _tensor(cursor: _Cursor, index: int) -> TensorInfo:
    name = cursor.name(f"the name of tensor {index}", MAX_NAME)
    n_dims = cursor.u32("its number of dimensions", tensor=name)
    if n_dims > MAX_DIMS:
        raise cursor.damaged(f"has {n_dims} dimensions, at most {MAX_DIMS} are allowed", tensor=name)
    dims = [cursor.u64("its shape", tensor=name) for _ in range(n_dims)]
    if any(dim < 1 for dim in dims) or math.prod(dims) >= 1 << 63:
        raise cursor.damaged(f"impossible shape {tuple(reversed(dims))}", tensor=name)
    type_id = cursor.u32("its type", tensor=name)
    block = BY_ID.get(type_id)
    if block is None:
        raise UnsupportedError(f"unknown ggml type {type_id}", path=cursor.path, tensor=name)
    row_len = dims[0] if dims else 1
    if row_len % block.weights:
        text = f"a row of {row_len} weights is no multiple of {block.name}'s block of {block.weights}"
        raise cursor.damaged(text, tensor=name)
    offset = cursor.u64("its offset", tensor=name)
    nbytes = math.prod(dims) // block.weights * block.nbytes
    return TensorInfo(name, tuple(reversed(dims)), block.name, nbytes, None, offset)


def _check_offset(cursor: _Cursor, info: TensorInfo, expected: int, alignment: int) -> None:
    if info.offset == expected:
        return
    if info.offset % alignment:
        fault = f"is no multiple of the alignment {alignment}"
    elif info.offset < expected:
        fault = "overlaps the tensor before it or comes out of order"
    else:
        fault = "leaves a gap after the tensor before it"
    raise cursor.damaged(f"offset {info.offset} {fault}, expected {expected}", tensor=info.name)


def padded(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """`nbytes` rounded up to a multiple of `alignment`."""
    return -(-nbytes // alignment) * alignment
