"""Rows that search badly: nothing, next to nothing, one giant, one sign, too much, no numbers; and odd importances."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from tests.quant.kquants import ggml
from weightsmith.errors import IntegrityError, UnsupportedError, UsageError
from weightsmith.quant import codecs
from weightsmith.quant.blocks import BLOCKS

EFFORTS = ("fast", "normal", "best")
every_codec = pytest.mark.parametrize("codec", ggml.CODECS)


def encode(codec: str, x: np.ndarray, importance: np.ndarray | None = None, effort: str = "normal") -> np.ndarray:
    module = importlib.import_module(f"weightsmith.quant.codecs.{codec.lower()}")
    return module.encode(x, importance=importance, effort=effort)


def relative_error(codec: str, x: np.ndarray, packed: np.ndarray) -> float:
    back = codecs.decode(codec, packed, x.shape[1]).astype(np.float64)
    return float(((back - x) ** 2).sum() / (x.astype(np.float64) ** 2).sum())


@every_codec
@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("effort", EFFORTS)
def test_zeros_stay_zeros(codec: str, zero: float, effort: str) -> None:
    x = np.full((3, 512), zero, np.float32)
    for weights in (None, ggml.importance(row_len=512)):
        assert not codecs.decode(codec, encode(codec, x, weights, effort), 512).any()


@every_codec
def test_a_zero_block_among_others(codec: str) -> None:
    x = ggml.rows("gauss", 2)
    x[1, 256:512] = 0
    back = codecs.decode(codec, encode(codec, x), ggml.ROW)
    assert not back[1, 256:512].any()
    assert np.isfinite(back).all()


@every_codec
@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-30, 1e-8])
def test_weights_below_half_precision_become_zero(codec: str, size: float) -> None:
    x = np.full((1, 256), size, np.float32)
    x[0, ::3] *= -1
    back = codecs.decode(codec, encode(codec, x, ggml.importance(row_len=256)), 256)
    assert np.isfinite(back).all()
    assert np.abs(back).max() <= 2 * size or size < 2e-5


@every_codec
def test_small_scales_see_the_half_they_are_stored_in(codec: str) -> None:
    """Weights of 1e-5 leave a scale few bits; the error must not exceed ggml's, which rounds at the end."""
    x = ggml.rows("gauss", 16) * np.float32(5e-4)
    weights = ggml.importance()
    ours = ggml.block_errors(codec, x, encode(codec, x, weights), weights).sum()
    assert ours < ggml.block_errors(codec, x, ggml.quantize(codec, x, weights), weights).sum()


@every_codec
def test_one_giant_is_kept(codec: str) -> None:
    x = ggml.rows("gauss", 2)
    x[0, 300] = 1e4
    back = codecs.decode(codec, encode(codec, x), ggml.ROW)
    assert abs(back[0, 300] / 1e4 - 1) < 0.02
    assert relative_error(codec, x[1:], encode(codec, x[1:])) < 0.15


@every_codec
@pytest.mark.parametrize("sign", [1, -1])
def test_weights_of_one_sign(codec: str, sign: int) -> None:
    """Norm-like weights, all near one value: mins may be of either sign, so a wide offset costs nothing."""
    x = (sign * (1 + 0.05 * np.random.default_rng(0).standard_normal((8, 512)))).astype(np.float32)
    ones = np.ones(512, np.float32)
    theirs = ggml.block_errors(codec, x, ggml.quantize(codec, x, ones), None).sum()
    for effort in ("normal", "best"):
        ours = ggml.block_errors(codec, x, encode(codec, x, ones, effort), None).sum()
        assert ours < theirs
        if codec in ("Q2_K", "Q4_K", "Q5_K"):
            spread = ((x - x.mean()).astype(np.float64) ** 2).sum()
            assert ours < {"Q2_K": 0.12, "Q4_K": 0.01, "Q5_K": 0.003}[codec] * spread


@every_codec
@pytest.mark.parametrize("value", [0.02, -0.02, 3.0])
def test_constant_rows_are_nearly_exact(codec: str, value: float) -> None:
    x = np.full((2, 512), value, np.float32)
    for effort in EFFORTS:
        assert relative_error(codec, x, encode(codec, x, ggml.importance(row_len=512), effort)) < 1e-4


