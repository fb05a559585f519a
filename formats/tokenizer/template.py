"""The chat template of an open checkpoint, whichever form it stands in, and the one hash that tells it from others.

| form | where |
|---|---|
| chat_template.jinja | the file |
| tokenizer_config.json, chat_template.json | the key `chat_template`: a string, or the one named "default" of a list |
| GGUF | the key `tokenizer.chat_template` |

A template is a program that runs with the model, and a changed one needs no changed weight. Here it is an opaque
string: copied, hashed (SHA-256 of its UTF-8 bytes), compared, never rendered.
"""

from __future__ import annotations

import hashlib

from weightsmith.formats.gguf.metadata import Metadata
from weightsmith.formats.gguf.vocab import TEMPLATE
from weightsmith.formats.tokenizer.settings import TEMPLATE_FILES, Settings
from weightsmith.types import Reader


def template_of(reader: Reader) -> str | None:
    """The chat template of `reader`, also where its tokenizer is of no known kind; None without one.

    Raises IntegrityError (no string, no UTF-8) and UnsafeInputError (a link out of the folder).
    """
    metadata = reader.metadata()
    if isinstance(metadata, Metadata):
        return metadata.text(TEMPLATE)
    folder = next((path.parent for path in reader.files() if path.name in TEMPLATE_FILES), None)
    return Settings(folder).chat_template() if folder is not None else None


def template_sha256(template: str) -> str:
    """SHA-256 of a template's UTF-8 bytes, 64 hex digits."""
    return hashlib.sha256(template.encode()).hexdigest()
