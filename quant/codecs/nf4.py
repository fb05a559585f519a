"""NF4: 64 weights share absmax, a float32; each is one of the 16 levels of `quant.float4`.

    36 bytes: absmax (f32) | 32 bytes of nibbles (high: weight 2 j, low: weight 2 j + 1)     w = level * absmax

bitsandbytes keeps the nibbles and the absmax in tensors of their own (see `formats.bnb`); the block joins them, so that
rows travel in one piece.

Ref: `quant.float4`.
"""

from __future__ import annotations

import numpy as np

from weightsmith.quant import float4
from weightsmith.quant.kernels import DECODE, ENCODE, bits_of, decode_blocks, encode_blocks, float_of, inner, kernel
from weightsmith.types import Packed, Rows

_LEVELS, _BOUNDS, _CODES = float4.LEVELS["NF4"], float4.BOUNDS["NF4"], float4.CODES["NF4"]


@inner
def _nearest(value: np.float32) -> np.int32:
    place = np.int32(0)
    for bound in _BOUNDS:
        place = np.int32(place + np.int32(value > bound))
    return np.int32(_CODES[place])


@kernel(ENCODE)
def _encode(x, out):  # type: ignore[no-untyped-def]
    worst = np.int32(0)
    for b in range(x.shape[0]):
        top = np.int32(0)
        for j in range(x.shape[1]):
            top = max(top, np.int32(bits_of(x[b, j]) & np.int32(0x7FFFFFFF)))
        worst = max(worst, np.int32(top >> np.int32(16)))
        scale = np.float32(np.float32(1.0) / max(float_of(top), np.float32(1e-38)))
        for k in range(4):
            out[b, k] = np.uint8((top >> np.int32(8 * k)) & np.int32(0xFF))
        for j in range(x.shape[1] // 2):
            v = min(max(np.float32(x[b, 2 * j] * scale), np.float32(-1.0)), np.float32(1.0))
            w = min(max(np.float32(x[b, 2 * j + 1] * scale), np.float32(-1.0)), np.float32(1.0))
            out[b, 4 + j] = np.uint8(np.int32(_nearest(v) << np.int32(4)) | _nearest(w))
    return np.int32(0x7C00) if worst >= np.int32(0x7F80) else np.int32(0)


@kernel(DECODE)
def _decode(packed, out):  # type: ignore[no-untyped-def]
    for b in range(packed.shape[0]):
        bits = np.int32(0)
        for k in range(4):
            bits = np.int32(bits | np.int32(np.int32(packed[b, k]) << np.int32(8 * k)))
        absmax = float_of(bits)
        for j in range(out.shape[1] // 2):
            pair = np.int32(packed[b, 4 + j])
            out[b, 2 * j] = np.float32(_LEVELS[pair >> np.int32(4)] * absmax)
            out[b, 2 * j + 1] = np.float32(_LEVELS[pair & np.int32(15)] * absmax)


def encode(rows: Rows) -> Packed:
    """Pack float32 [rows, row_len]; IntegrityError for NaN or Inf."""
    return encode_blocks("NF4", _encode, rows)


def decode(packed: Packed, row_len: int) -> Rows:
    """Unpack to float32 [rows, row_len]."""
    return decode_blocks("NF4", _decode, packed, row_len)
