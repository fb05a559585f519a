"""Per-token numbers from logits, and the statistics made of them.

With x the logits shifted so that their maximum is 0 and S = sum exp(x): nll = ln S - x[target]. For two models a (the
original) and b: KL(a || b) = sum p (ln p - ln q) = sum e^xa (xa - xb) / Sa - (ln Sa - ln Sb). Vocabulary-long arrays
are float32; the sums over them, their logarithms and everything after are float64. Not rounding ln S to float32 is what
counts: at logits around 20 that rounding alone would put noise of 1e-6 on each KL value, here it is about 1e-7.

Statistics are llama.cpp's: a perplexity's error is sqrt((E[nll^2] - E[nll]^2) / (N - 1)) * ppl, a ratio's comes from
paired differences, which is the same as its covariance formula, and percentiles interpolate at f * (N - 1).
Ref: tools/perplexity/perplexity.cpp in llama.cpp.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Values = NDArray[np.float64]  # one number per scored token

BLOCK_BYTES = 4 << 20  # rows are taken in blocks that stay in cache between the passes over them


class Shifted(NamedTuple):
    """Logits minus their maximum [n, V], their exponentials [n, V], and the sums of those, float64 [n]."""

    x: Tensor
    e: Tensor
    total: Tensor


def _shifted(logits: Tensor) -> Shifted:
    x = logits - logits.amax(dim=-1, keepdim=True)
    e = x.exp()
    return Shifted(x, e, e.sum(dim=-1).double())


def _nll(s: Shifted, targets: Tensor) -> Tensor:
    return s.total.log() - s.x.gather(1, targets[:, None])[:, 0].double()


def _blocks(logits: Tensor) -> range:
    return range(0, len(logits), max(1, BLOCK_BYTES // (4 * logits.shape[1])))


@torch.inference_mode()
def token_nll(logits: Tensor, targets: Tensor) -> Values:
    """Negative log-likelihood in nats of targets int64 [n] under float32 logits [n, V]; float64 [n]."""
    steps = _blocks(logits)
    parts = [_nll(_shifted(logits[i : i + steps.step]), targets[i : i + steps.step]) for i in steps]
    found: Values = torch.cat(parts).cpu().numpy()
    return found


class Pair(NamedTuple):
    """Two models on the same tokens, one value per token: nll of each, KL(original || candidate), equal top token."""

    original: Values
    candidate: Values
    kld: Values
    same_top: NDArray[np.bool_]


@torch.inference_mode()
def token_pair(original: Tensor, candidate: Tensor, targets: Tensor) -> Pair:
    """Compare float32 logits [n, V] of two models, targets int64 [n]; all on one device."""
    steps = _blocks(original)
    parts = []
    for i in steps:
        here = slice(i, i + steps.step)
        a, b = _shifted(original[here]), _shifted(candidate[here])
        kld = (a.x - b.x).mul_(a.e).sum(dim=-1).double() / a.total - (a.total.log() - b.total.log())
        same = original[here].argmax(dim=-1) == candidate[here].argmax(dim=-1)
        parts.append((_nll(a, targets[here]), _nll(b, targets[here]), kld, same))
    return Pair(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def mean_error(values: Values) -> tuple[float, float]:
    """The mean and its standard error."""
    mean = float(values.mean())
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(float(values.var()) / (len(values) - 1))


def exp_mean_error(values: Values) -> tuple[float, float]:
    """exp of the mean and its standard error to first order: a perplexity from nll, or a ratio from differences."""
    mean, error = mean_error(values)
    value = math.exp(mean) if mean < 700 else math.inf
    return value, value * error


def percentile(values: Values, fraction: float) -> float:
    """The value at `fraction` (0 to 1) of the sorted values, interpolated linearly."""
    return float(np.quantile(values, fraction))
