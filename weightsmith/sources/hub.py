"""Hugging Face hub: one commit of one repository, every file proved against the hub's own listing.

1. The revision is resolved to a commit; everything after asks for that commit, so a moving branch cannot mix files.
2. The tree of the commit is listed: path, size, and a hash of each file (SHA-256 of large files, else git's SHA-1 of
   `blob SIZE\\0` + bytes). `choose` picks the checkpoint out of it; an index may only name files of this listing.
3. Each file goes through huggingface_hub's cache (shared with other tools; a finished file is not fetched twice), is
   linked or copied into the staging folder and hashed there. huggingface_hub compares sizes only, so a wrong hash is
   fetched anew once, then refused.

A dataset (`fetch_dataset`) goes the same way, one file of it.

The token is huggingface_hub's affair: it is read, sent and kept there and never seen here. The listing is kept under
HOME/hub for `--offline`. This module is the only one that imports huggingface_hub.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from weightsmith.atomic import write_text
from weightsmith.errors import IntegrityError, NotFoundError, UnsafeInputError, UsageError, WeightsmithError
from weightsmith.progress import Ticker, progress
from weightsmith.sources import choose
from weightsmith.sources.hub_errors import connection_errors, explain, is_passing
from weightsmith.sources.source import COMMIT, SHA256, Fetched, FetchedFile, Source, bare_url, check_revision, check_url
from weightsmith.store import locked, sha256_file, take_in

log = logging.getLogger(__name__)

T = TypeVar("T")

WAITS = (1.0, 4.0, 15.0)  # seconds before each further try of something that may pass by itself
MAX_FILES = 100_000
MAX_INDEX = 64 << 20
MAX_LISTING = 64 << 20
TIMEOUT = 30.0
LONG = 1 << 30  # bytes from which hashing takes long enough to be shown


@dataclass(frozen=True, slots=True)
class Listed:
    """One file of a commit: bytes, SHA-256 (large files only) and git blob SHA-1, as hex."""

    size: int
    sha256: str | None
    sha1: str


@dataclass(frozen=True, slots=True)
class Listing:
    """One commit of one repository."""

    repo: str
    commit: str
    files: dict[str, Listed]
    licence: str | None
    gated: bool


@dataclass(frozen=True, slots=True)
class _Session:
    """Where to ask and how. offline: only what the local caches hold. kind: "model" or "dataset"."""

    endpoint: str
    repo: str
    offline: bool
    ticker: Ticker | None = None
    kind: str = "model"

    @property
    def where(self) -> str:
        return f"hf://{'datasets/' if self.kind == 'dataset' else ''}{self.repo}"

    def folder(self, home: Path) -> Path:
        """Where listings of this repository are kept."""
        return home / "hub" / f"{self.kind}s--{self.repo.replace('/', '--')}"


def fetch(
    source: Source,
    into: Path,
    *,
    home: Path,
    revision: str | None = None,
    include: Sequence[str] = (),
    offline: bool = False,
) -> Fetched:
    """Fetch the checkpoint in `source` (kind "hf") into folder `into`; `home` is the catalog's folder.

    Raises NotFoundError and AccessError (exit code 7, told apart), IntegrityError (a hash differs), UnsafeInputError
    (only pickles, hostile names), UsageError, and WeightsmithError when the network failed and a further run may do.
    """
    wanted = check_revision(revision or source.revision or "main", source.text)
    session = _Session(_endpoint(), source.target, offline or _offline_mode())
    listing = _listing(session, home, wanted)
    names = choose.select(listing.files, include=include, where=session.where)
    names = _follow_index(session, listing, names, explicit=bool(include))
    places = choose.placed(names)
    total = sum(listing.files[name].size for name in names)
    log.info("%s at %s: %d files, %.2f GB", session.where, listing.commit[:12], len(names), total / 1e9)
    files = []
    with progress(f"pull {source.target}", total) as ticker:
        running = replace(session, ticker=ticker)
        for name in names:
            files.append(_take(running, listing, name, into / places[name], places[name]))
    origin: dict[str, Any] = {"kind": "hf", "source": f"hf://{listing.repo}@{listing.commit}", "repo": listing.repo}
    origin |= {"commit": listing.commit, "revision": wanted, "endpoint": bare_url(session.endpoint)}
    origin |= {"licence": listing.licence, "gated": listing.gated}
    return Fetched(into, tuple(files), origin)


def fetch_dataset(
    repo: str, pick: Callable[[Iterable[str]], str], *, home: Path, revision: str | None = None, offline: bool = False
) -> tuple[Path, str]:
    """One file of dataset `repo`, verified, in huggingface_hub's cache, and what it is by commit ("hf://datasets/...").

    pick: chooses the file from the names of the commit. Raises what `fetch` raises.
    """
    wanted = revision or "main"
    session = _Session(_endpoint(), repo, offline or _offline_mode(), kind="dataset")
    listing = _listing(session, home, wanted)
    name = pick(listing.files)
    with progress(f"pull {name}", listing.files[name].size) as ticker:
        running = replace(session, ticker=ticker)
        for again in (False, True):
            cached = _download(running, listing, name, again=again)
            _, wrong = _prove(cached, listing.files[name])
            if not wrong:
                return cached, f"{session.where}@{listing.commit}/{name}"
            if session.offline:
                break
    raise IntegrityError(wrong, path=f"{session.where}/{name}", hint="The file is damaged in the cache or on its way.")


def _listing(session: _Session, home: Path, revision: str) -> Listing:
    """The files of the revision's commit: asked for and kept, or offline as kept."""
    folder = session.folder(home)
    if session.offline:
        return _remembered(folder, session, revision)
    listing = _ask(session, revision)
    _remember(folder, listing, revision)
    return listing


