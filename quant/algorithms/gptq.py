"""GPTQ: round one column after another and let the columns that are still open make up for what was lost.

With H the second moments of the inputs, the output error of rounding W to Q is tr((W - Q) H (W - Q)^T). Columns are
rounded in a fixed order. Let U be the upper triangular matrix with U^T U = H^-1 in that order; after column i is
rounded with error e = (w_i - q_i) / U_ii, the best answer of all later columns is W_j -= e U_ij, and what remains lost
is the sum of all e^2. Updates are applied within a block of columns at once and to the rest block by block, which
changes nothing but the speed.

H is damped by a share of its mean diagonal, raised until it has a Cholesky factor. U comes from the factor of H with
its axes reversed and one triangular inversion, so H itself is never inverted.

What can be chosen:

- order: "none"; "act", by falling diagonal of H (large moments first, while many columns are left to answer);
  "group", the same among groups and within each, but never across;
- static_groups: scales are chosen beforehand from the original weights, so any order leaves column j in group
  j // group_size. Otherwise a group's scale is chosen when its first column comes up, from weights that have already
  answered for others; then "act" scatters columns over groups and g_idx tells which;
- sweeps: afterwards, alternately, each group's scale by least squares and each code by coordinate descent, both with
  the full H. Neither can raise the loss.

Scales are searched with importances 1 / U_ii^2 (what an error in column i costs after everything behind it has
answered), which is the diagonal of H where columns have nothing in common.

Ref: Frantar et al., GPTQ, arXiv 2210.17323; "group" is act_group_aware of GPTQModel; coordinate descent as in
QuantEase, arXiv 2309.01885.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from weightsmith.errors import IntegrityError, UsageError
from weightsmith.quant.algorithms.rtn import Grid, Quantized, check_finite, codes_of, search

ORDERS = ("none", "act", "group")
BLOCK = 128  # columns per lazy update
EXACT = 8192  # up to so many columns the factor is computed in float64; beyond, memory counts
MOST_DAMP = 1.0

Scales = Callable[[int, Tensor], tuple[Tensor, Tensor]]


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


def loss_of(w: Tensor, q: Tensor, h: Tensor) -> float:
    """tr((w - q) h (w - q)^T): the squared output error, summed over the tokens of h, in its precision."""
    total = 0.0
    for start in range(0, len(w), 1024):
        error = (w[start : start + 1024].double() - q[start : start + 1024].double()).to(h.dtype)
        total += float(((error @ h).double() * error.double()).sum())
    return total


def damped(h: Tensor, share: float) -> tuple[Tensor, Tensor, float]:
    """H + share * mean(diag) I with dead columns made independent, U with U^T U = its inverse, and the share it took.

    h is float [in, in] in the order of rounding. Raises IntegrityError if no share up to 1 makes it definite.
    """
    wide = torch.float64 if len(h) <= EXACT else torch.float32
    h = h.to(wide, copy=True)
    diagonal = h.diagonal()
    mean = float(diagonal.mean())
    if not mean > 0:
        raise IntegrityError("all calibration inputs are zero or not finite")
    diagonal[diagonal <= 0] = mean
    added = 0.0
    while share <= MOST_DAMP:
        diagonal += (share - added) * mean
        added = share
        factor, info = torch.linalg.cholesky_ex(h.flip(0, 1))
        if int(info) == 0 and bool(torch.isfinite(factor.diagonal()).all()):
            factor = factor.flip(0, 1)  # upper, h = factor factor^T
            u = torch.linalg.solve_triangular(factor, torch.eye(len(h), dtype=wide, device=h.device), upper=True)
            if bool(torch.isfinite(u).all()):
                return h, u, share
        share *= 2.5
    raise IntegrityError("the second moments have no Cholesky factor", hint="Calibrate with more rows.")


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


def _feedback(wt: Tensor, u: Tensor, grid: Grid, scales: Scales, bounds: list[int]) -> Tensor:
    """Round wt [in, out] row by row with error feedback; codes uint8 [in, out]. wt is used up.

    bounds: where blocks end. scales(i, wt) gives row i's scales and zeros [out]; within its block wt is up to date.
    """
    codes = torch.empty_like(wt, dtype=torch.uint8)
    start = 0
    for stop in bounds:
        here, corner = wt[start:stop], u[start:stop, start:stop]
        errors = torch.empty_like(here)
        for i in range(stop - start):
            s, z = scales(start + i, wt)
            found = codes_of(here[i], s, z, grid)
            codes[start + i] = found
            errors[i] = (here[i] - (found - z) * s) / corner[i, i]
            here[i + 1 :].addr_(corner[i, i + 1 :], errors[i], alpha=-1)
        wt[stop:].addmm_(u[start:stop, stop:].T, errors, alpha=-1)
        start = stop
    return codes


@dataclass(slots=True, eq=False)
class _Descent:
    """Codes and scales on their way down. All in the columns' own order and transposed: [in, out] and [groups, out].

    slope: (H (W - Q))^T, half the negative gradient of the loss by Q.
    """

    h: Tensor
    q: Tensor
    slope: Tensor
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    grid: Grid
    g_idx: Tensor

    def move_scales(self) -> None:
        """Each group's scale to its least-squares value, if the rounded one is better."""
        for group in range(len(self.scales)):
            columns = torch.nonzero(self.g_idx == group)[:, 0]
            steps = self.codes[columns].to(self.q.dtype) - self.zeros[group]
            pull = (steps * self.slope[columns]).sum(0)
            stiff = (steps * (self.h[columns][:, columns] @ steps)).sum(0)
            wanted = self.scales[group] + torch.where(stiff > 0, pull / stiff, torch.zeros_like(pull))
            change = wanted.half().to(wanted.dtype) - self.scales[group]
            gain = 2 * change * pull - change.square() * stiff
            change = torch.where(gain > 0, change, torch.zeros_like(change))  # zero where NaN, too
            self.scales[group] += change
            moved = steps * change
            self.q[columns] += moved
            self.slope.addmm_(self.h[:, columns], moved, alpha=-1)

    def move_codes(self) -> None:
        """Each code to the best one while all others stand, column by column."""
        for start in range(0, len(self.q), BLOCK):
            stop = min(start + BLOCK, len(self.q))
            slope, corner = self.slope[start:stop].clone(), self.h[start:stop, start:stop]
            moved = torch.empty_like(slope)
            for i in range(stop - start):
                s, z = self.scales[self.g_idx[start + i]], self.zeros[self.g_idx[start + i]]
                found = codes_of(self.q[start + i] + slope[i] / corner[i, i], s, z, self.grid)
                self.codes[start + i] = found
                moved[i] = (found - z) * s - self.q[start + i]
                slope[i:].addr_(corner[i, i:], moved[i], alpha=-1)
            self.q[start:stop] += moved
            self.slope.addmm_(self.h[:, start:stop], moved, alpha=-1)


