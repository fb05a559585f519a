"""The block codecs as slow, obvious loops: one weight after the other, every operation a separate float32 one.

Each variable is a column with one entry per block, so a loop over 32 weights treats all blocks at once, but no
operation ever mixes blocks or reorders a block's weights. Half-precision rounding is numpy's.
"""

from __future__ import annotations

import numpy as np

F = np.float32
BLOCK = 32
LAYOUTS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def _half(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float16).view(np.uint8).reshape(-1, 2)


def _inverse(d: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        inverse = F(1) / d
    return np.where(np.isfinite(inverse), inverse, F(0))


def _codes_q8_0(x: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    top = np.zeros(len(x), F)
    for j in range(BLOCK):
        top = np.where(np.abs(x[:, j]) > top, np.abs(x[:, j]), top)
    d = top / F(127)
    scale = _inverse(d)
    codes = []
    for j in range(BLOCK):
        v = (x[:, j] * scale).astype(np.float64)  # the sum with 0.5 is exact in float64
        codes.append((np.sign(v) * np.floor(np.abs(v) + 0.5)).astype(np.int8).view(np.uint8))
    return [_half(d)], codes


def _codes_symmetric(x: np.ndarray, levels: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    size, largest = np.full(len(x), F(-1)), np.zeros(len(x), F)
    for j in range(BLOCK):
        bigger = np.abs(x[:, j]) > size
        size = np.where(bigger, np.abs(x[:, j]), size)
        largest = np.where(bigger, x[:, j], largest)
    d = largest / F(-levels)
    scale = _inverse(d)
    codes = []
    for j in range(BLOCK):
        v = x[:, j] * scale
        codes.append(np.minimum((v + F(levels + 0.5)).astype(np.int32), 2 * levels - 1).astype(np.uint8))
    return [_half(d)], codes


def _codes_offset(x: np.ndarray, top: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    low, high = x[:, 0].copy(), x[:, 0].copy()
    for j in range(1, BLOCK):
        low = np.where(x[:, j] < low, x[:, j], low)
        high = np.where(x[:, j] > high, x[:, j], high)
    d = (high - low) / F(top)
    scale = _inverse(d)
    codes = []
    for j in range(BLOCK):
        v = (x[:, j] - low) * scale
        codes.append(np.minimum((v + F(0.5)).astype(np.int32), top).astype(np.uint8))
    return [_half(d), _half(low)], codes


def encode(codec: str, rows: np.ndarray) -> np.ndarray:
    """Pack float32 [rows, row_len] into uint8 [rows, row_bytes]."""
    x = rows.reshape(-1, BLOCK)
    if codec == "Q8_0":
        parts, codes = _codes_q8_0(x)
        parts.append(np.stack(codes, axis=1))
    else:
        five = codec.startswith("Q5")
        if codec.endswith("_0"):
            parts, codes = _codes_symmetric(x, 16 if five else 8)
        else:
            parts, codes = _codes_offset(x, 31 if five else 15)
        if five:
            high = np.zeros(len(x), np.uint32)
            for j in range(BLOCK):
                high |= (codes[j] >> 4).astype(np.uint32) << np.uint32(j)
            parts.append(high.view(np.uint8).reshape(-1, 4))
        parts.append(np.stack([(codes[j] & 15) | (codes[j + 16] & 15) << 4 for j in range(16)], axis=1))
    return np.concatenate(parts, axis=1).reshape(len(rows), -1)


def edges(n_blocks: int, levels: int, offset: float, seed: int = 0) -> np.ndarray:
    """Blocks for codes `trunc(w * (1 / d) + offset)` whose sums lie at the last float before a whole number.

    There a fused multiply-add, which rounds once, gives another code than two operations that round one by one.
    """
    rng = np.random.default_rng(seed)
    x = np.zeros((n_blocks, BLOCK), F)
    anchor = (rng.uniform(0.01, 1, n_blocks) * (levels if offset < 1 else -levels)).astype(F)
    d = anchor / F(levels if offset < 1 else -levels)
    whole = rng.integers(1, levels if offset < 1 else 2 * levels, (n_blocks, BLOCK)).astype(F)
    below = whole - offset - np.spacing(np.nextafter(whole, F(0))) / 2.0
    x[:] = below / (F(1) / d).astype(np.float64)[:, None]
    step = rng.integers(-1, 2, x.shape)
    x = np.where(step, np.nextafter(x, (x + step).astype(F)), x)
    x[:, 0], x[:, 1] = anchor, 0  # the largest, and for offset < 1 the smallest
    return x


def weights(kind: str, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Float32 rows of a named distribution."""
    rng = np.random.default_rng(seed)
    if kind == "normal":
        x = rng.standard_normal(shape) * 0.02
    elif kind == "student":
        x = rng.standard_t(3, shape) * 0.02
    elif kind == "constant":
        x = np.broadcast_to(rng.standard_normal((shape[0], 1)), shape)
    elif kind == "zeros":
        x = np.zeros(shape)
    elif kind == "outlier":
        x = rng.standard_normal(shape) * 1e-3
        x[:, ::32] = rng.choice([-900.0, 900.0], (shape[0], shape[1] // 32))
    elif kind == "lattice":  # many exact ties, of rounding and of magnitude
        x = rng.integers(-16, 17, shape) / 16
    elif kind == "tiny":  # scales that are subnormal or zero as half
        x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-37, -5, (shape[0], 1))
    elif kind == "large":
        x = rng.standard_normal(shape) * 10.0 ** rng.uniform(0, 4, (shape[0], 1))
    else:
        raise ValueError(kind)
    return np.ascontiguousarray(x, np.float32)


KINDS = ("normal", "student", "constant", "zeros", "outlier", "lattice", "tiny", "large")
