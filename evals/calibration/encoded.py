"""A whole checkpoint to block layouts: every layer is encoded as calibration reaches it, behind the ones before it.

Each linear gets the layout that a plan names, with error feedback (`quant.algorithms.compensated`) where the layout can
be opened and by importances alone where it cannot (Q8_0); what it decodes to takes the place of its weights, so later
linears are measured on, and make up for, what this one lost.

Packed rows of a finished layer lie in OUT.layers/ (`work`), and behind the last layer the importances of the output
matrix; a killed run takes these files up. `Encoded` hands the rows to whoever writes the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightsmith.errors import WeightsmithError
from weightsmith.evals.calibration.best import Best, costs, give, is_over, passes
from weightsmith.evals.calibration.cost import Cost
from weightsmith.evals.calibration.rows import Options, draw
from weightsmith.evals.calibration.stream import Block, Run, nearest, wanted
from weightsmith.evals.calibration.work import Parts, Work, fingerprint
from weightsmith.evals.forward import load
from weightsmith.evals.forward.weights import Later
from weightsmith.formats.archs import expert_of
from weightsmith.quant import codecs
from weightsmith.quant.algorithms import compensated, scales
from weightsmith.quant.algorithms.compensated import Inputs
from weightsmith.quant.algorithms.moments import loss_of, shrinkage
from weightsmith.quant.algorithms.scales import Movable
from weightsmith.types import Packed, Reader

_LOSS = ".loss"
_HEAD = "head.importance"


@dataclass(frozen=True, slots=True)
class EncodedOptions:
    """What to make and how. layouts: codec by canonical name of everything that is planned. damp: share of H's mean
    diagonal. sweeps: of descent. effort: of the search for scales. best: what best effort does."""

    layouts: Mapping[str, str]
    calibration: Options = field(default_factory=Options)
    damp: float = 0.01
    sweeps: int = 4
    effort: str = "normal"
    best: Best | None = None

    def record(self) -> dict[str, Any]:
        """What decides the result, as plain values."""
        kept = {"layouts": dict(self.layouts), "damp": self.damp, "sweeps": self.sweeps, "effort": self.effort}
        return {**kept, "best": self.best and self.best.record(), "calibration": self.calibration.record()}


class Encoded:
    """Finished layers as packed rows, by canonical name."""

    def __init__(self, reader: Reader, work: Work, linears: Mapping[str, int]) -> None:
        self._reader, self._work, self._linears = reader, work, linears
        self.losses: dict[str, float] = {}
        self.importances: dict[str, NDArray[np.float32]] = {}

    def rows(self, name: str, start: int, stop: int) -> Packed | None:
        """Packed rows [start, stop) of a tensor, or None if it was not encoded here. Safe from several threads."""
        if name not in self._linears:
            return None
        index = self._linears[name]
        return self._work.slab(index, name.removeprefix(_prefix(self._reader, index)), start, stop)

    def remove(self) -> None:
        """Forget the layers: the checkpoint is written."""
        self._work.remove()

    def close(self) -> None:
        """Let go of the folder, which stays for a later run unless `remove` was called."""
        self._work.close()


@dataclass(frozen=True, slots=True)
class _Layers:
    """Finished layers whose scales can move (`distil.Layers`)."""

    reader: Reader
    work: Work
    layouts: Mapping[str, str]

    def movable(self, index: int) -> dict[str, Movable]:
        """A layer's matrices by name within it."""
        infos, prefix = self.reader.infos(), _prefix(self.reader, index)
        return {
            key: scales.of_blocks(self.layouts[prefix + key], packed, infos[prefix + key].row_len)
            for key, packed in self.work.load(index).items()
            if not key.endswith(_LOSS)
        }

    def give(self, index: int, halves: Mapping[str, Sequence[NDArray[np.float32]]]) -> None:
        """Store a layer with these halves instead of its own."""
        parts, prefix = self.work.load(index), _prefix(self.reader, index)
        given = {key: scales.into_blocks(self.layouts[prefix + key], parts[key], own) for key, own in halves.items()}
        self.work.store(index, parts | given)


def encode_layers(reader: Reader, out: Path, text: str, options: EncodedOptions) -> Encoded:
    """Encode every linear of `reader`'s layers that is planned as blocks, with calibration on `text`.

    Layers that an earlier, stopped call for `out` finished with the same source, text and options are taken over.
    Raises what `calibrate` and `compensated.encode` raise, OutputExistsError, ResourceError.
    """
    count = reader.config.n_layers
    linears = _linears(reader, options)
    tokens = draw(reader, text, options.calibration)
    work = Work(out.with_name(f"{out.name}.layers"), fingerprint(reader, tokens, options.record()))
    layers = _Layers(reader, work, options.layouts)
    try:
        resumed = work.begin(count + 1)

        def finished(index: int) -> dict[str, Tensor | Later] | None:
            return _decoded(reader, work.load(index), index, options) if index < resumed else None

        def ended(run: Run) -> None:
            work.store(count, {_HEAD: run.head()[1].diagonal.float().cpu().numpy()})

        if resumed <= count or not is_over(options.best, work):
            left, made = set(linears), Parts()
            for block in passes(
                options.best, reader, tokens, options.calibration, work, layers, finished=finished, ended=ended
            ):
                made |= _encode_block(block, options)
                left -= set(block.moments)
                if not any(name.startswith(block.prefix) for name in left):
                    work.store(block.index, made)
                    made.clear()
        give(options.best, work, layers)
        return _opened(reader, work, linears)
    except BaseException:
        work.close()
        raise


