"""ggml's own quantizers and decoders as oracle, and rows to try them on.

Quantizers: `ggml_quantize_chunk` of the shared library in the llama_cpp package. Decoders: the gguf package (numpy).
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from weightsmith.quant.blocks import BLOCKS, row_nbytes

LONE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
CODECS = (*LONE, "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
ROW = 1024


@cache
def _library() -> ctypes.CDLL:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python, which carries ggml, is not installed")
    folder = Path(llama_cpp.__file__).parent / "lib"
    found = sorted(folder.glob("*ggml-base.*"))
    if not found:
        pytest.skip(f"no ggml-base library in {folder}")
    library = ctypes.CDLL(str(found[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]
    return library


def quantize(codec: str, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """What ggml makes of float32 [rows, row_len]: uint8 [rows, row_bytes]."""
    rows = np.ascontiguousarray(rows, np.float32)
    out = np.zeros((len(rows), row_nbytes(codec, rows.shape[1])), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    written = _library().ggml_quantize_chunk(
        BLOCKS[codec].id,
        rows.ctypes.data,
        out.ctypes.data,
        0,
        *rows.shape,
        None if weights is None else weights.ctypes.data,
    )
    assert written == out.nbytes
    return out


def dequantize(codec: str, packed: np.ndarray) -> np.ndarray:
    """Float32 rows by the gguf package."""
    gguf = pytest.importorskip("gguf")
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(BLOCKS[codec].id))


def rows(kind: str, n: int, *, seed: int = 0, row_len: int = ROW) -> np.ndarray:
    """Seeded rows of a usual size: "gauss", or "student", whose tails are those of real weights."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, row_len)) if kind == "gauss" else rng.standard_t(5, (n, row_len))
    return (0.02 * x).astype(np.float32)


def importance(*, seed: int = 1, row_len: int = ROW) -> np.ndarray:
    """Log-normal importances, as imatrix files show them."""
    return np.exp(np.random.default_rng(seed).standard_normal(row_len)).astype(np.float32)


def block_errors(codec: str, x: np.ndarray, packed: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Weighted squared error of every block, in float64."""
    square = (x.astype(np.float64) - dequantize(codec, packed)) ** 2
    if weights is not None:
        square *= weights
    return square.reshape(-1, BLOCKS[codec].weights).sum(1)
