"""weights.lock: which files, of which commit, with which hashes. What is pulled by it is that and nothing else.

    format = 1

    [[model]]
    name = "tiny-llama"
    tag = "original"
    asked = ["hf://org/Tiny-Llama", ""]          # as on the command line: source, --revision, each --include
    source = "hf://org/Tiny-Llama"               # where it lies; a registry name is resolved
    revision = "main"
    commit = "3f5e..."
    created = "2024-07-18T08:12:23+00:00"        # the repository, whose it is, and the hub's own number of it:
    author = "org"                               # `weightsmith update` follows the name only while these stay
    repository = "6699a1f3..."
    licence = "apache-2.0"
    files = [
      { path = "config.json", size = 651, sha256 = "..." },
    ]

TOML, since the standard library reads it and a line is a file, so that a change shows as the lines that changed. Models
are ordered by name and tag, files by path, and nothing else (no time, no place, no token, no query of a URL) is in it:
the same models give the same bytes. Instead of a commit, a wheel has `version` and `wheel_sha256`.

A lock comes from outside as any file: names, hashes and sizes are checked before they are used.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.atomic import write_text
from weightsmith.errors import IntegrityError, NotFoundError, UsageError, WeightsmithError
from weightsmith.safename import check_name
from weightsmith.sources.pins import check as check_pins
from weightsmith.sources.source import COMMIT, SHA256, Source, check_revision, parse
from weightsmith.store import Entry, File, locked

NAME = "weights.lock"
MAX_BYTES = 64 << 20
_HEAD = "# Written by `weightsmith pull SOURCE --lock`; `weightsmith pull --locked` pulls exactly this.\nformat = 1\n"
IDENTITY = ("created", "author", "repository", "answers")  # of a hub repository; see sources.listing.Listing
_WORDS = ("revision", "commit", *IDENTITY, "version", "wheel_sha256", "licence")
_WORD = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}")


@dataclass(frozen=True, slots=True)
class Locked:
    """One model of a lock. pins: those of _WORDS that its source has."""

    name: str
    tag: str
    asked: tuple[str, ...]
    source: str
    pins: dict[str, str]
    files: tuple[File, ...]

    @property
    def ref(self) -> str:
        """`name:tag`."""
        return f"{self.name}:{self.tag}"

    @property
    def include(self) -> tuple[str, ...]:
        """The globs that the weights were chosen by."""
        return self.asked[2:]

    def to_source(self) -> Source:
        """Where to fetch from, at the locked commit or version, with every file pinned."""
        source = parse(self.source)
        files = {file.path: (file.size, file.sha256) for file in self.files}
        sha256 = self.files[0].sha256 if source.kind == "url" else self.pins.get("wheel_sha256")
        revision = self.pins.get("commit") or self.pins.get("version")
        return dataclasses.replace(source, revision=revision, sha256=sha256, files=files)


def locked_form(entry: Entry) -> Locked:
    """What a lock says of a pulled `entry`; raises UsageError for one that was not pulled."""
    origin = entry.origin
    kind = origin.get("kind")
    places = {"hf": f"hf://{origin.get('repo')}", "pypi": f"pypi://{origin.get('package')}"}
    source = places.get(str(kind)) or origin.get("source")
    if not isinstance(source, str) or entry.parent is not None:
        raise UsageError(f"{entry.ref} was not pulled", hint="A lock says where to pull from.")
    asked = tuple(str(word) for word in origin.get("asked") or (source, ""))
    if kind == "path" and "registry" not in origin:
        source = asked[0]  # as it was written: relative to where the lock is used
    # A registry's globs choose the files as --include does, and the registry may change.
    asked = (*asked[:2], *(str(glob) for glob in origin.get("include") or ()))
    pins = {word: str(origin[word]) for word in _WORDS if origin.get(word) is not None}
    return Locked(entry.name, entry.tag, asked, source, pins, tuple(sorted(entry.files, key=lambda file: file.path)))


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Add `entries` to the lock `path`, or make it; models of the same name and tag are replaced."""
    fresh = [locked_form(entry) for entry in entries]
    path = path.absolute()
    with locked(path.with_name(f".{path.name}.lock")):
        known = {one.ref: one for one in read(path)} if path.exists() else {}
        write_text(path, text({**known, **{one.ref: one for one in fresh}}.values()))
        path.with_name(f".{path.name}.lock").unlink()


