"""A whole checkpoint to packed linears: every layer is quantized as calibration reaches it, behind the ones before it.

The codes are GPTQ's whatever the container: "gptq" and "gptq_v2" (`formats.gptq`) and "awq" (`formats.awq`, whose
asymmetric grids of neighbouring columns are among those that GPTQ fills). Linears of a group share their inputs, so
they are quantized as one tall matrix: one factorisation, one loop over columns.

What a finished layer was quantized to lies in OUT.layers/ (`work`); a killed run takes these files up and only sends
its rows through them. The checkpoint itself is written at the end, from those files, and appears by rename.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightsmith._version import __version__
from weightsmith.atomic import refuse_existing
from weightsmith.errors import UsageError, WeightsmithError
from weightsmith.evals.calibration.best import Best, costs, give, is_over, passes
from weightsmith.evals.calibration.cost import Cost
from weightsmith.evals.calibration.fold import fold
from weightsmith.evals.calibration.rows import Options, draw
from weightsmith.evals.calibration.stream import Block, Finished, Prepare, nearest, wanted
from weightsmith.evals.calibration.work import Parts, Work, decoded, fingerprint, parts_of
from weightsmith.evals.forward import load, weights
from weightsmith.evals.forward.weights import Later
from weightsmith.formats.archs import expert_of
from weightsmith.formats.awq import layout as awq_layout
from weightsmith.formats.gptq import layout as gptq_layout
from weightsmith.formats.gptq import packed_writer
from weightsmith.formats.gptq.settings import Settings
from weightsmith.quant.algorithms import gptq
from weightsmith.quant.algorithms.gptq import Method
from weightsmith.quant.algorithms.moments import loss_of, shrinkage
from weightsmith.quant.algorithms.rtn import Grid
from weightsmith.quant.algorithms.scales import Movable
from weightsmith.quant.calibration import Moments
from weightsmith.quant.recipes import is_matrix
from weightsmith.types import Reader, TensorInfo

AnyLayout = gptq_layout.Layout | awq_layout.Layout
FORMATS = ("gptq", "gptq_v2", "awq")


@dataclass(frozen=True, slots=True)
class PackedOptions:
    """What to make and how. checkpoint_format: one of FORMATS. scaled: move scales between linears and what feeds
    them first (`quant.algorithms.awq`). best: what best effort does, which does not go with `scaled`. codec: of all
    that is not packed ("F16", "BF16", "F32"). split_bytes: most data bytes of a shard. Raises UsageError for what does
    not go together."""

    grid: Grid = field(default_factory=lambda: Grid(4, 128))
    method: Method = field(default_factory=Method)
    calibration: Options = field(default_factory=Options)
    checkpoint_format: str = "gptq"
    scaled: bool = False
    best: Best | None = None
    codec: str = "F16"
    split_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.checkpoint_format not in FORMATS:
            hint = f"Known: {', '.join(FORMATS)}."
            raise UsageError(f"no such checkpoint format: {self.checkpoint_format!r}", hint=hint)
        if self.checkpoint_format == "awq" and (self.grid.bits != 4 or self.method.scatters):
            raise UsageError("AWQ has 4 bits and groups of neighbouring columns only")
        if self.scaled and self.best is not None:
            raise UsageError("scales cannot move where inputs are compared with the original's")

    def record(self) -> dict[str, Any]:
        """What decides the result, as plain values."""
        return {
            "grid": asdict(self.grid),
            "method": asdict(self.method),
            "calibration": self.calibration.record(),
            "checkpoint_format": self.checkpoint_format,
            "scaled": self.scaled,
            "best": self.best and self.best.record(),
        }


@dataclass(frozen=True, slots=True)
class PackedReport:
    """What was made. losses: share of each linear's output energy that was lost, by canonical weight name (of the
    layers that this run dealt with). resumed: layers taken over from an earlier run."""

    path: Path
    losses: Mapping[str, float]
    resumed: int


def quantize_packed(
    reader: Reader,
    out: Path,
    text: str,
    options: PackedOptions | None = None,
    *,
    overwrite: bool = False,
    notes: Mapping[str, str] | None = None,
) -> PackedReport:
    """Quantize every linear of `reader`'s layers with calibration on `text`, and write the checkpoint `out`.

    notes: go into every shard's `__metadata__`. Stopped at any point, a repeated call goes on with the layer it was
    at. Raises what `calibrate` and `gptq.quantize` raise, UnsupportedError (a linear that cannot be packed),
    OutputExistsError, ResourceError.
    """
    options = options or PackedOptions()
    if options.checkpoint_format == "gptq" and not options.grid.sym:
        options = replace(options, grid=replace(options.grid, least_zero=max(1, options.grid.least_zero)))
    refuse_existing(out, overwrite=overwrite)
    layout = _layout(options, routers=reader.config.n_experts > 0)
    linears = _linears(reader, layout)
    tokens = draw(reader, text, options.calibration)
    losses: dict[str, float] = {}
    with Work(out.with_name(f"{out.name}.layers"), fingerprint(reader, tokens, options.record())) as work:
        resumed = work.begin(reader.config.n_layers)

        def finished(index: int) -> dict[str, Tensor | Later] | None:
            return work.weights(index, layout, linears, _prefix(reader, index)) if index < resumed else None

        layers = _Layers(reader, work, layout, linears)
        if resumed < reader.config.n_layers or not is_over(options.best, work):
            losses = _quantize(reader, tokens, options, layers, finished)
        give(options.best, work, layers)
        packing = packed_writer.Packing(layout, layout.settings.dump(), set(linears), options.codec)
        path = _assemble(reader, out, packing, work, options, overwrite=overwrite, notes=notes)
        work.remove()
    return PackedReport(path, losses, resumed)


def plan_packed(reader: Reader, options: PackedOptions) -> list[TensorInfo]:
    """The tensors that `quantize_packed` would store, from headers alone; raises UnsupportedError as it does."""
    layout = _layout(options, routers=reader.config.n_experts > 0)
    packing = packed_writer.Packing(layout, layout.settings.dump(), set(_linears(reader, layout)), options.codec)
    return list(packed_writer.planned(reader.config, packing).values())


def cost(reader: Reader, options: PackedOptions) -> Cost:
    """What `quantize_packed` takes here, apart from reading the text and writing; raises what it raises."""
    layout = _layout(options, routers=reader.config.n_experts > 0)
    _linears(reader, layout)

    def make(block: Block) -> None:
        _quantize_block(block, layout, options, {})

    return costs(options.best, reader, options.calibration, make, _folding(reader, options, {}))


@dataclass(frozen=True, slots=True)
class _Layers:
    """Finished layers whose scales can move (`distil.Layers`). linears: shapes by canonical name."""

    reader: Reader
    work: Work
    layout: AnyLayout
    linears: Mapping[str, tuple[int, int]]

    def movable(self, index: int) -> dict[str, Movable]:
        """A layer's matrices by name within it."""
        prefix, parts = _prefix(self.reader, index), self.work.load(index)
        found = {}
        for name, shape in self.linears.items():
            if name.startswith(prefix):
                key = name.removeprefix(prefix)
                own = parts_of(parts, key)
                whole = decoded(self.layout, own, shape)
                scales = torch.from_numpy(np.ascontiguousarray(own["scales"].T).astype(np.float32))
                found[key] = Movable(whole, (scales,), places=_places(own, shape[1], scales.shape[1]))
        return found

    def give(self, index: int, halves: Mapping[str, Sequence[NDArray[np.float32]]]) -> None:
        """Store a layer with these halves instead of its own."""
        stems = {key.removesuffix("weight"): own[0] for key, own in halves.items()}
        given = {f"{stem}scales": np.ascontiguousarray(own.T).astype("<f2") for stem, own in stems.items()}
        self.work.store(index, self.work.load(index) | given)


