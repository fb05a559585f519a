"""Do stored bytes hold NaN or Inf? Answered on raw bits, without decoding.

A float is finite if its exponent bits are not all ones, that is, if its magnitude bits lie below those of Inf. The
largest magnitude comes from two integer maxima, which numpy runs as SIMD and without temporaries: read as signed
integers the positive floats lead, read as unsigned ones the negative floats do. For block layouts only the
half-precision scales can be wrong; they are looked at in place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightsmith.errors import IntegrityError
from weightsmith.quant.blocks import BLOCKS
from weightsmith.types import Packed

_CHUNK = 1 << 17  # bytes looked at per step: both maxima find them in the cache

# codec -> (signed integer type of the same size, magnitude bits of Inf)
_FLOATS: dict[str, tuple[np.dtype[Any], int]] = {
    "F16": (np.dtype(np.int16), 0x7C00),
    "BF16": (np.dtype(np.int16), 0x7F80),
    "F32": (np.dtype(np.int32), 0x7F800000),
    "F64": (np.dtype(np.int64), 0x7FF0000000000000),
    "F8_E5M2": (np.dtype(np.int8), 0x7C),
    "F8_E4M3": (np.dtype(np.int8), 0x7F),  # the "fn" kind: no Inf, and all ones is NaN
}

# Where a block keeps its half-precision scales and offsets (ggml-common.h). Layouts that are not listed have none that
# is a plain half: IQ1_M spreads its bits, Q8_K has a float32, MXFP4 and NVFP4 have bytes.
_HALVES: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q8_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ3_XXS": (0,),
    "IQ1_S": (0,),
    "IQ4_NL": (0,),
    "IQ3_S": (0,),
    "IQ2_S": (0,),
    "IQ4_XS": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}


def _largest(values: NDArray[Any]) -> int:
    """Largest magnitude bits among floats of which `values` [n] are the bits."""
    top = int(np.iinfo(values.dtype).max)
    unsigned = values.view(f"u{values.itemsize}")
    step = _CHUNK // values.itemsize
    worst = 0
    for start in range(0, values.size, step):
        above = int(values[start : start + step].max())
        below = int(unsigned[start : start + step].max())
        worst = max(worst, above, below & top if below > top else 0)
    return worst


def check_finite(codec: str, packed: Packed) -> None:
    """Raise IntegrityError if `packed` (uint8 [rows, row_bytes]) holds NaN or Inf weights, or scales that are.

    Looks at F16, BF16, F32, F64, F8 and the half-precision scales of block layouts; anything else passes.
    """
    if codec in _FLOATS:
        kind, limit = _FLOATS[codec]
        values = np.ascontiguousarray(packed).reshape(-1).view(kind)
        if _largest(values) >= limit:
            raise IntegrityError(
                f"{codec} weights that are no finite numbers (NaN or Inf)",
                hint="The checkpoint is damaged; fetch it again.",
            )
    elif codec in _HALVES:
        blocks = np.ascontiguousarray(packed).reshape(-1, BLOCKS[codec].nbytes)
        for offset in _HALVES[codec]:
            bad = int(np.count_nonzero((blocks[:, offset + 1] & 0x7C) == 0x7C))
            if bad:
                raise IntegrityError(
                    f"{bad} of {len(blocks)} {codec} blocks have a scale that is no finite number (NaN or Inf)",
                    hint="The checkpoint is damaged; fetch it again.",
                )
