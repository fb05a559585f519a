"""Q8_0: 32 weights share a half-precision scale d; each is a signed byte q.

    34 bytes: d (f16) | q[32] (i8)                 w = d * q

d = max |w| / 127 in float32, q = w * (1 / d) rounded half away from zero; d is rounded to half only when stored, so
codes refer to the unrounded scale. Rounding half away is `trunc(v + sign(v) * h)` with h the float before 0.5 (0.5
itself would lift 0.49999997 to 1). An all-zero block has d = +0.

Ref: ggml-quants.c, quantize_row_q8_0_ref and dequantize_row_q8_0.
"""

from __future__ import annotations

import numpy as np

from weightsmith.quant.kernels import (
    DECODE,
    ENCODE,
    bits_of,
    decode_blocks,
    encode_blocks,
    float_of,
    half_bits,
    half_value,
    inverse,
    kernel,
)
from weightsmith.types import Packed, Rows

HALF = np.float32(0.49999997)


@kernel(ENCODE)
def _encode(x, out):  # type: ignore[no-untyped-def]
    width = x.shape[1]
    worst = np.int32(0)
    for b in range(x.shape[0]):
        top = np.int32(0)
        for j in range(width):
            top = max(top, np.int32(bits_of(x[b, j]) & np.int32(0x7FFFFFFF)))
        d = np.float32(float_of(top) / np.float32(127.0))
        scale = inverse(d)
        half = half_bits(d)
        worst = max(worst, half)
        out[b, 0] = half & 0xFF
        out[b, 1] = half >> 8
        for j in range(width):
            v = np.float32(x[b, j] * scale)
            away = HALF if v >= np.float32(0.0) else -HALF
            out[b, 2 + j] = np.uint8(np.int32(np.float32(v + away)))
    return worst


@kernel(DECODE)
def _decode(packed, out):  # type: ignore[no-untyped-def]
    for b in range(packed.shape[0]):
        d = half_value(np.int32(packed[b, 0] | np.int32(packed[b, 1]) << 8))
        for j in range(out.shape[1]):
            out[b, j] = np.float32(d * np.float32(np.int8(packed[b, 2 + j])))


def encode(rows: Rows) -> Packed:
    """Pack float32 [rows, row_len]; IntegrityError for NaN or Inf, UnsupportedError beyond 127 * 65504."""
    return encode_blocks("Q8_0", _encode, rows)


def decode(packed: Packed, row_len: int) -> Rows:
    """Unpack to float32 [rows, row_len]."""
    return decode_blocks("Q8_0", _decode, packed, row_len)
