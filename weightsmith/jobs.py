"""Conversions as units of work: a checkpoint, a target, an output path; plain values in, a report out.

This is the one place that wires containers, recipes and codecs together. The command line and later the jobs of
registry.yaml call it; it knows nothing of the catalog.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from weightsmith import calibrated, formats
from weightsmith.atomic import refuse_existing
from weightsmith.calibrated import PACKED, Calibration
from weightsmith.errors import IntegrityError, InterruptedRunError, UnsupportedError, UsageError
from weightsmith.journal import Journal
from weightsmith.orders import Options, Report, Target, parse_override
from weightsmith.quant.blocks import BLOCKS, row_nbytes
from weightsmith.quant.loss import Loss
from weightsmith.transcode import Work, compare, transcode
from weightsmith.types import BlockSource, Plan, Reader, Writer

if TYPE_CHECKING:
    from weightsmith.evals.calibration.encoded import Encoded

__all__ = ["Options", "Report", "Target", "convert", "costs", "parse_override", "plan"]


def plan(source: Path, target: Target, options: Options) -> Report:
    """Say what `convert` would make: exact sizes, every type; reads headers only."""
    reader = formats.open_reader(source, allow_pickle=options.allow_pickle)
    try:
        if target.container in PACKED:
            calibration = options.calibration or Calibration(None)
            tensors = calibrated.packed_plan(reader, target.container, int(target.type or "4"), calibration)
            return Report(source, str(target), tensors, [], weights=sum(i.n_weights for i in reader.infos().values()))
        planned = _planned(reader, target, options)
        return Report(source, str(target), planned.tensors, planned.fallbacks, stored=planned.stored)
    finally:
        reader.close()


def costs(source: Path, target: Target, options: Options) -> dict[str, float]:
    """Seconds that calibrating would take on this machine, by effort, projected from one layer; {} without a text.

    Computes for as long as some layers take. Raises what `convert` raises.
    """
    if options.calibration is None or options.calibration.text is None or target.type is None:
        return {}
    calibrated.refuse_both(options.imatrix, options.calibration)
    reader = formats.open_reader(source, allow_pickle=options.allow_pickle)
    try:
        if target.container in PACKED:
            return calibrated.packed_costs(reader, target.container, int(target.type), options.calibration)
        planned = _planned(reader, target, options)
        return calibrated.encoded_costs(reader, planned, options.calibration) if _has_blocks(planned) else {}
    finally:
        reader.close()


def convert(source: Path, target: Target, output: Path, options: Options) -> Report:
    """Make `target` from the checkpoint at `source` under `output`; nothing is visible there until it is complete.

    What takes long to make (blocks) is kept when the run is interrupted or killed, as `output`.part and a journal
    beside it, and the same call goes on from there. Raises whatever the containers and codecs raise, UnsupportedError
    for a fallback under `strict`.
    """
    begun = time.monotonic()
    if target.container in PACKED:
        return _pack(source, target, output, options)
    container = formats.containers()[target.container]
    reader = formats.open_reader(source, allow_pickle=options.allow_pickle)
    try:
        planned = _planned(reader, target, options)
        made = _encoded(reader, output, planned, options)
        matrix = (
            None if made is not None else calibrated.matrix(reader, options.imatrix, options.calibration, options.pre)
        )
        vocab = reader.vocab(options.pre)
        notes = options.notes(target, matrix)
        importances = calibrated.by_tensor(matrix, reader, planned) if matrix is not None else {}
        if made is not None:
            importances = made.importances
        resumes = getattr(container, "RESUMES", False)
        journal = _journal(output, planned, notes, reader, options) if resumes else None
        try:
            writer = container.create(
                output,
                reader.config,
                planned.tensors,
                vocab,
                source=reader,
                overwrite=options.overwrite,
                split_bytes=options.split_bytes,
                file_type=planned.file_type,
                notes=notes,
                keep=journal is not None,
            )
            work = Work(options.threads, options.memory, journal, importances, options.effort)
            work = replace(work, made=made.rows if made is not None else None)
            path = _fill(reader, writer, work, title=output.name)
            _read_back(path, work)
            if made is not None:
                made.remove()
        finally:
            if journal is not None:
                journal.close()
            if made is not None:
                made.close()
    finally:
        reader.close()
    seconds = time.monotonic() - begun
    errors = _errors(work) | ({name: math.sqrt(lost) for name, lost in made.losses.items()} if made is not None else {})
    report = Report(path, str(target), planned.tensors, planned.fallbacks, seconds, notes)
    stored: int | None = getattr(writer, "stored_bytes", None)
    return replace(report, errors=errors, codes=work.codes, stored=stored)


def _encoded(reader: Reader, output: Path, planned: Plan, options: Options) -> Encoded | None:
    """The layers' linears with error feedback, where a text is there to calibrate on and the effort allows."""
    if options.calibration is None or options.effort == "fast":
        return None
    calibrated.refuse_both(options.imatrix, options.calibration)
    if not _has_blocks(planned):
        return None
    refuse_existing(output, overwrite=options.overwrite)
    return calibrated.encoded(reader, output, planned, options.calibration, effort=options.effort, pre=options.pre)


