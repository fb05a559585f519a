"""Stream tensors from a Reader to a Writer, slab by slab: read, decode, encode, write.

A slab is a run of whole rows. Slabs are independent (codecs work on rows, outputs have known offsets), so threads take
them in any order and the bytes do not depend on their number. Memory is a few slabs per thread, whatever the model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from weightsmith.errors import WeightsmithError
from weightsmith.progress import progress
from weightsmith.types import Packed, Reader, TensorInfo, Writer

SLAB_WEIGHTS = 2 * 1024 * 1024  # 8 MiB as float32


@dataclass(frozen=True, slots=True)
class Slab:
    """Rows [start, stop) of one tensor on its way from `source` to `target`."""

    source: TensorInfo
    target: TensorInfo
    start: int
    stop: int


def default_threads() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def transcode(reader: Reader, writer: Writer, *, title: str, threads: int | None = None) -> None:
    """Fill `writer` with the tensors it planned; progress counts the bytes written.

    Raises whatever reading, decoding or encoding raises, with the file and the tensor named; the writer is left to its
    context manager.
    """
    threads = threads or default_threads()
    total = sum(info.nbytes for info in writer.order)
    with progress(title, total) as ticker, ThreadPoolExecutor(threads) as pool:
        running: set[Future[int]] = set()
        try:
            for slab in _slabs(reader, writer):
                if len(running) >= 2 * threads:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    ticker.update(sum(future.result() for future in done))
                running.add(pool.submit(_move, reader, writer, slab))
            for future in running:
                ticker.update(future.result())
        except BaseException:
            for future in running:
                future.cancel()
            raise


def _slabs(reader: Reader, writer: Writer) -> Iterator[Slab]:
    sources = reader.infos()
    for target in writer.order:
        source = sources[target.name]
        unit = math.lcm(reader.row_unit(target.name), writer.row_unit(target))
        step = max(1, SLAB_WEIGHTS // max(1, target.row_len) // unit) * unit
        for start in range(0, target.n_rows, step):
            yield Slab(source, target, start, min(start + step, target.n_rows))


def _move(reader: Reader, writer: Writer, slab: Slab) -> int:
    """Carry one slab; return the bytes written."""
    rows = reader.rows(slab.source.name, slab.start, slab.stop)
    try:
        packed = recode(rows, slab.source, slab.target)
    except WeightsmithError as error:
        error.tensor = error.tensor or slab.source.name
        error.path = error.path or slab.source.path
        raise
    writer.write(slab.target, slab.start, packed)
    return packed.nbytes


def recode(rows: Packed, source: TensorInfo, target: TensorInfo) -> Packed:
    """Stored rows of `source`'s codec as rows of `target`'s; equal codecs pass through after a check for NaN."""
    from weightsmith.quant import codecs  # noqa: PLC0415  (numba is imported by what computes)

    if source.codec == target.codec:
        codecs.check_finite(source.codec, rows)
        return rows
    return codecs.encode(target.codec, codecs.decode(source.codec, rows, source.row_len))
