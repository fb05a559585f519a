"""Several models over the same windows at once, layer by layer: the original, its candidates, and the original's twin.

Layers go round: layer 0 of the original, of the first candidate, of the second ..., then layer 1 of each. One loads
while the one before it computes, so two layers are in memory, whatever the number of models; what grows with it are the
hidden states, and those share one budget. After each round the states lie side by side and drift is two norms away.

The twin is the original again, over a few windows, its states rounded to bfloat16 between the layers. Its distance from
the original is the noise floor of a comparison (see `weightsmith.evals.noise`). It passes through the original's
layers while these are there, so no weight is read for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weightsmith.evals.drift import Drift, Meter
from weightsmith.evals.engines import Tick
from weightsmith.evals.forward import Decoder, weights


@dataclass(slots=True, eq=False)
class Lane:
    """One model's states on their way. meter: n_layers places and one behind the norm.

    It is None where nothing is comparable. own: of what each layer adds by itself, None if not asked for.
    """

    decoder: Decoder
    meter: Meter | None
    own: Meter | None = None
    x: Tensor = field(default_factory=lambda: torch.empty(0))
    tables: Any = None

    def drift(self) -> Drift | None:
        """What was measured over all groups so far."""
        if self.meter is None:
            return None
        *layers, final = self.meter.means()
        return Drift(tuple(layers), final, self.own.means() if self.own is not None else None)


@dataclass(slots=True, eq=False)
class Lockstep:
    """A comparison's models; made by `start`. twins: windows that the twin gets, all of the first group."""

    original: Lane
    candidates: list[Lane]
    twin: Lane | None
    twins: int

    def _lanes(self) -> list[Lane]:
        return [self.original, *self.candidates]

    def windows_at_once(self, length: int) -> int:
        """Windows of `length` tokens whose states fit the budget of every model."""
        return min(lane.decoder.windows_at_once(length) for lane in self._lanes())

    @torch.inference_mode()
    def run(self, tokens: Tensor, scored: slice, tick: Tick) -> None:
        """Send int64 tokens [B, T] through all models; each lane's `x` is then [B, T, hidden], ready for `logits`.

        scored: positions that count for drift. The twin's `x` has at most `twins` windows, none after the first group.
        """
        twin, length = self.twin, tokens.shape[1]
        for lane in self._lanes():
            lane.x = torch.empty(0)  # the last group's states make room first
            lane.x = lane.decoder.embed(tokens)
            lane.tables = lane.decoder.kind.tables(lane.decoder.config, length, lane.decoder.place)
        if twin is not None:
            twin.x, twin.tables = _rounded(self.original.x[: self.twins].clone()), self.original.tables
            self.twins -= len(twin.x)
        before = self.original.x.clone() if any(lane.own is not None for lane in self.candidates) else None
        lanes = self._lanes()
        order = [(n, lane) for n in range(max(lane.decoder.config.n_layers for lane in lanes)) for lane in lanes]
        order = [(n, lane) for n, lane in order if n < lane.decoder.config.n_layers]
        layers = weights.stream([lane.decoder.layer_at(n) for n, lane in order], self.original.decoder.place)
        for number, lane in order:
            layer = next(layers)  # not by zip, which would keep a reference to it
            if lane is self.original:
                self._original(layer, number, before, scored)
            else:
                self._candidate(layer, number, lane, before, scored)
            del layer
            tick(len(tokens))
        self._finish(scored)

    def _original(self, layer: Any, number: int, before: Tensor | None, scored: slice) -> None:
        lane, twin = self.original, self.twin
        if before is not None:
            before.copy_(lane.x)
        if twin is None or not len(twin.x):
            lane.decoder.through(layer, lane.tables, lane.x)
        else:
            lane.decoder.through(layer, lane.tables, lane.x, twin.x)  # together, so that an expert is loaded once
            twin.x = _rounded(twin.x)
            _add(twin, number, lane.x[: len(twin.x)], scored)

    def _candidate(self, layer: Any, number: int, lane: Lane, before: Tensor | None, scored: slice) -> None:
        lane.decoder.through(layer, lane.tables, lane.x)
        if lane.meter is None:
            return
        _add(lane, number, self.original.x, scored)
        if lane.own is None or before is None:
            return
        alone = before.clone()
        lane.decoder.through(layer, lane.tables, alone)
        step = lane.decoder.step(before.shape[1])
        for at in range(0, len(before), step):
            lane.own.add(number, alone[at : at + step, scored], self.original.x[at : at + step, scored])

    def _finish(self, scored: slice) -> None:
        """The last norm of every lane."""
        self.original.decoder.finish(self.original.x)
        for lane in self.candidates:
            lane.decoder.finish(lane.x)
            _add(lane, lane.decoder.config.n_layers, self.original.x, scored)
        if self.twin is not None and len(self.twin.x):
            self.twin.decoder.finish(self.twin.x)
            _add(self.twin, self.twin.decoder.config.n_layers, self.original.x[: len(self.twin.x)], scored)


def start(original: Decoder, candidates: Sequence[Decoder], *, own: bool = False, twins: int = 0) -> Lockstep:
    """Line up models; see `Lockstep.run`. own: measure what each layer adds by itself (half as long again).

    A candidate of another depth or width runs along, and has no drift.
    """
    shape = (original.config.n_layers, original.config.hidden_size)
    lanes = []
    for decoder in candidates:
        alike = (decoder.config.n_layers, decoder.config.hidden_size) == shape
        meter = Meter(shape[0] + 1) if alike else None
        lanes.append(Lane(decoder, meter, Meter(shape[0]) if alike and own else None))
    twin = Lane(original, Meter(shape[0] + 1)) if twins else None
    return Lockstep(Lane(original, None), lanes, twin, twins)


def _add(lane: Lane, place: int, original: Tensor, scored: slice) -> None:
    if lane.meter is not None:
        lane.meter.add(place, lane.x[:, scored], original[:, scored])


def _rounded(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)
