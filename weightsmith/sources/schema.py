"""Checking registry.yaml against its JSON schema (registry.schema.json, JSON Schema 2020-12), and saying what is wrong.

The schema is strict: unknown keys are errors, since a mistyped `sha256` must not silently unpin a model and a mistyped
`max_kld` must not silently open a gate. Every fault found is told with its file and line, the first as the message.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from weightsmith.errors import UsageError
from weightsmith.sources.marked_yaml import Document
from weightsmith.suggest import did_you_mean

SHOWN = 10  # faults beyond so many are only counted
_SENTENCES = {
    "minimum": "at least {0}",
    "exclusiveMinimum": "more than {0}",
    "maximum": "at most {0}",
    "exclusiveMaximum": "less than {0}",
    "maxLength": "at most {0} characters",
}


@functools.cache
def _validator() -> Any:
    from jsonschema import Draft202012Validator  # noqa: PLC0415  (0.1 s, and most verbs need no registry)

    schema = json.loads(Path(__file__).with_name("registry.schema.json").read_text(encoding="utf-8"))
    return Draft202012Validator(schema)


def check(document: Document) -> None:
    """Raise UsageError with every fault of `document` against the schema, or return."""
    faults = []
    for error in _validator().iter_errors(document.data):
        faults += _faults(error)
    if not faults:
        return
    # A mistyped limit is said by its own name; that there is no limit follows from it.
    unknown = {path[:-1] for path, message in faults if "unknown key" in message}
    faults = [(path, message) for path, message in faults if path not in unknown or "at least one" not in message]
    told = sorted({(document.lines.get(path, 0), document.place(path), message) for path, message in faults})
    (_, place, message), *others = told
    more = [f"{where}: {what}" for _, where, what in others[:SHOWN]]
    if len(others) > SHOWN:
        more.append(f"and {len(others) - SHOWN} faults more")
    raise UsageError(message, path=place, hint="\n  ".join(more) or None)


def _faults(error: Any) -> list[tuple[tuple[str | int, ...], str]]:
    """One schema error as (path of keys, sentence); several for several unknown keys."""
    path = tuple(error.absolute_path)
    name = ".".join(str(part) for part in path[-2:])
    if error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        unknown = sorted(set(error.instance) - set(known))
        tail = {key: did_you_mean(key, known) or f"Known: {', '.join(known)}." for key in unknown}
        return [((*path, key), f"{_of(name)}unknown key {key!r}. {tail[key]}") for key in unknown]
    if "propertyNames" in error.absolute_schema_path:
        return [((*path, error.instance), f"{error.instance!r} is not {error.schema['description']}")]
    if error.validator == "required":
        absent = [key for key in error.validator_value if key not in error.instance]
        return [(path, f"{_of(name)}`{key}` is missing") for key in absent]
    return [(path, f"{name or 'the file'} is {_short(error.instance)}, expected {_wanted(error)}")]


def _wanted(error: Any) -> str:
    if error.validator == "enum":
        near = did_you_mean(error.instance, error.validator_value) if isinstance(error.instance, str) else ""
        return f"one of {', '.join(map(str, error.validator_value))}. {near}".strip()
    if error.validator in _SENTENCES:
        return _SENTENCES[error.validator].format(error.validator_value)
    if error.validator == "uniqueItems":
        return "nothing twice"
    if "description" in error.schema:
        return str(error.schema["description"])
    kinds = error.schema.get("type", "something else")
    words = {"boolean": "true or false", "integer": "a whole number", "number": "a number", "string": "a text"}
    return " or ".join(words.get(kind, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds))


def _of(name: str) -> str:
    return f"{name}: " if name else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
