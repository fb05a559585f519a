# mypy: allow-untyped-defs, allow-untyped-calls
"""IQ4_NL: 32 weights share a half-precision scale d; each is a position q in a table K of 16 uneven values.

    18 bytes: d (f16) | 16 bytes of nibbles (low: weight j, high: weight j + 16)        w = d * K[q]

How d and q are chosen: `quant.algorithms.symmetric`, with a block as the only sub-block of itself; K:
`quant.algorithms.levels`. Ref: ggml-quants.c, dequantize_row_iq4_nl.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from weightsmith.quant.algorithms import symmetric, weighted
from weightsmith.quant.algorithms.lanes import LANES
from weightsmith.quant.algorithms.levels import IQ4, table_codes
from weightsmith.quant.algorithms.symmetric import LS, N_STATE, search
from weightsmith.quant.algorithms.tiles import TOO_LARGE, fill, halves, reach_bits
from weightsmith.quant.kernels import DECODE, decode_blocks, half_value, kernel
from weightsmith.quant.lattice import Lattice, Shape, blocks_of, empty, fields, half_at, join, opened, put_half
from weightsmith.types import Packed, Rows

ARITHMETIC_VERSION = symmetric.ARITHMETIC_VERSION
_SHAPE = (1, 32, np.float32(127.0), np.float32(113.0), np.float32(1.0), np.float32(25.0), np.float32(25.0))
_REACH = reach_bits(113.0)
LATTICE = Shape(32, 32, 15, table=tuple(IQ4.astype(int).tolist()))


@kernel(weighted.SEARCH)
def _encode(x, importance, out, effort, guided):
    tile = np.empty((2, 32, LANES), np.float32)
    units = np.empty((2, LANES), np.float32)
    state = np.empty((N_STATE, 1, LANES), np.float32)
    codes = np.empty((32, LANES), np.uint8)
    half = np.empty(LANES, np.int32)
    manner = (1 if guided else 3, 7, np.float32(-1.0), np.float32(1.0), 0)
    worst = np.int32(0)
    for first in range(0, x.shape[0], LANES):
        if fill(x, first, importance, tile, units) > _REACH:
            return TOO_LARGE
        d = search(tile, units, state, _SHAPE, True, effort, manner)
        table_codes(tile, state[LS], d, codes)
        worst = max(worst, halves(d, units, half))
        for lane in range(min(LANES, x.shape[0] - first)):
            row = out[first + lane]
            row[0] = half[lane] & 0xFF
            row[1] = half[lane] >> 8
            for j in range(16):
                row[2 + j] = codes[j, lane] | codes[16 + j, lane] << 4
    return worst


@kernel(DECODE)
def _decode(packed, out):
    for b in range(packed.shape[0]):
        d = half_value(np.int32(packed[b, 0] | np.int32(packed[b, 1]) << 8))
        for j in range(16):
            pair = np.int32(packed[b, 2 + j])
            out[b, j] = np.float32(d * IQ4[pair & 15])
            out[b, j + 16] = np.float32(d * IQ4[pair >> 4])


def encode(
    rows: Rows, *, importance: NDArray[np.float32] | None = None, effort: str = "normal", measured: bool = True
) -> Packed:
    """Pack float32 [rows, row_len]; importance: float32 [row_len], measured or not; effort: fast, normal or best.

    Raises IntegrityError for NaN or Inf, UnsupportedError if d leaves F16's range.
    """
    return weighted.encode("IQ4_NL", _encode, rows, importance=importance, effort=effort, measured=measured)


def decode(packed: Packed, row_len: int) -> Rows:
    """Unpack to float32 [rows, row_len]."""
    return decode_blocks("IQ4_NL", _decode, packed, row_len)


def unpack(packed: Packed) -> Lattice:
    """The codes and halfs of packed rows."""
    blocks = blocks_of("IQ4_NL", packed)
    codes = fields(blocks[:, 2:], 4).reshape(-1, 32)
    return opened(LATTICE, len(packed), codes, half_at(blocks, 0))


def pack(lattice: Lattice) -> Packed:
    """The inverse of `unpack`."""
    blocks = empty("IQ4_NL", lattice)
    put_half(blocks, 0, lattice.d)
    codes = lattice.codes.reshape(-1, 2, 16)
    blocks[:, 2:] = join(codes, 4)
    return blocks.reshape(len(lattice.codes), -1)
