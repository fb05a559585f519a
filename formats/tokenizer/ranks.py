"""Byte-level vocabularies given as ranks: token id = rank, and of all pairs the one with the lowest rank is merged.

tiktoken has no list of merges: it joins the adjacent pair whose concatenation has the lowest rank, the leftmost on a
tie, and a word that is a token itself is that token (`ignore_merges`). A list of merges does the same if it has, for
every token, the pair of parts that this procedure leaves of the token's own bytes just before the last step: inside a
longer text whose merges never crossed the token's ends, what happens between them is what happens to the token alone.
A token that is left in three parts or more is no result of merging; only a word that equals it can become it.

Ref: byte_pair_merge in openai/tiktoken, src/lib.rs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from weightsmith.errors import IntegrityError
from weightsmith.formats.tokenizer.alphabet import to_chars

MAX_TOKEN = 4096  # bytes
MAX_WORK = 200_000_000  # sum of squared lengths, which the time goes with; published vocabularies have some 10 million


def merges_of(tokens: Sequence[bytes], *, path: Path) -> list[tuple[str, str]]:
    """Merges, best first, in the byte alphabet; `tokens` in the order of their ranks.

    Raises IntegrityError for a token that is empty, too long or there twice, or a byte that is no token.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(ranks) != len(tokens):
        raise IntegrityError("a token occurs twice", path=path)
    if not all(0 < len(token) <= MAX_TOKEN for token in tokens):
        raise IntegrityError(f"a token is empty or longer than {MAX_TOKEN} bytes", path=path)
    if sum(len(token) ** 2 for token in tokens) > MAX_WORK:
        raise IntegrityError("the tokens are far longer than those of any vocabulary", path=path)
    absent = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if absent:
        raise IntegrityError(f"{len(absent)} bytes are no tokens, first {absent[0]}", path=path)
    found = []
    for rank, token in enumerate(tokens):
        if len(token) > 1:
            parts = split(token, ranks, rank)
            if len(parts) == 2:
                found.append((to_chars(parts[0]), to_chars(parts[1])))
    return found


def split(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """Parts of `token` after every merge of a rank below `limit`."""
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        best, where = limit, -1
        for at in range(len(parts) - 1):
            rank = ranks.get(parts[at] + parts[at + 1], limit)
            if rank < best:
                best, where = rank, at
        if where < 0:
            break
        parts[where : where + 2] = [parts[where] + parts[where + 1]]
    return parts
