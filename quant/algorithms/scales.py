"""Scales of a quantized matrix that can move while its codes stay: the halves that groups or blocks are scaled by.

Of the layouts that `lattice` opens these are d and, where there is one, dmin; of GPTQ's and AWQ's the scales of groups.
A weight is linear in each of them,

    w = a + b,   a moves with the scale, b (none but where there is an offset) with the offset's

so the slope of a loss along the logarithm of a scale is the sum of dL/dw times a (or b) over its weights.

Integers of sub-blocks and zeros stay as they are. What is moved is rounded to a half again, so `weights` are those
that will be read from the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightsmith.quant import codecs
from weightsmith.quant.algorithms.rtn import HALF_MAX
from weightsmith.quant.blocks import BLOCKS
from weightsmith.quant.lattice import Floats
from weightsmith.types import Packed

Halves = tuple[Tensor, ...]


@dataclass(slots=True, eq=False)
class Movable:
    """A matrix [out, in] as it is stored, and what can move in it.

    whole: its weights, float32. halves: float32 [out, groups], exact: scales and, with `offset`, offsets' scales.
    offset: float32 [out, in / n], b of every n neighbouring columns of a group. places: int64 [in], the group of every
    column; None where groups are runs of the same length.
    """

    whole: Tensor
    halves: Halves
    offset: Tensor | None = None
    places: Tensor | None = None

    def to(self, device: torch.device) -> Movable:
        """The same on a device."""
        offset, places = (None if one is None else one.to(device) for one in (self.offset, self.places))
        return Movable(self.whole.to(device), tuple(half.to(device) for half in self.halves), offset, places)

    def moved(self, by: Sequence[Tensor]) -> Halves:
        """The halves times 1 + by, each [out, groups], rounded to halves within their range."""
        return tuple(
            (half * (1 + one)).clamp_(-HALF_MAX, HALF_MAX).half().float()
            for half, one in zip(self.halves, by, strict=True)
        )

    def weights(self, halves: Halves) -> Tensor:
        """What the matrix is with other halves, a new float32 [out, in]."""
        ratio, *rest = (torch.where(old == 0, 1.0, new / old) for old, new in zip(self.halves, halves, strict=True))
        moved = self._times(self.whole, ratio)
        if self.offset is not None:
            added = self._times(self.offset, rest[0] - ratio)
            moved += added.repeat_interleave(self.whole.shape[1] // self.offset.shape[1], dim=1)
        return moved

    def slopes(self, gradient: Tensor) -> Halves:
        """Of a loss along each logarithm at the weights as they are stored, given dL/dw [out, in]: [out, groups] each.

        Times 1 / (1 + by) elsewhere, which a method that looks at directions alone need not know.
        """
        whole = self._summed(gradient * self.whole)
        if self.offset is None:
            return (whole,)
        subs = self.offset.shape[1]
        offset = self._summed(_runs(gradient, subs).sum(-1) * self.offset)
        return whole - offset, offset

    def _times(self, values: Tensor, factors: Tensor) -> Tensor:
        """Values [out, n columns or n runs of them] times factors [out, groups] of their groups."""
        if self.places is not None:
            return values * factors[:, self.places]
        return (_runs(values, factors.shape[1]) * factors[:, :, None]).flatten(1)

    def _summed(self, values: Tensor) -> Tensor:
        """Values [out, n columns or n runs of them] by group, [out, groups]."""
        groups = self.halves[0].shape[1]
        if self.places is not None:
            return torch.zeros_like(self.halves[0]).index_add_(1, self.places, values)
        return _runs(values, groups).sum(-1)


def _runs(values: Tensor, count: int) -> Tensor:
    """[out, n] as [out, count, n / count]."""
    return values.reshape(len(values), count, -1)


def of_blocks(codec: str, packed: Packed, row_len: int) -> Movable:
    """Packed rows uint8 [rows, row_bytes] of a layout in `codecs.OPEN`, or of Q8_0."""
    whole = torch.from_numpy(codecs.decode(codec, packed, row_len))
    if codec == "Q8_0":
        return Movable(whole, (torch.from_numpy(_halves_of_q8_0(packed).astype(np.float32)),))
    lattice = codecs.unpack(codec, packed)
    shape, d = lattice.shape, torch.from_numpy(lattice.d)
    if shape.mins is None:
        return Movable(whole, (d,))
    dmin = np.repeat(lattice.dmin, shape.block // shape.sub, axis=1)
    offset = torch.from_numpy(-dmin * lattice.mins.astype(np.float32))
    return Movable(whole, (d, torch.from_numpy(lattice.dmin)), offset)


def into_blocks(codec: str, packed: Packed, halves: Sequence[Floats]) -> Packed:
    """The same packed rows with other halves, float32 [rows, blocks] each."""
    if codec == "Q8_0":
        packed = packed.copy()
        _halves_of_q8_0(packed)[:] = halves[0]
        return packed
    lattice = codecs.unpack(codec, packed)
    lattice.d, lattice.dmin = halves[0], halves[1] if len(halves) > 1 else lattice.dmin
    return codecs.pack(codec, lattice)


def _halves_of_q8_0(packed: Packed) -> NDArray[np.float16]:
    """A view [rows, blocks] of the scales in the bytes."""
    block = BLOCKS["Q8_0"]
    return packed.reshape(len(packed), -1, block.nbytes)[:, :, :2].view("<f2")[:, :, 0]
