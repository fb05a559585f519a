"""The noise floor: what a comparison shows between the original and itself.

The original runs a second time over the first TWIN_WINDOWS windows, all else equal, with its hidden states rounded to
bfloat16 (8 significant bits) where they pass from one layer to the next, the embedding's output included. Everything a
comparison reports is then reported of this pair. That is less rounding than any runtime in bfloat16 does, which rounds
within layers too, so it is what users do to the unchanged model anyway: a candidate at or below the floor cannot be
told from the original in such a runtime. Differences between two candidates that are smaller than the floor mean as
little.

It is not the resolution of the ruler, which computes in float32 and resolves far smaller differences: the same weights
in two containers give a divergence of 0, and another implementation in float32 (transformers) a mean of 2e-9 nats.

For scale: llama.cpp publishes 5.5e-4 nats for F16 against its own file of logits, which comes from the 16-bit codes of
that file alone (tools/perplexity/README.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from weightsmith.evals import scores
from weightsmith.evals.drift import Drift

TWIN_WINDOWS = 2  # enough for a magnitude; a tenth more computing on the built-in text, less on longer ones


@dataclass(frozen=True, slots=True)
class Noise:
    """The original against its rounded self, measured as a candidate is (see `compare.Comparison`).

    tokens: scored predictions it rests on.
    """

    ratio: float
    kld_mean: float
    kld_median: float
    kld_99: float
    top1: float
    drift: Drift | None
    tokens: int


def noise(pair: scores.Pair, drift: Drift | None) -> Noise:
    """The floor from the per-token values of the original (first) and its twin."""
    return Noise(
        ratio=scores.exp_mean_error(pair.candidate - pair.original)[0],
        kld_mean=float(pair.kld.mean()),
        kld_median=scores.percentile(pair.kld, 0.5),
        kld_99=scores.percentile(pair.kld, 0.99),
        top1=float(np.mean(pair.same_top)),
        drift=drift,
        tokens=len(pair.kld),
    )
