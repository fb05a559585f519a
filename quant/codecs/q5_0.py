# mypy: allow-untyped-defs, allow-untyped-calls
"""Q5_0: 32 weights share a half-precision scale d; each is a code q of 0..31 around 16.

    22 bytes: d (f16) | high (u32: bit j is bit 4 of weight j) | 16 bytes of low nibbles as in Q4_0     w = d * (q - 16)

As Q4_0 with twice the levels: the first weight of largest magnitude sits on code 0, d = w / -16,
q = min(31, trunc(w * (1 / d) + 16.5)) in float32; d becomes half only when stored. All-zero blocks: see Q4_0.

Ref: ggml-quants.c, quantize_row_q5_0_ref and dequantize_row_q5_0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from weightsmith.quant.algorithms import lone, weighted
from weightsmith.quant.algorithms.lanes import LANES
from weightsmith.quant.algorithms.tiles import TOO_LARGE, fill, halves, reach_bits
from weightsmith.quant.extremes import first_largest
from weightsmith.quant.kernels import (
    DECODE,
    ENCODE,
    decode_blocks,
    encode_blocks,
    half_bits,
    half_value,
    inverse,
    kernel,
)
from weightsmith.quant.lattice import Lattice, Shape, blocks_of, empty, fields, half_at, join, opened, put_half
from weightsmith.types import Packed, Rows

LATTICE = Shape(32, 32, 31, 16)
ARITHMETIC_VERSION = lone.ARITHMETIC_VERSION
_SHAPE = (1, 32, np.float32(16.0), np.float32(15.0), np.float32(1.0), np.float32(1.0), np.float32(3.0))
_REACH = reach_bits(16.0)


@kernel(ENCODE)
def _encode(x, out):
    side = x.shape[1] // 2
    worst = np.int32(0)
    for b in range(x.shape[0]):
        d = np.float32(first_largest(x, b) / np.float32(-16.0))
        scale = inverse(d)
        half = half_bits(d)
        worst = max(worst, np.int32(half & np.int32(0x7FFF)))
        out[b, 0] = half & 0xFF
        out[b, 1] = half >> 8
        fifth = np.uint32(0)
        for j in range(side):
            low = min(np.int32(np.float32(np.float32(x[b, j] * scale) + np.float32(16.5))), np.int32(31))
            high = min(np.int32(np.float32(np.float32(x[b, j + side] * scale) + np.float32(16.5))), np.int32(31))
            bits = np.uint32((low >> np.int32(4)) | np.int32((high & np.int32(16)) << np.int32(12)))
            fifth = np.uint32(fifth | np.uint32(bits << np.uint32(j)))
            out[b, 6 + j] = np.uint8((low & np.int32(15)) | np.int32((high & np.int32(15)) << np.int32(4)))
        for k in range(4):
            out[b, 2 + k] = np.uint8(fifth >> np.uint32(8 * k))
    return worst


@kernel(weighted.SEARCH)
def _search(x, importance, out, effort, guided):
    tile, weights = np.empty((2, 32, LANES), np.float32), np.empty((32, LANES), np.float32)
    units, state = np.empty((2, LANES), np.float32), np.empty((lone.N_STATE, 1, LANES), np.float32)
    codes, half = np.empty((32, LANES), np.uint8), np.empty(LANES, np.int32)
    means, cache = np.empty((1, LANES), np.float32), np.empty(1, np.float32)
    chosen = lone.PLANS[lone.plan(effort, guided)]
    worst = np.int32(0)
    for first in range(0, x.shape[0], LANES):
        if fill(x, first, importance, tile, units) > _REACH:
            return TOO_LARGE
        if guided:
            lone.row_means(x, first, importance.shape[0], units, cache, means)
        ref = lone.reference_scale(tile, means, weights, _SHAPE, guided)
        d = lone.search_scale(tile, units, state, _SHAPE, chosen, ref)
        lone.scale_codes(tile, d, _SHAPE[2], codes)
        worst = max(worst, halves(d, units, half))
        for lane in range(min(LANES, x.shape[0] - first)):
            row = out[first + lane]
            row[0] = half[lane] & 0xFF
            row[1] = half[lane] >> 8
            for k in range(4):
                fifth = np.int32(0)
                for j in range(8):
                    fifth |= (np.int32(codes[8 * k + j, lane]) >> 4) << j
                row[2 + k] = fifth
            for j in range(16):
                row[6 + j] = (codes[j, lane] & 15) | (codes[16 + j, lane] & 15) << 4
    return worst


@kernel(DECODE)
def _decode(packed, out):
    side = out.shape[1] // 2
    for b in range(packed.shape[0]):
        d = half_value(np.int32(packed[b, 0] | np.int32(packed[b, 1]) << 8))
        fifth = np.uint32(0)
        for k in range(4):
            fifth = np.uint32(fifth | np.uint32(np.uint32(packed[b, 2 + k]) << np.uint32(8 * k)))
        for j in range(side):
            pair = np.int32(packed[b, 6 + j])
            bits = np.int32(np.uint32(fifth >> np.uint32(j)) & np.uint32(0x10001))
            low = np.int32((pair & np.int32(15)) | np.int32((bits & np.int32(1)) << np.int32(4)))
            high = np.int32((pair >> np.int32(4)) | np.int32((bits >> np.int32(12)) & np.int32(16)))
            out[b, j] = np.float32(d * np.float32(np.int32(low - np.int32(16))))
            out[b, j + side] = np.float32(d * np.float32(np.int32(high - np.int32(16))))


def encode(
    rows: Rows, *, importance: NDArray[np.float32] | None = None, effort: str = "normal", measured: bool = True
) -> Packed:
    """Pack float32 [rows, row_len]; importance: float32 [row_len], measured or not.

    effort: fast (plain rounding), normal or best.

    Raises IntegrityError for NaN or Inf, UnsupportedError if d leaves F16's range.
    """
    if effort == "fast":
        return encode_blocks("Q5_0", _encode, rows)
    return weighted.encode("Q5_0", _search, rows, importance=importance, effort=effort, measured=measured)


def decode(packed: Packed, row_len: int) -> Rows:
    """Unpack to float32 [rows, row_len]."""
    return decode_blocks("Q5_0", _decode, packed, row_len)


def unpack(packed: Packed) -> Lattice:
    """The codes and halfs of packed rows."""
    blocks = blocks_of("Q5_0", packed)
    codes = fields(blocks[:, 6:], 4).reshape(-1, 32)
    codes |= fields(blocks[:, 2:6], 1).swapaxes(1, 2).reshape(-1, 32) << 4
    return opened(LATTICE, len(packed), codes, half_at(blocks, 0))


def pack(lattice: Lattice) -> Packed:
    """The inverse of `unpack`."""
    blocks = empty("Q5_0", lattice)
    put_half(blocks, 0, lattice.d)
    codes = lattice.codes.reshape(-1, 2, 16)
    blocks[:, 2:6] = join(codes.reshape(-1, 4, 8).swapaxes(1, 2) >> 4, 1)
    blocks[:, 6:] = join(codes & 15, 4)
    return blocks.reshape(len(lattice.codes), -1)
