"""Model families: canonical tensors and how each container names and lays them out, one file per family.

A family is found by listing this folder. Each module offers:

- `GGUF_ARCH`: the value of general.architecture it is written under;
- `HF_ARCHITECTURES`: the class names of config.json that it reads; the first is what it writes;
- `MODEL_TYPE`: config.json's model_type;
- `tensors(config)`: every canonical tensor as `name -> shape`, in the order in which they are written;
- `gguf_name(canonical)`: its name in GGUF, and `canonical_name(gguf)`: the way back;
- `is_dropped(name)`: a tensor of either container that carries no weights;
- `permuted_heads(canonical, config)`: heads of a tensor whose rows GGUF interleaves, else None.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType

from weightsmith.errors import UnsupportedError


@cache
def families() -> dict[str, ModuleType]:
    """Every family by its module's name."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def by_name(name: str) -> ModuleType:
    """The family called `name`."""
    return families()[name]


def by_hf(architectures: list[str], model_type: str) -> ModuleType:
    """The family that reads config.json's `architectures`, or its `model_type` where those are absent."""
    for module in families().values():
        if set(architectures) & set(module.HF_ARCHITECTURES) or (not architectures and model_type == module.MODEL_TYPE):
            return module
    found = architectures[0] if architectures else model_type
    raise UnsupportedError(f"unknown model family {found!r}", hint=f"Known families: {', '.join(families())}.")


def by_gguf(arch: str) -> ModuleType:
    """The family that reads GGUF's general.architecture `arch`."""
    found = [module for module in families().values() if arch == module.GGUF_ARCH]
    if not found:
        raise UnsupportedError(f"unknown architecture {arch!r}", hint=f"Known families: {', '.join(families())}.")
    return found[0]
