"""The calibration pass: rows go through one layer at a time, a layer's weights are in memory only meanwhile.

Linears that are fed by the same tensor (query, key and value; gate and up) form a group and share one `Moments`. In a
sequential pass a layer goes through its groups in order of computation: the group's inputs are measured with the
weights as they stand, the consumer may replace them by what their quantized form computes, and the next group is
measured behind that. So every quantizer sees the inputs that its linear will really get, and can make up for what the
ones before it lost. A pass for a group stops at the first linear of the next one, so a layer of g groups costs about
(g + 1) / 2 + 1 evaluations. A pass that only measures (`imatrix`) costs one. `routed` says how experts are measured.

Ref: GPTQ arXiv 2210.17323 section 3.3 and its "true sequential" order; llama.cpp tools/imatrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightsmith.evals.calibration import routed
from weightsmith.evals.calibration.rows import Options, draw
from weightsmith.evals.calibration.states import States
from weightsmith.evals.engines.torch import threads
from weightsmith.evals.forward import Decoder, load, weights
from weightsmith.formats import archs
from weightsmith.progress import progress
from weightsmith.quant.calibration import Moments
from weightsmith.types import Reader

if TYPE_CHECKING:
    from weightsmith.formats.imatrix import Imatrix

Finished = Callable[[int], Mapping[str, Tensor] | None]
Prepare = Callable[["Block"], None]
Head = Callable[[str, Moments], None]


@dataclass(slots=True, eq=False)
class Block:
    """A group of linears (all of a layer's, in a pass that is not sequential) and what calibration saw of them.

    index: the layer. prefix: what canonical names of its tensors begin with. moments: by canonical weight name.
    weights: all of the layer, by the rest of the name; replaced entries are what the rows then pass through. Both
    mappings are emptied when the next layer begins.
    """

    index: int
    prefix: str
    weights: dict[str, Tensor]
    moments: dict[str, Moments]


class _EnoughError(Exception):
    """Ends an evaluation of a layer: all inputs that were wanted have been seen."""


@dataclass(slots=True, eq=False)
class _Collector:
    """The tap of a layer. done: linears measured before. one_group: stop behind the first group that is not; the
    experts' linears of one kind are one group, as many of them as have `room` (bytes of H) beside each other. only: the
    linears that are wanted, None for all. passed: those that were seen but not measured."""

    device: torch.device
    full: bool
    one_group: bool
    done: set[str]
    room: int = 0
    only: frozenset[str] | None = None
    passed: set[str] = field(default_factory=set)
    found: dict[str, Moments] = field(default_factory=dict)
    last: tuple[str, Tensor] | None = None

    def __call__(self, name: str, into: Tensor) -> None:
        if name in self.done or (self.only is not None and name not in self.only):
            return
        if self.last is not None and into is self.last[1]:
            self.found[name] = self.found[self.last[0]]
            return
        if name not in self.found:
            if self.one_group and self.found and not self._has_room(name, into.shape[-1]):
                stage = routed.stage_of(next(iter(self.found)))
                if stage is None:
                    raise _EnoughError
                self.passed.add(name)  # an expert of the stage may yet come
                return
            self.found[name] = Moments(into.shape[-1], full=self.full, device=self.device)
        self.found[name].add(into)
        self.last = (name, into)

    def _has_room(self, name: str, size: int) -> bool:
        """Whether an expert's linear belongs to the stage under way and its moments fit in."""
        stage = routed.stage_of(next(iter(self.found)))
        held = {id(moments): 4 * moments.size**2 for moments in self.found.values()}
        return stage is not None and routed.stage_of(name) == stage and sum(held.values()) + 4 * size**2 <= self.room


@dataclass(slots=True, eq=False)
class _Run:
    """A pass under way."""

    decoder: Decoder
    states: States
    tables: Any
    step: int

    @torch.no_grad()
    def evaluate(self, layer: Mapping[str, Tensor], *, tap: _Collector | None = None, keep: bool = True) -> None:
        """Send all rows through a layer, its outputs replacing the rows if `keep`."""
        kind, place = self.decoder.kind, self.decoder.place
        for start, rows in self.states.pieces(self.step):
            found = None
            with suppress(_EnoughError):
                found = kind.layer(layer, rows.to(*place), self.tables, self.decoder.config, tap)
            if tap is not None:
                tap.last = None
            if keep and found is not None:
                self.states.put(start, found)

    def blocks(
        self, *, full: bool, sequential: bool, finished: Finished | None = None, prepare: Prepare | None = None
    ) -> Iterator[Block]:
        """Blocks of all layers in turn; afterwards `states` are what comes out of the last."""
        config = self.decoder.config
        with progress("calibrate", config.n_layers, "layers") as ticker:
            layers = self.decoder.layers()
            for index in range(config.n_layers):
                layer = dict(next(layers))
                ready = finished(index) if finished is not None else None
                if ready is not None:
                    layer.update({name: value.to(layer[name]) for name, value in ready.items()})
                else:
                    if prepare is not None:
                        fed = frozenset(name for _, names in self.decoder.kind.FEEDS for name in names)
                        for block in self._groups(index, layer, full=full, sequential=False, keep=False, only=fed):
                            prepare(block)
                    yield from self._groups(index, layer, full=full, sequential=sequential)
                if sequential or ready is not None:
                    self.evaluate(layer)
                layer.clear()
                del layer, ready
                ticker.update(1)

    def _groups(
        self,
        index: int,
        layer: dict[str, Tensor],
        *,
        full: bool,
        sequential: bool,
        keep: bool = True,
        only: frozenset[str] | None = None,
    ) -> Iterator[Block]:
        prefix = self.decoder.kind.LAYER.format(index)
        done: set[str] = set()
        while True:
            tap = _Collector(self.decoder.place.device, full, sequential, done, self.decoder.memory, only)
            self.evaluate(layer, tap=tap, keep=keep and not sequential)
            if full and only is None:
                missing = routed.unseen(layer, tap.found, done | tap.passed)
                sizes = {name: layer[f"{name}.weight"].shape[-1] for name in missing}
                routed.fill_up(tap.found, missing, sizes, prefix.strip("."))
            if not tap.found:
                return
            moments = {f"{prefix}{name}.weight": found for name, found in tap.found.items()}
            for name, found in moments.items():
                found.check(name)
            done |= set(tap.found)
            del tap
            yield Block(index, prefix, layer, moments)
            moments.clear()
            if not sequential:
                return

    @torch.no_grad()
    def head(self) -> tuple[str, Moments]:
        """The output matrix by canonical name, and the diagonal of its inputs, after all blocks have passed."""
        kind, config, place = self.decoder.kind, self.decoder.config, self.decoder.place
        name = kind.EMBEDDING if config.tie_word_embeddings else kind.HEAD
        norm = weights.tensor(self.decoder.reader, kind.NORM, place)
        moments = Moments(config.hidden_size, full=False, device=place.device)
        for _, rows in self.states.pieces(self.step):
            moments.add(kind.norm(rows.to(*place), norm, config.rms_norm_eps))
        moments.check(name)
        return name, moments


@contextmanager
def _begun(reader: Reader, tokens: NDArray[np.int64], options: Options) -> Iterator[_Run]:
    decoder = load(reader, device=options.device, memory=options.memory)
    kind, config = decoder.kind, decoder.config
    shape = (*tokens.shape, config.hidden_size)
    with threads(options.threads), States(shape, memory=options.memory // 2, spill=options.spill) as states:
        at_once = decoder.windows_at_once(options.ctx)
        for start in range(0, len(tokens), at_once):
            ids = torch.from_numpy(tokens[start : start + at_once])
            states.put(start, kind.entered(weights.gather(reader, kind.EMBEDDING, ids, decoder.place), config))
        yield _Run(decoder, states, kind.tables(config, options.ctx, decoder.place), decoder.step(options.ctx))


def calibrate(
    reader: Reader,
    text: str,
    options: Options | None = None,
    *,
    sequential: bool = True,
    finished: Finished | None = None,
    prepare: Prepare | None = None,
    head: Head | None = None,
) -> Iterator[Block]:
    """Measure the inputs of every linear, group by group; see `Block` for how a consumer feeds quantized weights back.

    sequential: see above; else one block per layer, measured behind the original weights. finished(index): weights of
    a layer that was dealt with before (float tensors by name within the layer), or None; rows only pass through it.
    prepare(block): called before the groups of a layer, with all its moments at once, to replace its weights by others
    that compute the same. head(name, moments): called at the end, with the diagonal of the output matrix's inputs.
    Raises what `draw` and `forward.load` raise, IntegrityError (inputs that are not finite), ResourceError (disk).
    """
    options = options or Options()
    with _begun(reader, draw(reader, text, options), options) as run:
        yield from run.blocks(full=True, sequential=sequential, finished=finished, prepare=prepare)
        if head is not None:
            head(*run.head())


def imatrix(
    reader: Reader, text: str, options: Options | None = None, *, output: bool = False, dataset: str = ""
) -> Imatrix:
    """Importances of all linears, under GGUF's names, as llama-imatrix measures them (all windows unless told).

    output: the output matrix too, under the embedding's name where the two are tied. dataset: name of the text to
    record. Raises what `calibrate` raises.
    """
    from weightsmith.formats.imatrix import Entry, Imatrix  # noqa: PLC0415

    options = options or Options(rows=None)
    tokens = draw(reader, text, options)
    kept = _Kept(reader)
    with _begun(reader, tokens, options) as run:
        for block in run.blocks(full=False, sequential=False):
            for name, moments in block.moments.items():
                kept.add(name, moments)
        if output:
            kept.add(*run.head())
    entries = {gguf: Entry(kept.sums[gguf], kept.counts[gguf]) for gguf in kept.seen}
    return Imatrix(entries, [dataset] if dataset else [], len(tokens), options.ctx)


class _Kept:
    """Diagonals under GGUF's names; the experts of a stack in one, zeros for those that no token reached.

    Their place is made before the pass. Small arrays that are made on the way and outlive it would lie between the
    large ones that come and go, and the heap would grow with every layer (measured: half as much again at 24 layers).
    """

    def __init__(self, reader: Reader) -> None:
        self._gguf_name = archs.by_name(reader.config.family).gguf_name
        self.seen: dict[str, None] = {}  # in the order of measuring
        self.sums: dict[str, NDArray[np.float64]] = {}
        self.counts: dict[str, NDArray[np.int64]] = {}
        for name, info in reader.infos().items():
            if len(info.shape) == 2:
                height = 1 if archs.expert_of(name) is None else reader.config.n_experts
                gguf = str(self._gguf_name(name))
                self.sums.setdefault(gguf, np.zeros((height, info.row_len)))
                self.counts.setdefault(gguf, np.zeros(height, np.int64))

    def add(self, name: str, moments: Moments) -> None:
        """Keep what was measured of a linear."""
        expert, gguf = archs.expert_of(name) or 0, str(self._gguf_name(name))
        self.seen[gguf] = None
        self.sums[gguf][expert] = moments.diagonal.cpu().numpy()
        self.counts[gguf][expert] = moments.tokens
