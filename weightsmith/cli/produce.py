"""What `convert` and `quantize` share: source in, result into the catalog or to -o, a report out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from weightsmith import jobs
from weightsmith.catalog import Catalog
from weightsmith.cli.output import emit, fields, size_text, table
from weightsmith.derive import derive
from weightsmith.errors import UsageError
from weightsmith.locate import Located, locate
from weightsmith.types import TensorInfo


def produce(
    source: str,
    target: jobs.Target,
    options: jobs.Options,
    *,
    output: Path | None,
    tag: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make `target` from `source` and print what was made."""
    catalog = Catalog()
    located = locate(source, catalog)
    if dry_run:
        planned = jobs.plan(located.path, target, options)
        costs = jobs.costs(located.path, target, options)
        found = _result(planned) | {"dry_run": True} | ({"calibration_seconds": costs} if costs else {})
        emit(found, _text(planned, "would make") + _costs(costs), as_json=as_json)
        return
    if output is not None:
        report = jobs.convert(located.path, target, output, options)
        emit(_result(report), _text(report, str(report.path)), as_json=as_json)
        return
    if located.entry is None:
        raise UsageError(
            f"{source!r} is not in the catalog, so its result has no name there",
            hint="Pass -o OUTPUT, or pull it first: weightsmith pull " + source,
        )
    report, entry = derive(catalog, located.entry, target, options, tag=tag or _tag(located, target, options))
    emit(_result(report) | {"ref": entry.ref, "path": str(entry.path)}, _text(report, entry.ref), as_json=as_json)


def _tag(located: Located, target: jobs.Target, options: jobs.Options) -> str:
    """The type of a GGUF; for another container its name, with the type if one was asked for."""
    if target.container == "gguf":
        return (target.type or jobs.plan(located.path, target, options).main_type).lower()
    return str(target).replace(":", "-").lower()


def _result(report: jobs.Report) -> dict[str, Any]:
    return {
        "target": report.target,
        "path": str(report.path),
        "tensor_bytes": report.nbytes,
        "bpw": round(report.bpw, 4),
        "seconds": round(report.seconds, 2),
        "types": report.types,
        "tensors": [_tensor(report, info) for info in report.tensors],
        "codes": {
            "taken_over": len(report.codes.taken - report.codes.requantized),
            "largest_error": report.codes.error,
            "requantized": sorted(report.codes.requantized),
        },
        "fallbacks": [{"tensor": name, "wanted": wanted, "got": got} for name, wanted, got in report.fallbacks],
    }


def _tensor(report: jobs.Report, info: TensorInfo) -> dict[str, Any]:
    error = report.errors.get(info.name)
    return {"tensor": info.name, "type": info.codec, "bpw": round(_bpw(info), 4), "error": error}


def _text(report: jobs.Report, title: str) -> str:
    head = {
        "made" if report.seconds else "plan": title,
        "size": f"{size_text(report.nbytes)} of tensors, {report.bpw:.3f} bits per weight",
        "types": ", ".join(f"{count} x {codec}" for codec, count in report.types.items()),
        "seconds": f"{report.seconds:.1f}" if report.seconds else "",
    }
    if report.codes.taken or report.codes.requantized:
        head |= _codes(report)
    parts = [fields(head)]
    if report.errors or not report.seconds:
        parts.append(_tensors(report))
    if report.fallbacks:
        parts.append("Rows that are no multiple of the block got another type (--strict makes this an error):")
        parts.append(table(_grouped(report.fallbacks), ["tensors", "count", "wanted", "got"]))
    return "\n\n".join(parts)


def _costs(costs: Mapping[str, float]) -> str:
    """How long calibrating would take."""
    if not costs:
        return ""
    rows = [(effort, str(timedelta(seconds=round(seconds)))) for effort, seconds in costs.items()]
    return "\n\nCalibrating would take, by one layer measured on this machine:\n\n" + table(rows, ["effort", "time"])


def _tensors(report: jobs.Report) -> str:
    """One line for each kind of tensor and type; the error is the range over the layers."""
    kinds: dict[tuple[str, str], list[TensorInfo]] = {}
    for info in report.tensors:
        if len(info.shape) > 1:
            kinds.setdefault((_kind(info.name), info.codec), []).append(info)
    rows = []
    for (kind, codec), infos in kinds.items():
        errors = [100 * report.errors[info.name] for info in infos if info.name in report.errors]
        span = sorted({f"{min(errors):.2f}", f"{max(errors):.2f}"}, key=float) if errors else []
        rows.append((kind, len(infos), codec, f"{_bpw(infos[0]):.3f}", " to ".join(span)))
    headers = ["tensors", "count", "type", "bpw", "relative error, %"]
    return table([row if report.errors else row[:4] for row in rows], headers if report.errors else headers[:4])


def _bpw(info: TensorInfo) -> float:
    return 8 * info.nbytes / max(1, info.n_weights)


def _kind(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _codes(report: jobs.Report) -> dict[str, str]:
    """What became of the codes of a packed source."""
    codes = report.codes
    error = f"no weight off by more than {codes.error:.2g}" if codes.error else "exactly"
    whole = len(codes.taken - codes.requantized)
    return {
        "codes taken over": f"of {whole} tensors, {error}" if whole else "",
        "requantized": f"{len(codes.requantized)} tensors whose codes do not fit" if codes.requantized else "",
    }


def _grouped(fallbacks: Sequence[tuple[str, str, str]]) -> list[tuple[str, int, str, str]]:
    """The same tensor of many layers as one line."""
    counts = Counter((_kind(name), wanted, got) for name, wanted, got in fallbacks)
    return [(name, count, wanted, got) for (name, wanted, got), count in counts.items()]
