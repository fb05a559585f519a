"""The small files beside a tokenizer: tokenizer_config.json, special_tokens_map.json, added_tokens.json, templates.

Every value is checked for its type before use. A special token is written as text or as an object with `content`.
Where chat_template.jinja stands beside a template in tokenizer_config.json, the file counts, as it does for
transformers; chat_template.json, which processors of images have, counts where there is no other. Templates are opaque:
never rendered, never changed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.errors import IntegrityError
from weightsmith.formats.safetensors import strictjson
from weightsmith.safename import resolve_inside

MAX_BYTES = 256 << 20
MAX_SMALL = 16 << 20
TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")
MAX_CONTAINERS = 8_000_000  # each [ or { costs some 60 bytes of memory, however little file it takes

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Added:
    """An added token: id, text, and whether it is special (kept out of plain text)."""

    id: int
    text: str
    special: bool


def read_bytes(path: Path, *, limit: int = MAX_BYTES) -> bytes:
    """All of a regular file of at most `limit` bytes; IntegrityError if it is larger."""
    handle, size = strictjson.open_regular(path)
    try:
        if size > limit:
            raise IntegrityError(f"{size} bytes, expected at most {limit} for a tokenizer file", path=path)
        return os.pread(handle, size, 0) if size else b""
    finally:
        os.close(handle)


def read_json(path: Path, *, limit: int = MAX_BYTES) -> Json:
    """A JSON object from a file of at most `limit` bytes; IntegrityError if it is anything else."""
    data = read_bytes(path, limit=limit)
    if data.count(b"[") + data.count(b"{") > MAX_CONTAINERS:
        raise IntegrityError(f"more than {MAX_CONTAINERS} arrays and objects", path=path)
    return strictjson.parse_object(data, path=path, what=path.name)


def optional(folder: Path, name: str) -> Path | None:
    """The path of file `name` in `folder`, or None; UnsafeInputError if it is a link that leads outside."""
    return resolve_inside(folder, name) if (folder / name).is_file() else None


class Settings:
    """What the small files of one folder say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "tokenizer_config.json"
        self.config = self._small("tokenizer_config.json")
        self.map = self._small("special_tokens_map.json")

    def _small(self, name: str) -> Json:
        path = optional(self.folder, name)
        return read_json(path, limit=MAX_SMALL) if path else {}

    def special(self, name: str) -> str | None:
        """The text of the special token `name` (bos, eos, unk, pad), or None."""
        for source in (self.config, self.map):
            text = token_text(source.get(f"{name}_token"))
            if text is not None:
                return text
        return None

    def flag(self, name: str) -> bool | None:
        """A boolean of tokenizer_config.json, or None."""
        value = self.config.get(name)
        return value if isinstance(value, bool) else None

    def added(self) -> list[Added]:
        """Tokens that only the small files list, with their ids."""
        special = {text for text in map(token_text, [*self.config.values(), *self.map.values()]) if text is not None}
        for source in (self.config, self.map):
            more = source.get("additional_special_tokens")
            special |= {text for text in map(token_text, more if isinstance(more, list) else []) if text is not None}
        found = []
        path = optional(self.folder, "added_tokens.json")
        for text, id_ in (read_json(path, limit=MAX_SMALL) if path else {}).items():
            found.append(Added(token_id(id_, text, path=path or self.path), text, text in special))
        decoder = self.config.get("added_tokens_decoder")
        for key, entry in decoder.items() if isinstance(decoder, Mapping) else ():
            content = token_text(entry)
            if content is None or not key.isascii() or not key.isdecimal() or len(key) > 9:
                raise IntegrityError(f"added_tokens_decoder has a damaged entry {key[:40]!r}", path=self.path)
            is_special = isinstance(entry, Mapping) and entry.get("special") is True
            found.append(Added(int(key), content, is_special or content in special))
        return found

    def chat_template(self) -> str | None:
        """The chat template, byte for byte, or None."""
        path = optional(self.folder, "chat_template.jinja")
        if path is not None:
            try:
                return read_bytes(path, limit=MAX_SMALL).decode("utf-8")
            except UnicodeDecodeError as error:
                raise IntegrityError("not UTF-8", path=path) from error
        value, where = self.config.get("chat_template"), self.path
        if value is None and (beside := optional(self.folder, "chat_template.json")) is not None:
            value, where = read_json(beside, limit=MAX_SMALL).get("chat_template"), beside
        if isinstance(value, list):
            defaults = [item for item in value if isinstance(item, Mapping) and item.get("name") == "default"]
            value = defaults[0].get("template") if defaults else None
        if value is not None and not isinstance(value, str):
            raise IntegrityError(f"chat_template is a {type(value).__name__}, expected a string", path=where)
        if value is not None and not _is_unicode(value):
            raise IntegrityError("chat_template holds half a surrogate pair, which is no text", path=where)
        return value


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def token_text(value: object) -> str | None:
    """The text of a special token in either notation; None if there is none."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def token_id(value: object, text: str, *, path: Path) -> int:
    """`value` as a token's id; IntegrityError if it is none."""
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise IntegrityError(f"the token {text[:80]!r} has the id {str(value)[:40]}, expected a number", path=path)
    return value
