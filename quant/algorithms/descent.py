"""Error feedback and descent: codes for a grid, column by column, with the whole of H.

`feedback` is GPTQ's loop. Columns are rounded in a fixed order; U is upper triangular with U^T U = H^-1 in that order.
After column i is rounded with error e = (w_i - q_i) / U_ii, the best answer of all later columns is W_j -= e U_ij, and
what remains lost is the sum of all e^2. Updates are applied within a block of columns at once and to the rest block by
block, which changes nothing but the speed.

`Descent` takes a finished matrix further down, alternately

- d and dmin of each block to their least squares as halfs, both or either,
- scale and min of each sub-block to whole numbers: for a min, the best scale is the nearest to its least squares; of
  the mins around their joint least squares, and the present one, the best pair is taken,
- each code to the best one while all others stand.

Each step is taken where it lowers tr((W - Q) H (W - Q)^T) and judged by the exact change of that, so the loss falls.

Ref: Frantar et al., GPTQ, arXiv 2210.17323; coordinate descent as in QuantEase, arXiv 2309.01885.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith.quant.algorithms import rowwise
from weightsmith.quant.algorithms.columns import Columns, Place

BLOCK = 128  # columns per lazy update
FIXED = ((1, 1), (0, 0))  # a grid without integers

Begin = Callable[[int, Tensor], None]


def feedback(
    wt: Tensor, u: Tensor, grid: Columns, labels: list[int], *, bounds: list[int], begin: Begin | None = None
) -> Tensor:
    """Round wt [in, out] row by row with error feedback; codes uint8 [in, out]. wt is used up.

    labels: the group of every row. bounds: where blocks end. begin(i, wt) may choose the grid of row i's group before
    it is rounded; within its block wt is up to date.
    """
    codes = torch.empty_like(wt, dtype=torch.uint8)
    start = 0
    for stop in bounds:
        here, corner = wt[start:stop], u[start:stop, start:stop]
        if begin is None and _is_plain(here):
            codes[start:stop], errors = rowwise.feed(here, corner, grid, torch.tensor(labels[start:stop]))
            wt[stop:].addmm_(u[start:stop, stop:].T, errors, alpha=-1)
            start = stop
            continue
        errors = torch.empty_like(here)
        for i in range(stop - start):
            if begin is not None:
                begin(start + i, wt)
            found, q = grid.nearest(here[i], labels[start + i])
            codes[start + i] = found
            errors[i] = (here[i] - q).div_(corner[i, i])
            here[i + 1 :].addr_(corner[i, i + 1 :], errors[i], alpha=-1)
        wt[stop:].addmm_(u[start:stop, stop:].T, errors, alpha=-1)
        start = stop
    return codes


def _is_plain(values: Tensor) -> bool:
    """Whether `rowwise` can do it."""
    return values.device.type == "cpu" and values.dtype == torch.float32


def even_bounds(columns: int) -> list[int]:
    """Ends of blocks of BLOCK columns."""
    return [*range(BLOCK, columns, BLOCK), columns]


def _halfs(values: Tensor) -> Tensor:
    return values.half().to(values.dtype)


@dataclass(slots=True, eq=False)
class Descent:
    """Codes and grid on their way down. All in the columns' own order and transposed: [in, out] and [groups, out].

    slope: (H (W - Q))^T, half the negative gradient of the loss by Q.
    """

    h: Tensor
    q: Tensor
    slope: Tensor
    codes: Tensor
    grid: Columns

    def sweep(self, *, last: bool = False) -> None:
        """Every block's grid once, then every code once. last: of `slope`, nothing will be asked any more."""
        self.move_grid()
        self.move_codes(last=last)

    def move_grid(self) -> None:
        """Halfs and integers of all blocks, block after block."""
        grid = self.grid
        order = torch.argsort(grid.places, stable=True)
        scattered = bool((order[1:] < order[:-1]).any())
        ends = [0, *torch.cumsum(torch.bincount(grid.places, minlength=len(grid.scales)), 0).tolist()]
        for block in range(len(grid.d)):
            groups = range(block * grid.per, (block + 1) * grid.per)
            start, stop = ends[groups[0]], ends[groups[-1] + 1]
            columns = order[start:stop] if scattered else slice(start, stop)
            spans = [(group, slice(ends[group] - start, ends[group + 1] - start)) for group in groups]
            self._move_block(block, columns, spans)

    def _move_block(self, block: int, columns: Place, spans: list[tuple[int, slice]]) -> None:
        grid = self.grid
        corner = self.h[columns][:, columns]
        slope, old, codes = self.slope[columns].clone(), self.q[columns].clone(), self.codes[columns]
        places = grid.places[columns]
        steps = grid.levels.values(codes).to(old.dtype) - grid.zeros[places]
        q = old
        if self._move_halfs(block, corner, slope, steps):
            q = grid.weights(codes, places)
            slope.addmm_(corner, q - old, alpha=-1)
        q = q.clone()
        if grid.reach != FIXED:
            for group, span in spans:
                if self._move_integers(block, group, corner[span, span], slope[span], steps[span]):
                    new = grid.weights(codes[span], places[span])
                    slope.addmm_(corner[:, span], new - q[span], alpha=-1)
                    q[span] = new
        self.q[columns] = q
        self.slope.addmm_(self.h[:, columns], q - old, alpha=-1)

    def _move_halfs(self, block: int, corner: Tensor, slope: Tensor, steps: Tensor) -> bool:
        """d and dmin of a block; whether any moved."""
        grid = self.grid
        groups, count = grid.groups(block), len(steps)

        def spread(values: Tensor) -> Tensor:  # of the block's groups to its columns, all groups alike or only one
            return values[groups].repeat_interleave(count // grid.per, 0) if grid.per > 1 else values[groups]

        a = steps * spread(grid.scales)
        ca = corner @ a
        pa, aa = (a * slope).sum(0), (a * ca).sum(0)
        d = grid.d[block]
        best = torch.zeros_like(pa)
        if grid.dmin is None or grid.mins is None:
            to = _halfs(d + _over(pa, aa))
            move = to - d
            better = 2 * move * pa - move.square() * aa > best  # false for NaN
            grid.d[block] = torch.where(better, to, d)
        else:
            dmin = grid.dmin[block]
            b = -spread(grid.mins).expand(count, -1)
            cb = corner @ b
            pb, bb, ab = (b * slope).sum(0), (b * cb).sum(0), (a * cb).sum(0)
            x, y = _solve(pa, pb, aa, ab, bb)
            zero = torch.zeros_like(x)
            new_d, new_min = d, dmin
            for one, other in ((x, y), (_over(pa, aa), zero), (zero, _over(pb, bb))):
                to, to_min = _halfs(d + one), _halfs(dmin + other)
                gain = _gain(to - d, to_min - dmin, pa, pb, aa, ab, bb)
                better = gain > best
                best = torch.where(better, gain, best)
                new_d, new_min = torch.where(better, to, new_d), torch.where(better, to_min, new_min)
            better = best > 0
            grid.d[block], grid.dmin[block] = new_d, new_min
        grid.refresh(block)
        return bool(better.any())

    def _move_integers(self, block: int, group: int, corner: Tensor, slope: Tensor, steps: Tensor) -> bool:
        """Scale and min of one sub-block; whether any moved."""
        grid = self.grid
        (low, high), (low_min, high_min) = grid.reach
        a = steps * grid.d[block]
        ca = corner @ a
        pa, aa = (a * slope).sum(0), (a * ca).sum(0)
        scale = grid.scales[group]
        best, new = torch.zeros_like(pa), scale
        if grid.dmin is None or grid.mins is None:
            to = (scale + _over(pa, aa)).round_().clamp_(low, high)
            move = to - scale
            better = 2 * move * pa - move.square() * aa > best
            grid.scales[group] = torch.where(better, to, scale)
        else:
            b, mins = -grid.dmin[block], grid.mins[group]
            pb, bb, ab = b * slope.sum(0), b.square() * corner.sum(), b * ca.sum(0)
            middle = (mins + _solve(pa, pb, aa, ab, bb)[1]).round_()
            new_min = mins
            for wanted in (middle, middle - 1, middle + 1, mins):
                to_min = wanted.clamp(low_min, high_min)
                other = to_min - mins
                to = (scale + _over(pa - other * ab, aa)).round_().clamp_(low, high)
                gain = _gain(to - scale, other, pa, pb, aa, ab, bb)
                better = gain > best
                best = torch.where(better, gain, best)
                new, new_min = torch.where(better, to, new), torch.where(better, to_min, new_min)
            better = best > 0
            grid.scales[group], grid.mins[group] = new, new_min
        grid.refresh(block)
        return bool(better.any())

    def move_codes(self, *, last: bool = False) -> None:
        """Each code to the best one while all others stand, column by column. last: see `sweep`."""
        labels = self.grid.places.tolist()
        for start in range(0, len(self.q), BLOCK):
            stop = min(start + BLOCK, len(self.q))
            slope, corner = self.slope[start:stop], self.h[start:stop, start:stop]
            if _is_plain(slope):
                codes, q = self.codes[start:stop], self.q[start:stop]
                places = self.grid.places[start:stop]
                found, new = rowwise.descend(slope, corner, self.grid, places, codes=codes, q=q)
                moved = new - q
                codes.copy_(found)
                q.copy_(new)
                first = stop if last else 0
                self.slope[first:].addmm_(self.h[first:, start:stop], moved, alpha=-1)
                continue
            slope = slope.clone()
            moved = torch.empty_like(slope)
            for i in range(stop - start):
                old = self.q[start + i]
                found, q = self.grid.nearest(old + slope[i] / corner[i, i], labels[start + i])
                self.codes[start + i] = found
                moved[i] = q - old
                slope[i + 1 :].addr_(corner[i, i + 1 :], moved[i], alpha=-1)
                self.q[start + i] = q
            self.slope.addmm_(self.h[:, start:stop], moved, alpha=-1)


def _over(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, torch.zeros_like(a))


def _solve(pa: Tensor, pb: Tensor, aa: Tensor, ab: Tensor, bb: Tensor) -> tuple[Tensor, Tensor]:
    """Moves of the two that gain most, zeros where they cannot be told apart."""
    det = aa * bb - ab.square()
    sound = det > 1e-5 * aa * bb
    zero = torch.zeros_like(det)
    return torch.where(sound, (bb * pa - ab * pb) / det, zero), torch.where(sound, (aa * pb - ab * pa) / det, zero)


def _gain(x: Tensor, y: Tensor, pa: Tensor, pb: Tensor, aa: Tensor, ab: Tensor, bb: Tensor) -> Tensor:
    """How far the loss falls if the one is moved by x and the other by y."""
    return 2 * (x * pa + y * pb) - (x.square() * aa + 2 * x * y * ab + y.square() * bb)
