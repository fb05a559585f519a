"""The catalog: what models there are, where each came from, and how each was made.

    HOME/models/NAME/TAG/     one checkpoint: its files, and weightsmith.json, the record (see store.py)
    HOME/blobs/, index.json   the same as an OCI image layout, written from the records (see oci/)
    HOME/models/.index        what `list` needs of all records (see index.py); made anew when it is gone

The record lies inside the folder, so one rename makes files and record appear together. `parent` is the digest of what
an entry was made from and `recipe` how (tool, version, parameters, no paths, no times); following parents leads to the
original, whose `origin` says where it was pulled from. The licence is inherited on that way.

Writing is under the lock HOME/models/.lock. Reading takes no lock: entries appear and vanish by rename.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from weightsmith import index, inventory, oci, store
from weightsmith._version import __version__
from weightsmith.atomic import disk_errors, make_folder, sync_folder, write_text
from weightsmith.errors import (
    IntegrityError,
    NotFoundError,
    OutputExistsError,
    ResourceError,
    UnsafeInputError,
    UsageError,
    WeightsmithError,
)
from weightsmith.index import Summary
from weightsmith.progress import progress
from weightsmith.safename import check_name
from weightsmith.store import RECORD, Entry, File, digest_of, read_record, record_text
from weightsmith.suggest import did_you_mean

if TYPE_CHECKING:
    from weightsmith.types import Reader

__all__ = ["Catalog", "Entry", "File", "Removed", "Reservation", "Summary", "tag_for"]

log = logging.getLogger(__name__)

ORIGINAL = "original"


@dataclass(frozen=True, slots=True)
class Removed:
    """What `remove` took away, and the bytes that became free (none for files that others still hold)."""

    ref: str
    freed: int


def check_word(word: str, what: str) -> str:
    """Return `word` if it can be a catalog name or tag, else raise UsageError."""
    if not inventory.WORD.fullmatch(word):
        hint = "Small letters, digits, dots, dashes and underscores, at most 96, the first a letter or digit."
        raise UsageError(f"{word!r} cannot be a {what}", hint=hint)
    try:
        check_name(word)
    except UnsafeInputError as error:
        raise UsageError(f"{word!r} cannot be a {what}: {error.message}") from error
    return word


def tag_for(kind: str) -> str:
    """The tag of a derived checkpoint: its type in the catalog's alphabet (Q4_K_M -> q4_k_m)."""
    return check_word(re.sub(r"[^a-z0-9._-]+", "-", kind.lower()).strip("-._"), "tag")


