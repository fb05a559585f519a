"""config.json to ModelConfig and back.

Both ways of writing rotary embedding are read: `rope_theta` and `rope_scaling` at the top, and transformers 5's
`rope_parameters`, which holds all of it and may repeat it per layer type. The kind is `rope_type` or the older `type`.
What would change the computation and is not known here (another activation, YaRN, a quantized checkpoint) is refused
by name. `auto_map`, which names code to import, is ignored. Written is the older form, which transformers 4 and 5
both load.

Every value is checked for type and size, because other code allocates by them. An absent key means what it means to
transformers' own configuration class; ids of special tokens stay unknown.

Ref: transformers 5.23 models/{llama,mistral,mixtral}/configuration_*.py, modeling_rope_utils.py.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightsmith.errors import UnsupportedError, WeightsmithError
from weightsmith.formats import archs
from weightsmith.formats.archs.mistral import WRAPPER
from weightsmith.formats.safetensors import grok_config
from weightsmith.formats.safetensors.keys import MAX_EXPERTS, MAX_LAYERS, MAX_SIZE, Keys
from weightsmith.formats.safetensors.strictjson import read_object
from weightsmith.types import ModelConfig, RopeScaling

CONFIG_NAME = "config.json"
MAX_CONFIG = 16 << 20  # bytes
log = logging.getLogger(__name__)
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

_SILU = ("silu", "swish")
_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention", "linear_attention"}
# What a missing key means where the families differ.
_ABSENT: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8},
    "mixtral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    },
}


def read_raw(path: Path) -> dict[str, Any]:
    """Read config.json as it is; IntegrityError or NotFoundError."""
    return read_object(path, limit=MAX_CONFIG)


def parse(raw: Mapping[str, Any], *, path: Path, dtype: str) -> ModelConfig:
    """Turn a raw config.json into a ModelConfig. `dtype` (codec) is used where the file states none that is known.

    Raises UnsupportedError (family, activation, rope kind, quantized weights) or IntegrityError (a value of the wrong
    type or size), both naming the key.
    """
    raw = _unwrapped(raw, path)
    keys = Keys(raw, path)
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise keys.fault("architectures", architectures, "a list of class names")
    try:
        module = archs.by_hf(architectures, keys.text("model_type"))
    except WeightsmithError as error:
        error.path = path
        if method := _method(keys):
            error.hint = f"{error.hint or ''} Its weights are quantized as well ({method}).".strip()
        raise
    family = module.__name__.rpartition(".")[2]
    keys.absent = _ABSENT.get(family, {})
    _refuse_quantized(keys)
    if family == "grok":
        return grok_config.read(keys, dtype=_dtype(keys) or dtype)
    _refuse_unknown(keys)
    vocab_size, hidden = keys.count("vocab_size"), keys.count("hidden_size")
    n_heads, n_kv_heads, head_dim = keys.heads(hidden)
    context = keys.count("max_position_embeddings")
    rope_theta, rope_scaling = _rope(keys, context)
    has_biases, has_window = family == "llama", family != "llama"  # a class ignores the keys of the others
    experts, experts_used = _experts(keys) if module.HAS_EXPERTS else (0, 0)
    config = ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=keys.count("intermediate_size"),
        n_layers=keys.count("num_hidden_layers", limit=MAX_LAYERS),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        max_position_embeddings=context,
        tie_word_embeddings=keys.flag("tie_word_embeddings"),
        dtype=_dtype(keys) or dtype,
        rope_scaling=rope_scaling,
        sliding_window=_window(keys) if has_window else None,
        attention_bias=has_biases and keys.flag("attention_bias"),
        mlp_bias=has_biases and keys.flag("mlp_bias"),
        bos_token_id=next(iter(keys.ids("bos_token_id", vocab_size)), None),
        eos_token_ids=keys.ids("eos_token_id", vocab_size),
        # A padding id just past the vocabulary is common and means that there is none.
        pad_token_id=next((i for i in keys.ids("pad_token_id", MAX_SIZE) if i < vocab_size), None),
        name=keys.text("_name_or_path").rstrip("/").rpartition("/")[2][:200],
        n_experts=experts,
        n_experts_used=experts_used,
    )
    _check_layer_types(keys, config)
    return config


def _unwrapped(raw: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The text model's keys, where they lie within those of a model that also sees images."""
    text, named = raw.get("text_config"), raw.get("architectures")
    if not isinstance(named, list) or WRAPPER not in named or not isinstance(text, dict):
        return raw
    log.warning("%s: the image encoder is left out, only the text model is read", path)
    own = {key: value for key, value in text.items() if key not in ("architectures", "model_type")}
    return {**raw, **own}


def _refuse_unknown(keys: Keys) -> None:
    """Refuse what changes the computation and is not known here."""
    activation = keys.text("hidden_act") or "silu"
    if activation not in _SILU:
        raise UnsupportedError(f"hidden_act {activation!r} is not known, only silu", path=keys.path)
    factor = keys.number("partial_rotary_factor", 1.0)
    if factor != 1.0:
        raise UnsupportedError(f"partial_rotary_factor {factor} is not known, only 1", path=keys.path)


