"""Recipes: which tensor of a model gets which codec for a file type such as Q4_K_M.

A file type is a base codec and a mix: the tensors whose errors cost most get a better one. The rules are
llama-quantize's, so a file of the same type has the same codec in every tensor. n is the number of layers, i a layer,
gqa the query heads per key head; "more" picks half of the layers: the first and last eighth and every third between.

- Vectors, norms, biases, routers and a few small matrices stay F32; F32, F16 and BF16 have no mix.
- The output matrix, which is the embedding in a tied model, gets Q6_K (Q8_0 keeps Q8_0).
- Block matrices follow `_MIXES`; what it does not name has the base codec. attn_v stands for fused variants too.
- Models of 70B class: attn_v gets Q5_K where it would get Q3_K or Q4_K.
- Exactly 8 experts: attn_v and attn_k get Q8_0, attn_output Q5_K for the types in `_EIGHT`.
- A row that is no multiple of the codec's block falls back (`_SMALLER`), to F16 as the last resort; `Assigned` tells.

i is counted, not read from the name, unless the model has experts: attn_v counts the attention layers of a hybrid
model. A tensor that was asked for by hand is not counted, so the mix of those after it moves up, as it does in
llama-quantize.

What is asked for by hand wins over the mix: embedding_type, then output_type, then the first pattern that is found in
the tensor's canonical or GGUF name. It cannot reach tensors that stay F32, and it falls back like any other. Unlike in
llama-quantize it is never ignored: patterns count for F16 too, and output_type reaches a tied embedding under `pure`.

Ref: llama.cpp src/llama-quant.cpp (llama_tensor_get_type_impl, tensor_allows_quantization, tensor_type_fallback,
tensor_requires_imatrix), except what it does for the archs "falcon" and "glm5-next" alone; ids: include/llama.h,
enum llama_ftype.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from weightsmith.errors import UnsupportedError, UsageError
from weightsmith.quant import codecs
from weightsmith.quant.blocks import BLOCKS
from weightsmith.types import Recipe

# general.file_type of a GGUF file. Q3_K, Q4_K and Q5_K are other names of the _M types.
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q8_0": 7,
    "Q6_K": 18,
    "Q5_K_M": 17,
    "Q5_K_S": 16,
    "Q5_K": 17,
    "Q5_1": 9,
    "Q5_0": 8,
    "Q4_K_M": 15,
    "Q4_K_S": 14,
    "Q4_K": 15,
    "Q4_1": 3,
    "Q4_0": 2,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "Q3_K_L": 13,
    "Q3_K_M": 12,
    "Q3_K_S": 11,
    "Q3_K": 12,
    "Q2_K": 10,
    "Q2_K_S": 21,
}
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
_FLOATS = ("F32", "F16", "BF16")

OUTPUT_CODEC = "Q6_K"
FALLBACK = "F16"
_SMALLER = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}

_OUTPUT, _EMBEDDING, _ATTN_V, _ATTN_K, _ATTN_OUTPUT, _FFN_DOWN = (
    "output",
    "embedding",
    "attn_v",
    "attn_k",
    "attn_output",
    "ffn_down",
)
# GGUF's names and canonical ones; the first pattern that is found decides.
_ROLES = (
    (_OUTPUT, re.compile(r"^(output|lm_head)\.weight$")),
    (_EMBEDDING, re.compile(r"^(token_embd|per_layer_token_embd|model\.embed_tokens)\.weight$")),
    (_ATTN_V, re.compile(r"attn_(qkv|kv_b|v)\.weight|self_attn\.(qkv|kv_b|v)_proj\.weight")),
    (_ATTN_K, re.compile(r"attn_k\.weight|self_attn\.k_proj\.weight")),
    (_ATTN_OUTPUT, re.compile(r"attn_output\.weight|self_attn\.o_proj\.weight")),
    (_FFN_DOWN, re.compile(r"ffn_down|mlp\.(\w+\.)*down_proj|block_sparse_moe\.experts\.(\d+\.)?(w2|down_proj)")),
)
_LAYER = re.compile(r"^(?:blk|model\.layers)\.(\d+)\.")
_KEPT = re.compile(
    r"norm\.weight$|\.(block_sparse_moe|mlp)\.gate\.weight$|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight"
    r"|ssm_conv1d|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight|altup|laurel|per_layer_model_proj"
    r"|^(position_embd|token_types)\.weight$|time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)\.weight"
    r"|attn_rel_b\.weight|\.position_embd|\.rel_pos|\.patch_embd|\.patch_merger"
)
# Layers from which llama.cpp takes a model of this arch for one of 70B class.
_LARGE = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}


@dataclass(frozen=True, slots=True)
class Traits:
    """What the rules ask of a model besides its tensors.

    n_layers: blocks. gqa: query heads per key and value head in the first layer, 0 if that has no attention.
    n_experts: of an expert layer, 0 or 1 if dense. arch: GGUF's general.architecture.
    """

    n_layers: int
    gqa: int = 1
    n_experts: int = 0
    arch: str = "llama"

    @property
    def is_large(self) -> bool:
        """True for what llama.cpp calls 70B; a Llama of that depth without grouped queries is 65B."""
        return _LARGE.get(self.arch) == self.n_layers and (self.arch != "llama" or self.gqa != 1)


@dataclass(frozen=True, slots=True)
class Assigned:
    """The codec a tensor gets, and the one it would get if its rows were a multiple of that one's block."""

    codec: str
    wanted: str