class Catalog:
    """The models below one home folder (None: the default, $WEIGHTSMITH_HOME)."""

    def __init__(self, home: Path | None = None) -> None:
        self.home = store.home() if home is None else home
        self.models = self.home / "models"

    def entries(self, name: str | None = None) -> list[Entry]:
        """Every entry (of the model `name`), by name and tag. A damaged record is warned about and left out."""
        entries, faults = inventory.read_all(self.models, name)
        for error in faults:
            log.warning("%s", error)
        return entries

    def summaries(self) -> list[Summary]:
        """Every entry in short, as `entries`, from the index where that is as new as the record."""
        kept, models = index.load(self.models), str(self.models)
        found: list[tuple[index.Stamp, Summary]] = []
        fresh = 0
        for name, tag, status in inventory.records(self.models):
            stamp = index.stamp_of(status)
            known = kept.get((name, tag))
            if known is not None and known[0] == stamp:
                found.append((stamp, Summary(models, *known[1])))
                continue
            fresh += 1
            try:
                found.append((stamp, index.summary_of(read_record(self.models / name / tag))))
            except IntegrityError as error:
                if (self.models / name / tag / RECORD).is_file():  # else it was removed since we saw it
                    log.warning("%s", error)
        if fresh or len(kept) > len(found):
            index.save(self.models, found)
        return [summary for _, summary in found]

    def get(self, ref: str) -> Entry:
        """The entry `name[:tag]`. Without a tag: the only one, else "original".

        Raises NotFoundError (with near names), UsageError (several tags, none "original"), IntegrityError (record).
        """
        name, tag = self.split(ref)
        tags = self.tags(name)
        if not tags:
            names = {name for name, _, _ in inventory.records(self.models)}
            hint = did_you_mean(name, names) or "`weightsmith list` shows what there is."
            raise NotFoundError(f"no model {name!r} in the catalog", hint=hint)
        if tag is None:
            tag = tags[0] if len(tags) == 1 else ORIGINAL
            if tag not in tags:
                raise UsageError(f"{name} has several tags: {', '.join(tags)}", hint=f"Say which, as {name}:{tags[0]}.")
        elif tag not in tags:
            raise NotFoundError(f"{name} has no tag {tag!r}", hint=f"It has: {', '.join(tags)}.")
        return read_record(self.models / name / tag)

    def has(self, name: str, tag: str) -> bool:
        """Whether `name:tag` is taken, by a sound entry or a damaged one."""
        return (self.models / check_word(name, "name") / check_word(tag, "tag") / RECORD).is_file()

    def tags(self, name: str) -> list[str]:
        """The tags that `name` has, sorted; empty for an unknown name."""
        return [folder.name for folder in inventory.folders(self.models, check_word(name, "name"))]

    def path(self, ref: str) -> Path:
        """What to open for `ref`: the GGUF file (the first of its splits), else the folder."""
        return self.get(ref).path

    def add(self, name: str, tag: str, prepared: Path, *, overwrite: bool = False, **record: Any) -> Entry:
        """Take the finished file or folder `prepared` in as `name:tag`, by link where possible; it stays where it is.

        record: what `Reservation.commit` takes. Raises as that does, and UnsafeInputError for a link out of the folder.
        """
        with self.reserve(name, tag) as reservation:
            if not prepared.exists():
                raise NotFoundError("no such file or folder", path=prepared)
            root = prepared if prepared.is_dir() else prepared.parent
            inside = (
                sorted(path for path in prepared.rglob("*") if not path.is_dir()) if root == prepared else [prepared]
            )
            for path in inside:
                relative = check_name(path.relative_to(root).as_posix(), path=prepared)
                if root == prepared and not path.resolve().is_relative_to(root.resolve()):
                    raise UnsafeInputError(f"{str(relative)!r} is a link that leaves the folder", path=prepared)
                if str(relative) != RECORD:
                    store.take_in(path, reservation.folder / relative)
            return reservation.commit(overwrite=overwrite, **record)

    def reserve(self, name: str, tag: str) -> Reservation:
        """A staging folder for the checkpoint that will be `name:tag`; raises UsageError for what can be no name."""
        return Reservation(self, check_word(name, "name"), check_word(tag, "tag"))

    def remove(self, ref: str, *, force: bool = False) -> Removed:
        """Remove the entry `ref` and its files. Files that the user has elsewhere stay there.

        With `force` also a damaged entry, named with its tag. Raises UsageError if another entry was made from this
        one and no entry of the same bytes could stand in (unless `force`).
        """
        with store.locked(self.models / ".lock"):
            name, tag = self.split(ref)
            if not (force and tag is not None and self.has(name, tag)):
                entry = self.get(ref)
                tag = entry.tag
                self._refuse_orphans(entry, force=force)
            oci.begin(self.home)
            gone = [entry for entry in inventory.read_all(self.models, name)[0] if entry.tag == tag]
            blobs = oci.exclusive(self.home, gone[0], but={gone[0].ref}) if gone else []
            folder = self.models / name / str(tag)
            freed = store.freed_bytes([*folder.rglob("*"), *blobs])
            self._take_away(folder, blobs)
        return Removed(f"{name}:{tag}", freed)

    def _take_away(self, folder: Path, blobs: list[Path]) -> None:
        """First nobody sees the entry, then the index does not name it, then its blobs go."""
        gone = folder.with_name(f".{folder.name}.gone")
        with disk_errors(folder):
            os.replace(folder, gone)
            sync_folder(folder.parent)
            shutil.rmtree(gone)
            if not any(child.is_dir() for child in folder.parent.iterdir()):
                shutil.rmtree(folder.parent)
        ref = f"{folder.parent.name}:{folder.name}"
        with contextlib.suppress(ResourceError):  # on a full disk the index must wait until bytes are free
            oci.refresh(self.home, ref)
        oci.drop(self.home, blobs)
        oci.refresh(self.home, ref)
        oci.done(self.home)

    def lineage(self, ref: str) -> list[Entry]:
        """The entry `ref`, what it was made from, and so on to the original.

        Ends early where a parent is not in the catalog any more: the last entry's `parent` then is not None.
        """
        # Of two entries with the same bytes the alias comes first, so that the other one is the one that stays known.
        by_rank = sorted(self.summaries(), key=lambda entry: entry.alias_of is None)
        chain, known = [self.get(ref)], {entry.digest: entry.ref for entry in by_rank}
        seen = {chain[0].ref}
        while (parent := known.get(chain[-1].parent or "")) is not None and parent not in seen:
            seen.add(parent)
            chain.append(self.get(parent))
        return chain

    def evaluated(self, ref: str, result: Mapping[str, Any]) -> Entry:
        """Append one evaluation (plain JSON values) to the record of `ref`; returns the entry as it is now."""
        with store.locked(self.models / ".lock"):
            entry = self.get(ref)
            changed = dataclasses.replace(entry, evaluations=(*entry.evaluations, dict(result)))
            write_text(entry.folder / RECORD, record_text(changed))
        return changed

    def split(self, ref: str) -> tuple[str, str | None]:
        """`name[:tag]` as name and tag; raises UsageError if it is neither."""
        name, mark, tag = ref.partition(":")
        return check_word(name, "name"), check_word(tag, "tag") if mark else None

    def _refuse_orphans(self, entry: Entry, *, force: bool) -> None:
        others = [other for other in self.summaries() if other.ref != entry.ref]
        children = [other.ref for other in others if other.parent == entry.digest]
        twin = any(other.digest == entry.digest for other in others)
        if children and not twin and not force:
            raise UsageError(
                f"{entry.ref} is what {', '.join(children)} came from",
                hint="They could not be checked or rebuilt without it. Remove them first, or pass --force.",
            )