def _endpoint() -> str:
    """The hub's address. A token may travel with every request, so plain http is for this machine only."""
    endpoint = os.environ.get("HF_ENDPOINT", "").strip() or "https://huggingface.co"
    try:
        check_url(endpoint)
    except WeightsmithError as error:
        raise UsageError(f"HF_ENDPOINT cannot be used: {error.message}", path=error.path, hint=error.hint) from error
    return endpoint.rstrip("/")


def _offline_mode() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _ask(session: _Session, revision: str) -> Listing:
    from huggingface_hub import HfApi  # noqa: PLC0415  (the catalog's verbs start without it)

    api = HfApi(endpoint=session.endpoint, library_name="weightsmith")
    about = api.dataset_info if session.kind == "dataset" else api.model_info
    info = _calling(session, revision, None, lambda: about(session.repo, revision=revision, timeout=TIMEOUT))
    commit = str(info.sha or "")
    if not COMMIT.fullmatch(commit):
        raise IntegrityError(f"the hub names no commit for {revision!r}", path=session.where)
    if COMMIT.fullmatch(revision) and commit != revision:
        raise IntegrityError(f"commit {revision} was asked for, {commit} was offered", path=session.where)
    if info.id and info.id != session.repo:
        log.warning("%s now answers as %s; check that it is still who you mean", session.where, info.id)

    def tree() -> list[Any]:
        found = api.list_repo_tree(session.repo, revision=commit, recursive=True, repo_type=session.kind)
        return list(islice(found, MAX_FILES + 1))

    entries = _calling(session, commit, None, tree)
    if len(entries) > MAX_FILES:
        raise UnsafeInputError(f"more than {MAX_FILES} files", path=session.where)
    card = info.card_data.to_dict() if info.card_data else {}
    licence = card.get("license_name") or card.get("license")
    return Listing(
        repo=session.repo,
        commit=commit,
        files={entry.path: _listed(entry, session) for entry in entries if hasattr(entry, "blob_id")},
        licence=str(licence)[:200] if licence else None,
        gated=bool(info.gated),
    )


def _listed(entry: Any, session: _Session) -> Listed:
    lfs = entry.lfs
    size, sha256 = (lfs.size, lfs.sha256) if lfs else (entry.size, None)
    return _checked(entry.path, {"size": size, "sha256": sha256, "sha1": entry.blob_id}, session)


def _checked(name: object, raw: object, session: _Session) -> Listed:
    """The entry `raw` of a listing, from the hub or from disk; nothing is named after a hash that was not checked."""
    if isinstance(name, str) and isinstance(raw, dict):
        size, sha256, sha1 = raw.get("size"), raw.get("sha256"), raw.get("sha1")
        sound = isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 1 << 48
        sound = sound and (sha256 is None or (isinstance(sha256, str) and SHA256.fullmatch(sha256) is not None))
        if sound and isinstance(sha1, str) and (COMMIT.fullmatch(sha1) or SHA256.fullmatch(sha1)):
            return Listed(int(size), sha256, sha1)  # type: ignore[arg-type]
    raise IntegrityError(f"the listing's entry for {name!r} has no sound size and hash", path=session.where)


def _remember(folder: Path, listing: Listing, revision: str) -> None:
    with locked(folder / ".lock"):
        write_text(folder / f"{listing.commit}.json", json.dumps({"format": 1, **asdict(listing)}, indent=1))
        refs = _read_json(folder / "refs.json")
        known = refs if isinstance(refs, dict) else {}
        write_text(folder / "refs.json", json.dumps({**known, revision: listing.commit}, indent=1))


def _remembered(folder: Path, session: _Session, revision: str) -> Listing:
    refs = _read_json(folder / "refs.json")
    commit = refs.get(revision) if isinstance(refs, dict) else None
    commit = revision if COMMIT.fullmatch(revision) else commit
    raw = _read_json(folder / f"{commit}.json") if isinstance(commit, str) and COMMIT.fullmatch(commit) else None
    if not isinstance(raw, dict) or not isinstance(raw.get("files"), dict) or not isinstance(commit, str):
        raise NotFoundError(
            f"offline, and revision {revision!r} was never pulled here",
            path=session.where,
            hint="Run the same pull once without --offline (and without HF_HUB_OFFLINE).",
        )
    files = {name: _checked(name, entry, session) for name, entry in raw["files"].items()}
    licence = raw.get("licence")
    return Listing(session.repo, commit, files, licence if isinstance(licence, str) else None, bool(raw.get("gated")))


