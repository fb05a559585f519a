"""Grok's block, and the ways in which the programs that run it differ.

    x = E[token] * embedding_scale
    x = x + rms(W_o attention(rms(x)))                      a norm before, and one after, each half
    x = x + rms(experts(n)),  n = rms(x)                    Grok-2: (experts(n) + mlp(n)) / sqrt(2)
    logits = cap(W rms(x) * logit_scale)

    attention: s = cap(attention_scale q.k, attention_cap) * sharpness(position), softmax, values
    experts:   sum over the top 2 of r_e W2_e (gelu(W1_e n) * W3_e n),  r = softmax(cap(W_gate n, router_cap))
    cap(x, c) = c tanh(x / c);  sharpness(p) = log2(p) / log2(L) behind position L = temperature_length, else 1

Queries and keys turn as halves. What follows differs from program to program; `GRAPHS` names whose rules they are:

| | xai | sglang | llamacpp | hpcai |
|---|---|---|---|---|
| weights of the chosen experts add up to 1 | no | no | yes | no |
| router capped | no | yes | no | no |
| sharpness | no | yes | no | no |
| YaRN stretches cosines and sines by 1 + 0.1 ln(factor) | no | no | yes | no |
| GELU | tanh | tanh | tanh | erf |

"xai" is Grok-1's own code in JAX and the default for it, "sglang" the code that xAI's model card runs Grok-2 with and
the default for that (told by its dense branch), "llamacpp" what a GGUF meets. For Grok-1 xai and llamacpp agree up to
rounding: its experts' sum is normed at once, which undoes any factor. With the dense branch they do not. `Grok.graph`
overrides.

Ref: model.py of xai-org/grok-1; sglang models/grok.py and layers/moe/router.py; llama.cpp src/models/grok.cpp and
src/llama-graph.cpp; modeling_grok_1.py of hpcai-tech/grok-1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from weightsmith.errors import UsageError
from weightsmith.evals.forward import llama, moe, rope
from weightsmith.evals.forward.llama import norm
from weightsmith.evals.forward.stages import Carried, Stage, Tap, Weights, linears, through
from weightsmith.evals.forward.weights import Place
from weightsmith.types import Grok, ModelConfig

__all__ = ["EMBEDDING", "FAMILIES", "FEEDS", "GRAPHS", "HEAD", "LAYER", "NORM", "STAGES", "Rules", "Tables", "entered"]
__all__ += ["layer", "norm", "rules", "scored", "tables", "working_bytes"]

FAMILIES = ("grok",)
EMBEDDING = "model.embed_tokens.weight"
LAYER = "model.layers.{}."
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
FEEDS = (
    ("pre_attn_norm", llama.QKV),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
)
QUERIES = 256  # positions whose scores exist at once


@dataclass(frozen=True, slots=True)
class Rules:
    """What a program does where programs differ; see the table above."""

    normalized: bool = False
    router_capped: bool = False
    sharpened: bool = False
    stretched: bool = False
    gelu: Literal["tanh", "none"] = "tanh"


GRAPHS = {
    "xai": Rules(),
    "sglang": Rules(router_capped=True, sharpened=True),
    "llamacpp": Rules(normalized=True, stretched=True),
    "hpcai": Rules(gelu="none"),
}


@dataclass(frozen=True, slots=True)
class Tables:
    """Rotary cosines and sines [T, head_dim]; sharpness [T], None where it is 1; the rules that are followed."""

    cos: Tensor
    sin: Tensor
    sharpness: Tensor | None
    rules: Rules


def rules(config: ModelConfig) -> Rules:
    """The rules to follow. UsageError for a graph that is not known."""
    grok = traits(config)
    name = grok.graph or ("sglang" if grok.dense_size else "xai")
    if name not in GRAPHS:
        raise UsageError(f"unknown graph {name!r} of Grok", hint=f"Known: {', '.join(GRAPHS)}.")
    return GRAPHS[name]


def traits(config: ModelConfig) -> Grok:
    """The part of the configuration that only Grok has."""
    if config.grok is None:
        raise ValueError("a configuration of Grok without its traits")
    return config.grok


def tables(config: ModelConfig, length: int, place: Place) -> Tables:
    """Position tables for windows of `length` tokens."""
    cos, sin = rope.tables(config, length, place)
    followed, after = rules(config), traits(config).temperature_length
    scaling = config.rope_scaling
    if followed.stretched and scaling is not None and scaling.kind == "yarn":
        stretch = 1 + 0.1 * math.log(scaling.factor)
        cos, sin = cos * stretch, sin * stretch
    if not followed.sharpened or not after or after >= length:
        return Tables(cos, sin, None, followed)
    positions = torch.arange(length, dtype=torch.float64).clamp(min=after)
    return Tables(cos, sin, (positions.log2() / math.log2(after)).to(*place), followed)


def working_bytes(config: ModelConfig, length: int) -> int:
    """Upper estimate of what `layer` allocates for one window of `length` tokens in float32."""
    attention = 4 * (config.n_heads + config.n_kv_heads) * config.head_dim
    scores = 3 * config.n_heads * min(length, QUERIES)
    width = max(config.intermediate_size, traits(config).dense_size)
    return 4 * length * (4 * config.hidden_size + max(attention + scores, 3 * width))


def entered(x: Tensor, config: ModelConfig) -> Tensor:
    """Embeddings as they enter the first layer."""
    return x * traits(config).embedding_scale


def scored(logits: Tensor, config: ModelConfig) -> Tensor:
    """Products with the output matrix as logits."""
    grok = traits(config)
    return capped(logits * grok.logit_scale, grok.logit_cap)


def capped(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap); x where there is no cap."""
    return torch.tanh(x / cap) * cap if cap else x


