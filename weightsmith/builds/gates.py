"""Gates: what a result must keep, measured against its original, and the verdict that stays with it as evidence.

A measurement is kept in the entry's record under what it depends on: the original's digest, the text, the windows, the
version of the metrics. A gate is then a comparison of numbers, so a changed limit needs no second measurement, and a
build that has nothing to do never loads a model.

    {"kind": "measurement", "key": {...}, "kld_mean": ..., "ratio": ..., "top1": ..., ...}
    {"kind": "gate", "gate": "close", "limits": {...}, "passed": false, "missed": [...], "aliases": ["prod"], ...}
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from weightsmith import formats
from weightsmith.builds.plan import Gate, Job
from weightsmith.catalog import Catalog
from weightsmith.errors import UsageError
from weightsmith.evals.ruler import METRICS_VERSION, Ruler, digest
from weightsmith.provenance import reports
from weightsmith.store import Entry

_KEPT = ("ratio", "ratio_stderr", "kld_mean", "kld_stderr", "kld_median", "kld_99", "top1", "top1_stderr")


class Originals:
    """The original that was measured last, kept open with what it said of the text, for the next of its results.

    Several results of one model by one gate so cost one pass over the original.
    """

    def __init__(self, *, device: str, threads: int | None) -> None:
        self.device, self.threads = device, threads
        self._key: dict[str, Any] | None = None
        self._kept: Any = None

    def compare(self, entry: Entry, original: Entry, gate: Gate) -> Any:
        """The `evals.compare.Comparison` of `entry` with `original` on the gate's text."""
        from weightsmith.evals import compare  # noqa: PLC0415  (loads torch)

        key = _key(gate, original)
        if self._key != key:
            self.close()
            ruler = Ruler(
                convention=gate.convention,
                ctx=gate.ctx,
                device=torch_device(self.device),
                threads=self.threads,
                max_windows=gate.windows,
            )
            self._kept = compare.prepare(formats.open_reader(original.path), _text(gate), ruler)
            self._key = key
        reader = formats.open_reader(entry.path)
        try:
            return compare.against(reader, self._kept)
        except BaseException:
            self.close()  # its pass may have ended half way
            raise
        finally:
            reader.close()

    def close(self) -> None:
        """Let go of it."""
        if self._kept is not None:
            self._kept.reader.close()
        self._key = self._kept = None


def judge(catalog: Catalog, job: Job, entry: Entry, original: Entry, originals: Originals) -> list[str]:
    """Hold `entry` against the gates of `job`, measuring what is not known yet; returns what was missed.

    Every measurement and every new verdict is added to the entry's record, and hung on its manifest.
    """
    missed = []
    for gate in job.gates:
        measured = None
        if gate.is_measured:
            measured = known(entry, gate, original)
            if measured is None:
                measured = measure(entry, original, gate, originals)
                entry = reports.evaluated(catalog, entry.ref, measured)
        faults = verdict(gate, entry, measured, licence=job.licence or entry.licence)
        if _last(entry, gate) != _comparable(gate, faults, job):
            entry = reports.evaluated(catalog, entry.ref, {**_comparable(gate, faults, job), "when": _now()})
        missed += [f"{gate.name}: {fault}" for fault in faults]
    return missed


def pending(job: Job, entry: Entry, original: Entry) -> list[str]:
    """Why `judge` has something to do: gates that were not measured, or whose limits changed."""
    said = []
    for gate in job.gates:
        measured = known(entry, gate, original) if gate.is_measured else None
        if gate.is_measured and measured is None:
            said.append(f"gate {gate.name}: not measured yet")
            continue
        faults = verdict(gate, entry, measured, licence=job.licence or entry.licence)
        last = _last(entry, gate)
        if last != _comparable(gate, faults, job):
            said.append(f"gate {gate.name}: {'not judged yet' if last is None else 'new limits'}")
    return said


