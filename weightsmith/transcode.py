"""Stream tensors from a Reader to a Writer, slab by slab: read, decode, encode, write.

A slab is a run of whole rows. Slabs are independent (codecs work on rows, outputs have known offsets), so threads take
them in any order and the bytes do not depend on their number. Memory is a few slabs per thread, whatever the model.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from weightsmith.errors import IntegrityError, WeightsmithError
from weightsmith.estimates import Estimates
from weightsmith.journal import Journal, Key
from weightsmith.progress import progress
from weightsmith.quant import codecs, loss, recipes
from weightsmith.quant.blocks import BLOCKS
from weightsmith.quant.checksum import checksum
from weightsmith.quant.loss import Loss
from weightsmith.types import BlockSource, Packed, Reader, TensorInfo, Writer

SLAB_WEIGHTS = 2 * 1024 * 1024  # 8 MiB as float32
_REPORT = "The disk or the program is at fault; the output was removed. Try again, and report it if it happens again."
_BYTES_PER_WEIGHT = 16  # of a slab under way: stored, as float32, what the search works on, packed


@dataclass(slots=True)
class Codes:
    """What became of the codes of packed linears that were to be blocks. taken: tensors whose codes were taken over,
    requantized: those of which some rows were not; error: the largest one of a weight that was taken over."""

    taken: set[str] = field(default_factory=set)
    requantized: set[str] = field(default_factory=set)
    error: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True)
class Work:
    """How to go about it. threads: None = all cores. memory: most bytes for slabs under way, None = no limit.

    importances: measured ones, float32 [in] by canonical tensor name, for the codecs that search; what is missing is
    estimated. effort: fast, normal or best.
    losses: filled with what every slab lost that was packed into blocks, by its key. sums: filled with the slabs that
    were written and a checksum of each.
    made(name, start, stop): packed rows that calibration has encoded already, None if it has not.
    codes: filled with what became of a packed source's codes.
    """

    threads: int | None = None
    memory: int | None = None
    journal: Journal | None = None
    importances: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    effort: str = "normal"
    losses: dict[Key, Loss] = field(default_factory=dict)
    sums: dict[Key, tuple[Slab, int]] = field(default_factory=dict)
    made: Callable[[str, int, int], Packed | None] | None = None
    codes: Codes = field(default_factory=Codes)


@dataclass(frozen=True, slots=True)
class Slab:
    """Rows [start, stop) of one tensor on its way from `source` to `target`."""

    source: TensorInfo
    target: TensorInfo
    start: int
    stop: int

    @property
    def key(self) -> Key:
        """Its name in a journal."""
        return self.target.name, self.start, self.stop

    @property
    def is_costly(self) -> bool:
        """Whether making it takes longer than checking that it is there: only encoding to blocks does."""
        return self.source.codec != self.target.codec and BLOCKS[self.target.codec].weights > 1


def default_threads() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def transcode(reader: Reader, writer: Writer, *, title: str, work: Work) -> None:
    """Fill `writer` with the tensors it planned; progress counts the bytes written.

    Raises whatever reading, decoding or encoding raises, with the file and the tensor named; what becomes of the writer
    is the caller's to say.
    """
    threads = work.threads or default_threads()
    total = sum(info.nbytes for info in writer.order)
    with progress(title, total) as ticker, ThreadPoolExecutor(threads) as pool:
        running: set[Future[int]] = set()
        estimates = Estimates(reader)
        ahead = _foreseen(reader, writer, work)
        try:
            running.add(pool.submit(_foresee, next(ahead, None), estimates))
            for slab in _slabs(reader, writer, _slab_weights(work, threads)):
                if len(running) >= 2 * threads:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    ticker.update(sum(future.result() for future in done))
                if slab.start == 0:  # while a tensor is packed, the next one's estimate is made
                    running.add(pool.submit(_foresee, next(ahead, None), estimates))
                running.add(pool.submit(_move, reader, writer, slab, work, estimates))
            for future in running:
                ticker.update(future.result())
        except BaseException:
            for future in running:
                future.cancel()
            raise


def _foreseen(reader: Reader, writer: Writer, work: Work) -> Iterator[TensorInfo | None]:
    """Every tensor in its turn, None for one that will want no estimate, or whose slabs may all be there."""
    sources = reader.infos()
    begun = {name for name, start, _ in work.journal.known if start == 0} if work.journal is not None else set()
    for target in writer.order:
        source = sources[target.name]
        wanted = work.made is None and not _is_packed(reader, target.name) and target.name not in begun
        yield source if wanted and _wants_estimate(source, target, work) else None


def _is_packed(reader: Reader, name: str) -> TypeGuard[BlockSource]:
    """Whether a tensor is a linear whose codes the reader can give as blocks."""
    return isinstance(reader, BlockSource) and reader.block_codecs(name) is not None


def _foresee(info: TensorInfo | None, estimates: Estimates) -> int:
    """Make a tensor's estimate; its slabs, which follow, say what went wrong if anything did."""
    if info is not None:
        with contextlib.suppress(WeightsmithError):
            estimates.of(info)
    return 0


