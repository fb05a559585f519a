"""Making an entry again from its parent, by the recorded recipe, to see whether the same bytes come out.

The parent is found by its digest and hashed first, so that a damaged parent is not taken for a wrong derivation. The
result goes into a staging folder, every file of it is hashed and held against the record and against what lies in the
catalog, and the folder is removed. Where a file differs, the first tensor that does is named.

What decides the bytes is in the record but for the calibration text and a given imatrix, of which it has the digests:
the caller brings those, and they are checked. What another arithmetic version made cannot be made again and is refused.
Weight-only results are the same on every machine and thread count. With a text to calibrate on the sums are torch's,
whose order belongs to its version and the machine's kernels: a difference there need not mean that anyone lied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weightsmith import formats, jobs, store
from weightsmith.calibrated import Calibration
from weightsmith.catalog import Catalog
from weightsmith.errors import IntegrityError, NotFoundError, UnsupportedError, UsageError, WeightsmithError
from weightsmith.formats import imatrix
from weightsmith.progress import progress
from weightsmith.quant import ARITHMETIC_VERSION
from weightsmith.store import Entry, File
from weightsmith.types import Reader, Recipe, TensorInfo

_PIECE = 8 << 20
_NOTED = {"tool", "version", "target", "arithmetic", "imatrix", "calibration"}
_OPTIONS = {"pre": str, "split_bytes": int, "effort": str, "keep_rest": bool}
_RECIPE = {"pure": bool, "output_type": str, "embedding_type": str}


@dataclass(frozen=True, slots=True)
class Brought:
    """What a record has only the digest of, and how to go about it. text: named as for `quantize --calibrate`, read."""

    calibration: Calibration | None = None
    imatrix: Path | None = None
    threads: int | None = None
    memory: int | None = None
    allow_pickle: bool = False


@dataclass(frozen=True, slots=True)
class Compared:
    """One file. recorded, stored, rebuilt: its SHA-256 in the record, on disk, made again; None where there is none.

    where: what differs first, for people; None in an equal file.
    """

    path: str
    recorded: str | None
    stored: str | None
    rebuilt: str | None
    where: str | None = None

    @property
    def equal(self) -> bool:
        """Whether all three are there and the same."""
        return self.recorded is not None and self.recorded == self.stored == self.rebuilt


def check(catalog: Catalog, entry: Entry, brought: Brought) -> list[Compared]:
    """Make `entry` again and compare every file.

    Raises what `parent_of` and `order` raise, IntegrityError for a damaged parent and what `jobs.convert` raises.
    """
    staging = store.Staging(catalog.home)
    try:
        return _compare(entry, make(catalog, entry, brought, staging.folder))
    finally:
        staging.release()


def make(catalog: Catalog, entry: Entry, brought: Brought, into: Path) -> Path:
    """Make `entry` again in the empty folder `into`; returns the folder that then has its files. Raises as `check`."""
    parent = parent_of(catalog, entry)
    target, options = order(entry, brought)
    hash_files(parent)
    tag = entry.alias_of or entry.tag
    made = into / (f"{entry.name}-{tag}" + (".gguf" if target.container == "gguf" else ""))
    jobs.convert(parent.path, target, made, replace(options, source_digest=parent.digest))
    return made if made.is_dir() else into


def parent_of(catalog: Catalog, entry: Entry) -> Entry:
    """What `entry` was made from: by digest, the name it had then preferred.

    Raises UsageError for an entry that was pulled, NotFoundError for a parent that is not in the catalog.
    """
    if entry.parent is None or entry.recipe is None:
        raise UsageError(f"{entry.ref} was pulled, so there is nothing to make it from", hint="`pull` fetches it anew.")
    found = [other for other in catalog.entries() if other.digest == entry.parent]
    if not found:
        raise NotFoundError(
            f"{entry.ref} was made from {entry.parent_ref}, which is not in the catalog any more",
            hint=f"Pull or make the checkpoint of digest {entry.parent}.",
        )
    return min(found, key=lambda other: (other.alias_of is not None, other.ref != entry.parent_ref, other.ref))


def is_repeatable(entry: Entry) -> bool:
    """Whether the record says all that `check` needs, and this arithmetic made it."""
    try:
        _order(entry.recipe or {}, None, None)
    except WeightsmithError:
        return False
    return entry.parent is not None and not needs(entry)


def needs(entry: Entry) -> list[str]:
    """What the record of `entry` has only the digest of: "calibrate", "imatrix"."""
    recipe = entry.recipe or {}
    text = recipe["calibration"].get("text") if isinstance(recipe.get("calibration"), dict) else None
    if text is not None:
        return [] if text == "self" else ["calibrate"]
    return ["imatrix"] if "imatrix" in recipe else []


def order(entry: Entry, brought: Brought) -> tuple[jobs.Target, jobs.Options]:
    """The recorded recipe as an order. Raises UnsupportedError for what this version cannot repeat.

    Raises UsageError for a text or an imatrix that is missing or not the recorded one.
    """
    recipe = entry.recipe or {}
    text = brought.calibration.text if brought.calibration is not None else None
    for name in needs(entry):
        if (text if name == "calibrate" else brought.imatrix) is None:
            raise UsageError(f"{entry.ref} was made with --{name}", hint=f"Pass the same one with --{name}.")
    calibration = _calibration(recipe, brought)
    _check_imatrix(recipe, brought)
    target, options = _order(recipe, calibration, brought.imatrix)
    return target, replace(options, threads=brought.threads, memory=brought.memory, allow_pickle=brought.allow_pickle)


def hash_files(entry: Entry) -> None:
    """IntegrityError naming the first file of `entry` that is not what the record says."""
    with progress(f"hash {entry.ref}", entry.nbytes) as ticker:
        for file in entry.files:
            path = entry.folder / file.path
            found = store.sha256_file(path, ticker) if path.is_file() else "that of no file"
            if found != file.sha256:
                raise IntegrityError(f"sha256 is {found}, the record says {file.sha256}", path=path)


def _order(
    recipe: Mapping[str, Any], calibration: Calibration | None, matrix: Path | None
) -> tuple[jobs.Target, jobs.Options]:
    arithmetic = recipe.get("arithmetic")
    if arithmetic != str(ARITHMETIC_VERSION):
        raise UnsupportedError(
            f"made by arithmetic version {arithmetic or 'unknown'}, this is version {ARITHMETIC_VERSION}",
            hint="Its bytes cannot come out again; `audit` says whether they can be explained.",
        )
    unknown = recipe.keys() - _NOTED - _OPTIONS.keys() - _RECIPE.keys() - {"overrides"}
    if unknown:
        raise UnsupportedError(f"its recipe has {', '.join(sorted(unknown))}, which this version does not know")
    known = {name: recipe[name] for name in (*_OPTIONS, *_RECIPE) if name in recipe}
    for name, value in known.items():
        if type(value) is not (_OPTIONS | _RECIPE)[name]:
            raise IntegrityError(f"{name} of its recipe is {str(value)[:60]!r}")
    try:
        overrides = tuple((str(pattern), str(codec)) for pattern, codec in recipe.get("overrides", ()))
    except (TypeError, ValueError) as error:
        raise IntegrityError("overrides of its recipe are no pairs") from error
    chosen = Recipe(overrides=overrides, **{name: value for name, value in known.items() if name in _RECIPE})
    options = {name: value for name, value in known.items() if name in _OPTIONS}
    made = jobs.Options(
        recipe=chosen,
        overwrite=True,
        calibration=calibration,
        imatrix=matrix,
        version=str(recipe.get("version", "")),
        **options,
    )
    return jobs.Target.parse(str(recipe.get("target", ""))), made


def _calibration(recipe: Mapping[str, Any], brought: Brought) -> Calibration | None:
    """The recorded use of the text that was brought; UsageError if that is another text."""
    noted = recipe.get("calibration")
    if noted is None:
        if brought.calibration is not None:
            raise UsageError("it was made without a text to calibrate on", hint="Leave --calibrate out.")
        return None
    found = brought.calibration or Calibration(None)
    kinds = {"rows": int, "ctx": int, "seed": int, "group_size": int, "sym": bool}
    if not isinstance(noted, dict) or any(type(noted.get(name)) is not kind for name, kind in kinds.items()):
        raise IntegrityError("calibration of its recipe is damaged")
    found = replace(found, **{name: noted[name] for name in kinds})
    if found.record() != noted:
        raise UsageError(f"the text is {found.record()['text']}, it was made with {noted.get('text')}")
    return found


def _check_imatrix(recipe: Mapping[str, Any], brought: Brought) -> None:
    if brought.imatrix is None:
        return
    found = f"sha256:{imatrix.read(brought.imatrix).digest()}"
    if "calibration" in recipe or recipe.get("imatrix") != found:
        raise UsageError(
            f"the imatrix is {found}, it was made with {recipe.get('imatrix') or 'none'}", path=brought.imatrix
        )


def _compare(entry: Entry, folder: Path) -> list[Compared]:
    recorded = {file.path: file.sha256 for file in entry.files}
    rebuilt = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    total = entry.nbytes + sum(path.stat().st_size for path in rebuilt.values())
    found = []
    with progress("compare", total) as ticker:
        for name in sorted(recorded.keys() | rebuilt.keys()):
            stored = entry.folder / name
            before = store.sha256_file(stored, ticker) if stored.is_file() and name in recorded else None
            after = store.sha256_file(rebuilt[name], ticker) if name in rebuilt else None
            found.append(Compared(name, recorded.get(name), before, after))
    if all(one.equal for one in found):
        return found
    return [one if one.equal else replace(one, where=_why(one, entry, folder)) for one in found]


def _why(one: Compared, entry: Entry, folder: Path) -> str:
    if one.recorded is None or one.rebuilt is None:
        return "is not in the record" if one.recorded is None else "did not come out again"
    if one.stored is None:
        return "is gone from the catalog"
    if one.stored == one.rebuilt:
        return "the record is of other bytes; what lies in the catalog came out again"
    damaged = "" if one.stored == one.recorded else "the file in the catalog was changed: "
    return damaged + _first_difference(entry, folder, File(one.path, 0, one.recorded))


def _first_difference(entry: Entry, folder: Path, file: File) -> str:
    """The first tensor of `file` that differs between the entry and what was made again."""
    again = replace(entry, folder=folder)
    try:
        one = formats.open_reader(entry.path)
    except WeightsmithError as error:
        return f"cannot be opened: {error.message}"
    try:
        two = formats.open_reader(again.path)
        try:
            return _first(one, two, entry.folder / file.path, folder / file.path)
        finally:
            two.close()
    finally:
        one.close()


def _first(one: Reader, two: Reader, left: Path, right: Path) -> str:
    mine, others = _within(one, left), _within(two, right)
    if not mine and not others:
        return "another text"
    for name in [*mine, *(name for name in others if name not in mine)]:
        a, b = mine.get(name), others.get(name)
        if a is None or b is None:
            return f"tensor {name!r} is only in one of them"
        if (a.shape, a.codec) != (b.shape, b.codec):
            return f"tensor {name!r} is {list(a.shape)} {a.codec}, and {list(b.shape)} {b.codec} again"
        if (at := _first_byte(a, b)) is not None:
            return f"tensor {name!r}, from byte {at} of its {a.nbytes}"
    keys = _keys(one, two)
    return f"the tensors are equal, the header is not{': ' + ', '.join(keys[:5]) if keys else ''}"


def _within(reader: Reader, path: Path) -> dict[str, TensorInfo]:
    return {
        name: info
        for name, info in reader.native_infos().items()
        if info.path is not None and info.path.name == path.name
    }


def _first_byte(a: TensorInfo, b: TensorInfo) -> int | None:
    if a.path is None or b.path is None:
        return None
    with open(a.path, "rb") as one, open(b.path, "rb") as two:
        one.seek(a.offset)
        two.seek(b.offset)
        for at in range(0, a.nbytes, _PIECE):
            count = min(_PIECE, a.nbytes - at)
            left, right = one.read(count), two.read(count)
            if left != right:
                pairs = enumerate(zip(left, right, strict=False))
                return at + next((i for i, (x, y) in pairs if x != y), min(len(left), len(right)))
    return None


def _keys(one: Reader, two: Reader) -> list[str]:
    """Metadata keys whose values differ."""
    left, right = dict(one.metadata()), dict(two.metadata())
    return [key for key in sorted(left.keys() | right.keys()) if repr(left.get(key)) != repr(right.get(key))]
