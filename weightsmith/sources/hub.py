"""Hugging Face hub: one commit of one repository, every file proved against the hub's own listing.

1. The revision is resolved to a commit; everything after asks for that commit, so a moving branch cannot mix files.
2. The tree of the commit is listed (see listing.py). `choose` picks the checkpoint out of it; an index may only name
   files of this listing.
3. A file that is on this machine already is linked or copied and hashed: from the catalog, from a run that did not
   finish, from huggingface_hub's cache. Any other is downloaded in chunks (download.py) from the commit's plain address
   (`resolve`), which every mirror serves; where the hub redirects from there (signed, to its content servers), no token
   goes. Bytes with another hash than the listed one are fetched anew once, then refused.

A dataset (`fetch_dataset`) goes the same way, one file of it, and stays below HOME/hub.

Listing, addresses and the token are huggingface_hub's affair. The token is sent to the endpoint alone and written
nowhere. The library is imported here, in hub_errors.py and in push/remote.py alone.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from weightsmith.atomic import need_space
from weightsmith.errors import (
    AccessError,
    IntegrityError,
    NotFoundError,
    UnsafeInputError,
    UsageError,
    WeightsmithError,
)
from weightsmith.progress import Ticker, progress
from weightsmith.sizes import spelled
from weightsmith.sources import choose, download, keep, pins
from weightsmith.sources.hub_errors import connection_errors, explain, explain_refusal, is_passing
from weightsmith.sources.listing import Listed, Listing, born, checked, prove, remember, remembered
from weightsmith.sources.shelf import Shelf
from weightsmith.sources.source import COMMIT, Fetched, FetchedFile, Source, bare_url, check_revision, check_url
from weightsmith.store import take_in

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_FILES = 100_000
MAX_INDEX = 64 << 20
MAX_WORD = 200
TIMEOUT = 30.0


@dataclass(frozen=True, slots=True)
class _Session:
    """Where to ask and how. offline: only what this machine holds. kind: "model" or "dataset"."""

    endpoint: str
    repo: str
    home: Path
    offline: bool
    ticker: Ticker | None = None
    kind: str = "model"
    shelf: Shelf = field(default_factory=Shelf)

    @property
    def where(self) -> str:
        return f"hf://{'datasets/' if self.kind == 'dataset' else ''}{self.repo}"

    @property
    def folder(self) -> Path:
        """Where listings of this repository are kept."""
        return self.home / "hub" / f"{self.kind}s--{self.repo.replace('/', '--')}"


def fetch(
    source: Source,
    into: Path,
    *,
    home: Path,
    revision: str | None = None,
    include: Sequence[str] = (),
    offline: bool = False,
    allow_pickle: bool = False,
) -> Fetched:
    """Fetch the checkpoint in `source` (kind "hf") into folder `into`; `home` is the catalog's folder.

    Raises NotFoundError and AccessError (exit code 7, told apart), IntegrityError (a hash differs), UnsafeInputError
    (only pickles, hostile names), UsageError, and WeightsmithError when the network failed and a further run may do.
    """
    wanted = check_revision(revision or source.revision or "main", source.text)
    session = _Session(endpoint(), source.target, home, offline or offline_mode(), shelf=Shelf(home))
    listing = _listing(session, wanted)
    names = choose.select(listing.files, include=include, where=session.where, allow_pickle=allow_pickle)
    done: dict[str, FetchedFile] = {}
    index = None if include else choose.index_in(names)
    if index is not None:
        names, done[index] = _follow_index(session, listing, names, index, into)
    places = choose.placed(names)
    if source.files is not None:
        plan = {places[name]: (listing.files[name].size, listing.files[name].sha256) for name in names}
        pins.check(source.files, plan, where=f"{session.where}@{listing.commit}")
    total = sum(listing.files[name].size for name in names)
    log.info("%s at %s: %d files, %s", session.where, listing.commit[:12], len(names), spelled(total))
    if not session.offline:
        need_space(into, _to_come(session, listing, [name for name in names if name not in done]))
    with progress(f"pull {source.target}", total) as ticker:
        running = replace(session, ticker=ticker)
        for name in names:
            if name not in done:
                done[name] = _take(running, listing, name, into / places[name], places[name])
    origin: dict[str, Any] = {"kind": "hf", "source": f"hf://{listing.repo}@{listing.commit}", "repo": listing.repo}
    origin |= {"commit": listing.commit, "revision": wanted, "endpoint": bare_url(session.endpoint)}
    origin |= {"licence": listing.licence, "gated": listing.gated, "created": listing.created}
    origin |= {"author": listing.author, "repository": listing.repository, "answers": listing.answers}
    kept = tuple(keep.folder_of(home, listing.files[name].identity) for name in names)
    return Fetched(into, tuple(done[name] for name in names), origin, kept)


def fetch_dataset(
    repo: str, pick: Callable[[Iterable[str]], str], *, home: Path, revision: str | None = None, offline: bool = False
) -> tuple[Path, str]:
    """One file of dataset `repo`, verified, below HOME/hub, and what it is by commit ("hf://datasets/...").

    pick: chooses the file from the names of the commit. Raises what `fetch` raises.
    """
    wanted = revision or "main"
    session = _Session(endpoint(), repo, home, offline or offline_mode(), kind="dataset")
    listing = _listing(session, wanted)
    name = pick(listing.files)
    (choice,) = choose.check_all([name], where=session.where)
    listed = listing.files[choice]
    path = session.folder / "files" / listed.identity / choice.rpartition("/")[2]
    if not path.is_file() or prove(path, listed)[1]:
        with progress(f"pull {name}", listed.size) as ticker:
            _take(replace(session, ticker=ticker), listing, choice, path, choice)
        keep.drop([keep.folder_of(home, listed.identity)])
    return path, f"{session.where}@{listing.commit}/{name}"


def look(repo: str, revision: str, *, home: Path) -> Listing:
    """What the commit is that `revision` of `repo` stands for now, and whose; nothing is fetched or kept.

    Raises what `fetch` raises, NotFoundError without a network that may be asked.
    """
    session = _Session(endpoint(), repo, home, offline_mode())
    if session.offline:
        hint = "Unset HF_HUB_OFFLINE; what was pulled is not touched."
        raise NotFoundError(f"offline: nobody says where {revision!r} points now", path=session.where, hint=hint)
    return _ask(session, check_revision(revision, session.where))


def look_back(repo: str, commit: str, *, home: Path) -> Listing | None:
    """The listing of a commit as kept since it was pulled, else as the hub has it; None where it is gone."""
    session = _Session(endpoint(), repo, home, offline_mode())
    try:
        return remembered(session.folder, repo, commit, where=session.where)
    except (NotFoundError, IntegrityError):
        log.debug("no listing of %s at %s is kept here", session.where, commit)
    try:
        return None if session.offline else _ask(session, commit)
    except (NotFoundError, AccessError):
        return None


def warn_of_redirect(listing: Listing, where: str) -> None:
    """Say so if the repository that was asked for at `where` answers under another name."""
    if listing.answers is not None:
        log.warning("%s now answers as %s; check that it is still who you mean", where, listing.answers)


def point(listing: Listing, revision: str, *, home: Path) -> None:
    """Keep that `revision` is the commit of `listing`, for `--offline`."""
    remember(_Session(endpoint(), listing.repo, home, offline=True).folder, listing, revision)


def _listing(session: _Session, revision: str) -> Listing:
    """The files of the revision's commit: asked for and kept, or offline as kept."""
    if session.offline:
        return remembered(session.folder, session.repo, revision, where=session.where)
    listing = _ask(session, revision)
    warn_of_redirect(listing, session.where)
    if listing.created is not None and (before := born(session.folder) - {listing.created}):
        log.warning(
            "%s was made on %s; what was pulled from there before, on %s. The name has been taken anew: "
            "check that it is still who you mean",
            session.where,
            listing.created[:10],
            min(before)[:10],
        )
    remember(session.folder, listing, revision)
    return listing


