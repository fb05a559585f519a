"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: golden bytes, the gguf package, a plain-loop oracle, bounds, errors, slabs."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import gguf.quants
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.quant import oracle
from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.quant import codecs
from weightsmith.quant.blocks import BLOCKS, row_nbytes

LAYOUTS = oracle.LAYOUTS
EDGES = {"Q4_0": (8, 8.5), "Q5_0": (16, 16.5), "Q4_1": (15, 0.5), "Q5_1": (31, 0.5)}
LEVELS = {"Q4_0": 8, "Q5_0": 16, "Q4_1": 15, "Q5_1": 31, "Q8_0": 127}


def plain(codec: str, rows: np.ndarray) -> np.ndarray:
    """Rounding without a search: ggml's bytes."""
    return codecs.encode(codec, rows, effort="fast")


def peer_encode(codec: str, rows: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.quantize(rows, gguf.GGMLQuantizationType[codec])


def peer_decode(codec: str, packed: np.ndarray) -> np.ndarray:
    return gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[codec])


def block(*head: float) -> np.ndarray:
    """One row of 32 weights: `head`, then zeros."""
    row = np.zeros((1, 32), np.float32)
    row[0, : len(head)] = head
    return row


def test_layouts_under_test_are_found_by_their_files() -> None:
    assert set(LAYOUTS) <= set(codecs.writable())


# d = 1 is 0x3C00, -1 is 0xBC00, -0 is 0x8000; bytes are little endian.
GOLDEN = [
    # 0.5 and 2.5 round away from zero; 0.49999997 must not become 1
    (
        "Q8_0",
        block(127, -127, 1, 0.5, -0.5, 0.49999997, 2.5, -2.5, 3.4),
        "003c 7f81 01 01ff 00 03fd 03" + "00" * 23,
    ),
    ("Q8_0", block(), "0000" + "00" * 32),
    # -8 sits on code 0; 7.9 would be 16 and is cut to 15; weight 16 is the high nibble of byte 0
    ("Q4_0", block(-8, 7, 0, 1, 7.9, -0.5, -0.51), "003c 80 8f 88 89 8f 88 87" + "88" * 9),
    ("Q4_0", block(*[0] * 16, 8, 3), "00bc 08 58" + "88" * 14),
    ("Q4_0", block(), "0080" + "88" * 16),
    # of -4 and 4 the first decides the sign of d (0.5 is 0x3800)
    ("Q4_0", block(1, -4, 4), "0038 8a 80 8f" + "88" * 13),
    ("Q4_0", block(1, 4, -4), "00b8 86 80 8f" + "88" * 13),
    # m = -1, d = 1; zeros are code 1
    ("Q4_1", block(-1, 14, 0.5, 0.4), "003c 00bc 10 1f 12 11" + "11" * 12),
    ("Q4_1", block(*[2.5] * 32), "0000 0041" + "00" * 16),
    # -16 on code 0 (high bit clear), zeros on 16 (nibble 0, high bit set), 15 on 31, -1 on 15
    ("Q5_0", block(-16, 15, -1), "003c faffffff 00 0f 0f" + "00" * 13),
    # m = 0, d = 1: 31 and 16 have the high bit, at positions 0 and 17
    ("Q5_1", block(31, 7, *[0] * 15, 16), "003c 0000 01000200 0f 07" + "00" * 14),
]


@pytest.mark.parametrize(("codec", "row", "expected"), GOLDEN)
def test_golden_bytes(codec: str, row: np.ndarray, expected: str) -> None:
    assert plain(codec, row).tobytes() == bytes.fromhex(expected)


def test_golden_values() -> None:
    packed = np.frombuffer(bytes.fromhex("003c 0041 ffffffff" + "f0" * 16), np.uint8).reshape(1, 24)
    assert codecs.decode("Q5_1", packed, 32).tolist() == [[18.5] * 16 + [33.5] * 16]
    packed = np.frombuffer(bytes.fromhex("00c0" + "81" + "7f" * 31), np.uint8).reshape(1, 34)  # d = -2
    assert codecs.decode("Q8_0", packed, 32).tolist() == [[254.0] + [-254.0] * 31]


@pytest.mark.parametrize("kind", oracle.KINDS)
@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (7, 288), (64, 1024)])
@pytest.mark.parametrize("codec", LAYOUTS)
def test_same_bytes_as_gguf(codec: str, shape: tuple[int, int], kind: str) -> None:
    rows = oracle.weights(kind, shape, seed=shape[1])
    packed = plain(codec, rows)
    assert np.array_equal(packed, peer_encode(codec, rows))
    decoded = codecs.decode(codec, packed, shape[1])
    assert np.array_equal(decoded.view(np.uint32), peer_decode(codec, packed).view(np.uint32))


