"""Dense Mistral: 7B v0.1 to v0.3, Nemo, Small 3.x's text model.

Tensors are Llama's; what differs is the configuration: an explicit head_dim (Nemo: 128 with hidden_size / heads =
160) and v0.1's sliding window. GGUF has no arch of its own for it and stores "llama", so a GGUF reads back as Llama,
which computes the same up to the sliding window (llama.cpp runs v0.1 with full attention).

Ref: transformers models/mistral; llama.cpp conversion/llama.py.
"""

from __future__ import annotations

from weightsmith.formats.archs.llama import gguf_name, is_dropped, permuted_heads, tensors

__all__ = ["GGUF_ARCH", "HAS_EXPERTS", "HF_ARCHITECTURES", "MODEL_TYPE", "gguf_name", "is_dropped"]
__all__ += ["permuted_heads", "tensors"]

GGUF_ARCH = "llama"
HAS_EXPERTS = False
MODEL_TYPE = "mistral"
HF_ARCHITECTURES = ("MistralForCausalLM",)
