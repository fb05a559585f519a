"""bitsandbytes' two sets of 16 levels in [-1, 1], and how a weight finds its level.

    NF4   quantiles of a normal distribution, -1, 0 and 1 among them; in order of value
    FP4   sign, two exponent bits, one fraction bit, over 12; in order of bits: 0 1/192 2/3 1 1/3 1/2 1/6 1/4, minus

A block's weights are multiplied by 1 / absmax in float32 and held to [-1, 1]; then the level counts how many of the
midpoints (float32) between neighbours lie below. On a midpoint the lower level wins. FP4's two zeros are one level,
written as +0.

Ref: Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, appendix E; bitsandbytes functional.py (get_4bit_type) and
backends/default/ops.py (quantize_4bit), version 0.50.2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK = 64  # weights per absmax, as written here
SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # what is read

_NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453)
_NF4_MIDDLE = (-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0)
_NF4_ABOVE = (0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224)
_NF4_TOP = (0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
_SIZES = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)

LEVELS: dict[str, NDArray[np.float32]] = {
    "NF4": np.array([*_NF4, *_NF4_MIDDLE, *_NF4_ABOVE, *_NF4_TOP], np.float32),
    "FP4": np.concatenate([_SIZES, -_SIZES]),
}

# Levels in order of value, without FP4's second zero, and the midpoints between them.
CODES = {
    "NF4": np.arange(16, dtype=np.int32),
    "FP4": np.array([11, 10, 13, 12, 15, 14, 9, 0, 1, 6, 7, 4, 5, 2, 3], np.int32),
}
BOUNDS = {name: (LEVELS[name][codes][1:] + LEVELS[name][codes][:-1]) / np.float32(2) for name, codes in CODES.items()}
