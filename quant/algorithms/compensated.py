"""Error-compensated encoding into GGUF's block layouts.

1. The layout's own search chooses scales (and a first set of codes) for the original weights, by importances that come
   from H: what an error in a column costs after the others have answered (`moments.answers`).
2. With this grid standing, GPTQ's feedback chooses the codes anew, columns of large moments first (`descent`).
3. Sweeps of descent move halfs, integers and codes, with the full H.
4. A row that would be better off as the plain search by the diagonal of H leaves it (rare) is taken from there.

Linears with the same inputs share one `Inputs`, so H is factorised once for queries, keys and values whatever their
layouts. Losses are tr((W - Q) H (W - Q)^T) with the damped H.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weightsmith.errors import UsageError
from weightsmith.quant import codecs
from weightsmith.quant.algorithms.columns import Columns, of_lattice, to_lattice
from weightsmith.quant.algorithms.descent import Descent, even_bounds, feedback
from weightsmith.quant.algorithms.moments import answers, damped, factor
from weightsmith.quant.algorithms.rtn import check_finite
from weightsmith.types import Packed

ROWS = 1 << 22  # weights compensated at once


@dataclass(slots=True, eq=False)
class Inputs:
    """The second moments of some linears' inputs, made ready. h: damped, float32 [in, in], in the columns' own order.
    answers: float32 [in, in] in `order`, the order of rounding. importance: float32 [in], in the columns' own order.
    diagonal: of H as measured."""

    h: Tensor
    answers: Tensor
    order: Tensor
    importance: Tensor
    diagonal: Tensor

    @classmethod
    def of(cls, h: Tensor, damp: float, shrink: float = 0.0) -> Inputs:
        """Factorise h (float32 [in, in], sums or means, never changed); raises what `damped` raises.

        damp, shrink: see `moments`.
        """
        order = torch.argsort(h.diagonal(), descending=True, stable=True)
        a, share = factor(h, order, damp, shrink, torch.float32)
        found, squares = answers(a)
        importance = torch.empty_like(squares)
        importance[order] = squares
        return cls(damped(h, share, shrink).float(), found, order, importance, h.diagonal().clone())


@torch.no_grad()
def encode(codec: str, w: Tensor, inputs: Inputs, *, sweeps: int = 4, effort: str = "normal") -> tuple[Packed, Tensor]:
    """Pack w (float [out, in]) with error feedback; the packed rows, and the weights they decode to, float32 [out, in].

    On a CPU the result depends on nothing but the arguments and torch's number of threads. Raises what `codecs.encode`
    raises, UsageError (moments of another size, a layout that cannot be opened).
    """
    if codec not in codecs.OPEN:
        raise UsageError(f"{codec} has no codes that feedback could choose", hint=f"Known: {sorted(codecs.OPEN)}.")
    if len(inputs.h) != w.shape[1]:
        raise UsageError(f"second moments {list(inputs.h.shape)} for a matrix {list(w.shape)}")
    check_finite(w)
    step = max(1, ROWS // w.shape[1])
    parts = [
        _encode(codec, w[start : start + step].float(), inputs, sweeps, effort) for start in range(0, len(w), step)
    ]
    return np.concatenate([packed for packed, _ in parts]), torch.cat([q for _, q in parts])


def _encode(codec: str, w: Tensor, inputs: Inputs, sweeps: int, effort: str) -> tuple[Packed, Tensor]:
    rows, wt = w.cpu().numpy(), w.T.contiguous()
    guided = codecs.encode(codec, rows, importance=inputs.importance.cpu().numpy(), effort=effort)
    lattice = codecs.unpack(codec, guided)
    grid, _ = of_lattice(lattice, w.dtype, w.device)
    off = wt[inputs.order]
    labels = grid.places[inputs.order].tolist()
    found = feedback(off, inputs.answers, grid, labels, bounds=even_bounds(len(wt)))
    back = torch.argsort(inputs.order)
    down = _descended(off[back], found[back], grid, inputs, sweeps)
    loss = _losses(wt, down.q, inputs.h)
    made = codecs.pack(codec, to_lattice(lattice, grid, down.codes))
    q = down.q.T.contiguous()

    plain = codecs.encode(codec, rows, importance=inputs.diagonal.cpu().numpy(), effort=effort)
    plain_q = torch.from_numpy(codecs.decode(codec, plain, w.shape[1])).to(w.device)
    worse = loss > _losses(wt, plain_q.T, inputs.h)
    if bool(worse.any()):
        made[worse.cpu().numpy()] = plain[worse.cpu().numpy()]
        q[worse] = plain_q[worse]
    return made, q


def _descended(off: Tensor, codes: Tensor, grid: Columns, inputs: Inputs, sweeps: int) -> Descent:
    down = Descent(inputs.h, grid.weights(codes, grid.places), inputs.h @ off, codes, grid)
    for left in reversed(range(sweeps)):
        down.sweep(last=not left)
    return down


def _losses(wt: Tensor, qt: Tensor, h: Tensor) -> Tensor:
    """Loss of every row, float64 [out]; wt and qt [in, out]."""
    error = wt - qt
    return ((h @ error) * error).double().sum(0)
