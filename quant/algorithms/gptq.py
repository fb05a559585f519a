"""GPTQ: round one column after another and let the columns that are still open make up for what was lost.

With H the second moments of the inputs, the output error of rounding W to Q is tr((W - Q) H (W - Q)^T). The loop over
columns and the sweeps are in `descent`, H is made ready in `moments`; here they meet GPTQ's and AWQ's grids.

What can be chosen:

- order: "none"; "act", by falling diagonal of H (large moments first, while many columns are left to answer);
  "group", the same among groups and within each, but never across;
- static_groups: scales are chosen beforehand from the original weights, so any order leaves column j in group
  j // group_size. Otherwise a group's scale is chosen when its first column comes up, from weights that have already
  answered for others; then "act" scatters columns over groups and g_idx tells which;
- sweeps: afterwards, alternately, each group's scale by least squares and each code by coordinate descent, both with
  the full H. Neither can raise the loss.

Scales are searched with importances that say what an error in a column costs after everything behind it has answered
(`moments.answers`); that is the diagonal of H where columns have nothing in common.

Ref: Frantar et al., GPTQ, arXiv 2210.17323; "group" is act_group_aware of GPTQModel; coordinate descent as in
QuantEase, arXiv 2309.01885.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from weightsmith.errors import UsageError
from weightsmith.quant.algorithms import descent
from weightsmith.quant.algorithms.columns import Columns, Levels
from weightsmith.quant.algorithms.descent import Descent, feedback
from weightsmith.quant.algorithms.moments import MOST_DAMP, answers, damped, factor
from weightsmith.quant.algorithms.rtn import Grid, Quantized, check_finite, search

ORDERS = ("none", "act", "group")


@dataclass(frozen=True, slots=True)
class Method:
    """How to run GPTQ; see the module. damp: share of H's mean diagonal to begin with. Raises UsageError."""

    order: Literal["none", "act", "group"] = "act"
    static_groups: bool = True
    damp: float = 0.01
    sweeps: int = 2

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise UsageError(f"no such order: {self.order!r}", hint=f"Known: {', '.join(ORDERS)}.")
        if not 0 < self.damp <= MOST_DAMP or self.sweeps < 0:
            raise UsageError(f"damp {self.damp} or sweeps {self.sweeps} is out of range")

    @property
    def scatters(self) -> bool:
        """True if columns of a group are not neighbours (desc_act of GPTQ checkpoints)."""
        return self.order == "act" and not self.static_groups


def order_of(diagonal: Tensor, grid: Grid, order: str) -> Tensor:
    """The order of rounding, int64 [in], for the diagonal of H."""
    columns = len(diagonal)
    if order == "none":
        return torch.arange(columns, device=diagonal.device)
    falling = torch.argsort(diagonal, descending=True, stable=True)
    if order == "act":
        return falling
    places = grid.places(columns).to(diagonal.device)
    sums = torch.zeros(grid.groups(columns), dtype=diagonal.dtype, device=diagonal.device).index_add_(
        0, places, diagonal
    )
    means = sums / torch.bincount(places)
    rank = torch.empty_like(places[: len(means)])
    rank[torch.argsort(means, descending=True, stable=True)] = torch.arange(len(means), device=rank.device)
    return falling[torch.argsort(rank[places[falling]], stable=True)]


@dataclass(slots=True, eq=False)
class _Spans:
    """Chooses a group's scale when its first column comes up, from weights that have answered for others.

    labels: the group of every column in the order of rounding. firsts: where groups begin in it, empty if static.
    """

    columns: Columns
    labels: list[int]
    firsts: list[int]
    grid: Grid
    importance: Tensor

    def __call__(self, i: int, rest: Tensor) -> None:
        if i in self.firsts:
            group = self.labels[i]
            following = self.firsts.index(i) + 1
            stop = self.firsts[following] if following < len(self.firsts) else len(self.labels)
            row = Grid(self.grid.bits, -1, self.grid.sym, self.grid.least_zero)
            scales, zeros = search(rest[: stop - i].T, row, self.importance[i:stop])
            self.columns.d[group], self.columns.zeros[group] = scales[:, 0], zeros[:, 0]
            self.columns.refresh(slice(group, group + 1))

    def bounds(self) -> list[int]:
        """Ends of blocks of at least BLOCK columns, none of which cuts a group whose scale is chosen on the way."""
        columns = len(self.labels)
        if not self.firsts:
            return descent.even_bounds(columns)
        found = [0]
        for end in (*self.firsts[1:], columns):
            if end - found[-1] >= descent.BLOCK or end == columns:
                found.append(end)
        return found[1:]


