"""Weights of 8 bits in Mistral's original form.

    X.weight         F8_E4M3 [out, in]
    X.qscale_weight  one number, or one for each row (in the order of the rows that are stored)
    X.qscale_act     the scale of a linear's inputs, likewise of cached keys and values: no weight, and passed over

    weight = stored * qscale_weight

params.json says `quantization: {"qformat_weight": "fp8_e4m3", "qscheme_act": ...}`. Which linears are stored so is read
off the tensors; embedding, norms and output matrix are not. Weights are handed out as F32, a float of four significant
bits times a scale, rounded once: the same numbers as from Hugging Face's form of these checkpoints (`formats.fp8`).

Ref: vLLM transformers_utils/configs/mistral.py and models/llama.py (mistral_mapping); transformers
convert_ministral3_weights_to_hf.py; llama.cpp conversion/base.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats.consolidated.shards import Joined
from weightsmith.formats.packed.scaled import FLOAT8, Scaled, block_of, float_parts
from weightsmith.formats.safetensors.keys import Keys
from weightsmith.quant.blocks import row_nbytes

SCALE, IDLE = "qscale_weight", ".qscale_act"
FORMAT = "fp8_e4m3"


def refuse_other(params: Keys) -> None:
    """Raise UnsupportedError, by name, for weights that are quantized in another way than this module knows."""
    if not params.has("quantization"):
        return
    found = params.raw["quantization"]
    if not isinstance(found, dict):
        raise params.fault("quantization", found, "an object")
    kind = found.get("qformat_weight")
    if kind != FORMAT:
        named = kind if kind is not None else found.get("quant_method", "unnamed")
        raise UnsupportedError(
            f"quantization in {params.path.name} names weights of format {str(named)[:40]!r}; only {FORMAT} is read"
            " from this form",
            path=params.path,
            hint="Try the Hugging Face form of the model.",
        )


def scaled(tensors: Mapping[str, Joined]) -> dict[str, Joined]:
    """`tensors` by native name, 8-bit ones with their scales; scales of activations left out.

    Raises IntegrityError for 8 bits without a scale, a scale of another shape or type, or one that belongs to nothing.
    """
    found: dict[str, Joined] = {}
    for name, joined in tensors.items():
        if name.endswith(IDLE):
            continue
        if name.endswith(f".{SCALE}"):
            weight = tensors.get(name.removesuffix(SCALE) + "weight")
            if weight is None or weight.info.codec not in FLOAT8:
                raise IntegrityError("a scale without a weight of 8 bits", path=joined.info.path, tensor=name)
            continue
        scale = tensors.get(f"{name.removesuffix('.weight')}.{SCALE}")
        found[name] = _with_scale(name, joined, scale) if joined.info.codec in FLOAT8 else joined
    return found


def _with_scale(name: str, joined: Joined, scale: Joined | None) -> Joined:
    info = joined.info
    if scale is None or len(info.shape) != 2:
        raise IntegrityError(
            f"stored as {info.codec} without {SCALE}",
            path=info.path,
            tensor=name,
            hint="Its values cannot be told without a scale; pull the checkpoint again.",
        )
    shape = (info.shape[0], info.shape[1])
    parts = float_parts(shape, scale.info, SCALE)
    if scale.info.codec not in parts[SCALE].codecs:
        codecs = " or ".join(parts[SCALE].codecs)
        text = f"stored as {scale.info.codec}, expected {codecs}"
        raise IntegrityError(text, path=scale.info.path, tensor=scale.info.name)
    packed = Scaled(shape, parts, SCALE, block_of(shape, scale.info, None))
    whole = replace(info, codec=packed.codec, nbytes=shape[0] * row_nbytes(packed.codec, shape[1]))
    return replace(joined, info=whole, packed=packed, scale=scale.info)
