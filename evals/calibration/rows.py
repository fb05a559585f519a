"""Calibration rows: token windows of a text, cut as llama.cpp cuts them, and a seeded sample of those.

The whole text is tokenized once, one trailing newline stripped; windows are consecutive, the rest is dropped, and BOS
overwrites the first token of each if the tokenizer adds one (`evals.windows`, convention "llama.cpp"; its imatrix tool
cuts in the same way). A sample is drawn without replacement and keeps the order of the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightsmith.errors import UsageError
from weightsmith.evals.ruler import Ruler
from weightsmith.evals.windows import cut, tokenize
from weightsmith.types import Reader


@dataclass(frozen=True, slots=True)
class Options:
    """How to calibrate. Raises UsageError for values that mean nothing.

    rows: windows to draw, None for all there are. ctx: tokens per window. seed: of the draw. device: of torch.
    memory: bytes for what rows carry and for the working set of a step; the moments and the weights of two layers (of
    three where drift is measured) come on top, and a layer's matrices in bfloat16 where rows are multiplied so. spill:
    folder for hidden states beyond it (None: the system's own for temporary files). threads: of torch. pre: name of
    the pre-tokenizer where a checkpoint's own is not known. special: control tokens written in the text are tokens.
    """

    rows: int | None = 128
    ctx: int = 512
    seed: int = 0
    device: str = "cpu"
    memory: int = 1 << 30
    spill: Path | None = None
    threads: int | None = None
    pre: str | None = None
    special: bool = False

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("ctx", 4), ("seed", 0), ("memory", 1), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} is {value}, expected {least} or more")

    def record(self) -> dict[str, Any]:
        """What decides the rows, as plain values."""
        kept = {"rows": self.rows, "ctx": self.ctx, "seed": self.seed, "pre": self.pre}
        return kept | ({"special": True} if self.special else {})


def draw(reader: Reader, text: str, options: Options) -> NDArray[np.int64]:
    """Token windows int64 [rows, ctx] of `text`; fewer than asked for if the text has no more.

    Raises UsageError (text too short), UnsupportedError (no tokenizer), IntegrityError (ids beyond the embedding).
    """
    ruler = Ruler(ctx=options.ctx, pre=options.pre)
    tokens, bos_id = tokenize(reader, text, ruler, special=options.special)
    windows = cut(tokens, ruler, bos_id=bos_id).tokens
    if options.rows is None or options.rows >= len(windows):
        return windows
    chosen = np.random.default_rng(options.seed).choice(len(windows), options.rows, replace=False)
    return windows[np.sort(chosen)]
