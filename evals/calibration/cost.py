"""What a calibration will take on this machine: one layer measured with one step of rows, the others projected.

With p the seconds that a step of rows takes through a layer and q those that quantizing the layer takes, all of it is

    layers * (q + p * rows / rows of a step) + e * rows

where e are the seconds of a row in the last step of best effort (`distil`), and a little more: the text is not read,
nor the checkpoint written. The second layer is the one that is measured, where there are two, because the first one
waits for its weights and for kernels to be loaded. Tokens are drawn at random.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from weightsmith.evals.calibration.rows import Options
from weightsmith.evals.calibration.stream import Block, Prepare, calibrate
from weightsmith.evals.forward import load
from weightsmith.types import Reader


@dataclass(frozen=True, slots=True)
class Cost:
    """step: seconds that one step of `rows` rows takes through a layer. layer: seconds that quantizing a layer takes,
    however many rows there are. ending: seconds that a row takes after all layers."""

    step: float
    layer: float
    rows: int
    layers: int
    ending: float = 0.0

    def seconds(self, rows: int) -> float:
        """Projected to all layers and so many rows."""
        return self.layers * (self.layer + self.step * rows / self.rows) + self.ending * rows


@dataclass(slots=True)
class _Watch:
    """Seconds spent in what is `timed`."""

    seconds: float = field(default=0.0, init=False)

    def timed(self, work: Callable[..., object]) -> Callable[..., None]:
        """The same work, whose seconds are counted."""

        def run(*arguments: Any) -> None:
            begun = time.perf_counter()
            work(*arguments)
            self.seconds += time.perf_counter() - begun

        return run


def measure(
    reader: Reader,
    options: Options,
    make: Callable[[Block], object],
    *,
    full: bool = True,
    sequential: bool = True,
    drift: bool = False,
    prepare: Prepare | None = None,
) -> Cost:
    """Calibrate until one layer has been seen from beginning to end, and let `make` quantize its blocks.

    The other arguments are those of `calibrate`, whose errors are raised.
    """
    layers = reader.config.n_layers
    rows = load(reader, device=options.device, memory=options.memory).step(options.ctx)
    tokens = np.random.default_rng(0).integers(reader.config.vocab_size, size=(rows, options.ctx))
    watch, begun = _Watch(), 0.0
    make = watch.timed(make)
    chosen = min(1, layers - 1)
    passes = calibrate(
        reader,
        tokens,
        options,
        full=full,
        sequential=sequential,
        drift=drift,
        prepare=watch.timed(prepare) if prepare is not None else None,
    )
    with closing(passes):
        for block in passes:
            if block.index > chosen:
                break
            if block.index == chosen and not begun:
                begun, watch.seconds = time.perf_counter(), 0.0
            make(block)
        whole = time.perf_counter() - begun
    return Cost(whole - watch.seconds, watch.seconds, rows, layers)
