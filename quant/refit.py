"""Is there any even grid that gives a block these codes? For layouts whose stored scale is fitted after the codes.

ggml's weighted search for Q4_0, Q4_1, Q5_0 and Q5_1 chooses codes on one grid and then stores the scale (and offset)
that loses least with these codes, so a weight need not lie next to its stored value. But the codes are still those of
some grid: there are a step s > 0 and an offset m (0 in the symmetric layouts) with

    (c - 1/2) s + m <= w <= (c + 1/2) s + m          open below the least code and above the largest

What is stored must lose least for some importances, too. Without an offset the scale is a weighted mean of the slopes
w / c, so it lies between the least and the largest. With one, weights lie above and below the line in turns: were they
parted by one code, another line would be nearer to all of them.

For a step, the offsets that suit all weights run from f(s) = max(w - (c + 1/2) s) to g(s) = min(w - (c - 1/2) s), and
g - f is concave, so its largest value is found by narrowing the range of steps from both sides.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from weightsmith.types import Rows

REACH = 2.0  # the fitted step is at most so many times larger or smaller than the one the codes were chosen by
_TURNS = 40
_THIRD = 1 / 3
_HALF = 2.0**-10  # what a stored scale may be off by, and a little more


def exists(
    weights: Rows, codes: Rows, ends: tuple[float, float], step: Rows, offset: Rows | None = None
) -> NDArray[np.bool_]:
    """For blocks float32 [n, size]: whether a grid near `step` [n] gives these codes, and they the step; bool [n].

    codes: less the layout's zero. ends: the least and largest of them. offset: [n], None where grids have none.
    """
    w, c = weights.astype(np.float64), codes.astype(np.float64)
    low, high = step.astype(np.float64) / REACH, step.astype(np.float64) * REACH

    def room(s: NDArray[np.float64]) -> NDArray[np.float64]:
        """How much room a step leaves, in steps; less than nothing if it does not suit."""
        lowest = np.where(c < ends[1], w - (c + 0.5) * s[:, None], -np.inf).max(axis=1)
        highest = np.where(c > ends[0], w - (c - 0.5) * s[:, None], np.inf).min(axis=1)
        left: NDArray[np.float64] = (highest - lowest if offset is not None else np.minimum(highest, -lowest)) / s
        return left

    with np.errstate(all="ignore"):
        for _ in range(_TURNS):
            left, right = low + (high - low) * _THIRD, high - (high - low) * _THIRD
            better = room(left) * left < room(right) * right
            low, high = np.where(better, left, low), np.where(better, high, right)
        found: NDArray[np.bool_] = room((low + high) / 2) >= -0.02
        best = _is_mean_slope(w, c, step)
        if offset is not None:
            best = _is_fitted(w, c, step, offset) | (best & (offset == 0))
        found &= best
    return found


def _is_mean_slope(w: NDArray[np.float64], c: NDArray[np.float64], step: Rows) -> NDArray[np.bool_]:
    least, most = np.where(c != 0, w / c, np.inf).min(axis=1), np.where(c != 0, w / c, -np.inf).max(axis=1)
    found: NDArray[np.bool_] = (step >= least - _HALF * np.abs(least)) & (step <= most + _HALF * np.abs(most))
    return found


def _is_fitted(w: NDArray[np.float64], c: NDArray[np.float64], step: Rows, offset: Rows) -> NDArray[np.bool_]:
    """Whether step and offset lose least for some importances: no line through the codes parts what is left by sign."""
    left = w - (c * step[:, None] + offset[:, None])
    slack = _HALF * (np.abs(c * step[:, None]) + np.abs(offset[:, None]))
    above, below = left > -slack, left < slack  # what rounding to halves may have turned counts as both

    def span(mask: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return np.where(mask, c, np.inf).min(axis=1), np.where(mask, c, -np.inf).max(axis=1)

    (first_above, last_above), (first_below, last_below) = span(above), span(below)
    parted = (last_above < first_below) | (last_below < first_above)  # empty on one side too
    found: NDArray[np.bool_] = ~parted
    return found
