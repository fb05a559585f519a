"""What a linear can make up for of what was lost before it: the weights to round instead of its own.

Behind quantized layers a linear is given x̂ where the original model's is given x, and where it adds to a residual
stream, r̂ + Q x̂ takes the place of r + W x. Rounding W by the second moments H of x̂ asks for Q x̂ = W x̂, so what was
lost before stays lost, and grows from layer to layer. Of all weights those with

    W + (W C + R) H^-1        H = sum of x̂ x̂^T,  C = sum of (x - x̂) x̂^T,  R = sum of (r - r̂) x̂^T over tokens

come nearest to what the original puts out. For any Q the error is then what no weights can mend plus
tr((V - Q) H (V - Q)^T) with these weights V, so whatever rounds W with H rounds V instead.

H is shrunk and damped as for feedback (`moments`), and only STRENGTH of the change is made. All of it would fit the
rows at hand too well: drift would all but vanish on them and go on elsewhere, and later layers would not see it.

Ref: GPTAQ, Li et al., arXiv 2504.02692 (its "asymmetric calibration"); QEP, Arai and Ichikawa, arXiv 2504.09629 (whose
strength is tunable, too).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from weightsmith.quant.algorithms.moments import factor, shrinkage
from weightsmith.quant.calibration import Moments

DAMP = 0.01
STRENGTH = 0.6  # measured, see docs/LOG.md


@dataclass(slots=True, eq=False)
class Drift:
    """How far the inputs of linears, and the stream that one adds to, are from the original model's.

    size: the linears' in. width: of the stream, 0 if its output goes elsewhere. inputs, stream: C and R of the module's
    text, float32 [in, in] and [width, in].
    """

    size: int
    width: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    inputs: Tensor = field(init=False)
    stream: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = torch.zeros(self.size, self.size, device=self.device)
        self.stream = torch.zeros(self.width, self.size, device=self.device)

    def add(self, original: Tensor, into: Tensor, off: Tensor | None = None) -> None:
        """Count the original's inputs [..., in] beside those there are, and how far the stream is off [..., width]."""
        rows = into.reshape(-1, self.size).float()
        self.inputs.addmm_((original.reshape(-1, self.size).float() - rows).T, rows)
        if off is not None:
            self.stream.addmm_(off.reshape(-1, self.width).float().T, rows)


@torch.no_grad()
def made_up_for(w: Tensor, moments: Moments, drift: Drift) -> Tensor:
    """The weights float32 [out, in] to round instead of w; w itself, in float32, where nothing has drifted.

    Raises what `moments.factor` raises, ValueError (drift of another linear).
    """
    if drift.size != w.shape[1] or drift.width not in (0, len(w)):
        raise ValueError(f"drift of {drift.size} inputs and {drift.width} outputs for a matrix {list(w.shape)}")
    w = w.float()
    wanted = w @ drift.inputs
    if drift.width:
        wanted += drift.stream
    if not bool(wanted.any()):
        return w
    order = torch.arange(w.shape[1], device=w.device)
    a, _ = factor(moments.h, order, DAMP, shrinkage(moments.size, moments.tokens), torch.float32)
    first = torch.linalg.solve_triangular(a.mT, wanted, upper=False, left=False)
    change: Tensor = torch.linalg.solve_triangular(a, first, upper=True, left=False)
    return change.mul_(STRENGTH).add_(w)
