"""Names of Meta's and Mistral's original tensors, and how model-parallel ranks cut them.

| native | canonical | ranks hold |
|---|---|---|
| tok_embeddings | model.embed_tokens | columns in Llama 1 and 2, rows since Llama 3 |
| layers.N.attention.wq, wk, wv | model.layers.N.self_attn.{q,k,v}_proj | rows (whole heads) |
| layers.N.attention.wo | model.layers.N.self_attn.o_proj | columns |
| layers.N.feed_forward.w1, w3 | model.layers.N.mlp.gate_proj, up_proj | rows |
| layers.N.feed_forward.w2 | model.layers.N.mlp.down_proj | columns |
| layers.N.attention_norm, ffn_norm; norm | input_layernorm, post_attention_layernorm; model.norm | the same |
| output | lm_head | rows |
| layers.N.feed_forward.gate, .experts.E.w1, w2, w3 | model.layers.N.block_sparse_moe.gate, ... | (never cut) |

`rope.freqs` holds rotary frequencies, which follow from params.json, and is dropped.

Ref: ParallelEmbedding, ColumnParallelLinear and RowParallelLinear in facebookresearch/fairscale (their names count
axes of the transposed matrix); llama/model.py of meta-llama/llama; transformers convert_llama_weights_to_hf.py.
"""

from __future__ import annotations

import re

EMBEDDING, NORM, HEAD = "tok_embeddings.weight", "norm.weight", "output.weight"

_GLOBAL = {EMBEDDING: "model.embed_tokens.weight", NORM: "model.norm.weight", HEAD: "lm_head.weight"}
_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_BACK = {canonical: native for native, canonical in _LAYER.items()}
_GLOBAL_BACK = {canonical: native for native, canonical in _GLOBAL.items()}
_NATIVE = re.compile(r"layers\.(\d{1,4})\.([a-z0-9_.]+)\.weight")
_CANONICAL = re.compile(r"model\.layers\.(\d+)\.([a-z_.]+)\.weight")
_MOE = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.(gate|experts\.\d+\.w[123])\.weight")
_DROPPED = re.compile(r"(layers\.\d{1,4}\.attention\.inner_attention\.)?rope\.freqs")
_BY_COLUMNS = ("attention.wo", "feed_forward.w2")


def native_name(canonical: str) -> str:
    """The original name of a canonical tensor; KeyError for one that these forms do not have (a bias)."""
    if moe := _MOE.fullmatch(canonical):
        return f"layers.{moe[1]}.feed_forward.{moe[2]}.weight"
    found = _CANONICAL.fullmatch(canonical)
    return f"layers.{found[1]}.{_BACK[found[2]]}.weight" if found else _GLOBAL_BACK[canonical]


def is_dropped(native: str) -> bool:
    """True for a tensor that carries no weights."""
    return _DROPPED.fullmatch(native) is not None


def is_known(native: str) -> bool:
    """True for a weight of a dense model, or a tensor that is dropped."""
    found = _NATIVE.fullmatch(native)
    return native in _GLOBAL or is_dropped(native) or (found is not None and found[2] in _LAYER)


def axis(native: str, shape: tuple[int, ...], *, ranks: int, hidden: int) -> int | None:
    """The axis along which `ranks` hold parts of `shape` each; None if each holds all of it. `hidden`: model width."""
    if len(shape) < 2 or is_dropped(native):
        return None
    if native == EMBEDDING:
        return 1 if shape[1] * ranks == hidden else 0
    return 1 if native.endswith(tuple(f".{part}.weight" for part in _BY_COLUMNS)) else 0
