"""Best effort: what calibration does beyond error feedback, the same for packed linears and for blocks.

The original's rows go along, so that every linear can make up for what was lost before it (`quant.algorithms.drift`),
and scales may move by the original's logits in the end (`distil`). With None in the place of a `Best` neither happens.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightsmith.evals.calibration import cost, distil
from weightsmith.evals.calibration.cost import Cost
from weightsmith.evals.calibration.rows import Options
from weightsmith.evals.calibration.stream import Block, Ended, Finished, Prepare, Run, calibrate
from weightsmith.evals.calibration.work import Work
from weightsmith.types import Reader


@dataclass(frozen=True, slots=True)
class Best:
    """distilled: how scales move in the end, None: they do not."""

    distilled: distil.Settings | None = None

    def record(self) -> dict[str, Any]:
        """What decides the result, as plain values."""
        return asdict(self)


def passes(  # noqa: PLR0913  (every choice, most by keyword)
    best: Best | None,
    reader: Reader,
    tokens: NDArray[np.int64],
    options: Options,
    work: Work,
    layers: distil.Layers,
    *,
    finished: Finished,
    prepare: Prepare | None = None,
    ended: Ended | None = None,
) -> Generator[Block]:
    """`calibrate` sequentially, and what comes behind the last layer; what that finds is kept in `work` for `give`."""

    def after(run: Run) -> None:
        if ended is not None:
            ended(run)
        if best is not None and best.distilled is not None:
            distil.keep(run, work, layers, tokens, best.distilled)

    return calibrate(reader, tokens, options, drift=best is not None, finished=finished, prepare=prepare, ended=after)


def is_over(best: Best | None, work: Work) -> bool:
    """Whether nothing is left to do when all layers are finished."""
    return best is None or best.distilled is None or work.has(distil.RESULT)


def give(best: Best | None, work: Work, layers: distil.Layers) -> None:
    """Give finished layers the scales that were found in the end, if any were sought; may be repeated."""
    if best is not None and best.distilled is not None:
        distil.give(work, layers)


def costs(
    best: Best | None,
    reader: Reader,
    options: Options,
    make: Callable[[Block], object],
    prepare: Prepare | None = None,
) -> Cost:
    """What a quantization takes here, `make` being what it does with a block; raises what `cost.measure` raises."""
    found = cost.measure(reader, options, make, drift=best is not None, prepare=prepare)
    return replace(found, ending=distil.seconds_of_row(reader, options, None if best is None else best.distilled))
