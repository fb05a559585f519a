from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightsmith.formats.gguf.rope_freqs import divisors, solve
from weightsmith.types import RopeScaling

LLAMA_31 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
LLAMA_32 = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)


def in_float32(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """The same in torch's float32, as other converters compute it."""
    import torch

    freqs = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    length, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    out = []
    for freq in freqs:
        wavelength = 2 * math.pi / freq
        smooth = (length / wavelength - low) / (high - low)
        between = 1 / ((1 - smooth) / scaling.factor + smooth)
        out.append(
            1.0 if wavelength < length / high else scaling.factor if wavelength > length / low else float(between)
        )
    return np.array(out, np.float32)


@pytest.mark.parametrize(("scaling", "head_dim"), [(LLAMA_31, 128), (LLAMA_32, 64), (LLAMA_32, 128)])
def test_llama_3_survives(scaling: RopeScaling, head_dim: int) -> None:
    vector = divisors(scaling, 500000.0, head_dim)
    assert (vector.dtype, vector.shape) == (np.float32, (head_dim // 2,))
    assert solve(vector, 500000.0, 131072) == scaling
    assert (vector[0], vector[-1]) == (1, scaling.factor)
    assert np.all(np.diff(vector) >= 0)


@pytest.mark.parametrize(("scaling", "head_dim"), [(LLAMA_31, 128), (LLAMA_32, 64), (LLAMA_32, 128)])
def test_vectors_of_other_converters_are_understood(scaling: RopeScaling, head_dim: int) -> None:
    theirs = in_float32(scaling, 500000.0, head_dim)
    np.testing.assert_allclose(divisors(scaling, 500000.0, head_dim), theirs, rtol=1e-6)
    assert solve(theirs, 500000.0, 131072) == scaling


def test_unusual_values_are_fitted() -> None:
    scaling = RopeScaling("llama3", 6.5, 1.0, 7.0, 3000)
    found = solve(divisors(scaling, 500000.0, 128), 500000.0, 100)
    assert found is not None
    assert (found.factor, found.low_freq_factor, found.original_max_position_embeddings) == (6.5, 1.0, 3000)
    assert found.high_freq_factor == pytest.approx(7.0, rel=1e-4)


def test_context_divided_by_factor_is_a_guess() -> None:
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 1000)
    assert solve(divisors(scaling, 500000.0, 128), 500000.0, 8000) == scaling


def test_no_scaling() -> None:
    assert solve(np.ones(32, np.float32), 10000.0, 4096) is None


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_impossible_values(value: float) -> None:
    vector = divisors(LLAMA_31, 500000.0, 128)
    vector[3] = value
    with pytest.raises(ValueError, match="not positive"):
        solve(vector, 500000.0, 131072)


def test_another_kind_of_scaling_is_not_bent_into_this_one() -> None:
    with pytest.raises(ValueError, match="no scaling of kind llama3"):
        solve(np.linspace(1, 9, 64, dtype=np.float32), 10000.0, 131072)


@settings(max_examples=150, deadline=None)
@given(
    factor=st.sampled_from([1.5, 2.0, 4.0, 8.0, 16.0, 32.0, 7.25]),
    high=st.floats(1.5, 32),
    length=st.integers(64, 200_000),
    theta=st.sampled_from([1e4, 5e5, 1e6]),
    head_dim=st.sampled_from([16, 64, 128]),
)
def test_what_is_solved_gives_the_same_vector(
    factor: float, high: float, length: int, theta: float, head_dim: int
) -> None:
    vector = divisors(RopeScaling("llama3", factor, 1.0, high, length), theta, head_dim)
    try:
        found = solve(vector, theta, 4096)
    except ValueError:
        return  # not identified: too few frequencies in the blend
    again = np.ones_like(vector) if found is None else divisors(found, theta, head_dim)
    np.testing.assert_allclose(again, vector, rtol=3e-6)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.floats(0, 2.0**120, width=32), min_size=1, max_size=8), st.floats(1e-30, 1e38), st.integers(0, 2**64)
)
def test_any_vector_is_solved_or_refused(values: list[float], theta: float, context: int) -> None:
    try:
        found = solve(np.array(values, np.float32), theta, context)
    except ValueError:
        return
    assert found is None or found.kind == "llama3"
