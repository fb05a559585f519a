"""Which of Grok-1's files holds which tensor.

Files are numbered in the order in which JAX flattens the tree of parameters, which is the order of its keys as texts.
Layer 10 therefore comes before layer 2 ("decoder_layer_10/" < "decoder_layer_2/"), and layer 9 is last. All layers
have the same shapes, so nothing but this order tells them apart.

| file | Haiku's name | canonical | stored |
|---|---|---|---|
| 0 | in_out_embed | model.embed_tokens | F32 [vocab, hidden] |
| 1 | rms_norm | model.norm | F32 |
| base + 0 | moe/linear | block_sparse_moe.experts.E.w1 (gate) | int8 [expert, in, out], 1 group |
| + 1 | moe/linear_1 | ...w2 (down) | int8, 8 groups |
| + 2 | moe/linear_v | ...w3 (up) | int8, 1 group |
| + 3, 4, 5, 6 | multi_head_attention/key, linear, query, value | self_attn.{k,o,q,v}_proj | int8; linear 8 groups |
| + 7, 8, 9, 10 | rms_norm, _1, _2, _3 | pre_attn_norm, post_attn_norm, pre_moe_norm, post_moe_norm | F32 |
| + 11 | router | block_sparse_moe.gate | F32 [hidden, experts] |

base = 2 + 12 * (the layer's place among the texts). Rows are half-split for rotary embedding, as canonical ones are.

Ref: load_tensors in checkpoint.py, model.py and run.py of xai-org/grok-1; jax.tree_util, which sorts keys.
"""

from __future__ import annotations

PER_LAYER = 12
EXPERTS = {
    "block_sparse_moe.experts.{}.w1": 0,
    "block_sparse_moe.experts.{}.w2": 1,
    "block_sparse_moe.experts.{}.w3": 2,
}
MATRICES = {"self_attn.k_proj": 3, "self_attn.o_proj": 4, "self_attn.q_proj": 5, "self_attn.v_proj": 6}
NORMS = {"pre_attn_norm": 7, "post_attn_norm": 8, "pre_moe_norm": 9, "post_moe_norm": 10}
ROUTER = "block_sparse_moe.gate"
ROUTER_SLOT = 11


def file_name(index: int) -> str:
    """The name of file `index`; the suffix numbers the hosts that wrote it, of which there was one."""
    return f"tensor{index:05d}_000"


def order(n_layers: int) -> list[int]:
    """Layers in the order of their files."""
    return sorted(range(n_layers), key=lambda layer: f"decoder_layer_{layer}/")


def base(layer: int, n_layers: int) -> int:
    """The first file of a layer."""
    return 2 + PER_LAYER * order(n_layers).index(layer)


def places(n_layers: int, n_experts: int) -> dict[str, tuple[int, int]]:
    """Canonical tensor to its file's number, and its place along that file's first axis (-1: all of it)."""
    found = {"model.embed_tokens.weight": (0, -1), "model.norm.weight": (1, -1)}
    for at, layer in enumerate(order(n_layers)):
        first, prefix = 2 + PER_LAYER * at, f"model.layers.{layer}."
        for part, slot in {**MATRICES, **NORMS, ROUTER: ROUTER_SLOT}.items():
            found[f"{prefix}{part}.weight"] = first + slot, -1
        for part, slot in EXPERTS.items():
            for expert in range(n_experts):
                found[f"{prefix}{part.format(expert)}.weight"] = first + slot, expert
    return found
