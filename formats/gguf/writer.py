"""A GGUF checkpoint being written, one file or several parts, behind the `Writer` protocol.

Every offset is known before the first row: the header goes first, rows go to their place in any order and from any
thread. Parts appear by rename, the first one last, so that a loader, which starts from the first, never meets half a
set. The bytes depend on nothing but the arguments: no time, no path.

A source that is GGUF itself passes on its metadata: keys that follow from the model are recomputed where they stand,
all others are copied byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from weightsmith.atomic import AtomicFile, need_space, refuse_existing
from weightsmith.errors import IntegrityError, UnsupportedError, UsageError
from weightsmith.formats import archs
from weightsmith.formats.gguf import pack, rope_freqs, shards, stacks
from weightsmith.formats.gguf.keys import ARCHITECTURE, FILE_TYPE, FLOATS, config_keys, is_owned, main_codec
from weightsmith.formats.gguf.parse import U32, padded
from weightsmith.formats.gguf.reader import GgufReader
from weightsmith.formats.gguf.vocab import OWNED, config_ids, vocab_keys
from weightsmith.formats.rope_rows import halve, interleave
from weightsmith.quant.blocks import row_nbytes
from weightsmith.quant.checksum import checksum
from weightsmith.quant.recipes import FILE_TYPES
from weightsmith.types import NOTES, ModelConfig, Packed, Reader, TensorInfo, Vocab

TYPES = tuple(FILE_TYPES)


@dataclass(slots=True)
class _Place:
    """Where a tensor goes: file number, absolute offset, heads if its rows are interleaved, and what has arrived."""

    info: TensorInfo
    file: int
    offset: int
    heads: int | None
    arrived: list[tuple[int, int]] = field(default_factory=list)


class GgufWriter:
    """Made by `create`, which has checked the plan."""

    def __init__(self, order: Sequence[TensorInfo], files: list[AtomicFile], places: dict[str, _Place]) -> None:
        self.order = order
        self._files, self._places = files, places
        self._open = True

    def write(self, info: TensorInfo, start: int, rows: Packed) -> None:
        """Store canonical rows uint8 [n, row_bytes] of a planned tensor from row `start` on, from any thread.

        Raises ResourceError if the disk is full, ValueError for rows that are not the plan's.
        """
        place = self._places[info.name]
        size, unit = place.info.row_bytes, self.row_unit(place.info)
        if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != size or start + len(rows) > place.info.n_rows:
            raise ValueError(f"{info.name}: rows {rows.dtype} {rows.shape} from {start} on do not fit {place.info}")
        if start < 0 or start % unit or len(rows) % unit:
            raise ValueError(f"{info.name}: rows {start} to {start + len(rows)} are no whole heads of {unit} rows")
        if unit > 1:
            rows = interleave(rows, unit)
        elif place.heads:  # a bias: one row, whose elements are permuted
            width = place.info.row_len
            rows = interleave(rows.reshape(width, -1), width // place.heads).reshape(rows.shape)
        if rows.size:
            self._files[place.file].write(place.offset + start * size, np.ascontiguousarray(rows).data)
        place.arrived.append((start, start + len(rows)))

    def holds(self, info: TensorInfo, start: int, stop: int, total: int) -> bool:
        """True if an earlier run left rows [start, stop) here with that checksum; they then count as arrived."""
        place = self._places[info.name]
        size, unit = place.info.row_bytes, self.row_unit(place.info)
        data = self._files[place.file].read(place.offset + start * size, (stop - start) * size)
        if len(data) != (stop - start) * size or start % unit or stop % unit:
            return False
        rows = np.frombuffer(data, np.uint8).reshape(stop - start, size)
        if unit > 1:
            rows = halve(rows, unit)
        if checksum(rows) != total:
            return False
        place.arrived.append((start, stop))
        return True

    def row_unit(self, info: TensorInfo) -> int:
        """The head_dim for query and key matrices, else 1."""
        place = self._places[info.name]
        return place.info.n_rows // place.heads if place.heads and len(place.info.shape) > 1 else 1

    def close(self) -> Path:
        """Rename every part into place, the first one last, and return the first one's path.

        Raises IntegrityError naming a tensor whose rows did not all arrive; nothing is kept then.
        """
        done: list[Path] = []
        try:
            for place in self._places.values():
                _check_arrived(place, self._files[place.file].path)
            if len(self._files) > 1:
                self._files[0].path.unlink(missing_ok=True)  # an old first part must not lead to new others
            for file in reversed(self._files):
                done.append(file.commit())
        except BaseException:
            for path in done:
                path.unlink(missing_ok=True)
            self._files = self._files[: len(self._files) - len(done)]
            self.abort()
            raise
        self._open = False
        return done[-1]

    def abort(self) -> None:
        """Remove what was written; nothing happens after `close`."""
        if self._open:
            self._open = False
            for file in self._files:
                file.abort()

    def suspend(self) -> None:
        """Leave what was written for a later run that is created with `keep`; nothing happens after `close`."""
        if self._open:
            self._open = False
            for file in self._files:
                file.suspend()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
        elif self._open:
            self.close()


def _check_arrived(place: _Place, path: Path) -> None:
    reached = 0
    for start, stop in sorted(place.arrived):
        if start > reached:
            break
        reached = max(reached, stop)
    if reached < place.info.n_rows:
        text = f"rows from {reached} on were never written ({place.info.n_rows} in all)"
        raise IntegrityError(text, path=path, tensor=place.info.name)


def create(  # noqa: PLR0913  (every choice of a file, all by keyword)
    path: Path,
    config: ModelConfig,
    infos: Sequence[TensorInfo],
    vocab: Vocab | None,
    *,
    source: Reader | None = None,
    overwrite: bool = False,
    split_bytes: int | None = None,
    file_type: int | None = None,
    notes: Mapping[str, str] | None = None,
    keep: bool = False,
) -> GgufWriter:
    """Begin a checkpoint at `path` with the canonical tensors `infos`; see `Writer`.

    `split_bytes` is the most a file may have; more gives NAME-00001-of-000NN.gguf. A tensor is never cut, so one that
    is larger has a file of its own. `source` passes on its metadata if it is GGUF. `file_type` is the plan's; without
    one it is the source's if no tensor changes its codec, else that of the codec which most weights have. `notes` are
    further string keys (where the file comes from). `keep` takes over what an unfinished run left (see `holds`).

    Raises UnsupportedError (a codec that GGUF has not, a vector that is not F32), IntegrityError (the plan is not the
    model's), OutputExistsError, ResourceError.
    """
    native = _native_plan(config, infos)
    extra = _rope_tensor(config, source)
    if extra is not None:
        native = {rope_freqs.NAME: extra[0], **native}
    entries = _entries(config, list(native.values()), vocab, source, file_type=file_type, notes=notes or {})
    groups = _groups(list(native.values()), entries, split_bytes)
    stem = shards.stem_of(path)
    names = [shards.part_name(stem, index, len(groups)) for index in range(len(groups))]
    paths = [path.with_name(name) for name in names] if len(groups) > 1 else [path]
    headers = _headers(groups, entries)
    files = _open_files(paths, headers, groups, overwrite=overwrite, keep=keep)
    try:
        places = {}
        family = archs.by_name(config.family)
        canonical = stacks.stack(infos, config)
        for number, (file, header, group) in enumerate(zip(files, headers, groups, strict=True)):
            file.write(0, header)
            offset = len(header)
            for info in group:
                if extra is not None and info is extra[0]:
                    file.write(offset, extra[1])
                else:
                    at = offset
                    for own in canonical[info.name]:
                        places[own.name] = _Place(own, number, at, family.permuted_heads(own.name, config))
                        at += own.nbytes
                offset += padded(info.nbytes)
    except BaseException:
        for file in files:
            file.abort()
        raise
    return GgufWriter(list(infos), files, places)


def _native_plan(config: ModelConfig, infos: Sequence[TensorInfo]) -> dict[str, TensorInfo]:
    """The plan under GGUF names, held against what the family has."""
    expected = archs.by_name(config.family).tensors(config)
    for info in infos:
        if info.shape != expected.get(info.name):
            text = f"is planned as {info.shape}, the model has {expected.get(info.name, 'no such tensor')}"
            raise IntegrityError(text, tensor=info.name)
        if len(info.shape) < 2 and info.codec != "F32":
            raise UnsupportedError(f"a vector as {info.codec}; GGUF holds them as F32", tensor=info.name)
        if info.nbytes != info.n_rows * row_nbytes(info.codec, info.row_len):
            raise IntegrityError(f"is planned with {info.nbytes} bytes, which {info.codec} is not", tensor=info.name)
    missing = sorted(expected.keys() - {info.name for info in infos})
    if missing:
        raise IntegrityError("is missing from the plan", tensor=missing[0])
    return {gguf: stacks.whole(gguf, parts, config) for gguf, parts in stacks.stack(infos, config).items()}


def _rope_tensor(config: ModelConfig, source: Reader | None) -> tuple[TensorInfo, bytes] | None:
    """rope_freqs.weight for a llama3 scaling: the source's own bytes if it has the same scaling, else computed."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "llama3":
        return None
    if not rope_freqs.is_sound(scaling):
        raise IntegrityError(f"the rope scaling makes no sense: {scaling}")
    info = TensorInfo(rope_freqs.NAME, (config.head_dim // 2,), "F32", 2 * config.head_dim)
    if isinstance(source, GgufReader) and rope_freqs.NAME in source.native_infos():
        was = source.config
        if (was.rope_scaling, was.rope_theta, was.head_dim) == (scaling, config.rope_theta, config.head_dim):
            return info, source.native_bytes(rope_freqs.NAME).tobytes()
    return info, rope_freqs.divisors(scaling, config.rope_theta, config.head_dim).astype("<f4").tobytes()


def _entries(
    config: ModelConfig,
    native: list[TensorInfo],
    vocab: Vocab | None,
    source: Reader | None,
    *,
    file_type: int | None,
    notes: Mapping[str, str],
) -> list[bytes]:
    """The metadata, packed: the source's order where it is GGUF, then whatever is new."""
    eos_id = config_ids(vocab, config)["eos_id"]
    if file_type is None:
        file_type = _same_file_type(native, source)
    keys = [*config_keys(config, native, eos_id, file_type=file_type), *vocab_keys(vocab, config)]
    own = {key.name: key.pack() for key in [*keys, *(pack.text(NOTES + name, notes[name]) for name in sorted(notes))]}
    packed = []
    if isinstance(source, GgufReader):
        metadata = source.metadata()
        arch = metadata.text(ARCHITECTURE) or ""
        dropped = (*(["tokenizer."] if vocab is None else []), *([NOTES] if notes else []))
        for name in metadata:
            if name in own:
                packed.append(own.pop(name))
            elif not (name in OWNED or is_owned(name, arch) or name.startswith(dropped)):
                packed.append(metadata.raw(name))
    return [*packed, *own.values()]


def _same_file_type(native: list[TensorInfo], source: Reader | None) -> int | None:
    """The quantized type that a GGUF source says it is, if every tensor keeps its codec; None if it cannot be."""
    if not isinstance(source, GgufReader):
        return None
    entry = source.metadata().header.entries.get(FILE_TYPE)
    was = {name: info.codec for name, info in source.native_infos().items()}
    if entry is None or entry.kind != U32 or any(was.get(info.name) != info.codec for info in native):
        return None
    claim = source.metadata().integer(FILE_TYPE)
    is_float = main_codec(native) in FLOATS or claim in [FILE_TYPES[name] for name in FLOATS]
    return None if is_float else claim


def _groups(native: list[TensorInfo], entries: list[bytes], split_bytes: int | None) -> list[list[TensorInfo]]:
    """Which tensors share a file: as many as fit, in order."""
    if split_bytes is None:
        return [native]
    if split_bytes < 1:
        raise UsageError(f"files of at most {split_bytes} bytes cannot hold anything")
    marks = _split_entries(0, 1, 0)
    groups: list[list[TensorInfo]] = [[]]
    data = 0
    for info in native:
        first = len(groups) == 1
        size = (
            pack.header_size([*entries, *marks] if first else marks, [*groups[-1], info]) + data + padded(info.nbytes)
        )
        alone = pack.header_size(marks, [info]) + padded(info.nbytes)
        # An empty first file is fine (metadata only), but only to keep within the limit.
        if size > split_bytes and (groups[-1] or (first and alone <= split_bytes)):
            groups.append([])
            data = 0
        groups[-1].append(info)
        data += padded(info.nbytes)
    if len(groups) > shards.MAX_PARTS:
        raise UsageError(f"{len(groups)} files, at most {shards.MAX_PARTS} are possible", hint="Allow larger files.")
    return groups


def _split_entries(index: int, count: int, total: int) -> list[bytes]:
    keys = (pack.u16(shards.NO, index), pack.u16(shards.COUNT, count), pack.i32(shards.TENSORS, total))
    return [key.pack() for key in keys]


def _headers(groups: list[list[TensorInfo]], entries: list[bytes]) -> list[bytes]:
    if len(groups) == 1:
        return [pack.header(entries, groups[0])]
    total = sum(len(group) for group in groups)
    headers = []
    for index, group in enumerate(groups):
        marks = _split_entries(index, len(groups), total)
        headers.append(pack.header([*entries, *marks] if index == 0 else marks, group))
    return headers


def _open_files(
    paths: list[Path], headers: list[bytes], groups: list[list[TensorInfo]], *, overwrite: bool, keep: bool
) -> list[AtomicFile]:
    sizes = [
        len(header) + sum(padded(info.nbytes) for info in group) for header, group in zip(headers, groups, strict=True)
    ]
    for path in paths:
        refuse_existing(path, overwrite=overwrite)
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    if not keep:  # with what is kept, each file asks for what it lacks
        need_space(paths[0].parent, sum(sizes))
    files: list[AtomicFile] = []
    try:
        for path, size in zip(paths, sizes, strict=True):
            files.append(AtomicFile(path, size, overwrite=overwrite, keep=keep))
    except BaseException:
        for file in files:
            file.abort()
        raise
    return files
