"""How far each tensor of a candidate lies from the original's, as decoded: |B - A| / |A| in Frobenius norms.

Both stream side by side in slabs of whole rows, so memory does not grow with the tensors. Sums are float64.

The error of a weight is not what a model loses by it (that is what drift and KL divergence are for). It says nothing
where a checkpoint has moved factors from one tensor to another, as AWQ does: norms and the linears behind them then
both differ while their product does not. `moved` tells such a checkpoint by its norms, which quantizers leave alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith.evals.forward import weights
from weightsmith.evals.sizes import stored, type_of
from weightsmith.progress import Ticker, progress
from weightsmith.types import Reader

_TINY = 1e-30
_NORMS_DIFFER = 0.01  # storing norms as F16 or BF16 moves them by less


@dataclass(frozen=True, slots=True)
class TensorError:
    """One canonical tensor of a candidate. bits: stored, per weight. error: relative; None where the original has none.

    shape: (out, in) for a matrix. codec: or "4 bit", see `sizes.type_of`.
    """

    name: str
    shape: tuple[int, ...]
    codec: str
    bits: float
    error: float | None


def tensor_errors(candidate: Reader, original: Reader) -> list[TensorError]:
    """Every canonical tensor of the candidate, in its order; raises what reading raises."""
    infos, others, nbytes = candidate.infos(), original.infos(), stored(candidate)
    found = []
    with progress("weights", sum(4 * info.n_weights for info in infos.values())) as ticker:
        for name, info in infos.items():
            other = others.get(name)
            alike = other is not None and other.shape == info.shape
            error = _error(candidate, original, name, ticker) if alike else None
            bits = 8 * nbytes[name] / max(1, info.n_weights)
            found.append(TensorError(name, info.shape, type_of(info, nbytes[name]), bits, error))
    return found


def moved(errors: Sequence[TensorError]) -> bool:
    """True if factors were moved between tensors, so that their errors mean nothing."""
    return any(one.error is not None and one.error > _NORMS_DIFFER for one in errors if len(one.shape) == 1)


@torch.inference_mode()
def _error(candidate: Reader, original: Reader, name: str, ticker: Ticker) -> float:
    apart = norm = 0.0
    for b, a in _side_by_side(candidate, original, name):
        wide = a.float()
        norm += float(wide.square().sum(dtype=torch.float64))
        apart += float((b.float() - wide).square_().sum(dtype=torch.float64))
        ticker.update(4 * a.numel())
    return math.sqrt(apart) / max(math.sqrt(norm), _TINY)


def _side_by_side(candidate: Reader, original: Reader, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    info = original.infos()[name]
    unit = math.lcm(candidate.row_unit(name), original.row_unit(name))
    step = max(1, weights.SLAB // (4 * max(1, info.row_len) * unit)) * unit
    for start in range(0, info.n_rows, step):
        stop = min(start + step, info.n_rows)
        b, a = (
            torch.cat([rows for _, rows in weights.slabs(reader, name, start, stop)])
            for reader in (candidate, original)
        )
        yield b, a
