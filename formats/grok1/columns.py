"""Columns of int8 matrices as rows, in stripes that are kept for a while.

Grok-1's matrices lie as [in, out], row by row; a canonical row is one of their columns. To fetch a few columns costs as
many reads as there are rows, so a stripe of some thousand columns is fetched at once, turned, and kept until a few
others were needed: whoever asks for the rows in order finds them there. Memory is `KEPT` stripes, whatever the matrix.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from weightsmith.errors import IntegrityError, WeightsmithError
from weightsmith.formats.safetensors.strictjson import open_regular

STRIPE = 32 << 20  # bytes
KEPT = 3


@dataclass(frozen=True, slots=True)
class Matrix:
    """An int8 matrix of `n_rows` rows of `n_columns` bytes from byte `offset` of `path` on; size: of the whole file."""

    path: Path
    size: int
    offset: int
    n_rows: int
    n_columns: int

    @property
    def width(self) -> int:
        """Columns of one stripe."""
        fits = STRIPE // self.n_rows
        return self.n_columns if fits >= self.n_columns else max(64, 1 << (fits.bit_length() - 1))


@dataclass(slots=True)
class _Stripe:
    lock: threading.Lock = field(default_factory=threading.Lock)
    turned: NDArray[np.uint8] | None = None


class Stripes:
    """What was fetched lately; any thread may ask, and two that need the same stripe fetch it once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[Matrix, int], _Stripe] = OrderedDict()

    def columns(self, matrix: Matrix, start: int, stop: int) -> NDArray[np.uint8]:
        """Columns [start, stop) as uint8 [stop - start, n_rows], fresh."""
        found = np.empty((stop - start, matrix.n_rows), np.uint8)
        width = matrix.width
        for number in range(start // width, -(-stop // width)):
            turned, left = self._stripe(matrix, number), number * width
            first, last = max(start, left), min(stop, left + len(turned))
            found[first - start : last - start] = turned[first - left : last - left]
        return found

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()

    def _stripe(self, matrix: Matrix, number: int) -> NDArray[np.uint8]:
        with self._lock:
            stripe = self._kept.setdefault((matrix, number), _Stripe())
            self._kept.move_to_end((matrix, number))
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        with stripe.lock:
            if stripe.turned is None:
                stripe.turned = _fetch(matrix, number)
            return stripe.turned


def _fetch(matrix: Matrix, number: int) -> NDArray[np.uint8]:
    from weightsmith.formats.grok1.turn import turned  # noqa: PLC0415  (numba is imported by what computes)

    left = number * matrix.width
    width = min(matrix.width, matrix.n_columns - left)
    rows = np.empty((matrix.n_rows, width), np.uint8)
    handle = opened(matrix.path, matrix.size)
    try:
        if width == matrix.n_columns:
            read_at(handle, rows.reshape(-1).data, matrix.offset, path=matrix.path)
        else:
            if number == 0 and hasattr(os, "posix_fadvise"):  # one sweep of the disk instead of one for each stripe
                os.posix_fadvise(handle, matrix.offset, matrix.n_rows * matrix.n_columns, os.POSIX_FADV_WILLNEED)
            view = rows.reshape(-1).data
            for row in range(matrix.n_rows):
                at = matrix.offset + row * matrix.n_columns + left
                read_at(handle, view[row * width : (row + 1) * width], at, path=matrix.path)
    finally:
        os.close(handle)
    return turned(rows)


def opened(path: Path, size: int) -> int:
    """A handle on a file that had `size` bytes when it was checked; IntegrityError if it has others now."""
    handle, found = open_regular(path)
    if found != size:
        os.close(handle)
        raise IntegrityError(f"{found} bytes, there were {size} when it was opened", path=path)
    return handle


def read_at(handle: int, view: memoryview, at: int, *, path: Path) -> None:
    """Fill `view` with the bytes from `at` on."""
    while view:
        try:
            done = os.preadv(handle, [view], at)
        except OSError as error:
            raise WeightsmithError(f"cannot read: {error.strerror}", path=path) from error
        if not done:
            raise IntegrityError("the file became shorter while it was read", path=path)
        view, at = view[done:], at + done
