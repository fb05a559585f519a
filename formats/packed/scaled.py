"""A linear whose weights are stored one by one, 8-bit floats or integers, with a scale for a block of them.

    weight[o, i] = (stored[o, i] - zero[b]) * scale[b],  b = (o // block rows, i // block columns)

One scale for the matrix, for a row, for a group of columns or for a tile are all blocks of some size, and scales lie in
the order of the blocks, whatever shape they are given ([], [1], [out], [out, 1], [out / 128, in / 128]). Scales stored
as U8 are powers of two, 2^(s - 127).

`formats.fp8` and `formats.compressed_tensors` use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightsmith.errors import IntegrityError
from weightsmith.formats.packed.parts import FLOATS, Part, Source
from weightsmith.quant import foreign
from weightsmith.quant.steps import Lattice, as_blocks, candidates
from weightsmith.quant.units import Units
from weightsmith.types import Packed, Rows, TensorInfo

FLOAT8 = ("F8_E4M3", "F8_E5M2")


def exponents(stored: NDArray[np.uint8]) -> NDArray[np.float32]:
    """E8M0 scales: 2^(s - 127); 255 is NaN."""
    scales = np.ldexp(np.float32(1), stored.astype(np.int32) - 127).astype(np.float32)
    scales[stored == 255] = np.nan
    return scales


@dataclass(frozen=True, slots=True)
class Scaled:
    """Such a linear (see `formats.packed.parts.Linear`). block: (rows, columns) that share a scale."""

    shape: tuple[int, int]
    parts: Mapping[str, Part]
    scale: str
    block: tuple[int, int]
    zero: str | None = None
    codec: str = "F32"

    @property
    def blocks(self) -> tuple[str, ...]:
        """Q8_0 for integers."""
        integers = self.parts["weight"].codecs == ("I8",)
        return candidates(8, self.block[1], self.shape[1]) if integers else ()

    def rows(self, source: Source, start: int, stop: int) -> Rows:
        """Weights float32 [stop - start, in]."""
        values: Rows = source.rows("weight", start, stop).astype(np.float32)
        if self.zero is not None and self.zero in source:
            values -= self._spread(self._at(source, self.zero, start, stop).astype(np.float32))
        values *= self._spread(self._at(source, self.scale, start, stop))
        return values

    def as_blocks(self, codec: str, source: Source, start: int, stop: int) -> tuple[Packed, float] | None:
        """The codes as blocks, without rounding a weight again."""
        return as_blocks(codec, self.lattice(source, start, stop))

    def lattice(self, source: Source, start: int, stop: int) -> Lattice | None:
        """Codes of rows [start, stop), 128 in the middle."""
        codes = source.rows("weight", start, stop).view(np.uint8) ^ np.uint8(128)
        scales = self._at(source, self.scale, start, stop)
        zeros = np.full(scales.shape, 128, np.int16)
        if self.zero is not None and self.zero in source:
            zeros += self._at(source, self.zero, start, stop).astype(np.int16)
        return Lattice(codes, scales, zeros, self.block[1])

    def units(self, source: Source, start: int, stop: int) -> Units:
        """Rows [start, stop) before they are scaled."""
        scales = np.broadcast_to(self._spread(self._at(source, self.scale, start, stop)), (stop - start, self.shape[1]))
        numbers: Rows = source.rows("weight", start, stop).astype(np.float32)
        codec = source.parts["weight"].codec
        if codec in FLOAT8:
            every = foreign.decode(codec, np.arange(256, dtype=np.uint8)[None])[0]
            return Units(numbers, scales, table=np.unique(every[np.isfinite(every)]))
        zeros: NDArray[np.float32] | float = 0.0
        if self.zero is not None and self.zero in source:
            zeros = self._spread(self._at(source, self.zero, start, stop).astype(np.float32))
        return Units(numbers - zeros, scales, -128.0 - zeros, 127.0 - zeros)

    def _at(self, source: Source, part: str, start: int, stop: int) -> NDArray[Any]:
        """A number for every row and block of columns, [stop - start, in / block columns]."""
        tall, wide = self.block
        across = -(-self.shape[1] // wide)
        first, last = start // tall, -(-stop // tall)
        found = source.run(part, first * across, last * across).reshape(last - first, across)
        if part == self.scale:
            found = exponents(found) if found.dtype == np.uint8 else found.astype(np.float32)
        chosen: NDArray[Any] = found[np.arange(start, stop) // tall - first]
        return chosen

    def _spread(self, numbers: NDArray[Any]) -> NDArray[Any]:
        return numbers if numbers.shape[1] == 1 else numbers.repeat(self.block[1], axis=1)[:, : self.shape[1]]


def block_of(shape: tuple[int, int], scale: TensorInfo, tile: tuple[int, int] | None) -> tuple[int, int]:
    """What shares a scale, by the scales' shape. tile: what the settings call for, None if they name none.

    Raises IntegrityError for a shape that is none of the known ones.
    """
    out, columns = shape
    if scale.n_weights == 1 and len(scale.shape) < 2:
        return shape
    if tile is not None and scale.shape == (-(-out // tile[0]), -(-columns // tile[1])):
        return tile
    if scale.shape in ((out,), (out, 1)):
        return 1, columns
    if len(scale.shape) == 2 and scale.shape[0] == out and scale.shape[1] and columns % scale.shape[1] == 0:
        return 1, columns // scale.shape[1]
    if scale.shape == (1, 1):
        return shape
    raise IntegrityError(
        f"scales of shape {list(scale.shape)} do not fit a matrix {list(shape)}", path=scale.path, tensor=scale.name
    )


def float_parts(shape: tuple[int, int], scale: TensorInfo, suffix: str) -> dict[str, Part]:
    """The parts of a linear in 8-bit floats."""
    return {"weight": Part(shape, FLOAT8), suffix: Part(scale.shape, (*FLOATS, "U8"))}
