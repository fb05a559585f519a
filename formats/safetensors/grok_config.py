"""config.json of Grok to ModelConfig and back; three schemes, told by the class.

| | Grok1ForCausalLM (xAI's Grok-2, and written here) | GrokForCausalLM (keyfan) | Grok1ModelForCausalLM (hpcai-tech) |
|---|---|---|---|
| experts | num_local_experts | num_local_experts | num_experts |
| width of an expert | moe_intermediate_size, else intermediate_size | intermediate_size | intermediate_size |
| scores times | attn_output_multiplier, else head_dim^-1/2 | attn_output_multiplier | attn_output_multiplier |
| scores capped at | attn_logit_softcapping | 30 | max_attn_value |
| dense branch | residual_moe: intermediate_size | none | none |

Rotary embedding is flat: rope_theta, rope_type ("original": plain; "yarn"), scaling_factor and YaRN's numbers. Vendors'
code for "original" interpolates nothing; llama.cpp's converter takes it for "yarn", as a later version of Grok-2's own
configuration does.

keyfan's class has defaults of an unrelated model (silu, theta 100000, 4096 tokens), which its config.json may repeat
though the weights are Grok-1's: there Grok-1's own values count.

Ref: config.json of xai-org/grok-2 and sglang models/grok.py; configuration_grok.py of keyfan/grok-1-hf;
configuration_grok_1.py of hpcai-tech/grok-1; conversion/grok.py of llama.cpp.
"""

from __future__ import annotations

import logging
from typing import Any

from weightsmith.errors import UnsupportedError
from weightsmith.formats.safetensors.keys import MAX_EXPERTS, MAX_LAYERS, MAX_SIZE, Keys
from weightsmith.types import Grok, ModelConfig, RopeScaling

log = logging.getLogger(__name__)

KEYFAN = "GrokForCausalLM"
_GELU = ("gelu", "gelu_new", "gelu_pytorch_tanh")
_FOREIGN_THETA, _THETA, _CONTEXT = 100000.0, 10000.0, 8192


def read(keys: Keys, *, dtype: str) -> ModelConfig:
    """The model. dtype: codec of most weights. A file that does not say so is of a model with a tied output matrix.

    Raises IntegrityError (a value of the wrong type or size), UnsupportedError (what is not known), naming the key.
    """
    copied = KEYFAN in (keys.raw.get("architectures") or [KEYFAN])
    _refuse_unknown(keys, copied=copied)
    vocab_size, hidden = keys.count("vocab_size"), keys.count("hidden_size")
    heads, kv_heads, head_dim = keys.heads(hidden)
    experts_key = "num_local_experts" if keys.raw.get("num_local_experts") is not None else "num_experts"
    experts = keys.count(experts_key, 8, limit=MAX_EXPERTS)
    theta, context = keys.number("rope_theta", _THETA), keys.count("max_position_embeddings", _CONTEXT)
    if copied and theta == _FOREIGN_THETA:
        log.info("%s: rope_theta 100000 is a default of the class; Grok-1 has 10000", keys.path)
        theta, context = _THETA, max(context, _CONTEXT)
    return ModelConfig(
        family="grok",
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=keys.count("moe_intermediate_size", keys.count("intermediate_size")),
        n_layers=keys.count("num_hidden_layers", limit=MAX_LAYERS),
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=keys.number("rms_norm_eps", 1e-5),
        rope_theta=theta,
        max_position_embeddings=context,
        tie_word_embeddings=keys.flag("tie_word_embeddings", default=True),
        dtype=dtype,
        rope_scaling=_scaling(keys, context),
        bos_token_id=next(iter(keys.ids("bos_token_id", vocab_size)), None),
        eos_token_ids=keys.ids("eos_token_id", vocab_size),
        pad_token_id=next((i for i in keys.ids("pad_token_id", MAX_SIZE) if i < vocab_size), None),
        name=keys.text("_name_or_path").rstrip("/").rpartition("/")[2][:200],
        n_experts=experts,
        n_experts_used=keys.count("num_experts_per_tok", min(2, experts), limit=experts),
        grok=_traits(keys, head_dim),
    )


