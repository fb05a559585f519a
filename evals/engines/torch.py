"""The engine that runs every container: our own decoder, streaming layers over groups of windows.

A group is as many windows as the memory budget holds hidden states for; each group streams all weights once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from weightsmith.evals.engines import Tick, cuts
from weightsmith.evals.forward import Decoder, load
from weightsmith.evals.ruler import Ruler
from weightsmith.evals.windows import Windows
from weightsmith.types import Reader

NAME = "torch"


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` threads inside the block (None: as it is)."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def scored_states(decoder: Decoder, windows: Windows, tick: Tick) -> Iterator[Tensor]:
    """Final hidden states [B, last - first, hidden] of the scored predictions, one group of windows at a time."""
    at_once = decoder.windows_at_once(windows.tokens.shape[1])
    for at in range(0, len(windows.tokens), at_once):
        tokens = torch.from_numpy(windows.tokens[at : at + at_once])
        states = decoder.hidden(tokens, on_layer=lambda _, x: tick(len(x)))
        yield states[:, windows.first : windows.last]
        del states  # the next group needs its place


def head(decoder: Decoder, states: Iterator[Tensor], windows: Windows, ruler: Ruler) -> Iterator[Tensor]:
    """Pieces of logits from `scored_states`; where the output matrix is streamed, windows share one pass over it."""
    per_window = windows.last - windows.first
    pieces = cuts(windows, decoder.config.vocab_size, ruler)
    together = decoder.rows_at_once() // per_window
    for group in states:
        if together < 2:
            for window in group:
                for piece in pieces:
                    yield decoder.logits(window[piece])
            continue
        for at in range(0, len(group), together):
            found = decoder.logits(group[at : at + together].flatten(0, 1))
            for window in found.view(-1, per_window, decoder.config.vocab_size):
                for piece in pieces:
                    yield window[piece]


def logits(reader: Reader, windows: Windows, ruler: Ruler, tick: Tick) -> Iterator[Tensor]:
    """Logits of all scored predictions; see `weightsmith.evals.engines`."""
    decoder = load(reader, device=ruler.device, memory=ruler.memory, graph=ruler.graph)
    yield from head(decoder, scored_states(decoder, windows, tick), windows, ruler)
