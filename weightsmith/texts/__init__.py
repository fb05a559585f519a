"""Texts to calibrate and to measure on: what a user names, read into one string and its digest.

| named | what it is |
|---|---|
| `FILE` | UTF-8 text |
| `FILE.jsonl` | one JSON object a line: `messages` (a chat), or a string under `text` or `content`, or under --field |
| `FILE.parquet` | the same as columns; needs pyarrow |
| `hf://datasets/ORG/NAME[@REV][/FILE]` | such a file of a dataset on the hub, pinned and verified |
| `self` | what the model writes itself (`evals.calibration.generate`) |

Records are joined by an empty line. Chats are written out by the model's own template (`chat`), and then control tokens
in the text are tokens. Of a large file the first 64 MB are taken: a calibration draws a few hundred kilobytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.errors import NotFoundError, UnsupportedError, UsageError
from weightsmith.sources import dataset
from weightsmith.texts import chat, records
from weightsmith.types import Reader

MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Text:
    """A text, or chats that a model's template turns into one.

    name: for humans. sha256: of what was read. plain: the text, or None where `chats` are lists of messages (mappings
    with `role` and `content`).
    """

    name: str
    sha256: str
    plain: str | None
    chats: Sequence[Sequence[Mapping[str, Any]]] = ()

    @property
    def special(self) -> bool:
        """Whether control tokens written in it are meant as tokens."""
        return self.plain is None

    def render(self, reader: Reader, *, pre: str | None = None) -> str:
        """The text as `reader`'s model gets it; UnsupportedError if chats meet a model without a template."""
        if self.plain is not None:
            return self.plain
        vocab = reader.vocab(pre)
        if vocab is None or not vocab.chat_template:
            raise UnsupportedError(
                f"{self.name} holds chats, and the model has no chat template",
                path=reader.path,
                hint="Name a field that holds plain text with --field.",
            )
        return chat.render(self.chats, vocab, where=str(reader.path))


SELF = "self"


def find(named: str, *, home: Path, field: str | None = None, offline: bool = False) -> Text | None:
    """The text that a user named, None for the model's own; `home` is the catalog's folder.

    Raises NotFoundError (no such file) and what `load` and `dataset.fetch` raise.
    """
    if named == SELF:
        return None
    if named.startswith(dataset.PREFIX):
        path, where = dataset.fetch(named, home=home, offline=offline)
        return load(path, name=where, field=field)
    path = Path(named).expanduser()
    if not path.is_file():
        hint = f"A text, a .jsonl file, {dataset.PREFIX}ORG/NAME or self is meant."
        raise NotFoundError("no such file", path=path, hint=hint)
    return load(path, field=field)


def load(path: Path, *, name: str | None = None, field: str | None = None) -> Text:
    """Read a text file or a file of records; see the module.

    name: for humans, the file's own by default. field: of each record. Raises UsageError (no UTF-8, no such field, a
    record that is neither chat nor text), UnsupportedError (parquet without pyarrow).
    """
    name = name or path.name
    if path.suffix.lower() not in records.SUFFIXES:
        if field is not None:
            raise UsageError("a plain text has no fields", path=path, hint="Leave --field out.")
        data = path.read_bytes()
        return Text(name, hashlib.sha256(data).hexdigest(), decode(data, path))
    found = records.read(path, field=field, limit=MAX_BYTES)
    if not found.values:
        raise UsageError("no records", path=path)
    if all(isinstance(value, str) for value in found.values):
        return Text(name, found.sha256, "\n\n".join(str(value) for value in found.values))
    if any(isinstance(value, str) for value in found.values):
        raise UsageError("some records are chats and some are text", path=path, hint="Name one with --field.")
    return Text(name, found.sha256, None, [value for value in found.values if not isinstance(value, str)])


def decode(data: bytes, path: Path) -> str:
    """UTF-8 `data` of the file `path` as text; UsageError says at which byte it is none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        hint = "Convert it to UTF-8 first."
        raise UsageError(f"not UTF-8 at byte {error.start}", path=path, hint=hint) from error
