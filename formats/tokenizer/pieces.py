"""What every part of this package needs to know about a `Vocab`: token types, soundness, merges.

SentencePiece's BPE has no list of merges, only a score per piece: of all adjacent pairs whose concatenation is a piece
it joins the one with the highest score, the leftmost on a tie (llama.cpp: llm_tokenizer_spm_session). The tokenizers
library wants merges, each with a rank of its own. `merges_from_scores` lists, for every piece, all its splits into two
pieces, best score first. The splits of one piece share a score; among them the longer left part goes first, which
is what "leftmost" comes to when two such pairs overlap (x+y and y+z are the same string only if y is a border of it).
"""

from __future__ import annotations

import math
from collections import Counter

from weightsmith.errors import IntegrityError
from weightsmith.formats.tokenizer.alphabet import CHAR_TO_BYTE
from weightsmith.types import Vocab

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"  # SentencePiece's mark of a space
FILLER_SCORE = -10000.0

# llama.cpp knows some tokens by their text and treats them as control tokens whatever the file says.
_CONTROL_ROWS = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> "
    "<EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> "
    "<\uff5cend\u2581of\u2581sentence\uff5c> [e~[ "
    "<|fim_prefix|> <fim-prefix> <fim_prefix> <\uff5cfim\u2581begin\uff5c> <PRE> \u2581<PRE> <|code_prefix|> "
    "<|fim_suffix|> <fim-suffix> <fim_suffix> <\uff5cfim\u2581hole\uff5c> <SUF> \u2581<SUF> <|code_suffix|> "
    "<|fim_middle|> <fim-middle> <fim_middle> <\uff5cfim\u2581end\uff5c> <MID> \u2581<MID> <|code_middle|> "
    "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> "
    "<|file_sep|> <|prefix|> <|suffix|> <|middle|>"
)
_CONTROL_TEXTS = frozenset(_CONTROL_ROWS.split())
_PLAIN_TEXTS = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})


def filler(id_: int) -> str:
    """The text of a token that only pads the vocabulary to the model's size."""
    return f"[PAD{id_}]"


def byte_piece(byte: int) -> str:
    """SentencePiece's piece for a byte that no other piece covers."""
    return f"<0x{byte:02X}>"


BYTE_PIECES = {byte_piece(byte): byte for byte in range(256)}


def special(vocab: Vocab) -> list[int]:
    """Ids that are cut out of a text where control tokens written in it are meant as tokens, longest first."""
    found = {id_ for id_, kind in enumerate(vocab.types) if kind in (CONTROL, UNKNOWN) and vocab.tokens[id_]}
    return _longest_first(vocab, sorted(found.union(user_defined(vocab))))


def user_defined(vocab: Vocab) -> list[int]:
    """Ids that are cut out of a text before anything else even if special tokens are not parsed, longest first."""
    found = [
        id_
        for id_, (text, kind) in enumerate(zip(vocab.tokens, vocab.types, strict=True))
        if text and (text in _PLAIN_TEXTS or (kind == USER_DEFINED and text not in _CONTROL_TEXTS))
    ]
    return _longest_first(vocab, found)


def _longest_first(vocab: Vocab, ids: list[int]) -> list[int]:
    return sorted(ids, key=lambda id_: -len(vocab.tokens[id_].encode("utf-8", "surrogatepass")))


def check(vocab: Vocab) -> None:
    """Raise IntegrityError unless the vocabulary's lists agree with each other and its ids exist."""
    n = len(vocab.tokens)
    if len(vocab.types) != n or (vocab.scores and len(vocab.scores) != n):
        raise IntegrityError(f"{n} tokens, but {len(vocab.types)} token types and {len(vocab.scores)} scores")
    if vocab.model == "llama" and not vocab.scores:
        raise IntegrityError("a SentencePiece vocabulary without scores")
    if any(math.isnan(score) for score in vocab.scores):
        raise IntegrityError("a token's score is no number")
    if len(set(vocab.tokens)) != n:
        text, count = Counter(vocab.tokens).most_common(1)[0]
        raise IntegrityError(f"the token {text[:200]!r} occurs {count} times", hint="Every token needs its own text.")
    for name in ("bos_id", "eos_id", "unk_id", "pad_id"):
        id_ = getattr(vocab, name)
        if id_ is not None and not 0 <= id_ < n:
            raise IntegrityError(f"{name} is {id_}, expected an id below {n}")


def trailing_fillers(vocab: Vocab) -> int:
    """How many tokens at the end only pad the vocabulary; no Hugging Face file lists them."""
    n = len(vocab.tokens)
    # Some converters wrote them as user-defined.
    while n and vocab.types[n - 1] in (UNUSED, USER_DEFINED) and vocab.tokens[n - 1] == filler(n - 1):
        n -= 1
    return len(vocab.tokens) - n


def has_order(vocab: Vocab) -> bool:
    """Whether the scores rank the pieces; a converter that had no scores wrote the same one everywhere."""
    ranked = [
        score
        for text, kind, score in zip(vocab.tokens, vocab.types, vocab.scores, strict=True)
        if kind == NORMAL and len(text) > 1
    ]
    return len(set(ranked)) * 2 >= len(ranked)


def merges_from_scores(vocab: Vocab) -> list[tuple[str, str]]:
    """Merges, best first, with which rank-driven BPE does what score-driven BPE does; see the module's text."""
    known = set(vocab.tokens)
    found: list[tuple[float, int, int, str, str]] = []
    for text, score in zip(vocab.tokens, vocab.scores, strict=True):
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in known and right in known:
                found.append((-score, -cut, -len(text), left, right))
    found.sort(key=lambda item: item[:3])
    return [(left, right) for *_, left, right in found]


def missing_bytes(vocab: Vocab) -> list[str]:
    """Characters of the byte alphabet that are no tokens: text that needs them loses them."""
    known = set(vocab.tokens)
    return [char for char in CHAR_TO_BYTE if char not in known]
