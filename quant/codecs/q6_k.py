# mypy: allow-untyped-defs, allow-untyped-calls
"""Q6_K: 256 weights share a half-precision d; each 16 of them have a signed byte s, a weight a code q of six bits.

    210 bytes: 128 bytes of low nibbles | 64 bytes of high bits | 16 signed bytes s | d (f16)      w = d * s * (q - 32)

Per 128 weights 64 bytes of nibbles and 32 of high bits: byte j (0..31) of the nibbles holds weights j and j + 64, byte
j + 32 weights j + 32 and j + 96 (low nibble first); byte j of the high bits holds the upper two bits of weights j,
j + 32, j + 64 and j + 96, lowest bits first.

How d, s and q are chosen: `quant.algorithms.symmetric`. Ref: ggml-quants.c, dequantize_row_q6_K.
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
_SHAPE = (16, 16, np.float32(32.0), np.float32(31.0), np.float32(128.0), np.float32(6.0), np.float32(1.5))
_REACH = reach_bits(128.0 * 31.0)
_TENTH = np.float32(0.1)
_TWO, _FOUR = (np.uint64(0x0101010101010101 * bits) for bits in (3, 15))  # the lowest bits of every byte
LATTICE = Shape(256, 16, 63, 32, (-128, 127))


@inner
def _lay_out(codes, packed):
    """Bytes 0 to 191 of sixteen blocks. Words hold a byte of eight lanes each: codes [8, 64], a row 32 weights."""
    for half in range(2):
        a, b, c, f = codes[4 * half], codes[4 * half + 1], codes[4 * half + 2], codes[4 * half + 3]
        low, low_too, high = packed[2 * half], packed[2 * half + 1], packed[4 + half]
        for i in range(64):
            low[i] = a[i] & _FOUR | (c[i] & _FOUR) << np.uint64(4)
            low_too[i] = b[i] & _FOUR | (f[i] & _FOUR) << np.uint64(4)
            above = a[i] >> np.uint64(4) & _TWO | (b[i] >> np.uint64(4) & _TWO) << np.uint64(2)
            high[i] = (
                above | (c[i] >> np.uint64(4) & _TWO) << np.uint64(4) | (f[i] >> np.uint64(4) & _TWO) << np.uint64(6)
            )


@kernel(weighted.SEARCH)
def _encode(x, importance, out, effort, guided):
    tile = np.empty((2, 256, LANES), np.float32)
    units = np.empty((2, LANES), np.float32)
    state = np.empty((N_STATE, 16, LANES), np.float32)
    codes = np.empty((256, LANES), np.uint8)
    half = np.empty(LANES, np.int32)
    packed, turned = room(210)
    manner = (2 if guided else 3, 9, _TENTH, np.float32(-1.0), 0)
    worst = np.int32(0)
    for first in range(0, x.shape[0], LANES):
        if fill(x, first, importance, tile, units) > _REACH:
            return TOO_LARGE
        d = search(tile, units, state, _SHAPE, None, effort, manner)
        signed_codes(tile, state[LS], d, codes, np.float32(32.0))
        worst = max(worst, halves(d, units, half))
        _lay_out(codes.view(np.uint64).reshape(8, 64), packed.view(np.uint64).reshape(-1, 64))
        for k in range(16):
            store_bytes(packed, 192 + k, load(state[LS], k))
        for lane in range(LANES):
            packed[208, lane] = half[lane] & 0xFF
            packed[209, lane] = half[lane] >> 8
        lay(packed, turned, out, first)
    return worst


@kernel(DECODE)
def _decode(packed, out):
    for b in range(packed.shape[0]):
        row = packed[b]
        d = half_value(np.int32(row[208] | np.int32(row[209]) << 8))
        for k in range(16):
            scale = np.float32(d * np.float32(np.int8(row[192 + k])))
            part = k % 8 // 2
            low = 64 * (k // 8) + 32 * (part % 2) + 16 * (k % 2)
            high = 128 + 32 * (k // 8) + 16 * (k % 2)
            shift, shift_high = np.int32(4 * (part // 2)), np.int32(2 * part)
            for j in range(16):
                nibble = np.int32((np.int32(row[low + j]) >> shift) & np.int32(15))
                above = np.int32((np.int32(row[high + j]) >> shift_high) & np.int32(3))
                q = np.int32(np.int32(nibble | np.int32(above << np.int32(4))) - np.int32(32))
                out[b, 16 * k + j] = np.float32(scale * np.float32(q))


def encode(
    rows: Rows, *, importance: NDArray[np.float32] | None = None, effort: str = "normal", measured: bool = True
) -> Packed:
    """Pack float32 [rows, row_len]; importance: float32 [row_len], measured or not; effort: fast, normal or best.

    Raises IntegrityError for NaN or Inf, UnsupportedError if d leaves F16's range.
    """
    return weighted.encode("Q6_K", _encode, rows, importance=importance, effort=effort, measured=measured)


def decode(packed: Packed, row_len: int) -> Rows:
    """Unpack to float32 [rows, row_len]."""
    return decode_blocks("Q6_K", _decode, packed, row_len)


def unpack(packed: Packed) -> Lattice:
    """The codes, integers and halfs of packed rows."""
    blocks = blocks_of("Q6_K", packed)
    codes = fields(blocks[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 256)
    codes |= fields(blocks[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 256) << 4
    scales = blocks[:, 192:208].view(np.int8)
    return opened(LATTICE, len(packed), codes, half_at(blocks, 208), scales)


def pack(lattice: Lattice) -> Packed:
    """The inverse of `unpack`."""
    blocks = empty("Q6_K", lattice)
    codes = lattice.codes.reshape(-1, 2, 4, 32)
    blocks[:, :128] = join(codes.reshape(-1, 2, 2, 64) & 15, 4).reshape(-1, 128)
    blocks[:, 128:192] = join(codes >> 4, 2).reshape(-1, 64)
    blocks[:, 192:208] = lattice.scales.reshape(-1, 16).astype(np.int8).view(np.uint8)
    put_half(blocks, 208, lattice.d)
    return blocks.reshape(len(lattice.codes), -1)