def _normed(weights: Weights, config: ModelConfig, name: str, of: Tensor) -> Tensor:
    return norm(of, weights[f"{name}.weight"], config.rms_norm_eps)


def _mixed(weights: Weights, carried: Carried, positions: Tables, config: ModelConfig, tap: Tap | None) -> Carried:
    """x to x and what attention makes of it, before the output projection."""
    (x,) = carried
    query, key, value = (
        found.view(*x.shape[:2], -1, config.head_dim).transpose(1, 2)
        for found in linears(weights, tap, llama.QKV, _normed(weights, config, "pre_attn_norm", x))
    )
    query, key = (rope.rotate(side, positions.cos, positions.sin) for side in (query, key))
    return x, attention(query, key, value, positions.sharpness, traits(config)).transpose(1, 2).flatten(2)


def _joined(weights: Weights, carried: Carried, positions: Tables, config: ModelConfig, tap: Tap | None) -> Carried:
    """x and what attention made of it to x behind the first half of the block."""
    del positions
    x, into = carried
    (found,) = linears(weights, tap, ("self_attn.o_proj",), into)
    return (_normed(weights, config, "post_attn_norm", found).add_(x),)


def _entering(weights: Weights, x: Tensor, config: ModelConfig) -> Tensor:
    return _normed(weights, config, "pre_moe_norm", x).flatten(0, 1)


def _route(run: moe.Linears, into: Tensor, positions: Tables, config: ModelConfig) -> tuple[Tensor, Tensor]:
    (products,) = run(("block_sparse_moe.gate",), into)
    if positions.rules.router_capped:
        products = capped(products, traits(config).router_cap)
    return moe.route(products, config.n_experts_used, renormalise=positions.rules.normalized)


def _activation(positions: Tables) -> moe.Activation:
    return partial(functional.gelu, approximate=positions.rules.gelu)


def _closed(
    weights: Weights, run: moe.Linears, made: tuple[Tensor, Tensor, Tensor], positions: Tables, config: ModelConfig
) -> Tensor:
    """The dense branch is added where there is one."""
    x, into, found = made
    if traits(config).dense_size:
        gate, up = run(("mlp.gate_proj", "mlp.up_proj"), into)
        (dense,) = run(("mlp.down_proj",), _activation(positions)(gate).mul_(up))
        found = found.add_(dense).mul_(math.sqrt(0.5))
    return _normed(weights, config, "post_moe_norm", found).view_as(x).add_(x)


MIXTURE = moe.Mixture("block_sparse_moe.", _entering, _route, _activation, _closed)
STAGES = (Stage(_mixed, llama.QKV), Stage(_joined, ("self_attn.o_proj",)), moe.stage(MIXTURE))


def layer(weights: Weights, x: Tensor, positions: Tables, config: ModelConfig, tap: Tap | None = None) -> Tensor:
    """One block: x [B, T, hidden] to a new tensor of the same shape and dtype; weights by name within the layer."""
    return through(STAGES, weights, x, positions, config, tap)


def attention(query: Tensor, key: Tensor, value: Tensor, sharpness: Tensor | None, grok: Grok) -> Tensor:
    """Causal attention with capped scores: query [B, heads, T, dim], key and value [B, kv heads, T, dim]; like query.

    Scores and their softmax are float32, some positions at a time.
    """
    batch, heads, length, dim = query.shape
    grouped = query.view(batch, key.shape[1], -1, length, dim)
    found = torch.empty_like(grouped)
    key, value = key.unsqueeze(2), value.unsqueeze(2)
    for at in range(0, length, QUERIES):
        upto = min(at + QUERIES, length)
        scores = (grouped[..., at:upto, :] @ key[..., :upto, :].transpose(-1, -2)).float() * grok.attention_scale
        scores = capped(scores, grok.attention_cap)
        if sharpness is not None:
            scores = scores * sharpness[at:upto, None]
        seen = torch.ones(upto - at, upto, dtype=torch.bool, device=scores.device).tril(at)
        scores = scores.masked_fill_(~seen, -torch.inf).softmax(-1)
        found[..., at:upto, :] = scores.to(value.dtype) @ value[..., :upto, :]
    return found.view(batch, heads, length, dim)
