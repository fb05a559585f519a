"""The tokenizer in GGUF's keys `tokenizer.*`, to `Vocab` and back.

| key under tokenizer.ggml. | type | |
|---|---|---|
| model | string | "llama" (SentencePiece) or "gpt2" (byte-level BPE); "none": no tokenizer |
| pre | string | pattern name of a "gpt2"; which of them skip merges for whole words is part of the name's meaning |
| tokens, scores, token_type | string, f32, i32 arrays | scores for "llama" only |
| merges | string array | "left right", for "gpt2" only |
| bos_token_id, eos_token_id, unknown_token_id, padding_token_id | u32 | defaults 1, 2, 0, none for "llama" |
| add_bos_token, add_eos_token, add_space_prefix | bool | |

tokenizer.chat_template is copied as an opaque string.

Ref: llama_vocab::impl::load in llama.cpp src/llama-vocab.cpp (llama-cpp-python 0.3.36).
"""

from __future__ import annotations

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats.gguf.metadata import Metadata
from weightsmith.formats.gguf.pack import Key, array, flag, text, u32
from weightsmith.formats.gguf.parse import F32, I32, STRING
from weightsmith.types import ModelConfig, Vocab

MODEL, PRE, TEMPLATE = "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template"
TOKENS, SCORES, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"
MERGES = "tokenizer.ggml.merges"
IDS = {
    "bos_id": "tokenizer.ggml.bos_token_id",
    "eos_id": "tokenizer.ggml.eos_token_id",
    "unk_id": "tokenizer.ggml.unknown_token_id",
    "pad_id": "tokenizer.ggml.padding_token_id",
}
ADD_BOS, ADD_EOS = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"
ADD_SPACE = "tokenizer.ggml.add_space_prefix"
OWNED = frozenset((MODEL, PRE, TOKENS, SCORES, TYPES, MERGES, ADD_BOS, ADD_EOS, ADD_SPACE, TEMPLATE, *IDS.values()))

_LLAMA3 = frozenset(
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano")
)
WHOLE_WORDS = _LLAMA3 | {"tekken", "minicpm5", "youtu", "glm4", "glm5", "granite-embed-multi-97m"}
BEGINS = _LLAMA3 | {"tekken", "chameleon"}  # patterns that add BOS unless a key says otherwise
_NO_MODEL = (None, "none", "no_vocab")
_SPM_IDS = {"bos_id": 1, "eos_id": 2, "unk_id": 0}


def read_vocab(metadata: Metadata, pre: str | None = None) -> Vocab | None:
    """The tokenizer, or None if there is none; `pre` overrides the pattern name of a "gpt2" model.

    Raises UnsupportedError for another tokenizer model, IntegrityError for arrays that do not fit together.
    """
    model = metadata.text(MODEL)
    if model in _NO_MODEL:
        return None
    if model not in ("gpt2", "llama"):
        raise UnsupportedError(
            f"unknown tokenizer model {model!r}; known are 'gpt2' and 'llama'", path=metadata.header.path
        )
    tokens = metadata.texts(TOKENS)
    if tokens is None:
        raise metadata.damaged(TOKENS, "is missing")
    byte_level = model == "gpt2"
    pattern = (pre or metadata.text(PRE) or "default") if byte_level else ""
    ids = special_ids(metadata, len(tokens))
    add_bos, add_space = metadata.flag(ADD_BOS), metadata.flag(ADD_SPACE)
    return Vocab(
        model="gpt2" if byte_level else "llama",
        tokens=tokens,
        types=_types(metadata, len(tokens)),
        merges=_merges(metadata) if byte_level else [],
        scores=[] if byte_level else _scores(metadata, len(tokens)),
        pre=pattern,
        bos_id=ids["bos_id"],
        eos_id=ids["eos_id"],
        unk_id=ids["unk_id"],
        pad_id=ids["pad_id"],
        add_bos=add_bos if add_bos is not None else (not byte_level or pattern in BEGINS),
        add_eos=bool(metadata.flag(ADD_EOS)),
        add_space_prefix=add_space if add_space is not None else not byte_level,
        ignore_merges=pattern in WHOLE_WORDS,
        chat_template=metadata.text(TEMPLATE),
    )