def text(models: Iterable[Locked]) -> str:
    """The bytes of a lock of `models`, whatever order they come in."""
    parts = [_HEAD]
    for one in sorted(models, key=lambda one: (one.name, one.tag)):
        lines = ["", "[[model]]", f"name = {_quoted(one.name)}", f"tag = {_quoted(one.tag)}"]
        lines += [f"asked = [{', '.join(map(_quoted, one.asked))}]", f"source = {_quoted(one.source)}"]
        lines += [f"{word} = {_quoted(one.pins[word])}" for word in _WORDS if word in one.pins]
        lines.append("files = [")
        for file in sorted(one.files, key=lambda file: file.path):
            lines.append(f"  {{ path = {_quoted(file.path)}, size = {file.size}, sha256 = {_quoted(file.sha256)} }},")
        parts.append("\n".join([*lines, "]", ""]))
    return "".join(parts)


def read(path: Path) -> list[Locked]:
    """The models of a lock. Raises NotFoundError, and IntegrityError for one that is no lock or contradicts itself."""
    try:
        with open(path, "rb") as file:
            raw = tomllib.loads(file.read(MAX_BYTES).decode())
    except FileNotFoundError as error:
        raise NotFoundError("no such lock", path=path, hint="Write one with: weightsmith pull SOURCE --lock") from error
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"not a lock: {str(error)[:200]}", path=path) from error
    if raw.get("format") != 1:
        raise IntegrityError(f"format {raw.get('format')!r}, 1 is known", path=path, hint="Update weightsmith.")
    try:
        found = [_model(one) for one in raw.get("model", [])]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"a model without sound {error}", path=path) from error
    except WeightsmithError as error:
        raise IntegrityError(error.message, path=path) from error
    if len({one.ref for one in found}) < len(found):
        raise IntegrityError("a model stands in it twice", path=path, hint="Merge the lock by hand, or write it anew.")
    return found


def choose(models: list[Locked], source: str | None, path: Path) -> list[Locked]:
    """The models that `source` names (as asked for, as source, or by name); all without one."""
    if source is None:
        return models
    found = [one for one in models if source in (one.asked[0], one.source, one.name, one.ref)]
    if not found:
        raise NotFoundError(
            f"{source!r} is not in the lock", path=path, hint=f"Add it: weightsmith pull {source} --lock"
        )
    return found


def compare(one: Locked, entry: Entry) -> None:
    """Raise IntegrityError unless `entry` is what `one` says: the same commit or version, and the same files."""
    for word in ("commit", "version", "wheel_sha256"):
        found = entry.origin.get(word)
        if word in one.pins and found != one.pins[word]:
            raise IntegrityError(
                f"{word} is {found}, the lock says {one.pins[word]}",
                path=entry.ref,
                hint="Pass --force to replace what is in the catalog by what the lock says.",
            )
    found_files = {file.path: (file.size, file.sha256) for file in entry.files}
    check_pins({file.path: (file.size, file.sha256) for file in one.files}, found_files, where=entry.ref)


def _model(raw: dict[str, Any]) -> Locked:
    files = tuple(File(str(check_name(file["path"])), file["size"], file["sha256"]) for file in raw["files"])
    for file in files:
        if not isinstance(file.size, int) or file.size < 0 or not SHA256.fullmatch(file.sha256):
            raise ValueError(f"size and sha256 of {file.path}")
    if not files or len({file.path for file in files}) < len(files):
        raise ValueError("files")
    pins = {word: raw[word] for word in _WORDS if word in raw}
    asked = tuple(raw["asked"])
    for text in (raw["name"], raw["tag"], raw["source"], *pins.values(), *asked):
        if not isinstance(text, str):
            raise TypeError("words")
    if not _WORD.fullmatch(raw["name"]) or not _WORD.fullmatch(raw["tag"]) or len(asked) < 2:
        raise ValueError("name, tag and asked")
    one = Locked(raw["name"], raw["tag"], asked, raw["source"], pins, files)
    _check_kind(parse(one.source), pins)
    return one


def _check_kind(source: Source, pins: dict[str, str]) -> None:
    if source.kind == "hf" and not COMMIT.fullmatch(pins.get("commit", "")):
        raise ValueError("commit")
    if source.kind == "pypi" and not ("version" in pins and SHA256.fullmatch(pins.get("wheel_sha256", ""))):
        raise ValueError("version and wheel_sha256")
    if source.kind == "name":
        raise ValueError("source")
    if "revision" in pins:
        check_revision(pins["revision"], source.text)


def _quoted(text: str) -> str:
    # JSON's escapes are TOML's; TOML wants one more character escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
