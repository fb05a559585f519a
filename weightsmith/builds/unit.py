"""One job: is it there, make it, hold it against its gates, move its aliases. Plain values in, plain values out.

A job is made under a lock of its own, HOME/builds/locks/REF, so two runs of the same registry do not do the same work
twice: the second one waits and then finds it there. What was finished before a kill is found again: tensors in
HOME/work, results in the catalog, measurements in the result's record.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from weightsmith import aliases, derive, store
from weightsmith.builds import gates, state
from weightsmith.builds.plan import ORIGINAL, Job
from weightsmith.catalog import Catalog
from weightsmith.errors import IntegrityError, InterruptedRunError, ResourceError, WeightsmithError
from weightsmith.jobs import Options
from weightsmith.sources import Source, fetch, parse, settle
from weightsmith.store import Entry

Status = Literal["made", "there", "failed", "gate", "blocked", "interrupted"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How jobs are gone about; none of it changes what is made. any_version: what another weightsmith made counts."""

    home: Path
    threads: int | None = None
    memory: int | None = None
    device: str = "auto"
    offline: bool = False
    any_version: bool = False


@dataclass(slots=True)
class Outcome:
    """What became of a job. reasons: why it ran, or would. missed: of its gates. moved: aliases that moved.

    error: kind, message, hint, exit_code of what stopped it.
    """

    ref: str
    status: Status
    builds: tuple[str, ...] = ()
    reasons: list[str] = field(default_factory=list)
    key: str | None = None
    digest: str | None = None
    nbytes: int | None = None
    seconds: float = 0.0
    missed: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None


def why(job: Job, settings: Settings, pending: frozenset[str] = frozenset()) -> list[str]:
    """Why `job` has something to do, one phrase each; empty if it has not. pending: jobs that will run before it."""
    catalog = Catalog(settings.home)
    if job.parent in pending:
        return [f"{job.parent} comes first"] if catalog.has(job.name, job.tag) else ["missing"]
    reasons = _reasons(catalog, job, settings)
    if not reasons and job.target is not None:
        entry = catalog.get(job.ref)
        reasons = gates.pending(job, entry, catalog.get(f"{job.name}:{ORIGINAL}"))
        if not reasons and not _failed(catalog, job):
            reasons = [f"alias {alias} moves" for alias in job.aliases if _moves(catalog, alias, entry)]
    return reasons


def standing(job: Job, settings: Settings) -> list[str]:
    """What an up-to-date result misses of its gates."""
    catalog = Catalog(settings.home)
    return (
        [f"failed {item['gate']}: {'; '.join(item['missed'])}" for item in _failed(catalog, job)] if job.gates else []
    )


def make(job: Job, settings: Settings, originals: gates.Originals) -> Outcome:
    """Do `job`; a failure is in the outcome. Raises InterruptedRunError and KeyboardInterrupt only."""
    begun = time.monotonic()
    outcome = Outcome(job.ref, "there", job.builds)
    try:
        with store.locked(settings.home / "builds" / "locks" / job.ref.replace(":", "--")):
            _make(job, settings, originals, outcome)
    except InterruptedRunError:
        raise
    except WeightsmithError as error:
        outcome.status, outcome.error = "failed", error.told()
    except MemoryError:
        outcome.status, outcome.error = "failed", ResourceError("out of memory").told()
    except OSError as error:
        failure = WeightsmithError(error.strerror or str(error), path=error.filename)
        outcome.status, outcome.error = "failed", failure.told()
    outcome.seconds = round(time.monotonic() - begun, 2)
    return outcome