def _spans(w: Tensor, grid: Grid, method: Method, order: Tensor, importance: Tensor) -> _Spans:
    """The grid, chosen or to be chosen; w [out, in] and places in the columns' own order."""
    places = grid.places(w.shape[1]).to(w.device)
    if method.static_groups:
        own = torch.empty_like(importance)
        own[order] = importance
        scales, zeros = (found.T.contiguous() for found in search(w, grid, own))
        columns = Columns(Levels(grid.top), places, zeros, scales, torch.ones_like(scales))
        return _Spans(columns, places[order].tolist(), [], grid, importance)
    if method.scatters:
        labels = places
        places = torch.empty_like(labels)
        places[order] = labels
    else:
        labels = places[order]
    scales = torch.zeros(grid.groups(w.shape[1]), w.shape[0], dtype=w.dtype, device=w.device)
    columns = Columns(Levels(grid.top), places, torch.zeros_like(scales), scales, torch.ones_like(scales))
    new = torch.ones_like(labels, dtype=torch.bool)
    new[1:] = labels[1:] != labels[:-1]
    firsts = torch.nonzero(new)[:, 0].tolist()
    return _Spans(columns, labels.tolist(), firsts, grid, importance)


@torch.no_grad()
def quantize(w: Tensor, h: Tensor, grid: Grid, method: Method | None = None, *, shrink: float = 0.0) -> Quantized:
    """Quantize w [out, in] with second moments h [in, in] of its inputs (sums or means, never changed).

    shrink: what of h is taken for chance, see `moments.shrinkage`.
    float32 throughout unless w is float64. On a CPU the result depends on nothing but the inputs and torch's number
    of threads. Raises IntegrityError (weights or moments that are not finite), UnsupportedError (scales beyond half
    precision), UsageError (h of another size).
    """
    method = method or Method()
    check_finite(w)
    if h.shape != (w.shape[1], w.shape[1]):
        raise UsageError(f"second moments {list(h.shape)} for a matrix {list(w.shape)}")
    w = w.to(torch.float64 if w.dtype == torch.float64 else torch.float32)
    order = order_of(h.diagonal(), grid, method.order)
    a, share = factor(h, order, method.damp, shrink, w.dtype)
    feed, importance = answers(a)
    wt = w.T.contiguous()
    spans = _spans(wt.T, grid, method, order, importance)
    columns = spans.columns
    begin = spans if spans.firsts else None
    off = wt[order]
    found = feedback(off, feed, columns, spans.labels, bounds=spans.bounds(), begin=begin)
    del a, feed
    back = torch.argsort(order)
    if method.scatters:  # descent wants the columns of a group beside each other, as they were rounded
        h, columns.places, codes = h.index_select(0, order).index_select(1, order), columns.places[order], found
    else:
        codes, off = found[back], off[back]
    if method.sweeps:
        matrix = damped(h, share, shrink).to(w.dtype)
        down = Descent(matrix, columns.weights(codes, columns.places), matrix @ off, codes, columns)
        for left in reversed(range(method.sweeps)):
            down.sweep(last=not left)
    if method.scatters:
        codes, columns.places = codes[back], columns.places[back]
    scales, zeros = columns.d.T.contiguous().float(), columns.zeros.T.to(torch.int16).contiguous()
    return Quantized(codes.T.contiguous(), scales, zeros, columns.places)
