"""Mixtral's block: Llama's attention, then a mixture of experts.

    x = x + W_o attention(rms(x))
    x = x + experts(rms(x))            `forward.moe`, the shares of the chosen experts made to sum to 1

Scales move between linears (`FEEDS`) in the attention only:
what feeds the experts feeds the router as well, and each expert would want other scales.

Ref: transformers models/mixtral.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn import functional

from weightsmith.evals.forward import llama, moe
from weightsmith.evals.forward.llama import EMBEDDING, HEAD, LAYER, NORM, Tables, entered, norm, scored, tables
from weightsmith.evals.forward.stages import Tap, Weights, through
from weightsmith.types import ModelConfig

__all__ = [
    "EMBEDDING",
    "FAMILIES",
    "FEEDS",
    "HEAD",
    "LAYER",
    "MIXTURE",
    "NORM",
    "STAGES",
    "entered",
    "layer",
    "norm",
    "scored",
]
__all__ += ["tables", "working_bytes"]

FAMILIES = ("mixtral",)
FEEDS = llama.FEEDS[:2]


def working_bytes(config: ModelConfig, length: int) -> int:
    """Upper estimate of what `layer` allocates for one window of `length` tokens in float32."""
    # Every token may choose the same expert; beside its rows there are the mixture and what goes into it.
    return llama.working_bytes(config, length) + 4 * length * (3 * config.hidden_size + 4 * config.n_experts)


def _entering(weights: Weights, x: Tensor, config: ModelConfig) -> Tensor:
    return norm(x, weights["post_attention_layernorm.weight"], config.rms_norm_eps).flatten(0, 1)


def _route(run: moe.Linears, into: Tensor, positions: Tables, config: ModelConfig) -> tuple[Tensor, Tensor]:
    del positions
    return moe.route(run(("block_sparse_moe.gate",), into)[0], config.n_experts_used)


def _activation(positions: Tables) -> moe.Activation:
    del positions
    return partial(functional.silu, inplace=True)


def _closed(
    weights: Weights, run: moe.Linears, made: tuple[Tensor, Tensor, Tensor], positions: Tables, config: ModelConfig
) -> Tensor:
    del weights, run, positions, config
    x, _, mixed = made
    return mixed.view_as(x).add_(x)


MIXTURE = moe.Mixture("block_sparse_moe.", _entering, _route, _activation, _closed, adds=True)
STAGES = (*llama.STAGES[:2], moe.stage(MIXTURE))


def layer(weights: Weights, x: Tensor, positions: Tables, config: ModelConfig, tap: Tap | None = None) -> Tensor:
    """One block: x [B, T, hidden] to a new tensor of the same shape and dtype; see `llama.layer`."""
    return through(STAGES, weights, x, positions, config, tap)
