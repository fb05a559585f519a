"""A block in stages, so that calibration can stop between its linears and go on from there.

A stage begins with what feeds some linears and ends with what feeds the next: of Llama's block, behind the products of
query, key and value comes attention, and its result is carried to the stage of the output projection. What is carried
are tensors [B, T, width] that keep their first axis: the residual stream, and besides it at most one more.

A tap is called with the names of linears that are fed by one tensor, and that tensor, before any of them computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from weightsmith.quant.multiply import linear
from weightsmith.types import ModelConfig

Weights = Mapping[str, Tensor]
Tap = Callable[[tuple[str, ...], Tensor], None]  # (linears by name within the layer, their input [..., in])
Carried = tuple[Tensor, ...]


class Stage(NamedTuple):
    """run(weights, carried, tables, config, tap): what is carried on. linears: its own, all fed by one tensor; none
    are named where there are several groups of them, which only the last stage of a block may have. adds: what its one
    linear puts out is added to the residual stream as it is."""

    run: Callable[[Weights, Carried, Any, ModelConfig, Tap | None], Carried]
    linears: tuple[str, ...] = ()
    adds: bool = False


def through(
    stages: tuple[Stage, ...], weights: Weights, x: Tensor, tables: Any, config: ModelConfig, tap: Tap | None
) -> Tensor:
    """All stages in turn: x [B, T, hidden] to a new tensor of the same shape and dtype."""
    carried: Carried = (x,)
    for stage in stages:
        carried = stage.run(weights, carried, tables, config, tap)
    return carried[0]


def linears(weights: Weights, tap: Tap | None, names: tuple[str, ...], into: Tensor) -> list[Tensor]:
    """The linears `names` of `into` [..., in], of its dtype; biases are used where present.

    Where matrices have another dtype, the products are computed in that.
    """
    if tap is not None:
        tap(names, into)
    matrices = [weights[f"{name}.weight"] for name in names]
    if matrices[0].dtype == into.dtype:
        biases = [weights.get(f"{name}.bias") for name in names]
        return [linear(into, matrix, bias) for matrix, bias in zip(matrices, biases, strict=True)]
    rounded = into.to(matrices[0].dtype)
    found = [linear(rounded, matrix).to(into.dtype) for matrix in matrices]
    for name, product in zip(names, found, strict=True):
        if f"{name}.bias" in weights:
            product.add_(weights[f"{name}.bias"])
    return found
