"""Importances of the tensors that no imatrix knows, estimated from their weights (`quant.tails`), each tensor once.

Whoever asks first makes them and the others wait. All rows of a tensor are read for it, a few MB at a time, before the
first of them is encoded: what one slab would show of its columns' tails is less, and would depend on how slabs are cut.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from weightsmith.quant import codecs
from weightsmith.types import Reader, TensorInfo


class Estimates:
    """weights: how many to hold at a time, as float32."""

    def __init__(self, reader: Reader, weights: int) -> None:
        self._reader, self._weights = reader, weights
        self._found: dict[str, Future[NDArray[np.float32]]] = {}
        self._lock = threading.Lock()

    def of(self, info: TensorInfo) -> NDArray[np.float32]:
        """Importance of every input channel of `info`, a tensor of the reader; float32 [row_len]. Raises as reading."""
        with self._lock:
            known = self._found.get(info.name)
            found = self._found.setdefault(info.name, Future())
        if known is None:
            try:
                found.set_result(self._estimate(info))
            except BaseException as error:
                found.set_exception(error)
                raise
        return found.result()

    def _estimate(self, info: TensorInfo) -> NDArray[np.float32]:
        from weightsmith.quant.tails import Tails  # noqa: PLC0415  (loads numba)

        tails = Tails(info.row_len)
        unit = self._reader.row_unit(info.name)
        step = max(1, self._weights // max(1, info.row_len) // unit) * unit
        for start in range(0, info.n_rows, step):
            packed = self._reader.rows(info.name, start, min(start + step, info.n_rows))
            tails.add(codecs.decode(info.codec, packed, info.row_len))
        return tails.importance()
