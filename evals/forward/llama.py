"""The block of dense Llama and Mistral, as a pure function of weights, input and position tables.

    x = x + W_o attention(rms(x))        queries and keys rotated, each key head shared by n_heads / n_kv_heads queries
    x = x + W_down (silu(W_gate n) * W_up n),    n = rms(x)

rms(x) = x / sqrt(mean(x^2) + eps) * weight, the mean in float32. Scores are scaled by 1/sqrt(head_dim). A sliding
window of W lets position i see j with i - W < j <= i.

Nothing is kept between calls, so that blocks can be streamed, two models run in lock step, and calibration see every
linear's input (`tap`). `weights` may be any mapping: one that reads on access works too.

Ref: transformers models/llama and models/mistral; RMSNorm arXiv 1910.07467, SwiGLU arXiv 2002.05202, GQA
arXiv 2305.13245.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from weightsmith.evals.forward import rope
from weightsmith.evals.forward.stages import Carried, Stage, Tap, Weights, linears, through
from weightsmith.evals.forward.weights import Place
from weightsmith.types import ModelConfig

FAMILIES = ("llama", "mistral")
EMBEDDING = "model.embed_tokens.weight"
LAYER = "model.layers.{}."
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# What feeds which linears, channel by channel: a factor can move between the two without changing the block. The
# values that feed o_proj are shared by the queries of a group.
FEEDS = (
    ("input_layernorm", QKV),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)


@dataclass(frozen=True, slots=True)
class Tables:
    """What depends on positions alone: rotary cosines and sines [T, head_dim]; seen: bool [T, T], None if causal.

    past: keys and values of earlier positions, where a text is written step by step; `seen` is [1, all positions] then.
    """

    cos: Tensor
    sin: Tensor
    seen: Tensor | None
    past: Past | None = None

    def at(self, position: int, past: Past) -> Tables:
        """The tables of one position behind `past`."""
        here = slice(position, position + 1)
        seen = None if self.seen is None else self.seen[here, : position + 1]
        return Tables(self.cos[here], self.sin[here], seen, past)


class Past(Protocol):
    """What keeps keys and values between calls."""

    def join(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep key and value [B, heads, n, head_dim] of the next n positions; return all so far."""


def tables(config: ModelConfig, length: int, place: Place) -> Tables:
    """Position tables for windows of `length` tokens."""
    cos, sin = rope.tables(config, length, place)
    window = config.sliding_window
    if window is None or window >= length:
        return Tables(cos, sin, None)
    ones = torch.ones(length, length, dtype=torch.bool, device=place.device)
    return Tables(cos, sin, ones.tril().triu(1 - window))


def working_bytes(config: ModelConfig, length: int) -> int:
    """Upper estimate of what `layer` allocates for one window of `length` tokens in float32."""
    attention = 4 * config.n_heads * config.head_dim + 4 * config.n_kv_heads * config.head_dim
    return 4 * length * (3 * config.hidden_size + max(attention, 3 * config.intermediate_size))


def entered(x: Tensor, config: ModelConfig) -> Tensor:
    """Embeddings as they enter the first layer."""
    del config
    return x


def scored(logits: Tensor, config: ModelConfig) -> Tensor:
    """Products with the output matrix as logits."""
    del config
    return logits


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, computed in float32; a new tensor of x's dtype."""
    wide = x.float()
    scale = wide.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight)


def mixed(weights: Weights, carried: Carried, positions: Tables, config: ModelConfig, tap: Tap | None) -> Carried:
    """x to x and what attention makes of it, before the output projection."""
    (x,) = carried

    def heads(product: Tensor, count: int) -> Tensor:
        return product.view(*x.shape[:2], count, config.head_dim).transpose(1, 2)

    normed = norm(x, weights["input_layernorm.weight"], config.rms_norm_eps)
    query, key, value = linears(weights, tap, QKV, normed)
    query = rope.rotate(heads(query, config.n_heads), positions.cos, positions.sin)
    key = rope.rotate(heads(key, config.n_kv_heads), positions.cos, positions.sin)
    value = heads(value, config.n_kv_heads)
    if positions.past is not None:
        key, value = positions.past.join(key, value)
    found = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=positions.seen,
        is_causal=positions.seen is None and positions.past is None,
        enable_gqa=config.n_heads != config.n_kv_heads,
    )
    return x, found.transpose(1, 2).flatten(2)


def joined(weights: Weights, carried: Carried, positions: Tables, config: ModelConfig, tap: Tap | None) -> Carried:
    """x and what attention made of it to x behind the first half of the block."""
    del positions, config
    x, into = carried
    (found,) = linears(weights, tap, ("self_attn.o_proj",), into)
    return (found.add_(x),)


def _opened(weights: Weights, carried: Carried, positions: Tables, config: ModelConfig, tap: Tap | None) -> Carried:
    """x to x and what feeds down_proj."""
    del positions
    (x,) = carried
    normed = norm(x, weights["post_attention_layernorm.weight"], config.rms_norm_eps)
    gate, up = linears(weights, tap, ("mlp.gate_proj", "mlp.up_proj"), normed)
    return x, functional.silu(gate, inplace=True).mul_(up)


def _closed(weights: Weights, carried: Carried, positions: Tables, config: ModelConfig, tap: Tap | None) -> Carried:
    """x and what feeds down_proj to x behind the block."""
    del positions, config
    x, into = carried
    (found,) = linears(weights, tap, ("mlp.down_proj",), into)
    return (found.add_(x),)


STAGES = (
    Stage(mixed, QKV),
    Stage(joined, ("self_attn.o_proj",), adds=True),
    Stage(_opened, ("mlp.gate_proj", "mlp.up_proj")),
    Stage(_closed, ("mlp.down_proj",), adds=True),
)


def layer(weights: Weights, x: Tensor, positions: Tables, config: ModelConfig, tap: Tap | None = None) -> Tensor:
    """One block: x [B, T, hidden] to a new tensor of the same shape and dtype.

    weights: by name within the layer ("self_attn.q_proj.weight"), matrices [out, in]; a bias is used where present.
    """
    return through(STAGES, weights, x, positions, config, tap)
