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
    "Q2_K": "42d52b745dd1cd4c7beca64344af81cd4e755ab9707eea423d84d3de75d3126e",
    "Q3_K": "1dc24a7aa6867ca0d657b2614f11f0c3c1759548ec27bc1921bf785acf879de6",
    "Q4_K": "0bbcbc810afc2e6d8900f0a7b9173699860279644face260a5a832aa4443a947",
    "Q5_K": "f2cea71f662318f8c5673d6219e1e8ecff58c3412dc13e81509bbe181ef23ca6",
    "Q6_K": "2b7684359784024245af31286ecbd5dec39f38028484763ed2b645e3514202d9",
    "IQ4_NL": "71803044d3cf6e53fb4bef190e9e3647757202d867f2b526f175b3313b20f186",
    "IQ4_XS": "530778303240b1ae8c94f82983e61d7d2471fe49169cc454e69dbfce554f652e",
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
