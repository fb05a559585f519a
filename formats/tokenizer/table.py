"""Tokens by id, filled from several files and closed into the lists of a `Vocab`.

Ids must be unique and below the model's vocab_size; an id that no file names is padding, written as [PADn], so that
there is one token per row of the embedding.
"""

from __future__ import annotations

import logging
from pathlib import Path

from weightsmith.errors import IntegrityError
from weightsmith.formats.tokenizer.pieces import (
    CONTROL,
    FILLER_SCORE,
    NORMAL,
    SPACE,
    UNUSED,
    USER_DEFINED,
    filler,
)
from weightsmith.formats.tokenizer.settings import Added

log = logging.getLogger(__name__)


class Table:
    """Tokens of one vocabulary. `spaced`: user-defined tokens are kept with real spaces instead of U+2581."""

    def __init__(self, vocab_size: int, *, spaced: bool) -> None:
        self.vocab_size = vocab_size
        self.spaced = spaced
        self.entries: dict[int, tuple[str, int, float]] = {}
        self.ids: dict[str, int] = {}

    def put(self, id_: int, text: str, kind: int, score: float, *, path: Path) -> None:
        """Add a token; IntegrityError if its id or text is taken or the model has no row for it."""
        if id_ >= self.vocab_size:
            raise IntegrityError(
                f"the token {text[:80]!r} has id {id_}, but the model's vocab_size is {self.vocab_size}",
                path=path,
                hint="The tokenizer and the model do not belong together, or config.json is wrong.",
            )
        if id_ in self.entries or text in self.ids:
            other = self.entries[id_][0] if id_ in self.entries else f"id {self.ids[text]}"
            raise IntegrityError(f"the token {text[:80]!r}, id {id_}, is also {other[:80]!r}", path=path)
        self.entries[id_] = (text, kind, score)
        self.ids[text] = id_

    def add(self, token: Added, *, path: Path, trusted: bool) -> None:
        """Add or re-type an added token. One that contradicts the table is an error if `trusted`, else is left out."""
        kind = CONTROL if token.special else USER_DEFINED
        text = token.text.replace(SPACE, " ") if self.spaced and kind == USER_DEFINED else token.text
        known = self.entries.get(token.id)
        if known is None and text not in self.ids:
            self.put(token.id, text, kind, -1000.0, path=path)
        elif known is not None and known[0] in (text, token.text):
            if known[1] == NORMAL:
                self.retype(token.id, text, kind)
        elif trusted:
            raise IntegrityError(f"the added token {token.text[:80]!r} has id {token.id}, which is taken", path=path)
        else:
            log.warning("%s: the added token %r, id %d, is not the tokenizer's; ignored", path, token.text, token.id)

    def retype(self, id_: int, text: str, kind: int) -> None:
        """Change a token's text and type."""
        old, _, score = self.entries[id_]
        self.ids.pop(old)
        self.ids[text] = id_
        self.entries[id_] = (text, kind, score)

    def close(self) -> tuple[list[str], list[int], list[float]]:
        """Texts, types and scores for ids 0 to vocab_size - 1."""
        rows = [self.entries.get(id_) or (filler(id_), UNUSED, FILLER_SCORE) for id_ in range(self.vocab_size)]
        return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]
