"""The ruler: everything that decides what a measurement means, in one value.

Two results can be compared only if they were made with equal rulers on equal text, so the ruler travels with each
result. `memory` and `threads` change how long it takes and never what is measured (beyond float rounding).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from weightsmith.errors import UsageError

# Raised whenever a change of this package moves any reported number by more than float rounding.
METRICS_VERSION = 1


@dataclass(frozen=True, slots=True)
class Convention:
    """How token windows are cut and which predictions count.

    ctx: default window length. bos: the first token of each window is overwritten by BOS if the tokenizer adds one.
    half: only the second half of a window is scored. min_windows: fewer are refused.
    """

    name: str
    ctx: int
    bos: bool
    half: bool
    min_windows: int


CONVENTIONS = {
    "llama.cpp": Convention("llama.cpp", ctx=512, bos=True, half=True, min_windows=2),
    "paper": Convention("paper", ctx=2048, bos=False, half=False, min_windows=1),
}


@dataclass(frozen=True, slots=True)
class Ruler:
    """How to measure. Raises UsageError for values that mean nothing.

    convention: a name in CONVENTIONS. ctx: tokens per window, None for the convention's own. engine: a module of
    `weightsmith.evals.engines` by its NAME. device: of torch. threads: None leaves each engine's default.
    max_windows: stop after so many. memory: bytes for activations and logits (the weights of two layers come on top).
    pre: name of the pre-tokenizer where a checkpoint's own is not known. graph: whose rules the torch engine follows
    where programs that run a family differ (`forward.grok`), None for the vendor's.
    """

    convention: str = "llama.cpp"
    ctx: int | None = None
    engine: str = "torch"
    device: str = "cpu"
    threads: int | None = None
    max_windows: int | None = None
    memory: int = 1 << 30
    pre: str | None = None
    graph: str | None = None

    def __post_init__(self) -> None:
        if self.convention not in CONVENTIONS:
            raise UsageError(f"unknown convention {self.convention!r}", hint=f"Known: {', '.join(CONVENTIONS)}.")
        for field, least in (("ctx", 4), ("threads", 1), ("max_windows", 1), ("memory", 1)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise UsageError(f"{field} is {value}, expected {least} or more")

    @property
    def computed_by(self) -> str:
        """The engine, and the graph that it was told to follow."""
        return f"{self.engine}:{self.graph}" if self.graph else self.engine

    @property
    def length(self) -> int:
        """Tokens per window."""
        return self.ctx if self.ctx is not None else CONVENTIONS[self.convention].ctx


def digest(data: bytes) -> str:
    """SHA-256 as hex, the form in which results name their text and tokens."""
    return hashlib.sha256(data).hexdigest()
