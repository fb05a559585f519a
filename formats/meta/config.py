"""Meta's params.json, with what it leaves to code, to ModelConfig.

| not in params.json | taken from |
|---|---|
| n_kv_heads | absent: n_heads |
| vocab_size -1 (Llama 1, 2) | rows of the embedding |
| width of the feed-forward block | rows of w1 over all ranks; held against Meta's formula |
| head_dim | dim / n_heads, in every Llama up to 3.3 |
| tied embeddings | output.weight absent, or the same values as tok_embeddings.weight (Llama 3.2 stores both) |
| factor of use_scaled_rope | 32 if the embeddings are tied, else 8: only the small text models of Llama 3.2 are tied, |
| | and they alone have 32; Meta's own code always says 8 |
| length of the context | Llama 1 2048 (norm_eps 1e-6), 2 4096, Code Llama 16384 (theta 1e6), 3 8192, 3.1 131072 |
| special tokens | the 256 behind the ranks of a tiktoken vocabulary; 1 and 2 of a SentencePiece one |

Llama 3.1 405B in 16 ranks has 16 key heads where the model has 8, each stored twice to give every rank one. Where the
two of a pair are the same the second is left out, and every row that is read is compared with its copy.

Ref: llama/model.py of meta-llama/llama and llama_models/llama3/model.py of meta-llama/llama-models (FeedForward,
apply_scaling); transformers convert_llama_weights_to_hf.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats.consolidated import names
from weightsmith.formats.consolidated.params import heads, llama3_scaling
from weightsmith.formats.consolidated.reader import tokenizer_folder
from weightsmith.formats.consolidated.shards import Joined, Shards
from weightsmith.formats.safetensors.keys import MAX_LAYERS, Keys
from weightsmith.types import ModelConfig, TensorInfo

log = logging.getLogger(__name__)

SCALED_CONTEXT = 131072
SPECIAL_TOKENS = 256  # behind the ranks of Llama 3's vocabulary
_FIRST_W1, _FIRST_WK = "layers.0.feed_forward.w1.weight", "layers.0.attention.wk.weight"
_REFUSED = {
    "quantization_args": "quantized weights",
    "lora_args": "an adapter",
    "vision_chunk_size": "an image encoder",
    "vision_num_cross_attention_layers": "an image encoder",
    "vision_model": "an image encoder",
    "moe_args": "a mixture of experts",
}


def configure(params: Keys, shards: Shards, folder: Path) -> tuple[ModelConfig, Mapping[str, Joined]]:
    """The model, and its tensors by native name without what is stored twice.

    Raises UnsupportedError (another kind of model, by name), IntegrityError (a value, or weights that contradict it).
    """
    _refuse_unknown(params)
    _check_vectors(shards, folder)
    dim, (n_heads, n_kv_heads) = params.count("dim"), heads(params)
    if dim % n_heads or dim // n_heads % 2:
        raise params.fault("n_heads", n_heads, f"a divisor of dim, {dim}, with an even quotient")
    head_dim = dim // n_heads
    _check_heads(shards, head_dim)
    n_kv_heads, tensors = _without_copies(shards, n_kv_heads, head_dim, folder)
    ffn = _ffn(params, tensors, dim, folder)
    embedding = _need(tensors, names.EMBEDDING, folder)
    vocab_size = embedding.info.shape[0]
    if params.raw.get("vocab_size", -1) not in (-1, vocab_size):
        raise params.fault("vocab_size", params.raw["vocab_size"], f"the embedding's rows, {vocab_size}, or -1")
    head = tensors.get(names.HEAD)
    tied = head is None or shards.equal(head, embedding)
    eps, theta = params.number("norm_eps", 1e-5), params.number("rope_theta", 10000.0)
    factor = _scaling_factor(params, tied=tied)
    context = SCALED_CONTEXT if factor else _context(theta, eps)
    bos, eos, pad = _special_ids(vocab_size, byte_level=_is_byte_level(folder, theta), scaled=factor is not None)
    config = ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=dim,
        intermediate_size=ffn,
        n_layers=params.count("n_layers", limit=MAX_LAYERS),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=eps,
        rope_theta=theta,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        dtype=embedding.info.codec,
        rope_scaling=llama3_scaling(factor) if factor else None,
        bos_token_id=bos,
        eos_token_ids=eos,
        pad_token_id=pad,
        name=folder.absolute().name[:200],
    )
    return config, tensors


def _refuse_unknown(params: Keys) -> None:
    for key, what in _REFUSED.items():
        if params.has(key) and params.raw[key] != -1:
            raise UnsupportedError(f"{key} says that this is {what}, which is not read", path=params.path)


def _check_vectors(shards: Shards, folder: Path) -> None:
    """Every rank's norms should be the same; the first one's count, as in all converters."""
    norms = {name: copies for name, copies in shards.copies.items() if not names.is_dropped(name)}
    odd = [name for name, copies in norms.items() if not shards.same(copies)]
    if odd:
        log.warning("%s: %d vectors, such as %s, are not the same in all ranks", folder, len(odd), odd[0])


def _need(tensors: Mapping[str, Joined], name: str, folder: Path) -> Joined:
    joined = tensors.get(name)
    if joined is None or len(joined.info.shape) != 2:
        raise IntegrityError("missing, or no matrix", path=folder, tensor=name)
    return joined


def _check_heads(shards: Shards, head_dim: int) -> None:
    """Ranks are joined row by row, which keeps heads whole only if no rank holds a part of one."""
    for name in (_FIRST_WK, _FIRST_WK.replace("wk", "wq")):
        for part in shards.tensors[name].parts if name in shards.tensors else ():
            if part.n_rows % head_dim:
                text = f"{part.n_rows} rows are no whole heads of {head_dim}"
                raise IntegrityError(text, path=part.path, tensor=name)


def _without_copies(shards: Shards, n_kv_heads: int, head_dim: int, folder: Path) -> tuple[int, Mapping[str, Joined]]:
    """Key heads of the model, and its tensors without copies of key and value heads."""
    first = _need(shards.tensors, _FIRST_WK, folder)
    stored, ranks = first.info.shape[0] // head_dim, len(first.parts)
    if ranks == 1 or stored != ranks or stored % 2 or n_kv_heads not in (stored, stored // 2):
        return n_kv_heads, shards.tensors
    layer = [shards.tensors[name] for name in (_FIRST_WK, _FIRST_WK.replace("wk", "wv")) if name in shards.tensors]
    twice = all(shards.same(one.parts[rank : rank + 2]) for one in layer for rank in range(0, ranks, 2))
    if not twice:
        return n_kv_heads, shards.tensors
    log.info("%s: every key and value head is stored twice; the copies are left out", folder)
    halved = {name: _halved(one) if _is_kv(name) else one for name, one in shards.tensors.items()}
    return stored // 2, halved


def _is_kv(name: str) -> bool:
    return name.endswith((".attention.wk.weight", ".attention.wv.weight"))


def _halved(joined: Joined) -> Joined:
    info = joined.info
    shape = (info.shape[0] // 2, *info.shape[1:])
    whole = TensorInfo(info.name, shape, info.codec, info.nbytes // 2, info.path, info.offset)
    return replace(joined, info=whole, parts=joined.parts[::2], twins=joined.parts[1::2])


def _ffn(params: Keys, tensors: Mapping[str, Joined], dim: int, folder: Path) -> int:
    """Rows of w1, held against the formula of Meta's FeedForward."""
    width = _need(tensors, _FIRST_W1, folder).info.shape[0]
    expected = int(2 * (4 * dim) / 3)
    if params.raw.get("ffn_dim_multiplier") is not None:
        expected = int(params.number("ffn_dim_multiplier") * expected)
    multiple = params.count("multiple_of", 256)
    expected = -(-expected // multiple) * multiple
    if width != expected:
        raise IntegrityError(
            f"w1 has {width} rows over all ranks, {params.path.name} makes the feed-forward block {expected} wide",
            path=folder,
            tensor=_FIRST_W1,
            hint="A consolidated.NN.pth may be missing, or params.json is another model's.",
        )
    return width


def _scaling_factor(params: Keys, *, tied: bool) -> float | None:
    if not params.flag("use_scaled_rope"):
        return None
    if params.has("rope_scaling_factor"):
        return params.number("rope_scaling_factor")
    return 32.0 if tied else 8.0


def _context(theta: float, eps: float) -> int:
    if theta == 500000.0:
        return 8192
    if theta == 1000000.0:
        return 16384
    return 4096 if eps > 2e-6 else 2048


def _is_byte_level(folder: Path, theta: float) -> bool:
    """Whether the tokenizer is Llama 3's; without one, theta tells."""
    home = tokenizer_folder(folder)
    path = home / "tokenizer.model" if home else None
    if path is None or not path.is_file():
        return theta == 500000.0
    from weightsmith.formats.tokenizer.tiktoken import is_ranks  # noqa: PLC0415  (keeps other verbs light)

    return is_ranks(path)


def _special_ids(vocab_size: int, *, byte_level: bool, scaled: bool) -> tuple[int, tuple[int, ...], int | None]:
    """Beginning, ends and padding. Llama 3 ends a text, a message or a turn, and has a padding token since 3.1."""
    if not byte_level or vocab_size <= SPECIAL_TOKENS:
        return 1, (2,), None
    base = vocab_size - SPECIAL_TOKENS
    return base, (base + 1, base + 8, base + 9) if scaled else (base + 1, base + 9), base + 4 if scaled else None
