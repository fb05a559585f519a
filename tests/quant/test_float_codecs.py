"""F32, F16, BF16: every half, every rounding boundary, ranges, errors, alignment."""

from __future__ import annotations

import numpy as np
import pytest

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.quant import codecs

EVERY = np.arange(65536, dtype=np.uint32)


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint32)


def finite_only(words: np.ndarray) -> np.ndarray:
    floats = words.astype(np.uint32).view(np.float32)
    return np.ascontiguousarray(floats[np.isfinite(floats)])


def boundaries(shift: int, start: int, stop: int) -> np.ndarray:
    """Floats around every point where rounding `shift` bits away changes its mind."""
    middle = (np.arange(start >> shift, stop >> shift, dtype=np.int64) << shift) + (1 << shift - 1)
    words = np.concatenate([middle + step for step in (-1, 0, 1)]).astype(np.uint32)
    return finite_only(np.concatenate([words, words | np.uint32(1 << 31)]))


def test_f16_decodes_every_half() -> None:
    halves = EVERY.astype(np.uint16).reshape(256, 256)
    decoded = codecs.decode("F16", halves.view(np.uint8), 256)
    assert np.array_equal(bits(decoded), bits(halves.view(np.float16).astype(np.float32)))


def test_f16_rounds_like_ieee_at_every_boundary() -> None:
    floats = boundaries(13, 0x38800000, 0x477FF000)
    floats = floats[np.abs(floats) < 65520]
    small = np.arange(0, 2048) * 2.0**-25  # multiples of half the smallest half
    small = np.concatenate(
        [np.nextafter(np.float32(small), np.float32(side)) for side in (-1, 1)] + [np.float32(small)]
    )
    denormal = finite_only(np.random.default_rng(0).integers(0, 0x38800000, 100_000))
    for sample in (floats, small, -small, denormal):
        row = np.ascontiguousarray(sample, np.float32).reshape(1, -1)
        assert np.array_equal(codecs.encode("F16", row), row.astype(np.float16).view(np.uint8))


def test_f16_keeps_every_half() -> None:
    halves = EVERY.astype(np.uint16).reshape(1, -1)
    halves = np.ascontiguousarray(halves[np.isfinite(halves.view(np.float16))]).reshape(1, -1).view(np.uint8)
    assert np.array_equal(codecs.encode("F16", codecs.decode("F16", halves, halves.shape[1] // 2)), halves)


@pytest.mark.parametrize("value", [65520.0, -65520.0, 1e10, -3.4e38])
def test_f16_overflow_is_refused(value: float) -> None:
    row = np.array([[1.0, np.nextafter(np.float32(65520), np.float32(0)), value]], np.float32)
    codecs.encode("F16", row[:, :2])
    with pytest.raises(UnsupportedError, match=r"outside F16's range \(found") as caught:
        codecs.encode("F16", row)
    assert f"{np.float32(value):g}" in caught.value.message
    assert "BF16 or F32" in str(caught.value)


def test_bf16_rounds_to_nearest_even() -> None:
    expected = {1.0: 0x3F80, 1.00390625: 0x3F80, 1.01171875: 0x3F82, -1.0039064: 0xBF81, 3.0e-39: 0x0021, -0.0: 0x8000}
    row = np.array([list(expected)], np.float32)
    assert codecs.encode("BF16", row).view(np.uint16).tolist() == [list(expected.values())]


def test_bf16_matches_torch_at_every_boundary() -> None:
    torch = pytest.importorskip("torch")
    floats = boundaries(16, 0, 0x7F7F8000)
    floats = floats[bits(np.abs(floats)) < 0x7F7F8000].reshape(1, -1)
    peer = torch.from_numpy(floats).to(torch.bfloat16).view(torch.int16).numpy()
    assert np.array_equal(codecs.encode("BF16", floats).view(np.int16), peer)


def test_bf16_decodes_and_keeps_every_value() -> None:
    words = EVERY.astype(np.uint16).reshape(256, 256)
    decoded = codecs.decode("BF16", words.view(np.uint8), 256)
    assert np.array_equal(bits(decoded), words.astype(np.uint32) << 16)
    kept = np.isfinite(decoded)
    assert np.array_equal(codecs.encode("BF16", decoded[kept].reshape(1, -1)).view(np.uint16)[0], words[kept])


def test_bf16_overflow_is_refused() -> None:
    top = np.array([[0x7F7F7FFF, 0xFF7F7FFF]], np.uint32).view(np.float32)
    codecs.encode("BF16", top)
    for word in (0x7F7F8000, 0xFF7FFFFF):
        with pytest.raises(UnsupportedError, match="BF16's range"):
            codecs.encode("BF16", np.array([[word]], np.uint32).view(np.float32))


def test_f32_shares_its_bytes() -> None:
    rows = np.random.default_rng(1).standard_normal((3, 5)).astype(np.float32)
    packed = codecs.encode("F32", rows)
    assert packed.tobytes() == rows.tobytes()
    assert np.shares_memory(packed, rows)
    assert np.array_equal(codecs.decode("F32", packed, 5), rows)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", ["F32", "F16", "BF16"])
def test_nan_and_inf_are_refused(codec: str, bad: float) -> None:
    rows = np.random.default_rng(2).standard_normal((7, 33)).astype(np.float32)
    for place in (0, 100, rows.size - 1):
        damaged = rows.copy()
        damaged.flat[place] = bad
        with pytest.raises(IntegrityError, match="no finite numbers"):
            codecs.encode(codec, damaged)


@pytest.mark.parametrize("codec", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 7), (2, 0)])
def test_any_shape_unaligned_and_strided(codec: str, shape: tuple[int, int]) -> None:
    rows = np.random.default_rng(4).integers(-100, 100, shape).astype(np.float32)
    packed = codecs.encode(codec, rows)
    assert packed.shape == (shape[0], shape[1] * (4 if codec == "F32" else 2))
    shifted = np.frombuffer(b"x" + packed.tobytes(), np.uint8)[1:].reshape(packed.shape)
    decoded = codecs.decode(codec, shifted, shape[1])
    assert decoded.flags.aligned
    assert np.array_equal(decoded, rows)
    assert np.array_equal(codecs.decode(codec, packed[::-1], shape[1]), rows[::-1])
    assert np.array_equal(codecs.encode(codec, np.asfortranarray(rows)), packed)
