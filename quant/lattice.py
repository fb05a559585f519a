"""A block layout opened up: codes, integers and halfs as arrays of their own, and back into the same bytes.

Every layout that error feedback can fill says what its codes stand for in one form,

    w = (value(code) - zero) * (d * scale) - dmin * min        per weight, sub-block, block in float32, as decoders do

where value is the code itself or an entry of a table. Layouts without integers have scale 1; those with one offset per
block (Q4_1, Q5_1) have min -1, so that dmin is the offset itself. A codec's `unpack` makes a `Lattice` of its bytes and
`pack` bytes of a `Lattice`; the bits that both touch are picked by the functions below.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weightsmith.quant.blocks import BLOCKS
from weightsmith.types import Packed

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Integers = NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class Shape:
    """What a layout can hold. block, sub: weights of a block and a sub-block. top: the largest code. zero: see above.
    scales, mins: least and largest integer; mins None if there is no offset. table: values of codes; None: they are
    the values."""

    block: int
    sub: int
    top: int
    zero: int = 0
    scales: tuple[int, int] = (1, 1)
    mins: tuple[int, int] | None = None
    table: tuple[int, ...] | None = None


@dataclass(slots=True, eq=False)
class Lattice:
    """Rows of one layout. codes: uint8 [rows, row_len]; d, dmin: float32 [rows, blocks], exact halves; scales, mins:
    int16 [rows, sub-blocks]; dmin and mins are zeros where the layout has none."""

    shape: Shape
    codes: Bytes
    d: Floats
    scales: Integers
    dmin: Floats
    mins: Integers


def opened(
    shape: Shape,
    rows: int,
    codes: Bytes,
    d: Floats,
    scales: NDArray[np.integer] | None = None,
    dmin: Floats | None = None,
    mins: NDArray[np.integer] | None = None,
) -> Lattice:
    """Put together what was read of all blocks (first axis) as `rows` rows; what is None is 1, 0 and -1 (or 0)."""
    count = len(codes)
    subs = shape.block // shape.sub
    if scales is None:
        scales = np.ones((count, subs), np.int16)
    if mins is None:
        mins = np.full((count, subs), 0 if dmin is None else -1, np.int16)
    if dmin is None:
        dmin = np.zeros(count, np.float32)
    return Lattice(
        shape,
        np.ascontiguousarray(codes.reshape(rows, -1)),
        d.reshape(rows, -1),
        scales.astype(np.int16).reshape(rows, -1),
        dmin.reshape(rows, -1),
        mins.astype(np.int16).reshape(rows, -1),
    )


def blocks_of(codec: str, packed: Packed) -> Bytes:
    """Packed rows as blocks, uint8 [n, block bytes]."""
    return np.ascontiguousarray(packed).reshape(-1, BLOCKS[codec].nbytes)


def empty(codec: str, lattice: Lattice) -> Bytes:
    """Room for the blocks of `lattice`, uint8 [n, block bytes]."""
    return np.zeros((lattice.codes.size // lattice.shape.block, BLOCKS[codec].nbytes), np.uint8)


def half_at(blocks: Bytes, at: int) -> Floats:
    """The halfs at byte `at` of all blocks, float32 [n]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")[:, 0].astype(np.float32)


def put_half(blocks: Bytes, at: int, values: Floats) -> None:
    """Store halfs at byte `at` of all blocks."""
    blocks[:, at : at + 2] = values.reshape(-1, 1).astype("<f2").view(np.uint8)


def fields(packed: Bytes, bits: int) -> Bytes:
    """Bytes [..., n] as their fields of 1, 2 or 4 bits, lowest first: [..., 8 / bits, n]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    found: Bytes = (packed[..., None, :] >> shifts) & np.uint8((1 << bits) - 1)
    return found


def join(values: NDArray[np.integer], bits: int) -> Bytes:
    """The inverse of `fields`."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    found: Bytes = np.bitwise_or.reduce(values.astype(np.uint8) << shifts, axis=-2)
    return found
