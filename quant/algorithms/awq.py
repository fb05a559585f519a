"""AWQ: scale the input channels of a linear up before rounding, where activations are large, and undo it before it.

Multiplying column i of W by s_i and dividing what feeds it by s_i changes nothing but the grid that w_i falls on: a
channel with large inputs gets finer steps. The division is folded into whatever made the inputs: the weight of a norm,
or the rows of the linear before. With H the second moments of the inputs, scaled inputs have H_ij / (s_i s_j), and the
error tr((Ws - Q(Ws)) H' (Ws - Q(Ws))^T) of each candidate is told from H alone, without running the rows again.

Candidates are s_i = a_i^r and a_i^r / c_i^(1 - r), with a the root mean square of the inputs, c the mean share of a
column's weights in their group's largest, and r from 0 (the first: no scaling) to 1 in steps; each is normed to a
geometric mean of its largest and smallest of 1. Rounding in the search is plain, to spanning scales, and of at most
ROWS rows.

Ref: Lin et al., AWQ, arXiv 2306.00978; the second form is AutoAWQ's "duo scaling". Clipping, AWQ's other half, is what
`rtn.search` does for every group.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from weightsmith.errors import UsageError
from weightsmith.quant.algorithms import rtn
from weightsmith.quant.algorithms.moments import loss_of
from weightsmith.quant.algorithms.rtn import Grid

STEPS = 20
ROWS = 256  # of a matrix that candidates are tried on, evenly chosen


def _tied(values: Tensor, heads: int, sharing: int) -> Tensor:
    """Means over the channels that one row of the linear before feeds: [in] to [in / sharing]."""
    return values.view(heads, sharing, -1).mean(dim=1).reshape(-1)


def spread(scales: Tensor, heads: int, sharing: int) -> Tensor:
    """Scales [in / sharing] for all channels [in], where `sharing` neighbouring heads are fed by one of `heads`."""
    return scales.view(heads, 1, -1).expand(heads, sharing, -1).reshape(-1)


def _shares(w: Tensor, grid: Grid) -> Tensor:
    """Mean over rows of |w| relative to its group's largest, [in]."""
    places = grid.places(w.shape[1]).to(w.device)
    size = w.abs()
    largest = torch.zeros(len(w), grid.groups(w.shape[1]), dtype=w.dtype, device=w.device)
    largest.scatter_reduce_(1, places.expand_as(size), size, "amax")
    return (size / largest[:, places].clamp(min=1e-30)).mean(dim=0)


def _candidates(moments: Tensor, shares: Tensor) -> Iterator[Tensor]:
    a, c = moments.clamp(min=1e-12).sqrt(), shares.clamp(min=1e-6)
    for step in range(1, STEPS + 1):
        share = step / STEPS
        yield a.pow(share)
        yield a.pow(share) / c.pow(1 - share)


@torch.no_grad()
def scales_of(w: Tensor, h: Tensor, grid: Grid, *, heads: int = 1, sharing: int = 1) -> Tensor:
    """Scales float [in / sharing] to multiply the columns of w [out, in] by; all ones where nothing is better.

    h: second moments [in, in] of the inputs, never changed. sharing: neighbouring heads of channels (of `heads` x
    sharing) that are fed by the same rows, as under grouped-query attention, and so must share their scales.
    Raises UsageError for sizes that do not fit, IntegrityError for weights that are not finite.
    """
    if h.shape != (w.shape[1], w.shape[1]) or w.shape[1] % (heads * sharing):
        raise UsageError(f"second moments {list(h.shape)}, {heads} x {sharing} heads for a matrix {list(w.shape)}")
    rtn.check_finite(w)
    w = w[:: -(-len(w) // ROWS)]
    diagonal = h.diagonal().to(w.dtype)
    best = torch.ones(w.shape[1] // sharing, dtype=w.dtype, device=w.device)
    least = loss_of(w, rtn.rounded(w, grid), h)
    for found in _candidates(_tied(diagonal, heads, sharing), _tied(_shares(w, grid), heads, sharing)):
        scales = found / (found.max() * found.min()).sqrt()
        if not bool(torch.isfinite(scales).all()):
            continue
        wide = spread(scales, heads, sharing)
        loss = loss_of(w, rtn.rounded(w * wide, grid).div_(wide), h)
        if loss < least:
            best, least = scales, loss
    return best
