"""The row permutation between half-split and interleaved rotary embedding.

Hugging Face rotates element i of a head against i + d/2, GGUF's arch "llama" (like Meta's original) 2i against 2i+1.
Row h*d + j*(d/2) + i of the half-split form is row h*d + 2*i + j of the interleaved one (j in 0, 1). Only rows move,
so packed rows of any block layout are permuted as they are, and a run of whole heads permutes on its own.

Ref: LlamaModel.permute in llama.cpp conversion/llama.py; its inverse in transformers convert_llama_weights_to_hf.py.
"""

from __future__ import annotations

from weightsmith.types import Packed


def interleave(rows: Packed, head_dim: int) -> Packed:
    """Half-split rows [heads * head_dim, row_bytes] as interleaved ones; a fresh array of the same shape."""
    halves = rows.reshape(-1, 2, head_dim // 2, rows.shape[-1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def halve(rows: Packed, head_dim: int) -> Packed:
    """Interleaved rows [heads * head_dim, row_bytes] as half-split ones; the inverse of `interleave`."""
    pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
