"""Codes on evenly spaced steps, as GPTQ, AWQ and their kin store them, and the block layouts that can take them over.

    weight[o, i] = (code[o, i] - zero[o, g]) * scale[o, g],  g = i // group_size

Where a group is whole blocks of 32, no weight has to be rounded again:

    Q4_0, Q8_0   d = scale, q = code - zero, if that fits -8 .. 7 or -128 .. 127
    Q4_1         d = scale, q = code (0 .. 15), m = -zero * scale

d and m are halves. A scale that is a half already loses nothing, and then Q4_0 and Q8_0 are exact; m is exact while
zero * scale needs no more than 11 bits, and is rounded else. What is rounded changes a weight by no more than
2^-11 of d's or m's share in it, which is reported; a number below the normal halves that is not met exactly is
refused.

Ref: ggml-common.h (block_q4_0, block_q4_1, block_q8_0); llama.cpp issues 10965 and 11024 ask for this way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weightsmith.types import Packed, Rows

BLOCK = 32
_RANGES = {"Q4_0": (-8, 7), "Q8_0": (-128, 127)}
_SMALLEST = np.float32(2.0**-14)  # the smallest normal half


@dataclass(frozen=True, slots=True)
class Lattice:
    """Rows of codes: uint8 [rows, in], scales float32 [rows, groups], zeros int16 [rows, groups]."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.int16]
    group_size: int

    @classmethod
    def transposed(
        cls, codes: NDArray[np.uint8], scales: NDArray[np.float32], zeros: NDArray[np.int16], group_size: int
    ) -> Lattice:
        """Of codes [in, rows], scales and zeros [groups, rows]."""
        turned = np.ascontiguousarray(codes.T), np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T)
        return cls(*turned, group_size)

    def weights(self) -> Rows:
        """float32 [rows, in]: the product of an exact step and the scale, rounded once."""
        columns = self.codes.shape[1]
        steps = self.codes.astype(np.float32)
        steps -= self.zeros.astype(np.float32).repeat(self.group_size, axis=1)[:, :columns]
        steps *= self.scales.repeat(self.group_size, axis=1)[:, :columns]
        return steps


def candidates(bits: int, group_size: int, columns: int) -> tuple[str, ...]:
    """Block layouts that may take codes of `bits` in groups of `group_size` over."""
    if columns % BLOCK or (group_size % BLOCK and group_size < columns):
        return ()
    return ("Q8_0", "Q4_0", "Q4_1") if bits <= 4 else ("Q8_0",)


def as_blocks(codec: str, lattice: Lattice | None) -> tuple[Packed, float] | None:
    """The same weights as blocks of `codec`, uint8 [rows, row_bytes], and the largest error of one; None if unfit."""
    if lattice is None:
        return None
    codes, columns = lattice.codes, lattice.codes.shape[1]
    size = min(lattice.group_size, columns)
    if size % BLOCK or columns % BLOCK:
        return None
    per_block = size // BLOCK
    scales = lattice.scales.repeat(per_block, axis=1)[:, : columns // BLOCK]
    zeros = lattice.zeros.repeat(per_block, axis=1)[:, : columns // BLOCK]
    blocks = codes.reshape(len(codes), -1, BLOCK)
    halves, lost = _halves(scales)
    if halves is None:
        return None
    if codec == "Q4_1":
        offsets = -zeros.astype(np.float32) * scales
        mins, lost_mins = _halves(offsets)
        if mins is None or (blocks.size and blocks.max() > 15):
            return None
        worst = (15 * lost + lost_mins).max(initial=0.0)
        return _joined([halves, mins], _nibbles(blocks)), float(worst)
    steps = blocks.astype(np.int16) - zeros[:, :, None]
    low, high = _RANGES[codec]
    if steps.size and (steps.min() < low or steps.max() > high):
        return None
    error = float((lost * np.abs(steps).max(axis=2, initial=0)).max(initial=np.float32(0)))
    if codec == "Q8_0":
        return _joined([halves], steps.astype(np.int8).view(np.uint8)), error
    return _joined([halves], _nibbles((steps + 8).astype(np.uint8))), error


def _halves(values: NDArray[np.float32]) -> tuple[NDArray[np.float16] | None, NDArray[np.float32]]:
    """Values as halves and what that loses; None if one is no number or would lose more than rounding a normal half."""
    with np.errstate(over="ignore", invalid="ignore"):
        halves = values.astype("<f2")
        lost = np.abs(halves.astype(np.float32) - values)
    sound = np.isfinite(halves) & ((lost == 0) | (np.abs(values) >= _SMALLEST))
    return (halves if sound.all() else None), lost


def _nibbles(blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Low nibble: weight j, high nibble: weight j + 16."""
    low, high = blocks[:, :, : BLOCK // 2], blocks[:, :, BLOCK // 2 :]
    packed: NDArray[np.uint8] = np.bitwise_or(low, np.left_shift(high, np.uint8(4)))
    return packed


def _joined(halves: list[NDArray[np.float16]], codes: NDArray[np.uint8]) -> Packed:
    heads = [np.ascontiguousarray(value)[:, :, None].view(np.uint8) for value in halves]
    packed: Packed = np.concatenate([*heads, codes], axis=2).reshape(len(codes), -1)
    return packed
