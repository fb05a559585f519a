"""The same bytes on every machine, for any grouping of rows and from any thread; and the bytes of this version."""

from __future__ import annotations

import hashlib
import importlib
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.quant.kquants import ggml

# SHA-256 of what `digest` packs. A change means other bytes for the same input: raise ARITHMETIC_VERSION as well.
DIGESTS: dict[str, str] = {
    "Q4_0": "517f319c7e0b1056642893db24aca997808906a44c4f2ca2c6faabfb23734225",
    "Q4_1": "94fdcfcc1e3e87f80832c80c6b9dec1c71325d74c10be706e41a1cbd76cf7ec8",
    "Q5_0": "37f7af5fdab5be315e2f4201fe40d7c0dd5149c52e5e7ec0502feaf90e4e0247",
    "Q5_1": "dc05387a7ea29b9e8df23285b79bf76d119a522bc29415f478537646e419b8ab",
    "Q2_K": "91d8b0a64b0f374e29bcee80b4680186f1f7737e0e38937afdb5615de4dd5523",
    "Q3_K": "30bfd2d7775c2da828571ddf8fae4d40e5b4311b5f0ad26c5bf5055df732fc78",
    "Q4_K": "9e7d7b61ce5feebae48675d980505d9ec807a57a8fa438211edf4280796a8745",
    "Q5_K": "c9cb6edcf475617ebd06d0db2b10419ed0987917d8456fcebf65b27ccc724979",
    "Q6_K": "542ed4ddf2966494d9c5e3a423785417826b7c0fd8b5b172f2c2f8d10a935b76",
    "IQ4_NL": "617b207ce32d357769f527d69fb58132a573bb82be4ab0c30a79ea42f1c40023",
    "IQ4_XS": "a9c7169bb8e1c6839cded274d67a8c272782c2ff2f2272d3dd2a9f05cf660957",
}


def encode(codec: str, x: np.ndarray, importance: np.ndarray | None = None, effort: str = "normal") -> np.ndarray:
    module = importlib.import_module(f"weightsmith.quant.codecs.{codec.lower()}")
    return module.encode(x, importance=importance, effort=effort)


def ramp(n: int) -> np.ndarray:
    """Rows [n, 512], each weight a sum of four uniforms, by integer arithmetic: the same everywhere."""
    index = np.arange(n * 512 * 4, dtype=np.uint64)
    mixed = (index * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(44)  # 20 bits
    uniform = mixed.astype(np.int64).reshape(n, 512, 4).sum(2) - 2**21
    return uniform.astype(np.float32) * np.float32(2.0**-26)


def digest(codec: str, threads: int = 1) -> str:
    x = ramp(40)
    importance = np.abs(x[7] * np.float32(64.0)) + np.float32(2.0**-6)
    guides = [(weights, effort) for weights in (None, importance) for effort in ("fast", "normal", "best")]
    return hashlib.sha256(b"".join(in_threads(codec, x, *guide, threads) for guide in guides)).hexdigest()


@pytest.mark.parametrize("codec", ggml.CODECS)
def test_bytes_of_this_version(codec: str) -> None:
    for threads in (1, 2, 4):
        assert digest(codec, threads) == DIGESTS[codec]


@pytest.mark.parametrize("codec", ggml.CODECS)
def test_grouping_does_not_matter(codec: str) -> None:
    x, weights = ggml.rows("student", 13, row_len=768), ggml.importance(row_len=768)
    whole = encode(codec, x, weights)
    for cuts in ([1] * 13, [5, 8], [2, 3, 7, 1]):
        edges = np.cumsum([0, *cuts])
        parts = [encode(codec, x[a:b], weights) for a, b in itertools.pairwise(edges)]
        assert np.array_equal(np.concatenate(parts), whole)


def in_threads(codec: str, x: np.ndarray, weights: np.ndarray | None, effort: str, threads: int) -> bytes:
    """The packed rows, five of them at a time, each five by any of the threads."""
    with ThreadPoolExecutor(threads) as pool:
        parts = pool.map(lambda start: encode(codec, x[start : start + 5], weights, effort), range(0, len(x), 5))
        return b"".join(part.tobytes() for part in parts)


@pytest.mark.parametrize("codec", ggml.CODECS)
def test_powers_of_two_change_only_the_scales(codec: str) -> None:
    """A row and 1024 times that row get the same codes: tiles are scaled exactly."""
    x = ggml.rows("gauss", 4) * np.float32(64)
    small, large = encode(codec, x), encode(codec, x * np.float32(1024))
    back = [ggml.dequantize(codec, packed) for packed in (small, large)]
    assert np.array_equal(back[0] * np.float32(1024), back[1])
