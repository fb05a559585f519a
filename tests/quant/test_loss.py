"""The measure of what packing lost, against the plain formula in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from weightsmith.quant import codecs, loss
from weightsmith.quant.loss import Loss


@pytest.mark.parametrize("codec", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (700, 256)])
def test_against_the_formula_on_the_rows_that_are_looked_at(codec: str, weighted: bool, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=shape).astype(np.float32)
    importance = rng.exponential(size=shape[1]).astype(np.float32) if weighted else None
    packed = codecs.encode(codec, rows)
    found = loss.measure(codec, rows, packed, importance)
    v = np.ones(shape[1]) if importance is None else importance.astype(np.float64)
    w = rows[:: loss.EVERY].astype(np.float64)
    q = codecs.decode(codec, packed, shape[1])[:: loss.EVERY].astype(np.float64)
    assert found.error == pytest.approx((v * (w - q) ** 2).sum(), rel=1e-4)
    assert found.energy == pytest.approx((v * w**2).sum(), rel=1e-5)
    assert found.relative == pytest.approx(math.sqrt((v * (w - q) ** 2).sum() / (v * w**2).sum()), rel=1e-4)


def test_a_sample_of_rows_is_near_the_whole() -> None:
    rows = np.random.default_rng(1).standard_t(4, size=(256, 512)).astype(np.float32)
    packed = codecs.encode("Q4_0", rows)
    lost = rows - codecs.decode("Q4_0", packed, 512)
    whole = math.sqrt((lost.astype(np.float64) ** 2).sum() / (rows.astype(np.float64) ** 2).sum())
    assert loss.measure("Q4_0", rows, packed).relative == pytest.approx(whole, rel=0.02)


def test_sums_add_up_and_zeros_lose_nothing() -> None:
    assert Loss(1.0, 8.0) + Loss(3.0, 8.0) == Loss(4.0, 16.0)
    assert Loss(4.0, 16.0).relative == 0.5
    assert Loss().relative == 0.0
    assert Loss(1.0, 0.0).relative == math.inf