@dataclass(frozen=True, slots=True)
class _Place:
    """The i-th of n tensors of a role. measured: activations were measured, there is an imatrix."""

    i: int
    n: int
    gqa: int
    measured: bool


_Rule = tuple[tuple[Callable[[_Place], bool], str], ...]


def _always(_: _Place) -> bool:
    return True


def _grouped(place: _Place) -> bool:
    return place.gqa >= 4


def _more(place: _Place) -> bool:
    i, n = place.i, place.n
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _first(count: int) -> Callable[[_Place], bool]:
    return lambda place: place.i < count


def _early(place: _Place) -> bool:
    return place.i < place.n // 8


_Q5_K_EARLY: _Rule = ((_early, "Q5_K"),)
_Q6_K_MORE: _Rule = ((_more, "Q6_K"),)
_IQ4: dict[str, _Rule] = {
    _ATTN_V: ((_grouped, "Q5_K"),),
    _FFN_DOWN: ((lambda place: _early(place) and not place.measured, "Q5_K"),),
}
# File type -> role -> rules; the first that holds decides, the base codec if none does.
_MIXES: dict[str, dict[str, _Rule]] = {
    "Q2_K": {
        _ATTN_V: ((_grouped, "Q4_K"), (_always, "Q3_K")),
        _ATTN_OUTPUT: ((_always, "Q3_K"),),
        _FFN_DOWN: ((_always, "Q3_K"),),
    },
    "Q2_K_S": {_ATTN_V: ((_grouped, "Q4_K"),), _FFN_DOWN: ((_early, "Q4_K"),)},
    "Q3_K_M": {
        _ATTN_V: ((_first(2), "Q5_K"), (_always, "Q4_K")),
        _ATTN_OUTPUT: ((_always, "Q4_K"),),
        _FFN_DOWN: ((lambda place: place.i < place.n // 16, "Q5_K"), (_always, "Q4_K")),
    },
    "Q3_K_L": dict.fromkeys((_ATTN_V, _ATTN_OUTPUT, _FFN_DOWN), ((_always, "Q5_K"),)),
    "Q4_K_S": {_ATTN_V: ((_first(4), "Q5_K"),), _FFN_DOWN: _Q5_K_EARLY},
    "Q4_K_M": {_ATTN_V: _Q6_K_MORE, _FFN_DOWN: _Q6_K_MORE},
    "Q5_K_M": {_ATTN_V: _Q6_K_MORE, _FFN_DOWN: _Q6_K_MORE},
    "IQ4_NL": _IQ4,
    "IQ4_XS": _IQ4,
    # Without measured activations Q4_1 and Q5_1 do worse there than Q4_0 and Q5_0.
    "Q4_0": {_FFN_DOWN: ((lambda place: _early(place) and place.measured, "Q4_1"),)},
    "Q5_0": {_FFN_DOWN: ((lambda place: _early(place) and place.measured, "Q5_1"),)},
}
_EIGHT = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS")


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """True for a weight that follows the file type, False for one that stays F32 (norm, bias, router, vector)."""
    return math.prod(shape[:-1]) > 1 and name.endswith(".weight") and not _KEPT.search(name)


def is_embedding(name: str) -> bool:
    """Whether a tensor's rows are looked up, one for each token (also where they serve as the output matrix too)."""
    return _role(name) == _EMBEDDING


def base_codec(file_type: str) -> str:
    """The codec of whatever the mix does not name; UnsupportedError for an unknown file type."""
    file_type_id(file_type)
    return re.sub(r"_[SML]$", "", file_type)


def file_type_id(file_type: str) -> int:
    """The number that general.file_type holds; UnsupportedError for an unknown name."""
    if file_type not in FILE_TYPES:
        raise UnsupportedError(f"unknown file type {file_type!r}", hint=f"Known: {', '.join(FILE_TYPES)}.")
    return FILE_TYPES[file_type]


def assign(
    shapes: Mapping[str, tuple[int, ...]],
    recipe: Recipe,
    *,
    tied: bool,
    traits: Traits,
    aliases: Mapping[str, str] | None = None,
) -> dict[str, Assigned]:
    """What `choose` says, if it can be made.

    Raises what `choose` raises, UnsupportedError for a codec that cannot be written, and UsageError for a type that
    is worthless without an imatrix.
    """
    known = [name for name in codecs.writable() if BLOCKS[name].id >= 0]
    asked = [codec for _, codec in recipe.overrides]
    for codec in (*asked, recipe.output_type, recipe.embedding_type):
        if codec is not None and codec not in known:
            raise UnsupportedError(
                f"{codec!r} cannot be written, but was asked for", hint=f"Writable: {', '.join(known)}."
            )
    chosen = choose(shapes, recipe, tied=tied, traits=traits, aliases=aliases)
    missing = {got.codec: name for name, got in reversed(chosen.items()) if got.codec not in known}
    if missing:
        raise UnsupportedError(
            f"{recipe.type} needs {' and '.join(sorted(missing))}, which cannot be written",
            tensor=missing[min(missing)],
            hint=f"Writable: {', '.join(known)}.",
        )
    for name, got in chosen.items():
        blind = recipe.type == "Q2_K_S" and got.codec == "Q2_K" and not recipe.imatrix
        if blind and _role(name) not in (_OUTPUT, _EMBEDDING):
            raise UsageError(
                "Q2_K_S is worthless without an imatrix", tensor=name, hint="Pass one, or take Q2_K, which needs none."
            )
    return chosen


def choose(
    shapes: Mapping[str, tuple[int, ...]],
    recipe: Recipe,
    *,
    tied: bool,
    traits: Traits,
    aliases: Mapping[str, str] | None = None,
) -> dict[str, Assigned]:
    """The codec that the rules give each tensor, in the order of `shapes` (canonical or GGUF name -> (out, in)).

    tied: the embedding is also the output matrix. aliases: GGUF names of canonical ones, in which patterns are looked
    for too. Raises UnsupportedError (unknown file type) and UsageError (bad pattern, or one that no matrix matches).
    """
    file_type = _ALIASES.get(recipe.type or "", recipe.type or "")
    aliases = aliases or {}
    matrices = [name for name, shape in shapes.items() if is_matrix(name, shape)]
    wanted = dict.fromkeys(shapes, "F32")
    by_hand = _by_hand(matrices, recipe, tied=tied, aliases=aliases)
    mixed = base_codec(file_type) not in _FLOATS and not recipe.pure
    total = Counter(_role(name) for name in matrices)
    seen: Counter[str] = Counter()
    for name in sorted(matrices, key=lambda name: (_layer(name), aliases.get(name, name))):
        if name in by_hand:
            wanted[name] = by_hand[name]
        elif not mixed:
            wanted[name] = base_codec(file_type)
        else:
            role = _role(name)
            is_output = role == _OUTPUT or (tied and role == _EMBEDDING)
            i = _layer(name) if role == _FFN_DOWN and traits.n_experts > 1 else seen[role]
            n = total[role] if role == _ATTN_V else traits.n_layers
            place = _Place(i, n, traits.gqa, recipe.imatrix)
            wanted[name] = _output_codec(file_type) if is_output else _mixed(file_type, role, place, traits)
            seen[role] += 1
    return {name: Assigned(_fitting(codec, shapes[name]), codec) for name, codec in wanted.items()}


def _output_codec(file_type: str) -> str:
    return "Q8_0" if file_type == "Q8_0" else OUTPUT_CODEC


def _mixed(file_type: str, role: str, place: _Place, traits: Traits) -> str:
    base = base_codec(file_type)
    if traits.n_experts == 8:
        if role in (_ATTN_V, _ATTN_K):
            return "Q8_0"
        if role == _ATTN_OUTPUT:
            return "Q5_K" if file_type in _EIGHT else base
    rules = _MIXES.get(file_type, {}).get(role, ())
    codec = next((codec for holds, codec in rules if holds(place)), base)
    return "Q5_K" if role == _ATTN_V and traits.is_large and codec in ("Q3_K", "Q4_K") else codec


def _fitting(codec: str, shape: tuple[int, ...]) -> str:
    """`codec`, or what stands in for it if it does not divide a row."""
    row_len = shape[-1] if shape else 1
    for candidate in (codec, _SMALLER.get(codec, codec)):
        if row_len % BLOCKS[candidate].weights == 0:
            return candidate
    return FALLBACK


def _role(name: str) -> str:
    return next((role for role, pattern in _ROLES if pattern.search(name)), "other")


def _layer(name: str) -> int:
    """The layer that a name says, -1 for tensors outside the layers, which come first."""
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


def _by_hand(matrices: Sequence[str], recipe: Recipe, *, tied: bool, aliases: Mapping[str, str]) -> dict[str, str]:
    """Codecs that the recipe names for single matrices."""
    rules = _compiled(recipe.overrides)
    unused = set(range(len(rules)))
    found: dict[str, str] = {}
    for name in matrices:
        role = _role(name)
        names = {name, aliases.get(name, name)}
        hit = next((i for i, (pattern, _) in enumerate(rules) if any(pattern.search(n) for n in names)), None)
        if role == _EMBEDDING and recipe.embedding_type:
            found[name] = recipe.embedding_type
        elif role == _OUTPUT and recipe.output_type:
            found[name] = recipe.output_type
        elif hit is not None:
            found[name] = rules[hit][1]
            unused.discard(hit)
        elif role == _EMBEDDING and tied and recipe.output_type:
            found[name] = recipe.output_type
    if unused:
        pattern = recipe.overrides[min(unused)][0]
        raise UsageError(
            f"no matrix is left that {pattern!r} matches", hint="`weightsmith show --tensors` lists the names."
        )
    return found


def _compiled(overrides: Sequence[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    rules = []
    for pattern, codec in overrides:
        try:
            rules.append((re.compile(pattern), codec))
        except re.error as error:
            raise UsageError(f"{pattern!r} is no regular expression: {error}") from error
    return rules
