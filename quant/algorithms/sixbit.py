# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-subclassing-any
"""The first 16 bytes that Q4_K and Q5_K share: d, dmin and eight pairs of 6-bit integers (layout: `codecs.q4_k`)."""

from __future__ import annotations

import numpy as np

from weightsmith.quant.kernels import inner


@inner
def write_pairs(row, d, dmin, scales, mins, lane):
    """Write half bits d and dmin and one lane of scales and mins (float32 [8, 16]) to row[0:16]."""
    row[0] = d & 0xFF
    row[1] = d >> 8
    row[2] = dmin & 0xFF
    row[3] = dmin >> 8
    for k in range(4):
        s, m = np.int32(scales[k, lane]), np.int32(mins[k, lane])
        high_s, high_m = np.int32(scales[k + 4, lane]), np.int32(mins[k + 4, lane])
        row[4 + k] = s | (high_s >> 4) << 6
        row[8 + k] = m | (high_m >> 4) << 6
        row[12 + k] = (high_s & 15) | (high_m & 15) << 4


@inner
def read_pair(row, k):
    """Scale and min of sub-block k."""
    if k < 4:
        return np.int32(row[4 + k] & 63), np.int32(row[8 + k] & 63)
    low, s, m = np.int32(row[8 + k]), np.int32(row[k]), np.int32(row[4 + k])
    return np.int32((low & 15) | (s >> 6) << 4), np.int32((low >> 4) | (m >> 6) << 4)


def unpack_pairs(blocks):
    """Scales and mins, int16 [n, 8] each, of blocks uint8 [n, at least 16]."""
    low, mid, both = (blocks[:, at : at + 4].astype(np.int16) for at in (4, 8, 12))
    scales = np.concatenate([low & 63, (both & 15) | (low >> 6) << 4], axis=1)
    mins = np.concatenate([mid & 63, (both >> 4) | (mid >> 6) << 4], axis=1)
    return scales, mins


def pack_pairs(blocks, scales, mins):
    """The inverse of `unpack_pairs`, into bytes 4 to 15."""
    blocks[:, 4:8] = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    blocks[:, 8:12] = mins[:, :4] | (mins[:, 4:] >> 4) << 6
    blocks[:, 12:16] = (scales[:, 4:] & 15) | (mins[:, 4:] & 15) << 4
