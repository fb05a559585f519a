"""What the k-quant tables share: quantizers of ggml, rows to try them on, a timer that ignores other processes."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from weightsmith.quant import codecs
from weightsmith.quant.blocks import BLOCKS, row_nbytes

CODECS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")


def ggml_quantizer() -> Callable[[str, np.ndarray, np.ndarray | None], np.ndarray]:
    """ggml_quantize_chunk of the shared library in the llama_cpp package."""
    import llama_cpp

    library = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base.*"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]

    def quantize(codec: str, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        out = np.zeros((len(rows), row_nbytes(codec, rows.shape[1])), np.uint8)
        weights = None if importance is None else importance.ctypes.data
        library.ggml_quantize_chunk(BLOCKS[codec].id, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, weights)
        return out

    return quantize


def samples(n_rows: int, row_len: int) -> dict[str, np.ndarray]:
    """Seeded rows: Gaussian, and Student-t(5), whose tails are those of trained weights."""
    rng = np.random.default_rng(0)
    gauss = rng.standard_normal((n_rows, row_len))
    student = rng.standard_t(5, (n_rows, row_len))
    return {"gauss": (0.02 * gauss).astype(np.float32), "student": (0.02 * student).astype(np.float32)}


def importances(row_len: int) -> np.ndarray:
    return np.exp(np.random.default_rng(1).standard_normal(row_len)).astype(np.float32)


def block_errors(codec: str, rows: np.ndarray, packed: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    square = (codecs.decode(codec, packed, rows.shape[1]).astype(np.float64) - rows) ** 2
    if importance is not None:
        square *= importance
    return square.reshape(-1, BLOCKS[codec].weights).sum(1)


def seconds(work: Callable[[], object], repeat: int) -> float:
    """Least processor time of this thread over `repeat` runs, after one to warm up."""
    work()
    found = []
    for _ in range(repeat):
        begun = time.thread_time()
        work()
        found.append(time.thread_time() - begun)
    return min(found)
