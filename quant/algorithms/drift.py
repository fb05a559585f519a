"""What a linear can make up for of what was lost before it: the weights to round instead of its own.

Behind quantized layers a linear is given x̂ where the original model's is given x, and where it adds to a residual
stream, r̂ + Q x̂ takes the place of r + W x. Rounding W by the second moments H of x̂ asks for Q x̂ = W x̂, so what was
lost before stays lost, and grows from layer to layer. Of all weights those with

    W + (W C + R) H^-1        H = sum of x̂ x̂^T,  C = sum of (x - x̂) x̂^T,  R = sum of (r - r̂) x̂^T over tokens

come nearest to what the original puts out. For any Q the error is then what no weights can mend plus
tr((V - Q) H (V - Q)^T) with these weights V, so whatever rounds W with H rounds V instead. For a linear that adds to a
stream W C + R is summed as a whole, from what W would be off by for every token: half of the products.

H is shrunk and damped as for feedback (`moments`), and at most STRENGTH of the change is made. All of it would fit the
rows at hand too well: drift would all but vanish on them and go on elsewhere, and later layers would not see it. Some
tokens are held out of C and R. Less is made where less brings their outputs nearest to the original's, and nothing
where any of it takes them further away. And what V is rounded to is held against what W itself is rounded to
(`error_of`), so on these tokens no linear is worse for it.

Ref: GPTAQ, Li et al., arXiv 2504.02692 (its "asymmetric calibration"); QEP, Arai and Ichikawa, arXiv 2504.09629 (whose
strength is tunable, too).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from weightsmith.quant.algorithms.moments import factor, shrinkage
from weightsmith.quant.calibration import Moments
from weightsmith.quant.multiply import add_product, linear

DAMP = 0.01
STRENGTH = 0.6  # measured, see docs/LOG.md


@dataclass(slots=True, eq=False)
class Drift:
    """How far the inputs of linears are from the original model's, or what a linear that adds to a stream puts out.

    size: the linears' in. width: of the stream, 0 if their output goes elsewhere. sums: C, or W C + R of the module's
    text, float32 [in, in] or [width, in]. tokens: how many it counts. held: tokens held out, part by part x̂ [tokens,
    in] and what is lost of it, as `add` is given it, float32.
    """

    size: int
    width: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tokens: int = field(init=False, default=0)
    sums: Tensor = field(init=False)
    held: list[tuple[Tensor, Tensor]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.sums = torch.zeros(self.width or self.size, self.size, device=self.device)

    def add(self, lost: Tensor, into: Tensor) -> None:
        """Count tokens: x̂ [..., in], and of it x - x̂ [..., in] or, for a stream, W (x - x̂) + r - r̂ [..., width]."""
        rows = into.reshape(-1, self.size).float()
        self.tokens += len(rows)
        add_product(self.sums, lost.reshape(len(rows), -1).float(), rows)

    def hold(self, lost: Tensor, into: Tensor) -> None:
        """Keep the same of tokens to judge by, which are not counted."""
        rows = into.reshape(-1, self.size).float()
        self.held.append((rows.clone(), lost.reshape(len(rows), -1).float().clone()))


@torch.no_grad()
def made_up_for(w: Tensor, moments: Moments, drift: Drift) -> Tensor:
    """The weights float32 [out, in] to round instead of w; w itself, in float32, where nothing has drifted.

    moments: of all tokens, those held out too. Raises what `moments.factor` raises, ValueError (drift of another
    linear).
    """
    if drift.size != w.shape[1] or drift.width not in (0, len(w)):
        raise ValueError(f"drift of {drift.size} inputs and {drift.width} outputs for a matrix {list(w.shape)}")
    w = w.float()
    wanted = drift.sums if drift.width else w @ drift.sums
    if not bool(wanted.any()):
        return w
    order = torch.arange(w.shape[1], device=w.device)
    a, _ = factor(moments.h, order, DAMP, shrinkage(moments.size, moments.tokens), torch.float32)
    first = torch.linalg.solve_triangular(a.mT, wanted, upper=False, left=False)
    change: Tensor = torch.linalg.solve_triangular(a, first, upper=True, left=False)
    change *= moments.tokens / drift.tokens  # C and R count fewer tokens than H
    share = _share(w, change, drift)
    return change.mul_(share).add_(w) if share else w


@torch.no_grad()
def error_of(w: Tensor, q: Tensor, drift: Drift) -> float:
    """How far what q puts out is from the original's, squared and summed over tokens held out; w: its own weights."""
    total = 0.0
    for into, lost in drift.held:
        off = linear(into, q.float() - w.float()).sub_(_wanted(w, lost, drift))
        total += float(off.square().sum(dtype=torch.float64))
    return total


def _wanted(w: Tensor, lost: Tensor, drift: Drift) -> Tensor:
    """What is lost of the outputs of tokens held out."""
    return lost if drift.width else linear(lost, w.float())


def _share(w: Tensor, change: Tensor, drift: Drift) -> float:
    """How much of `change` is made: the share that is best for tokens held out, within [0, STRENGTH]."""
    along = length = 0.0
    for into, lost in drift.held:
        made, wanted = linear(into, change), _wanted(w, lost, drift)
        along += float((made * wanted).sum(dtype=torch.float64))
        length += float(made.square().sum(dtype=torch.float64))
    return min(STRENGTH, along / length) if along > 0 < length else 0.0