def _make(job: Job, settings: Settings, originals: gates.Originals, outcome: Outcome) -> None:
    catalog = Catalog(settings.home)
    outcome.reasons = _reasons(catalog, job, settings)
    if job.target is None:
        entry = _pulled(catalog, job, settings) if outcome.reasons else catalog.get(job.ref)
        outcome.status = "made" if outcome.reasons else "there"
    else:
        parent = catalog.get(str(job.parent))
        options = _options(job, settings)
        outcome.key = state.key_of(state.derivation(job, options, parent))
        entry = _derived(catalog, job, parent, options, settings) if outcome.reasons else catalog.get(job.ref)
        outcome.status = "made" if outcome.reasons else "there"
        outcome.digest, outcome.nbytes = entry.digest, entry.nbytes
        original = catalog.get(f"{job.name}:{ORIGINAL}")
        outcome.reasons += gates.pending(job, entry, original)
        outcome.missed = gates.judge(catalog, job, entry, original, originals)
        entry = catalog.get(job.ref)
        if outcome.missed:
            outcome.status = "gate"
        else:
            for alias in job.aliases:
                if aliases.point(catalog, alias, entry, force=True)[1]:
                    outcome.moved.append(f"{job.name}:{alias}")
    outcome.digest, outcome.nbytes = entry.digest, entry.nbytes


def _reasons(catalog: Catalog, job: Job, settings: Settings) -> list[str]:
    """Why the bytes of `job` have to be made, or fetched."""
    if not catalog.has(job.name, job.tag):
        return ["missing"]
    try:
        entry = catalog.get(job.ref)
    except IntegrityError as error:
        return [f"damaged: {error.message}"]
    if lost := state.damage(entry):
        return [f"damaged: {lost}"]
    if job.target is None:
        return state.source_changes(entry, job.source, catalog) if job.source is not None else []
    wanted = state.derivation(job, _options(job, settings), catalog.get(str(job.parent)))
    return state.changes(wanted, entry, any_version=settings.any_version)


def _pulled(catalog: Catalog, job: Job, settings: Settings) -> Entry:
    """Fetch a model of the registry by its name, whatever files of that name lie around."""
    if job.source is None:
        return catalog.get(job.ref)  # it was there when the plan was made: says that it is gone
    source = parse(job.source.source)
    signed = state.signature(Path(source.target)) if source.kind == "path" else None
    named = Source("name", job.name, job.name)
    with catalog.reserve(job.name, job.tag) as reservation:
        into, home = reservation.folder, settings.home
        fetched = fetch(named, into, offline=settings.offline, home=home, registry=job.registry)
        hashes = {file.path: file.sha256 for file in fetched.files}
        origin = {**fetched.origin, "asked": [job.name, ""]}  # what `pull NAME` asks for, so it finds this
        entry = reservation.commit(origin=origin, hashes=hashes, overwrite=True)
        settle(fetched)
    if source.kind == "path":
        state.note_signature(catalog, entry, signed)
    return entry


def _options(job: Job, settings: Settings) -> Options:
    """The job's options with its calibration text."""
    if job.calibrate is None:
        return job.options
    return replace(job.options, calibration=job.calibrate.load(home=settings.home, offline=settings.offline))


def _derived(catalog: Catalog, job: Job, parent: Entry, options: Options, settings: Settings) -> Entry:
    if job.target is None:
        return parent
    memory, threads, calibration = settings.memory, settings.threads, options.calibration
    if calibration is not None:
        device = gates.torch_device(settings.device)
        calibration = replace(calibration, device=device, memory=memory, threads=threads)
    options = replace(options, calibration=calibration, memory=memory, threads=threads)
    return derive.derive(catalog, parent, job.target, options, tag=job.tag)[1]


def _moves(catalog: Catalog, alias: str, entry: Entry) -> bool:
    if not catalog.has(entry.name, alias):
        return True
    there = catalog.get(f"{entry.name}:{alias}")
    return there.digest != entry.digest or there.alias_of != entry.tag


def _failed(catalog: Catalog, job: Job) -> list[dict[str, Any]]:
    names = {gate.name for gate in job.gates}
    return [item for item in aliases.failures(catalog.get(job.ref)) if item["gate"] in names]