def _places(parts: Parts, columns: int, groups: int) -> Tensor | None:
    """The group of every column of a linear; None where groups are runs of the same length."""
    runs = np.arange(columns) // -(-columns // groups)
    places = parts.get("g_idx", runs)
    return None if columns % groups == 0 and np.array_equal(places, runs) else torch.from_numpy(places.astype(np.int64))


def _quantize(
    reader: Reader, tokens: NDArray[np.int64], options: PackedOptions, layers: _Layers, finished: Finished
) -> dict[str, float]:
    """Quantize what is not finished, layer after layer, and what best effort does besides; losses by canonical name."""
    made: Parts = {}
    losses: dict[str, float] = {}
    left = set(layers.linears)
    work, prepare = layers.work, _folding(reader, options, made)
    for block in passes(
        options.best, reader, tokens, options.calibration, work, layers, finished=finished, prepare=prepare
    ):
        made |= _quantize_block(block, layers.layout, options, losses)
        left -= set(losses)
        if not any(name.startswith(block.prefix) for name in left):
            work.store(block.index, made)
            made.clear()
    return losses


def _folding(reader: Reader, options: PackedOptions, made: Parts) -> Prepare | None:
    """What moves scales before a group is quantized, if they are to move; changed vectors are put into `made`."""
    feeds = load(reader).kind.FEEDS
    sharing = (reader.config.n_kv_heads, reader.config.n_heads // reader.config.n_kv_heads)

    def prepare(block: Block, ahead: Mapping[str, Moments]) -> None:
        for source, targets in feeds:
            known = ahead if block.weights[f"{source}.weight"].ndim > 1 else block.moments
            if f"{block.prefix}{targets[0]}.weight" in known:
                fold(replace(block, moments=dict(known)), source, targets, options.grid, sharing)
                for key in (f"{source}.weight", f"{source}.bias"):
                    if key in block.weights and block.weights[key].ndim == 1:
                        made[key] = block.weights[key].float().cpu().numpy()

    return prepare if options.scaled else None


def _layout(options: PackedOptions, *, routers: bool) -> AnyLayout:
    method = options.method
    meta = {
        "quantizer": [f"weightsmith:{__version__}"],
        "damp_percent": method.damp,
        "order": method.order,
        "static_groups": method.static_groups,
        "sweeps": method.sweeps,
        "scaled": options.scaled,
        "drift": options.best is not None,
        "distilled": options.best is not None and options.best.distilled is not None,
        "calibration": options.calibration.record(),
    }
    grid = options.grid
    if options.checkpoint_format == "awq":
        kept = ("lm_head", "gate") if routers else ("lm_head",)
        return awq_layout.Layout(awq_layout.Settings(grid.group_size, not grid.sym, meta, kept))
    settings = Settings(grid.bits, grid.group_size, grid.sym, method.scatters, options.checkpoint_format, meta)
    return gptq_layout.Layout(settings)


def _prefix(reader: Reader, index: int) -> str:
    return str(load(reader).kind.LAYER.format(index))


def _linears(reader: Reader, layout: AnyLayout) -> dict[str, tuple[int, int]]:
    """Shapes of all matrices in layers but routers, which every runtime keeps in full precision, by canonical name;
    UnsupportedError naming one that cannot be packed."""
    prefixes = tuple(_prefix(reader, index) for index in range(reader.config.n_layers))
    found = {}
    for name, info in reader.infos().items():
        if len(info.shape) == 2 and name.startswith(prefixes) and is_matrix(name, info.shape):
            try:
                layout.parts((info.shape[0], info.shape[1]))
            except WeightsmithError as error:
                error.tensor, error.path = name, reader.path
                raise
            found[name] = (info.shape[0], info.shape[1])
    return found


def _quantize_block(block: Block, layout: AnyLayout, options: PackedOptions, losses: dict[str, float]) -> Parts:
    """Quantize a block's linears, put what they now compute into its weights, and return what is to be stored."""
    stored: Parts = {}
    for names in block.groups():
        keys = [name.removeprefix(block.prefix) for name in names]
        if not is_matrix(names[0], block.weights.shape(keys[0])):
            continue  # a router, which shares its inputs with nothing
        moments, parts = block.moments[names[0]], list(wanted(block, names))
        h, shrink = moments.h, shrinkage(moments.size, moments.tokens)
        try:
            made = [
                gptq.quantize(torch.cat(some), h, options.grid, options.method, shrink=shrink)
                for some in zip(*parts, strict=True)
            ]
        except WeightsmithError as error:
            error.tensor = error.tensor or names[0]
            raise
        start = 0
        for name, key, choices in zip(names, keys, parts, strict=True):
            stop = start + len(choices[0])
            found = [one.rows(start, stop) for one in made]
            rounded = [one.dequantize() for one in found]
            chosen = nearest(block, name, choices[0], rounded)
            one, q, part = found[chosen], rounded[chosen], choices[chosen]
            lost, whole = loss_of(part, q, h), loss_of(part, None, h)
            losses[name] = lost / whole if whole else math.nan
            stem = key.removesuffix(".weight")
            fields = ("codes", "scales", "zeros", "g_idx")
            arrays = layout.store({field: getattr(one, field).cpu().numpy() for field in fields})
            if expert_of(name) is None:
                block.weights[key] = q
            else:  # as it is stored, so that a layer's experts are never in memory together as floats
                block.weights[key] = Later(tuple(q.shape), partial(decoded, layout, arrays, (q.shape[0], q.shape[1])))
            stored |= {f"{stem}.{suffix}": value for suffix, value in arrays.items()}
            start = stop
    return stored


def _assemble(
    reader: Reader,
    out: Path,
    packing: packed_writer.Packing,
    work: Work,
    options: PackedOptions,
    *,
    overwrite: bool,
    notes: Mapping[str, str] | None,
) -> Path:
    from weightsmith.quant import codecs  # noqa: PLC0415  (numba is imported by what computes)

    config = reader.config
    writer = packed_writer.create(
        out,
        config,
        packing,
        vocab=reader.vocab(options.calibration.pre),
        source=reader,
        overwrite=overwrite,
        split_bytes=options.split_bytes,
        notes=notes,
    )
    changed: Parts = {}  # vectors that scales were moved into, by canonical name
    try:
        for index in range(config.n_layers):
            prefix = _prefix(reader, index)
            parts: dict[str, Parts] = {}
            for key, value in work.load(index).items():
                stem, _, suffix = key.rpartition(".")
                if suffix in ("weight", "bias"):
                    changed[prefix + key] = value
                    continue
                parts.setdefault(f"{prefix}{stem}.weight", {})[suffix] = value
            for name, found in parts.items():
                writer.put(name, found)
        for info in writer.plain:
            stored = changed.get(info.name)
            slabs = weights.slabs(reader, info.name) if stored is None else [(0, torch.from_numpy(stored)[None])]
            for start, rows in slabs:
                try:
                    packed = codecs.encode(options.codec, rows.float().numpy())
                except WeightsmithError as error:
                    error.path, error.tensor = error.path or reader.path, error.tensor or info.name
                    raise
                writer.write(info, start, packed)
        return writer.close()
    except BaseException:
        writer.abort()
        raise