@every_codec
def test_large_weights_either_fit_or_say_so(codec: str) -> None:
    rng = np.random.default_rng(0)
    size = 1e4 if codec in ("Q4_1", "Q5_1") else 5e4  # their offset must fit half precision as it is
    x = (size * rng.standard_normal((2, 256))).astype(np.float32)
    assert relative_error(codec, x, encode(codec, x)) < 0.2
    for size in (1e9, 3e38):
        with pytest.raises(UnsupportedError, match="outside F16's range"):
            encode(codec, (size * np.where(np.arange(256) % 2, 1.0, -1.0))[None].astype(np.float32))


@every_codec
def test_just_within_reach_is_not_clipped(codec: str) -> None:
    """Growing weights are held well until they are refused; none is silently cut off."""
    pattern = np.random.default_rng(0).uniform(-1, 1, (1, 256)).astype(np.float32)
    refused = False
    for exponent in range(14, 32):
        x = pattern * np.float32(2.0**exponent)
        try:
            packed = encode(codec, x)
        except UnsupportedError:
            refused = True
            continue
        assert not refused
        assert relative_error(codec, x, packed) < 0.08
    assert refused


@every_codec
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_number_is_an_error(codec: str, value: float) -> None:
    x = ggml.rows("gauss", 40)
    x[39, 700] = value
    with pytest.raises(IntegrityError, match="1 weights are no finite numbers"):
        encode(codec, x)


@every_codec
def test_odd_importances(codec: str) -> None:
    x = ggml.rows("gauss", 4)
    plain = encode(codec, x)
    assert np.isfinite(codecs.decode(codec, plain, ggml.ROW)).all()
    one = np.zeros(ggml.ROW, np.float32)
    one[5] = 1e-30
    back = codecs.decode(codec, encode(codec, x, one), ggml.ROW)
    assert relative_error(codec, x, encode(codec, x, one)) < 0.2
    assert np.abs(back[:, 5] - x[:, 5]).max() < 0.005
    zeros = encode(codec, x, np.zeros(ggml.ROW, np.float32))
    assert np.array_equal(zeros, encode(codec, x, np.ones(ggml.ROW, np.float32)))
    huge = encode(codec, x, np.full(ggml.ROW, 2.0**127, np.float32))
    assert np.array_equal(huge, encode(codec, x, np.ones(ggml.ROW, np.float32)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_importances_that_are_none(value: float) -> None:
    weights = np.ones(ggml.ROW, np.float32)
    weights[17] = value
    with pytest.raises(IntegrityError, match="importance"):
        encode("Q4_K", ggml.rows("gauss", 1), weights)


def test_importances_of_another_tensor() -> None:
    with pytest.raises(IntegrityError, match="512 importances for rows of 1024 weights"):
        encode("Q6_K", ggml.rows("gauss", 1), np.ones(512, np.float32))


def test_unknown_effort() -> None:
    with pytest.raises(UsageError, match="heroic"):
        encode("Q6_K", ggml.rows("gauss", 1), None, "heroic")


@every_codec
def test_no_rows(codec: str) -> None:
    assert encode(codec, np.empty((0, 256), np.float32)).shape == (
        0,
        256 // BLOCKS[codec].weights * BLOCKS[codec].nbytes,
    )


@every_codec
def test_one_entrance_passes_the_guide_on(codec: str) -> None:
    x, weights = ggml.rows("gauss", 2), ggml.importance()
    found = codecs.encode(codec, x, importance=weights, effort="best")
    assert np.array_equal(found, encode(codec, x, weights, "best"))
    assert not np.array_equal(found, codecs.encode(codec, x))


def test_searched_codecs_are_those_with_a_version() -> None:
    modules = {name: importlib.import_module(f"weightsmith.quant.codecs.{name.lower()}") for name in codecs.writable()}
    assert {name for name, module in modules.items() if hasattr(module, "ARITHMETIC_VERSION")} == codecs.SEARCHED
    assert set(ggml.CODECS) == codecs.SEARCHED
