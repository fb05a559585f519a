"""Move scales between linears and what feeds them, so that a layer computes the same on a kinder grid.

The linears' columns are multiplied by s, the norm weight or the rows (and bias) of the linear before are divided by
it. The scales come from `quant.algorithms.awq`.
"""

from __future__ import annotations

import torch

from weightsmith.evals.calibration.stream import Block
from weightsmith.quant.algorithms import awq
from weightsmith.quant.algorithms.rtn import Grid


@torch.no_grad()
def fold(block: Block, source: str, targets: tuple[str, ...], grid: Grid, sharing: tuple[int, int]) -> None:
    """Scale the linears `targets` and unscale `source`, both by name within the layer; block.weights gets new tensors.

    Where `source` is a norm, the moments become those of its new output. sharing: (key heads, query heads of each),
    used where source has fewer rows than the targets have columns.
    """
    weights = block.weights
    moments = block.moments[f"{block.prefix}{targets[0]}.weight"]
    w = torch.cat([weights[f"{name}.weight"].float() for name in targets])
    narrow = len(weights[f"{source}.weight"]) < w.shape[1]
    heads, shared = sharing if narrow else (1, 1)
    scales = awq.scales_of(w, moments.h, grid, heads=heads, sharing=shared)
    wide = awq.spread(scales, heads, shared)
    for name in targets:
        key = f"{name}.weight"
        weights[key] = (weights[key].float() * wide).to(weights[key].dtype)
    for key in (f"{source}.weight", f"{source}.bias"):
        if key in weights:
            old = weights[key]
            by = scales if old.ndim == 1 else scales[:, None]
            weights[key] = (old.float() / by).to(old.dtype)
    if weights[f"{source}.weight"].ndim == 1:
        moments.divide(scales)
