"""What feeds linears in the original model, beside what feeds the same ones in a model that is made of it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from weightsmith.quant.multiply import linear


class Beside(NamedTuple):
    """Of rows or tokens, along the first axis, what feeds linears in the original.

    counted: so many of them, the first, are counted, the others held out to judge by. off: where the one linear adds to
    a stream, how far ours is off in that, and matrix: its weights.
    """

    into: Tensor
    counted: int
    off: Tensor | None = None
    matrix: Tensor | None = None

    def lost(self, into: Tensor) -> Tensor:
        """What `quant.algorithms.drift` counts, ours being fed `into`."""
        lost = self.into - into
        if self.matrix is None or self.off is None:
            return lost
        return linear(lost.to(self.matrix.dtype), self.matrix).to(lost.dtype).add_(self.off)
