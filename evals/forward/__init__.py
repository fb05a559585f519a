"""A small decoder of our own that streams: one layer's weights in memory at a time, all windows passing through it.

One file per kind of block. A kind is found by listing this folder: any module with `FAMILIES`, the values of
`config.family` that it computes. It offers:

- `EMBEDDING`, `LAYER` (a prefix with {} for the number), `NORM`, `HEAD`: canonical names;
- `FEEDS`: (norm or linear, linears that it alone feeds), by name within the layer, where scales can move between them;
- `tables(config, length, place)`: whatever depends on positions alone;
- `layer(weights, x, tables, config, tap=None)`: the block, a pure function; `STAGES`: the same, cut up (`stages`);
- `norm(x, weight, eps)`: the norm before the head;
- `entered(x, config)`: embeddings as they enter the first layer; `scored(products, config)`: the head's as logits;
- `working_bytes(config, length)`: what `layer` allocates for one window;
- `GRAPHS`, where programs that run the family differ: by name, whose rules there are.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace
from functools import cache
from types import ModuleType

import torch

from weightsmith.errors import UnsupportedError, UsageError
from weightsmith.evals.forward.decoder import Decoder
from weightsmith.evals.forward.weights import Place
from weightsmith.types import ModelConfig, Reader

__all__ = ["Decoder", "kinds", "load"]


@cache
def kinds() -> dict[str, ModuleType]:
    """The block module of every family that can be run."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {family: module for module in modules for family in getattr(module, "FAMILIES", ())}


def load(
    reader: Reader,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    memory: int = 1 << 30,
    graph: str | None = None,
) -> Decoder:
    """A decoder over `reader`, which must stay open; reads no weights yet.

    memory: bytes for the working set of one step, and for an output matrix that is kept between calls.
    graph: whose rules to follow, for a family with a `GRAPHS`. Raises UnsupportedError (no code for the family),
    UsageError (no such device or graph).
    """
    config = reader.config
    kind = kinds().get(config.family)
    if kind is None:
        raise UnsupportedError(
            f"family {config.family!r} cannot be run yet", path=reader.path, hint=f"Known: {', '.join(kinds())}."
        )
    if graph is not None:
        config = _following(config, kind, graph)
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} cannot be used: {error}") from error
    return Decoder(reader=reader, config=config, kind=kind, place=Place(where, dtype), memory=memory)


def _following(config: ModelConfig, kind: ModuleType, graph: str) -> ModelConfig:
    """`config`, telling whose rules to follow."""
    known = getattr(kind, "GRAPHS", {})
    if graph not in known or config.grok is None:
        hint = f"Known: {', '.join(known)}." if known else "Leave --graph out."
        raise UsageError(f"family {config.family!r} has no graph {graph!r}", hint=hint)
    return replace(config, grok=replace(config.grok, graph=graph))
