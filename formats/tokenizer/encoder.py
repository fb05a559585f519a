"""Text to ids exactly as llama.cpp's llama_tokenize does, at the tokenizers library's speed.

Followed from src/llama-vocab.cpp and src/unicode.cpp:

1. User-defined tokens are cut out of the text first, the longest (in UTF-8 bytes) everywhere, then the next; control
   and unknown tokens are plain text, unless `special` (llama.cpp's parse_special) asks for them too.
2. "gpt2": each piece of text is cut by the pattern's expressions, written in the byte alphabet and merged by rank. A
   byte without a token blocks merges around it and then vanishes. Where the name says so, a word that is a token
   stays whole.
3. "llama": a space goes in front of the first piece and of each piece after a cut-out token, spaces become U+2581, and
   the best-scored pair is merged over the whole piece. Characters without a piece become byte pieces.

Symbols that have no id of their own, yet take part in merges, get ids past the vocabulary's end for the while of one
call and are replaced by what llama.cpp emits for them. Scores that are all the same (a file whose converter lost
them) mean "leftmost pair first", which ranked merges cannot say; then the slow path is taken, `merge_by_score`.
"""

from __future__ import annotations

import heapq
from typing import Any

from weightsmith.errors import IntegrityError, UnsupportedError, UsageError
from weightsmith.formats.tokenizer import patterns
from weightsmith.formats.tokenizer.alphabet import CHAR_TO_BYTE, to_bytes
from weightsmith.formats.tokenizer.pieces import (
    BYTE,
    BYTE_PIECES,
    CONTROL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    byte_piece,
    check,
    has_order,
    merges_from_scores,
    special,
    user_defined,
)
from weightsmith.types import Vocab


def encoder(vocab: Vocab) -> Encoder:
    """An encoder for `vocab`. Raises IntegrityError (a vocabulary that contradicts itself) and UnsupportedError."""
    return Encoder(vocab)