def endpoint() -> str:
    """The hub's address. A token may travel with every request, so plain http is for this machine only."""
    address = os.environ.get("HF_ENDPOINT", "").strip() or "https://huggingface.co"
    try:
        check_url(address)
    except WeightsmithError as error:
        raise UsageError(f"HF_ENDPOINT cannot be used: {error.message}", path=error.path, hint=error.hint) from error
    return address.rstrip("/")


def offline_mode() -> bool:
    """Whether the environment forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _ask(session: _Session, revision: str) -> Listing:
    from huggingface_hub import HfApi  # noqa: PLC0415  (the catalog's verbs start without it)

    api = HfApi(endpoint=session.endpoint, library_name="weightsmith")
    about = api.dataset_info if session.kind == "dataset" else api.model_info
    info = _calling(session, revision, lambda: about(session.repo, revision=revision, timeout=TIMEOUT))
    commit = str(info.sha or "")
    if not COMMIT.fullmatch(commit):
        raise IntegrityError(f"the hub names no commit for {revision!r}", path=session.where)
    if COMMIT.fullmatch(revision) and commit != revision:
        raise IntegrityError(f"commit {revision} was asked for, {commit} was offered", path=session.where)

    def tree() -> list[Any]:
        found = api.list_repo_tree(session.repo, revision=commit, recursive=True, repo_type=session.kind)
        return list(islice(found, MAX_FILES + 1))

    entries = _calling(session, commit, tree)
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
        created=info.created_at.isoformat() if info.created_at else None,
        author=_word(info.author),
        repository=_word(vars(info).get("_id")),
        answers=_word(info.id) if info.id != session.repo else None,
    )


def _word(value: object) -> str | None:
    """A short printable text that the hub says, None for anything else."""
    return value if isinstance(value, str) and 0 < len(value) <= MAX_WORD and value.isprintable() else None


def _listed(entry: Any, session: _Session) -> Listed:
    lfs = entry.lfs
    size, sha256 = (lfs.size, lfs.sha256) if lfs else (entry.size, None)
    return checked(entry.path, {"size": size, "sha256": sha256, "sha1": entry.blob_id}, session.where)


def _follow_index(
    session: _Session, listing: Listing, names: list[str], name: str, into: Path
) -> tuple[list[str], FetchedFile]:
    """The files to take when the index `name` says which shards there are, all of them listed; and the index, taken."""
    if listing.files[name].size > MAX_INDEX:
        raise UnsafeInputError(f"{name} is larger than {MAX_INDEX >> 20} MiB", path=session.where)
    taken = _take(session, listing, name, into / name, name)
    try:
        index = json.loads((into / name).read_bytes())
    except (ValueError, RecursionError) as error:
        raise IntegrityError("not JSON", path=f"{session.where}/{name}") from error
    suffix = choose.suffix_of(name)
    shards = choose.shards_of(index, suffix=suffix, where=f"{session.where}/{name}")
    missing = [shard for shard in shards if shard not in listing.files]
    if missing:
        raise IntegrityError(
            f"{name} names {missing[0]}, which the commit does not hold",
            path=session.where,
            hint="The repository is incomplete; try another revision.",
        )
    kept = [one for one in names if not one.endswith(suffix)]
    return choose.check_all(sorted({*kept, *shards}), where=session.where), taken


def _take(session: _Session, listing: Listing, name: str, target: Path, place: str) -> FetchedFile:
    """Bring one file to `target`, verified: from this machine if it is there, else from the hub."""
    listed, where, wrong = listing.files[name], f"{session.where}/{name}", ""
    target.unlink(missing_ok=True)
    with keep.held(session.home, listed.identity) as folder:
        for known in _known(session, listing, name, folder):
            take_in(known, target, own=known.is_relative_to(session.home))
            sha256, wrong = prove(target, listed, session.ticker)
            if not wrong:
                return FetchedFile(place, listed.size, sha256)
            target.unlink()
            log.warning("%s is not what %s should be: %s", known, where, wrong)
        if session.offline:
            if wrong:
                raise IntegrityError(wrong, path=where, hint="The copy here is damaged. Pull without --offline.")
            hint = "Pull it once without --offline and HF_HUB_OFFLINE."
            raise NotFoundError("offline, and not on this machine", path=where, hint=hint)
        remote = _remote(session, listing, name)
        for again in (False, True):
            arrived, wrong = keep.bring(
                folder, remote, lambda it: listed.fault(it.size, it.sha256, it.git), session.ticker
            )
            if not wrong:
                take_in(keep.finished(folder), target)
                return FetchedFile(place, listed.size, arrived.sha256)
            if not again:
                log.warning("%s: %s; fetching it again", where, wrong)
    hint = "The server or something between delivers other bytes than it lists. Nothing was kept."
    raise IntegrityError(wrong, path=where, hint=hint)


def _known(session: _Session, listing: Listing, name: str, folder: Path) -> Iterator[Path]:
    """Places on this machine that may hold the file, to be proved."""
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415

    listed = listing.files[name]
    if keep.finished(folder).is_file():
        yield keep.finished(folder)
        keep.finished(folder).unlink(missing_ok=True)  # asked for more: it was not what it should be
    yield from session.shelf.holding(listed, name.rpartition("/")[2])
    cached = try_to_load_from_cache(session.repo, name, revision=listing.commit, repo_type=session.kind)
    if isinstance(cached, str) and Path(cached).is_file():
        yield Path(cached)


def _to_come(session: _Session, listing: Listing, names: Sequence[str]) -> int:
    """Bytes that the download of `names` will take on disk: a full disk is better known now than at the last shard."""
    total = 0
    for name in names:
        folder = keep.folder_of(session.home, listing.files[name].identity)
        if next(_known(session, listing, name, folder), None) is None:
            total += max(0, listing.files[name].size - keep.kept_bytes(folder))
    return total


def _remote(session: _Session, listing: Listing, name: str) -> download.Remote:
    from huggingface_hub import hf_hub_url  # noqa: PLC0415
    from huggingface_hub.utils import build_hf_headers  # noqa: PLC0415

    listed, options = listing.files[name], {"revision": listing.commit, "endpoint": session.endpoint}
    token = {key: value for key, value in build_hf_headers().items() if key.lower() == "authorization"}
    where = f"{session.where}/{name}"
    return download.Remote(
        url=hf_hub_url(session.repo, name, repo_type=session.kind, **options),
        where=where,
        size=listed.size,
        identity=listed.identity,
        secret=token,
        refuse=lambda refusal: explain_refusal(refusal, repo=session.repo, revision=listing.commit, where=where),
        git=listed.git,
    )


def _calling(session: _Session, revision: str, call: Callable[[], T]) -> T:
    """Run `call`, trying again what may pass by itself; raise what went wrong in our words."""
    for wait in (*download.WAITS, None):
        try:
            return call()
        except connection_errors() as error:
            if wait is None or session.offline or not is_passing(error):
                raise explain(error, repo=session.repo, revision=revision, where=session.where) from error
            log.warning("%s: %s; trying again in %.0f s", session.where, type(error).__name__, wait)
            time.sleep(wait)
    raise AssertionError("unreachable")
