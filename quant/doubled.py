"""Double quantization: the absmax of NF4 and FP4 blocks in 8 bits of their own, as bitsandbytes does it.

    offset = mean absmax;  in blocks of 256: nested = max |absmax - offset|
    byte = nearest level of (absmax - offset) / nested;  absmax = level[byte] * nested + offset

The 256 levels are the "dynamic" ones: 0, 1, and for each decade 10^-6 .. 1 of |x| twice as many as for the one below,
in the middle of even steps from 0.1 to 1 of it. The mean is taken in float64, so that its order does not matter.

Ref: Dettmers 2015, "8-Bit Approximations for Parallelism in Deep Learning", arXiv:1511.04561; QLoRA, arXiv:2305.14314,
section 3; bitsandbytes functional.py (create_dynamic_map, quantize_blockwise).
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

BLOCK = 256  # absmax per nested absmax, as written here

Floats = NDArray[np.float32]


@cache
def levels() -> Floats:
    """The 256 levels in ascending order, float32."""
    found = [0.0, 1.0]
    for decade in range(7):
        edges = _spaced(np.float32(0.1), np.float32(1.0), (1 << decade) + 1)
        middles = np.float32(10.0 ** (decade - 6)) * ((edges[1:] + edges[:-1]) / np.float32(2))
        found += [*middles.tolist(), *(-middles).tolist()]
    return np.array(sorted(found), np.float32)


def _spaced(first: np.float32, last: np.float32, count: int) -> Floats:
    """Evenly spaced numbers, rounded once, counted by a float32 step from the nearer end as torch.linspace does."""
    step = np.float64((last - first) / np.float32(count - 1))
    i = np.arange(count)
    return np.where(i < count // 2, first + step * i, last - step * (count - 1 - i)).astype(np.float32)


def double(absmax: Floats) -> tuple[NDArray[np.uint8], Floats, np.float32]:
    """Bytes uint8 [n], nested absmax float32 [ceil(n / 256)] and offset of absmax float32 [n]."""
    offset = np.float32(absmax.mean(dtype=np.float64))
    rest = np.zeros((-(-absmax.size // BLOCK), BLOCK), np.float32)
    rest.reshape(-1)[: absmax.size] = absmax - offset
    nested = np.abs(rest).max(axis=1)
    scaled = np.clip(rest * (np.float32(1) / np.maximum(nested, np.float32(1e-38)))[:, None], -1, 1)
    table = levels()
    places = np.searchsorted((table[1:] + table[:-1]) / np.float32(2), scaled.reshape(-1)[: absmax.size])
    return places.astype(np.uint8), nested, offset


def undouble(codes: NDArray[np.uint8], table: Floats, nested: Floats, offset: float) -> Floats:
    """absmax float32 [n] of bytes uint8 [n] and the nested absmax of each, float32 [n]."""
    found: Floats = table[codes] * nested
    return found + np.float32(offset)
