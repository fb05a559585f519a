"""GGUF put together by hand, byte by byte and with no code of the project's own, so that any field can be wrong."""

from __future__ import annotations

import struct
from collections.abc import Sequence


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def text(name: str, value: str | bytes) -> bytes:
    return key(name, 8, string(value))


def u32(name: str, value: int) -> bytes:
    return key(name, 4, struct.pack("<I", value))


def f32(name: str, value: float) -> bytes:
    return key(name, 6, struct.pack("<f", value))


def texts(name: str, values: Sequence[str | bytes]) -> bytes:
    return key(name, 9, struct.pack("<IQ", 8, len(values)) + b"".join(string(value) for value in values))


def tensor(name: str | bytes, dims: Sequence[int], kind: int = 0, offset: int = 0, n_dims: int | None = None) -> bytes:
    count = len(dims) if n_dims is None else n_dims
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


def gguf(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
    alignment: int = 32,
) -> bytes:
    counts = (len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data
