"""A small decoder of our own that streams: one layer's weights in memory at a time, all windows passing through it.

One file per kind of block. A kind is found by listing this folder: any module with `FAMILIES`, the values of
`config.family` that it computes. It offers:

- `EMBEDDING`, `LAYER` (a prefix with {} for the number), `NORM`, `HEAD`: canonical names;
- `FEEDS`: (norm or linear, linears that it alone feeds), by name within the layer, where scales can move between them;
- `tables(config, length, place)`: whatever depends on positions alone;
- `layer(weights, x, tables, config, tap=None)`: the block, a pure function;
- `norm(x, weight, eps)`: the norm before the head;
- `working_bytes(config, length)`: what `layer` allocates for one window.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType

import torch

from weightsmith.errors import UnsupportedError, UsageError
from weightsmith.evals.forward.decoder import Decoder
from weightsmith.evals.forward.weights import Place
from weightsmith.types import Reader

__all__ = ["Decoder", "kinds", "load"]


@cache
def kinds() -> dict[str, ModuleType]:
    """The block module of every family that can be run."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {family: module for module in modules for family in getattr(module, "FAMILIES", ())}


def load(reader: Reader, *, device: str = "cpu", dtype: torch.dtype = torch.float32, memory: int = 1 << 30) -> Decoder:
    """A decoder over `reader`, which must stay open; reads no weights yet.

    memory: bytes for the working set of one step, and for an output matrix that is kept between calls.
    Raises UnsupportedError (no code for the family), UsageError (no such device).
    """
    config = reader.config
    kind = kinds().get(config.family)
    if kind is None:
        raise UnsupportedError(
            f"family {config.family!r} cannot be run yet", path=reader.path, hint=f"Known: {', '.join(kinds())}."
        )
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} cannot be used: {error}") from error
    return Decoder(reader=reader, config=config, kind=kind, place=Place(where, dtype), memory=memory)
