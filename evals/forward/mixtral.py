"""Mixtral's block: Llama's attention, then a mixture of experts.

    x = x + W_o attention(rms(x))
    x = x + experts(rms(x))            `forward.moe`, the shares of the chosen experts made to sum to 1

All experts of a layer are in memory while it computes. Scales move between linears (`FEEDS`) in the attention only:
what feeds the experts feeds the router as well, and each expert would want other scales.

Ref: transformers models/mixtral.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn import functional

from weightsmith.evals.forward import llama, moe
from weightsmith.evals.forward.llama import EMBEDDING, HEAD, LAYER, NORM, Tables, entered, norm, scored, tables
from weightsmith.evals.forward.stages import Carried, Stage, Tap, Weights, linears, through
from weightsmith.types import ModelConfig

__all__ = ["EMBEDDING", "FAMILIES", "FEEDS", "HEAD", "LAYER", "NORM", "STAGES", "entered", "layer", "norm", "scored"]
__all__ += ["tables", "working_bytes"]

FAMILIES = ("mixtral",)
FEEDS = llama.FEEDS[:2]

_silu = partial(functional.silu, inplace=True)


def working_bytes(config: ModelConfig, length: int) -> int:
    """Upper estimate of what `layer` allocates for one window of `length` tokens in float32."""
    # Every token may choose the same expert; beside its rows there are the mixture and what goes into it.
    return llama.working_bytes(config, length) + 4 * length * (3 * config.hidden_size + 4 * config.n_experts)


def _mixture(weights: Weights, carried: Carried, positions: Tables, config: ModelConfig, tap: Tap | None) -> Carried:
    """x behind attention to x behind the experts."""
    del positions
    (x,) = carried
    normed = norm(x, weights["post_attention_layernorm.weight"], config.rms_norm_eps).flatten(0, 1)
    run = partial(linears, weights, tap)
    shares, chosen = moe.route(run(("block_sparse_moe.gate",), normed)[0], config.n_experts_used)
    return (moe.mix(normed, shares, chosen, run, _silu, prefix="block_sparse_moe.").view_as(x).add_(x),)


STAGES = (*llama.STAGES[:2], Stage(_mixture))


def layer(weights: Weights, x: Tensor, positions: Tables, config: ModelConfig, tap: Tap | None = None) -> Tensor:
    """One block: x [B, T, hidden] to a new tensor of the same shape and dtype; see `llama.layer`."""
    return through(STAGES, weights, x, positions, config, tap)
