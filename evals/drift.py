"""How far hidden states move away from the original's on their way through the layers.

With a(t) the original's state at a scored position t after a layer, b(t) the candidate's and n scored positions:

    drift = 1/n sum |b(t) - a(t)| / |a(t)|        Euclidean norms over the hidden size

Every position counts alike. One ratio of two sums would belong to a handful of positions instead: the first token of a
text has norms hundreds of times those of the others in most trained models ("massive activations", arXiv 2402.17762).

A layer's own part is the same number for its outputs on equal inputs, the original's: what this layer alone loses.
Drift is what all layers up to it have lost together, with their errors cancelling or growing on the way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = 1e-30  # a state of zeros that stays zeros has not moved


@dataclass(frozen=True, slots=True)
class Drift:
    """Mean relative error of hidden states, 0 for none. layers: after each layer. final: behind the last norm.

    own: what each layer alone adds, on the original's inputs; None where it was not measured.
    """

    layers: tuple[float, ...]
    final: float
    own: tuple[float, ...] | None = None


class Meter:
    """Sums of relative errors at `places` (layers, say), filled group by group."""

    def __init__(self, places: int) -> None:
        self._sums = [0.0] * places
        self._counts = [0] * places

    @torch.inference_mode()
    def add(self, place: int, changed: Tensor, original: Tensor) -> None:
        """Count states [B, S, hidden] of a model beside the original's of the same positions."""
        for b, a in zip(changed, original, strict=True):  # a window at a time, which bounds the difference's memory
            wide = a.float()
            error = torch.linalg.vector_norm(b.float() - wide, dim=-1)
            relative = error / torch.linalg.vector_norm(wide, dim=-1).clamp_min(_TINY)
            self._sums[place] += float(relative.double().sum())
        self._counts[place] += changed.shape[0] * changed.shape[1]

    def means(self) -> tuple[float, ...]:
        """The mean at each place."""
        return tuple(total / max(1, count) for total, count in zip(self._sums, self._counts, strict=True))