def _read_json(path: Path) -> object:
    try:
        with open(path, "rb") as file:
            found: object = json.loads(file.read(MAX_LISTING))
            return found
    except (OSError, ValueError):
        return None


def _follow_index(session: _Session, listing: Listing, names: list[str], *, explicit: bool) -> list[str]:
    """With an index, the shards are what it names, all of them listed; without, `names` as they are."""
    if explicit or choose.INDEX not in names:
        return names
    if listing.files[choose.INDEX].size > MAX_INDEX:
        raise UnsafeInputError(f"{choose.INDEX} is larger than {MAX_INDEX >> 20} MiB", path=session.where)
    cached = _download(session, listing, choose.INDEX, again=False)
    try:
        index = json.loads(cached.read_bytes())
    except (ValueError, RecursionError) as error:
        raise IntegrityError("not JSON", path=f"{session.where}/{choose.INDEX}") from error
    shards = choose.shards_of(index, where=f"{session.where}/{choose.INDEX}")
    missing = [name for name in shards if name not in listing.files]
    if missing:
        raise IntegrityError(
            f"{choose.INDEX} names {missing[0]}, which the commit does not hold",
            path=session.where,
            hint="The repository is incomplete; try another revision.",
        )
    kept = [name for name in names if not name.endswith(".safetensors")]
    return choose.check_all(sorted({*kept, *shards}), where=session.where)


def _take(session: _Session, listing: Listing, name: str, target: Path, place: str) -> FetchedFile:
    """Bring one file to `target`, verified. A wrong hash is fetched anew once: the cache may have gone bad."""
    wrong = ""
    for again in (False, True):
        cached = _download(session, listing, name, again=again)
        target.unlink(missing_ok=True)
        take_in(cached, target)
        found, wrong = _prove(target, listing.files[name])
        if not wrong:
            return FetchedFile(place, listing.files[name].size, found)
        target.unlink()
        if session.offline:
            break
        log.warning("%s/%s: %s; fetching it again", session.where, name, wrong)
    raise IntegrityError(
        wrong,
        path=f"{session.where}/{name}",
        hint="The file is damaged in the cache. Pull without --offline."
        if session.offline
        else "The server or something between delivers other bytes than it lists. Nothing was kept.",
    )


def _prove(path: Path, listed: Listed) -> tuple[str, str]:
    """The SHA-256 of `path`, and what is wrong with it ("" when it is what was listed)."""
    size = path.stat().st_size
    if size != listed.size:
        return "", f"{size} bytes, {listed.size} are listed"
    if size < LONG:
        sha256 = sha256_file(path)
    else:
        with progress(f"verify {path.name}", size) as ticker:
            sha256 = sha256_file(path, ticker)
    if listed.sha256 is not None:
        return sha256, "" if sha256 == listed.sha256 else f"sha256 is {sha256}, {listed.sha256} is listed"
    # git's own object hash; repositories in git's newer object format use SHA-256 for it
    digest = hashlib.sha1(usedforsecurity=False) if len(listed.sha1) == 40 else hashlib.sha256()
    digest.update(b"blob %d\0" % size)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    return sha256, "" if found == listed.sha1 else f"git hash is {found}, {listed.sha1} is listed"


def _download(session: _Session, listing: Listing, name: str, *, again: bool) -> Path:
    from huggingface_hub import hf_hub_download  # noqa: PLC0415

    options: dict[str, Any] = {"revision": listing.commit, "endpoint": session.endpoint, "force_download": again}
    if session.offline:
        options["local_files_only"] = True
    options |= {"tqdm_class": _bar(session.ticker), "repo_type": session.kind}
    call = functools.partial(hf_hub_download, session.repo, name, library_name="weightsmith", **options)
    return Path(_calling(session, listing.commit, name, call))


def _bar(ticker: Ticker | None) -> type:
    """huggingface_hub's own progress bar class, silent, counting on ours."""
    from huggingface_hub.utils import tqdm  # noqa: PLC0415

    class Counting(tqdm):  # type: ignore[misc]
        """Shows nothing itself."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if ticker is not None and n:
                ticker.update(int(n))

    return Counting


def _calling(session: _Session, revision: str, name: str | None, call: Callable[[], T]) -> T:
    """Run `call`, trying again what may pass by itself; raise what went wrong in our words."""
    for wait in (*WAITS, None):
        try:
            return call()
        except connection_errors() as error:
            if wait is None or session.offline or not is_passing(error):
                raise explain(
                    error, repo=session.repo, revision=revision, name=name, offline=session.offline
                ) from error
            log.warning("%s: %s; trying again in %.0f s", session.where, type(error).__name__, wait)
            time.sleep(wait)
    raise AssertionError("unreachable")
