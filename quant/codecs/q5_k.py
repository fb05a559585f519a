# mypy: allow-untyped-defs, allow-untyped-calls
"""Q5_K: as Q4_K with codes of five bits: 256 weights share d and dmin, each 32 have 6-bit integers s and m.

    176 bytes: d (f16) | dmin (f16) | 12 bytes of s and m | 32 bytes of high bits | 128 bytes of nibbles
                                                                               w = d * s * q - dmin * m

The first 16 bytes and the nibbles are laid out as in Q4_K; weight j of sub-block k has its high bit in bit k of byte j.

How d, dmin, s, m and q are chosen: `quant.algorithms.asymmetric`. Ref: ggml-quants.c, dequantize_row_q5_K.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from weightsmith.quant.algorithms import asymmetric, weighted
from weightsmith.quant.algorithms.asymmetric import LM, LS, N_STATE, search
from weightsmith.quant.algorithms.lanes import LANES
from weightsmith.quant.algorithms.sixbit import pack_pairs, read_pair, unpack_pairs, write_pairs
from weightsmith.quant.algorithms.tiles import TOO_LARGE, fill, halves, reach_bits
from weightsmith.quant.kernels import DECODE, decode_blocks, half_value, kernel
from weightsmith.quant.lattice import Lattice, Shape, blocks_of, empty, fields, half_at, join, opened, put_half
from weightsmith.types import Packed, Rows

ARITHMETIC_VERSION = asymmetric.ARITHMETIC_VERSION
_SHAPE = (8, 32, np.float32(31.0), np.float32(63.0), np.float32(3.0), 16, np.float32(-0.5))
_REACH = reach_bits(63.0)
LATTICE = Shape(256, 32, 31, 0, (0, 63), (0, 63))


@kernel(weighted.SEARCH)
def _encode(x, importance, out, effort, guided):
    tile = np.empty((2, 256, LANES), np.float32)
    units = np.empty((2, LANES), np.float32)
    state = np.empty((N_STATE, 8, LANES), np.float32)
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
            write_pairs(row, half[0, lane], half[1, lane], state[LS], state[LM], lane)
            for j in range(32):
                high = np.int32(0)
                for k in range(8):
                    high |= (np.int32(codes[32 * k + j, lane]) >> 4) << k
                row[16 + j] = high
            for j in range(128):
                e = 64 * (j // 32) + j % 32
                row[48 + j] = (codes[e, lane] & 15) | (codes[e + 32, lane] & 15) << 4
    return worst


@kernel(DECODE)
def _decode(packed, out):
    for b in range(packed.shape[0]):
        row = packed[b]
        d = half_value(np.int32(row[0] | np.int32(row[1]) << 8))
        dmin = half_value(np.int32(row[2] | np.int32(row[3]) << 8))
        for k in range(8):
            s, m = read_pair(row, k)
            scale = np.float32(d * np.float32(s))
            offset = np.float32(dmin * np.float32(m))
            shift = np.int32(4 * (k % 2))
            for j in range(32):
                low = np.int32((np.int32(row[48 + 32 * (k // 2) + j]) >> shift) & np.int32(15))
                q = np.int32(low | np.int32(((np.int32(row[16 + j]) >> np.int32(k)) & np.int32(1)) << np.int32(4)))
                out[b, 32 * k + j] = np.float32(np.float32(scale * np.float32(q)) - offset)


def encode(
    rows: Rows, *, importance: NDArray[np.float32] | None = None, effort: str = "normal", measured: bool = True
) -> Packed:
    """Pack float32 [rows, row_len]; importance: float32 [row_len], measured or not; effort: fast, normal or best.

    Raises IntegrityError for NaN or Inf, UnsupportedError if d or dmin leaves F16's range.
    """
    return weighted.encode("Q5_K", _encode, rows, importance=importance, effort=effort, measured=measured)


def decode(packed: Packed, row_len: int) -> Rows:
    """Unpack to float32 [rows, row_len]."""
    return decode_blocks("Q5_K", _decode, packed, row_len)


def unpack(packed: Packed) -> Lattice:
    """The codes, integers and halfs of packed rows."""
    blocks = blocks_of("Q5_K", packed)
    scales, mins = unpack_pairs(blocks)
    codes = fields(blocks[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 256)
    codes |= fields(blocks[:, 16:48], 1).reshape(-1, 256) << 4
    return opened(LATTICE, len(packed), codes, half_at(blocks, 0), scales, half_at(blocks, 2), mins)


def pack(lattice: Lattice) -> Packed:
    """The inverse of `unpack`."""
    blocks = empty("Q5_K", lattice)
    put_half(blocks, 0, lattice.d)
    put_half(blocks, 2, lattice.dmin)
    pack_pairs(blocks, lattice.scales.reshape(-1, 8), lattice.mins.reshape(-1, 8))
    codes = lattice.codes.reshape(-1, 8, 32)
    blocks[:, 16:48] = join(codes >> 4, 1)
    blocks[:, 48:] = join(codes.reshape(-1, 4, 2, 32) & 15, 4).reshape(-1, 128)
    return blocks.reshape(len(lattice.codes), -1)
