"""Mixtral: Llama's attention, and in every layer a mixture of experts in the place of the feed-forward block.

A router picks num_experts_per_tok of num_local_experts experts for each token (8x7B, 8x22B: 2 of 8). Each is a gated
feed-forward block: w1 is the gate, w3 goes up, w2 comes down. Canonical names are those of Hugging Face's published
files, one matrix for each expert, although transformers 5 stacks them in memory.

GGUF has no arch of its own for it: it is arch "llama" with expert_count. The router stays F32 there.

Ref: arXiv 2401.04088; transformers models/mixtral; llama.cpp conversion/llama.py, gguf-py tensor_mapping.py.
"""

from __future__ import annotations

import re

from weightsmith.formats.archs import llama
from weightsmith.formats.archs.llama import is_dropped, permuted_heads
from weightsmith.types import ModelConfig

__all__ = ["GGUF_ARCH", "HAS_EXPERTS", "HF_ARCHITECTURES", "MODEL_TYPE", "gguf_name", "is_dropped"]
__all__ += ["permuted_heads", "tensors"]

GGUF_ARCH = "llama"
HAS_EXPERTS = True
MODEL_TYPE = "mixtral"
HF_ARCHITECTURES = ("MixtralForCausalLM",)

_STACKS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
_MOE = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.(?:gate|experts\.\d+\.(w[123]))\.weight")


def tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every canonical tensor and its shape (out, in), embedding first, then layer by layer, head last."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    expert = {"w1": (ffn, hidden), "w2": (hidden, ffn), "w3": (ffn, hidden)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in llama.tensors(config).items():
        if ".mlp." not in name:
            shapes[name] = shape
        elif name.endswith(".mlp.gate_proj.weight"):
            moe = name.removesuffix("mlp.gate_proj.weight") + "block_sparse_moe"
            shapes[f"{moe}.gate.weight"] = (config.n_experts, hidden)
            shapes |= {
                f"{moe}.experts.{e}.{part}.weight": expert[part] for e in range(config.n_experts) for part in expert
            }
    return shapes


def gguf_name(canonical: str) -> str:
    """A canonical name in GGUF, for an expert that of its stack; KeyError for one that the family does not have."""
    found = _MOE.fullmatch(canonical)
    if found:
        return f"blk.{found[1]}.{_STACKS[found[2]] if found[2] else 'ffn_gate_inp'}.weight"
    return llama.gguf_name(canonical)
