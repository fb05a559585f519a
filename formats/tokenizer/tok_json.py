"""tokenizer.tok.json, xAI's own form of Grok-2's byte-level vocabulary.

    {"word_split": "V1", "vocab_size": 131072,
     "regular_tokens": [{"bytes": [32, 116], "token": 128}, ...], "special_tokens": [{"bytes": [...], "token": 0}, ...]}

An ordinary token's id is also its rank: of all pairs the one with the lowest id is merged, as in tiktoken. Special
tokens have ids of the same range and are never found in plain text. "V1" stands for the pattern that `patterns` calls
"grok-2". Texts begin with no token of their own; <|eos|> ends them and <|pad|> fills.

Ref: TiktokenTokenizer in sglang (srt/tokenizer/tiktoken_tokenizer.py), which reads this file.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats.tokenizer import patterns
from weightsmith.formats.tokenizer.alphabet import to_chars
from weightsmith.formats.tokenizer.pieces import CONTROL, NORMAL, check
from weightsmith.formats.tokenizer.ranks import MAX_TOKEN, merges_of
from weightsmith.formats.tokenizer.settings import Json, Settings, read_json
from weightsmith.formats.tokenizer.table import Table
from weightsmith.types import ModelConfig, Vocab

NAME = "tokenizer.tok.json"
PATTERN, SPLIT = "grok-2", "V1"
_EOS, _PAD = "<|eos|>", "<|pad|>"

log = logging.getLogger(__name__)


def from_file(path: Path, config: ModelConfig, *, pre: str | None = None) -> Vocab:
    """Read a tokenizer.tok.json. `pre` names another pattern.

    Raises IntegrityError (damaged), UnsupportedError (another way to cut words).
    """
    raw = read_json(path)
    pattern = pre or _pattern(raw, path)
    ordinary, special = _tokens(raw, "regular_tokens", path), _tokens(raw, "special_tokens", path)
    ranked = [ordinary[id_] for id_ in sorted(ordinary)]
    merges = merges_of(ranked, path=path)
    table = Table(config.vocab_size, spaced=False)
    for id_, token in ordinary.items():
        table.put(id_, to_chars(token), NORMAL, 0.0, path=path)
    for id_, token in special.items():
        try:
            table.put(id_, token.decode(), CONTROL, 0.0, path=path)
        except UnicodeDecodeError as error:
            raise IntegrityError(f"the special token {id_} is no text", path=path) from error
    texts, types, _ = table.close()
    made = {left + right for left, right in merges}
    lone = sum(len(token) > 1 and to_chars(token) not in made for token in ranked)
    if lone:
        log.warning("%s: %d tokens are no pair of others; a text never becomes them, as in llama.cpp", path, lone)
    vocab = Vocab(
        "gpt2",
        texts,
        types,
        merges=merges,
        pre=pattern,
        eos_id=table.ids.get(_EOS),
        pad_id=table.ids.get(_PAD),
        add_space_prefix=False,
        chat_template=Settings(path.parent).chat_template(),
    )
    check(vocab)
    return vocab


def _pattern(raw: Json, path: Path) -> str:
    regex = raw.get("pat_str")
    if isinstance(regex, str):
        found = patterns.match([regex], ignore_merges=False, nfc=False)
        if found is not None:
            return found.name
    elif raw.get("word_split") == SPLIT:
        return PATTERN
    text = f"words are cut in a way that is not known: {str(regex or raw.get('word_split'))[:200]}"
    hint = f"Name the one that fits with --pre NAME: {', '.join(patterns.names())}."
    raise UnsupportedError(text, path=path, hint=hint)


def _tokens(raw: Json, key: str, path: Path) -> dict[int, bytes]:
    """Tokens by id."""
    listed = raw.get(key)
    if not isinstance(listed, list):
        raise IntegrityError(f"{key} is no list", path=path)
    found: dict[int, bytes] = {}
    for at, entry in enumerate(listed):
        id_, data = _entry(entry)
        if id_ in found or not data:
            raise IntegrityError(f"entry {at} of {key} is damaged or repeats an id", path=path)
        found[id_] = data
    return found


def _entry(entry: object) -> tuple[int, bytes]:
    """Id and bytes of a token; no bytes if they are damaged."""
    id_, data = (entry.get("token"), entry.get("bytes")) if isinstance(entry, Mapping) else (None, None)
    if type(id_) is not int or not 0 <= id_ < 1 << 24 or not isinstance(data, list) or len(data) > MAX_TOKEN:
        return -1, b""
    fits = all(type(byte) is int and 0 <= byte < 256 for byte in data)
    return id_, bytes(data) if fits else b""
