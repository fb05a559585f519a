"""Conversions as units of work: a checkpoint, a target, an output path; plain values in, a report out.

This is the one place that wires containers, recipes and codecs together. The command line and later the jobs of
registry.yaml call it; it knows nothing of the catalog.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from weightsmith import calibrated, formats
from weightsmith._version import __version__
from weightsmith.atomic import refuse_existing
from weightsmith.calibrated import PACKED, Calibration
from weightsmith.errors import IntegrityError, InterruptedRunError, UnsupportedError, UsageError
from weightsmith.formats import archs, imatrix
from weightsmith.formats.imatrix import Imatrix
from weightsmith.journal import Journal
from weightsmith.quant import ARITHMETIC_VERSION
from weightsmith.quant.blocks import BLOCKS, row_nbytes
from weightsmith.quant.loss import Loss
from weightsmith.transcode import Codes, Work, compare, transcode
from weightsmith.types import BlockSource, Plan, Reader, Recipe, TensorInfo, Writer

if TYPE_CHECKING:
    from weightsmith.evals.calibration.encoded import Encoded

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """What to make: a container and, unless everything keeps its precision, a type of it."""

    container: str
    type: str | None = None

    @classmethod
    def parse(cls, text: str, *, default_type: str | None = None) -> Target:
        """Read "gguf", "gguf:Q8_0", "safetensors:BF16", "gptq:4"; UsageError names what is known."""
        name, _, kind = text.partition(":")
        for container, package in formats.targets().items():
            if not kind and name.lower() in getattr(package, "ALIASES", {}):
                name, kind = container, package.ALIASES[name.lower()]
        known = {name: package.TYPES for name, package in formats.targets().items()} | PACKED
        if name not in known:
            raise UsageError(f"unknown target {name!r}", hint=f"Known targets: {', '.join(known)}.")
        kind = kind.upper() or ("4" if name in PACKED else "")
        if kind and kind not in known[name]:
            raise UsageError(f"{name} has no type {kind!r}", hint=f"Known types: {', '.join(known[name])}.")
        return cls(name, kind or default_type)

    @property
    def is_blocks(self) -> bool:
        """Whether the type is one block layout, not a mix of several and no float."""
        return self.type in BLOCKS and BLOCKS[self.type].weights > 1

    def __str__(self) -> str:
        return f"{self.container}:{self.type}" if self.type else self.container


@dataclass(frozen=True, slots=True)
class Options:
    """How to make it. Defaults are the recipe's own.

    pre: pre-tokenizer override. split_bytes: most bytes per file. threads: None = all cores. memory: most bytes for
    tensors under way, None = no limit. overwrite: replace the output. source_digest: the catalog's name for the source,
    noted in the result. imatrix: file of importances to quantize by. calibration: text to measure importances on, or
    to quantize by. effort: how hard to search. allow_pickle: read
    pickled weights, without running anything in them. strict: a tensor whose
    rows do not fit the type is an error. keep_rest: of a packed checkpoint only the packed linears become blocks, the
    rest keeps its precision. recipe: its type is the target's.
    """

    pre: str | None = None
    split_bytes: int | None = None
    threads: int | None = None
    memory: int | None = None
    overwrite: bool = False
    strict: bool = False
    source_digest: str | None = None
    imatrix: Path | None = None
    effort: str = "normal"
    allow_pickle: bool = False
    calibration: Calibration | None = None
    keep_rest: bool = False
    recipe: Recipe = field(default_factory=Recipe)

    def record(self) -> dict[str, Any]:
        """The options that change what is made (not where or how fast), as plain values; defaults are left out."""
        recipe = self.recipe
        kept: dict[str, Any] = {"pre": self.pre, "split_bytes": self.split_bytes, "pure": recipe.pure}
        kept |= {"output_type": recipe.output_type, "embedding_type": recipe.embedding_type}
        kept |= {"overrides": [list(pair) for pair in recipe.overrides]}
        kept |= {"calibration": self.calibration.record() if self.calibration else None}
        kept |= {"effort": self.effort if self.effort != "normal" else None}
        kept |= {"keep_rest": self.keep_rest}
        return {name: value for name, value in kept.items() if value}

    def notes(self, target: Target, imatrix: Imatrix | None) -> dict[str, str]:
        """Where the result comes from, for the file itself: no paths, no times, so equal work gives equal bytes."""
        found = {"tool": f"weightsmith {__version__}", "recipe": json.dumps({"target": str(target), **self.record()})}
        if self.source_digest is not None:
            found["source"] = f"sha256:{self.source_digest}"
        found["arithmetic"] = str(ARITHMETIC_VERSION)
        if imatrix is not None:
            found["imatrix"] = f"sha256:{imatrix.digest()}"
        return found


@dataclass(frozen=True, slots=True)
class Report:
    """What was made, or would be. fallbacks: (tensor, wanted codec, got codec). seconds: 0 for a plan.

    notes: where it comes from, as the file itself says it. weights: of the model, where tensors hold packed words.
    errors: weighted relative error (`quant.loss`) of every tensor that was packed into blocks, by canonical name; with
    error feedback the share of its output's energy that was lost.
    codes: what became of a packed source's codes. stored: bytes of tensor data, where they are not those of `tensors`.
    """

    path: Path
    target: str
    tensors: Sequence[TensorInfo]
    fallbacks: Sequence[tuple[str, str, str]]
    seconds: float = 0.0
    notes: Mapping[str, str] = field(default_factory=dict)
    weights: int | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    codes: Codes = field(default_factory=Codes)
    stored: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return self.stored if self.stored is not None else sum(info.nbytes for info in self.tensors)

    @property
    def bpw(self) -> float:
        """All stored bits over all weights."""
        weights = self.weights or sum(info.n_weights for info in self.tensors)
        return 8 * self.nbytes / max(1, weights)

    @property
    def main_type(self) -> str:
        """The codec of most weights."""
        weights: Counter[str] = Counter()
        for info in self.tensors:
            weights[info.codec] += info.n_weights
        return weights.most_common(1)[0][0]

    @property
    def types(self) -> dict[str, int]:
        """Tensors per codec, most first."""
        return dict(Counter(info.codec for info in self.tensors).most_common())


def parse_override(text: str) -> tuple[str, str]:
    """Read PATTERN=TYPE; the last "=" divides, because a pattern may hold one."""
    pattern, _, codec = text.rpartition("=")
    if not pattern or not codec:
        raise UsageError(f"{text!r} is no PATTERN=TYPE", hint="For instance --tensor-type attn_v=Q8_0.")
    return pattern, codec.upper()


def plan(source: Path, target: Target, options: Options) -> Report:
    """Say what `convert` would make: exact sizes, every type; reads headers only."""
    reader = formats.open_reader(source, allow_pickle=options.allow_pickle)
    try:
        if target.container in PACKED:
            calibration = options.calibration or Calibration(None)
            tensors = calibrated.packed_plan(reader, target.container, int(target.type or "4"), calibration)
            return Report(source, str(target), tensors, [], weights=sum(i.n_weights for i in reader.infos().values()))
        planned = _planned(reader, target, options)
        return Report(source, str(target), planned.tensors, planned.fallbacks)
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
        matrix = _matrix(reader, options) if made is None else None
        vocab = reader.vocab(options.pre)
        notes = options.notes(target, matrix)
        importances = _importances(matrix, reader, planned) if matrix is not None else {}
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
    errors = _errors(work) | (made.losses if made is not None else {})
    report = Report(path, str(target), planned.tensors, planned.fallbacks, seconds, notes)
    stored: int | None = getattr(writer, "stored_bytes", None)
    return replace(report, errors=errors, codes=work.codes, stored=stored)


def _encoded(reader: Reader, output: Path, planned: Plan, options: Options) -> Encoded | None:
    """The layers' linears with error feedback, where a text is there to calibrate on and the effort allows."""
    if options.calibration is None or options.effort == "fast":
        return None
    if options.imatrix is not None:
        raise UsageError("an imatrix and a text to calibrate on exclude each other", hint="Leave one out.")
    if all(BLOCKS[info.codec].weights == 1 for info in planned.tensors):
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


