"""Dense Mistral: 7B v0.1 to v0.3, Nemo, Small 3.x's text model.

Tensors are Llama's; what differs is the configuration: an explicit head_dim (Nemo: 128 with hidden_size / heads =
160) and v0.1's sliding window. GGUF has no arch of its own for it and stores "llama", so a GGUF reads back as Llama,
which computes the same up to the sliding window (llama.cpp runs v0.1 with full attention).

Small 3.1 and 3.2 wrap the text model (`WRAPPER`): config.json has it under text_config, names begin with
language_model.model or, newer, model.language_model, and an image encoder lies beside it, which is left out.

Ref: transformers models/mistral and models/mistral3; llama.cpp conversion/llama.py.
"""

from __future__ import annotations

from weightsmith.formats.archs import llama
from weightsmith.formats.archs.llama import gguf_name, permuted_heads, tensors

__all__ = ["GGUF_ARCH", "HAS_EXPERTS", "HF_ARCHITECTURES", "MODEL_TYPE", "WRAPPER", "gguf_name", "hf_name"]
__all__ += ["is_dropped", "permuted_heads", "tensors"]

GGUF_ARCH = "llama"
HAS_EXPERTS = False
MODEL_TYPE = "mistral"
WRAPPER = "Mistral3ForConditionalGeneration"
HF_ARCHITECTURES = ("MistralForCausalLM", WRAPPER)
_WRAPPED = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
_IMAGES = ("vision_tower.", "multi_modal_projector.")


def hf_name(name: str) -> str:
    """The canonical name of a tensor that a wrapped checkpoint holds; any other as it is."""
    for wrapped, own in _WRAPPED.items():
        if name.startswith(wrapped):
            return own + name.removeprefix(wrapped)
    return name


def is_dropped(name: str) -> bool:
    """True for a tensor that carries no weights of the text model."""
    return name.removeprefix("model.").startswith(_IMAGES) or llama.is_dropped(name)