def _slab_weights(work: Work, threads: int) -> int:
    """Weights per slab. Independent of the threads unless memory is short: a resumed run finds the same slabs."""
    if work.memory is None:
        return SLAB_WEIGHTS
    return max(1, min(SLAB_WEIGHTS, work.memory // (2 * threads * _BYTES_PER_WEIGHT)))


def _slabs(reader: Reader, writer: Writer, weights: int) -> Iterator[Slab]:
    sources = reader.infos()
    for target in writer.order:
        source = sources[target.name]
        unit = math.lcm(reader.row_unit(target.name), writer.row_unit(target))
        step = max(1, weights // max(1, target.row_len) // unit) * unit
        for start in range(0, target.n_rows, step):
            yield Slab(source, target, start, min(start + step, target.n_rows))


def _move(reader: Reader, writer: Writer, slab: Slab, work: Work, estimates: Estimates) -> int:
    """Carry one slab; return the bytes written."""
    taken = _take(reader, slab, work) if work.made is None else None
    if taken is not None:
        work.sums[slab.key] = slab, checksum(taken)
        writer.write(slab.target, slab.start, taken)
        return taken.nbytes
    journal = work.journal
    known = journal.known.get(slab.key) if journal is not None else None
    if known is not None and writer.holds(slab.target, slab.start, slab.stop, known.sum):
        work.losses[slab.key] = known.loss
        return (slab.stop - slab.start) * slab.target.row_bytes
    packed = work.made(slab.target.name, slab.start, slab.stop) if work.made is not None else None
    if packed is None:
        packed = _recoded(reader, slab, work, estimates)
    work.sums[slab.key] = slab, checksum(packed)
    writer.write(slab.target, slab.start, packed)
    if journal is not None and slab.key in work.losses:
        journal.add(slab.key, work.sums[slab.key][1], work.losses[slab.key])
    return packed.nbytes


def _recoded(reader: Reader, slab: Slab, work: Work, estimates: Estimates) -> Packed:
    """Read a slab and recode it, errors named."""
    estimate = None
    try:
        if _wants_estimate(slab.source, slab.target, work):
            estimate = estimates.of(slab.source)
        rows = reader.rows(slab.source.name, slab.start, slab.stop)
        return recode(rows, slab, work, estimate)
    except WeightsmithError as error:
        error.tensor = error.tensor or slab.source.name
        error.path = error.path or slab.source.path
        raise


def _take(reader: Reader, slab: Slab, work: Work) -> Packed | None:
    """The slab's codes as blocks of the target, without requantizing, if the source has such and they fit."""
    name, codes = slab.target.name, work.codes
    if not slab.is_costly or not _is_packed(reader, name):
        return None
    found = reader.blocks(name, slab.target.codec, slab.start, slab.stop)
    with codes.lock:
        if found is None:
            codes.requantized.add(name)
            return None
        codes.taken.add(name)
        codes.error = max(codes.error, found[1])
    if found[1] == 0:
        work.losses[slab.key] = Loss()
    return found[0]


def compare(reader: Reader, work: Work) -> None:
    """Read back every slab that was written, from what was made of them; IntegrityError names one that differs.

    Slabs of an earlier run were read and compared when this run took them over. Of packed linears the blocks are
    compared, unless they were stored in another form (double quantization).
    """
    infos = reader.infos()

    def same(found: tuple[Slab, int]) -> int:
        slab, wanted = found
        info = infos.get(slab.target.name)
        packed = _is_packed(reader, slab.target.name)
        if info is None or info.shape != slab.target.shape or not (packed or info.codec == slab.target.codec):
            what = "is absent" if info is None else f"is {list(info.shape)} in {info.codec}"
            raise IntegrityError(f"{what} after writing", path=reader.path, tensor=slab.target.name, hint=_REPORT)
        rows = _stored(reader, slab) if packed else reader.rows(info.name, slab.start, slab.stop)
        if rows is not None and checksum(rows) != wanted:
            what = f"rows {slab.start} to {slab.stop} are not what was written"
            raise IntegrityError(what, path=reader.path, tensor=info.name, hint=_REPORT)
        return (slab.stop - slab.start) * info.row_bytes

    total = sum((slab.stop - slab.start) * slab.target.row_bytes for slab, _ in work.sums.values())
    with progress("read back", total) as ticker, ThreadPoolExecutor(work.threads or default_threads()) as pool:
        for nbytes in pool.map(same, work.sums.values()):
            ticker.update(nbytes)


def _stored(reader: Reader, slab: Slab) -> Packed | None:
    """The blocks of a packed linear as they were written, None if they were stored in another form."""
    if not isinstance(reader, BlockSource):
        return None
    found = reader.blocks(slab.target.name, slab.target.codec, slab.start, slab.stop)
    return found[0] if found is not None else None


def _wants_estimate(source: TensorInfo, target: TensorInfo, work: Work) -> bool:
    """Rows that are looked up have no activations to meet: all of their weights count alike."""
    return (
        source.codec != target.codec
        and codecs.heeds_importance(target.codec, work.effort)
        and target.name not in work.importances
        and not recipes.is_embedding(target.name)
    )


def recode(rows: Packed, slab: Slab, work: Work, estimate: NDArray[np.float32] | None = None) -> Packed:
    """Stored rows of the source's codec as rows of the target's; equal codecs pass through after a check for NaN.

    estimate: importances (float32 [row_len]) where no measured ones are there.
    """
    source, target = slab.source, slab.target
    if source.codec == target.codec:
        codecs.check_finite(source.codec, rows)
        return rows
    values = codecs.decode(source.codec, rows, source.row_len)
    measured = work.importances.get(target.name)
    importance = estimate if measured is None else measured
    known = measured is not None
    packed = codecs.encode(target.codec, values, importance=importance, effort=work.effort, measured=known)
    if slab.is_costly:
        work.losses[slab.key] = loss.measure(target.codec, values, packed, importance)
    return packed
