"""Tiny Groks as safetensors: Grok-2's eight tensor-parallel ranks, and the two published copies of Grok-1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

RANKS = 8
# Number of each kind of tensor in the names of Grok-2's files; 6 to 8 are cut.
KINDS = (
    *("model.embed_tokens", "lm_head", "model.norm", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj", "w1", "w2", "w3"),
    *("self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"),
    *("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm", "block_sparse_moe.gate"),
)
KEYFAN = {
    "self_attn.q_proj": "multi_head_attention.query",
    "self_attn.k_proj": "multi_head_attention.key",
    "self_attn.v_proj": "multi_head_attention.value",
    "self_attn.o_proj": "multi_head_attention.linear",
    "block_sparse_moe.gate": "router",
    "pre_attn_norm": "rms_norm",
    "post_attn_norm": "rms_norm_1",
    "pre_moe_norm": "rms_norm_2",
    "post_moe_norm": "rms_norm_3",
}
LINEAR = {"w1": "linear", "w2": "linear_1", "w3": "linear_v"}


def grok2_config(**changes: Any) -> dict[str, Any]:
    """config.json of a two-layer Grok-2 with everything that the real one says, in its flat form."""
    config: dict[str, Any] = {
        "architectures": ["Grok1ForCausalLM"],
        "model_type": "git",
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 320,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "residual_moe": True,
        "embedding_multiplier_scale": 16.0,
        "output_multiplier_scale": 0.5,
        "attn_logit_softcapping": 30.0,
        "router_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "attn_temperature_len": 16,
        "sliding_window_size": -1,
        "global_attn_every_n": 1,
        "rope_theta": 100000.0,
        "rope_type": "original",
        "original_max_position_embeddings": 256,
        "scaling_factor": 16.0,
        "extrapolation_factor": 1.0,
        "attn_factor": 1.0,
        "beta_fast": 8,
        "beta_slow": 1,
        "torch_dtype": "bfloat16",
    }
    return config | changes


def grok_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape by its canonical name without the ending ".weight"."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    dense, ffn = config["intermediate_size"], config.get("moe_intermediate_size") or config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        shapes |= {
            f"{p}.{name}": (hidden,) for name in ("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm")
        }
        shapes |= {f"{p}.self_attn.q_proj": (queries, hidden), f"{p}.self_attn.o_proj": (hidden, queries)}
        shapes |= {f"{p}.self_attn.{name}_proj": (keys, hidden) for name in "kv"}
        experts = config.get("num_local_experts") or config["num_experts"]
        shapes[f"{p}.block_sparse_moe.gate"] = (experts, hidden)
        for e in range(experts):
            shapes |= {f"{p}.block_sparse_moe.experts.{e}.{w}": (ffn, hidden) for w in ("w1", "w3")}
            shapes[f"{p}.block_sparse_moe.experts.{e}.w2"] = (hidden, ffn)
        if config.get("residual_moe"):
            shapes |= {f"{p}.mlp.gate_proj": (dense, hidden), f"{p}.mlp.up_proj": (dense, hidden)}
            shapes[f"{p}.mlp.down_proj"] = (hidden, dense)
    shapes["model.norm"] = (hidden,)
    if config.get("tie_word_embeddings") is False or config.get("residual_moe"):
        shapes["lm_head"] = (vocab, hidden)
    return shapes


def grok_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """float32 weights under canonical names; the router is loud enough for uneven choices."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in grok_shapes(config).items():
        noise = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            found[f"{name}.weight"] = 1 + noise / 10
        else:
            loud = {"gate": 3.0, "embed_tokens": 1.0}.get(name.rpartition(".")[2], 1.5)
            found[f"{name}.weight"] = noise * np.float32(loud / np.sqrt(shape[-1]))
    return found


def as_torch(tensors: dict[str, np.ndarray], dtype: str = "bfloat16") -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(value.copy()).to(getattr(torch, dtype)) for name, value in tensors.items()}


def kind_of(name: str) -> int:
    part = name.removesuffix(".weight")
    return next(at for at, kind in enumerate(KINDS) if part == kind or part.endswith("." + kind))


def write_grok2(
    folder: Path, *, dtype: str = "bfloat16", ranks: int = RANKS, seed: int = 0, **changes: Any
) -> dict[str, Any]:
    """Write Grok-2's form into `folder` and return the whole torch tensors."""
    from safetensors.torch import save_file

    config = grok2_config(torch_dtype=dtype, **changes)
    tensors = as_torch(grok_tensors(config, seed), dtype)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for kind in range(len(KINDS)):
        group = {name: value for name, value in tensors.items() if kind_of(name) == kind}
        if kind in (6, 7, 8):
            for rank in range(ranks):
                cut = {name: value.chunk(ranks, int(kind == 7))[rank].contiguous() for name, value in group.items()}
                save_file(cut, folder / f"pytorch_model-{kind:05d}-TP-{rank:03d}.safetensors")
        else:
            save_file(group, folder / f"pytorch_model-{kind:05d}-TP-common.safetensors")
    return tensors


def grok1_config(scheme: str, **changes: Any) -> dict[str, Any]:
    """config.json of one of the published copies of Grok-1."""
    config: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 2,
        "attn_output_multiplier": 0.125,
        "embedding_multiplier_scale": 16.0,
        "output_multiplier_scale": 0.5773502691896257,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    if scheme == "keyfan":
        own = {"architectures": ["GrokForCausalLM"], "model_type": "grok", "num_local_experts": 8, "hidden_act": "silu"}
        own |= {"rope_theta": 100000.0, "max_position_embeddings": 4096}  # defaults of an unrelated class
    else:
        own = {"architectures": ["Grok1ModelForCausalLM"], "model_type": "grok-1", "num_experts": 8}
        own |= {"max_attn_value": 30.0, "max_position_embeddings": 8192}
    return config | own | changes


def renamed(name: str, scheme: str) -> str:
    """A canonical name in one of the published schemes."""
    part = name.removesuffix(".weight")
    head, _, rest = part.removeprefix("model.layers.").partition(".")
    if not part.startswith("model.layers."):
        names = {"model.embed_tokens": "transformer.in_out_embed.weight", "model.norm": "transformer.rms_norm.weight"}
        if scheme == "keyfan":
            return names[part]
        return "model.norm.scale" if part == "model.norm" else name
    if ".experts." in rest:
        expert, which = rest.split(".")[2:]
        moe = f"moe.{expert}" if scheme == "keyfan" else f"moe_block.experts.{expert}"
        rest = f"{moe}.{LINEAR[which]}"
    elif scheme == "keyfan":
        rest = KEYFAN[rest]
    else:
        rest = rest.replace("self_attn", "attn").replace("block_sparse_moe", "moe_block")
    if scheme == "keyfan":
        return f"transformer.decoder_layer.{head}.{rest}.weight"
    return f"model.layers.{head}.{rest}.{'scale' if rest.endswith('norm') else 'weight'}"


def write_hf(folder: Path, scheme: str, *, dtype: str = "bfloat16", seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Write a copy of Grok-1 in one of the published schemes; the torch tensors by canonical name."""
    from safetensors.torch import save_file

    config = grok1_config(scheme, torch_dtype=dtype, **changes)
    tensors = as_torch(grok_tensors(config, seed), dtype)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({renamed(name, scheme): value for name, value in tensors.items()}, folder / "model.safetensors")
    return tensors
