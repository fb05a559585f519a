"""Experts in GGUF: one tensor holds a matrix of every expert of a layer, one after another.

    blk.N.ffn_{gate,up,down}_exps.weight    [n_experts, out, in], expert E from byte E * nbytes / n_experts on

So an expert's matrix is a run of bytes like any other tensor, and only names and offsets are special. Files from before
April 2024 have a tensor for each expert, blk.N.ffn_{gate,up,down}.E.weight; these are read, never written.

Ref: gguf-py tensor_mapping.py; llama.cpp pull request 6387 (merged experts).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from weightsmith.errors import UsageError
from weightsmith.formats import archs
from weightsmith.quant.blocks import row_nbytes
from weightsmith.types import ModelConfig, TensorInfo

_SUFFIX = "_exps.weight"


def stored_as(
    canonical: str, shape: tuple[int, ...], config: ModelConfig, native: Mapping[str, TensorInfo]
) -> tuple[str, tuple[int, ...]]:
    """Name and shape of the file's tensor that is, or must be, where a canonical one of `shape` lies."""
    family = archs.by_name(config.family)
    stack: str = family.gguf_name(canonical)
    for part, other in getattr(family, "GGUF_ALIASES", {}).items():
        if part in stack and stack not in native:
            stack = stack.replace(part, other)
    expert = archs.expert_of(canonical)
    if expert is not None and stack not in native:
        single = f"{stack.removesuffix(_SUFFIX)}.{expert}.weight"
        if single in native:
            return single, shape
    return stack, archs.stacked_shape(canonical, shape, config)


def part(info: TensorInfo, canonical: str, shape: tuple[int, ...]) -> TensorInfo:
    """The canonical tensor of `shape` in the file's tensor `info`, which is it or a stack of its kind."""
    if info.shape == shape:
        return replace(info, name=canonical)
    nbytes = info.nbytes // info.shape[0]
    offset = info.offset + (archs.expert_of(canonical) or 0) * nbytes
    return TensorInfo(canonical, shape, info.codec, nbytes, info.path, offset)


def stack(infos: Iterable[TensorInfo], config: ModelConfig) -> dict[str, list[TensorInfo]]:
    """Planned canonical tensors by the GGUF tensor that they go to: the experts of a stack in their order."""
    family = archs.by_name(config.family)
    found: dict[str, list[TensorInfo]] = {}
    for info in infos:
        found.setdefault(family.gguf_name(info.name), []).append(info)
    for parts in found.values():
        parts.sort(key=lambda info: archs.expert_of(info.name) or 0)
    return found


def whole(gguf: str, parts: Sequence[TensorInfo], config: ModelConfig) -> TensorInfo:
    """The GGUF tensor of planned `parts`, as `stack` gives them. Raises UsageError for experts of different codecs."""
    first = parts[0]
    other = next((info for info in parts if info.codec != first.codec), None)
    if other is not None:
        raise UsageError(
            f"is planned as {other.codec}, {first.name} as {first.codec}, but GGUF stores them in one tensor, {gguf}",
            tensor=other.name,
            hint="Let the pattern match all experts of a layer.",
        )
    shape = archs.stacked_shape(first.name, first.shape, config)
    return TensorInfo(gguf, shape, first.codec, len(parts) * first.n_rows * row_nbytes(first.codec, first.row_len))