def _errors(work: Work) -> dict[str, float]:
    """Relative error by tensor; slabs are added in one order, so that it does not depend on the threads."""
    sums: dict[str, Loss] = {}
    for key in sorted(work.losses):
        sums[key[0]] = sums.get(key[0], Loss()) + work.losses[key]
    return {name: found.relative for name, found in sums.items()}


def _pack(source: Path, target: Target, output: Path, options: Options) -> Report:
    """Make a GPTQ or AWQ checkpoint, which needs a text to calibrate on."""
    begun = time.monotonic()
    if options.calibration is None:
        raise UsageError(f"{target.container} needs a text to calibrate on", hint="Pass --calibrate FILE.")
    notes = options.notes(target, None)
    reader = formats.open_reader(source, allow_pickle=options.allow_pickle)
    try:
        path = calibrated.packed(
            reader,
            output,
            target.container,
            int(target.type or "4"),
            options.calibration,
            effort=options.effort,
            overwrite=options.overwrite,
            notes=notes,
            pre=options.pre,
            split_bytes=options.split_bytes,
        )
    finally:
        reader.close()
    made = formats.open_reader(path)
    try:
        tensors = list(made.native_infos().values())
        weights = sum(info.n_weights for info in made.infos().values())
    finally:
        made.close()
    return Report(path, str(target), tensors, [], time.monotonic() - begun, notes, weights)


def _fill(reader: Reader, writer: Writer, work: Work, *, title: str) -> Path:
    """Transcode and close; an interrupted run keeps what it has, a failed one leaves nothing."""
    try:
        transcode(reader, writer, title=title, work=work)
        path = writer.close()
    except KeyboardInterrupt:
        if work.journal is None:
            writer.abort()
            raise
        writer.suspend()
        raise InterruptedRunError("interrupted", hint="What is finished is kept; the same command goes on.") from None
    except BaseException:
        writer.abort()
        if work.journal is not None:
            work.journal.remove()
        raise
    if work.journal is not None:
        work.journal.remove()
    return path


def _read_back(path: Path, work: Work) -> None:
    """Open what was made and compare it with what was meant; what differs is removed, never left to be believed."""
    reader = formats.open_reader(path)
    try:
        compare(reader, work)
    except IntegrityError:
        for file in reader.files():
            file.unlink(missing_ok=True)
        raise
    finally:
        reader.close()


def _journal(output: Path, planned: Plan, notes: Mapping[str, str], reader: Reader, options: Options) -> Journal | None:
    """A journal where blocks are made; its fingerprint is all that decides their bytes and places."""
    if not _has_blocks(planned):
        return None
    files = [(file.name, status.st_size, status.st_mtime_ns) for file in reader.files() if (status := file.stat())]
    plan = [(info.name, list(info.shape), info.codec) for info in planned.tensors]
    kept = {"notes": dict(notes), "source": files, "plan": plan, "options": options.record()}
    return Journal(output, {"sha256": hashlib.sha256(json.dumps(kept).encode()).hexdigest()})


def _has_blocks(planned: Plan) -> bool:
    """Whether any tensor is stored in blocks, which take long to make."""
    return any(BLOCKS[info.codec].weights > 1 for info in planned.tensors)


def _planned(reader: Reader, target: Target, options: Options) -> Plan:
    recipe = replace(
        options.recipe, type=target.type, imatrix=options.imatrix is not None or options.calibration is not None
    )
    planned: Plan = formats.containers()[target.container].plan(reader, recipe)
    if options.keep_rest and target.is_blocks:
        planned = _keeping(planned, reader, str(target.type))
    if planned.fallbacks and options.strict:
        name, wanted, got = planned.fallbacks[0]
        raise UnsupportedError(
            f"its rows are no multiple of {wanted}'s block; {got} would be taken, as for "
            f"{len(planned.fallbacks)} tensors in all",
            path=reader.path,
            tensor=name,
            hint="Leave --strict out to accept that, or choose another type.",
        )
    return planned


def _keeping(planned: Plan, reader: Reader, codec: str) -> Plan:
    """The plan with blocks for linears whose codes they can take over, and everything else in the type it has."""
    if not isinstance(reader, BlockSource):
        return planned
    fit = {info.name: reader.block_codecs(info.name) for info in planned.tensors}
    if not any(codec in (known or ()) for known in fit.values()):
        return planned
    sources, kept = reader.infos(), []
    for info in planned.tensors:
        known, got = fit[info.name], info.codec
        if known is not None:
            got = codec if codec in known else got
        elif BLOCKS[got].weights > 1:
            got = sources[info.name].codec
        kept.append(replace(info, codec=got, nbytes=info.n_rows * row_nbytes(got, info.row_len)))
    return replace(planned, tensors=kept, fallbacks=[], stored=None)
