"""Llama 3's original tokenizer.model: lines "base64 rank", and 256 special tokens behind them that only code names.

It bears the same name as Llama 2's SentencePiece model and is told from it by its first line. The pattern is not in the
file either: it is the one that `patterns` calls "llama-bpe". Special tokens are never found in plain text.

The names of Llama 3 and of 3.1 and later differ in ids that 3 left reserved; the model's rotary scaling tells which of
the two it is. Llama 4's file has more special tokens and another pattern, and is refused.

Ref: llama_models/llama3/tokenizer.py of meta-llama/llama-models; the tokenizer.json files of Meta's repositories.
"""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path

from weightsmith.errors import IntegrityError, UnsupportedError
from weightsmith.formats.tokenizer.alphabet import to_chars
from weightsmith.formats.tokenizer.pieces import CONTROL, NORMAL, check
from weightsmith.formats.tokenizer.ranks import merges_of
from weightsmith.formats.tokenizer.settings import Settings, read_bytes
from weightsmith.formats.tokenizer.table import Table
from weightsmith.types import ModelConfig, Vocab

SPECIAL_TOKENS = 256
PATTERN = "llama-bpe"
_FIRST = re.compile(rb"[A-Za-z0-9+/]{1,400}={0,2} [0-9]{1,9}\r?\n")
_MAX_BYTES = 16 << 20  # four times the largest published one
_BEGIN, _END = "<|begin_of_text|>", "<|end_of_text|>"
_NAMED = {0: _BEGIN, 1: _END, 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "<|eot_id|>"}
_NAMED_SINCE_3_1 = {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}


def is_ranks(path: Path) -> bool:
    """Whether the file begins like a list of ranks."""
    try:
        with path.open("rb") as file:
            return _FIRST.match(file.read(512)) is not None
    except OSError:
        return False


def special_tokens(*, since_3_1: bool) -> list[str]:
    """The 256 special tokens, in order; those without a meaning are numbered."""
    named = _NAMED | (_NAMED_SINCE_3_1 if since_3_1 else {})
    spare = (f"<|reserved_special_token_{number}|>" for number in range(SPECIAL_TOKENS))
    return [named.get(at) or next(spare) for at in range(SPECIAL_TOKENS)]


def from_file(path: Path, config: ModelConfig, *, pre: str | None = None) -> Vocab:
    """Read a tokenizer.model of ranks. `pre` names another pattern than Llama 3's.

    Raises IntegrityError (damaged), UnsupportedError (not Llama 3's: other special tokens than its 256).
    """
    tokens = _read(path)
    n = len(tokens)
    if n + SPECIAL_TOKENS != config.vocab_size:
        raise UnsupportedError(
            f"{n} tiktoken ranks for a model of {config.vocab_size}; Llama 3 has {SPECIAL_TOKENS} special tokens",
            path=path,
            hint="Use the Hugging Face form of the checkpoint: it has a tokenizer.json.",
        )
    merges = merges_of(tokens, path=path)
    table = Table(config.vocab_size, spaced=False)
    for rank, token in enumerate(tokens):
        table.put(rank, to_chars(token), NORMAL, 0.0, path=path)
    since_3_1 = config.rope_scaling is not None
    for at, text in enumerate(special_tokens(since_3_1=since_3_1)):
        table.put(n + at, text, CONTROL, 0.0, path=path)
    texts, types, _ = table.close()
    vocab = Vocab(
        "gpt2",
        texts,
        types,
        merges=merges,
        pre=pre or PATTERN,
        bos_id=n,
        eos_id=n + 1,
        pad_id=n + 4 if since_3_1 else None,
        add_bos=True,
        add_space_prefix=False,
        ignore_merges=True,
        chat_template=Settings(path.parent).chat_template(),
    )
    check(vocab)
    return vocab


def _read(path: Path) -> list[bytes]:
    """Tokens in the order of their ranks, which must be 0, 1, 2, ..."""
    tokens = []
    for number, line in enumerate(read_bytes(path, limit=_MAX_BYTES).splitlines()):
        text, _, rank = line.partition(b" ")
        try:
            token = base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise IntegrityError(f"line {number + 1} is no base64", path=path) from error
        if rank != str(number).encode():
            raise IntegrityError(f"line {number + 1} has rank {rank[:20]!r}, expected {number}", path=path)
        tokens.append(token)
    return tokens
