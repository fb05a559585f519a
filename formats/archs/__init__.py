"""Model families: canonical tensors and how each container names and lays them out, one file per family.

A family is found by listing this folder. Each module offers:

- `GGUF_ARCH`: the value of general.architecture it is written under;
- `HAS_EXPERTS`: whether its layers are mixtures of experts, which two families of one arch differ in;
- `HF_ARCHITECTURES`: the class names of config.json that it reads; the first is what it writes;
- `MODEL_TYPE`: config.json's model_type;
- `tensors(config)`: every canonical tensor as `name -> shape`, in the order in which they are written;
- `gguf_name(canonical)`: its name in GGUF; the experts of a layer share one, because GGUF stacks them;
- `is_dropped(name)`: a tensor of either container that carries no weights;
- `permuted_heads(canonical, config)`: heads of a tensor whose rows GGUF interleaves, else None;
- `hf_name(name)`, if published checkpoints have names of their own: the canonical one, or `name` itself;
- `GGUF_ALIASES`, if files have two names for a tensor: the part of it that is written to the one that is read as well.

Canonically every expert is a matrix of its own, (out, in), and its name holds `.experts.E.`. GGUF has one tensor
(n_experts, out, in) for a layer's w1, one for its w2, one for its w3: expert E is rows E * out to (E + 1) * out.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from types import ModuleType

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.types import ModelConfig, TensorInfo

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


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


def by_gguf(arch: str, *, experts: bool = False) -> ModuleType:
    """The family that reads GGUF's general.architecture `arch`; experts: whether the file says that it has some."""
    found = [module for module in families().values() if arch == module.GGUF_ARCH]
    if not found:
        raise UnsupportedError(f"unknown architecture {arch!r}", hint=f"Known families: {', '.join(families())}.")
    fitting = [module for module in found if experts == module.HAS_EXPERTS]
    if not fitting:
        kind = "with" if experts else "without"
        raise UnsupportedError(f"architecture {arch!r} {kind} experts is not known")
    return fitting[0]


def renamed(family: ModuleType, stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Tensors of a safetensors checkpoint under canonical names; IntegrityError for two of one name."""
    rename = getattr(family, "hf_name", None)
    if rename is None:
        return dict(stored)
    found: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        canonical = rename(name)
        if canonical in found:
            raise IntegrityError(f"the same as {found[canonical].name}", path=info.path, tensor=name)
        found[canonical] = replace(info, name=canonical)
    return found


def expert_of(canonical: str) -> int | None:
    """Which of its layer's experts a tensor belongs to; None for all that is no expert's."""
    found = _EXPERT.search(canonical)
    return int(found[1]) if found else None


def stacked_shape(canonical: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    """The shape that GGUF gives the tensor which holds a canonical one of `shape`."""
    return shape if expert_of(canonical) is None else (config.n_experts, *shape)
