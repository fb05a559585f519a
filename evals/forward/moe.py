"""A mixture of experts, for the blocks that have one: tokens sorted by expert, so that only chosen experts compute.

    p = softmax(W_router n), in float32;  the k greatest are chosen, and where the family says so divided by their sum
    y = sum over the chosen e of p_e * W2_e (act(W1_e n) * W3_e n)

Each expert sees the rows of its own tokens as one matrix [tokens, hidden], and so does calibration. An expert that no
token chose is not evaluated.

Ref: transformers models/mixtral; arXiv 2401.04088.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Linears = Callable[[tuple[str, ...], Tensor], list[Tensor]]  # (names within the layer, input) -> outputs
Activation = Callable[[Tensor], Tensor]


def route(logits: Tensor, used: int, *, renormalise: bool = True) -> tuple[Tensor, Tensor]:
    """Shares float32 and numbers int64 of the `used` best experts of each token, both [tokens, used].

    logits: the router's [tokens, n_experts].
    """
    shares, chosen = torch.softmax(logits.float(), dim=-1).topk(used, dim=-1)
    return (shares / shares.sum(dim=-1, keepdim=True) if renormalise else shares), chosen


def mix(x: Tensor, shares: Tensor, chosen: Tensor, linears: Linears, act: Activation, *, prefix: str = "") -> Tensor:
    """What the chosen experts make of x [tokens, hidden]: a new tensor of the same shape and dtype.

    linears: evaluates `{prefix}experts.E.w1` and `.w3` together, and `.w2`. act: may work in place.
    """
    mixed = torch.zeros_like(x)
    for expert in torch.unique(chosen).tolist():
        tokens, place = torch.where(chosen == expert)
        name = f"{prefix}experts.{expert}."
        gate, up = linears((f"{name}w1", f"{name}w3"), x[tokens])
        (out,) = linears((f"{name}w2",), act(gate).mul_(up))
        mixed.index_add_(0, tokens, out * shares[tokens, place, None].to(out.dtype))
    return mixed
