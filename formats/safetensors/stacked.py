"""Stacked experts, as transformers 5 holds them in memory and as some tools save them.

    model.layers.N.mlp.experts.gate_up_proj    [n_experts, 2 * ffn, hidden]: of each expert w1, then w3
    model.layers.N.mlp.experts.down_proj       [n_experts, hidden, ffn]: of each expert w2
    model.layers.N.mlp.gate.weight             the router

Published files hold one matrix for each expert under the canonical name. Either way an expert's matrix is a run of
whole rows, so cutting a stack costs nothing but arithmetic on offsets.

Ref: transformers 5 models/mixtral/modeling_mixtral.py and conversion_mapping.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from weightsmith.errors import IntegrityError
from weightsmith.types import ModelConfig, TensorInfo

_STACK = re.compile(r"(model\.layers\.\d+)\.mlp\.(?:experts\.(gate_up_proj|down_proj)|gate\.weight)")


def cut(stored: Mapping[str, TensorInfo], config: ModelConfig) -> dict[str, TensorInfo]:
    """`stored` tensors with every stack replaced by its experts' matrices under canonical names.

    Raises IntegrityError for a stack of another shape than the model's, and for an expert that is stored twice.
    """
    found: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        match = _STACK.fullmatch(name)
        parts = [info] if match is None else _parts(match, info, config)
        for part in parts:
            if part.name in found:
                raise IntegrityError("is stored twice, by itself and in a stack", path=info.path, tensor=part.name)
            found[part.name] = part
    return found


def _parts(match: re.Match[str], info: TensorInfo, config: ModelConfig) -> Iterator[TensorInfo]:
    moe = f"{match[1]}.block_sparse_moe"
    hidden, ffn, count = config.hidden_size, config.intermediate_size, config.n_experts
    if match[2] is None:
        yield replace(info, name=f"{moe}.gate.weight")
        return
    up = match[2] == "gate_up_proj"
    names, rows, width = (("w1", "w3"), ffn, hidden) if up else (("w2",), hidden, ffn)
    if info.shape != (count, len(names) * rows, width):
        expected = [count, len(names) * rows, width]
        raise IntegrityError(f"shape {list(info.shape)}, expected {expected}", path=info.path, tensor=info.name)
    nbytes = rows * info.row_bytes
    for index in range(count * len(names)):
        expert, which = divmod(index, len(names))
        name = f"{moe}.experts.{expert}.{names[which]}.weight"
        yield TensorInfo(name, (rows, width), info.codec, nbytes, info.path, info.offset + index * nbytes)
