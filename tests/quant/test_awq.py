"""Scales that move between a linear and what feeds it: never worse, and invisible in what is computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.evals.memory_reader import TINY, random_tensors
from weightsmith.errors import UsageError
from weightsmith.evals.calibration.fold import fold
from weightsmith.evals.calibration.stream import Block
from weightsmith.evals.forward import llama
from weightsmith.evals.forward.weights import Place
from weightsmith.quant.algorithms import awq, rtn
from weightsmith.quant.algorithms.moments import SQUARE, loss_of
from weightsmith.quant.algorithms.rtn import Grid
from weightsmith.quant.calibration import Moments

GRID = Grid(4, 16)


def problem(columns: int = 64, rows: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, columns, generator=generator) * torch.logspace(-1.5, 1, columns)
    x = x[:, torch.randperm(columns, generator=generator)]
    return torch.randn(rows, columns, generator=generator), x.T @ x


def test_scaled_rounding_loses_less() -> None:
    w, h = problem()
    scales = awq.scales_of(w, h, GRID)
    plain = loss_of(w, rtn.quantize(w, GRID).dequantize(), h)
    scaled = loss_of(w, rtn.quantize(w * scales, GRID).dequantize() / scales, h)
    assert scaled < 0.85 * plain
    assert scales.max() * scales.min() == pytest.approx(1, rel=1e-4)


def test_the_loss_is_that_of_running_rows_through_both() -> None:
    w, _ = problem()
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(2)).double()
    scales = torch.linspace(0.5, 2, 64)
    q = rtn.quantize(w * scales, GRID).dequantize().double()
    apart = x @ w.double().T - (x / scales) @ q.T
    assert loss_of(w, q / scales, x.T @ x) == pytest.approx(float(apart.square().sum()), rel=1e-6)


def test_a_loss_needs_half_of_h_only() -> None:
    w, _ = problem()
    x = torch.randn(700, SQUARE + 60, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    error = torch.randn(30, SQUARE + 60, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = float((x @ error.T).square().sum())
    assert loss_of(error, torch.zeros_like(error), x.T @ x) == pytest.approx(expected, rel=1e-9)
    for grid in (GRID, Grid(3, -1), Grid(4, 24, sym=False)):
        assert torch.equal(rtn.rounded(w, grid), rtn.quantize(w, grid).dequantize())


def test_nothing_moves_where_nothing_is_gained() -> None:
    on_the_grid = torch.tensor([[-5.0, 10.0, 3.0, 0.0], [-8.0, 7.0, 1.0, 2.0]])  # both span 15 steps of 1
    for w in (on_the_grid, torch.zeros(4, 4)):
        assert torch.equal(awq.scales_of(w, torch.eye(4), Grid(4, -1, sym=False)), torch.ones(4))


def test_heads_that_share_their_values_share_scales() -> None:
    w, h = problem(columns=48)
    scales = awq.scales_of(w, h, GRID, heads=2, sharing=3)
    assert scales.shape == (16,)
    wide = awq.spread(scales, 2, 3)
    assert wide.view(2, 3, 8)[0, 0].tolist() == scales[:8].tolist()
    for head in range(2):
        for shared in range(3):
            assert torch.equal(wide.view(2, 3, 8)[head, shared], scales.view(2, 8)[head])
    with pytest.raises(UsageError, match="heads"):
        awq.scales_of(w, h, GRID, heads=5, sharing=3)


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_layer_computes_the_same(n_kv_heads: int, bias: bool) -> None:
    config = replace(TINY, n_kv_heads=n_kv_heads, attention_bias=bias, mlp_bias=bias)
    prefix = "model.layers.0."
    weights = {
        name.removeprefix(prefix): torch.from_numpy(value)
        for name, value in random_tensors(config).items()
        if name.startswith(prefix)
    }
    x = torch.randn(3, 12, config.hidden_size, generator=torch.Generator().manual_seed(1))
    x *= torch.logspace(-1, 1, config.hidden_size)
    tables = llama.tables(config, 12, Place(torch.device("cpu"), torch.float32))
    moments: dict[str, Moments] = {}

    def tap(names: tuple[str, ...], into: torch.Tensor) -> None:
        for name in names:
            moments[f"{prefix}{name}.weight"] = Moments(into.shape[-1])
            moments[f"{prefix}{name}.weight"].add(into)

    expected = llama.layer(weights, x, tables, config, tap)
    block = Block(0, prefix, dict(weights), moments)
    for source, targets in llama.FEEDS:
        fold(block, source, targets, Grid(3, 16), (n_kv_heads, config.n_heads // n_kv_heads))
    found = llama.layer(block.weights, x, tables, config)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    for source, _ in llama.FEEDS:
        assert (block.weights[f"{source}.weight"] - weights[f"{source}.weight"]).abs().max() > 1e-3
