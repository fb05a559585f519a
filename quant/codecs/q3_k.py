# mypy: allow-untyped-defs, allow-untyped-calls
"""Q3_K: 256 weights share a half-precision d; each 16 of them have a 6-bit s, a weight a code q of three bits.

    110 bytes: 32 bytes of high bits | 64 bytes of low bits | 12 bytes of s | d (f16)        w = d * (s - 32) * (q - 4)

Weight j of 32-weight run i has its high bit in bit i of byte j. Of each 32 bytes of low bits, byte j holds weights j,
j + 32, j + 64 and j + 96, lowest bits first. The 12 bytes: 0-7 hold the low four bits of s of sub-blocks 0-7 (low
nibble) and 8-15 (high), byte 8 + i the upper two bits of sub-blocks i, i + 4, i + 8 and i + 12, lowest bits first.

How d, s and q are chosen: `quant.algorithms.symmetric`. Ref: ggml-quants.c, dequantize_row_q3_K.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from weightsmith.quant.algorithms import symmetric, weighted
from weightsmith.quant.algorithms.lanes import LANES, load, store_bytes
from weightsmith.quant.algorithms.levels import signed_codes
from weightsmith.quant.algorithms.symmetric import LS, N_STATE, search
from weightsmith.quant.algorithms.tiles import TOO_LARGE, fill, halves, reach_bits
from weightsmith.quant.algorithms.transposed import lay, room
from weightsmith.quant.kernels import DECODE, decode_blocks, half_value, inner, kernel
from weightsmith.quant.lattice import Lattice, Shape, blocks_of, empty, fields, half_at, join, opened, put_half
from weightsmith.types import Packed, Rows

ARITHMETIC_VERSION = symmetric.ARITHMETIC_VERSION
_SHAPE = (16, 16, np.float32(4.0), np.float32(3.0), np.float32(32.0), np.float32(1.25), np.float32(2.0))
_REACH = reach_bits(32.0 * 3.0)
_TENTH = np.float32(0.1)
# The lowest bits of every byte.
_ONE, _TWO, _FOUR = (np.uint64(0x0101010101010101 * bits) for bits in (1, 3, 15))
LATTICE = Shape(256, 16, 7, 4, (-32, 31))


@inner
def _lay_out(codes, scales, packed):
    """Bytes 0 to 107 of sixteen blocks. Words hold a byte of eight lanes each: codes [8, 64], a row 32 weights."""
    high, low, low_too = packed[:64], packed[64:128], packed[128:192]
    high[:] = np.uint64(0)
    low[:] = np.uint64(0)
    low_too[:] = np.uint64(0)
    for run in range(8):
        part, shift = codes[run], np.uint64(run)
        for i in range(part.size):
            high[i] |= (part[i] >> np.uint64(2) & _ONE) << shift
    for run in range(4):
        part, later, shift = codes[run], codes[run + 4], np.uint64(2 * run)
        for i in range(part.size):
            low[i] |= (part[i] & _TWO) << shift
            low_too[i] |= (later[i] & _TWO) << shift
    for i in range(16):
        packed[192 + i] = scales[i] & _FOUR | (scales[16 + i] & _FOUR) << np.uint64(4)
    for i in range(8):
        above = scales[i] >> np.uint64(4) & _TWO | (scales[8 + i] >> np.uint64(4) & _TWO) << np.uint64(2)
        above |= (scales[16 + i] >> np.uint64(4) & _TWO) << np.uint64(4)
        packed[208 + i] = above | (scales[24 + i] >> np.uint64(4) & _TWO) << np.uint64(6)


@kernel(weighted.SEARCH)
def _encode(x, importance, out, effort, guided):
    tile = np.empty((2, 256, LANES), np.float32)
    units = np.empty((2, LANES), np.float32)
    state = np.empty((N_STATE, 16, LANES), np.float32)
    codes = np.empty((256, LANES), np.uint8)
    scales = np.empty((16, LANES), np.uint8)
    half = np.empty(LANES, np.int32)
    packed, turned = room(110)
    words = packed.view(np.uint64).reshape(-1)
    manner = (1 if guided else 4, 9, _TENTH, np.float32(-1.0), 1 if guided else 0)
    worst = np.int32(0)
    for first in range(0, x.shape[0], LANES):
        if fill(x, first, importance, tile, units) > _REACH:
            return TOO_LARGE
        d = search(tile, units, state, _SHAPE, None, effort, manner)
        signed_codes(tile, state[LS], d, codes, np.float32(4.0))
        worst = max(worst, halves(d, units, half))
        for k in range(16):
            store_bytes(scales, k, load(state[LS], k) + np.float32(32.0))
        _lay_out(codes.view(np.uint64).reshape(8, 64), scales.view(np.uint64).reshape(-1), words)
        for lane in range(LANES):
            packed[108, lane] = half[lane] & 0xFF
            packed[109, lane] = half[lane] >> 8
        lay(packed, turned, out, first)
    return worst


@kernel(DECODE)
def _decode(packed, out):
    for b in range(packed.shape[0]):
        row = packed[b]
        d = half_value(np.int32(row[108] | np.int32(row[109]) << 8))
        for k in range(16):
            nibble = np.int32((np.int32(row[96 + k % 8]) >> np.int32(4 * (k // 8))) & np.int32(15))
            above = np.int32((np.int32(row[104 + k % 4]) >> np.int32(2 * (k // 4))) & np.int32(3))
            s = np.int32(np.int32(nibble | np.int32(above << np.int32(4))) - np.int32(32))
            scale = np.float32(d * np.float32(s))
            low = 32 + 32 * (k // 8) + 16 * (k % 2)
            shift, run = np.int32(2 * (k % 8 // 2)), np.int32(k // 2)
            for j in range(16):
                q = np.int32((np.int32(row[low + j]) >> shift) & np.int32(3))
                high = np.int32((np.int32(row[16 * (k % 2) + j]) >> run) & np.int32(1))
                q = np.int32(np.int32(q | np.int32(high << np.int32(2))) - np.int32(4))
                out[b, 16 * k + j] = np.float32(scale * np.float32(q))


def encode(
    rows: Rows, *, importance: NDArray[np.float32] | None = None, effort: str = "normal", measured: bool = True
) -> Packed:
    """Pack float32 [rows, row_len]; importance: float32 [row_len], measured or not; effort: fast, normal or best.

    Raises IntegrityError for NaN or Inf, UnsupportedError if d leaves F16's range.
    """
    return weighted.encode("Q3_K", _encode, rows, importance=importance, effort=effort, measured=measured)


def decode(packed: Packed, row_len: int) -> Rows:
    """Unpack to float32 [rows, row_len]."""
    return decode_blocks("Q3_K", _decode, packed, row_len)


def unpack(packed: Packed) -> Lattice:
    """The codes, integers and halfs of packed rows."""
    blocks = blocks_of("Q3_K", packed)
    low = fields(blocks[:, 96:104], 4).reshape(-1, 16)
    high = fields(blocks[:, 104:108], 2).reshape(-1, 16)
    codes = fields(blocks[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 256)
    codes |= fields(blocks[:, :32], 1).reshape(-1, 256) << 2
    scales = (low | high << 4).astype(np.int16) - 32
    return opened(LATTICE, len(packed), codes, half_at(blocks, 108), scales)


def pack(lattice: Lattice) -> Packed:
    """The inverse of `unpack`."""
    blocks = empty("Q3_K", lattice)
    codes = lattice.codes.reshape(-1, 8, 32)
    blocks[:, :32] = join(codes >> 2, 1)
    blocks[:, 32:96] = join(codes.reshape(-1, 2, 4, 32) & 3, 2).reshape(-1, 64)
    scales = lattice.scales.reshape(-1, 16) + 32
    blocks[:, 96:104] = join((scales & 15).reshape(-1, 2, 8), 4)
    blocks[:, 104:108] = join((scales >> 4).reshape(-1, 4, 4), 2)
    put_half(blocks, 108, lattice.d)
    return blocks.reshape(len(lattice.codes), -1)
