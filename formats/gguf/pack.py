"""The bytes of a GGUF header: what `parse` takes apart, put together. Always version 3, alignment 32."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weightsmith.errors import UnsupportedError
from weightsmith.formats.gguf.parse import (
    ARRAY,
    BOOL,
    F32,
    I32,
    MAGIC,
    MAX_NAME,
    SCALARS,
    STRING,
    U16,
    U32,
    padded,
)
from weightsmith.quant.blocks import BLOCKS
from weightsmith.types import TensorInfo


@dataclass(frozen=True, slots=True)
class Key:
    """One key to be written. kind: value type; item: the type of its items if `kind` is an array, else 0."""

    name: str
    kind: int
    value: Any
    item: int = 0

    def pack(self) -> bytes:
        """Its bytes. Raises UnsupportedError for a value that does not fit its type."""
        head = _string(self.name) + struct.pack("<I", self.kind)
        try:
            if self.kind == STRING:
                return head + _string(self.value)
            if self.kind != ARRAY:
                return head + struct.pack(SCALARS[self.kind], self.value)
            head += struct.pack("<IQ", self.item, len(self.value))
            if self.item == STRING:
                return head + b"".join([_string(text) for text in self.value])
            return head + np.asarray(self.value, SCALARS[self.item]).tobytes()
        except (struct.error, OverflowError, UnicodeEncodeError) as error:
            raise UnsupportedError(f"key {self.name!r} cannot hold its value: {error}") from error


def u16(name: str, value: int) -> Key:
    """A 16-bit count."""
    return Key(name, U16, value)


def u32(name: str, value: int) -> Key:
    """A 32-bit count."""
    return Key(name, U32, value)


def i32(name: str, value: int) -> Key:
    """A 32-bit integer."""
    return Key(name, I32, value)


def f32(name: str, value: float) -> Key:
    """A float32."""
    return Key(name, F32, value)


def flag(name: str, value: bool) -> Key:
    """A bool."""
    return Key(name, BOOL, value)


def text(name: str, value: str) -> Key:
    """A string."""
    return Key(name, STRING, value)


def array(name: str, item: int, values: Sequence[Any]) -> Key:
    """An array of value type `item`."""
    return Key(name, ARRAY, values, item)


def _string(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def tensor_entry(info: TensorInfo, offset: int) -> bytes:
    """One tensor's entry; `info` has the name it gets in the file, `offset` counts from the start of the data.

    Raises UnsupportedError for a codec without a ggml type and a name that does not fit.
    """
    block = BLOCKS.get(info.codec)
    if block is None or block.id < 0:
        raise UnsupportedError(f"GGUF has no type {info.codec}", tensor=info.name)
    if len(info.name.encode()) > MAX_NAME:
        raise UnsupportedError(f"the name is longer than {MAX_NAME} bytes", tensor=info.name)
    dims = tuple(reversed(info.shape))
    return _string(info.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, block.id, offset)


def header(entries: Sequence[bytes], tensors: Sequence[TensorInfo]) -> bytes:
    """Everything before the data, padded; tensors follow each other in the order given."""
    parts = [MAGIC + struct.pack("<IQQ", 3, len(tensors), len(entries)), *entries]
    offset = 0
    for info in tensors:
        parts.append(tensor_entry(info, offset))
        offset += padded(info.nbytes)
    raw = b"".join(parts)
    return raw.ljust(padded(len(raw)), b"\0")


def header_size(entries: Sequence[bytes], tensors: Sequence[TensorInfo]) -> int:
    """Bytes of `header`."""
    fixed = 24 + sum(len(entry) for entry in entries)
    return padded(fixed + sum(8 + len(info.name.encode()) + 4 + 8 * len(info.shape) + 12 for info in tensors))
