"""A dataset on the hub: `hf://datasets/ORG/NAME[@REVISION][/FILE]`, one data file of which is a text to work with.

Without FILE the first of the commit's data files is taken, one with "train" in its name before others and lines of JSON
before parquet. Which one it was, and of which commit, is part of what is returned.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from weightsmith.errors import NotFoundError, UsageError
from weightsmith.safename import check_name
from weightsmith.sources import hub
from weightsmith.sources.source import check_repo, check_revision

log = logging.getLogger(__name__)

PREFIX = "hf://datasets/"
_KINDS = (".jsonl", ".ndjson", ".parquet", ".txt")


def fetch(text: str, *, home: Path, offline: bool = False) -> tuple[Path, str]:
    """The file that `text` names, verified, and its full name with the commit.

    Raises UsageError (no such form), NotFoundError (no such file, or no data file) and what `hub.fetch` raises.
    """
    org, _, rest = text.removeprefix(PREFIX).partition("/")
    name, slash, file = rest.partition("/")
    name, mark, revision = name.partition("@")
    repo = check_repo(f"{org}/{name}", text)
    wanted = check_revision(revision, text) if mark else None
    if slash:
        check_name(file, path=text)

    def pick(names: Iterable[str]) -> str:
        return _pick(sorted(names), file, text)

    path, where = hub.fetch_dataset(repo, pick, home=home, revision=wanted, offline=offline)
    log.info("text: %s", where)
    return path, where


def _pick(names: list[str], file: str, text: str) -> str:
    data = [name for name in names if Path(name).suffix.lower() in _KINDS]
    if file:
        if file not in names:
            raise NotFoundError(f"no file {file!r}; it has {', '.join(data[:8]) or 'no data file'}", path=text)
        if file not in data:
            raise UsageError(f"{file!r} is none of {', '.join(_KINDS)}", path=text)
        return file
    if not data:
        raise NotFoundError(f"no data file ({', '.join(_KINDS)})", path=text, hint="Name one: .../FILE.")
    return min(data, key=lambda name: ("train" not in name, _KINDS.index(Path(name).suffix.lower()), name))
