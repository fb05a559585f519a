# mypy: allow-untyped-defs, allow-untyped-calls
"""Q2_K: 256 weights share half-precision d and dmin; each 16 of them have 4-bit integers s and m, a weight a code q.

    84 bytes: 16 bytes (low four bits s, high m) | 64 bytes of codes | d (f16) | dmin (f16)     w = d * s * q - dmin * m

Codes have two bits. Of each 32 bytes of them, byte j holds weights j, j + 32, j + 64 and j + 96, lowest bits first.

How d, dmin, s, m and q are chosen: `quant.algorithms.asymmetric`. Ref: ggml-quants.c, dequantize_row_q2_K.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from weightsmith.quant.algorithms import asymmetric, weighted
from weightsmith.quant.algorithms.asymmetric import LM, LS, N_STATE, search
from weightsmith.quant.algorithms.lanes import LANES
from weightsmith.quant.algorithms.tiles import TOO_LARGE, fill, halves, reach_bits
from weightsmith.quant.kernels import DECODE, decode_blocks, half_value, kernel
from weightsmith.quant.lattice import Lattice, Shape, blocks_of, empty, fields, half_at, join, opened, put_half
from weightsmith.types import Packed, Rows

ARITHMETIC_VERSION = asymmetric.ARITHMETIC_VERSION
_SHAPE = (16, 16, np.float32(3.0), np.float32(15.0), np.float32(1.2), 16, np.float32(-0.5))
_REACH = reach_bits(15.0)
LATTICE = Shape(256, 16, 3, 0, (0, 15), (0, 15))


@kernel(weighted.SEARCH)
def _encode(x, importance, out, effort, guided):
    tile = np.empty((2, 256, LANES), np.float32)
    units = np.empty((2, LANES), np.float32)
    state = np.empty((N_STATE, 16, LANES), np.float32)
    codes = np.empty((256, LANES), np.uint8)
    half = np.empty((2, LANES), np.int32)
    worst = np.int32(0)
    for first in range(0, x.shape[0], LANES):
        if fill(x, first, importance, tile, units) > _REACH:
            return TOO_LARGE
        d, dmin = search(tile, units, state, codes, _SHAPE, effort, guided)
        worst = max(worst, halves(d, units, half[0]), halves(dmin, units, half[1]))
        for lane in range(min(LANES, x.shape[0] - first)):
            row = out[first + lane]
            for k in range(16):
                row[k] = np.int32(state[LS, k, lane]) | np.int32(state[LM, k, lane]) << 4
            for j in range(64):
                e = 128 * (j // 32) + j % 32
                low = codes[e, lane] | codes[e + 32, lane] << 2
                row[16 + j] = low | (codes[e + 64, lane] | codes[e + 96, lane] << 2) << 4
            for i in range(2):
                row[80 + 2 * i] = half[i, lane] & 0xFF
                row[81 + 2 * i] = half[i, lane] >> 8
    return worst


@kernel(DECODE)
def _decode(packed, out):
    for b in range(packed.shape[0]):
        row = packed[b]
        d = half_value(np.int32(row[80] | np.int32(row[81]) << 8))
        dmin = half_value(np.int32(row[82] | np.int32(row[83]) << 8))
        for k in range(16):
            scale = np.float32(d * np.float32(np.int32(row[k] & 15)))
            offset = np.float32(dmin * np.float32(np.int32(row[k] >> 4)))
            first = 16 + 32 * (k // 8) + 16 * (k % 2)
            shift = np.int32(2 * (k % 8 // 2))
            for j in range(16):
                q = np.int32((np.int32(row[first + j]) >> shift) & np.int32(3))
                out[b, 16 * k + j] = np.float32(np.float32(scale * np.float32(q)) - offset)


def encode(
    rows: Rows, *, importance: NDArray[np.float32] | None = None, effort: str = "normal", measured: bool = True
) -> Packed:
    """Pack float32 [rows, row_len]; importance: float32 [row_len], measured or not; effort: fast, normal or best.

    Raises IntegrityError for NaN or Inf, UnsupportedError if d or dmin leaves F16's range.
    """
    return weighted.encode("Q2_K", _encode, rows, importance=importance, effort=effort, measured=measured)


def decode(packed: Packed, row_len: int) -> Rows:
    """Unpack to float32 [rows, row_len]."""
    return decode_blocks("Q2_K", _decode, packed, row_len)


def unpack(packed: Packed) -> Lattice:
    """The codes, integers and halfs of packed rows."""
    blocks = blocks_of("Q2_K", packed)
    integers = fields(blocks[:, :16], 4)
    codes = fields(blocks[:, 16:80].reshape(-1, 2, 32), 2).reshape(-1, 256)
    d, dmin = half_at(blocks, 80), half_at(blocks, 82)
    return opened(LATTICE, len(packed), codes, d, integers[:, 0], dmin, integers[:, 1])


def pack(lattice: Lattice) -> Packed:
    """The inverse of `unpack`."""
    blocks = empty("Q2_K", lattice)
    blocks[:, :16] = join(np.stack([lattice.scales.reshape(-1, 16), lattice.mins.reshape(-1, 16)], 1), 4)
    blocks[:, 16:80] = join(lattice.codes.reshape(-1, 2, 4, 32), 2).reshape(-1, 64)
    put_half(blocks, 80, lattice.d)
    put_half(blocks, 82, lattice.dmin)
    return blocks.reshape(len(lattice.codes), -1)
