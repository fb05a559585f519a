# mypy: allow-untyped-defs, allow-untyped-calls
"""IQ4_XS: 256 weights share a half-precision d; each 32 of them have a 6-bit s, a weight a position q in a table K.

    136 bytes: d (f16) | u16 of high bits of s | 4 bytes of low nibbles of s | 128 bytes of nibbles
                                                                                        w = d * (s - 32) * K[q]

K has 16 uneven values (`quant.algorithms.levels`). s of sub-block k has its low four bits in nibble k of the four bytes
and its upper two in bits 2k, 2k + 1 of the u16. Each 16 bytes of nibbles are one sub-block: the low ones its first 16
weights, the high ones the others.

How d, s and q are chosen: `quant.algorithms.symmetric`. Ref: ggml-quants.c, dequantize_row_iq4_xs.
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
_SHAPE = (8, 32, np.float32(127.0), np.float32(113.0), np.float32(32.0), np.float32(25.0), np.float32(25.0))
_REACH = reach_bits(32.0 * 113.0)
LATTICE = Shape(256, 32, 15, 0, (-32, 31), table=tuple(IQ4.astype(int).tolist()))


@kernel(weighted.SEARCH)
def _encode(x, importance, out, effort, guided):
    tile = np.empty((2, 256, LANES), np.float32)
    units = np.empty((2, LANES), np.float32)
    state = np.empty((N_STATE, 8, LANES), np.float32)
    codes = np.empty((256, LANES), np.uint8)
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
            high = np.int32(0)
            for k in range(8):
                s = np.int32(state[LS, k, lane]) + 32
                high |= (s >> 4) << (2 * k)
                row[4 + k // 2] = s & 15 if k % 2 == 0 else np.int32(row[4 + k // 2]) | (s & 15) << 4
                for j in range(16):
                    row[8 + 16 * k + j] = codes[32 * k + j, lane] | codes[32 * k + 16 + j, lane] << 4
            row[2] = high & 0xFF
            row[3] = high >> 8
    return worst


@kernel(DECODE)
def _decode(packed, out):
    for b in range(packed.shape[0]):
        row = packed[b]
        d = half_value(np.int32(row[0] | np.int32(row[1]) << 8))
        high = np.int32(row[2] | np.int32(row[3]) << 8)
        for k in range(8):
            low = np.int32((np.int32(row[4 + k // 2]) >> np.int32(4 * (k % 2))) & np.int32(15))
            above = np.int32((high >> np.int32(2 * k)) & np.int32(3))
            s = np.int32(np.int32(low | np.int32(above << np.int32(4))) - np.int32(32))
            scale = np.float32(d * np.float32(s))
            for j in range(16):
                pair = np.int32(row[8 + 16 * k + j])
                out[b, 32 * k + j] = np.float32(scale * IQ4[pair & 15])
                out[b, 32 * k + 16 + j] = np.float32(scale * IQ4[pair >> 4])


def encode(
    rows: Rows, *, importance: NDArray[np.float32] | None = None, effort: str = "normal", measured: bool = True
) -> Packed:
    """Pack float32 [rows, row_len]; importance: float32 [row_len], measured or not; effort: fast, normal or best.

    Raises IntegrityError for NaN or Inf, UnsupportedError if d leaves F16's range.
    """
    return weighted.encode("IQ4_XS", _encode, rows, importance=importance, effort=effort, measured=measured)


def decode(packed: Packed, row_len: int) -> Rows:
    """Unpack to float32 [rows, row_len]."""
    return decode_blocks("IQ4_XS", _decode, packed, row_len)


def unpack(packed: Packed) -> Lattice:
    """The codes, integers and halfs of packed rows."""
    blocks = blocks_of("IQ4_XS", packed)
    low = fields(blocks[:, 4:8], 4).swapaxes(1, 2).reshape(-1, 8)
    high = fields(blocks[:, 2:4], 2).swapaxes(1, 2).reshape(-1, 8)
    codes = fields(blocks[:, 8:].reshape(-1, 8, 16), 4)
    return opened(
        LATTICE, len(packed), codes.reshape(-1, 256), half_at(blocks, 0), (low | high << 4).astype(np.int16) - 32
    )


def pack(lattice: Lattice) -> Packed:
    """The inverse of `unpack`."""
    blocks = empty("IQ4_XS", lattice)
    put_half(blocks, 0, lattice.d)
    scales = lattice.scales.reshape(-1, 8) + 32
    blocks[:, 2:4] = join((scales >> 4).reshape(-1, 2, 4).swapaxes(1, 2), 2)
    blocks[:, 4:8] = join((scales & 15).reshape(-1, 4, 2).swapaxes(1, 2), 4)
    blocks[:, 8:] = join(lattice.codes.reshape(-1, 8, 2, 16), 4).reshape(-1, 128)
    return blocks.reshape(len(lattice.codes), -1)