@pytest.mark.parametrize("codec", LAYOUTS)
def test_same_values_as_gguf_for_any_bytes(codec: str) -> None:
    packed = np.random.default_rng(3).integers(0, 256, (64, row_nbytes(codec, 512)), np.uint8)
    with np.errstate(all="ignore"):
        assert np.array_equal(codecs.decode(codec, packed, 512), peer_decode(codec, packed), equal_nan=True)


@pytest.mark.parametrize("codec", LAYOUTS)
def test_same_bytes_as_the_plain_loop_on_millions_of_weights(codec: str) -> None:
    for seed, kind in enumerate(("normal", "student", "lattice")):
        rows = oracle.weights(kind, (512, 2048), seed)
        assert np.array_equal(plain(codec, rows), oracle.encode(codec, rows))


@pytest.fixture(scope="module")
def ggml() -> Callable[[str, np.ndarray], np.ndarray]:
    """ggml's own compiled reference."""
    package = importlib.util.find_spec("llama_cpp")
    found = sorted(Path(package.origin).parent.glob("lib/libggml-base.*")) if package and package.origin else []
    if not found:
        pytest.skip("llama-cpp-python, which brings ggml's compiled quantizers, is not installed")
    run = ctypes.CDLL(str(found[0])).ggml_quantize_chunk
    run.restype = ctypes.c_size_t
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    run.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]

    def encode(codec: str, rows: np.ndarray) -> np.ndarray:
        packed = np.zeros((len(rows), row_nbytes(codec, rows.shape[1])), np.uint8)
        assert run(BLOCKS[codec].id, rows.ctypes.data, packed.ctypes.data, 0, *rows.shape, None) == packed.size
        return packed

    return encode


@pytest.mark.parametrize("codec", LAYOUTS)
def test_same_bytes_as_ggml(codec: str, ggml: Callable[[str, np.ndarray], np.ndarray]) -> None:
    samples = [oracle.weights(kind, (64, 2048), 3) for kind in oracle.KINDS]
    samples += [oracle.edges(4096, *form) for form in EDGES.values()]
    for rows in samples:
        assert np.array_equal(plain(codec, rows), ggml(codec, rows))


@pytest.mark.parametrize("codec", EDGES)
def test_multiply_and_add_are_not_fused(codec: str) -> None:
    levels, offset = EDGES[codec]
    rows = oracle.edges(20_000, levels, offset)
    scale = np.float32(1) / (rows[:, :1] / np.float32(levels if offset < 1 else -levels))
    apart = (rows * scale + np.float32(offset)).astype(np.int32)
    fused = (rows.astype(np.float64) * scale + offset).astype(np.float32).astype(np.int32)
    assert np.count_nonzero(apart != fused) > 1000  # these weights tell the two apart
    assert np.array_equal(plain(codec, rows), oracle.encode(codec, rows))
    assert np.array_equal(plain(codec, rows), peer_encode(codec, rows))


@pytest.mark.parametrize("codec", LAYOUTS)
def test_scales_too_small_to_invert_store_zeros(codec: str) -> None:
    rows = np.random.default_rng(5).standard_normal((40, 64)).astype(np.float32)
    rows *= np.float32(2.0) ** np.arange(-149, -109, dtype=np.float32)[:, None]
    packed = plain(codec, rows)
    assert np.array_equal(packed, oracle.encode(codec, rows))
    assert not codecs.decode(codec, packed, 64).any()


@pytest.mark.parametrize("codec", LAYOUTS)
def test_signed_zeros_as_the_plain_loop_has_them(codec: str) -> None:
    rng = np.random.default_rng(7)
    zeros = np.where(rng.random((256, 64)) < 0.5, np.float32(0), np.float32(-0.0))
    ones = np.where(rng.random(zeros.shape) < 0.1, np.float32(1), zeros)
    for rows in (zeros, ones.astype(np.float32), -np.abs(ones), -zeros):
        assert np.array_equal(plain(codec, rows), oracle.encode(codec, rows))
        if not codec.endswith("_1"):  # numpy does not define which zero is the minimum
            assert np.array_equal(plain(codec, rows), peer_encode(codec, rows))


@pytest.mark.parametrize("kind", oracle.KINDS)
@pytest.mark.parametrize("codec", LAYOUTS)
def test_round_trip_error_is_bounded(codec: str, kind: str) -> None:
    rows = oracle.weights(kind, (64, 512), 11).reshape(-1, 32)
    back = codecs.decode(codec, plain(codec, rows), 32).astype(np.float64)
    error = np.abs(back - rows).max(1)
    top = np.abs(rows).max(1).astype(np.float64)
    span = (rows.max(1).astype(np.float64) - rows.min(1)) if codec.endswith("_1") else top
    # half a step, a whole one where the code opposite to the anchor is missing; then the halves' own rounding
    step = span / LEVELS[codec] * (1.0 if codec in ("Q4_0", "Q5_0") else 0.5)
    half = (span + (top if codec.endswith("_1") else 0)) * 2.0**-11 + 2.0**-25 * (LEVELS[codec] + 1)
    assert (error <= (step + half) * (1 + 1e-5)).all()


