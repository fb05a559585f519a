"""Hidden states of all rows between two stages of a layer: in memory, or in an unnamed file where that takes too much.

The file is read and written in pieces at positions instead of being mapped: a full disk is then an error that can be
told, and memory holds one piece, whatever the kernel thinks of mapped pages. It has no name, so a killed run leaves
nothing behind.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from weightsmith.atomic import disk_errors, need_space


class States:
    """float32 [rows, length, hidden], taken and replaced in pieces of whole rows; a context manager."""

    def __init__(self, shape: tuple[int, int, int], *, memory: int, spill: Path | None = None) -> None:
        self.shape = shape
        self._row_bytes = 4 * shape[1] * shape[2]
        self._kept: Tensor | None = None
        self._file: Any = None
        self._folder = spill or Path(tempfile.gettempdir())
        if self._row_bytes * shape[0] <= memory:
            self._kept = torch.zeros(shape)
            return
        with disk_errors(self._folder):
            need_space(self._folder, self._row_bytes * shape[0])
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115  (closed by close)
            os.posix_fallocate(self._file.fileno(), 0, self._row_bytes * shape[0])

    @property
    def spilled(self) -> bool:
        """True if they lie in a file."""
        return self._kept is None

    @property
    def held_bytes(self) -> int:
        """Memory that they take."""
        return 0 if self._kept is None else self._row_bytes * self.shape[0]

    def take(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop), those that there are, on the CPU; not to be changed in place."""
        if self._kept is not None:
            return self._kept[start:stop]
        stop = min(stop, self.shape[0])
        found = np.empty((stop - start, *self.shape[1:]), np.float32)
        view, done = found.view(np.uint8).reshape(-1).data, 0
        with disk_errors(self._folder):
            while done < len(view):
                done += os.preadv(self._file.fileno(), [view[done:]], start * self._row_bytes + done)
        return torch.from_numpy(found)

    def put(self, start: int, rows: Tensor) -> None:
        """Replace rows from `start` on."""
        if self._kept is not None:
            self._kept[start : start + len(rows)] = rows
            return
        data = rows.float().contiguous().cpu().numpy()
        view, done = data.view(np.uint8).reshape(-1).data, 0
        with disk_errors(self._folder):
            while done < len(view):
                done += os.pwrite(self._file.fileno(), view[done:], start * self._row_bytes + done)

    def close(self) -> None:
        """Free memory or file."""
        self._kept = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
