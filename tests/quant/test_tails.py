"""Importances from columns' tails: against a slow loop, however rows are cut, and for columns that are odd."""

from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.quant.kquants import ggml
from tests.quant.kquants.test_k_bytes import ramp
from tests.quant.kquants.test_k_error import allowed, worse
from weightsmith.quant import codecs
from weightsmith.quant.tails import Tails

DIGEST = "d7e66131fab945f401f21edfaf3d89ac1f4262f531bd1a2258b60c8b3ecfc87e"


def estimate(rows: np.ndarray, *cuts: int) -> np.ndarray:
    tails = Tails(rows.shape[1])
    for part in np.split(rows, cuts):
        tails.add(part)
    return tails.importance()


def exactly(column: list[float]) -> float:
    """The square of n * sum x^4 / (sum x^2)^2, in rational arithmetic."""
    squares = sum(Fraction(x) ** 2 for x in column)
    fourths = sum(Fraction(x) ** 4 for x in column)
    return float((len(column) * fourths / squares**2) ** 2) if squares else 1.0


@settings(deadline=None)  # the first example compiles
@given(
    st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3), min_size=1)
)
def test_is_the_squared_kurtosis(rows: list[list[float]]) -> None:
    found = estimate(np.array(rows, np.float32))
    for c in range(3):
        assert found[c] == pytest.approx(max(1.0, exactly([row[c] for row in rows])), rel=1e-5)


def test_cuts_do_not_matter() -> None:
    rows = ggml.rows("student", 57, row_len=2304)
    whole = estimate(rows)
    for cuts in ((1,), (20, 40), tuple(range(1, 57))):
        assert np.array_equal(estimate(rows, *cuts), whole)


@settings(deadline=None)
@given(st.integers(1, 40), st.sampled_from([1, 2, 7, 1023, 1024, 1025, 2100]), st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("codec", ["F16", "BF16"])
def test_stored_rows_give_the_same_sums(codec: str, n_rows: int, row_len: int, seed: int) -> None:
    """Any sixteen bits, NaN, Inf and subnormal ones among them."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 1 << 16, (n_rows, row_len), np.uint16)
    if seed % 2:  # sums that are finite
        bits &= np.uint16(0xBBFF if codec == "F16" else 0xBFFF)
    packed = bits.view(np.uint8)
    stored, decoded = Tails(row_len), Tails(row_len)
    for part in np.split(packed, [n_rows // 3]):
        stored.add_stored(codec, part)
        decoded.add(codecs.decode(codec, part, row_len))
    assert stored._sums.tobytes() == decoded._sums.tobytes() or not np.isfinite(decoded._sums).all()
    assert np.array_equal(np.isfinite(stored._sums), np.isfinite(decoded._sums))
    assert np.array_equal(stored.importance(), decoded.importance())


def test_tails_decide_and_sizes_do_not() -> None:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((4096, 4)).astype(np.float32)
    rows[:, 1] *= np.float32(100)
    rows[:, 2] = rng.standard_t(3, 4096)
    rows[:, 3] = np.sign(rows[:, 3])
    gauss, large, heavy, flat = estimate(rows)
    assert gauss == pytest.approx(9, rel=0.3)
    assert large == pytest.approx(9, rel=0.3)
    assert heavy > 2 * gauss
    assert flat == 1


def test_columns_of_zeros_and_weights_that_are_no_numbers() -> None:
    rows = np.zeros((5, 3), np.float32)
    rows[:, 1] = [1, -1, 1, -1, 3e38]
    assert estimate(rows)[0] == 1
    assert estimate(rows)[1] == pytest.approx(25)
    rows[2, 1] = np.inf
    assert np.array_equal(estimate(rows), np.ones(3))


@pytest.mark.parametrize("codec", ggml.CODECS)
def test_no_block_is_worse_than_ggmls_choice_without_an_imatrix(codec: str) -> None:
    """By the estimated importances; Q2_K at `best` only, where that choice joins."""
    rows = ggml.rows("student", 64, seed=11)
    rows[:, ::29] *= ggml.rows("student", 64, seed=12)[:, ::29] * np.float32(20)
    importance = estimate(rows)
    packed = codecs.encode(
        codec, rows, importance=importance, measured=False, effort="best" if codec == "Q2_K" else "normal"
    )
    theirs = ggml.block_errors(codec, rows, ggml.quantize(codec, rows, None), importance)
    ours = ggml.block_errors(codec, rows, packed, importance)
    assert ours.sum() < 0.95 * theirs.sum()
    assert worse(ours, theirs) <= allowed(len(ours))


def digest() -> str:
    """Of the estimate, and of rows packed by it."""
    rows = ramp(40)
    rows[:, ::7] *= np.abs(rows[:, ::7]) * np.float32(64)
    importance = estimate(rows)
    found = hashlib.sha256(importance.tobytes())
    for codec in ggml.CODECS:
        found.update(codecs.encode(codec, rows, importance=importance, measured=False).tobytes())
    return found.hexdigest()


def test_bytes_of_this_version() -> None:
    """A change means other bytes for the same input: raise the arithmetic versions as well."""
    assert digest() == DIGEST
