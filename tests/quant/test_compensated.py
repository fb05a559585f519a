"""Error feedback into GGUF's blocks against plain loops, and what it promises about its loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weightsmith.errors import IntegrityError, UsageError
from weightsmith.quant import codecs
from weightsmith.quant.algorithms import compensated, rowwise
from weightsmith.quant.algorithms.columns import Columns, of_lattice
from weightsmith.quant.algorithms.compensated import Inputs
from weightsmith.quant.algorithms.descent import Descent, even_bounds, feedback

OPEN = sorted(codecs.OPEN)
MIXED = ["Q2_K", "Q4_K", "Q6_K", "IQ4_XS", "Q5_1"]  # every kind of grid


def problem(columns: int = 256, rows: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float32 [rows, columns] and moments of correlated inputs of very different sizes."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((columns, columns)) / np.sqrt(columns) + np.diag(rng.uniform(0.2, 3, columns))
    x = rng.standard_normal((3 * columns, columns)) @ mix
    w = rng.standard_normal((rows, columns)) * (1 + 4 * (rng.random((rows, columns)) > 0.97))
    return torch.from_numpy(w * 0.02).float(), torch.from_numpy(x.T @ x).float()


def losses(w: torch.Tensor, q: torch.Tensor, h: torch.Tensor) -> np.ndarray:
    error = (w.double() - q.double()).numpy()
    return np.einsum("ri,ij,rj->r", error, h.double().numpy(), error)


def decoded(codec: str, packed: np.ndarray, columns: int) -> torch.Tensor:
    return torch.from_numpy(codecs.decode(codec, packed, columns))


def opened(codec: str, w: torch.Tensor, inputs: Inputs, dtype: torch.dtype) -> tuple[Columns, torch.Tensor]:
    packed = codecs.encode(codec, w.numpy(), importance=inputs.importance.numpy())
    return of_lattice(codecs.unpack(codec, packed), dtype, torch.device("cpu"))


@pytest.mark.parametrize("codec", OPEN)
def test_no_row_loses_more_than_by_the_plain_search(codec: str) -> None:
    w, h = problem(512)
    inputs = Inputs.of(h, 0.01)
    plain = decoded(codec, codecs.encode(codec, w.numpy(), importance=h.diagonal().numpy()), 512)
    before = losses(w, plain, inputs.h)
    totals = [before.sum()]
    for sweeps in (0, 1, 3):
        packed, q = compensated.encode(codec, w, inputs, sweeps=sweeps)
        assert torch.equal(q, decoded(codec, packed, 512))  # what was judged is what the file will mean
        found = losses(w, q, inputs.h)
        assert (found <= before * (1 + 1e-5)).all()
        totals.append(found.sum())
    assert totals[1] < 0.95 * totals[0]
    assert totals[3] < totals[2] < totals[1]


def slow_feedback(w: np.ndarray, h: np.ndarray, order: list[int], grid: Columns) -> np.ndarray:
    """Codes by optimal brain surgery over the inverse of H, trying every code of every weight. Float64."""
    w, inverse = w.astype(np.float64), np.linalg.inv(h)
    every = torch.arange(grid.levels.top + 1, dtype=torch.float64)
    codes = np.zeros(w.shape, np.int64)
    still = list(order)
    for column in order:
        still.remove(column)
        group = int(grid.places[column])
        for row in range(len(w)):
            value = grid.levels.values(every).numpy() - float(grid.zeros[group, row])
            offset = 0.0 if grid.offsets is None else float(grid.offsets[group, row])
            q = value * float(grid.steps[group, row]) + offset
            codes[row, column] = best = int(np.abs(q - w[row, column]).argmin())
            error = w[row, column] - q[best]
            w[row, still] -= error * inverse[column, still] / inverse[column, column]
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes


@pytest.mark.parametrize("codec", MIXED)
def test_codes_are_those_of_brain_surgery(codec: str) -> None:
    w, h = problem(rows=3)
    inputs = Inputs.of(h, 0.01)
    order = inputs.order
    for dtype, share in ((torch.float64, 0.0), (torch.float32, 0.003)):
        grid, _ = opened(codec, w, inputs, dtype)
        wt, answers = w.T[order].contiguous().to(dtype), inputs.answers.to(dtype)
        labels = grid.places[order].tolist()
        made = feedback(wt, answers, grid, labels, bounds=even_bounds(len(wt)))
        torch.testing.assert_close(wt, w.T[order].to(dtype) - grid.weights(made, grid.places[order]))
        found = torch.empty_like(made)
        found[order] = made
        expected = slow_feedback(w.numpy(), inputs.h.double().numpy(), order.tolist(), grid)
        assert (found.T.numpy() != expected).mean() <= max(
            share, 0.002
        )  # answers are float32: a tie may fall either way


@pytest.mark.parametrize("codec", MIXED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_sweep_lowers_the_loss_and_keeps_its_books(
    codec: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, h = problem(512)
    inputs = Inputs.of(h, 0.01)
    matrix, wt = inputs.h.to(dtype), w.T.contiguous().to(dtype)
    grid, codes = opened(codec, w, inputs, dtype)
    q = grid.weights(codes, grid.places)
    down = Descent(matrix, q, matrix @ (wt - q), codes, grid)
    found = [losses(w, down.q.T, inputs.h)]
    for _ in range(2):
        down.sweep()
        found.append(losses(w, down.q.T, inputs.h))
        torch.testing.assert_close(down.q, grid.weights(down.codes, grid.places), rtol=0, atol=0)
        torch.testing.assert_close(down.slope, matrix @ (wt - down.q), rtol=1e-3, atol=float(matrix.max()) * 1e-6)
        assert (found[-1] <= found[-2] * (1 + 1e-5)).all()
    assert found[1].sum() < 0.8 * found[0].sum()
    assert found[2].sum() < 0.999 * found[1].sum()
    monkeypatch.setattr(Descent, "_move_grid", lambda *_: None)
    for _ in range(30):
        down.sweep()
    for row, column in [(0, 0), (3, 100), (7, 511), (11, 255)]:  # no single code could be better
        best = losses(w, down.q.T, inputs.h)[row]
        for code in range(grid.levels.top + 1):
            trial = down.codes.clone()
            trial[column, row] = code
            assert losses(w, grid.weights(trial, grid.places).T, inputs.h)[row] >= best * (1 - 1e-6)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = problem(512, rows=40)
    inputs = Inputs.of(h, 0.01)
    grid, codes = opened("Q4_K", w, inputs, torch.float32)
    slope = (inputs.h @ w.T)[:128]
    q = grid.weights(codes, grid.places)[:128]
    found = []
    for count in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        monkeypatch.setattr(rowwise, "LEAST", 1)
        corner = inputs.h[:128, :128]
        found.append(rowwise.descend(slope, corner, grid, grid.places[:128], codes=codes[:128], q=q))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_the_same_input_gives_the_same_bytes_and_is_left_alone() -> None:
    w, h = problem(512)
    before = w.clone(), h.clone()
    one, other = (compensated.encode("Q3_K", w, Inputs.of(h, 0.01))[0] for _ in range(2))
    np.testing.assert_array_equal(one, other)
    assert torch.equal(w, before[0])
    assert torch.equal(h, before[1])


def test_slabs_of_rows_change_little(monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = problem(256, rows=64)
    inputs = Inputs.of(h, 0.01)
    whole = compensated.encode("Q4_K", w, inputs)[1]
    monkeypatch.setattr(compensated, "ROWS", 256 * 16)
    cut = compensated.encode("Q4_K", w, inputs)[1]
    assert losses(w, cut, inputs.h).sum() == pytest.approx(losses(w, whole, inputs.h).sum(), rel=0.01)


def test_blocks_of_zeros_and_dead_columns() -> None:
    w, h = problem(512)
    w[2], w[5, :256] = 0, 0
    h[7], h[:, 7] = 0, 0
    for codec in MIXED:
        packed, q = compensated.encode(codec, w, Inputs.of(h, 0.01))
        assert torch.equal(q, decoded(codec, packed, 512))
        assert torch.equal(q[2], torch.zeros(512))
        assert (q[:, 7] - w[:, 7]).abs().max() < 0.1


def test_what_is_wrong_is_named() -> None:
    w, h = problem()
    inputs = Inputs.of(h, 0.01)
    with pytest.raises(UsageError, match="Q8_0"):
        compensated.encode("Q8_0", w, inputs)
    with pytest.raises(UsageError, match="second moments"):
        compensated.encode("Q4_0", w[:, :128], inputs)
    w[3, 4] = torch.nan
    with pytest.raises(IntegrityError, match="NaN or Inf"):
        compensated.encode("Q4_0", w, inputs)
