"""llama3 rope scaling as GGUF stores it: the tensor rope_freqs.weight, a divisor for each rotary frequency.

With f_i = theta^(-2i/d), wavelength w = 2 pi / f, original length L, low and high frequency factors l and h:

    w < L/h           1            (high frequencies keep their speed)
    w > L/l           factor
    between           1 / ((1 - s)/factor + s),  s = (L/w - l) / (h - l)

No key says what factor, l, h and L were. Reading solves for them: outside the blend the vector shows only the factor,
and the blend shows only L/l and L/h, so l = 1 is assumed, and Llama 3's h = 4 and L = 8192 wherever they explain the
vector. Any solution that does so computes the same model. Where that is not what the model said, the numbers are
written to the key weightsmith.rope_scaling as well (f64 array: factor, l, h, L).

Ref: LlamaModel.generate_extra_tensors in llama.cpp conversion/llama.py; _compute_llama3_parameters in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from weightsmith.types import RopeScaling

NAME = "rope_freqs.weight"
TOLERANCE = 2e-6  # relative; other writers compute in float32, which differs by up to 1e-6 in the blend


def divisors(scaling: RopeScaling, theta: float, head_dim: int) -> NDArray[np.float32]:
    """The vector float32 [head_dim / 2] for a scaling of kind "llama3"."""
    # Python's own float64, because numpy's vectorised powers differ between machines in the last bit.
    values = np.array([_divisor(scaling, w) for w in _wavelengths(theta, head_dim)])
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def is_sound(scaling: RopeScaling) -> bool:
    """True if the numbers of a llama3 scaling describe one: positive, with low <= high."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return scaling.factor > 0 and 0 < low <= high and scaling.original_max_position_embeddings > 0


def _wavelengths(theta: float, head_dim: int) -> list[float]:
    return [2 * math.pi * theta ** (2 * i / head_dim) for i in range(head_dim // 2)]


def _divisor(scaling: RopeScaling, wavelength: float) -> float:
    low, high, length = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    if wavelength < length / high:
        return 1.0
    if wavelength > length / low or high == low:
        return scaling.factor
    smooth = (length / wavelength - low) / (high - low)
    return 1 / ((1 - smooth) / scaling.factor + smooth)


def solve(
    vector: NDArray[np.float32], theta: float, context: int, told: RopeScaling | None = None
) -> RopeScaling | None:
    """The scaling that `vector` [head_dim / 2] stands for, None if it scales nothing; theta, context from the keys.

    `told` is preferred if it gives this vector. Raises ValueError if no scaling of this kind does.
    """
    if not np.isfinite(vector).all() or (vector <= 0).any():
        raise ValueError("holds values that are not positive")
    if told is not None and _gives(told, vector, theta):
        return told
    if (vector == 1).all():
        return None
    for candidate in _candidates(vector.tolist(), _wavelengths(theta, 2 * len(vector)), context):
        if _gives(candidate, vector, theta):
            return candidate
    raise ValueError("follows no scaling of kind llama3")


def _gives(scaling: RopeScaling, vector: NDArray[np.float32], theta: float) -> bool:
    if not is_sound(scaling):
        return False
    return np.allclose(divisors(scaling, theta, 2 * len(vector)), vector, rtol=TOLERANCE, atol=0)


def _candidates(values: Sequence[float], waves: Sequence[float], context: int) -> Iterator[RopeScaling]:
    """Scalings worth trying, the usual ones first."""
    shown = _rounded(max(values))
    lengths = [8192, int(context / shown), *(1 << k for k in range(4, 25))]
    for length in lengths:
        for factor in _factors(values, waves, length):
            yield RopeScaling("llama3", factor, 1.0, 4.0, length)
    yield from _fitted(values, waves, shown)


def _factors(values: Sequence[float], waves: Sequence[float], length: int) -> Iterator[float]:
    """The factor that the slowest frequency shows if l = 1, h = 4 and `length` hold."""
    smooth = (length / waves[-1] - 1) / 3
    if smooth < 0:
        yield _rounded(values[-1])
    elif 1 / values[-1] != smooth:
        exact = (1 - smooth) / (1 / values[-1] - smooth)
        yield _rounded(exact)
        yield exact


def _fitted(values: Sequence[float], waves: Sequence[float], factor: float) -> Iterator[RopeScaling]:
    """Read L/l and L/h off the blend: s is linear in 1/w."""
    if factor == 1:
        return
    blend = [(1 / w, (1 / v - 1 / factor) / (1 - 1 / factor)) for v, w in zip(values, waves, strict=True)]
    inside = [(x, s) for x, s in blend if 1e-6 < s < 1 - 1e-6]
    if not inside:
        return
    (x0, s0), (x1, s1) = inside[-1], inside[0]
    if len(inside) == 1:
        yield RopeScaling("llama3", factor, 1.0, 4.0, round((3 * s0 + 1) / x0))
    if x0 == x1 or s0 == s1:
        return
    slope = (s1 - s0) / (x1 - x0)
    start = x0 - s0 / slope  # where s = 0: 1/w = l/L
    if start > 1e-12:
        length = round(1 / start)
        high = length * (start + 1 / slope)
        yield RopeScaling("llama3", factor, 1.0, _rounded(high), length)
        yield RopeScaling("llama3", factor, _rounded(start * length), _rounded(high), length)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
