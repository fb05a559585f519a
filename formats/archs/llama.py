"""Dense Llama: 1, 2, 3, 3.1, 3.2, 3.3, and everything that is laid out like it.

Canonical names are Hugging Face's. GGUF's arch "llama" rotates neighbouring pairs (2i, 2i+1) where Hugging Face
rotates halves (i, i + d/2), so GGUF stores the rows of each query and key head interleaved
(`formats.rope_rows`). A tied output matrix is absent from both containers. `rope_freqs.weight` is
GGUF's form of llama3 rope scaling and no weight; `rotary_emb.inv_freq` is an old checkpoint's computed constant.

Ref: llama.cpp conversion/llama.py and gguf-py tensor_mapping.py (llama-cpp-python 0.3.36); transformers
models/llama/modeling_llama.py.
"""

from __future__ import annotations

import re

from weightsmith.types import ModelConfig

GGUF_ARCH = "llama"
HAS_EXPERTS = False
MODEL_TYPE = "llama"
HF_ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM")

_GLOBAL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_DROPPED = re.compile(r"rope_freqs\.weight|(.*\.)?rotary_emb\.inv_freq|blk\.\d+\.attn_rot_embd\.weight")
_HF_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every canonical tensor and its shape (out, in), embedding first, then layer by layer, head last."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (q_rows, hidden),
        "self_attn.k_proj": (kv_rows, hidden),
        "self_attn.v_proj": (kv_rows, hidden),
        "self_attn.o_proj": (hidden, q_rows),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.n_layers):
        for part in _BLOCK:
            name = f"model.layers.{layer}.{part}"
            shapes[f"{name}.weight"] = linears.get(part, (hidden,))
            if part in linears and (config.attention_bias if "attn" in part else config.mlp_bias):
                shapes[f"{name}.bias"] = linears[part][:1]
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def is_dropped(name: str) -> bool:
    """True for a tensor of any container that carries no weights and is recomputed or described elsewhere."""
    return _DROPPED.fullmatch(name) is not None


def gguf_name(canonical: str) -> str:
    """A canonical name in GGUF; KeyError for one that the family does not have."""
    found = _HF_BLOCK.fullmatch(canonical)
    if not found:
        return _GLOBAL[canonical]
    return f"blk.{found[1]}.{_BLOCK[found[2]]}.{found[3]}"


def permuted_heads(canonical: str, config: ModelConfig) -> int | None:
    """Heads of a tensor whose rows GGUF stores interleaved, else None."""
    if ".self_attn.q_proj." in canonical:
        return config.n_heads
    if ".self_attn.k_proj." in canonical:
        return config.n_kv_heads
    return None
