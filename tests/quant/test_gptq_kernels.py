"""The kernels that choose and move GPTQ's scales: each operation again in numpy, and against the torch path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from weightsmith.errors import UnsupportedError
from weightsmith.quant.algorithms import blockwise, descent, gptq, groupwise, rowwise, rtn
from weightsmith.quant.algorithms.columns import Columns, Levels
from weightsmith.quant.algorithms.descent import Descent
from weightsmith.quant.algorithms.gptq import Method
from weightsmith.quant.algorithms.moments import loss_of
from weightsmith.quant.algorithms.rtn import Grid

WEIGHTS = ("normal", "zeros", "outlier", "ties", "tiny", "large", "constant", "lone")
IMPORTANCES = ("ones", "wide", "mostly zero")
F32 = np.float32


def weights(kind: str, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    w = rng.standard_normal((rows, columns)) * 0.02
    if kind == "zeros":
        w[rng.random(rows) < 0.7] = 0
    elif kind == "outlier":
        w[:, rng.integers(columns)] *= 1000
    elif kind == "ties":
        w = rng.integers(-3, 4, (rows, columns)).astype(float)
    elif kind == "tiny":
        w *= 10.0 ** rng.uniform(-8, -3, (rows, 1))  # scales that are subnormal halves, and some that are zero
    elif kind == "large":
        w = np.clip(w * 1e6, -9e4, 9e4)  # scales near and beyond the largest half, among the candidates
    elif kind == "constant":
        w[:] = rng.standard_normal((rows, 1))
    elif kind == "lone":
        w[:, 1:] = 0
    return w.astype(F32)


def importance(kind: str, columns: int, rng: np.random.Generator) -> np.ndarray:
    found = np.ones(columns)
    if kind == "wide":
        found = 10.0 ** rng.uniform(-9, 6, columns)
    elif kind == "mostly zero":
        found = (rng.random(columns) < 0.2).astype(float)
    return found.astype(F32)


class SlowSearch:
    """One group for all rows, column by column, every operation rounded to float32; sums in runs as they are kept."""

    def __init__(self, w: np.ndarray, h: np.ndarray, grid: Grid, size: int) -> None:
        self.w, self.h, self.grid = w, h, grid
        self.filled = np.pad(w, ((0, 0), (0, size - w.shape[1])))

    def sums(self, *terms: np.ndarray) -> list[np.ndarray]:
        """Each term [rows, columns] summed over columns."""
        found = []
        for term in terms:
            total = np.zeros(len(term), F32)
            for start in range(0, term.shape[1], groupwise.RUN):
                part = np.zeros(len(term), F32)
                for column in term.T[start : start + groupwise.RUN]:
                    part = part + column
                total = total + part
            found.append(total)
        return found

    def steps(self, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
        by = np.where(scale == 0, F32(0), F32(1) / scale)
        low, high = -zero[:, None], (F32(self.grid.top) - zero)[:, None]
        return np.clip(np.rint(self.w * by[:, None]), low, high).astype(F32)

    def offer(self, scale: np.ndarray, zero: np.ndarray) -> None:
        scale = scale.astype(np.float16).astype(F32)
        error = self.steps(scale, zero) * scale[:, None] - self.w
        (loss,) = self.sums(error * error * self.h)
        better = loss < self.loss
        self.scale, self.zero = np.where(better, scale, self.scale), np.where(better, zero, self.zero)
        self.loss = np.where(better, loss, self.loss)

    def limited(self, zero: np.ndarray) -> np.ndarray:
        zero = np.where(np.isnan(zero), F32(self.grid.least_zero), np.rint(zero))
        return np.clip(zero, self.grid.least_zero, self.grid.top).astype(F32)

    def refine(self) -> None:
        zero, steps = self.zero, self.steps(self.scale, self.zero)
        above, below = self.sums(steps * self.h * self.w, steps * self.h * steps)
        self.offer(above / below, zero)
        if not self.grid.sym:
            apart = ((steps + zero[:, None]) - self.w / self.scale[:, None]) * self.h
            whole = self.sums(np.broadcast_to(self.h, apart.shape))[0]
            self.offer(self.scale, self.limited(self.sums(apart)[0] / whole))

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        scales, zeros = (
            found[:, 0].numpy() for found in rtn.reference(torch.from_numpy(self.w), Grid(*_whole(self.grid)))
        )
        self.scale, self.zero, self.loss = scales, zeros, np.full(len(scales), np.inf, F32)
        self.offer(scales, zeros)
        top = F32(self.grid.top)
        for factor in np.array(rtn._factors(self.grid), F32):
            if self.grid.sym:
                place = np.abs(self.w).argmax(1)
                self.offer(self.w[np.arange(len(self.w)), place] * factor, zeros)
                continue
            low, high = self.filled.min(1), self.filled.max(1)
            scale = (high - low) * factor
            middle = np.rint(top * F32(0.5) - (high + low) / (F32(2) * scale))
            for step in (-1, 0, 1):
                self.offer(scale, self.limited(middle + F32(step)))
        for _ in range(2):
            self.refine()
        return self.scale, self.zero


def _whole(grid: Grid) -> tuple[int, int, bool, int]:
    return grid.bits, -1, grid.sym, grid.least_zero


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.integers(2, 150),
    st.sampled_from([2, 5, 16, 33, 64, 100, -1]),
    st.sampled_from(rtn.BITS),
    st.sampled_from([(True, 0), (False, 0), (False, 1)]),
    st.sampled_from(WEIGHTS),
    st.sampled_from(IMPORTANCES),
)
def test_the_search_is_that_of_plain_loops(
    seed: int, rows: int, columns: int, size: int, bits: int, kind: tuple[bool, int], wild: str, matter: str
) -> None:
    rng = np.random.default_rng(seed)
    w, h = weights(wild, rows, columns, rng), importance(matter, columns, rng)
    grid = Grid(bits, size, *kind)
    size = grid.size(columns)
    level = torch.from_numpy(h) / torch.from_numpy(h).mean().clamp(min=1e-30)
    level = level.clamp(min=1e-6).numpy()
    try:
        scales, zeros = rtn.search(torch.from_numpy(w), grid, torch.from_numpy(h))
    except UnsupportedError:
        with pytest.raises(UnsupportedError):
            rtn.reference(torch.from_numpy(w), grid)
        return
    for group in range(grid.groups(columns)):
        span = slice(group * size, min((group + 1) * size, columns))
        with np.errstate(all="ignore"):
            expected = SlowSearch(w[:, span], level[span], grid, size).run()
        np.testing.assert_array_equal(scales[:, group].numpy(), expected[0])
        np.testing.assert_array_equal(zeros[:, group].numpy(), expected[1])


@pytest.mark.parametrize(
    "grid", [Grid(b, s, y) for b in rtn.BITS for s in (-1, 64, 100) for y in (True, False)], ids=str
)
def test_the_search_finds_what_the_one_for_all_devices_does(grid: Grid) -> None:
    rng = np.random.default_rng(0)
    w = torch.from_numpy(weights("normal", 60, 300, rng))
    level = torch.from_numpy(10.0 ** rng.uniform(-1, 1, 300)).float()
    found, expected = rtn.search(w, grid, level), rtn._searched(w, grid, level / level.mean())
    equal = (found[0] == expected[0]) & (found[1] == expected[1])
    assert equal.float().mean() > 0.98  # sums in another order: candidates that lose the same may change places
    places = grid.places(300)
    totals = [
        float(
            ((rtn.codes_of(w, s[:, places], z[:, places], grid) - z[:, places]) * s[:, places] - w).square()
            @ level
            @ torch.ones(60)
        )
        for s, z in (found, expected)
    ]
    assert totals[0] == pytest.approx(totals[1], rel=1e-3)


def test_scales_beyond_half_precision_are_refused() -> None:
    w = torch.zeros(20, 64)
    w[17, 3] = 65504 * 15 / 2 * 1.001
    for grid in (Grid(4, 32), Grid(4, -1), Grid(4, 32, sym=False)):
        rtn.search(w / 2.1, grid, torch.ones(64))
        with pytest.raises(UnsupportedError, match="half precision"):
            rtn.search(w * (1 if grid.sym else 2.1), grid, torch.ones(64))


def descending(
    rows: int, columns: int, grid: Grid, levels: Levels, rng: np.random.Generator, wild: str = "normal"
) -> Descent:
    """Random codes and scales on a grid, somewhere above their best."""
    w = torch.from_numpy(weights(wild, rows, columns, rng)).T.contiguous()
    x = rng.standard_normal((2 * columns, columns)) @ (rng.standard_normal((columns, columns)) + 3 * np.eye(columns))
    h = torch.from_numpy(x.T @ x / columns).float()
    count = grid.groups(columns)
    zeros = torch.from_numpy(rng.integers(0, levels.top + 1, (count, rows)).astype(F32))
    d = torch.from_numpy((rng.standard_normal((count, rows)) * 0.004).astype(np.float16).astype(F32))
    d[:, rng.random(rows) < 0.1] = 0
    codes = torch.from_numpy(rng.integers(0, levels.top + 1, (columns, rows)).astype(np.uint8))
    codes[:, rng.random(rows) < 0.1] = 0
    columns_of = Columns(levels, grid.places(columns), zeros, d, torch.ones_like(d))
    q = columns_of.weights(codes, columns_of.places)
    return Descent(h, q, h @ (w - q), codes, columns_of)


@settings(max_examples=60, deadline=None)
@example(6971, 39, 105, 2, False, "outlier")  # a slope of 1 that is left of sums of 4,000
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.integers(2, 140),
    st.sampled_from([2, 3, 16, 33, 64, -1]),
    st.booleans(),
    st.sampled_from(("normal", "zeros", "outlier", "tiny", "large")),
)
def test_scales_move_to_their_least_squares(
    seed: int, rows: int, columns: int, size: int, table: bool, wild: str
) -> None:
    rng = np.random.default_rng(seed)
    levels = Levels.of(15, tuple(range(-120, 120, 15)) if table else None, torch.zeros(1))
    grid = Grid(4, size)
    down = descending(rows, columns, grid, levels, rng, wild)
    places = grid.places(columns)
    ends = down.grid.ends()
    before, q = down.grid.d.double(), down.q.clone()
    new, made = blockwise.refit(
        down.slope, down.h, down.grid, slice(0, len(ends)), ends=ends, codes=down.codes, q=down.q
    )
    assert torch.equal(down.q, q)
    steps = levels.values(down.codes).float() - down.grid.zeros[places]
    assert torch.equal(made, steps * new[places])
    assert torch.equal(new, new.half().float())
    slope, h = down.slope.double(), down.h.double()
    summed = slope.abs()  # of what the kernel's slope, in float32, is the sum so far
    start = 0
    for group, stop in enumerate(ends):
        s, square = steps[start:stop].double(), h[start:stop, start:stop]
        linear, bent = (s * slope[start:stop]).sum(0), (s * (square @ s)).sum(0)
        off = (s.abs() * (1e-5 * slope[start:stop].abs() + 2**-22 * summed[start:stop])).sum(0)  # `linear`, at most
        best = torch.where(bent > 0, linear / bent.clamp(min=1e-30), 0)
        moved = new[group].double() - before[group]
        last_place = 2.0 ** torch.floor(torch.log2((before[group] + best).abs().clamp(min=2.0**-14))) * 2**-10
        slack = last_place * 0.51 + off / bent.clamp(min=1e-30)
        assert ((moved == 0) | ((moved - best).abs() <= slack)).all()
        gain = 2 * moved * linear - moved.square() * bent
        assert (gain >= -(moved.abs() * off + 1e-5 * moved.square() * bent)).all()
        better = 2 * best * linear - best.square() * bent  # who stays could not have won more than a half's rounding
        assert (
            (moved != 0) | (better <= (slack.square() * bent) * 1.01) | ((before[group] + best).abs() > 65504)
        ).all()
        change = (made[start:stop] - q[start:stop]).double()
        slope -= h[:, start:stop] @ change
        summed += h[:, start:stop].abs() @ change.abs()
        start = stop


@pytest.mark.parametrize("size", [16, 48, 64, 100, 128])
@pytest.mark.parametrize("columns", [64, 300])
def test_a_sweep_is_that_of_whole_matrices(size: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for plain in (True, False):
        down = descending(40, columns, Grid(4, size), Levels(15), np.random.default_rng(5))
        if not plain:
            monkeypatch.setattr(descent, "_is_plain", lambda _: False)
        down.sweep()
        found.append(down)
    one, other = found
    assert (one.codes == other.codes).float().mean() > 0.99
    assert (one.grid.d == other.grid.d).float().mean() > 0.97
    torch.testing.assert_close(one.slope, other.slope, rtol=0, atol=float(other.slope.abs().max()) * 0.05)
    assert torch.equal(one.q, one.grid.weights(one.codes, one.grid.places))


@pytest.mark.parametrize("grid", [Grid(4, 64), Grid(3, 50, sym=False), Grid(2, -1)], ids=str)
@pytest.mark.parametrize("method", [Method(), Method("act", static_groups=False), Method("group", False)], ids=str)
def test_the_torch_path_loses_the_same(grid: Grid, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    w = torch.from_numpy(weights("normal", 48, 256, rng))
    x = torch.from_numpy(rng.standard_normal((600, 256)) @ (rng.standard_normal((256, 256)) / 8 + np.eye(256))).float()
    h = x.T @ x
    fast = gptq.quantize(w, h, grid, method)
    monkeypatch.setattr(descent, "_is_plain", lambda _: False)
    slow = gptq.quantize(w, h, grid, method)
    assert (fast.codes == slow.codes).float().mean() > 0.98
    losses = [loss_of(w, found.dequantize(), h) for found in (fast, slow)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowwise, "LEAST", 1)
    rng = np.random.default_rng(1)
    w = torch.from_numpy(weights("normal", 100, 96, rng))
    found = []
    for count in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        down = descending(100, 96, Grid(4, 32), Levels(15), np.random.default_rng(2))
        ends = down.grid.ends()
        moved = blockwise.refit(down.slope, down.h, down.grid, slice(0, 3), ends=ends, codes=down.codes, q=down.q)
        found.append((*rtn.search(w, Grid(3, 40, sym=False), torch.ones(96)), *moved))
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert torch.equal(one, same)
