"""One commit of a repository as its hub lists it: path, size and hash of each file; kept for `--offline`.

    HOME/hub/models--ORG--NAME/COMMIT.json     the listing of a commit
    HOME/hub/models--ORG--NAME/refs.json       which commit a branch or tag was when it was last pulled

The hash is SHA-256 of large files, else git's SHA-1 of `blob SIZE\\0` + bytes (SHA-256 in git's newer object format).
It is checked to be one before anything is named after it, also when a listing is read back.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from weightsmith.atomic import disk_errors, write_text
from weightsmith.errors import IntegrityError, NotFoundError
from weightsmith.progress import Ticker
from weightsmith.sources.source import COMMIT, SHA256
from weightsmith.store import CHUNK, locked

MAX_LISTING = 64 << 20


@dataclass(frozen=True, slots=True)
class Listed:
    """One file of a commit: bytes, SHA-256 (large files only) and git blob SHA-1, as hex."""

    size: int
    sha256: str | None
    sha1: str

    @property
    def git(self) -> str | None:
        """The hash that git's own object name is made with; None where the plain SHA-256 is known."""
        if self.sha256 is not None:
            return None
        return "sha1" if len(self.sha1) == 40 else "sha256"  # the latter in git's newer object format

    @property
    def identity(self) -> str:
        """What tells the content from any other; fit for a file name."""
        return f"sha256-{self.sha256}" if self.sha256 is not None else f"git-{self.sha1}"

    def fault(self, size: int, sha256: str, git: str | None) -> str:
        """What is wrong with a file of this size and these hashes; "" when it is what was listed."""
        if size != self.size:
            return f"{size} bytes, {self.size} are listed"
        if self.sha256 is not None:
            return "" if sha256 == self.sha256 else f"sha256 is {sha256}, {self.sha256} is listed"
        return "" if git == self.sha1 else f"git hash is {git}, {self.sha1} is listed"


@dataclass(frozen=True, slots=True)
class Listing:
    """One commit of one repository."""

    repo: str
    commit: str
    files: dict[str, Listed]
    licence: str | None
    gated: bool
    created: str | None = None  # when the repository was made, as the hub says
    author: str | None = None  # whose it is
    repository: str | None = None  # the hub's own number of it, which a new one of the same name does not get
    answers: str | None = None  # the name that it answers under, if that is another than `repo`


def born(folder: Path) -> set[str]:
    """When the repository was made, by the listings kept in `folder`.

    Another answer than now's means that the name was given up and taken anew, maybe by somebody else.
    """
    kept = [_read_json(path) for path in folder.glob("*.json") if COMMIT.fullmatch(path.stem)]
    return {raw["created"] for raw in kept if isinstance(raw, dict) and isinstance(raw.get("created"), str)}


def prove(path: Path, listed: Listed, ticker: Ticker | None = None) -> tuple[str, str]:
    """The SHA-256 of the file `path`, and what is wrong with it ("" when it is what was listed)."""
    size = path.stat().st_size
    if size != listed.size:
        return "", listed.fault(size, "", None)
    whole = hashlib.sha256()
    git = hashlib.new(listed.git, b"blob %d\0" % size, usedforsecurity=False) if listed.git else None
    with disk_errors(path), open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(CHUNK))
        while nbytes := file.readinto(buffer):
            whole.update(buffer[:nbytes])
            if git is not None:
                git.update(buffer[:nbytes])
            if ticker is not None:
                ticker.update(nbytes)
    return whole.hexdigest(), listed.fault(size, whole.hexdigest(), git.hexdigest() if git is not None else None)


def checked(name: object, raw: object, where: str) -> Listed:
    """The entry `raw` of a listing, from the hub or from disk; nothing is named after a hash that was not checked.

    Raises IntegrityError.
    """
    if isinstance(name, str) and isinstance(raw, dict):
        size, sha256, sha1 = raw.get("size"), raw.get("sha256"), raw.get("sha1")
        sound = isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 1 << 48
        sound = sound and (sha256 is None or (isinstance(sha256, str) and SHA256.fullmatch(sha256) is not None))
        if sound and isinstance(sha1, str) and (COMMIT.fullmatch(sha1) or SHA256.fullmatch(sha1)):
            return Listed(int(size), sha256, sha1)  # type: ignore[arg-type]
    raise IntegrityError(f"the listing's entry for {name!r} has no sound size and hash", path=where)


def remember(folder: Path, listing: Listing, revision: str) -> None:
    """Keep `listing` in `folder`, and that `revision` was its commit."""
    with locked(folder / ".lock"):
        write_text(folder / f"{listing.commit}.json", json.dumps({"format": 1, **asdict(listing)}, indent=1))
        refs = _read_json(folder / "refs.json")
        known = refs if isinstance(refs, dict) else {}
        write_text(folder / "refs.json", json.dumps({**known, revision: listing.commit}, indent=1))


def remembered(folder: Path, repo: str, revision: str, *, where: str) -> Listing:
    """The listing of `revision` as kept in `folder`. Raises NotFoundError, and IntegrityError for a damaged one."""
    refs = _read_json(folder / "refs.json")
    commit = refs.get(revision) if isinstance(refs, dict) else None
    commit = revision if COMMIT.fullmatch(revision) else commit
    raw = _read_json(folder / f"{commit}.json") if isinstance(commit, str) and COMMIT.fullmatch(commit) else None
    if not isinstance(raw, dict) or not isinstance(raw.get("files"), dict) or not isinstance(commit, str):
        raise NotFoundError(
            f"offline, and revision {revision!r} was never pulled here",
            path=where,
            hint="Run the same pull once without --offline (and without HF_HUB_OFFLINE).",
        )
    files = {name: checked(name, entry, where) for name, entry in raw["files"].items()}
    words = ("licence", "created", "author", "repository", "answers")
    said = {key: raw.get(key) if isinstance(raw.get(key), str) else None for key in words}
    return Listing(repo=repo, commit=commit, files=files, gated=bool(raw.get("gated")), **said)


def _read_json(path: Path) -> object:
    try:
        with open(path, "rb") as file:
            found: object = json.loads(file.read(MAX_LISTING))
            return found
    except (OSError, ValueError):
        return None