def cost(reader: Reader, options: EncodedOptions) -> Cost:
    """What `encode_layers` takes here, apart from reading the text; raises what it raises."""

    def make(block: Block) -> None:
        _encode_block(block, options)

    return costs(options.best, reader, options.calibration, make)


def _opened(reader: Reader, work: Work, linears: Mapping[str, int]) -> Encoded:
    found = Encoded(reader, work, linears)
    config = reader.config
    for index in range(config.n_layers):
        parts = work.load(index)
        losses = {key: float(value[0]) for key, value in parts.items() if key.endswith(_LOSS)}
        prefix = _prefix(reader, index)
        found.losses |= {prefix + key.removesuffix(_LOSS): value for key, value in losses.items()}
    if not config.tie_word_embeddings:  # an embedding must serve as what goes in, too
        found.importances[load(reader).kind.HEAD] = work.load(config.n_layers)[_HEAD]
    return found


def _prefix(reader: Reader, index: int) -> str:
    return str(load(reader).kind.LAYER.format(index))


def _linears(reader: Reader, options: EncodedOptions) -> dict[str, int]:
    """The layer of every matrix in one that is planned as blocks, by canonical name."""
    from weightsmith.quant.blocks import BLOCKS  # noqa: PLC0415

    prefixes = {_prefix(reader, index): index for index in range(reader.config.n_layers)}
    found = {}
    for name, codec in options.layouts.items():
        index = next((index for prefix, index in prefixes.items() if name.startswith(prefix)), None)
        if index is not None and BLOCKS[codec].weights > 1:
            found[name] = index
    return found


def _decoded(reader: Reader, parts: Parts, index: int, options: EncodedOptions) -> dict[str, Tensor | Later]:
    """What a finished layer computes with, float32 by name within it."""
    infos, prefix = reader.infos(), _prefix(reader, index)
    found: dict[str, Tensor | Later] = {}
    for key, packed in parts.items():
        if not key.endswith(_LOSS):
            name = prefix + key
            load = partial(_floats, options.layouts[name], packed, infos[name].row_len)
            found[key] = load() if expert_of(name) is None else Later(infos[name].shape, load)
    return found


def _floats(codec: str, packed: Packed, row_len: int) -> Tensor:
    return torch.from_numpy(codecs.decode(codec, packed, row_len))


def _encode_block(block: Block, options: EncodedOptions) -> Parts:
    """Encode a block's linears, put what they decode to into its weights, and return what is to be stored."""
    stored: Parts = {}
    for names in block.groups():
        moments, inputs = block.moments[names[0]], None
        for name, choices in zip(names, wanted(block, names), strict=True):
            codec = options.layouts[name]
            key = name.removeprefix(block.prefix)
            if codec not in codecs.OPEN and codec != "Q8_0":
                continue
            try:
                if codec in codecs.OPEN and inputs is None:
                    inputs = Inputs.of(moments.h, options.damp, shrinkage(moments.size, moments.tokens))
                made = [_encoded(codec, w, inputs, options) for w in choices]
            except WeightsmithError as error:
                error.tensor = error.tensor or name
                raise
            chosen = nearest(block, name, choices[0], [q for _, q in made])
            (packed, q), w = made[chosen], choices[chosen]
            lost, whole = loss_of(w, q, moments.h), loss_of(w, None, moments.h)
            stored[key] = packed
            stored[key + _LOSS] = np.array([lost / whole if whole else math.nan], np.float32)
            if expert_of(name) is None:
                block.weights[key] = q
            else:  # as it is stored, so that a layer's experts are never in memory together as floats
                block.weights[key] = Later(tuple(q.shape), partial(_floats, codec, packed, w.shape[1]))
    return stored


def _encoded(codec: str, w: Tensor, inputs: Inputs | None, options: EncodedOptions) -> tuple[Packed, Tensor]:
    """Packed rows of a matrix, and what they decode to."""
    if codec in codecs.OPEN and inputs is not None:
        return compensated.encode(codec, w, inputs, sweeps=options.sweeps, effort=options.effort)
    packed = codecs.encode(codec, w.cpu().numpy())
    return packed, torch.from_numpy(codecs.decode(codec, packed, w.shape[1])).to(w.device)