def _method(keys: Keys) -> str | None:
    """How the weights are quantized, as the configuration says; None if they are not."""
    for key in ("quantization_config", "compression_config"):
        if table := keys.table(key):
            return f"{key}, method {str(table.get('quant_method', 'unnamed'))[:40]!r}"
    return None


def _refuse_quantized(keys: Keys) -> None:
    method = _method(keys)
    if method is None:
        return
    hint = "Start from the original checkpoint in full precision."
    if method.endswith("'mxfp4'"):
        hint = f"Tensors NAME_blocks and NAME_scales are not read; MXFP4 of GGUF and compressed-tensors is. {hint}"
    raise UnsupportedError(f"the weights are quantized ({method})", path=keys.path, hint=hint)


def _dtype(keys: Keys) -> str | None:
    named = keys.raw.get("dtype") or keys.raw.get("torch_dtype")
    return DTYPES.get(named.removeprefix("torch.")) if isinstance(named, str) else None


def _experts(keys: Keys) -> tuple[int, int]:
    """Experts of a layer, and how many of them a token passes through."""
    count = keys.count("num_local_experts", limit=MAX_EXPERTS)
    return count, keys.count("num_experts_per_tok", limit=count)


def _window(keys: Keys) -> int | None:
    """The sliding window: an explicit null switches it off, a missing key is the class's default."""
    if keys.raw.get("sliding_window", keys.absent.get("sliding_window")) is None:
        return None
    return keys.count("sliding_window")


def _check_layer_types(keys: Keys, config: ModelConfig) -> None:
    """`layer_types` must say the same for every layer, and what sliding_window says."""
    listed = keys.raw.get("layer_types")
    if listed is None:
        return
    expected = "sliding_attention" if config.sliding_window else "full_attention"
    if not isinstance(listed, list) or any(kind != expected for kind in listed):
        raise UnsupportedError(f"layer_types other than {expected!r} for every layer are not known", path=keys.path)


def _rope(keys: Keys, context: int) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from `rope_scaling`, `rope_parameters` and the top level, which must agree."""
    found = []
    for key in ("rope_scaling", "rope_parameters"):
        table = keys.table(key)
        nested = {kind: value for kind, value in table.items() if kind in _LAYER_TYPES}
        if nested:
            parts = [(f"{key}.{kind}.", Keys(nested, keys.path, f"{key}.").table(kind)) for kind in nested]
        else:
            parts = [(f"{key}.", table)] if table else []
        found += [_rope_table(Keys(part, keys.path, where), keys, context) for where, part in parts]
    if not found:
        return keys.number("rope_theta", 10000.0), None
    if any(other != found[0] for other in found):
        raise UnsupportedError("rotary embedding is described twice and differently", path=keys.path)
    return found[0]


def _rope_table(part: Keys, keys: Keys, context: int) -> tuple[float, RopeScaling | None]:
    kind = part.text("rope_type") or part.text("type") or "default"
    theta = part.number("rope_theta", keys.number("rope_theta", 10000.0))
    factor = part.number("partial_rotary_factor", 1.0)
    if factor != 1.0:
        raise UnsupportedError(f"{part.where}partial_rotary_factor {factor} is not known, only 1", path=part.path)
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", part.number("factor"))
    if kind == "llama3":
        original = part.count("original_max_position_embeddings", context)  # unless told, there was no extension
        low, high = part.number("low_freq_factor"), part.number("high_freq_factor")
        if low >= high:
            raise part.fault("low_freq_factor", low, f"less than high_freq_factor, {high}")
        return theta, RopeScaling("llama3", part.number("factor"), low, high, original)
    raise UnsupportedError(
        f"{part.where}rope_type {kind[:40]!r} is not known", path=part.path, hint="Known: default, linear, llama3."
    )


def dump(config: ModelConfig, *, dtype: str) -> bytes:
    """Write a ModelConfig as config.json; `dtype` (codec) is what most of the weights are stored in."""
    module = archs.by_name(config.family)
    eos = list(config.eos_token_ids)
    raw: dict[str, Any] = {
        "architectures": [module.HF_ARCHITECTURES[0]],
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos if len(eos) > 1 else eos[0] if eos else None,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": module.MODEL_TYPE,
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.n_kv_heads,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": _dump_scaling(config.rope_scaling),
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": {codec: name for name, codec in DTYPES.items()}[dtype],
        "vocab_size": config.vocab_size,
    }
    if config.family == "llama":
        raw |= {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    elif config.grok is not None:
        raw |= grok_config.entries(config)
    else:
        raw["sliding_window"] = config.sliding_window
    if module.HAS_EXPERTS:
        raw |= {"num_local_experts": config.n_experts, "num_experts_per_tok": config.n_experts_used}
    if config.name:
        raw["_name_or_path"] = config.name
    return (json.dumps(raw, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _dump_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"factor": scaling.factor, "rope_type": "linear"}
    return {
        "factor": scaling.factor,
        "high_freq_factor": scaling.high_freq_factor,
        "low_freq_factor": scaling.low_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
        "rope_type": "llama3",
    }