@dataclass(slots=True, eq=False)
class _Spans:
    """Scales and zeros [groups, out], known beforehand or chosen when a group's first column comes up.

    labels: the group of every column in the order of rounding. firsts: where groups begin in it, empty if static.
    """

    scales: Tensor
    zeros: Tensor
    labels: list[int]
    firsts: list[int]
    grid: Grid
    importance: Tensor

    def __call__(self, i: int, wt: Tensor) -> tuple[Tensor, Tensor]:
        group = self.labels[i]
        if i in self.firsts:
            following = self.firsts.index(i) + 1
            stop = self.firsts[following] if following < len(self.firsts) else len(wt)
            row = Grid(self.grid.bits, -1, self.grid.sym, self.grid.least_zero)
            scales, zeros = search(wt[i:stop].T, row, self.importance[i:stop])
            self.scales[group], self.zeros[group] = scales[:, 0], zeros[:, 0]
        return self.scales[group], self.zeros[group]

    def bounds(self) -> list[int]:
        """Ends of blocks of at least BLOCK columns, none of which cuts a group whose scale is chosen on the way."""
        columns = len(self.labels)
        ends = [*self.firsts[1:], columns] if self.firsts else [*range(BLOCK, columns, BLOCK), columns]
        found = [0]
        for end in ends:
            if end - found[-1] >= BLOCK or end == columns:
                found.append(end)
        return found[1:]


def _spans(w: Tensor, grid: Grid, method: Method, order: Tensor, importance: Tensor) -> tuple[_Spans, Tensor]:
    """The spans, and the group of every column; w [out, in] and the result in the columns' own order."""
    places = grid.places(w.shape[1]).to(w.device)
    if method.static_groups:
        own = torch.empty_like(importance)
        own[order] = importance
        scales, zeros = (found.T.contiguous() for found in search(w, grid, own))
        return _Spans(scales, zeros, places[order].tolist(), [], grid, importance), places
    if method.scatters:
        labels = places
        places = torch.empty_like(labels)
        places[order] = labels
    else:
        labels = places[order]
    scales = torch.zeros(grid.groups(w.shape[1]), w.shape[0], dtype=w.dtype, device=w.device)
    new = torch.ones_like(labels, dtype=torch.bool)
    new[1:] = labels[1:] != labels[:-1]
    firsts = torch.nonzero(new)[:, 0].tolist()
    return _Spans(scales, torch.zeros_like(scales), labels.tolist(), firsts, grid, importance), places


@torch.no_grad()
def quantize(w: Tensor, h: Tensor, grid: Grid, method: Method | None = None) -> Quantized:
    """Quantize w [out, in] with second moments h [in, in] of its inputs (sums or means, never changed).

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
    matrix, u, _ = damped(h[order[:, None], order], method.damp)
    importance = u.diagonal().square().reciprocal().to(w.dtype)
    spans, places = _spans(w, grid, method, order, importance)
    found = _feedback(w.T[order].contiguous(), u.to(w.dtype), grid, spans, spans.bounds())
    del u
    codes = torch.empty_like(found)
    codes[order] = found
    scales, zeros = spans.scales, spans.zeros
    if method.sweeps:
        back = torch.argsort(order)
        matrix = matrix[back[:, None], back].to(w.dtype)
        q = (codes.to(w.dtype) - zeros[places]) * scales[places]
        descent = _Descent(matrix, q, matrix @ (w.T - q), codes, scales, zeros, grid, places)
        for _ in range(method.sweeps):
            descent.move_scales()
            descent.move_codes()
    return Quantized(codes.T.contiguous(), scales.T.contiguous().float(), zeros.T.to(torch.int16).contiguous(), places)
