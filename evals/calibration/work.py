"""The folder of finished layers of a run under way, OUT.layers/.

job.json says of which work they are (source files, rows, settings and version, as one line of JSON), and
layer-NNNNN.safetensors holds the stored tensors of one layer under their names within it. distil.safetensors is how far
the last step of best effort has come and scales.safetensors its result, which the layers are then given (`distil`).
Each file appears by rename, so what is there is whole. They are taken over by a run of the same work only.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightsmith._version import __version__
from weightsmith.atomic import AtomicFile, disk_errors, write_text
from weightsmith.errors import IntegrityError, OutputExistsError
from weightsmith.evals.forward.weights import Later
from weightsmith.formats.archs import expert_of
from weightsmith.formats.gptq.columns import Layout
from weightsmith.formats.safetensors.header import lay_out, read_header
from weightsmith.formats.safetensors.strictjson import open_regular
from weightsmith.quant import ARITHMETIC_VERSION
from weightsmith.quant.blocks import row_nbytes
from weightsmith.types import Reader, TensorInfo

log = logging.getLogger(__name__)

JOB = "job.json"
_CODECS = {"int32": "I32", "float16": "F16", "float32": "F32", "uint8": "U8"}
Parts = dict[str, NDArray[Any]]  # stored tensors of a layer by name within it


def fingerprint(reader: Reader, tokens: NDArray[np.int64], record: Mapping[str, Any]) -> str:
    """What must be equal for layers of an earlier run to be taken over; record: all options that decide the result."""
    work = {
        "version": __version__,
        "arithmetic": ARITHMETIC_VERSION,
        "source": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in reader.files()],
        "tensors": [(info.name, info.shape, info.codec) for info in reader.infos().values()],
        "rows": hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest(),
        **record,
    }
    return json.dumps(work, sort_keys=True)


def decoded(layout: Layout, parts: Parts, shape: tuple[int, int]) -> Tensor:
    """What a packed linear [out, in] computes with, float32. parts: what is stored of it, by suffix."""

    def load(suffix: str, begin: int, end: int) -> NDArray[Any]:
        return np.ascontiguousarray(parts[suffix][..., begin:end])

    return torch.from_numpy(layout.rows(load, shape, 0, shape[0], has_index="g_idx" in parts))


def parts_of(parts: Parts, key: str) -> Parts:
    """What is stored of the packed linear `key` (its weight's name within the layer), by suffix."""
    stem = key.removesuffix("weight")
    return {part.removeprefix(stem): value for part, value in parts.items() if part.startswith(stem)}


class Work:
    """The folder of finished layers: job.json says of which work, layer-NNNNN.safetensors hold them."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _file(self, name: int | str) -> Path:
        return self.folder / f"{f'layer-{name:05d}' if isinstance(name, int) else name}.safetensors"

    def begin(self, n_layers: int) -> int:
        """Make the folder ready and return how many layers are finished; those of other work are thrown away.

        Raises OutputExistsError (something else lies there, or another process is at work).
        """
        job = self.folder / JOB
        if self.folder.exists() and not job.is_file() and any(self.folder.iterdir()):
            raise OutputExistsError("is in the way of unfinished work", path=self.folder, hint="Remove it first.")
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputExistsError("another process is at work on this output", path=self.folder) from error
        if job.is_file() and job.read_text(encoding="utf-8") != self.fingerprint:
            log.warning("%s holds unfinished layers of other work, which are dropped", self.folder)
            for file in self.folder.glob("*.safetensors"):
                file.unlink()
        write_text(job, self.fingerprint)
        done = 0
        while done < n_layers and self._file(done).is_file():
            done += 1
        if done:
            log.info("%d of %d layers are finished already", done, n_layers)
        return done

    def has(self, name: str) -> bool:
        """Whether something was stored under a name."""
        return self._file(name).is_file()

    def store(self, name: int | str, parts: Parts) -> None:
        """Write a finished layer by its index, or something else under a name; what lay there is replaced."""
        infos = []
        for key, value in parts.items():
            codec = _CODECS[str(value.dtype)]
            rows = int(np.prod(value.shape[:-1], dtype=np.int64))
            infos.append(TensorInfo(key, value.shape, codec, rows * row_nbytes(codec, value.shape[-1])))
        start, offsets = lay_out(infos)
        file = AtomicFile(self._file(name), len(start) + sum(info.nbytes for info in infos), overwrite=True)
        try:
            file.write(0, start)
            for key, value in parts.items():
                file.write(offsets[key], np.ascontiguousarray(value).tobytes())
        except BaseException:
            file.abort()
            raise
        file.commit()

    def load(self, name: int | str) -> Parts:
        """Read what was stored."""
        path = self._file(name)
        handle, size = open_regular(path)
        try:
            found = {}
            dtypes = {codec: np.dtype(kind) for kind, codec in _CODECS.items()}
            for key, info in read_header(handle, size, path=path).tensors.items():
                data = os.pread(handle, info.nbytes, info.offset)
                if len(data) != info.nbytes:
                    raise IntegrityError("the file became shorter while it was read", path=path, tensor=key)
                found[key] = np.frombuffer(bytearray(data), dtypes[info.codec]).reshape(info.shape)
            return found
        finally:
            os.close(handle)

    def slab(self, index: int, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Rows [start, stop) of a tensor of bytes of a finished layer."""
        path = self._file(index)
        handle, size = open_regular(path)
        try:
            info = read_header(handle, size, path=path).tensors[name]
            wanted = (stop - start) * info.row_bytes
            data = os.pread(handle, wanted, info.offset + start * info.row_bytes)
            if len(data) != wanted:
                raise IntegrityError("the file became shorter while it was read", path=path, tensor=name)
            return np.frombuffer(data, np.uint8).reshape(stop - start, -1)
        finally:
            os.close(handle)

    def weights(
        self, index: int, layout: Layout, linears: Mapping[str, tuple[int, int]], prefix: str
    ) -> dict[str, Tensor | Later]:
        """What a finished layer computes with, float32 by name within it: linears, and vectors that were changed."""
        parts = self.load(index)
        found: dict[str, Tensor | Later] = {
            name: torch.from_numpy(value) for name, value in parts.items() if name.endswith((".weight", ".bias"))
        }
        for name, shape in linears.items():
            if name.startswith(prefix):
                key = name.removeprefix(prefix)
                load = partial(decoded, layout, parts_of(parts, key), shape)
                found[key] = load() if expert_of(name) is None else Later(shape, load)
        return found

    def remove(self) -> None:
        """Remove the folder; the checkpoint is written."""
        shutil.rmtree(self.folder, ignore_errors=True)