def _matrix(reader: Reader, options: Options) -> Imatrix | None:
    """The importances to quantize by: from a file, or measured now."""
    if options.imatrix is not None:
        if options.calibration is not None:
            raise UsageError("an imatrix and a text to calibrate on exclude each other", hint="Leave one out.")
        return imatrix.read(options.imatrix)
    if options.calibration is None:
        return None
    return calibrated.importances(reader, options.calibration, pre=options.pre)


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


def _importances(matrix: Imatrix, reader: Reader, planned: Plan) -> dict[str, NDArray[np.float32]]:
    """Importance of every input channel, by canonical name; a tensor that was not measured has none."""
    family = archs.by_name(reader.config.family)
    found, missing = {}, []
    for info in planned.tensors:
        if BLOCKS[info.codec].weights == 1:
            continue
        name = family.gguf_name(info.name)
        if name in matrix.entries:
            found[info.name] = _importance(matrix, name, info, reader.config.n_experts)
        else:
            missing.append(name)
    if not found:
        raise IntegrityError("the imatrix has none of this model's tensors", path=reader.path)
    if missing:
        log.info("not in the imatrix, so quantized without: %s", ", ".join(missing))
    return found


def _importance(matrix: Imatrix, name: str, info: TensorInfo, n_experts: int) -> NDArray[np.float32]:
    """Importance of the input channels of `info`, of which the imatrix calls `name` it or the stack it belongs to."""
    expert = archs.expert_of(info.name)
    if expert is None:
        return matrix.importance(name, info.row_len)
    rows = matrix.importance(name, info.row_len, matrices=n_experts).reshape(n_experts, -1)
    found: NDArray[np.float32] = rows[expert]
    return found


def _journal(output: Path, planned: Plan, notes: Mapping[str, str], reader: Reader, options: Options) -> Journal | None:
    """A journal where blocks are made; its fingerprint is all that decides their bytes and places."""
    if all(BLOCKS[info.codec].weights == 1 for info in planned.tensors):
        return None
    files = [(file.name, status.st_size, status.st_mtime_ns) for file in reader.files() if (status := file.stat())]
    plan = [(info.name, list(info.shape), info.codec) for info in planned.tensors]
    kept = {"notes": dict(notes), "source": files, "plan": plan, "options": options.record()}
    return Journal(output, {"sha256": hashlib.sha256(json.dumps(kept).encode()).hexdigest()})


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
    return replace(planned, tensors=kept, fallbacks=[])
