"""Error feedback and descent: codes for a grid, column by column, with the whole of H.

`feedback` is GPTQ's loop. Columns are rounded in a fixed order; A is upper triangular with A A^T = H in that order. The
loss is the squared length of (W - Q) A, of which component j depends on the columns up to j only, so column j does best
as the code nearest to

    w_j + sum over i < j of (w_i - q_i) A_ij / A_jj

That is what GPTQ finds step by step with the factor of H^-1, without the inverse. Sums are taken within a block of
columns one by one and over the blocks before it as a product, which changes nothing but the speed.

`Descent` takes a finished matrix further down, alternately

- d and dmin of each block to their least squares as halfs, both or either,
- scale and min of each sub-block to whole numbers: for a min, the best scale is the nearest to its least squares; of
  the mins around their joint least squares, and the present one, the best pair is taken,
- each code to the best one while all others stand.

It works stripe by stripe, blocks of together STRIPE columns or a little more: first their grids, then their codes, then
what they moved is taken off everybody's slope in one product. Each step is taken where it lowers
tr((W - Q) H (W - Q)^T) and judged by the exact change of that, so the loss falls.

Ref: Frantar et al., GPTQ, arXiv 2210.17323; without the inverse, as Babai's nearest plane: Chen et al., arXiv
2507.18553; coordinate descent as in QuantEase, arXiv 2309.01885.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith.quant.algorithms import blockwise, rowwise
from weightsmith.quant.algorithms.columns import Columns

BLOCK = 128  # columns that are rounded one by one before a product takes what they moved further
STRIPE = 128  # columns at least that are moved together, first their grids and then their codes
MOST = 512  # columns of a stripe up to which a kernel is faster than products of whole matrices
FIXED = ((1, 1), (0, 0))  # a grid without integers

Begin = Callable[[int, Tensor], None]


def feedback(
    wt: Tensor, answers: Tensor, grid: Columns, labels: list[int], *, bounds: list[int], begin: Begin | None = None
) -> Tensor:
    """Round wt [in, out] row by row with error feedback; codes uint8 [in, out]. wt becomes what they are off, W - Q.

    answers: A_ij / A_jj, see `moments.answers`. labels: the group of every row. bounds: where blocks end. begin(i,
    rest) may choose the grid of row i's group before it is rounded, from the rest of its block as it stands.
    """
    codes = torch.empty_like(wt, dtype=torch.uint8)
    start = 0
    for stop in bounds:
        own, corner = wt[start:stop], answers[start:stop, start:stop]
        here = own.clone()
        if start:
            here.addmm_(answers[:start, start:stop].T, wt[:start])
        if begin is None and _is_plain(here):
            codes[start:stop], off = rowwise.feed(here, own, corner, grid, torch.tensor(labels[start:stop]))
            own.copy_(off)
        else:
            for i in range(stop - start):
                if begin is not None:
                    begin(start + i, here[i:])
                codes[start + i], q = grid.nearest(here[i], labels[start + i])
                own[i] -= q
                here[i + 1 :].addr_(corner[i, i + 1 :], own[i])
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
class _Stripe:
    """Neighbouring columns, with their square of H and the slope there, which follows every move among them."""

    start: int
    corner: Tensor
    slope: Tensor

    def inside(self, columns: slice) -> slice:
        """The columns counted from the stripe's first."""
        return slice(columns.start - self.start, columns.stop - self.start)

    def follow(self, columns: slice, moved: Tensor, *, behind: bool = False) -> None:
        """Bring the slope up to date after `columns` were moved; behind: only of those that come later."""
        inside = self.inside(columns)
        first = inside.stop if behind else 0
        self.slope[first:].addmm_(self.corner[first:, inside], moved, alpha=-1)


