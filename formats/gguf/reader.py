"""A GGUF checkpoint, one file or several parts, behind the `Reader` protocol.

Tensors keep their codec; only names change and, for arch "llama", the row order of query and key matrices, whose
heads GGUF interleaves (`formats.rope_rows`). Rows are read with preadv into fresh arrays, so any number of threads may
read at once and nothing depends on a file position.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from weightsmith.errors import IntegrityError, NotFoundError
from weightsmith.formats import archs
from weightsmith.formats.gguf import stacks
from weightsmith.formats.gguf.keys import read_config
from weightsmith.formats.gguf.metadata import Metadata
from weightsmith.formats.gguf.parse import AGAIN
from weightsmith.formats.gguf.shards import read_headers
from weightsmith.formats.gguf.vocab import read_vocab
from weightsmith.formats.rope_rows import halve
from weightsmith.types import ModelConfig, Packed, TensorInfo, Vocab

MAX_SMALL = 1 << 24  # bytes of a tensor that is read whole


class GgufReader:
    """Reads what `path` (any part) belongs to; see `shards.read_headers` for what opening raises."""

    container = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._headers = read_headers(path)
        self._metadata = Metadata(self._headers[0])
        self._native = {name: info for header in self._headers for name, info in header.tensors.items()}
        self._resolved: tuple[ModelConfig, dict[str, TensorInfo]] | None = None
        self._handles: dict[Path, int] = {}
        for header in self._headers:
            self._handles[header.path] = os.open(header.path, os.O_RDONLY | os.O_CLOEXEC)

    def files(self) -> list[Path]:
        """The file, or all parts in order."""
        return [header.path for header in self._headers]

    def metadata(self) -> Metadata:
        """The keys of the first part, decoded when looked up."""
        return self._metadata

    def native_infos(self) -> Mapping[str, TensorInfo]:
        """Tensors under their GGUF names, in file order."""
        return self._native

    @property
    def config(self) -> ModelConfig:
        """The model. Raises UnsupportedError (unknown family) or IntegrityError (keys and tensors disagree)."""
        return self._resolve()[0]

    def infos(self) -> Mapping[str, TensorInfo]:
        """Canonical tensors in the family's order. Raises what `config` raises."""
        return self._resolve()[1]

    def _resolve(self) -> tuple[ModelConfig, dict[str, TensorInfo]]:
        if self._resolved is None:
            config = read_config(self._metadata, self._native, self.native_bytes)
            self._resolved = config, canonical_infos(config, self._native, self.path)
        return self._resolved

    def native_bytes(self, name: str) -> NDArray[np.uint8]:
        """All stored bytes of a small tensor, by its GGUF name: uint8 [nbytes]."""
        info = self._native[name]
        if info.nbytes > MAX_SMALL:
            raise IntegrityError(f"has {info.nbytes} bytes, expected a small one", path=info.path, tensor=name)
        return self._read(info, 0, info.nbytes)

    def rows(self, name: str, start: int, stop: int) -> Packed:
        """Rows [start, stop) of a canonical tensor: uint8 [stop - start, row_bytes], canonical order, fresh.

        Raises IntegrityError if the file became shorter, NotFoundError for a name that is not in `infos()`.
        """
        info = self._info(name)
        if not 0 <= start <= stop <= info.n_rows:
            raise IndexError(f"rows {start} to {stop} of {info.n_rows}")
        size, unit = info.row_bytes, self.row_unit(name)
        first, last = start // unit * unit, -(-stop // unit) * unit
        rows = self._read(info, first * size, (last - first) * size).reshape(-1, size)
        if unit > 1:
            rows = halve(rows, unit)[start - first : stop - first]
        elif self._heads(name):
            rows = halve(rows.reshape(info.row_len, -1), info.row_len // (self._heads(name) or 1)).reshape(rows.shape)
        return rows

    def row_unit(self, name: str) -> int:
        """The head_dim for query and key matrices, else 1."""
        info = self._info(name)
        return self.config.head_dim if len(info.shape) > 1 and self._heads(name) else 1

    def vocab(self, pre: str | None = None) -> Vocab | None:
        """The tokenizer; see `vocab.read_vocab`."""
        return read_vocab(self._metadata, pre)

    def close(self) -> None:
        """Release file handles; headers stay usable."""
        while self._handles:
            os.close(self._handles.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        info = self.infos().get(name)
        if info is None:
            raise NotFoundError("no such tensor", path=self.path, tensor=name)
        return info

    def _heads(self, name: str) -> int | None:
        heads: int | None = archs.by_name(self.config.family).permuted_heads(name, self.config)
        return heads

    def _read(self, info: TensorInfo, begin: int, nbytes: int) -> NDArray[np.uint8]:
        data = np.empty(nbytes, np.uint8)
        view = data.data
        handle = self._handles[info.path] if info.path is not None else -1
        at = info.offset + begin
        while view:
            done = os.preadv(handle, [view], at)
            if not done:
                raise IntegrityError("the file became shorter", path=info.path, tensor=info.name, hint=AGAIN)
            view, at = view[done:], at + done
        return data


def canonical_infos(config: ModelConfig, native: Mapping[str, TensorInfo], path: Path) -> dict[str, TensorInfo]:
    """`native` tensors under canonical names, in the family's order.

    Raises IntegrityError naming the first tensor that is missing, of another shape, or not the family's.
    """
    family = archs.by_name(config.family)
    expected: dict[str, tuple[int, ...]] = family.tensors(config)
    found, known = {}, set()
    for name, shape in expected.items():
        gguf, whole = stacks.stored_as(name, shape, config, native)
        info = native.get(gguf)
        if info is None:
            raise IntegrityError(f"is missing from a {config.family} model", path=path, tensor=gguf, hint=AGAIN)
        if info.shape != whole:
            text = f"has shape {info.shape}, the keys make it {whole}"
            raise IntegrityError(text, path=info.path or path, tensor=gguf, hint=AGAIN)
        found[name] = stacks.part(info, name, shape)
        known.add(gguf)
    for gguf, info in native.items():
        if gguf not in known and not family.is_dropped(gguf):
            text = f"does not belong to a {config.family} model"
            raise IntegrityError(text, path=info.path or path, tensor=gguf, hint=AGAIN)
    return found
