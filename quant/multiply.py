"""Products of float32 matrices on a processor, by the quicker of the two libraries that PyTorch brings along.

PyTorch multiplies float32 with MKL, which does without AVX-512 on AMD's processors: 104 GFLOPS on a core of a Zen 5
where oneDNN, by which PyTorch multiplies bfloat16, does 235. So there oneDNN is asked for, through the operator that
compiled PyTorch programs call it by. Elsewhere, and for what is small, on a GPU, to be differentiated or in another
precision, PyTorch's own choice stands. Which of the two depends on the processor's name and instructions alone: the
same machine gives the same bytes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

LEAST = 1 << 24  # multiplications; with fewer, the call is what counts


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times w [out, in] transposed, plus bias [out]: [..., out]."""
    operator = _operator(x, w)
    if operator is None or x.numel() * len(w) < LEAST:
        return functional.linear(x, w, bias)
    found: Tensor = operator(x.contiguous(), w, bias, "none", [], "")
    return found


def add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a^T b to sums [m, n], for a [tokens, m] and b [tokens, n]."""
    if _operator(a, b) is None:
        sums.addmm_(a.T, b)
    else:
        sums += linear(a.T, b.T)


def add_square(sums: Tensor, rows: Tensor, strip: int) -> None:
    """Add rows^T rows to sums [n, n], for rows [tokens, n]: what lies above the diagonal, on it, and within squares of
    `strip` columns on it."""
    quick = _operator(rows, rows) is not None
    columns = rows.T.contiguous() if quick else rows.T
    for start in range(0, len(sums), strip):
        here = sums[start : start + strip, start:]
        if quick:
            here += linear(columns[start : start + strip], columns[start:])
        else:
            here.addmm_(columns[start : start + strip], rows[:, start:])


def _operator(x: Tensor, w: Tensor) -> Any:
    """oneDNN's operator, if it is to multiply them; else None."""
    differentiated = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    if x.dtype == w.dtype == torch.float32 and x.device.type == "cpu" and not differentiated:
        return _onednn()
    return None


@cache
def _onednn() -> Any:
    """oneDNN's operator, where it is quicker and there; else None."""
    known = torch.cpu.get_capabilities()
    if not (str(known.get("cpu_name", "")).startswith("AMD") and known.get("avx512_f")):
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)
