"""Second moments of a linear's input: what calibration knows about it.

    H = sum over tokens of x x^T        [in, in], float32
    d = sum over tokens of x^2          [in], float64: its diagonal, and the only part that an imatrix keeps

The error that rounding W to Q causes in the output is tr((W - Q) H (W - Q)^T), summed over tokens, so H decides how
much each weight matters and which weights can make up for another (GPTQ, arXiv 2210.17323). Sums are kept instead of
means: they add up across calls, texts and machines, and whoever needs a mean divides by `tokens`.

float32 is enough for H, because each call adds a product that was itself summed over thousands of tokens and damping
drowns what is lost; the diagonal is summed in float64, because imatrices of millions of tokens are merged.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from weightsmith.errors import IntegrityError
from weightsmith.quant.multiply import add_square

MIRROR = 1024  # columns mirrored at a time
STRIP = 256  # rows of H in one product, which leaves out what lies before their first column


@dataclass(slots=True, eq=False)
class Moments:
    """Moments of one linear's input, growing with `add`.

    size: the linear's in. full: keep H too, else the diagonal only. tokens: rows added. device: where H lies.
    """

    size: int
    full: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tokens: int = 0
    diagonal: Tensor = field(init=False)
    _h: Tensor | None = field(init=False, default=None)  # of its lower half only the diagonal squares are kept up

    def __post_init__(self) -> None:
        self.diagonal = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        if self.full:
            self._h = torch.zeros(self.size, self.size, device=self.device)

    def add(self, x: Tensor) -> None:
        """Count inputs x [..., in] of any float dtype."""
        rows = x.reshape(-1, self.size).float()
        self.tokens += len(rows)
        # Blocks of rows in float32, their sums in float64: no float64 copy of all activations.
        for start in range(0, len(rows), 256):
            self.diagonal += rows[start : start + 256].square().sum(dim=0).double()
        if self._h is not None:
            add_square(self._h, rows, STRIP)

    def merge(self, other: Moments) -> None:
        """Count what `other`, of the same size and with H, counted."""
        self.tokens += other.tokens
        self.diagonal += other.diagonal
        if self._h is not None:
            self._h += other.h

    def fill(self, like: Moments | None, tokens: int) -> None:
        """Count `tokens` more of the mean of `like`; or, without one, of channels that are independent of each other
        and as strong as these are on average (1 if nothing was counted)."""
        if like is not None and like.tokens:
            self.diagonal += like.diagonal * (tokens / like.tokens)
            if self._h is not None:
                self._h.add_(like.h, alpha=tokens / like.tokens)
        else:
            energy = float(self.diagonal.mean()) / self.tokens if self.tokens else 0.0
            added = tokens * (energy or 1.0)
            self.diagonal += added
            if self._h is not None:
                self._h.diagonal().add_(added)
        self.tokens += tokens

    def divide(self, scales: Tensor) -> None:
        """As if every input had been divided by scales [in], all above 0."""
        by = scales.to(self.diagonal.device)
        self.diagonal /= by.double().square()
        if self._h is not None:
            self._h /= by.float()
            self._h /= by.float()[:, None]

    @property
    def h(self) -> Tensor:
        """H, float32 [in, in], exactly symmetric, not a copy; only where `full`."""
        if self._h is None:
            raise ValueError("only the diagonal was kept")
        for start in range(0, self.size, MIRROR):  # in place: H of a wide linear is gigabytes
            stop = min(start + MIRROR, self.size)
            square = self._h[start:stop, start:stop]
            square.copy_(torch.triu(square) + torch.triu(square, 1).T)
            self._h[stop:, start:stop] = self._h[start:stop, stop:].T
        return self._h

    def check(self, name: str) -> None:
        """Raise IntegrityError, naming tensor `name`, if an input was NaN or Inf or none was seen."""
        if not self.tokens:
            raise IntegrityError("no calibration token reached it", tensor=name)
        if not torch.isfinite(self.diagonal).all():
            raise IntegrityError(
                "its calibration inputs are not finite",
                tensor=name,
                hint="The weights before it hold NaN or Inf, or overflow the computing precision.",
            )
