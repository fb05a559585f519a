"""The grid that a matrix's weights fall on, transposed: what GPTQ's groups and GGUF's blocks look like to one engine.

Every column belongs to a group and every group to a block. A code q stands for

    w = (value(q) - zero) * (d * scale) - dmin * min

with zero, scale and min per group, halfs d and dmin per block, and value the identity or a table; the products are
rounded to the working precision one by one, as decoders do. GPTQ's grids have groups that are blocks, scale 1 and no
min; k-quants have zero fixed by the layout (`quant.lattice`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from weightsmith.quant.lattice import Lattice


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """Codes 0 .. top and the values they stand for: themselves, or those of a rising table [top + 1]."""

    top: int
    table: Tensor | None = None
    edges: Tensor | None = None  # midpoints of the table

    @classmethod
    def of(cls, top: int, table: tuple[int, ...] | None, like: Tensor) -> Levels:
        """Levels in the precision and on the device of `like`."""
        if table is None:
            return cls(top)
        values = torch.tensor(table, dtype=like.dtype, device=like.device)
        return cls(top, values, (values[1:] + values[:-1]) / 2)

    def nearest(self, steps: Tensor, zero: Tensor) -> Tensor:
        """Codes, as whole numbers of the dtype of `steps`, whose value - zero is nearest; steps is used up."""
        if self.edges is None:
            return steps.round_().add_(zero).clamp_(0, self.top)
        return torch.bucketize(steps.add_(zero), self.edges, right=True).to(steps.dtype)

    def values(self, codes: Tensor) -> Tensor:
        """What codes (uint8, or whole numbers of the table's dtype) stand for."""
        return codes if self.table is None else self.table[codes.long()]


@dataclass(slots=True, eq=False)
class Columns:
    """A grid for a matrix [out, in], all fields transposed and in the working precision.

    zeros, scales, mins: [groups, out]; d, dmin: [blocks, out]; mins and dmin are None where the grid has no offsets.
    places: int64 [in], the group of every column. per: groups in a block. reach: least and largest scale, then min.
    steps, inverse and offsets: d * scale, 1 / that and -dmin * min as they stand, [groups, out], see `refresh`.
    """

    levels: Levels
    places: Tensor
    zeros: Tensor
    d: Tensor
    scales: Tensor
    dmin: Tensor | None = None
    mins: Tensor | None = None
    per: int = 1
    reach: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (0, 0))
    steps: Tensor = field(init=False)
    offsets: Tensor | None = field(init=False, default=None)
    inverse: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.steps = torch.empty_like(self.scales)
        self.inverse = torch.empty_like(self.scales)
        if self.dmin is not None:
            self.offsets = torch.empty_like(self.scales)
        self.refresh(slice(0, len(self.d)))

    @property
    def is_simple(self) -> bool:
        """Whether a block is a group with a scale of its own and nothing else."""
        return self.per == 1 and self.dmin is None and self.reach[0] == (1, 1)

    def ends(self) -> list[int]:
        """Where blocks of neighbouring columns end."""
        counts = torch.bincount(self.places, minlength=len(self.scales)).view(-1, self.per).sum(1)
        return counts.cumsum(0).tolist()

    def groups(self, block: int) -> slice:
        """The groups of a block."""
        return slice(block * self.per, (block + 1) * self.per)

    def refresh(self, blocks: slice) -> None:
        """Bring steps and offsets up to date after a change within blocks."""
        groups = slice(blocks.start * self.per, blocks.stop * self.per)

        def spread(values: Tensor) -> Tensor:
            return values[blocks].repeat_interleave(self.per, 0) if self.per > 1 else values[blocks]

        step = spread(self.d) * self.scales[groups]
        self.steps[groups] = step
        self.inverse[groups] = torch.where(step == 0, torch.zeros_like(step), 1 / step)
        if self.offsets is not None and self.dmin is not None and self.mins is not None:
            self.offsets[groups] = -(spread(self.dmin) * self.mins[groups])

    def nearest(self, w: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Codes nearest to weights [out] of a column of `group`, and their weights."""
        away = w if self.offsets is None else w - self.offsets[group]
        codes = self.levels.nearest(away * self.inverse[group], self.zeros[group])
        return codes, self.weights(codes, group)

    def weights(self, codes: Tensor, group: int | Tensor) -> Tensor:
        """Weights of codes, [out] of one group, or [columns, out] with the group of each."""
        found = (self.levels.values(codes) - self.zeros[group]).mul_(self.steps[group])
        return found if self.offsets is None else found.add_(self.offsets[group])


def of_lattice(lattice: Lattice, dtype: torch.dtype, device: torch.device) -> tuple[Columns, Tensor]:
    """The grid of an opened layout, and its codes uint8 [in, out]."""

    def turned(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.T.copy()).to(device)

    shape = lattice.shape
    d, scales = turned(lattice.d).to(dtype), turned(lattice.scales).to(dtype)
    has_min = shape.mins is not None
    grid = Columns(
        Levels.of(shape.top, shape.table, d),
        torch.arange(lattice.codes.shape[1], device=device) // shape.sub,
        torch.full_like(scales, shape.zero),
        d,
        scales,
        turned(lattice.dmin).to(dtype) if has_min else None,
        turned(lattice.mins).to(dtype) if has_min else None,
        shape.block // shape.sub,
        (shape.scales, shape.mins or (0, 0)),
    )
    return grid, turned(lattice.codes)


def to_lattice(lattice: Lattice, grid: Columns, codes: Tensor) -> Lattice:
    """`lattice` with what `grid` and `codes` [in, out] hold now."""

    def turned(values: Tensor, like: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values.T.cpu().numpy().astype(like.dtype))

    return Lattice(
        lattice.shape,
        turned(codes, lattice.codes),
        turned(grid.d, lattice.d),
        turned(grid.scales, lattice.scales),
        lattice.dmin if grid.dmin is None else turned(grid.dmin, lattice.dmin),
        lattice.mins if grid.mins is None else turned(grid.mins, lattice.mins),
    )
