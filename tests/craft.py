"""Files built byte by byte, right or deliberately wrong, with no code of the project's own."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    """A GGUF string: length and bytes."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def kv(key: str | bytes, kind: int, value: Any) -> bytes:
    """One GGUF key-value pair; `value` may be raw bytes, which are then written as they are."""
    head = text(key) + struct.pack("<I", kind)
    if isinstance(value, bytes):
        return head + value
    if kind == STRING:
        return head + text(value)
    if kind == ARRAY:
        item, values = value
        body = b"".join(text(v) if item == STRING else struct.pack(_PLAIN[item], v) for v in values)
        return head + struct.pack("<IQ", item, len(values)) + body
    return head + struct.pack(_PLAIN[kind], value)


_PLAIN = {U32: "<I", I32: "<i", F32: "<f", BOOL: "<B", U64: "<Q"}


def tensor(name: str | bytes, dims: Sequence[int], kind: int, offset: int, *, n_dims: int | None = None) -> bytes:
    """One GGUF tensor info; dims fastest first."""
    count = len(dims) if n_dims is None else n_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


def gguf(
    pairs: Sequence[bytes],
    tensors: Sequence[bytes],
    data: bytes,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_kv: int | None = None,
    n_tensors: int | None = None,
    align: int = 32,
) -> bytes:
    """A GGUF file of these parts, with any of its counts overridden."""
    head = magic + struct.pack(
        "<IQQ", version, len(tensors) if n_tensors is None else n_tensors, len(pairs) if n_kv is None else n_kv
    )
    head += b"".join(pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % align) + data


def safetensors(header: dict[str, Any] | str | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with this header (JSON text may be given as it is) and any length in front."""
    body = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(body) if length is None else length) + body + data
