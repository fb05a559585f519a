"""Importances of the tensors that no imatrix knows, estimated from their weights (`quant.tails`), each tensor once.

Whoever asks first makes them and the others wait. All rows of a tensor are looked at, a little at a time so that they
stay in the cache, before the first of them is encoded: what one slab would show of its columns' tails is less, and
would depend on how slabs are cut. Stored rows of a tensor that is not large are kept until the next but one is asked
for, so that they need not be read again for encoding.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from weightsmith.quant import codecs
from weightsmith.types import Packed, Reader, TensorInfo

_AT_ONCE = 1 << 19  # weights, as float32 2 MB
_KEPT_BYTES = 24 << 20  # of one tensor; two of them are kept


class Estimates:
    """Of the tensors of `reader`. keep: whether memory is there for rows to be read once."""

    def __init__(self, reader: Reader, *, keep: bool) -> None:
        self._reader, self._most = reader, _KEPT_BYTES if keep else 0
        self._found: dict[str, Future[NDArray[np.float32]]] = {}
        self._kept: dict[str, Packed] = {}
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

    def rows(self, info: TensorInfo, start: int, stop: int) -> Packed:
        """Stored rows [start, stop) as `Reader.rows` gives them, not to be written to."""
        kept = self._kept.get(info.name)
        return kept[start:stop] if kept is not None else self._reader.rows(info.name, start, stop)

    def _estimate(self, info: TensorInfo) -> NDArray[np.float32]:
        from weightsmith.quant.tails import Tails  # noqa: PLC0415  (loads numba)

        tails = Tails(info.row_len)
        if info.nbytes <= self._most:
            self._keep(info)
        unit = self._reader.row_unit(info.name)
        step = max(1, _AT_ONCE // max(1, info.row_len) // unit) * unit
        for start in range(0, info.n_rows, step):
            packed = self.rows(info, start, min(start + step, info.n_rows))
            tails.add(codecs.decode(info.codec, packed, info.row_len))
        return tails.importance()

    def _keep(self, info: TensorInfo) -> None:
        packed = self._reader.rows(info.name, 0, info.n_rows)
        with self._lock:
            self._kept = dict([*self._kept.items(), (info.name, packed)][-2:])
