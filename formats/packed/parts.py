"""What a packed linear consists of: stored tensors that together stand for one weight matrix [out, in].

A container's `Scheme` looks at what is stored under a weight's name and says which `Linear` it is; the linear names
its parts, which the reader checks against the file, and computes weights from a `Source` that reads only the rows,
columns or runs that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from weightsmith.quant import foreign
from weightsmith.quant.units import Units
from weightsmith.types import Packed, Rows, TensorInfo

FLOATS = ("F16", "BF16", "F32")
# How stored numbers are viewed; BF16 and 8-bit floats become float32.
_VIEWS = {"I8": "i1", "U8": "u1", "I32": "<i4", "U32": "<u4", "I64": "<i8", "F16": "<f2", "F32": "<f4"}


class Part(NamedTuple):
    """A stored tensor of a packed linear. codecs: what it may be stored in, the first is what is written."""

    shape: tuple[int, ...]
    codecs: tuple[str, ...]
    optional: bool = False


def numbers(codec: str, data: Packed) -> NDArray[Any]:
    """Stored bytes uint8 [n] as numbers."""
    if codec in _VIEWS:
        return data.view(_VIEWS[codec])
    if codec == "BF16":
        return (data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return foreign.decode(codec, data.reshape(1, -1)).reshape(-1)


@dataclass(frozen=True, slots=True)
class Source:
    """The stored parts of one linear, by suffix. read: bytes (tensor, begin, count), optionally into a given array."""

    parts: Mapping[str, TensorInfo]
    read: Callable[..., Packed]

    def __contains__(self, suffix: str) -> bool:
        return suffix in self.parts

    def whole(self, suffix: str) -> NDArray[Any]:
        """All of a part, in its shape."""
        info = self.parts[suffix]
        return numbers(info.codec, self.read(info, 0, info.nbytes)).reshape(info.shape)

    def rows(self, suffix: str, begin: int, end: int) -> NDArray[Any]:
        """Rows [begin, end) along the first axis of a part."""
        info = self.parts[suffix]
        nbytes = info.nbytes // max(1, info.shape[0])
        data = self.read(info, begin * nbytes, (end - begin) * nbytes)
        return numbers(info.codec, data).reshape(end - begin, *info.shape[1:])

    def run(self, suffix: str, begin: int, end: int) -> NDArray[Any]:
        """Numbers [begin, end) of a part in their flat order."""
        info = self.parts[suffix]
        size = info.nbytes // max(1, info.n_weights)
        return numbers(info.codec, self.read(info, begin * size, (end - begin) * size))

    def raw(self, suffix: str, begin: int, end: int) -> Packed:
        """Bytes [begin, end) of a part, whatever it says that they are."""
        return self.read(self.parts[suffix], begin, end - begin)

    def columns(self, suffix: str, begin: int, end: int) -> NDArray[Any]:
        """Columns [begin, end) along the last axis of a part, [rows, end - begin]; a vector as such."""
        info = self.parts[suffix]
        size = info.nbytes // max(1, info.n_weights)
        nbytes = (end - begin) * size
        if end - begin == info.row_len:
            data = self.read(info, 0, info.nbytes)
        else:
            data = np.empty(info.n_rows * nbytes, np.uint8)
            for row in range(info.n_rows):
                into = data[row * nbytes : (row + 1) * nbytes]
                self.read(info, row * info.row_bytes + begin * size, nbytes, into=into)
        found = numbers(info.codec, data)
        return found if len(info.shape) == 1 else found.reshape(info.n_rows, end - begin)


class Linear(Protocol):
    """One packed linear.

    A suffix is what follows the weight's stem: "qweight" of X.weight is X.qweight.
    """

    @property
    def parts(self) -> Mapping[str, Part]:
        """Stored tensors by suffix."""

    @property
    def codec(self) -> str:
        """Of the rows that are handed out."""

    @property
    def blocks(self) -> tuple[str, ...]:
        """Layouts that may take the codes over."""

    def rows(self, source: Source, start: int, stop: int) -> Rows:
        """Weights float32 [stop - start, in], each a number of the linear's codec."""

    def as_blocks(self, codec: str, source: Source, start: int, stop: int) -> tuple[Packed, float] | None:
        """Rows [start, stop) as blocks of `codec` and the largest error of a weight; None where they do not fit."""

    def units(self, source: Source, start: int, stop: int) -> Units:
        """Rows [start, stop) before they are scaled, and what numbers there are."""


class Scheme(Protocol):
    """How the linears of one checkpoint are packed."""

    def linear(
        self, name: str, shape: tuple[int, int], stored: Mapping[str, TensorInfo], source: Source
    ) -> Linear | None:
        """The linear that stands for weight `name`, None if that is stored plainly.

        stored: tensors by their full names; source: reads them by full name too, for what small parts say. Raises
        UnsupportedError or IntegrityError for what cannot be packed so.
        """

    def is_dropped(self, name: str) -> bool:
        """True for a stored tensor that no weight needs, such as a scale of activations."""
