"""Layouts without a codec file, and the search for NaN and Inf in stored bytes."""

from __future__ import annotations

import gguf
import gguf.quants
import numpy as np
import pytest

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.quant import codecs, finite
from weightsmith.quant.blocks import BLOCKS, row_nbytes

FOREIGN = ["Q6_K", "Q4_K", "Q5_K", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "MXFP4"]


def random_bytes(codec: str, n_rows: int = 5, blocks: int = 3) -> np.ndarray:
    return np.random.default_rng(9).integers(0, 256, (n_rows, blocks * BLOCKS[codec].nbytes), np.uint8)


@pytest.mark.parametrize("codec", FOREIGN)
def test_foreign_blocks_decode_as_gguf_does(codec: str) -> None:
    packed = random_bytes(codec)
    row_len = 3 * BLOCKS[codec].weights
    with np.errstate(all="ignore"):
        peer = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[codec])
    decoded = codecs.decode(codec, packed, row_len)
    assert decoded.dtype == np.float32
    assert decoded.shape == (5, row_len)
    assert np.array_equal(decoded, peer, equal_nan=True)
    assert np.array_equal(codecs.decode(codec, packed[1:2], row_len), decoded[1:2], equal_nan=True)
    assert codecs.decode(codec, packed[:0], row_len).shape == (0, row_len)


def test_q4_k_golden_values() -> None:
    packed = np.zeros((1, 144), np.uint8)
    packed[0, :4] = (0x00, 0x3C, 0x00, 0x38)  # d = 1, dmin = 0.5
    packed[0, 4], packed[0, 8] = 3, 2  # scale and min of the first 32 weights
    packed[0, 16:48] = 5
    assert codecs.decode("Q4_K", packed, 256)[0, :33].tolist() == [3 * 5 - 0.5 * 2] * 32 + [0.0]


@pytest.mark.parametrize("codec", ["Q8_K", "BOOL"])
def test_layouts_nobody_decodes(codec: str) -> None:
    row_len = BLOCKS[codec].weights
    with pytest.raises(UnsupportedError, match=f"stored as {codec} cannot be decoded"):
        codecs.decode(codec, np.zeros((1, row_nbytes(codec, row_len)), np.uint8), row_len)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="unknown codec"):
        codecs.decode("Q9_Z", np.zeros((1, 1), np.uint8), 1)


@pytest.mark.parametrize("codec", ["F8_E4M3", "F8_E5M2"])
def test_float8_matches_torch(codec: str) -> None:
    torch = pytest.importorskip("torch")
    kind = torch.float8_e4m3fn if codec == "F8_E4M3" else torch.float8_e5m2
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    peer = torch.from_numpy(every).view(kind).to(torch.float32).numpy()
    decoded = codecs.decode(codec, every, 16)
    assert np.array_equal(decoded, peer, equal_nan=True)
    assert np.array_equal(np.signbit(decoded)[decoded == 0], np.signbit(peer)[peer == 0])
    for byte in range(256):
        found = False
        try:
            codecs.check_finite(codec, np.array([[byte]], np.uint8))
        except IntegrityError:
            found = True
        assert found is not bool(np.isfinite(peer.flat[byte]))


@pytest.mark.parametrize("codec", ["I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64"])
def test_integers_decode_while_exact(codec: str) -> None:
    kind = np.dtype(codec.lower().replace("i", "int").replace("uint", "u").replace("u", "uint"))
    info = np.iinfo(kind)
    values = np.array([[0, 1, max(info.min, -(1 << 24)), min(info.max, 1 << 24)]], kind)
    assert codecs.decode(codec, values.view(np.uint8), 4).tolist() == values.tolist()
    if kind.itemsize > 2:
        for worst in (info.max, info.min) if info.min else (info.max,):
            values[0, 1] = worst
            with pytest.raises(UnsupportedError, match="exactly"):
                codecs.decode(codec, values.view(np.uint8), 4)


def test_doubles_decode_within_range() -> None:
    values = np.array([[1.1, -1e-50, np.inf]])
    assert np.array_equal(codecs.decode("F64", values.view(np.uint8), 3), values.astype(np.float32))
    with pytest.raises(UnsupportedError, match="F32's range"):
        codecs.decode("F64", np.array([[0.0, -1e39]]).view(np.uint8), 2)


@pytest.mark.parametrize(("codec", "kind"), [("F16", np.float16), ("F32", np.float32), ("F64", np.float64)])
def test_nan_and_inf_are_found_anywhere(codec: str, kind: type) -> None:
    rows = (np.random.default_rng(6).standard_normal((40, 9999)) * 1e4).clip(-6e4, 6e4).astype(kind)
    codecs.check_finite(codec, rows.view(np.uint8))
    codecs.check_finite(codec, rows[:0].view(np.uint8))
    codecs.check_finite(codec, np.full((2, 2), np.finfo(kind).min, kind).view(np.uint8))
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        for place in (0, 123_456, rows.size - 1):
            damaged = rows.copy()
            damaged.flat[place] = bad
            with pytest.raises(IntegrityError, match=codec):
                codecs.check_finite(codec, damaged.view(np.uint8))


@pytest.mark.parametrize("word", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF])
def test_bf16_nan_and_inf_are_found(word: int) -> None:
    values = np.full((2, 3), 0x7F7F, np.uint16)
    codecs.check_finite("BF16", values.view(np.uint8))
    values[1, 1] = word
    with pytest.raises(IntegrityError, match="BF16"):
        codecs.check_finite("BF16", values.view(np.uint8))


@pytest.mark.parametrize("codec", sorted(set(finite._HALVES) - {"Q8_1"}))
def test_scales_are_looked_for_where_they_are(codec: str) -> None:
    """A NaN at the listed places spoils a block when decoded, and with sound ones there nothing does."""
    packed = random_bytes(codec, 6, 2)
    blocks = packed.reshape(-1, BLOCKS[codec].nbytes)
    for offset in finite._HALVES[codec]:
        blocks[:, offset : offset + 2] = (0x00, 0x3C)
    row_len = 2 * BLOCKS[codec].weights
    codecs.check_finite(codec, packed)
    assert np.isfinite(codecs.decode(codec, packed, row_len)).all()
    for offset in finite._HALVES[codec]:
        damaged = packed.copy()
        damaged.reshape(blocks.shape)[3, offset : offset + 2] = (0x00, 0x7E)
        assert not np.isfinite(codecs.decode(codec, damaged, row_len)).all()
        with pytest.raises(IntegrityError, match=rf"1 of 12 {codec} blocks"):
            codecs.check_finite(codec, damaged)
