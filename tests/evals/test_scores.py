"""Per-token numbers and their statistics, against loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from weightsmith.evals import scores


def log_softmax(row: np.ndarray) -> np.ndarray:
    wide = row.astype(np.float64)
    wide = wide - wide.max()
    return wide - math.log(sum(math.exp(value) for value in wide))


def some_logits(n: int = 40, vocab: int = 300, scale: float = 4.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((n, vocab)) * scale + 15).astype(np.float32)


@pytest.mark.parametrize("block", [1, 7 * 4 * 300, 1 << 22])
def test_nll(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "BLOCK_BYTES", block)
    logits, targets = some_logits(), np.arange(40) * 7 % 300
    found = scores.token_nll(torch.from_numpy(logits), torch.from_numpy(targets))
    expected = [-log_softmax(row)[target] for row, target in zip(logits, targets, strict=True)]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("block", [1, 1 << 22])
def test_pair(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "BLOCK_BYTES", block)
    a, targets = some_logits(), np.arange(40) * 7 % 300
    b = a + some_logits(seed=1, scale=0.5) - 15
    found = scores.token_pair(torch.from_numpy(a), torch.from_numpy(b), torch.from_numpy(targets))
    for i in range(40):
        p, q = log_softmax(a[i]), log_softmax(b[i])
        kld = sum(math.exp(x) * (x - y) for x, y in zip(p, q, strict=True))
        assert found.kld[i] == pytest.approx(kld, abs=1e-6)
        assert found.original[i] == pytest.approx(-p[targets[i]], abs=2e-6)
        assert found.candidate[i] == pytest.approx(-q[targets[i]], abs=2e-6)
        assert found.same_top[i] == (a[i].argmax() == b[i].argmax())
    assert 0 < found.same_top.mean() < 1


def test_the_floor_of_the_divergence_is_low() -> None:
    """Shifted logits are the same distribution: what is left is rounding, and must be far below any real loss."""
    a = some_logits(200, 5000, seed=3)
    b = some_logits(200, 5000, seed=3) + np.float32(0.37)
    found = scores.token_pair(torch.from_numpy(a), torch.from_numpy(b), torch.zeros(200, dtype=torch.int64))
    assert np.abs(found.kld).max() < 1e-6
    same = scores.token_pair(torch.from_numpy(a), torch.from_numpy(a), torch.zeros(200, dtype=torch.int64))
    assert np.abs(same.kld).max() == 0
    assert same.same_top.all()


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[0.0, 1e4, -1e4], [3e38, 0.0, 0.0]])
    found = scores.token_nll(logits, torch.tensor([0, 0]))
    np.testing.assert_allclose(found, [1e4, 0.0])


def test_perplexity_error_is_that_of_llama_cpp() -> None:
    nll = np.random.default_rng(0).gamma(2.0, 1.2, 1000)
    total = total_squares = 0.0
    for value in nll:
        total += value
        total_squares += value * value
    mean = total / len(nll)
    error = math.sqrt((total_squares / len(nll) - mean * mean) / (len(nll) - 1)) * math.exp(mean)
    assert scores.exp_mean_error(nll) == pytest.approx((math.exp(mean), error), rel=1e-12)


def test_ratio_error_is_that_of_the_covariance_formula() -> None:
    rng = np.random.default_rng(0)
    a = rng.gamma(2.0, 1.2, 1000)
    b = a + rng.normal(0.02, 0.1, 1000)
    n = len(a)
    var_a, var_b = (np.mean(a**2) - a.mean() ** 2) / (n - 1), (np.mean(b**2) - b.mean() ** 2) / (n - 1)
    covariance = (np.mean(a * b) - a.mean() * b.mean()) / (n - 1)
    ratio = math.exp(b.mean() - a.mean())
    error = ratio * math.sqrt(var_a + var_b - 2 * covariance)
    assert scores.exp_mean_error(b - a) == pytest.approx((ratio, error), rel=1e-9)


def test_percentiles_interpolate() -> None:
    values = np.array([4.0, 1.0, 2.0, 8.0])
    assert scores.percentile(values, 0.5) == 3.0
    assert scores.percentile(values, 0.99) == pytest.approx(4 + (8 - 4) * (0.99 * 3 - 2))


def test_odd_ends() -> None:
    mean, error = scores.mean_error(np.array([2.0]))
    assert mean == 2.0
    assert math.isnan(error)
    assert scores.exp_mean_error(np.full(10, 1000.0))[0] == math.inf
    assert scores.mean_error(np.full(8, 0.5))[1] == 0
