"""Call a search kernel: check and scale the importances, name the efforts, turn what went wrong into errors.

The importance of a column is the mean square of the activations that meet it (one imatrix row). Only ratios matter, so
they are multiplied by a power of two that brings the largest into [1, 2), and none is left below 2**-20: a column that
no calibration text ever lit must still hold its weights.

With an imatrix nothing but its importances counts: that is the expected squared error of the output, where ggml
multiplies in a guess that favours large weights (`reference`). Without one importances are estimated from the columns'
tails (`quant.tails`); where a caller has neither, all weights count alike. Measured on a model of 135M parameters, all
linear layers quantized to one type, by KL divergence from the original: ggml; this search for
importance * sqrt(2 * mean(x * x) + x * x); this search as it is.

    with an imatrix   Q2_K 1.25 1.16 1.06   Q3_K 0.499 0.464 0.437   Q4_K .087 .080 .082   Q6_K .0084 .0066 .0061

Other substitutes, such as a weight's own square or magnitude, gained a fifth of what the tails gain (docs/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from weightsmith.errors import IntegrityError, UsageError
from weightsmith.quant.blocks import BLOCKS, row_nbytes
from weightsmith.quant.kernels import INF_HALF, raise_unfit
from weightsmith.types import Packed, Rows

EFFORTS = ("fast", "normal", "best")
FLOOR = np.float32(2.0**-20)


def _array(dtype: Any, *, readonly: bool) -> Any:
    return types.Array(dtype, 2, "C", readonly=readonly)


# rows [n_blocks, width], importance [period, width], packed, effort, whether it was measured -> worst half bits
SEARCH = types.int32(
    _array(types.float32, readonly=True),
    _array(types.float32, readonly=True),
    _array(types.uint8, readonly=False),
    types.int64,
    types.boolean,
)


def scaled(importance: NDArray[np.float32], row_len: int) -> NDArray[np.float32]:
    """Importances [row_len] brought to a largest of [1, 2) and a smallest of 2**-20; all ones if none is above 0.

    Raises IntegrityError if one is negative, NaN or Inf, or their number is not row_len.
    """
    found = np.asarray(importance, np.float32)
    if found.shape != (row_len,):
        raise IntegrityError(
            f"{found.size} importances for rows of {row_len} weights",
            hint="The imatrix belongs to another model, or to another tensor.",
        )
    if not (np.isfinite(found) & (found >= 0)).all():
        raise IntegrityError("an importance is negative, NaN or Inf", hint="The imatrix is damaged; make it again.")
    top = found.max(initial=0)
    if top == 0:
        return np.ones(row_len, np.float32)
    exponent = int(np.frexp(top)[1]) - 1
    half = exponent // 2  # two factors, because 2**-exponent alone may be no float32
    lifted: NDArray[np.float32] = np.maximum(np.ldexp(np.ldexp(found, -half), half - exponent), FLOOR)
    return lifted


def encode(
    codec: str,
    run: Callable[..., int],
    rows: Rows,
    *,
    importance: NDArray[np.float32] | None,
    effort: str,
    measured: bool,
) -> Packed:
    """Pack `rows` (float32 [rows, row_len], C order) with a SEARCH kernel; uint8 [rows, row_bytes].

    measured: the importances are an imatrix's, so that the choice to beat is ggml's with one; estimated ones (`tails`)
    steer the search in the same way, beside ggml's choice without an imatrix.

    Raises UsageError (no such effort), IntegrityError (NaN or Inf, importances that do not fit) and UnsupportedError
    (a scale beyond half precision).
    """
    if effort not in EFFORTS:
        raise UsageError(f"no such effort: {effort!r}", hint=f"Known: {', '.join(EFFORTS)}.")
    block = BLOCKS[codec]
    row_len = rows.shape[1]
    packed = np.empty((rows.shape[0], row_nbytes(codec, row_len)), np.uint8)
    weights = np.ones((1, block.weights), np.float32)
    if importance is not None:
        weights = scaled(importance, row_len).reshape(-1, block.weights)
    blocks = np.ascontiguousarray(rows, np.float32).reshape(-1, block.weights)
    guided = measured and importance is not None
    worst = run(blocks, weights, packed.reshape(-1, block.nbytes), EFFORTS.index(effort), guided)
    if worst >= INF_HALF:
        raise_unfit(codec, rows)
    return packed
