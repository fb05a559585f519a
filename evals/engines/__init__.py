"""Engines: what turns token windows into logits, one file per engine.

An engine is found by listing this folder. Each module offers:

- `NAME`: as given to `--engine`;
- `logits(reader, windows, ruler, tick) -> Iterator[Tensor]`: float32 logits [n, V] of the scored predictions, window
  by window in order, each window in the pieces of `cuts`. `tick(n)` counts finished
  (layer, window) pairs.

All engines cut alike, so two iterators of any engines run in lock step with `zip`, and no more than a few pieces of
logits exist at a time.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from types import ModuleType

from weightsmith.errors import UsageError
from weightsmith.evals.ruler import Ruler
from weightsmith.evals.windows import Windows

Tick = Callable[[int], object]


@cache
def engines() -> dict[str, ModuleType]:
    """Every engine by name; listing them imports neither llama.cpp nor a model."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {module.NAME: module for module in modules}


def by_name(name: str) -> ModuleType:
    """The engine called `name`; UsageError if there is none."""
    found = engines().get(name)
    if found is None:
        raise UsageError(f"unknown engine {name!r}", hint=f"Known: {', '.join(engines())}.")
    return found


def cuts(windows: Windows, vocab_size: int, ruler: Ruler) -> list[slice]:
    """How the scored predictions of each window are cut, as slices of [0, last - first).

    A piece of logits takes at most an eighth of the memory budget.
    """
    count = windows.last - windows.first
    rows = max(1, ruler.memory // 8 // (4 * vocab_size))
    return [slice(at, min(at + rows, count)) for at in range(0, count, rows)]
