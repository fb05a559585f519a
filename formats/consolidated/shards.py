"""Weight files of one or several model-parallel ranks as one set of tensors, read by rows.

A tensor cut by rows is the ranks' rows one after another, so a run of rows lies in one or two files. One cut by
columns has a piece of every row in each file: the same rows are read from all of them and set side by side. Either way
a slab of rows costs only its own bytes, and nothing is merged on disk or in memory as a whole. Vectors are the same in
every rank; the first one's counts.

Reads are at positions, so any number of threads may read at once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from weightsmith.errors import IntegrityError, WeightsmithError
from weightsmith.formats.consolidated import names
from weightsmith.formats.packed.parts import Linear, Source
from weightsmith.formats.pickles import read_tensors
from weightsmith.formats.safetensors.header import read_header
from weightsmith.formats.safetensors.index import Weights, merge
from weightsmith.formats.safetensors.strictjson import open_regular
from weightsmith.quant import codecs
from weightsmith.types import Packed, TensorInfo

_SLAB = 8 << 20  # bytes compared at a time


@dataclass(frozen=True, slots=True)
class Joined:
    """A whole tensor. parts: one of every rank, in order; axis: 0 for rows, 1 for columns. twins: copies of the parts,
    which must hold the same bytes. transposed: the only part is stored (in, out), so a row is a column of it. packed:
    the only part and `scale` together stand for the weights, which are computed from them.
    """

    info: TensorInfo
    parts: tuple[TensorInfo, ...]
    axis: int = 0
    twins: tuple[TensorInfo, ...] = ()
    transposed: bool = False
    packed: Linear | None = None
    scale: TensorInfo | None = None


@dataclass(slots=True)
class Shards:
    """Open weight files. tensors: by native name, in file order. copies: every rank's own of what is not cut."""

    files: list[Path]
    tensors: dict[str, Joined] = field(default_factory=dict)
    copies: dict[str, list[TensorInfo]] = field(default_factory=dict)
    handles: dict[Path, int] = field(default_factory=dict)

    def read(self, joined: Joined, start: int, stop: int) -> Packed:
        """Rows [start, stop): uint8 [stop - start, row_bytes], fresh; IntegrityError if a file became shorter."""
        if joined.transposed:
            return self._columns(joined.parts[0], start, stop)
        if joined.packed is not None:
            return self._computed(joined, joined.packed, start, stop)
        if joined.axis == 1:
            return np.concatenate([self._part(part, start, stop) for part in joined.parts], axis=1)
        rows = np.empty((stop - start, joined.info.row_bytes), np.uint8)
        reached = 0
        for index, part in enumerate(joined.parts):
            first, last = max(start - reached, 0), min(stop - reached, part.n_rows)
            if first < last:
                target = rows[reached + first - start : reached + last - start]
                self._fill(target, part, first)
                if joined.twins and not np.array_equal(target, self._part(joined.twins[index], first, last)):
                    raise IntegrityError(
                        f"rows that should repeat those of {part.path} differ",
                        path=joined.twins[index].path,
                        tensor=part.name,
                    )
            reached += part.n_rows
        return rows

    def _computed(self, joined: Joined, packed: Linear, start: int, stop: int) -> Packed:
        stored = (joined.parts[0], joined.scale)
        parts = {part.name.rpartition(".")[2]: part for part in stored if part is not None}
        try:
            return codecs.encode(packed.codec, packed.rows(Source(parts, self._run), start, stop))
        except WeightsmithError as error:
            error.path, error.tensor = error.path or joined.info.path, error.tensor or joined.info.name
            raise

    def equal(self, one: Joined, other: Joined) -> bool:
        """Whether two tensors hold the same values; stops at the first slab that differs."""
        if (one.info.shape, one.info.codec) != (other.info.shape, other.info.codec):
            return False
        step = max(1, _SLAB // max(1, one.info.row_bytes))
        slabs = ((at, min(at + step, one.info.n_rows)) for at in range(0, one.info.n_rows, step))
        return all(np.array_equal(self.read(one, *slab), self.read(other, *slab)) for slab in slabs)

    def same(self, parts: Sequence[TensorInfo]) -> bool:
        """Whether small tensors are the same, byte for byte."""
        whole = [self._part(part, 0, part.n_rows) for part in parts]
        return all(np.array_equal(whole[0], other) for other in whole[1:])

    def _columns(self, info: TensorInfo, start: int, stop: int) -> Packed:
        """Columns [start, stop) of a part as rows. Every byte of the part is read for them, a few MB at a time."""
        size = info.row_bytes // info.row_len
        found = np.empty((stop - start, info.n_rows, size), np.uint8)
        step = max(1, _SLAB // info.row_bytes)
        for at in range(0, info.n_rows, step):
            rows = self._part(info, at, min(at + step, info.n_rows)).reshape(-1, info.row_len, size)
            found[:, at : at + len(rows)] = rows[:, start:stop].transpose(1, 0, 2)
        return found.reshape(stop - start, -1)

    def _part(self, info: TensorInfo, start: int, stop: int) -> Packed:
        rows = np.empty((stop - start, info.row_bytes), np.uint8)
        self._fill(rows, info, start)
        return rows

    def _run(self, info: TensorInfo, begin: int, count: int) -> Packed:
        """Bytes [begin, begin + count) of one part."""
        found = np.empty(count, np.uint8)
        self._read(found, info, begin)
        return found

    def _fill(self, rows: Packed, info: TensorInfo, start: int) -> None:
        """Read rows of one part, from `start` on, into contiguous `rows`."""
        self._read(rows.reshape(-1), info, start * info.row_bytes)

    def _read(self, into: Packed, info: TensorInfo, begin: int) -> None:
        """Read bytes of one part, from `begin` on, into all of `into`."""
        assert info.path is not None
        view, at = into.data, info.offset + begin
        while view:
            try:
                done = os.preadv(self.handles[info.path], [view], at)
            except OSError as error:
                raise WeightsmithError(f"cannot read: {error.strerror}", path=info.path, tensor=info.name) from error
            if not done:
                raise IntegrityError("the file became shorter while it was read", path=info.path, tensor=info.name)
            view, at = view[done:], at + done

    def close(self) -> None:
        """Release file handles."""
        while self.handles:
            os.close(self.handles.popitem()[1])


def open_pickled(files: Sequence[Path]) -> Shards:
    """Open the .pth files of all ranks, in their order. Raises what `pickles.read_tensors` does, and IntegrityError for
    ranks that do not fit together.
    """
    shards = Shards(list(files))
    try:
        ranks = []
        for file in files:
            handle, size = open_regular(file)
            shards.handles[file] = handle
            ranks.append(read_tensors(handle, size, path=file))
        _join(ranks, shards)
    except BaseException:
        shards.close()
        raise
    return shards


def open_disjoint(files: Sequence[Path]) -> Shards:
    """Open .pth files that each hold other tensors, whole ones. Raises what `pickles.read_tensors` does, and
    IntegrityError for a tensor that is in two of them.
    """
    shards = Shards(list(files))
    try:
        for file in files:
            handle, size = open_regular(file)
            shards.handles[file] = handle
            for name, info in read_tensors(handle, size, path=file).items():
                if name in shards.tensors:
                    other = shards.tensors[name].info.path
                    raise IntegrityError(f"stored twice, here and in {other}", path=file, tensor=name)
                shards.tensors[name] = Joined(info, (info,))
    except BaseException:
        shards.close()
        raise
    return shards


def open_safetensors(weights: Weights) -> Shards:
    """Open safetensors files that together hold whole tensors. Raises what reading their headers and index does."""
    shards = Shards(weights.files)
    try:
        headers = []
        for file in weights.files:
            handle, size = open_regular(file)
            shards.handles[file] = handle
            headers.append(read_header(handle, size, path=file))
        _join([merge(weights, headers).tensors], shards)
    except BaseException:
        shards.close()
        raise
    return shards


def _join(ranks: Sequence[Mapping[str, TensorInfo]], shards: Shards) -> None:
    """Fill `shards` from the tensors of each rank."""
    first = ranks[0]
    if len(ranks) == 1:
        shards.tensors = {name: Joined(info, (info,)) for name, info in first.items()}
        return
    hidden = first[names.NORM].row_len if names.NORM in first else -1
    for name, info in first.items():
        parts = [fitting(name, info, rank) for rank in ranks]
        if not names.is_known(name):
            # How ranks share it is not known: shown part by part, and refused where the model is read.
            shards.tensors |= {f"{name}@{rank}": Joined(part, (part,)) for rank, part in enumerate(parts)}
            continue
        axis = names.axis(name, info.shape, ranks=len(ranks), hidden=hidden)
        if axis is None:
            shards.tensors[name] = Joined(info, (info,))
            shards.copies[name] = parts
        else:
            shards.tensors[name] = concatenated(info, parts, axis)
    for rank in ranks[1:]:
        for name, info in rank.items():
            if name not in first:
                raise IntegrityError("not in the first rank's file", path=info.path, tensor=name)


def fitting(name: str, info: TensorInfo, rank: Mapping[str, TensorInfo]) -> TensorInfo:
    """Another rank's part of the tensor that the first has as `info`; IntegrityError without one of that shape."""
    part = rank.get(name)
    if part is None:
        where = next((other.path for other in rank.values()), None)
        raise IntegrityError(f"missing, {info.path} has it", path=where, tensor=name)
    if (part.shape, part.codec) != (info.shape, info.codec):
        raise IntegrityError(
            f"{part.codec} of shape {list(part.shape)}, the first rank has {info.codec} of {list(info.shape)}",
            path=part.path,
            tensor=name,
        )
    return part


def concatenated(info: TensorInfo, parts: Sequence[TensorInfo], axis: int) -> Joined:
    """The whole of every rank's `parts`, of which `info` is the first, set side by side along `axis`."""
    shape = tuple(size * len(parts) if at == axis else size for at, size in enumerate(info.shape))
    nbytes = info.nbytes // max(1, math.prod(info.shape)) * math.prod(shape)
    return Joined(TensorInfo(info.name, shape, info.codec, nbytes, info.path, info.offset), tuple(parts), axis)
