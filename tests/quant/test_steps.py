"""Codes as blocks: the same weights where halves allow it, and a refusal where they do not."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsmith.quant.steps import Lattice, as_blocks, candidates


def lattice(
    bits: int = 4, group: int = 64, *, zero: int | None = None, columns: int = 128, seed: int = 0, scale: float = 0.01
) -> Lattice:
    rng = np.random.default_rng(seed)
    groups = -(-columns // group)
    zeros = rng.integers(0, 1 << bits, (6, groups)) if zero is None else np.full((6, groups), zero)
    scales = rng.uniform(scale / 2, scale, (6, groups)).astype(np.float16).astype(np.float32)
    return Lattice(rng.integers(0, 1 << bits, (6, columns)).astype(np.uint8), scales, zeros.astype(np.int16), group)


def slow(found: Lattice) -> np.ndarray:
    rows, columns = found.codes.shape
    weights = np.empty((rows, columns))
    for r in range(rows):
        for i in range(columns):
            g = i // found.group_size
            weights[r, i] = (int(found.codes[r, i]) - int(found.zeros[r, g])) * float(found.scales[r, g])
    return weights


def decoded(codec: str, packed: np.ndarray) -> np.ndarray:
    return gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[codec])


@pytest.mark.parametrize(("codec", "bits", "zero"), [("Q4_0", 4, 8), ("Q4_0", 3, 4), ("Q8_0", 8, 128), ("Q8_0", 4, 8)])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_symmetric_codes_lose_nothing(codec: str, bits: int, zero: int, group: int) -> None:
    given_ = lattice(bits, group, zero=zero)
    assert codec in candidates(bits, group, 128)
    found = as_blocks(codec, given_)
    assert found is not None
    assert found[1] == 0
    np.testing.assert_array_equal(decoded(codec, found[0]), slow(given_).astype(np.float32))
    np.testing.assert_array_equal(given_.weights(), slow(given_).astype(np.float32))


@given(seed=st.integers(0, 999), group=st.sampled_from([32, 96, 128]), scale=st.sampled_from([1e-3, 0.02, 30.0]))
def test_zeros_cost_what_is_reported(seed: int, group: int, scale: float) -> None:
    given_ = lattice(4, group, seed=seed, scale=scale)
    found = as_blocks("Q4_1", given_)
    assert found is not None
    worst = np.abs(decoded("Q4_1", found[0]) - slow(given_)).max()
    assert worst <= found[1] * (1 + 1e-3) + 1e-6 * scale
    assert found[1] <= 15 * scale * 2**-11


def test_scales_that_are_no_halves() -> None:
    whole = lattice(8, 128, zero=128)
    scales = whole.scales * np.float32(1 + 2**-13)
    found = as_blocks("Q8_0", Lattice(whole.codes, scales, whole.zeros, 128))
    assert found is not None
    expected = (whole.codes.astype(float) - 128) * scales
    assert 0 < np.abs(decoded("Q8_0", found[0]) - expected).max() <= found[1] < 128 * scales.max() * 2**-11


@pytest.mark.parametrize("scale", [np.nan, np.inf, 70000.0, 1e-6, 3e-8])
def test_scales_that_do_not_fit(scale: float) -> None:
    whole = lattice(zero=8)
    scales = whole.scales.copy()
    scales[3, 1] = scale
    for codec in ("Q4_0", "Q8_0", "Q4_1"):
        assert as_blocks(codec, Lattice(whole.codes, scales, whole.zeros, 64)) is None


def test_codes_that_do_not_fit() -> None:
    asymmetric = lattice()
    assert as_blocks("Q4_0", asymmetric) is None
    assert as_blocks("Q8_0", asymmetric) is not None  # -15 .. 15
    assert as_blocks("Q4_1", lattice(8, zero=128)) is None
    assert as_blocks("Q8_0", lattice(8, zero=0)) is None
    assert as_blocks("Q4_0", lattice(group=40, columns=120, zero=8)) is None
    assert candidates(4, 40, 128) == ()
    assert candidates(4, 128, 100) == ()
    assert candidates(8, 32, 128) == ("Q8_0",)


def test_the_last_group_may_be_short() -> None:
    given_ = lattice(group=96, zero=8)
    found = as_blocks("Q4_0", given_)
    assert found is not None
    np.testing.assert_array_equal(decoded("Q4_0", found[0]), slow(given_).astype(np.float32))
