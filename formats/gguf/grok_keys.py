"""What GGUF's arch "grok" says beside the keys of all families.

| grok. | | absent |
|---|---|---|
| embedding_scale, logit_scale, attention.output_scale | f32 | 78.38, 0.577, 0.088: Grok-1's |
| attn_logit_softcapping, router_logit_softcapping, final_logit_softcapping | f32 | 30, none, none |
| expert_feed_forward_length | u32 | feed_forward_length, which with a dense branch is that one's |
| attention.temperature_length | u32 | never |
| rope.scaling.{type,factor,original_context_length,yarn_{ext_factor,attn_factor,beta_fast,beta_slow}} | | none |

llama.cpp's own converter writes a router cap of 30 for Grok-1 too, which has none; nothing that follows Grok-1 applies
it (`evals.forward.grok`).

Ref: load_arch_hparams in llama.cpp src/models/grok.cpp; conversion/grok.py.
"""

from __future__ import annotations

from weightsmith.errors import UnsupportedError
from weightsmith.formats.gguf.metadata import Metadata
from weightsmith.formats.gguf.pack import Key, f32, text, u32
from weightsmith.types import Grok, ModelConfig, RopeScaling

OWNED = (
    "embedding_scale",
    "logit_scale",
    "attention.output_scale",
    "attn_logit_softcapping",
    "router_logit_softcapping",
    "final_logit_softcapping",
    "expert_feed_forward_length",
    "attention.temperature_length",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
)


def read(metadata: Metadata, *, dense: bool) -> tuple[Grok, int]:
    """Grok's traits, and the width of an expert. dense: whether the file has tensors of the dense branch.

    Raises IntegrityError for a number that cannot be.
    """
    wide = metadata.integer("grok.feed_forward_length", 0) or 0
    traits = Grok(
        embedding_scale=_number(metadata, "embedding_scale", 78.38367176906169),
        logit_scale=_number(metadata, "logit_scale", 0.5773502691896257),
        attention_scale=_number(metadata, "attention.output_scale", 0.08838834764831845),
        attention_cap=_number(metadata, "attn_logit_softcapping", 30.0),
        router_cap=_number(metadata, "router_logit_softcapping", 0.0, least=0.0),
        logit_cap=_number(metadata, "final_logit_softcapping", 0.0, least=0.0),
        dense_size=wide if dense else 0,
        temperature_length=metadata.integer("grok.attention.temperature_length", 0) or 0,
    )
    return traits, metadata.integer("grok.expert_feed_forward_length", 0) or wide


def _number(metadata: Metadata, name: str, default: float, *, least: float = 1e-30) -> float:
    value = metadata.number(f"grok.{name}", default)
    if value is None or not least <= value < 1e30:
        raise metadata.damaged(f"grok.{name}", f"is {value}, expected a positive number")
    return value


def read_yarn(metadata: Metadata) -> RopeScaling:
    """Scaling of kind "yarn"; UnsupportedError for one whose parts are weighted."""
    prefix = "grok.rope.scaling."
    for name in ("yarn_ext_factor", "yarn_attn_factor"):
        value = metadata.number(prefix + name, 1.0)
        if value != 1.0:
            raise UnsupportedError(f"{prefix}{name} {value} is not known, only 1", path=metadata.header.path)
    fast, slow = metadata.number(prefix + "yarn_beta_fast", 8.0), metadata.number(prefix + "yarn_beta_slow", 1.0)
    factor = metadata.number(prefix + "factor", 0.0)
    length = metadata.integer(prefix + "original_context_length", 0) or metadata.integer("grok.context_length", 0)
    if not factor or factor <= 0 or not fast or not slow or not 0 < slow < fast or not length:
        raise metadata.damaged(prefix + "factor", "and what belongs to it make no sense")
    return RopeScaling("yarn", factor, original_max_position_embeddings=length, beta_fast=fast, beta_slow=slow)


def keys(config: ModelConfig) -> list[Key]:
    """The keys that Grok's traits are written as; feed_forward_length is written with those of all families."""
    grok = config.grok
    assert grok is not None
    found = [
        f32("grok.embedding_scale", grok.embedding_scale),
        f32("grok.logit_scale", grok.logit_scale),
        f32("grok.attention.output_scale", grok.attention_scale),
        f32("grok.attn_logit_softcapping", grok.attention_cap),
    ]
    if grok.router_cap:
        found.append(f32("grok.router_logit_softcapping", grok.router_cap))
    if grok.logit_cap:
        found.append(f32("grok.final_logit_softcapping", grok.logit_cap))
    if grok.dense_size:
        found.append(u32("grok.expert_feed_forward_length", config.intermediate_size))
    if grok.temperature_length:
        found.append(u32("grok.attention.temperature_length", grok.temperature_length))
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "yarn":
        found += [
            text("grok.rope.scaling.type", "yarn"),
            f32("grok.rope.scaling.factor", scaling.factor),
            u32("grok.rope.scaling.original_context_length", scaling.original_max_position_embeddings),
            f32("grok.rope.scaling.yarn_ext_factor", 1.0),
            f32("grok.rope.scaling.yarn_attn_factor", 1.0),
            f32("grok.rope.scaling.yarn_beta_fast", scaling.beta_fast),
            f32("grok.rope.scaling.yarn_beta_slow", scaling.beta_slow),
        ]
    return found