@dataclass(slots=True, eq=False)
class Descent:
    """Codes and grid on their way down. All transposed, [in, out] and [groups, out]; groups are neighbouring columns.

    slope: (H (W - Q))^T, half the negative gradient of the loss by Q.
    """

    h: Tensor
    q: Tensor
    slope: Tensor
    codes: Tensor
    grid: Columns

    def sweep(self, *, last: bool = False) -> None:
        """Stripe by stripe: every block's grid once, then every code. last: `slope` will not be asked any more."""
        ends = self.grid.ends()
        first = 0
        for block in range(len(ends)):
            start, stop = ends[first - 1] if first else 0, ends[block]
            if stop - start < STRIPE and block + 1 < len(ends):
                continue
            stripe = _Stripe(start, self.h[start:stop, start:stop].contiguous(), self.slope[start:stop].clone())
            old = self.q[start:stop].clone()
            self._move_grid(stripe, ends[first : block + 1], first)
            self._move_codes(stripe, stop)
            behind = stop if last else 0
            self.slope[behind:].addmm_(self.h[behind:, start:stop], self.q[start:stop] - old, alpha=-1)
            first = block + 1

    def _move_grid(self, stripe: _Stripe, ends: list[int], first: int) -> None:
        """Halfs and integers of blocks from `first` on, block after block; ends: where they end."""
        grid, start = self.grid, stripe.start
        if _is_plain(self.q) and grid.is_simple and ends[-1] - start < MOST:
            columns, blocks = slice(start, ends[-1]), slice(first, first + len(ends))
            old = self.q[columns]
            grid.d[blocks], q = blockwise.refit(
                stripe.slope,
                stripe.corner,
                grid,
                blocks,
                ends=[end - start for end in ends],
                codes=self.codes[columns],
                q=old,
            )
            grid.refresh(blocks)
            stripe.follow(columns, q - old)
            old.copy_(q)
            return
        for block, stop in enumerate(ends, first):
            self._move_block(block, slice(start, stop), stripe)
            start = stop

    def _move_block(self, block: int, columns: slice, stripe: _Stripe) -> None:
        grid = self.grid
        inside, places = stripe.inside(columns), grid.places[columns]
        steps = grid.levels.values(self.codes[columns]).to(self.q.dtype) - grid.zeros[places]
        if self._move_halfs(block, stripe.corner[inside, inside], stripe.slope[inside], steps):
            self._settle(columns, stripe)
        if grid.reach == FIXED:
            return
        width = len(steps) // grid.per
        for k in range(grid.per):
            span = slice(columns.start + k * width, columns.start + (k + 1) * width)
            here = stripe.inside(span)
            square, slope, own = stripe.corner[here, here], stripe.slope[here], steps[k * width : (k + 1) * width]
            if self._move_integers(block, block * grid.per + k, square, slope, own):
                self._settle(span, stripe)

    def _settle(self, columns: slice, stripe: _Stripe) -> None:
        """Weights of columns whose grid has moved."""
        q = self.grid.weights(self.codes[columns], self.grid.places[columns])
        stripe.follow(columns, q - self.q[columns])
        self.q[columns] = q

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
        grid.refresh(slice(block, block + 1))
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
        grid.refresh(slice(block, block + 1))
        return bool(better.any())

    def _move_codes(self, stripe: _Stripe, end: int) -> None:
        """Each code to the best one while all others stand, column by column."""
        for start in range(stripe.start, end, BLOCK):
            columns = slice(start, min(start + BLOCK, end))
            inside = stripe.inside(columns)
            slope, corner = stripe.slope[inside], stripe.corner[inside, inside]
            codes, q, places = self.codes[columns], self.q[columns], self.grid.places[columns]
            if _is_plain(slope):
                found, new = rowwise.descend(slope, corner, self.grid, places, codes=codes, q=q)
            else:
                found, new = self._descended(slope.clone(), corner, places.tolist(), codes, q)
            if columns.stop < end:
                stripe.follow(columns, new - q, behind=True)
            codes.copy_(found)
            q.copy_(new)

    def _descended(
        self, slope: Tensor, corner: Tensor, labels: list[int], codes: Tensor, q: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What `rowwise.descend` finds, column by column; slope is used up."""
        codes, q = codes.clone(), q.clone()
        for i in range(len(q)):
            old = q[i].clone()
            codes[i], q[i] = self.grid.nearest(old + slope[i] / corner[i, i], labels[i])
            slope[i + 1 :].addr_(corner[i, i + 1 :], q[i] - old, alpha=-1)
        return codes, q


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
