"""Why a job has to run: what its result would be made from, held against what the entry that is there was made from.

A result is named by its derivation: the digest of its parent's bytes, the recipe (with the digest of the calibration
text or imatrix), the version of the arithmetic and of weightsmith. Equal derivations need no second run, whoever made
the first one: what `quantize` put into the catalog by hand counts. The key of a derivation is the SHA-256 of all that.

A pulled model is held against its registry entry: repository and commit, package and pin, URL and pin. A folder or file
on disk has no commit; the names, sizes and times of its files are noted when it is taken in, and compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightsmith._version import __version__
from weightsmith.atomic import write_text
from weightsmith.builds.plan import Job
from weightsmith.catalog import Catalog
from weightsmith.errors import WeightsmithError
from weightsmith.formats import imatrix
from weightsmith.jobs import Options
from weightsmith.quant import ARITHMETIC_VERSION
from weightsmith.sources.registry import RegistryEntry
from weightsmith.sources.source import COMMIT, bare_url, parse
from weightsmith.store import Entry

MAX_FILES = 10_000
_PLAIN = {"effort": "normal"}  # what a recipe means that does not say it


def derivation(job: Job, options: Options, parent: Entry) -> dict[str, Any]:
    """What the result of `job` is made from, as plain values. options: with the calibration text. Reads the imatrix."""
    found: dict[str, Any] = {"source": parent.digest, "target": str(job.target), **options.record()}
    if options.imatrix is not None:
        found["imatrix"] = f"sha256:{imatrix.read(options.imatrix).digest()}"
    found |= {"arithmetic": str(ARITHMETIC_VERSION), "version": __version__}
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def key_of(derivation: Mapping[str, Any]) -> str:
    """The SHA-256 that names a derivation."""
    return hashlib.sha256(json.dumps(derivation, sort_keys=True).encode()).hexdigest()


def changes(wanted: Mapping[str, Any], entry: Entry, *, any_version: bool) -> list[str]:
    """Why `entry` is not what `wanted` would make, one phrase for each difference; empty if it is."""
    found = {"source": entry.parent, **(entry.recipe or {})}
    found.pop("tool", None)
    if "calibration" in wanted:
        found.pop("imatrix", None)  # measured on that text, so not known beforehand
    if any_version:
        found["version"] = wanted["version"]
    said = []
    for name in sorted(wanted.keys() | found.keys()):
        before, after = found.get(name), wanted.get(name)
        if before != after:
            said.append(_phrase(name, before, after))
    return said


def _phrase(name: str, before: Any, after: Any) -> str:
    if name == "source":
        return f"source changed: {_short(before)} -> {_short(after)}"
    if name == "arithmetic":
        return f"arithmetic version {before} -> {after}"
    if name == "version":
        return f"weightsmith {before} -> {after}"
    if name == "imatrix":
        return f"imatrix changed: {_short(before)} -> {_short(after)}"
    if isinstance(before, dict) and isinstance(after, dict):
        inside = [
            f"{key} {_short(before.get(key))} -> {_short(after.get(key))}"
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key)
        ]
        return f"recipe changed: {name} {', '.join(inside)}"
    plain = _PLAIN.get(name)
    return f"recipe changed: {name} {_short(before or plain)} -> {_short(after or plain)}"


def _short(value: Any) -> str:
    """Digests cut to what tells them apart; what is absent is "none"."""
    if value is None:
        return "none"
    if isinstance(value, str):
        bare = value.removeprefix("sha256:")
        return bare[:12] if len(bare) == 64 else value
    return (
        json.dumps(value)
        if not isinstance(value, dict)
        else f"({', '.join(f'{k} {_short(v)}' for k, v in value.items())})"
    )


def damage(entry: Entry) -> str | None:
    """What is wrong with the files of `entry` at a glance (gone, or of another size); contents are not read."""
    for file in entry.files:
        try:
            found = (entry.folder / file.path).lstat().st_size
        except OSError:
            return f"{file.path} is gone"
        if found != file.size:
            return f"{file.path} has {found} bytes, not {file.size}"
    return None


def source_changes(entry: Entry, wanted: RegistryEntry, catalog: Catalog) -> list[str]:
    """Why the pulled `entry` is not what the registry names now; empty if it is."""
    source, origin = parse(wanted.source), entry.origin
    pairs: list[tuple[str, Any, Any]] = []
    if source.kind == "hf":
        pairs.append(("repository", origin.get("repo"), source.target))
        commit = wanted.revision or source.revision
        if commit is not None and COMMIT.fullmatch(commit):
            pairs.append(("commit", origin.get("commit"), commit))
        elif commit is not None:
            pairs.append(("revision", origin.get("revision"), commit))
    elif source.kind == "pypi":
        pairs.append(("package", origin.get("package"), source.target))
        if source.revision is not None:
            pairs.append(("version", origin.get("version"), source.revision))
        if wanted.sha256 or source.sha256:
            pairs.append(("sha256", origin.get("wheel_sha256"), wanted.sha256 or source.sha256))
    elif source.kind == "url":
        pairs.append(("URL", origin.get("url"), bare_url(source.target)))
        if wanted.sha256 or source.sha256:
            pairs.append(("sha256", entry.files[0].sha256, wanted.sha256 or source.sha256))
    else:
        pairs.append(("path", origin.get("path"), str(Path(source.target).resolve())))
        if _seen(catalog, entry) not in (None, signature(Path(source.target))):
            return ["source changed: other files, sizes or times"]
    return [f"source changed: {what} {_short(a)} -> {_short(b)}" for what, a, b in pairs if a != b]


def signature(path: Path) -> str | None:
    """Names, sizes and times of the files at `path`, as one hash; None if there is nothing."""
    root = path if path.is_dir() else path.parent
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    if len(files) > MAX_FILES:
        raise WeightsmithError(f"more than {MAX_FILES} files", path=path, hint="A checkpoint's own folder is meant.")
    if not path.exists():
        return None
    told = [(str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def note_signature(catalog: Catalog, entry: Entry, signed: str | None) -> None:
    """Remember what `entry` was taken in from, to be held against what lies there in later runs."""
    folder = catalog.home / "builds" / "seen"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{entry.name}.json", json.dumps({"digest": entry.digest, "signature": signed}) + "\n")


def _seen(catalog: Catalog, entry: Entry) -> str | None:
    """The noted signature of the files that `entry` came from; None if it was pulled by hand."""
    try:
        noted = json.loads((catalog.home / "builds" / "seen" / f"{entry.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return noted.get("signature") if isinstance(noted, dict) and noted.get("digest") == entry.digest else None
