"""Writing a safetensors checkpoint: a folder that appears by rename, with every byte's place known beforehand.

Tensors fill shards in the planned order; a new shard begins where the next tensor would take one past `split_bytes`,
and a checkpoint that fits into one is `model.safetensors` without an index. The same plan gives the same bytes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from weightsmith.atomic import AtomicFolder, need_space, refuse_existing
from weightsmith.errors import IntegrityError, OutputExistsError, UnsupportedError, WeightsmithError
from weightsmith.formats import archs
from weightsmith.formats.safetensors.config import CONFIG_NAME, dump
from weightsmith.formats.safetensors.header import lay_out
from weightsmith.formats.safetensors.index import INDEX_NAME, SINGLE_NAME, dump_index, is_checkpoint
from weightsmith.formats.safetensors.reader import SafetensorsReader
from weightsmith.formats.safetensors.strictjson import open_regular
from weightsmith.quant.blocks import row_nbytes
from weightsmith.safename import check_name
from weightsmith.types import NOTES, ModelConfig, Packed, Reader, TensorInfo, Vocab

TYPES = ("F32", "F16", "BF16")
SPLIT_BYTES = 5_000_000_000  # as Hugging Face's tools do
_COPY = 8 << 20


@dataclass(slots=True)
class _Place:
    """Where a planned tensor goes, and which of its rows have arrived."""

    info: TensorInfo
    file: str
    offset: int
    arrived: NDArray[np.bool_]


def create(  # noqa: PLR0913  (every choice of a checkpoint, all by keyword)
    path: Path,
    config: ModelConfig,
    infos: Iterable[TensorInfo],
    vocab: Vocab | None,
    *,
    source: Reader | None = None,
    overwrite: bool = False,
    split_bytes: int | None = None,
    file_type: int | None = None,
    notes: Mapping[str, str] | None = None,
    keep: bool = False,
) -> SafetensorsWriter:
    """Begin to write the folder `path` with planned canonical tensors (codecs of TYPES).

    The tokenizer's files are those of `source` byte for byte if that is a safetensors checkpoint, else made from
    `vocab`. `split_bytes`: data bytes of a shard, 5 GB unless given. `notes` go into every shard's `__metadata__`.
    `file_type` and `keep` are other containers' and change nothing here. Raises OutputExistsError, ResourceError
    (disk), UnsupportedError (a codec that safetensors has not), IntegrityError (tensors that are not the family's).
    """
    del file_type, keep
    order = [_checked(info) for info in infos]
    _check_complete(order, config)
    _refuse_foreign(path, overwrite=overwrite)
    extras = _extras(config, vocab, source)
    sizes = dict.fromkeys(TYPES, 0)
    for info in order:
        sizes[info.codec] += info.nbytes
    extras[CONFIG_NAME] = dump(config, dtype=max(sizes, key=lambda codec: sizes[codec]))
    own = {NOTES + name: value for name, value in (notes or {}).items()}
    splitting = split_bytes or SPLIT_BYTES
    return SafetensorsWriter(path, order, extras, overwrite=overwrite, split_bytes=splitting, notes=own)


def _checked(info: TensorInfo) -> TensorInfo:
    if info.codec not in TYPES:
        raise UnsupportedError(
            f"{info.codec} cannot be stored in safetensors", tensor=info.name, hint=f"Known types: {', '.join(TYPES)}."
        )
    return TensorInfo(info.name, info.shape, info.codec, info.n_rows * row_nbytes(info.codec, info.row_len))


def _check_complete(order: Sequence[TensorInfo], config: ModelConfig) -> None:
    """What is written must be what a reader will expect."""
    expected = archs.by_name(config.family).tensors(config)
    for info in order:
        if info.shape != expected.pop(info.name, None):
            raise IntegrityError(f"shape {list(info.shape)} or the name is not the model's", tensor=info.name)
    if expected:
        raise IntegrityError("the plan leaves it out, but the model has it", tensor=next(iter(expected)))


def _refuse_foreign(path: Path, *, overwrite: bool) -> None:
    """Replacing removes a whole folder, so only what is a checkpoint itself, or empty, may be replaced."""
    refuse_existing(path, overwrite=overwrite)
    if path.is_dir() and any(path.iterdir()) and not is_checkpoint(path):
        raise OutputExistsError("the folder is no checkpoint and is not replaced", path=path, hint="Remove it first.")


def _extras(config: ModelConfig, vocab: Vocab | None, source: Reader | None) -> dict[str, bytes | Path]:
    """Tokenizer and companion files by name: content, or the file to copy."""
    if isinstance(source, SafetensorsReader):
        return {file.name: file for file in source.companions()}
    if vocab is None:
        return {}
    from weightsmith.formats.tokenizer import to_files  # noqa: PLC0415  (loads the tokenizer libraries)

    return {str(check_name(name)): content for name, content in to_files(vocab, config).items()}


class SafetensorsWriter:
    """A folder in the making (see `weightsmith.types.Writer`); made by `create`.

    shapes: of tensors that the header describes by another shape than the rows they arrive in.
    """

    def __init__(
        self,
        path: Path,
        order: Sequence[TensorInfo],
        extras: dict[str, bytes | Path],
        *,
        overwrite: bool,
        split_bytes: int,
        notes: Mapping[str, str],
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.path, self.order = path, order
        self._shapes = shapes or {}
        self._places: dict[str, _Place] = {}
        self._lock = threading.Lock()
        self._folder = AtomicFolder(path, overwrite=overwrite)
        try:
            self._begin(_shards(order, split_bytes), extras, notes)
        except BaseException:
            self.abort()
            raise

    def _begin(self, shards: list[list[TensorInfo]], extras: dict[str, bytes | Path], notes: Mapping[str, str]) -> None:
        """Write everything but the rows."""
        total = sum(info.nbytes for info in self.order)
        need_space(self.path, total + sum(_size(extra) for extra in extras.values()))
        for number, shard in enumerate(shards, 1):
            name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            described = [replace(info, shape=self._shapes.get(info.name, info.shape)) for info in shard]
            start, offsets = lay_out(described, notes)
            self._folder.create(name, len(start) + sum(info.nbytes for info in shard))
            self._folder.write(name, 0, start)
            for info in shard:
                arrived = np.zeros(info.n_rows, np.bool_)
                self._places[info.name] = _Place(info, name, offsets[info.name], arrived)
        if len(shards) > 1:
            index = {name: place.file for name, place in self._places.items()}
            extras = extras | {INDEX_NAME: dump_index(index, total)}
        for name, extra in extras.items():
            self._add(name, extra)

    def _add(self, name: str, extra: bytes | Path) -> None:
        expected = _size(extra)
        self._folder.create(name, expected)
        if isinstance(extra, bytes):
            self._folder.write(name, 0, extra)
            return
        handle, size = open_regular(extra)
        offset = 0
        try:
            while piece := os.pread(handle, min(_COPY, size - offset), offset):
                self._folder.write(name, offset, piece)
                offset += len(piece)
        finally:
            os.close(handle)
        if offset != expected:
            raise IntegrityError("the file changed while it was copied", path=extra)

    def write(self, info: TensorInfo, start: int, rows: Packed) -> None:
        """Store packed rows uint8 [n, row_bytes] from row `start` on; any order, any thread."""
        place = self._places[info.name]
        stop = start + len(rows)
        if (
            rows.dtype != np.uint8
            or rows.shape[1:] != (place.info.row_bytes,)
            or not 0 <= start <= stop <= len(place.arrived)
        ):
            found = f"{rows.dtype} {list(rows.shape)} at row {start}"
            expected = f"uint8 rows of {place.info.row_bytes} bytes, {len(place.arrived)} in all"
            raise WeightsmithError(f"{found} does not fit, expected {expected}", path=self.path, tensor=info.name)
        data = np.ascontiguousarray(rows).reshape(-1)
        self._folder.write(place.file, place.offset + start * place.info.row_bytes, data.data)
        with self._lock:
            place.arrived[start:stop] = True

    def row_unit(self, info: TensorInfo) -> int:
        """Rows are stored as they come, so any number will do."""
        del info
        return 1

    def close(self) -> Path:
        """Check that every row arrived, flush, rename into place; on any failure nothing is left. The final path."""
        try:
            for place in self._places.values():
                if missing := int(np.count_nonzero(~place.arrived)):
                    raise IntegrityError(
                        f"{missing} of {len(place.arrived)} rows were never written",
                        path=self.path,
                        tensor=place.info.name,
                    )
            return self._folder.commit()
        except BaseException:
            self.abort()
            raise

    def holds(self, info: TensorInfo, start: int, stop: int, total: int) -> bool:
        """Always False: a folder is begun anew. Nothing here takes longer to write than to read back."""
        del info, start, stop, total
        return False

    def abort(self) -> None:
        """Remove what was written."""
        self._folder.abort()

    def suspend(self) -> None:
        """As `abort`."""
        self.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _size(extra: bytes | Path) -> int:
    return len(extra) if isinstance(extra, bytes) else extra.stat().st_size


def _shards(order: Sequence[TensorInfo], split_bytes: int) -> list[list[TensorInfo]]:
    shards: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in order:
        if shards[-1] and filled + info.nbytes > split_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(info)
        filled += info.nbytes
    return shards
