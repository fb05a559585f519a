"""The same bytes on every machine, for any grouping of rows and from any thread; and the bytes of this version."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.quant.kquants import ggml

ROOT = Path(__file__).parents[3]
# SHA-256 of what `digest` packs. A change means other bytes for the same input: raise ARITHMETIC_VERSION as well.
DIGESTS: dict[str, str] = {
    "Q2_K": "761ca3dd7f6176cd3b3dac208f03d7765fe77383369c5985f61da918f08d8c33",
    "Q3_K": "dc45cb82260319c8b5b0547cd5dd6abf6e057bd08b434246a83a8f6cfae7dc12",
    "Q4_K": "69d2baba36395b26211308f717603a1dcdf2bf86fb24f8ce542e48cb92fe1219",
    "Q5_K": "ec9058872fa6cf723f3ca7388d399bc8e534c418e16943a1dfe4e77ce8885bd6",
    "Q6_K": "a34f9da2d603dcec8fe990416ed86d0d263a00fa2160a381b5701e6ecb6f70a8",
    "IQ4_NL": "f650cb138e889e139c520600a176fc13d3f55da3f761c22a985ad0c5793bfc8c",
    "IQ4_XS": "b61645cebbea3228f75ee867b14a386e460e64aa28b21ad5e1300e235f7521ec",
}

PROGRAM = """
import json, sys
from tests.quant.kquants.test_k_bytes import digest
print(json.dumps({codec: digest(codec) for codec in sys.argv[1:]}))
"""


def encode(codec: str, x: np.ndarray, importance: np.ndarray | None = None, effort: str = "normal") -> np.ndarray:
    module = importlib.import_module(f"weightsmith.quant.codecs.{codec.lower()}")
    return module.encode(x, importance=importance, effort=effort)


def ramp(n: int) -> np.ndarray:
    """Rows [n, 512], each weight a sum of four uniforms, by integer arithmetic: the same everywhere."""
    index = np.arange(n * 512 * 4, dtype=np.uint64)
    mixed = (index * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(44)  # 20 bits
    uniform = mixed.astype(np.int64).reshape(n, 512, 4).sum(2) - 2**21
    return uniform.astype(np.float32) * np.float32(2.0**-26)


def digest(codec: str) -> str:
    x = ramp(40)
    importance = np.abs(x[7] * np.float32(64.0)) + np.float32(2.0**-6)
    parts = [encode(codec, x, weights, effort) for weights in (None, importance) for effort in ("fast", "normal")]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


@pytest.mark.parametrize("codec", ggml.CODECS)
def test_bytes_of_this_version(codec: str) -> None:
    assert digest(codec) == DIGESTS[codec]


@pytest.mark.parametrize("codec", ggml.CODECS)
def test_grouping_does_not_matter(codec: str) -> None:
    x, weights = ggml.rows("student", 13, row_len=768), ggml.importance(row_len=768)
    whole = encode(codec, x, weights)
    for cuts in ([1] * 13, [5, 8], [2, 3, 7, 1]):
        edges = np.cumsum([0, *cuts])
        parts = [encode(codec, x[a:b], weights) for a, b in itertools.pairwise(edges)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_threads_do_not_matter() -> None:
    x, weights = ggml.rows("gauss", 64), ggml.importance()
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda i: encode("Q4_K", x[4 * i : 4 * i + 4], weights), range(16)))
    assert np.array_equal(np.concatenate(parts), encode("Q4_K", x, weights))


@pytest.mark.parametrize("codec", ggml.CODECS)
def test_powers_of_two_change_only_the_scales(codec: str) -> None:
    """A row and 1024 times that row get the same codes: tiles are scaled exactly."""
    x = ggml.rows("gauss", 4) * np.float32(64)
    small, large = encode(codec, x), encode(codec, x * np.float32(1024))
    back = [ggml.dequantize(codec, packed) for packed in (small, large)]
    assert np.array_equal(back[0] * np.float32(1024), back[1])


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the targets named here are x86 ones")
def test_processors_do_not_matter(tmp_path: Path) -> None:
    """Without vector extensions (SSE2 alone) and with AVX2 and FMA: the bytes of this version."""
    runs = {}
    for name, chosen in (("generic", ("IQ4_XS",)), ("haswell", ("Q4_K",))):
        env = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path / name)}
        command = [sys.executable, "-c", PROGRAM, *chosen]
        runs[chosen] = subprocess.Popen(command, cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE, text=True)
    for chosen, run in runs.items():
        out, _ = run.communicate()
        assert run.returncode == 0
        assert json.loads(out) == {codec: DIGESTS[codec] for codec in chosen}
