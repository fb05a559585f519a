"""huggingface_hub's cache: what was pulled from a commit, where `from_pretrained` finds it without a download.

    CACHE/models--ORG--NAME/blobs/ETAG                    bytes; ETAG is SHA-256 of large files, git's hash of others
    CACHE/models--ORG--NAME/snapshots/COMMIT/PATH         a symbolic link to its blob
    CACHE/models--ORG--NAME/refs/BRANCH                   the commit that the branch was when it was pulled

CACHE is $HF_HUB_CACHE, $HUGGINGFACE_HUB_CACHE, $HF_HOME/hub, $XDG_CACHE_HOME/huggingface/hub or
~/.cache/huggingface/hub (huggingface_hub/constants.py). CACHE/blobs, which all repositories share since version 2, is
never touched.

Programs trust what lies here under an organisation's name, so only files that this machine itself saw listed by the hub
for that commit go in (HOME/hub, see sources/listing.py): a record, which may have come from somebody's bundle, is not
enough. Symbolic links into the catalog are refused: `hf cache rm` removes what they lead to.
"""

from __future__ import annotations

import os
from pathlib import Path

from weightsmith.catalog import Catalog
from weightsmith.errors import IntegrityError, NotFoundError, UsageError
from weightsmith.links.place import Plan, Way, Wish
from weightsmith.sources.listing import Listing, prove, remembered
from weightsmith.sources.source import COMMIT, check_repo, check_revision
from weightsmith.store import Entry, File


def plan(catalog: Catalog, entry: Entry, root: Path | None, *, name: str | None, way: Way) -> Plan:
    """Blobs, snapshot and branch of the commit that `entry` was pulled from, in the cache `root`."""
    repo, commit = str(entry.origin.get("repo")), str(entry.origin.get("commit"))
    if entry.origin.get("kind") != "hf" or entry.parent is not None or not COMMIT.fullmatch(commit):
        hint = "Only what was pulled from a hub commit has a place in its cache; --into FOLDER takes anything."
        raise UsageError(f"{entry.ref} did not come from a hub commit", hint=hint)
    if name is not None or way == "symlink":
        what = "--symlink" if name is None else "--as"
        hint = "Names there are the hub's, and `hf cache rm` removes what a blob leads to."
        raise UsageError(f"{what} does not go with --into hf", hint=hint)
    check_repo(repo, entry.ref)
    base = (root or cache()).expanduser().absolute()
    folder = base / f"models--{repo.replace('/', '--')}"
    listing = _listed(catalog, repo, commit)
    wishes = []
    for file, place in _places(entry, listing).items():
        blob = folder / "blobs" / (listing.files[place].sha256 or listing.files[place].sha1)
        pointer = folder / "snapshots" / commit / place
        wishes.append(Wish(blob, entry.folder / file.path, file))
        wishes.append(Wish(pointer, to=os.path.relpath(blob, pointer.parent)))
    ref, notes = _ref(folder, entry, commit)
    undo = f"hf cache rm {commit}" if root is None else f"rm -r {folder}"
    return Plan(base, f"{repo}@{commit}", [*wishes, *ref], undo, notes)


def cache() -> Path:
    """Where huggingface_hub keeps what it downloads."""
    for word in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(word):
            return Path(os.path.expandvars(os.environ[word]))
    if os.environ.get("HF_HOME"):
        return Path(os.path.expandvars(os.environ["HF_HOME"])) / "hub"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expandvars(base)) / "huggingface" / "hub"


def _listed(catalog: Catalog, repo: str, commit: str) -> Listing:
    folder = catalog.home / "hub" / f"models--{repo.replace('/', '--')}"
    try:
        return remembered(folder, repo, commit, where=f"hf://{repo}")
    except NotFoundError as error:
        raise NotFoundError(
            f"this machine never saw the hub's listing of {commit}",
            path=f"hf://{repo}",
            hint="So it cannot be proved to be what the hub has under that name. With a network, pull it once, which "
            f"downloads nothing that is here: weightsmith pull hf://{repo}@{commit} --tag checked",
        ) from error


def _places(entry: Entry, listing: Listing) -> dict[File, str]:
    """Where each file lies in the repository: a pull leaves out the folder that all its files share."""
    first = min(entry.files, key=lambda file: file.path)
    for name in sorted(listing.files):
        if name != first.path and not name.endswith(f"/{first.path}"):
            continue
        lead = name.removesuffix(first.path)
        places = {file: f"{lead}{file.path}" for file in entry.files}
        if all(_is_listed(entry, file, listing, place) for file, place in places.items()):
            return places
    raise IntegrityError(f"its files are not those of commit {listing.commit}", path=entry.folder)


def _is_listed(entry: Entry, file: File, listing: Listing, place: str) -> bool:
    listed = listing.files.get(place)
    if listed is None or listed.size != file.size:
        return False
    return file.sha256 == listed.sha256 if listed.sha256 else not prove(entry.folder / file.path, listed)[1]


def _ref(folder: Path, entry: Entry, commit: str) -> tuple[list[Wish], list[str]]:
    """The branch, unless the cache knows it as another commit already: that is the other program's to say."""
    revision = str(entry.origin.get("revision") or "")
    if not revision or COMMIT.fullmatch(revision):
        return [], []
    path = folder / "refs" / check_revision(revision, entry.ref)
    if path.is_file() and path.read_text(encoding="utf-8", errors="replace").strip() != commit:
        return [], [f"{revision} is another commit in this cache and stays that; ask for revision={commit!r}."]
    return [Wish(path, text=commit.encode())] if not path.is_file() else [], []
