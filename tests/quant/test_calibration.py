"""Moments against plain sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weightsmith.errors import IntegrityError
from weightsmith.quant.calibration import STRIP, Moments


def test_moments_are_plain_sums() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 700, 12)).astype(np.float32)
    moments = Moments(12)
    for part in x:
        moments.add(torch.from_numpy(part).reshape(7, 100, 12))
    rows = x.reshape(-1, 12).astype(np.float64)
    h = np.zeros((12, 12))
    for row in rows:
        h += np.outer(row, row)
    assert moments.tokens == 2100
    np.testing.assert_allclose(moments.h.numpy(), h, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(moments.diagonal.numpy(), np.diag(h), rtol=1e-6)
    assert torch.equal(moments.h, moments.h.T)
    assert moments.diagonal.dtype == torch.float64


def test_sums_add_up_over_calls() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    once, twice = Moments(8), Moments(8)
    once.add(x)
    twice.add(x[:20])
    twice.add(x[20:])
    torch.testing.assert_close(once.h, twice.h)
    torch.testing.assert_close(once.diagonal, twice.diagonal)


def test_only_half_of_the_products_are_taken() -> None:
    """More columns than a strip: what lies below the diagonal is mirrored, also between two calls."""
    x = torch.randn(40, STRIP + 44, generator=torch.Generator().manual_seed(0))
    moments = Moments(STRIP + 44)
    for part in x.split(20):
        moments.add(part)
        assert torch.equal(moments.h, moments.h.T)
    torch.testing.assert_close(moments.h, x.T @ x, rtol=1e-4, atol=1e-4)


def test_inputs_may_be_divided_afterwards() -> None:
    x, by = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), torch.logspace(-1, 1, 8)
    divided, before = Moments(8), Moments(8)
    divided.add(x)
    divided.divide(by)
    before.add(x / by)
    torch.testing.assert_close(divided.h, before.h)
    torch.testing.assert_close(divided.diagonal, before.diagonal)


def test_half_precision_inputs_are_summed_in_single() -> None:
    x = torch.full((4096, 2), 1.0, dtype=torch.bfloat16)
    moments = Moments(2)
    moments.add(x)
    assert moments.h.tolist() == [[4096, 4096], [4096, 4096]]


def test_diagonal_only() -> None:
    moments = Moments(4, full=False)
    moments.add(torch.ones(3, 4))
    assert moments.diagonal.tolist() == [3, 3, 3, 3]
    with pytest.raises(ValueError, match="diagonal"):
        _ = moments.h


def test_check_names_the_tensor() -> None:
    moments = Moments(2)
    with pytest.raises(IntegrityError, match=r"no calibration token.*") as caught:
        moments.check("a.weight")
    assert caught.value.tensor == "a.weight"
    moments.add(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(IntegrityError, match="not finite"):
        moments.check("a.weight")
