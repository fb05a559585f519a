"""One safetensors file: u64 length n (little-endian), n bytes of JSON, then the tensors' bytes.

    {"__metadata__": {"format": "pt"}, "NAME": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}, ...}

Offsets count from the end of the header. The tensors cover everything up to the end of the file, without holes and
without overlap, and shape times dtype is exactly a tensor's range. Nothing is allocated by what a header claims: its
length is held against the file first, and a shape only ever describes bytes that are there.

Ref: the README and tensor.rs (Metadata::validate) of huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import os
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.errors import IntegrityError, UnsafeInputError, UnsupportedError, WeightsmithError
from weightsmith.formats.pickles import is_pickled
from weightsmith.formats.safetensors.strictjson import parse_object, read_text
from weightsmith.quant.blocks import BLOCKS
from weightsmith.types import Packed, TensorInfo

MAX_HEADER = 100_000_000  # bytes, the reference implementation's own limit
MAX_RANK = 32
MAX_DIM = 1 << 48
MAX_NAME = 1024  # characters
DTYPES = frozenset(
    ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "I64", "U64", "F64")
)  # named as the codecs are
POINTER = b"version https://git-lfs.github.com/spec/"
AGAIN = "Pull the checkpoint again; files that are whole are not downloaded twice."


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: tensors by name in file order, and `__metadata__`."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def is_pointer(start: bytes) -> bool:
    """True if a file that begins with `start` is a git-LFS pointer instead of the content it stands for."""
    return start.startswith(POINTER)


def is_safetensors(start: bytes) -> bool:
    """True if a file that begins with `start` begins as safetensors do."""
    return int.from_bytes(start[:8], "little") <= MAX_HEADER and start[8:9] == b"{"


def read_header(handle: int, size: int, *, path: Path) -> Header:
    """Read and check the header of an open file of `size` bytes.

    Raises IntegrityError for any claim that the file does not bear out, UnsupportedError for an unknown dtype,
    UnsafeInputError for a pickle under the name of safetensors.
    """
    start = os.pread(handle, 512, 0)
    if is_pointer(start):
        raise IntegrityError(
            "a git-LFS pointer, not the weights it stands for",
            path=path,
            hint="Run `git lfs pull` where it was cloned, or pull the checkpoint with weightsmith.",
        )
    if size < 9 or len(start) < 9:
        raise IntegrityError(f"{size} bytes, too short for a safetensors file", path=path, hint=AGAIN)
    length = int.from_bytes(start[:8], "little")
    if not is_safetensors(start) and is_pickled(start):
        raise UnsafeInputError(
            "a pickle, though it is called safetensors; whoever loads it by its content runs it",
            path=path,
            hint="Pull the checkpoint from somebody else.",
        )
    if start[8:9] != b"{":
        raise IntegrityError(f"the header begins with {start[8:9]!r}, expected '{{'", path=path, hint=AGAIN)
    if length > min(MAX_HEADER, size - 8):
        limit = "the limit" if size - 8 > MAX_HEADER else "what the file holds"
        allowed = min(MAX_HEADER, size - 8)
        raise IntegrityError(f"a header of {length} bytes, {limit} is {allowed}", path=path, hint=AGAIN)
    raw = parse_object(read_text(handle, 8, length, path=path), path=path, what="the header")
    metadata = _metadata(raw.pop("__metadata__", {}), path)
    base = 8 + length
    tensors = [_tensor(name, entry, base, path) for name, entry in raw.items()]
    tensors.sort(key=lambda info: (info.offset, info.nbytes))  # an empty tensor stands before its neighbour
    _check_cover(tensors, base, size, path)
    return Header({info.name: info for info in tensors}, metadata)


def read_at(handle: int, info: TensorInfo, begin: int, nbytes: int, *, into: Packed | None = None) -> Packed:
    """Bytes [begin, begin + nbytes) of a tensor in an open file, uint8 [nbytes]; `into` is filled if it is given.

    Reading at a position shares no state between threads. Raises IntegrityError if the file became shorter.
    """
    data = np.empty(nbytes, np.uint8) if into is None else into
    view, done = data.data, 0
    while done < nbytes:
        try:
            got = os.preadv(handle, [view[done:]], info.offset + begin + done)
        except OSError as error:
            raise WeightsmithError(f"cannot read: {error.strerror}", path=info.path, tensor=info.name) from error
        if got == 0:
            raise IntegrityError("the file became shorter while it was read", path=info.path, tensor=info.name)
        done += got
    return data


def _metadata(value: object, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise IntegrityError("__metadata__ is not an object of strings", path=path)
    return value


def _tensor(name: str, entry: object, base: int, path: Path) -> TensorInfo:
    """Check one entry of the header by itself."""
    if not name or len(name) > MAX_NAME or any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
        shown = name[:80]
        raise IntegrityError("the name is empty, too long or holds control characters", path=path, tensor=shown)
    if not isinstance(entry, dict):
        raise IntegrityError(f"the entry is a {type(entry).__name__}, expected an object", path=path, tensor=name)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str):
        raise IntegrityError("no dtype", path=path, tensor=name)
    if dtype not in DTYPES:
        raise UnsupportedError(
            f"unknown dtype {dtype[:40]!r}", path=path, tensor=name, hint=f"Known: {', '.join(sorted(DTYPES))}."
        )
    if shape is None or not _is_counts(shape) or len(shape) > MAX_RANK or any(dim > MAX_DIM for dim in shape):
        raise IntegrityError("shape is not a short list of counts", path=path, tensor=name)
    if offsets is None or not _is_counts(offsets) or len(offsets) != 2 or max(offsets) >= 1 << 63:
        raise IntegrityError("data_offsets are not two byte positions", path=path, tensor=name)
    begin, end = offsets
    if end < begin:
        raise IntegrityError(f"ends at {end}, before it begins at {begin}", path=path, tensor=name)
    needed = math.prod(shape) * BLOCKS[dtype].nbytes
    if needed != end - begin:
        raise IntegrityError(
            f"{dtype} of shape {shape} takes {needed} bytes, its range has {end - begin}", path=path, tensor=name
        )
    return TensorInfo(name, tuple(shape), dtype, end - begin, path, base + begin)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)  # bool is no count


def _check_cover(tensors: list[TensorInfo], base: int, size: int, path: Path) -> None:
    """The tensors, sorted by offset, must cover [base, size) exactly."""
    reached = base
    for info in tensors:
        if info.offset != reached:
            fault = "overlaps the tensor before it" if info.offset < reached else "leaves a hole before it"
            raise IntegrityError(
                f"begins at {info.offset - base} and {fault}, expected {reached - base}", path=path, tensor=info.name
            )
        reached = info.offset + info.nbytes
        if reached > size:
            raise IntegrityError(
                f"ends {reached - size} bytes behind the end of the file, which is truncated",
                path=path,
                tensor=info.name,
                hint=AGAIN,
            )
    if reached != size:
        raise IntegrityError(f"{size - reached} bytes after the last tensor belong to none", path=path, hint=AGAIN)


def lay_out(tensors: Iterable[TensorInfo], notes: Mapping[str, str] | None = None) -> tuple[bytes, dict[str, int]]:
    """The start of a file that holds `tensors`: header bytes, and each tensor's absolute offset by name.

    notes: further entries of `__metadata__`.

    Tensors keep their order, unless one would then start at no multiple of its item size, which readers that map the
    file cannot view: then the widest types come first. The JSON is padded with spaces, so that data starts at a
    multiple of 8.
    """
    ordered = list(tensors)
    if not _aligned(ordered):
        ordered.sort(key=lambda info: -BLOCKS[info.codec].nbytes)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **dict(sorted((notes or {}).items()))}}
    begins, end = {}, 0
    for info in ordered:
        begins[info.name], end = end, end + info.nbytes
        offsets = [begins[info.name], end]
        header[info.name] = {"dtype": info.codec, "shape": list(info.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: base + begin for name, begin in begins.items()}


def _aligned(tensors: list[TensorInfo]) -> bool:
    end = 0
    for info in tensors:
        if end % BLOCKS[info.codec].nbytes:
            return False
        end += info.nbytes
    return True