class Reservation:
    """A staging folder that becomes `name:tag` by `commit`, or vanishes. A context manager; leaving it aborts.

    `folder` is empty, on the catalog's file system and seen by nobody. A killed process leaves it behind, and the next
    reservation sweeps it away.
    """

    def __init__(self, catalog: Catalog, name: str, tag: str) -> None:
        self.catalog, self.name, self.tag = catalog, name, tag
        self._staging = store.Staging(catalog.home)
        self.folder = self._staging.folder

    def commit(
        self,
        *,
        origin: Mapping[str, Any] | None = None,
        parent: Entry | None = None,
        recipe: Mapping[str, Any] | None = None,
        licence: str | None = None,
        type: str | None = None,
        hashes: Mapping[str, str] | None = None,
        overwrite: bool = False,
        allow_pickle: bool = False,
    ) -> Entry:
        """Open and hash what lies in `folder`, write the record, rename into place; returns the entry.

        origin, recipe: plain JSON values. parent: what it was made from; its licence is inherited unless `licence` or
        the origin gives one. type: of the weights, if another word than the most frequent codec. hashes: SHA-256 by
        relative path that are known already (from `sources.Fetched`). allow_pickle: pickled weights may be opened.
        Raises OutputExistsError if `name:tag` exists with other bytes (with the same bytes that entry is the result),
        and what opening a damaged or unknown container raises.
        """
        entry = self._entry(dict(origin or {}), parent, type, hashes or {}, allow_pickle)
        licence = licence or entry.origin.get("licence") or (parent.licence if parent else None)
        recipe = {"tool": "weightsmith", "version": __version__, **recipe} if recipe is not None else None
        return self._place(dataclasses.replace(entry, licence=licence, recipe=recipe), overwrite=overwrite)

    def link(self, entry: Entry) -> Entry:
        """Make `name:tag` an alias of `entry`: the same files by link, the same record; replaces what stood there."""
        for file in entry.files:
            store.take_in(entry.folder / file.path, self.folder / file.path, own=True)
        folder = self.catalog.models / self.name / self.tag
        alias = dataclasses.replace(entry, name=self.name, tag=self.tag, folder=folder, alias_of=entry.tag)
        return self._place(alias, overwrite=True)

    def examine(self, entry: Entry, *, allow_pickle: bool = False) -> None:
        """Open what lies in `folder` and hold it against the record `entry` of another machine.

        Raises IntegrityError if it is another container or has other files, and what opening it raises.
        """
        sizes = {
            file.path: file.size for file in _hashed(self.folder, {file.path: file.sha256 for file in entry.files})
        }
        container, _, template = _opened(self.folder, entry.files, allow_pickle=allow_pickle)
        if entry.chat_template is not None and template != entry.chat_template:
            raise IntegrityError(f"the chat template of {entry.ref} is not the one its record says", path=self.folder)
        if container != entry.container or sizes != {file.path: file.size for file in entry.files}:
            raise IntegrityError(f"{entry.ref} is not the {entry.container} that its record says", path=self.folder)

    def restore(self, entry: Entry, *, overwrite: bool = False) -> Entry:
        """Keep what lies in `folder`, verified by the caller, under the record `entry` that another machine made.

        Raises OutputExistsError as `commit`.
        """
        folder = self.catalog.models / self.name / self.tag
        mine = dataclasses.replace(entry, name=self.name, tag=self.tag, folder=folder)
        return self._place(mine, overwrite=overwrite)

    def _place(self, entry: Entry, *, overwrite: bool) -> Entry:
        write_text(self.folder / RECORD, record_text(entry))
        home, target, scratch = self.catalog.home, entry.folder, self._staging.base / "link"
        for file in entry.files:  # what lies here already is hashed before others have to wait for it
            with contextlib.suppress(oci.CannotLinkError):
                oci.adopt(home, self.folder / file.path, file, scratch)
        with store.locked(self.catalog.models / ".lock"), disk_errors(target):
            make_folder(target.parent)
            inventory.recover(target.parent)
            there = read_record(target) if (target / RECORD).is_file() and not overwrite else None
            if there is not None:
                if there.digest != entry.digest:
                    hint = "Remove it first, pass --force, or choose another tag."
                    raise OutputExistsError(f"{entry.ref} is already in the catalog", hint=hint)
                return there
            oci.begin(home)
            former = [old for old in inventory.read_all(self.catalog.models, self.name)[0] if old.tag == self.tag]
            with contextlib.suppress(oci.CannotLinkError):  # `refresh` tells
                oci.publish(home, self.folder, entry, scratch=scratch)
            _swap_in(self.folder, target)
            oci.refresh(home, entry.ref)
            if former:
                oci.drop(home, oci.exclusive(home, former[0]))
            oci.done(home)
        self._staging.release()
        return entry

    def abort(self) -> None:
        """Remove the staging folder; harmless after `commit`."""
        self._staging.release()

    def _entry(
        self,
        origin: dict[str, Any],
        parent: Entry | None,
        kind: str | None,
        hashes: Mapping[str, str],
        allow_pickle: bool,
    ) -> Entry:
        _hoist(self.folder)
        files = _hashed(self.folder, hashes)
        container, codec, template = _opened(self.folder, files, allow_pickle=allow_pickle)
        return Entry(
            name=self.name,
            tag=self.tag,
            folder=self.catalog.models / self.name / self.tag,
            container=container,
            type=kind or codec,
            files=files,
            digest=digest_of(files),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            origin=origin,
            parent=parent.digest if parent else None,
            parent_ref=parent.ref if parent else None,
            chat_template=template,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


def _hoist(folder: Path) -> None:
    """A writer that makes a folder left it inside the staging folder: move its files up."""
    inside = list(folder.iterdir())
    if len(inside) == 1 and inside[0].is_dir() and not inside[0].is_symlink():
        inner = inside[0].rename(folder.with_name("inner"))
        folder.rmdir()
        inner.rename(folder)


def _opened(folder: Path, files: tuple[File, ...], *, allow_pickle: bool) -> tuple[str, str, str | None]:
    """Container, most frequent codec (by weights) and chat template's hash of the checkpoint in `folder`."""
    from weightsmith.formats import open_reader  # noqa: PLC0415  (listing the catalog needs no container)

    ggufs = [file.path for file in files if file.path.endswith(".gguf")]
    reader = open_reader(folder / min(ggufs) if ggufs else folder, allow_pickle=allow_pickle)
    try:
        weights: dict[str, int] = {}
        for info in reader.native_infos().values():
            weights[info.codec] = weights.get(info.codec, 0) + info.n_weights
        return reader.container, max(weights, key=lambda codec: weights[codec], default=""), _template(reader)
    finally:
        reader.close()


def _template(reader: Reader) -> str | None:
    """The chat template's SHA-256; "" without one, None for one that cannot be read: no fault of the weights."""
    from weightsmith.formats.tokenizer.template import template_of, template_sha256  # noqa: PLC0415

    try:
        template = template_of(reader)
    except WeightsmithError as error:
        log.warning("the chat template is not recorded: %s", error)
        return None
    return template_sha256(template) if template is not None else ""


def _hashed(folder: Path, known: Mapping[str, str]) -> tuple[File, ...]:
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    if not paths:
        raise WeightsmithError("nothing was written to keep", path=folder)
    folded: dict[str, str] = {}
    for name, path in paths.items():
        check_name(name, path=folder)
        if folded.setdefault(name.casefold(), name) != name:
            other = folded[name.casefold()]
            raise UnsafeInputError(f"{name!r} and {other!r} are one name where case does not count", path=folder)
        if path.is_symlink() or not path.is_file() or name == RECORD:
            raise UnsafeInputError(f"{name!r} may not be part of a checkpoint", path=folder)
    sizes = {name: path.stat().st_size for name, path in sorted(paths.items())}
    if sizes.keys() <= known.keys():
        return tuple(File(name, size, known[name]) for name, size in sizes.items())
    with progress("hash", sum(size for name, size in sizes.items() if name not in known)) as ticker:
        return tuple(
            File(name, size, known.get(name) or store.sha256_file(paths[name], ticker)) for name, size in sizes.items()
        )


def _swap_in(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`. What stood there waits under a hidden name until the new one is in place."""
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        os.replace(target, old)
    os.replace(folder, target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)