def verdict(gate: Gate, entry: Entry, measured: dict[str, Any] | None, *, licence: str | None) -> list[str]:
    """What `entry` misses of `gate`, one sentence each. A value that is no number meets no limit."""
    missed = []
    if gate.max_bytes is not None and entry.nbytes > gate.max_bytes:
        missed.append(f"{entry.nbytes} bytes are more than {gate.max_bytes}")
    if gate.licences is not None:
        allowed = {name.casefold() for name in gate.licences}
        if licence is None or licence.casefold() not in allowed:
            missed.append(f"licence {licence or 'unknown'} is not one of {', '.join(gate.licences)}")
    numbers = {name: float((measured or {}).get(name, "nan")) for name in ("kld_mean", "ratio", "top1")}
    if gate.max_kld is not None and not numbers["kld_mean"] <= gate.max_kld:
        missed.append(f"mean KL divergence {numbers['kld_mean']:.5f} nats is above {gate.max_kld:g}")
    if gate.max_ppl_ratio is not None and not numbers["ratio"] <= gate.max_ppl_ratio:
        missed.append(f"perplexity ratio {numbers['ratio']:.4f} is above {gate.max_ppl_ratio:g}")
    if gate.min_top1 is not None and not numbers["top1"] >= gate.min_top1:
        missed.append(f"top-1 agreement {numbers['top1']:.4f} is below {gate.min_top1:g}")
    return missed


def known(entry: Entry, gate: Gate, original: Entry) -> dict[str, Any] | None:
    """The measurement that `gate` needs, if the record of `entry` has it."""
    wanted = _key(gate, original)
    found = [item for item in entry.evaluations if item.get("kind") == "measurement" and item.get("key") == wanted]
    return found[-1] if found and all(isinstance(found[-1].get(name), (int, float)) for name in _KEPT) else None


def measure(entry: Entry, original: Entry, gate: Gate, originals: Originals) -> dict[str, Any]:
    """Run both models on the gate's text, layer by layer; raises what `evals.compare` raises."""
    found = originals.compare(entry, original, gate)
    kept = {name: float(getattr(found, name)) for name in _KEPT}
    kept |= {"perplexity": found.candidate.perplexity, "original_perplexity": found.original.perplexity}
    return {"kind": "measurement", "key": _key(gate, original), **kept, "tokens": found.original.tokens, "when": _now()}


def torch_device(name: str) -> str:
    """The device that "auto" stands for: a CUDA device where there is one, else the CPU."""
    if name != "auto":
        return name
    import torch  # noqa: PLC0415  (only where something runs)

    return "cuda" if torch.cuda.is_available() else "cpu"


def _key(gate: Gate, original: Entry) -> dict[str, Any]:
    ruler = Ruler(convention=gate.convention, ctx=gate.ctx, max_windows=gate.windows)
    how = {"ctx": ruler.length, "windows": gate.windows, "convention": gate.convention, "metrics": METRICS_VERSION}
    return {"against": original.digest, "text": f"sha256:{digest(_text(gate).encode())}", **how}


def _text(gate: Gate) -> str:
    if gate.text is None:
        from weightsmith.evals.prose import default_text  # noqa: PLC0415  (not every gate needs a text)

        return default_text()
    try:
        return gate.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"not UTF-8 at byte {error.start}", path=gate.text, hint="Convert it to UTF-8 first."
        ) from error


def _comparable(gate: Gate, faults: list[str], job: Job) -> dict[str, Any]:
    found = {"kind": "gate", "gate": gate.name, "limits": gate.limits(), "passed": not faults, "missed": faults}
    return {**found, "aliases": list(job.aliases)}


def _last(entry: Entry, gate: Gate) -> dict[str, Any] | None:
    found = [item for item in entry.evaluations if item.get("kind") == "gate" and item.get("gate") == gate.name]
    return {key: value for key, value in found[-1].items() if key != "when"} if found else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
