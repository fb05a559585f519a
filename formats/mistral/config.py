"""Mistral's params.json to ModelConfig.

head_dim is stated and need not be dim / n_heads (Nemo: 128 with 5120 / 32 = 160). sliding_window is a number, a text
with one, or a list that repeats over the layers (null: no window); only one and the same window for every layer can be
expressed. Where rope_theta is absent the first rule of mistral-inference counts: 10000 for a dense model with a sliding
window (7B v0.1), else 1000000 (v0.2, Mixtral). The length of the context is often absent as well: 131072 for the
vocabulary of 131072 tokens that came with Nemo, 65536 for Mixtral 8x22B's size, else 32768. `mistral.experts` says how
the experts of Mixtral are told and stored.

Ref: mistral_inference/args.py; convert_mistral_weights_to_hf.py of transformers 4.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from weightsmith.errors import UnsupportedError
from weightsmith.formats.consolidated import names
from weightsmith.formats.consolidated.params import heads
from weightsmith.formats.consolidated.shards import Joined, Shards
from weightsmith.formats.mistral.eights import refuse_other, scaled
from weightsmith.formats.mistral.experts import experts, plain, unstack
from weightsmith.formats.safetensors.keys import MAX_LAYERS, Keys
from weightsmith.types import ModelConfig

log = logging.getLogger(__name__)

_TEKKEN_SIZE = 131072
_LARGE_MIXTRAL = 6144  # width of 8x22B
_IMAGES = ("vision_encoder.", "vision_language_adapter.", "patch_merger.", "pre_mm_projector_norm.")
_REFUSED = {
    "multimodal": "an image or audio encoder",
    "yarn": "YaRN scaling of the rotary embedding",
    "llama_4_scaling": "attention scaled by position",
    "lora": "an adapter",
    "q_lora_rank": "latent attention",
    "kv_lora_rank": "latent attention",
}


def refuse_unknown(params: Keys) -> None:
    """Raise UnsupportedError, by name, for what changes the computation and is not known here."""
    for key, what in _REFUSED.items():
        if params.has(key):
            raise UnsupportedError(
                f"{key} in {params.path.name} means {what}, which is not read from this form",
                path=params.path,
                hint="Try the Hugging Face form of the model.",
            )
    refuse_other(params)
    kind = params.raw.get("model_type") or "transformer"
    if kind != "transformer":
        raise UnsupportedError(f"model_type {str(kind)[:40]!r} is not known, only transformer", path=params.path)
    activation = params.raw.get("activation") or "silu"
    if activation != "silu":
        raise UnsupportedError(f"activation {str(activation)[:40]!r} is not known, only silu", path=params.path)


def text_only(tensors: Mapping[str, Joined], params: Keys) -> Mapping[str, Joined]:
    """`tensors` without those of an image encoder, which Small 3.1 and 3.2 have and which is left out."""
    if not params.has("vision_encoder"):
        return tensors
    log.warning("%s: the image encoder is left out, only the text model is read", params.path)
    return {name: joined for name, joined in tensors.items() if not name.startswith(_IMAGES)}


def configure(params: Keys, shards: Shards, folder: Path) -> tuple[ModelConfig, Mapping[str, Joined]]:
    """The model, and its tensors by native name.

    Raises UnsupportedError (another kind of model, by name), IntegrityError (a value of the wrong type or size).
    """
    refuse_unknown(params)
    params = plain(params)
    n_experts, n_experts_used = experts(params)
    tensors = scaled(text_only(shards.tensors, params))
    vocab_size, (n_heads, n_kv_heads) = params.count("vocab_size"), heads(params)
    head_dim = params.count("head_dim")
    if head_dim % 2:
        raise params.fault("head_dim", head_dim, "an even number, because rotary embedding turns pairs")
    window = sliding_window(params)
    embedding, head = tensors.get(names.EMBEDDING), tensors.get(names.HEAD)
    tied = params.flag("tied_embeddings")
    if tied and head is not None and embedding is not None:
        tied = shards.equal(head, embedding)  # a stored head counts unless it is a plain copy
    config = ModelConfig(
        family="mixtral" if n_experts else "mistral",
        vocab_size=vocab_size,
        hidden_size=params.count("dim"),
        intermediate_size=params.count("hidden_dim"),
        n_layers=params.count("n_layers", limit=MAX_LAYERS),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=params.number("norm_eps"),
        rope_theta=params.number("rope_theta", 10000.0 if window and not n_experts else 1000000.0),
        max_position_embeddings=_context(params, vocab_size),
        tie_word_embeddings=tied,
        dtype=embedding.info.codec if embedding and embedding.packed is None else "BF16",
        sliding_window=window,
        bos_token_id=1,
        eos_token_ids=(2,),
        name=folder.absolute().name[:200],
        n_experts=n_experts,
        n_experts_used=n_experts_used,
    )
    return config, unstack(tensors, config) if n_experts else tensors


def sliding_window(params: Keys) -> int | None:
    """The window of every layer in tokens, or None; UnsupportedError if layers differ."""
    key = "sliding_window" if params.raw.get("sliding_window") is not None else "_sliding_window"
    value = params.raw.get(key)
    windows = {_window(params, key, item) for item in (value if isinstance(value, list) else [value])}
    if len(windows) > 1:
        raise UnsupportedError(f"{key} {str(value)[:80]}: layers with different windows are not read", path=params.path)
    return windows.pop() if windows else None


def _window(params: Keys, key: str, value: object) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 10:
        value = int(value)
    if value is None:
        return None
    if type(value) is not int or not 0 < value < 1 << 31:
        raise params.fault(key, value, "a number of tokens, a list of them, or null")
    return value


def _context(params: Keys, vocab_size: int) -> int:
    for key in ("max_position_embeddings", "max_seq_len"):
        if params.has(key):
            return params.count(key)
    assumed = 131072 if vocab_size >= _TEKKEN_SIZE else 32768
    if params.has("moe") and params.count("dim") >= _LARGE_MIXTRAL:
        assumed = 65536
    log.info("%s does not say how long the context is; %d is assumed", params.path, assumed)
    return assumed
