"""`ModelConfig` in GGUF's keys, and back.

| key, A = general.architecture | type | field |
|---|---|---|
| A.block_count, .context_length | u32 | n_layers, max_position_embeddings |
| A.embedding_length, .feed_forward_length | u32 | hidden_size, intermediate_size |
| A.attention.head_count, .head_count_kv | u32 | n_heads, n_kv_heads |
| A.attention.key_length, .value_length, A.rope.dimension_count | u32 | head_dim, always written |
| A.attention.layer_norm_rms_epsilon, A.rope.freq_base | f32 | rms_norm_eps, rope_theta |
| A.rope.scaling.type, .factor | string, f32 | rope_scaling of kind "linear" |
| A.vocab_size | u32 | vocab_size |
| A.expert_count, .expert_used_count | u32 | n_experts, n_experts_used; absent from a dense model |

A scaling of kind "llama3" is a tensor (`rope_freqs`). Tied embeddings show in the absence of output.weight, biases in
their presence. Not stored at all, because arch "llama" has no place for them: the sliding window and whether the model
was called Llama or Mistral. Several end-of-sequence ids are kept in weightsmith.eos_token_ids; other programs know
one, and find the rest by their texts.

Sizes from outside are held against the tensors before anything depends on them.

Ref: llama.cpp src/llama-model.cpp (load_hparams), src/models/llama.cpp; conversion/base.py (set_gguf_parameters).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats import archs
from weightsmith.formats.gguf import grok_keys, rope_freqs
from weightsmith.formats.gguf.metadata import Metadata
from weightsmith.formats.gguf.pack import Key, array, f32, text, u32
from weightsmith.formats.gguf.parse import F64, I32
from weightsmith.formats.gguf.vocab import TOKENS, special_ids
from weightsmith.quant import recipes
from weightsmith.types import ModelConfig, RopeScaling, TensorInfo

ARCHITECTURE, FILE_TYPE = "general.architecture", "general.file_type"
EOS_IDS, ROPE_SCALING = "weightsmith.eos_token_ids", "weightsmith.rope_scaling"
MAX_EOS = 1024
MAX_EXPERTS = 1024  # llama.cpp has no more
FLOATS = ("F32", "F16", "BF16")
# A file type as other programs know it: by its name, or guessed from the codec that most weights have.
FILE_TYPES = {
    **recipes.FILE_TYPES,
    "IQ2_XXS": 19,
    "IQ2_XS": 20,
    "IQ3_XXS": 23,
    "IQ1_S": 24,
    "IQ3_S": 26,
    "IQ2_S": 28,
    "IQ1_M": 31,
    "TQ1_0": 36,
    "TQ2_0": 37,
    "MXFP4": 38,
    "NVFP4": 39,
    "Q1_0": 40,
    "Q2_0": 41,
}
_GENERAL = ("architecture", "type", "name", "size_label", "file_type", "quantization_version", "alignment")
_PER_ARCH = (
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
    "expert_count",
    "expert_used_count",
)
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias")
_MLP_BIASES = ("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")


def is_owned(key: str, arch: str) -> bool:
    """True for a key that is recomputed from the configuration and never carried over from another file."""
    owned = (
        *(f"general.{name}" for name in _GENERAL),
        *(f"{arch}.{name}" for name in (*_PER_ARCH, *(grok_keys.OWNED if arch == "grok" else ()))),
        EOS_IDS,
        ROPE_SCALING,
    )
    return key in owned or key.startswith("split.")


def read_config(
    metadata: Metadata, tensors: Mapping[str, TensorInfo], read: Callable[[str], NDArray[np.uint8]]
) -> ModelConfig:
    """The configuration; `tensors` are the file's own, `read` gives a small tensor's bytes.

    Raises UnsupportedError (unknown family, a trait that no family has), IntegrityError (missing or impossible keys,
    keys that contradict the tensors).
    """
    arch = _architecture(metadata)
    experts, experts_used = _experts(metadata, arch)
    family = _family(metadata, arch, experts=experts > 0)
    _refuse_unknown_traits(metadata, arch)
    hidden = _size(metadata, f"{arch}.embedding_length")
    heads = _size(metadata, f"{arch}.attention.head_count")
    head_dim = _head_dim(metadata, arch, hidden, heads)
    theta = metadata.number(f"{arch}.rope.freq_base", 10000.0) or 0.0
    epsilon = metadata.number(f"{arch}.attention.layer_norm_rms_epsilon")
    if theta <= 0 or epsilon is None or epsilon < 0:
        key = "rope.freq_base" if theta <= 0 else "attention.layer_norm_rms_epsilon"
        raise metadata.damaged(f"{arch}.{key}", "is missing or not positive")
    context = _size(metadata, f"{arch}.context_length")
    vocab_size = _vocab_size(metadata, tensors, arch)
    ids = special_ids(metadata, vocab_size)
    config = ModelConfig(
        family=family.__name__.rpartition(".")[2],
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=_size(metadata, f"{arch}.feed_forward_length"),
        n_layers=_layers(metadata, tensors, arch),
        n_heads=heads,
        n_kv_heads=metadata.integer(f"{arch}.attention.head_count_kv", heads) or heads,
        head_dim=head_dim,
        rms_norm_eps=epsilon,
        rope_theta=theta,
        max_position_embeddings=context,
        tie_word_embeddings="output.weight" not in tensors,
        dtype=_dtype(tensors.values()),
        rope_scaling=_rope_scaling(metadata, tensors, read, arch=arch, theta=theta, head_dim=head_dim),
        attention_bias=_has_biases(metadata, tensors, _BIASES),
        mlp_bias=_has_biases(metadata, tensors, _MLP_BIASES),
        bos_token_id=ids["bos_id"],
        eos_token_ids=_eos_ids(metadata, ids["eos_id"]),
        pad_token_id=ids["pad_id"],
        name=metadata.text("general.name") or metadata.text("general.basename") or "",
        n_experts=experts,
        n_experts_used=experts_used,
    )
    if config.family == "grok":
        grok, width = grok_keys.read(metadata, dense="blk.0.ffn_up.weight" in tensors)
        return replace(config, grok=grok, intermediate_size=width)
    return config


def _architecture(metadata: Metadata) -> str:
    arch, kind = metadata.text(ARCHITECTURE), metadata.text("general.type")
    if arch is None or kind not in (None, "model"):
        found = f"general.type is {kind!r}" if kind not in (None, "model") else f"there is no key {ARCHITECTURE!r}"
        raise UnsupportedError(f"not a model: {found}", path=metadata.header.path)
    return arch


def _experts(metadata: Metadata, arch: str) -> tuple[int, int]:
    """How many experts a layer has, and how many of them a token passes through; 0 of 0 in a dense model."""
    key, used_key = f"{arch}.expert_count", f"{arch}.expert_used_count"
    count, used = metadata.integer(key, 0) or 0, metadata.integer(used_key, 0) or 0
    if count > MAX_EXPERTS:
        raise metadata.damaged(key, f"is {count}, at most {MAX_EXPERTS} are possible")
    if used > count or (count and not used):
        raise metadata.damaged(used_key, f"is {used} of {count} experts")
    return count, used


def _family(metadata: Metadata, arch: str, *, experts: bool) -> ModuleType:
    try:
        return archs.by_gguf(arch, experts=experts)
    except UnsupportedError as error:
        error.path = metadata.header.path
        raise


def _refuse_unknown_traits(metadata: Metadata, arch: str) -> None:
    """Keys that change what a Llama computes, and that no known family follows."""
    path = metadata.header.path
    if metadata.number(f"{arch}.attention.scale", 0.0):
        raise UnsupportedError("an attention scale of its own is not supported", path=path)
    if metadata.flag(f"{arch}.attention.causal") is False:
        raise UnsupportedError("attention that is not causal is not supported", path=path)


def _size(metadata: Metadata, key: str) -> int:
    value = metadata.integer(key)
    if not value:
        raise metadata.damaged(key, "is missing" if value is None else "is 0")
    return value


def _head_dim(metadata: Metadata, arch: str, hidden: int, heads: int) -> int:
    key = f"{arch}.attention.key_length"
    head_dim = metadata.integer(key) or hidden // heads
    if head_dim < 2 or head_dim % 2:
        raise metadata.damaged(key, f"a head dimension of {head_dim}, expected an even number")
    for other in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
        value = metadata.integer(other, head_dim)
        if value != head_dim:
            text_ = f"key {other!r} is {value}, the head dimension {head_dim}: they differ in no known family"
            raise UnsupportedError(text_, path=metadata.header.path)
    return head_dim


def _layers(metadata: Metadata, tensors: Mapping[str, TensorInfo], arch: str) -> int:
    key = f"{arch}.block_count"
    claimed = _size(metadata, key)
    present = {found[1] for found in map(_BLOCK.match, tensors) if found}
    if claimed != len(present):
        raise metadata.damaged(key, f"is {claimed}, but the tensors make up {len(present)} blocks (blk.N.*)")
    return claimed


def _vocab_size(metadata: Metadata, tensors: Mapping[str, TensorInfo], arch: str) -> int:
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise IntegrityError("is missing", path=metadata.header.path, tensor="token_embd.weight")
    rows = embedding.n_rows
    for key, value in (
        (f"{arch}.vocab_size", metadata.integer(f"{arch}.vocab_size", rows)),
        (TOKENS, metadata.count(TOKENS)),
    ):
        if value not in (None, rows):
            raise metadata.damaged(key, f"counts {value} tokens, but token_embd.weight has {rows} rows")
    return rows


def _has_biases(metadata: Metadata, tensors: Mapping[str, TensorInfo], names: tuple[str, ...]) -> bool:
    present = {found[2] for found in map(_BLOCK.match, tensors) if found} & set(names)
    if present and len(present) < len(names):
        text_ = f"has the biases {', '.join(sorted(present))} only, which no known family does"
        raise UnsupportedError(text_, path=metadata.header.path)
    return bool(present)


def _rope_scaling(
    metadata: Metadata,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], NDArray[np.uint8]],
    *,
    arch: str,
    theta: float,
    head_dim: int,
) -> RopeScaling | None:
    kind = metadata.text(f"{arch}.rope.scaling.type")
    if kind == "yarn" and arch == "grok":
        return grok_keys.read_yarn(metadata)
    factor = metadata.number(f"{arch}.rope.scaling.factor") or metadata.number(f"{arch}.rope.scale_linear") or 1.0
    linear = kind in (None, "linear") and factor != 1.0
    if kind not in (None, "none", "linear") or factor < 0:
        raise UnsupportedError(f"rope scaling {kind!r} by {factor} is not supported", path=metadata.header.path)
    info = tensors.get(rope_freqs.NAME)
    if info is None:
        return RopeScaling("linear", factor) if linear else None
    if linear:
        raise UnsupportedError(f"scales rope by a key and by {rope_freqs.NAME}", path=metadata.header.path)
    if info.shape != (head_dim // 2,) or info.codec != "F32":
        text_ = f"is {info.codec} {info.shape}, expected F32 {(head_dim // 2,)}"
        raise IntegrityError(text_, path=info.path, tensor=info.name)
    context = metadata.integer(f"{arch}.context_length", 0) or 0
    try:
        return rope_freqs.solve(read(info.name).view("<f4"), theta, context, _told_scaling(metadata))
    except ValueError as error:
        raise UnsupportedError(str(error), path=info.path, tensor=info.name) from error


def _told_scaling(metadata: Metadata) -> RopeScaling | None:
    numbers = metadata.numbers(ROPE_SCALING)
    if numbers is None:
        return None
    if len(numbers) != 4 or not np.isfinite(numbers).all():
        raise metadata.damaged(ROPE_SCALING, "is not four finite numbers")
    factor, low, high, length = map(float, numbers)
    return RopeScaling("llama3", factor, low, high, int(length))


def _eos_ids(metadata: Metadata, eos_id: int | None) -> tuple[int, ...]:
    ids = metadata.numbers(EOS_IDS)
    if ids is None:
        return () if eos_id is None else (eos_id,)
    if len(ids) > MAX_EOS or not all(isinstance(value, int) and value >= 0 for value in ids):
        raise metadata.damaged(EOS_IDS, "holds values that are no token ids")
    return tuple(ids)


def _dtype(tensors: Iterable[TensorInfo]) -> str:
    codec = main_codec(tensors)
    return codec if codec in FLOATS else "F16"


def main_codec(tensors: Iterable[TensorInfo]) -> str:
    """The codec that most weights of the block matrices have (of all tensors if there are none)."""
    every, blocks = Counter[str](), Counter[str]()
    for info in tensors:
        every[info.codec] += info.n_weights
        if len(info.shape) > 1 and info.name.startswith(("blk.", "model.layers.")):
            blocks[info.codec] += info.n_weights
    counts = blocks or every
    return counts.most_common(1)[0][0] if counts else "F16"


def config_keys(
    config: ModelConfig, tensors: list[TensorInfo], eos_id: int | None, *, file_type: int | None = None
) -> list[Key]:
    """The keys that `config` is written as; `tensors` are all that the file gets, `eos_id` is what its own key says.

    file_type: its number, guessed from `tensors` if None.
    """
    arch = str(archs.by_name(config.family).GGUF_ARCH)
    keys = [text(ARCHITECTURE, arch), text("general.type", "model")]
    if config.name:
        keys.append(text("general.name", config.name))
    keys += [
        text("general.size_label", size_label(sum(info.n_weights for info in tensors))),
        u32(f"{arch}.vocab_size", config.vocab_size),
        u32(f"{arch}.context_length", config.max_position_embeddings),
        u32(f"{arch}.embedding_length", config.hidden_size),
        u32(f"{arch}.block_count", config.n_layers),
        u32(f"{arch}.feed_forward_length", (config.grok and config.grok.dense_size) or config.intermediate_size),
        u32(f"{arch}.attention.head_count", config.n_heads),
        u32(f"{arch}.attention.head_count_kv", config.n_kv_heads),
        u32(f"{arch}.attention.key_length", config.head_dim),
        u32(f"{arch}.attention.value_length", config.head_dim),
        f32(f"{arch}.attention.layer_norm_rms_epsilon", config.rms_norm_eps),
        u32(f"{arch}.rope.dimension_count", config.head_dim),
        f32(f"{arch}.rope.freq_base", config.rope_theta),
    ]
    if config.n_experts:
        keys.append(u32(f"{arch}.expert_count", config.n_experts))
        keys.append(u32(f"{arch}.expert_used_count", config.n_experts_used))
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        keys.append(text(f"{arch}.rope.scaling.type", "linear"))
        keys.append(f32(f"{arch}.rope.scaling.factor", config.rope_scaling.factor))
    keys += _rope_scaling_keys(config)
    keys += grok_keys.keys(config) if config.grok is not None else []
    if file_type is None:
        file_type = FILE_TYPES.get(main_codec(tensors))
    if file_type is not None:
        keys.append(u32(FILE_TYPE, file_type))
    keys.append(u32("general.quantization_version", 2))
    if config.eos_token_ids not in ((), (eos_id,)):
        keys.append(array(EOS_IDS, I32, config.eos_token_ids))
    return keys


def _rope_scaling_keys(config: ModelConfig) -> list[Key]:
    """What rope_freqs.weight alone would not tell of a llama3 scaling; nothing for the usual ones."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "llama3":
        return []
    vector = rope_freqs.divisors(scaling, config.rope_theta, config.head_dim)
    try:
        if rope_freqs.solve(vector, config.rope_theta, config.max_position_embeddings) == scaling:
            return []
    except ValueError:
        pass  # not identified by the vector
    numbers = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor)
    return [array(ROPE_SCALING, F64, [*numbers, scaling.original_max_position_embeddings])]


def size_label(n_weights: int) -> str:
    """A count of weights for humans, two digits or more: 135M, 1.2B, 70B."""
    power, letter = next(((p, c) for p, c in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if n_weights > p), (1e3, "K"))
    value = n_weights / power
    digits = len(str(round(value)).lstrip("0"))
    return f"{value:.{max(2 - digits, 0)}f}{letter}"
