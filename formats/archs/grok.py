"""Grok-1 and Grok-2: mixtures of experts with a norm before and after each half of a block.

Canonical names are those of xAI's own Grok-2 checkpoint; Grok-1 has the same tensors without the dense branch
(`mlp`) and with a tied output matrix. Two published copies of Grok-1 have names of their own, which `hf_name` knows:

| canonical, in model.layers.N | keyfan: transformer.decoder_layer.N | hpcai-tech: model.layers.N |
|---|---|---|
| self_attn.{q,k,v,o}_proj | multi_head_attention.{query,key,value,linear} | attn.{q,k,v,o}_proj |
| block_sparse_moe.gate | router | moe_block.gate |
| block_sparse_moe.experts.E.{w1,w3,w2} | moe.E.{linear,linear_v,linear_1} | moe_block.experts.E. and the same |
| {pre,post}_attn_norm, {pre,post}_moe_norm | rms_norm, _1, _2, _3 | the same, ending in .scale |

w1 is the gate (through GELU), w3 goes with it, w2 is the way down. GGUF's arch "grok" turns halves as this does, so no
rows move. Its norm after the experts has two names, layer_output_norm (Grok-1) and post_ffw_norm (Grok-2), of which
llama.cpp takes either: written is the first, read are both.

Ref: model.py of xai-org/grok-1; sglang models/grok.py; llama.cpp src/models/grok.cpp and conversion/grok.py.
"""

from __future__ import annotations

import re

from weightsmith.types import ModelConfig

GGUF_ARCH = "grok"
HAS_EXPERTS = True
MODEL_TYPE = "grok"
HF_ARCHITECTURES = ("Grok1ForCausalLM", "GrokForCausalLM", "Grok1ModelForCausalLM")
GGUF_ALIASES = {"layer_output_norm": "post_ffw_norm"}

_GLOBAL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_BLOCK = {
    "pre_attn_norm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attn_norm": "attn_output_norm",
    "pre_moe_norm": "ffn_norm",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_moe_norm": "layer_output_norm",
}
_EXPERT = {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}
_DENSE = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_HF_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
_HF_EXPERT = re.compile(r"block_sparse_moe\.experts\.\d+\.(w[123])")
_DROPPED = re.compile(r"(.*\.)?rotary_emb\.inv_freq|blk\.\d+\.attn_rot_embd\.weight")

_KEYFAN_BLOCK = re.compile(r"transformer\.decoder_layer\.(\d+)\.(.+)\.weight")
_KEYFAN = {
    "multi_head_attention.query": "self_attn.q_proj",
    "multi_head_attention.key": "self_attn.k_proj",
    "multi_head_attention.value": "self_attn.v_proj",
    "multi_head_attention.linear": "self_attn.o_proj",
    "router": "block_sparse_moe.gate",
    "rms_norm": "pre_attn_norm",
    "rms_norm_1": "post_attn_norm",
    "rms_norm_2": "pre_moe_norm",
    "rms_norm_3": "post_moe_norm",
}
_KEYFAN_GLOBAL = {
    "transformer.in_out_embed.weight": "model.embed_tokens.weight",
    "transformer.rms_norm.weight": "model.norm.weight",
}
_HPCAI_BLOCK = re.compile(r"model\.layers\.(\d+)\.(attn|moe_block|(?:pre|post)_(?:attn|moe)_norm)(.*)\.(weight|scale)")
_HPCAI = {"attn": "self_attn", "moe_block": "block_sparse_moe"}
_MOE = re.compile(r"(moe|block_sparse_moe\.experts)\.(\d+)\.(linear|linear_v|linear_1)")
_LINEAR = {"linear": "w1", "linear_v": "w3", "linear_1": "w2"}


def tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every canonical tensor and its shape (out, in), embedding first, then layer by layer, head last."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    dense = config.grok.dense_size if config.grok else 0
    linears = {
        "self_attn.q_proj": (q_rows, hidden),
        "self_attn.k_proj": (kv_rows, hidden),
        "self_attn.v_proj": (kv_rows, hidden),
        "self_attn.o_proj": (hidden, q_rows),
        "block_sparse_moe.gate": (config.n_experts, hidden),
        "mlp.gate_proj": (dense, hidden),
        "mlp.up_proj": (dense, hidden),
        "mlp.down_proj": (hidden, dense),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.n_layers):
        prefix = f"model.layers.{layer}"
        for part in _BLOCK:
            if dense or part not in _DENSE:
                shapes[f"{prefix}.{part}.weight"] = linears.get(part, (hidden,))
            if part == "block_sparse_moe.gate":
                for one in _EXPERT:
                    shape = (hidden, ffn) if one == "w2" else (ffn, hidden)
                    for expert in range(config.n_experts):
                        shapes[f"{prefix}.block_sparse_moe.experts.{expert}.{one}.weight"] = shape
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def is_dropped(name: str) -> bool:
    """True for a tensor of any container that carries no weights and is recomputed."""
    return _DROPPED.fullmatch(name) is not None


def gguf_name(canonical: str) -> str:
    """A canonical name in GGUF, the same for the experts of a layer; KeyError for one that the family does not have."""
    found = _HF_BLOCK.fullmatch(canonical)
    if not found:
        return _GLOBAL[canonical]
    expert = _HF_EXPERT.fullmatch(found[2])
    return f"blk.{found[1]}.{_EXPERT[expert[1]] if expert else _BLOCK[found[2]]}.weight"


def permuted_heads(canonical: str, config: ModelConfig) -> int | None:
    """None: GGUF turns the same halves."""
    del canonical, config
    return None


def hf_name(name: str) -> str:
    """A published name in canonical form; one of no known scheme stays as it is."""
    if name in _KEYFAN_GLOBAL or name == "model.norm.scale":
        return _KEYFAN_GLOBAL.get(name, "model.norm.weight")
    if found := _KEYFAN_BLOCK.fullmatch(name):
        return _in_layer(found[1], _KEYFAN.get(found[2]) or _expert(found[2])) or name
    if found := _HPCAI_BLOCK.fullmatch(name):
        return _in_layer(found[1], _expert(_HPCAI.get(found[2], found[2]) + found[3])) or name
    return name


def _in_layer(layer: str, part: str | None) -> str | None:
    return f"model.layers.{layer}.{part}.weight" if part else None


def _expert(part: str) -> str:
    """An expert's linear by its canonical name; any other part as it is."""
    found = _MOE.fullmatch(part)
    return f"block_sparse_moe.experts.{found[2]}.{_LINEAR[found[3]]}" if found else part