@pytest.mark.parametrize("codec", LAYOUTS)
@given(
    rows=hnp.arrays(
        np.float32,
        st.tuples(st.integers(0, 3), st.integers(1, 4).map(lambda n: 32 * n)),
        elements=st.floats(-60000, 60000, width=32),
    )
)
@settings(max_examples=60, deadline=None)
def test_any_finite_weights(codec: str, rows: np.ndarray) -> None:
    packed = plain(codec, rows)
    assert packed.shape == (len(rows), row_nbytes(codec, rows.shape[1]))
    assert np.array_equal(packed, oracle.encode(codec, rows) if rows.size else packed)
    codecs.check_finite(codec, packed)
    decoded = codecs.decode(codec, packed, rows.shape[1])
    assert decoded.shape == rows.shape
    assert np.isfinite(decoded).all()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 15, 16, 31, 1000, 2047])
@pytest.mark.parametrize("codec", LAYOUTS)
def test_nan_and_inf_are_refused(codec: str, place: int, bad: float) -> None:
    rows = oracle.weights("normal", (4, 512))
    rows.flat[place] = bad
    with pytest.raises(IntegrityError, match="no finite numbers"):
        plain(codec, rows)


@pytest.mark.parametrize("codec", LAYOUTS)
def test_weights_too_large_for_a_half_scale_are_refused(codec: str) -> None:
    rows = block(0, 0)
    limit = np.float32(LEVELS[codec] * 65504.0)
    rows[0, 5] = limit
    if not codec.endswith("_1"):
        rows[0, 5] = -limit
    assert np.isfinite(codecs.decode(codec, plain(codec, rows), 32)).all()
    for factor in (1.001, 1e30):
        with pytest.raises(UnsupportedError, match=r"outside F16's range \(found the weight"):
            plain(codec, rows * np.float32(factor))


@pytest.mark.parametrize("codec", ["Q4_1", "Q5_1"])
def test_an_offset_too_large_for_a_half_is_refused(codec: str) -> None:
    with pytest.raises(UnsupportedError, match="range"):
        plain(codec, np.full((1, 32), 70000.0, np.float32))


@pytest.mark.parametrize("codec", LAYOUTS)
def test_bytes_do_not_depend_on_slabs_or_threads(codec: str) -> None:
    rows = oracle.weights("student", (96, 352), 13)
    rows.setflags(write=False)
    whole = plain(codec, rows)
    for size in (1, 5, 32):
        starts = range(0, len(rows), size)
        with ThreadPoolExecutor(4) as pool:
            parts = list(pool.map(lambda start, size=size: plain(codec, rows[start : start + size]), starts))
            back = list(pool.map(lambda part: codecs.decode(codec, part, 352), parts))
        assert np.array_equal(np.concatenate(parts), whole)
        assert np.array_equal(np.concatenate(back), codecs.decode(codec, whole, 352))


@pytest.mark.parametrize("codec", LAYOUTS)
def test_strided_and_unaligned_input(codec: str) -> None:
    rows = oracle.weights("normal", (8, 64))
    packed = plain(codec, rows)
    wide = np.repeat(rows, 2, axis=1)[:, ::2]
    assert np.array_equal(plain(codec, wide), packed)
    raw = np.frombuffer(b"x" + rows.tobytes(), np.uint8)[1:].view(np.float32).reshape(rows.shape)
    assert np.array_equal(plain(codec, raw), packed)
    shifted = np.frombuffer(b"x" + packed.tobytes(), np.uint8)[1:].reshape(packed.shape)
    assert np.array_equal(codecs.decode(codec, shifted, 64), codecs.decode(codec, packed, 64))
    assert np.array_equal(codecs.decode(codec, packed[::-2], 64), codecs.decode(codec, packed, 64)[::-2])


def test_lengths_are_checked() -> None:
    with pytest.raises(UnsupportedError, match="no multiple"):
        plain("Q4_0", np.zeros((1, 33), np.float32))
    with pytest.raises(IntegrityError, match="expected 36"):
        codecs.decode("Q4_0", np.zeros((1, 18), np.uint8), 64)
    with pytest.raises(UnsupportedError, match="cannot be written"):
        plain("Q8_K", np.zeros((1, 256), np.float32))
