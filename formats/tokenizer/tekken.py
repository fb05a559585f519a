"""tekken.json, Mistral's own form of a byte-level vocabulary (Nemo and later).

    {"config": {"pattern": REGEX, "default_vocab_size": 131072, "default_num_special_tokens": 1000, "version": "v3"},
     "vocab": [{"rank": 0, "token_bytes": BASE64}, ...], "special_tokens": [{"rank": 0, "token_str": "<unk>"}, ...]}

Special tokens come first: the id of an ordinary token is its rank plus their number. The file lists more ordinary
tokens than are used (150000 for 130072 places); those beyond the vocabulary's size do not exist, not even for merging.
Up to version 7 the special tokens may be missing, and are a fixed list then; the ones that remain are called
<SPECIAL_n>. None of them is ever found in plain text, whatever `is_control` says.

Ref: mistral_common/tokens/tokenizers/tekken.py in mistralai/mistral-common.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats.tokenizer import patterns
from weightsmith.formats.tokenizer.alphabet import to_chars
from weightsmith.formats.tokenizer.pieces import CONTROL, NORMAL, check
from weightsmith.formats.tokenizer.ranks import merges_of
from weightsmith.formats.tokenizer.settings import Settings, read_json
from weightsmith.formats.tokenizer.table import Table
from weightsmith.types import ModelConfig, Vocab

_UNK, _BOS, _EOS, _PAD = "<unk>", "<s>", "</s>", "<pad>"
_OLD_VERSIONS = ("v1", "v2", "v3", "v7")
_OLD_TOKENS = (
    *(_UNK, _BOS, _EOS, "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", _PAD, "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)


def from_file(path: Path, config: ModelConfig, *, pre: str | None = None) -> Vocab:
    """Read a tekken.json. `pre` names the pattern of one that is not recognised.

    Raises IntegrityError (damaged, or not this model's), UnsupportedError (an unknown pattern).
    """
    raw = read_json(path)
    settings = raw.get("config")
    if not isinstance(settings, Mapping):
        raise IntegrityError("no config", path=path)
    size, n_special = (_count(settings, key, path) for key in ("default_vocab_size", "default_num_special_tokens"))
    if size != config.vocab_size or n_special >= size:
        raise IntegrityError(
            f"{size} tokens, {n_special} of them special, for a model of {config.vocab_size}",
            path=path,
            hint="The tokenizer and the model do not belong together.",
        )
    pattern = pre or _pattern(settings.get("pattern"), path)
    special = _special(raw, settings, n_special, path)
    tokens = _ordinary(raw.get("vocab"), size - n_special, path)
    merges = merges_of(tokens, path=path)
    table = Table(size, spaced=False)
    for id_, text in enumerate(special):
        table.put(id_, text, CONTROL, 0.0, path=path)
    for rank, token in enumerate(tokens):
        table.put(n_special + rank, to_chars(token), NORMAL, 0.0, path=path)
    texts, types, _ = table.close()
    ids = {text: table.ids.get(text) for text in (_UNK, _BOS, _EOS, _PAD)}
    vocab = Vocab(
        "gpt2",
        texts,
        types,
        merges=merges,
        pre=pattern,
        bos_id=ids[_BOS],
        eos_id=ids[_EOS],
        unk_id=ids[_UNK],
        pad_id=ids[_PAD],
        add_bos=ids[_BOS] is not None,
        add_space_prefix=False,
        ignore_merges=True,
        chat_template=Settings(path.parent).chat_template(),
    )
    check(vocab)
    return vocab


def _count(settings: Mapping[str, Any], key: str, path: Path) -> int:
    value = settings.get(key)
    if type(value) is not int or not 0 < value < 1 << 24:
        raise IntegrityError(f"{key} is {str(value)[:40]!r}, expected a number of tokens", path=path)
    return value


def _pattern(regex: object, path: Path) -> str:
    found = patterns.match([regex], ignore_merges=True, nfc=False) if isinstance(regex, str) else None
    if found is None:
        raise UnsupportedError(
            f"the pre-tokenizer is not known: {str(regex)[:200]}",
            path=path,
            hint=f"Name the one that fits with --pre NAME: {', '.join(patterns.names())}.",
        )
    return found.name


def _special(raw: Mapping[str, Any], settings: Mapping[str, Any], count: int, path: Path) -> list[str]:
    """Texts of the special tokens by id."""
    listed = raw.get("special_tokens")
    if listed is None:
        if settings.get("version") not in _OLD_VERSIONS:
            raise IntegrityError("special_tokens are missing", path=path)
        named = list(_OLD_TOKENS)
    elif isinstance(listed, list) and all(isinstance(entry, Mapping) for entry in listed):
        named = [entry.get("token_str") for entry in listed]
        if [entry.get("rank") for entry in listed] != list(range(len(listed))):
            raise IntegrityError("special_tokens are not in the order of their ranks", path=path)
    else:
        raise IntegrityError("special_tokens is no list of tokens", path=path)
    if not all(isinstance(text, str) and text for text in named):
        raise IntegrityError("a special token without text", path=path)
    return (named + [f"<SPECIAL_{id_}>" for id_ in range(len(named), count)])[:count]


def _ordinary(listed: object, count: int, path: Path) -> list[bytes]:
    """The first `count` tokens, which must be in the order of their ranks."""
    if not isinstance(listed, list) or len(listed) < count:
        raise IntegrityError(f"vocab has fewer than the {count} tokens that config calls for", path=path)
    tokens = []
    for rank, entry in enumerate(listed[:count]):
        text = entry.get("token_bytes") if isinstance(entry, Mapping) else None
        if not isinstance(text, str) or entry.get("rank") != rank:
            raise IntegrityError(f"entry {rank} of vocab is damaged or out of order", path=path)
        try:
            tokens.append(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError) as error:
            raise IntegrityError(f"the token of rank {rank} is no base64", path=path) from error
    return tokens