def _traits(keys: Keys, head_dim: int) -> Grok:
    cap = "attn_logit_softcapping" if keys.raw.get("attn_logit_softcapping") is not None else "max_attn_value"
    return Grok(
        embedding_scale=keys.number("embedding_multiplier_scale"),
        logit_scale=keys.number("output_multiplier_scale"),
        attention_scale=keys.number("attn_output_multiplier", head_dim**-0.5),
        attention_cap=keys.number(cap, 30.0),
        router_cap=_cap(keys, "router_logit_softcapping"),
        logit_cap=_cap(keys, "final_logit_softcapping"),
        dense_size=keys.count("intermediate_size") if keys.flag("residual_moe") else 0,
        temperature_length=keys.count("attn_temperature_len", 1) if _says(keys, "attn_temperature_len") else 0,
    )


def _says(keys: Keys, key: str) -> bool:
    value = keys.raw.get(key)
    return not (value is None or (type(value) in (int, float) and value <= 0))


def _cap(keys: Keys, key: str) -> float:
    return keys.number(key) if _says(keys, key) else 0.0


def _scaling(keys: Keys, context: int) -> RopeScaling | None:
    for key in ("rope_scaling", "rope_parameters"):
        if keys.table(key).get("rope_type", keys.table(key).get("type", "default")) != "default":
            raise UnsupportedError(f"{key} is not how Grok says it; its keys are rope_type ...", path=keys.path)
    kind = keys.text("rope_type") or "original"
    if kind in ("original", "default"):
        return None
    if kind != "yarn":
        text = f"rope_type {kind[:40]!r} is not known"
        raise UnsupportedError(text, path=keys.path, hint="Known: original, yarn.")
    for key in ("extrapolation_factor", "attn_factor"):
        if keys.number(key, 1.0) != 1.0:
            raise UnsupportedError(f"{key} {keys.raw[key]} is not known, only 1", path=keys.path)
    original = keys.count("original_max_position_embeddings", context)
    slow, fast = keys.number("beta_slow", 1.0), keys.number("beta_fast", 8.0)
    if slow >= fast:
        raise keys.fault("beta_slow", slow, f"less than beta_fast, {fast}")
    return RopeScaling(
        "yarn",
        keys.number("scaling_factor"),
        original_max_position_embeddings=original,
        beta_fast=fast,
        beta_slow=slow,
    )


def _refuse_unknown(keys: Keys, *, copied: bool) -> None:
    activation = keys.text("hidden_act") or "gelu"
    if activation not in _GELU and not (copied and activation == "silu"):
        raise UnsupportedError(f"hidden_act {activation[:40]!r} is not known, only gelu", path=keys.path)
    if activation == "silu":
        log.info("%s: hidden_act silu is a default of the class; Grok-1 has gelu", keys.path)
    window, every = keys.raw.get("sliding_window_size"), keys.raw.get("global_attn_every_n")
    if window not in (None, -1) and every != 1:
        raise UnsupportedError(f"sliding_window_size {window!r} is not known, only -1", path=keys.path)


def entries(config: ModelConfig) -> dict[str, Any]:
    """What config.json has beside the keys that all families with experts share."""
    grok = config.grok
    assert grok is not None
    found: dict[str, Any] = {
        "attn_logit_softcapping": grok.attention_cap,
        "attn_output_multiplier": grok.attention_scale,
        "embedding_multiplier_scale": grok.embedding_scale,
        "hidden_act": "gelu",
        "intermediate_size": grok.dense_size or config.intermediate_size,
        "moe_intermediate_size": config.intermediate_size,
        "output_multiplier_scale": grok.logit_scale,
        "residual_moe": bool(grok.dense_size),
        "rope_scaling": None,
        "rope_type": "original",
    }
    optional = {
        "attn_temperature_len": grok.temperature_length,
        "final_logit_softcapping": grok.logit_cap,
        "router_logit_softcapping": grok.router_cap,
    }
    found |= {key: value for key, value in optional.items() if value}
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "yarn":
        found |= {
            "attn_factor": 1.0,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "extrapolation_factor": 1.0,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
            "rope_type": "yarn",
            "scaling_factor": scaling.factor,
        }
    return found