class Encoder:
    """Encodes and decodes with one vocabulary; safe to use from several threads."""

    def __init__(self, vocab: Vocab) -> None:
        check(vocab)
        self.vocab = vocab
        self.cuts = [(vocab.tokens[id_], id_) for id_ in user_defined(vocab)]
        self.special_cuts = [(vocab.tokens[id_], id_) for id_ in special(vocab)]
        self.table = {text: id_ for id_, text in enumerate(vocab.tokens)}
        self.stand_ins: dict[int, list[int]] = {}
        self.slow = vocab.model == "llama" and not has_order(vocab)
        self.library = _byte_level(self) if vocab.model == "gpt2" else _sentencepiece(self)

    def encode(self, text: str, *, add_bos: bool | None = None, special: bool = False) -> list[int]:
        """Ids of `text`. add_bos: None adds the beginning and the end that the vocabulary asks for, else just that.

        special: control tokens that are written in the text are tokens.
        """
        if max(text, default="") >= "\ud800" and any("\ud800" <= char <= "\udfff" for char in text):
            raise UsageError("the text holds lone surrogates, which no UTF-8 text can")
        pieces = cut(text, self.special_cuts if special else self.cuts)
        if self.vocab.model == "llama":
            pieces = self._marked(pieces)
        texts = [piece for piece in pieces if isinstance(piece, str)]
        encoded = iter(self._encode_plain(texts))
        ids = (
            [self._special(self.vocab.bos_id, "beginning")]
            if (self.vocab.add_bos if add_bos is None else add_bos)
            else []
        )
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += next(encoded)
        if add_bos is None and self.vocab.add_eos:
            ids.append(self._special(self.vocab.eos_id, "end"))
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; control tokens are left out, bytes that are no UTF-8 become U+FFFD."""
        data = b"".join(self._bytes_of(id_) for id_ in ids)
        text = data.decode("utf-8", "replace")
        return text[1:] if self.vocab.model == "llama" and self.vocab.add_space_prefix and text[:1] == " " else text

    def _bytes_of(self, id_: int) -> bytes:
        text, kind = self.vocab.tokens[id_], self.vocab.types[id_]
        if kind in (CONTROL, UNKNOWN):
            return b""
        if self.vocab.model == "llama":
            if kind == BYTE and text in BYTE_PIECES:
                return bytes([BYTE_PIECES[text]])
            return text.replace(SPACE, " ").encode()
        data = to_bytes(text) if kind != USER_DEFINED else None
        return text.encode() if data is None else data

    def _special(self, id_: int | None, what: str) -> int:
        if id_ is None:
            raise IntegrityError(f"the vocabulary names no token for the {what} of a text")
        return id_

    def _marked(self, pieces: list[str | int]) -> list[str | int]:
        """Pieces with spaces as U+2581 and, where asked for, one in front of the first and of those after a token."""
        marked: list[str | int] = []
        for index, piece in enumerate(pieces):
            if isinstance(piece, str):
                first = index == 0 or isinstance(pieces[index - 1], int)
                piece = (" " if first and self.vocab.add_space_prefix else "") + piece  # noqa: PLW2901
                marked.append(piece.replace(" ", SPACE))
            else:
                marked.append(piece)
        return marked

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        if self.slow:
            return [merge_by_score(text, self.table, self.vocab.scores) for text in texts]
        lists = [encoding.ids for encoding in self.library.encode_batch_fast(texts, add_special_tokens=False)]
        if not self.stand_ins:
            return lists
        n = len(self.vocab.tokens)
        return [
            [real for id_ in ids for real in ([id_] if id_ < n else self.stand_ins[id_])]
            if max(ids, default=0) >= n
            else ids
            for ids in lists
        ]

    def _stand_in(self, table: dict[str, int], text: str, emitted: list[int]) -> None:
        """Give `text` an id past the end that stands for the ids `emitted`."""
        id_ = len(self.vocab.tokens) + len(self.stand_ins)
        table[text] = id_
        self.stand_ins[id_] = emitted


def cut(text: str, tokens: list[tuple[str, int]]) -> list[str | int]:
    """Cut `text` at every occurrence of each (text, id) in turn; what is cut out stands as its id. No empty pieces."""
    pieces: list[str | int] = [text] if text else []
    for token, id_ in tokens:
        if token not in text:
            continue
        after: list[str | int] = []
        for piece in pieces:
            if isinstance(piece, int):
                after.append(piece)
                continue
            for index, part in enumerate(piece.split(token)):
                if index:
                    after.append(id_)
                if part:
                    after.append(part)
        pieces = after
    return pieces


def merge_by_score(text: str, table: dict[str, int], scores: list[float]) -> list[int]:
    """SentencePiece's BPE over one text, as written in the module's text; O(n log n) in plain Python."""
    symbols: list[str] = list(text)
    before, after = list(range(-1, len(symbols) - 1)), list(range(1, len(symbols) + 1))
    queue: list[tuple[float, int, int, int]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right < len(symbols):
            id_ = table.get(symbols[left] + symbols[right])
            if id_ is not None:
                heapq.heappush(queue, (-scores[id_], left, right, len(symbols[left]) + len(symbols[right])))

    for index in range(1, len(symbols)):
        offer(index - 1, index)
    while queue:
        _, left, right, size = heapq.heappop(queue)
        if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != size:
            continue
        symbols[left] += symbols[right]
        symbols[right] = ""
        after[left] = after[right]
        if after[left] < len(symbols):
            before[after[left]] = left
        offer(before[left], left)
        offer(left, after[left])
    ids = []
    for symbol in symbols:
        if symbol:
            id_ = table.get(symbol)
            ids += [id_] if id_ is not None else [table[byte_piece(byte)] for byte in symbol.encode()]
    return ids


def _byte_level(self: Encoder) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: PLC0415

    pattern = patterns.by_name(self.vocab.pre)
    table = dict(self.table)
    ranked = dict.fromkeys(self.vocab.merges)  # of a pair that occurs twice the first rank counts
    for text in [*CHAR_TO_BYTE, *(part for left, right in ranked for part in (left, right, left + right))]:
        if text not in table:
            # llama.cpp looks up each byte of such a symbol's UTF-8 form as a token: only ASCII ones can exist.
            self._stand_in(table, text, [self.table[char] for char in text if char.isascii() and char in self.table])
    steps: list[Any] = [pre_tokenizers.Split(_regex(regex), "isolated") for regex in pattern.regexes]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    model = _model(models.BPE, vocab=table, merges=list(ranked), ignore_merges=pattern.ignore_merges)
    library = Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return library


def _sentencepiece(self: Encoder) -> Any:
    from tokenizers import Tokenizer, models  # noqa: PLC0415

    absent = [piece for piece in BYTE_PIECES if piece not in self.table]
    if absent:
        raise UnsupportedError(f"a SentencePiece vocabulary without byte pieces (no {absent[0]})")
    if self.slow:
        return None
    table = dict(self.table)
    for text in self.vocab.tokens:
        for char in text if len(text) > 1 else "":
            if char not in table:
                self._stand_in(table, char, [self.table[byte_piece(byte)] for byte in char.encode()])
    spread = Vocab("llama", list(table), [1] * len(table), scores=self.vocab.scores + [0.0] * len(self.stand_ins))
    return Tokenizer(_model(models.BPE, vocab=table, merges=merges_from_scores(spread), byte_fallback=True))


def _regex(regex: str) -> Any:
    from tokenizers import Regex  # noqa: PLC0415

    return Regex(regex)


def _model(make: Any, **options: Any) -> Any:
    try:
        return make(**options)
    except Exception as error:  # the library raises bare Exception and nothing narrower
        raise UnsupportedError(f"the tokenizers library refuses this vocabulary: {str(error)[:300]}") from error
