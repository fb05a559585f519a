"""An importance matrix of a whole model: the diagonals of its linears' second moments, under GGUF's names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from weightsmith.evals.calibration.rows import Options, draw
from weightsmith.evals.calibration.stream import begun
from weightsmith.formats import archs
from weightsmith.quant.calibration import Moments
from weightsmith.types import Reader

if TYPE_CHECKING:
    from weightsmith.formats.imatrix import Imatrix


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
    with begun(reader, tokens, options) as run:
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
