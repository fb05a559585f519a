"""Importances of the tensors that no imatrix knows, estimated from their weights (`quant.tails`), each tensor once.

Whoever asks first makes them and the others wait. All rows of a tensor are looked at, a little at a time so that they
stay in the cache, before the first of them is encoded: what one slab would show of its columns' tails is less, and
would depend on how slabs are cut. They are read again for encoding: kept till then, they would take memory that grows
with the tensors, and save a tenth of a second in seven.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from weightsmith.quant.uncollected import uncollected
from weightsmith.types import Reader, TensorInfo

_AT_ONCE = 1 << 18  # weights: what is read of them stays in the cache


class Estimates:
    """Of the tensors of `reader`."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._found: dict[str, Future[NDArray[np.float32]]] = {}
        self._lock = threading.Lock()

    def of(self, info: TensorInfo) -> NDArray[np.float32]:
        """Importance of every input channel of `info`, a tensor of the reader; float32 [row_len]. Raises as reading."""
        with self._lock:
            is_first = info.name not in self._found
            found = self._found.setdefault(info.name, Future())
        if is_first:
            try:
                found.set_result(self._estimate(info))
            except BaseException as error:
                found.set_exception(error)
                raise
        return found.result()

    def _estimate(self, info: TensorInfo) -> NDArray[np.float32]:
        with uncollected():
            from weightsmith.quant.tails import Tails  # noqa: PLC0415  (loads numba)

        tails = Tails(info.row_len)
        unit = self._reader.row_unit(info.name)
        step = max(1, _AT_ONCE // max(1, info.row_len) // unit) * unit
        for start in range(0, info.n_rows, step):
            packed = self._reader.rows(info.name, start, min(start + step, info.n_rows))
            tails.add_stored(info.codec, packed)
        return tails.importance()
