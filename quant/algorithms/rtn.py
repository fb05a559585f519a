"""Uniform grids per group of input columns: what they are, how to choose their scales, and plain rounding to them.

A group is `group_size` neighbouring columns of one row (the last may be shorter), all with one scale s and one integer
zero z. A weight is stored as a code q of 0 .. 2^bits - 1 and means

    w = (q - z) s        symmetric grids: z = 2^(bits-1) always

Scales are halves, as every container of this kind stores them, so they are rounded before any weight is.

Two ways to choose them. `reference` spans the group's range: symmetric s = 2 max|w| / (2^bits - 1), as GPTQ's own
quantizer does. `search` minimises sum h (w - w')^2 with an importance h per column: it tries shrunken ranges of either
sign (a negative scale turns the grid round, so that the larger tail gets the extra code), refines the best by least
squares, and keeps the reference where nothing is better, so no group is worse than by plain rounding.

Ref: GPTQ quant.py (IST-DASLab/gptq); importance-weighted search as in llama.cpp's make_qx_quants; negative scales as
in Intel's AutoRound ("full range symmetric").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from weightsmith.errors import IntegrityError, UnsupportedError, UsageError
from weightsmith.quant.algorithms import groupwise

CHUNK = 1 << 22  # weights searched at once
BITS = (2, 3, 4, 8)
HALF_MAX = 65504.0


@dataclass(frozen=True, slots=True)
class Grid:
    """bits per code; group_size in columns, -1 for whole rows; sym: zeros in the middle; least_zero: of an asymmetric
    grid (1 where a container stores zero - 1). Raises UsageError."""

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    least_zero: int = 0

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError(f"{self.bits} bits are not supported", hint=f"Known: {', '.join(map(str, BITS))}.")
        if self.group_size != -1 and self.group_size < 2:
            raise UsageError(f"group size {self.group_size}, expected 2 or more, or -1 for whole rows")

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero of a symmetric grid."""
        return 1 << (self.bits - 1)

    def size(self, columns: int) -> int:
        """Columns of a full group, in rows of `columns`."""
        return columns if self.group_size == -1 else self.group_size

    def groups(self, columns: int) -> int:
        """Groups in a row of `columns`."""
        return -(-columns // self.size(columns))

    def places(self, columns: int) -> Tensor:
        """The group of every column, int64 [columns]."""
        return torch.arange(columns) // self.size(columns)


@dataclass(slots=True, eq=False)
class Quantized:
    """A matrix on a grid. codes: uint8 [out, in]; scales: float32 [out, groups], exact halves; zeros: int16 [out,
    groups]; g_idx: int64 [in], the group of every column."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor

    def rows(self, start: int, stop: int) -> Quantized:
        """Its rows [start, stop), not copied."""
        return Quantized(self.codes[start:stop], self.scales[start:stop], self.zeros[start:stop], self.g_idx)

    def dequantize(self) -> Tensor:
        """The weights it stands for, float32 [out, in]."""
        rows, columns = self.codes.shape
        groups = self.scales.shape[1]
        size = columns // groups
        if size * groups == columns and torch.equal(
            self.g_idx, torch.arange(columns, device=self.g_idx.device) // size
        ):
            steps = self.codes.view(rows, groups, size) - self.zeros.float()[:, :, None]
            return steps.mul_(self.scales[:, :, None]).view(rows, columns)
        steps = self.codes.float() - self.zeros.float()[:, self.g_idx]
        return steps.mul_(self.scales[:, self.g_idx])


def half(scales: Tensor) -> Tensor:
    """Scales rounded to halves, in their own dtype; UnsupportedError beyond the range of halves."""
    _check_reach(float(scales.abs().max()) if scales.numel() else 0.0)
    return scales.half().to(scales.dtype)


def _check_reach(largest: float) -> None:
    if largest > HALF_MAX:
        raise UnsupportedError("a scale is beyond the range of half precision", hint="Its weights are too large.")


def codes_of(w: Tensor, scales: Tensor, zeros: Tensor, grid: Grid) -> Tensor:
    """Nearest codes of `w` (float, whole numbers); scales and zeros of its shape or broadcast to it."""
    inverse = torch.where(scales == 0, torch.zeros_like(scales), 1 / scales)
    return (w * inverse).round_().add_(zeros).clamp_(0, grid.top)


def check_finite(w: Tensor) -> None:
    """Raise IntegrityError if a weight is NaN or Inf; the caller knows the tensor's name."""
    extremes = torch.aminmax(w) if w.numel() else ()  # NaN if any weight is
    if not all(bool(torch.isfinite(one)) for one in extremes):
        raise IntegrityError("a weight is NaN or Inf")


def _grouped(w: Tensor, size: int) -> Tensor:
    """[rows, columns] as [rows, groups, size], the last group filled up with zeros."""
    return functional.pad(w, (0, -w.shape[1] % size)).view(len(w), -1, size)


def reference(w: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales and zeros [rows, groups] that span each group's range; w is float [rows, columns]."""
    groups = _grouped(w, grid.size(w.shape[1]))
    if grid.sym:
        scales = half(groups.abs().amax(dim=2) * (2 / grid.top))
        return scales, torch.full_like(scales, grid.middle)
    low, high = groups.amin(dim=2).clamp_(max=0), groups.amax(dim=2).clamp_(min=0)
    scales = half((high - low) / grid.top)
    inverse = torch.where(scales == 0, torch.zeros_like(scales), 1 / scales)
    return scales, (-low * inverse).round_().clamp_(grid.least_zero, grid.top)


@dataclass(slots=True, eq=False)
class _Best:
    """The best scales and zeros [rows, groups, 1] so far for groups w [rows, groups, size]; h: [groups, size]."""

    w: Tensor
    h: Tensor
    grid: Grid
    scales: Tensor
    zeros: Tensor
    loss: Tensor

    def offer(self, scales: Tensor, zeros: Tensor) -> None:
        """Take candidates wherever they lose less; a scale beyond half precision never does."""
        scales = scales.half().to(scales.dtype)
        zeros = zeros.clamp(self.grid.least_zero, self.grid.top)
        steps = codes_of(self.w, scales, zeros, self.grid).sub_(zeros)
        loss = steps.mul_(scales).sub_(self.w).square_().mul_(self.h).sum(dim=2, keepdim=True)
        better = loss < self.loss  # false for NaN
        self.loss = torch.where(better, loss, self.loss)
        self.scales = torch.where(better, scales, self.scales)
        self.zeros = torch.where(better, zeros, self.zeros)

    def refine(self) -> None:
        """Offer the least-squares scale of the present codes, and for an asymmetric grid the best zero for it."""
        codes = codes_of(self.w, self.scales, self.zeros, self.grid)
        steps = codes - self.zeros
        weighted = steps * self.h
        scales = (weighted * self.w).sum(2, keepdim=True) / (weighted * steps).sum(2, keepdim=True)
        self.offer(scales, self.zeros)
        if not self.grid.sym:
            apart = (codes - self.w / self.scales) * self.h
            self.offer(self.scales, (apart.sum(2, keepdim=True) / self.h.sum(1)[:, None]).round_())


def _factors(grid: Grid) -> list[float]:
    """Scales to try: shares of the extreme for a symmetric grid, of the range for an asymmetric one."""
    shares = torch.linspace(0.5, 1.05, 23 if grid.bits < 8 else 5).tolist()
    if not grid.sym:
        return [share / grid.top for share in shares]
    # The extreme gets code 0, of which there is one more, or the top one.
    return [factor for share in shares for factor in (-share / grid.middle, share / (grid.middle - 1))]


def _candidates(best: _Best) -> Iterator[tuple[Tensor, Tensor]]:
    grid, w = best.grid, best.w
    if grid.sym:
        place = w.abs().argmax(dim=2, keepdim=True)
        extreme = w.gather(2, place)
        for factor in _factors(grid):
            yield extreme * factor, best.zeros
        return
    low, high = w.amin(dim=2, keepdim=True), w.amax(dim=2, keepdim=True)
    for factor in _factors(grid):
        scales = (high - low) * factor
        zeros = (grid.top / 2 - (high + low) / (2 * scales)).round_()
        for step in (-1, 0, 1):
            yield scales, zeros + step


def search(w: Tensor, grid: Grid, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zeros [rows, groups] of least sum h (w - w')^2; w float [rows, columns], importance [columns].

    Raises UnsupportedError (a scale of the reference is beyond half precision).
    """
    # Only ratios count. A column that no text ever lit must still hold its weights.
    level = importance.to(w.dtype) / importance.mean().clamp(min=1e-30).to(w.dtype)
    level.clamp_(min=1e-6)
    if w.device.type == "cpu" and w.dtype == torch.float32:
        scales, zeros, reach = groupwise.search(w.T.contiguous(), grid, level, _factors(grid))
        _check_reach(reach)
        return scales.T, zeros.T
    return _searched(w, grid, level)


def _searched(w: Tensor, grid: Grid, level: Tensor) -> tuple[Tensor, Tensor]:
    """`search` as operations on whole matrices, for all devices; level: importance as it is to be used."""
    size = grid.size(w.shape[1])
    h = _grouped(level[None], size)[0]
    found = []
    step = max(1, CHUNK // w.shape[1])
    for start in range(0, len(w), step):
        rows = w[start : start + step]
        scales, zeros = reference(rows, grid)
        groups = _grouped(rows, size)
        loss = torch.full_like(scales, torch.inf)[:, :, None]
        best = _Best(groups, h, grid, scales[:, :, None], zeros[:, :, None], loss)
        best.offer(scales[:, :, None], zeros[:, :, None])
        for candidate in _candidates(best):
            best.offer(*candidate)
        for _ in range(2):
            best.refine()
        found.append((best.scales[:, :, 0], best.zeros[:, :, 0]))
    return torch.cat([scales for scales, _ in found]), torch.cat([zeros for _, zeros in found])


def rounded(w: Tensor, grid: Grid) -> Tensor:
    """What `quantize` without importance makes of finite w [rows, columns]: the weights alone, in w's precision."""
    scales, zeros = (found[:, :, None] for found in reference(w, grid))
    steps = codes_of(_grouped(w, grid.size(w.shape[1])), scales, zeros, grid).sub_(zeros)
    return steps.mul_(scales).view(len(w), -1)[:, : w.shape[1]]


@torch.no_grad()
def quantize(w: Tensor, grid: Grid, importance: Tensor | None = None) -> Quantized:
    """Round w float [out, in] to the nearest codes; `reference` scales, or by `search` with importance [in].

    Raises IntegrityError (NaN or Inf) and UnsupportedError (a scale beyond half precision).
    """
    check_finite(w)
    scales, zeros = reference(w, grid) if importance is None else search(w, grid, importance)
    places = grid.places(w.shape[1]).to(w.device)
    codes = codes_of(w, scales[:, places], zeros[:, places], grid)
    return Quantized(codes.to(torch.uint8), scales.float(), zeros.to(torch.int16), places)
