"""The compiled searches against slow, obvious ones, and ggml's choice against ggml."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from tests.quant.kquants import ggml, slow_search
from weightsmith.quant import codecs
from weightsmith.quant.blocks import BLOCKS

ASYMMETRIC = {
    "Q2_K": {"sub": 16, "top": 3, "largest": 15, "reach": 1.2},
    "Q4_K": {"sub": 32, "top": 15, "largest": 63, "reach": 1.8},
    "Q5_K": {"sub": 32, "top": 31, "largest": 63, "reach": 3.0},
}
SYMMETRIC = {
    "Q3_K": {"sub": 16, "low": 4, "high": 3, "largest": 32, "below": 1.25, "above": 2.0},
    "Q6_K": {"sub": 16, "low": 32, "high": 31, "largest": 128, "below": 6.0, "above": 1.5},
    "IQ4_NL": {"sub": 32, "low": 127, "high": 113, "largest": 1, "below": 25.0, "above": 25.0},
    "IQ4_XS": {"sub": 32, "low": 127, "high": 113, "largest": 32, "below": 25.0, "above": 25.0},
}
# At normal effort ggml's choice joins in the other codecs, which the slow search does not know (test_k_reference).
CASES = [(codec, "fast") for codec in ggml.CODECS if codec not in ggml.LONE] + [("Q2_K", "normal")]
CASES += [(codec, effort) for codec in ggml.LONE for effort in ("normal", "best")]
LONE = {"Q4_0": (8, 1.0, 2.0), "Q5_0": (16, 1.0, 3.0), "Q4_1": (15, 1.8), "Q5_1": (31, 3.0)}


def sample() -> np.ndarray:
    """Rows of every temper: usual, heavy-tailed, one-sided, tiny, huge, with zeros and with a giant."""
    x = np.concatenate([ggml.rows("gauss", 4, row_len=512), ggml.rows("student", 5, row_len=512)])
    x[1] = np.abs(x[1]) + np.float32(0.01)
    x[2] *= np.float32(1e-4)
    x[3] *= np.float32(3e4)
    x[4, 100:200] = 0
    x[5, 37] = 40.0
    x[6, :256] = 0
    return x


def slow(codec: str, x: np.ndarray, effort: int) -> np.ndarray:
    """Weights as the slow search leaves them."""
    blocks = x.reshape(-1, BLOCKS[codec].weights)
    ones = np.ones_like(blocks)
    if codec in LONE:
        d, m, q = slow_search.lone(blocks, LONE[codec], best=effort == 2)
        return (d[:, None] * q + m[:, None]).reshape(x.shape)
    if codec in ASYMMETRIC:
        d, dmin, s, m, q = slow_search.asymmetric(blocks, ones, effort=effort, **ASYMMETRIC[codec])
        wide = ASYMMETRIC[codec]["sub"]
        scale, offset = (d[:, None] * s).repeat(wide, 1), (dmin[:, None] * m).repeat(wide, 1)
        return (scale * q - offset).reshape(x.shape)
    d, s, c = slow_search.symmetric(blocks, ones, effort=effort, **SYMMETRIC[codec])
    return ((d[:, None] * s).repeat(SYMMETRIC[codec]["sub"], 1) * c).reshape(x.shape)


@pytest.mark.parametrize(("codec", "effort"), CASES)
def test_finds_what_the_slow_search_finds(codec: str, effort: str) -> None:
    x = sample()
    module = importlib.import_module(f"weightsmith.quant.codecs.{codec.lower()}")
    found = codecs.decode(codec, module.encode(x, effort=effort), x.shape[1])
    expected = slow(codec, x, ("fast", "normal", "best").index(effort))
    assert np.array_equal(found, expected)