def special_ids(metadata: Metadata, count: int) -> dict[str, int | None]:
    """bos_id, eos_id, unk_id and pad_id. An id of `count` or more counts as absent, as in the reference loader."""
    defaults = _SPM_IDS if metadata.text(MODEL) == "llama" else {}
    found: dict[str, int | None] = {}
    for name, key in IDS.items():
        value = metadata.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
            value = defaults.get(name)
        found[name] = value if value is not None and value < count else None
    return found


def _types(metadata: Metadata, count: int) -> list[int]:
    types = metadata.numbers(TYPES)
    if types is None:
        return [1] * count
    return [int(kind) for kind in _as_long(metadata, TYPES, types, count)]


def _scores(metadata: Metadata, count: int) -> list[float]:
    scores = metadata.numbers(SCORES)
    if scores is None:
        return [0.0] * count
    return [float(score) for score in _as_long(metadata, SCORES, scores, count)]


def _as_long(metadata: Metadata, key: str, values: list[int] | list[float], count: int) -> list[int] | list[float]:
    if len(values) != count:
        raise metadata.damaged(key, f"has {len(values)} items for {count} tokens")
    return values


def _merges(metadata: Metadata) -> list[tuple[str, str]]:
    lines = metadata.texts(MERGES)
    if lines is None:
        raise metadata.damaged(MERGES, "is missing")
    pairs = []
    for line in lines:
        at = line.find(" ", 1)  # a part may itself begin with a space in old files
        if at < 0:
            raise metadata.damaged(MERGES, f"{line!r} is no pair")
        pairs.append((line[:at], line[at + 1 :]))
    return pairs


def vocab_keys(vocab: Vocab | None, config: ModelConfig) -> list[Key]:
    """The keys that `vocab` is written as; None is written as the model "none", which loads without a tokenizer.

    An id that the tokenizer does not name is taken from `config`. Raises IntegrityError if the lists do not fit
    together.
    """
    if vocab is None:
        return [text(MODEL, "none"), *_id_keys(config_ids(vocab, config))]
    count = len(vocab.tokens)
    if len(vocab.types) != count or (vocab.model == "llama" and len(vocab.scores) != count):
        raise IntegrityError(f"the tokenizer has {count} tokens but not as many types and scores")
    if count != config.vocab_size:
        raise IntegrityError(f"the tokenizer has {count} tokens, the model {config.vocab_size}")
    byte_level = vocab.model == "gpt2"
    keys = [text(MODEL, vocab.model), text(PRE, vocab.pre or "default"), array(TOKENS, STRING, vocab.tokens)]
    if not byte_level:
        keys.append(array(SCORES, F32, vocab.scores))
    keys.append(array(TYPES, I32, vocab.types))
    if byte_level:
        keys.append(array(MERGES, STRING, [f"{left} {right}" for left, right in vocab.merges]))
    keys += _id_keys(config_ids(vocab, config))
    keys += [flag(ADD_BOS, vocab.add_bos), flag(ADD_EOS, vocab.add_eos), flag(ADD_SPACE, vocab.add_space_prefix)]
    if vocab.chat_template is not None:
        keys.append(text(TEMPLATE, vocab.chat_template))
    return keys


def config_ids(vocab: Vocab | None, config: ModelConfig) -> dict[str, int | None]:
    """bos_id, eos_id, unk_id and pad_id as they are written: the tokenizer's, else the configuration's."""
    ids = {
        "bos_id": config.bos_token_id,
        "eos_id": config.eos_token_ids[0] if config.eos_token_ids else None,
        "unk_id": None,
        "pad_id": config.pad_token_id,
    }
    for name, otherwise in ids.items():
        own: int | None = getattr(vocab, name, None)
        ids[name] = own if own is not None else otherwise
    return ids


def _id_keys(ids: dict[str, int | None]) -> list[Key]:
    # A negative id is how some configurations say that there is none.
    return [u32(IDS[name], value) for name, value in ids.items() if value is not None and value >= 0]
