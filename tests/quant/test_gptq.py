"""GPTQ against optimal brain surgery written as plain loops, and what it promises about its loss."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from weightsmith.errors import IntegrityError, UnsupportedError, UsageError
from weightsmith.quant.algorithms import descent, gptq, moments, rtn
from weightsmith.quant.algorithms.columns import Columns, Levels
from weightsmith.quant.algorithms.descent import Descent
from weightsmith.quant.algorithms.gptq import Method
from weightsmith.quant.algorithms.moments import answers, damped, factor, loss_of
from weightsmith.quant.algorithms.rtn import Grid

GRIDS = [Grid(bits, size, sym) for bits in (2, 3, 4, 8) for size in (-1, 16) for sym in (True, False)]
ORDERS = [("none", True), ("none", False), ("act", True), ("act", False), ("group", True), ("group", False)]


def problem(columns: int = 48, rows: int = 20, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float64 [rows, columns] and moments of correlated inputs of very different sizes."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((columns, columns)) / np.sqrt(columns) + np.diag(rng.uniform(0.2, 3, columns))
    x = rng.standard_normal((400, columns)) @ mix
    w = rng.standard_normal((rows, columns)) * (1 + 4 * (rng.random((rows, columns)) > 0.97))
    return torch.from_numpy(w), torch.from_numpy(x.T @ x)


def slow_gptq(
    w: np.ndarray, h: np.ndarray, order: list[int], scales: np.ndarray, zeros: np.ndarray, top: int
) -> np.ndarray:
    """Codes by optimal brain surgery: the inverse of H over the open columns is whole and shrinks by one each time.

    w [out, in]; scales, zeros: one per weight; order: of rounding. Float64, one weight at a time.
    """
    w = w.copy()
    codes = np.zeros(w.shape, np.int64)
    inverse = np.linalg.inv(h)
    still = list(order)
    for column in order:
        still.remove(column)
        for row in range(len(w)):
            s, z = scales[row, column], zeros[row, column]
            code = min(max(round(w[row, column] / s) + z, 0), top)
            codes[row, column] = code
            error = w[row, column] - (code - z) * s
            for other in still:
                w[row, other] -= error * inverse[column, other] / inverse[column, column]
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes


def damped_by_hand(h: torch.Tensor, share: float) -> np.ndarray:
    return h.numpy() + share * h.numpy().diagonal().mean() * np.eye(len(h))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("order", ["none", "act", "group"])
def test_codes_are_those_of_brain_surgery(grid: Grid, order: str) -> None:
    w, h = problem()
    found = gptq.quantize(w, h, grid, Method(order, static_groups=True, damp=0.02, sweeps=0))
    ranks = gptq.order_of(h.diagonal(), grid, order).tolist()
    places = np.arange(w.shape[1]) // grid.size(w.shape[1])
    scales, zeros = found.scales.double().numpy()[:, places], found.zeros.numpy().astype(int)[:, places]
    expected = slow_gptq(w.numpy(), damped_by_hand(h, 0.02), ranks, scales, zeros, grid.top)
    np.testing.assert_array_equal(found.codes.numpy(), expected)
    np.testing.assert_array_equal(found.g_idx.numpy(), places)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = problem(columns=80)
    for order, static in ORDERS:
        whole = gptq.quantize(w, h, Grid(4, 16), Method(order, static))
        monkeypatch.setattr(descent, "BLOCK", 16)
        cut = gptq.quantize(w, h, Grid(4, 16), Method(order, static))
        monkeypatch.undo()
        assert torch.equal(whole.codes, cut.codes)
        assert torch.equal(whole.scales, cut.scales)


@pytest.mark.parametrize(("order", "static"), ORDERS)
@pytest.mark.parametrize(
    "grid", [Grid(bits, size, sym) for bits in (2, 4) for size in (-1, 16, 20) for sym in (True, False)], ids=str
)
def test_it_loses_less_than_rounding_and_sweeps_never_hurt(order: str, static: bool, grid: Grid) -> None:
    w, h = problem()
    losses = [loss_of(w, rtn.quantize(w, grid).dequantize(), h)]
    for sweeps in (0, 1, 3):
        found = gptq.quantize(w, h, grid, Method(order, static, sweeps=sweeps))
        losses.append(loss_of(w, found.dequantize(), h))
    assert losses[1] < 0.9 * losses[0]
    # The loss that sweeps lower includes damping, so the bare one may rise by a trace.
    assert losses[2] < losses[1] * 1.001
    assert losses[3] < losses[2] * 1.001
    assert losses[3] < losses[1]


def test_a_sweep_lowers_the_damped_loss_step_by_step() -> None:
    w, h = problem()
    grid = Grid(3, 16, sym=False)
    found = gptq.quantize(w, h, grid, Method(sweeps=0))
    matrix = torch.from_numpy(damped_by_hand(h, 0.01))
    scales, zeros = found.scales.T.double().contiguous(), found.zeros.T.double()
    codes = found.codes.T.contiguous()
    columns = Columns(Levels(grid.top), found.g_idx, zeros, scales, torch.ones_like(scales))
    q = columns.weights(codes, found.g_idx)
    down = Descent(matrix, q, matrix @ (w.T - q), codes, columns)
    losses = [loss_of(w, down.q.T, matrix)]
    for _ in range(3):
        down.sweep()
        losses.append(loss_of(w, down.q.T, matrix))
        torch.testing.assert_close(down.q, (down.codes - zeros[found.g_idx]) * columns.d[found.g_idx])
        torch.testing.assert_close(down.slope, matrix @ (w.T - down.q), rtol=1e-6, atol=1e-6)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("rows", [5, 16, 37])
@pytest.mark.parametrize("columns", [40, 300])
def test_sixteen_rows_at_a_time_are_each_what_they_are_alone(rows: int, columns: int) -> None:
    """Float32, whose loops work in lanes: fewer rows than lanes, and more that do not fill them."""
    w, h = (found.float() for found in problem(columns, rows))
    whole = gptq.quantize(w, h, Grid(4, 16))
    for row in {0, rows // 2, rows - 1}:
        alone = gptq.quantize(w[row : row + 1], h, Grid(4, 16))
        assert (alone.codes == whole.codes[row]).float().mean() > 0.98  # products of other shapes may round differently
    wide = gptq.quantize(w.double(), h.double(), Grid(4, 16))
    assert (wide.codes == whole.codes).float().mean() > 0.98


def test_the_last_sweep_leaves_the_same_codes() -> None:
    """It only stops keeping up a slope that nobody asks for any more."""
    found = []
    for last in (False, True):
        w, h = (value.float() for value in problem(200, 32))
        grid = Grid(4, 16)
        made = gptq.quantize(w, h, grid, Method(sweeps=0))
        scales, zeros = made.scales.T.contiguous(), made.zeros.T.float().contiguous()
        columns = Columns(Levels(grid.top), made.g_idx, zeros, scales, torch.ones_like(scales))
        codes = made.codes.T.contiguous()
        q = columns.weights(codes, made.g_idx)
        down = Descent(h, q, h @ (w.T - q), codes, columns)
        down.sweep(last=last)
        found.append(down.codes)
    assert torch.equal(*found)


def test_a_tiny_matrix_comes_near_the_best_of_all_codes() -> None:
    """Every assignment of 2-bit codes to four columns, with the scales that were found."""
    w, h = problem(columns=4, rows=6)
    grid = Grid(2, -1, sym=False)
    found = gptq.quantize(w, h, grid, Method(damp=1e-6, sweeps=8))
    best = 0.0
    for row in range(len(w)):
        scale, zero = float(found.scales[row, 0]), int(found.zeros[row, 0])
        errors = [w[row].numpy() - (np.array(codes) - zero) * scale for codes in itertools.product(range(4), repeat=4)]
        best += min(float(error @ h.numpy() @ error) for error in errors)
    loss = loss_of(w, found.dequantize(), h)
    assert best <= loss * (1 + 1e-9)
    assert loss < 1.1 * best


@pytest.mark.parametrize(("order", "static"), ORDERS)
def test_g_idx(order: str, static: bool) -> None:
    w, h = problem()
    found = gptq.quantize(w, h, Grid(4, 16), Method(order, static))
    trivial = torch.arange(48) // 16
    if Method(order, static).scatters:
        assert not torch.equal(found.g_idx, trivial)
        assert torch.bincount(found.g_idx).tolist() == [16, 16, 16]
        ranks = torch.argsort(h.diagonal(), descending=True)
        assert found.g_idx[ranks].tolist() == trivial.tolist()
    else:
        assert torch.equal(found.g_idx, trivial)


def test_group_order_keeps_groups_together() -> None:
    _, h = problem()
    ranks = gptq.order_of(h.diagonal(), Grid(4, 16), "group")
    assert sorted(ranks.tolist()) == list(range(48))
    groups = (ranks // 16).tolist()
    assert [len(list(run)) for _, run in itertools.groupby(groups)] == [16, 16, 16]
    for begin in (0, 16, 32):
        inside = h.diagonal()[ranks[begin : begin + 16]]
        assert torch.equal(inside, inside.sort(descending=True).values)


def test_damping_rises_until_there_is_a_factor() -> None:
    x = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = x.T @ x  # of rank 3
    plain = torch.arange(16)
    a, share = factor(h, plain, 0.01)
    assert share == 0.01
    torch.testing.assert_close(a @ a.T, damped(h, 0.01))
    assert torch.equal(a, a.triu())
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    turned = factor(h, order, 0.01)[0]
    torch.testing.assert_close(turned, factor(h[order[:, None], order], plain, 0.01)[0])
    indefinite = h - 0.05 * h.diagonal().mean() * torch.eye(16)
    _, share = factor(indefinite, plain, 0.01)
    assert share == pytest.approx(0.0625)
    torch.testing.assert_close(damped(h, 0.5), h + 0.5 * h.diagonal().mean() * torch.eye(16))
    with pytest.raises(IntegrityError, match="no Cholesky factor"):
        factor(torch.tensor([[1.0, 9.0], [9.0, 1.0]]), torch.arange(2), 0.01)
    with pytest.raises(IntegrityError, match="zero or not finite"):
        factor(torch.zeros(4, 4), torch.arange(4), 0.01)


def test_the_factor_is_turned_round_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    _, h = problem(columns=50)
    order = torch.arange(50).flip(0)
    whole = factor(h, order, 0.01)[0]
    monkeypatch.setattr(moments, "PART", 7)
    assert torch.equal(factor(h, order, 0.01)[0], whole)


def test_importances_are_what_an_error_costs_behind_all_answers() -> None:
    _, h = problem()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    a, _ = factor(h, order, 0.01)
    found, importance = answers(a.clone())
    torch.testing.assert_close(found * a.diagonal(), a)
    u = torch.linalg.cholesky(torch.linalg.inv(damped(h, 0.01)[order][:, order])).T  # GPTQ's, U^T U = H^-1
    torch.testing.assert_close(importance, u.diagonal() ** -2)


def test_dead_columns_keep_their_weights() -> None:
    w, h = problem()
    h[5], h[:, 5] = 0, 0
    found = gptq.quantize(w, h, Grid(8, 16), Method())
    alive = found.dequantize().double()
    assert (alive[:, 5] - w[:, 5]).abs().max() < 0.05
    assert w[:, 5].abs().max() > 1


def test_the_same_input_gives_the_same_bytes_and_is_left_alone() -> None:
    w, h = problem()
    w, h = w.float(), h.float()
    before = w.clone(), h.clone()
    one, other = (gptq.quantize(w, h, Grid(4, 16)) for _ in range(2))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scales, other.scales)
    assert torch.equal(w, before[0])
    assert torch.equal(h, before[1])


def test_scales_are_halves_and_codes_fit() -> None:
    w, h = problem()
    for grid in GRIDS:
        found = gptq.quantize(w.float() * 1e-3, h.float(), grid)
        assert torch.equal(found.scales, found.scales.half().float())
        assert found.codes.max() <= grid.top
        assert found.scales.dtype == torch.float32
        if grid.sym:
            assert (found.zeros == grid.middle).all()


def test_search_is_never_worse_than_the_reference_in_any_group() -> None:
    w, h = problem(columns=64, rows=50)
    for grid in GRIDS:
        places = grid.places(64)
        losses = []
        for importance in (None, h.diagonal()):
            q = rtn.quantize(w, grid, importance).dequantize()
            per_weight = (w - q) ** 2 * h.diagonal()
            losses.append(torch.zeros(50, grid.groups(64), dtype=torch.float64).index_add_(1, places, per_weight))
        assert (losses[1] <= losses[0] * (1 + 1e-9)).all()
        assert losses[1].sum() < (0.99 if grid.bits < 8 else 1) * losses[0].sum()


def test_rounding_by_hand() -> None:
    w = torch.tensor([[-1.5, -0.2, 0.7, 1.5], [0.0, 0.0, 0.0, 0.0]])
    found = rtn.quantize(w, Grid(4, 2))
    assert found.scales.tolist() == [[pytest.approx(0.2, rel=1e-3), pytest.approx(0.2, rel=1e-3)], [0, 0]]
    assert found.codes.tolist() == [[0, 7, 12, 15], [8, 8, 8, 8]]
    assert found.dequantize()[1].tolist() == [0, 0, 0, 0]
    asym = rtn.quantize(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), Grid(2, -1, sym=False))
    assert (asym.codes.tolist(), asym.zeros.tolist()) == ([[0, 1, 2, 3]], [[0]])
    above = rtn.quantize(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), Grid(2, -1, sym=False, least_zero=1))
    assert above.zeros.tolist() == [[1]]


def test_negative_scales_use_the_extra_code() -> None:
    w = torch.tensor([[8.0, 1.0, -7.0, 3.0]])
    found = rtn.quantize(w, Grid(4, -1), torch.ones(4))
    assert found.scales.item() == -1
    assert torch.equal(found.dequantize(), w)


def test_what_is_wrong_is_named() -> None:
    w, h = problem()
    w[3, 4] = torch.nan
    for run in (lambda: gptq.quantize(w, h, Grid()), lambda: rtn.quantize(w, Grid())):
        with pytest.raises(IntegrityError, match="NaN or Inf"):
            run()
    w, h = problem()
    with pytest.raises(UsageError, match="second moments"):
        gptq.quantize(w, h[:4, :4], Grid())
    with pytest.raises(UnsupportedError, match="half precision"):
        gptq.quantize(w * 1e6, h, Grid())
    for wrong in (lambda: Grid(5), lambda: Grid(4, 0), lambda: Method("zigzag"), lambda: Method(damp=0)):  # type: ignore[arg-type]
        with pytest.raises(UsageError):
            wrong()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_cpu() -> None:
    w, h = problem(columns=256, rows=64)
    for order, static in ORDERS:
        here = gptq.quantize(w, h, Grid(4, 32), Method(order, static))
        there = gptq.quantize(w.cuda(), h.cuda(), Grid(4, 32), Method(order, static))
        assert (here.codes != there.codes.cpu()).float().mean() < 0.01
