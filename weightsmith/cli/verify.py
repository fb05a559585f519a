"""`weightsmith verify`: how much candidates lost against their original, pass or fail."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli.integrity import check_integrity, integrity_options
from weightsmith.cli.options import (
    common,
    evaluation_options,
    evaluation_text,
    pickle_option,
    source_argument,
    torch_device,
)
from weightsmith.cli.output import emit
from weightsmith.errors import QualityGateError, UsageError

if TYPE_CHECKING:
    from weightsmith.catalog import Catalog
    from weightsmith.evals.compare import Comparison
    from weightsmith.evals.report import Judged
    from weightsmith.locate import Located

Gates = dict[str, float | None]


@click.command("verify")
@source_argument("candidates", many=True, required=False)
@click.option("--against", metavar="ORIGINAL", help="The original; by default what a catalog entry was made from.")
@click.option("--max-ppl-ratio", type=click.FloatRange(min=0, min_open=True), help="Fail above this perplexity ratio.")
@click.option("--max-kld", type=click.FloatRange(min=0), help="Fail above this mean KL divergence (nats).")
@click.option("--drift", is_flag=True, help="Show every layer's drift, and measure what each adds by itself.")
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="Write an HTML report to this file.")
@click.option("--force", is_flag=True, help="Replace an existing report.")
@integrity_options
@evaluation_options
@pickle_option
@common
def command(
    candidates: tuple[str, ...],
    against: str | None,
    max_ppl_ratio: float | None,
    max_kld: float | None,
    drift: bool,
    report: Path | None,
    force: bool,
    integrity: bool,
    repair: bool,
    given: tuple[Path, ...],
    offline: bool,
    text: Path | None,
    ctx: int | None,
    convention: str,
    windows: int | None,
    threads: int | None,
    device: str,
    graph: str | None,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Measure CANDIDATES beside their original on the same tokens: perplexity, KL divergence, top-1 agreement, drift.

    Each model is read once, a layer at a time, whatever their number and size. The noise floor is what the original
    shows against itself when its hidden states are rounded to bfloat16; less than that is no difference.

    Exits 5 when a gate given with --max-ppl-ratio or --max-kld is not met.

    With --integrity nothing is measured: the files of the entries are hashed and held against their records (exit 3).
    """
    if integrity:
        check_integrity(candidates, repair=repair, given=given, offline=offline, as_json=as_json)
        return
    if not candidates or repair or given or offline:
        hint = "--repair, --from and --offline go with --integrity." if candidates else "See weightsmith verify --help."
        raise UsageError("no CANDIDATE to measure" if not candidates else "nothing is repaired here", hint=hint)
    from weightsmith import formats
    from weightsmith.atomic import refuse_existing
    from weightsmith.catalog import Catalog
    from weightsmith.cli.verified import per_layer, several, single
    from weightsmith.evals.ruler import Ruler

    if report is not None:
        refuse_existing(report, overwrite=force)
    catalog = Catalog()
    found, original = _located(candidates, against, catalog)
    ruler = Ruler(
        convention=convention,
        ctx=ctx,
        device=torch_device(device),
        threads=threads,
        max_windows=windows,
        graph=graph,
    )
    gates: Gates = {"max_ppl_ratio": max_ppl_ratio, "max_kld": max_kld}
    begun = time.monotonic()
    with ExitStack() as stack:
        base, *readers = (
            stack.enter_context(closing(formats.open_reader(one.path, allow_pickle=allow_pickle)))
            for one in (original, *found)
        )
        judged, size = _judged(_labels(candidates, found), readers, base, evaluation_text(text), ruler, gates, drift)
        if report is not None:
            _report(report, judged, readers, base)
    seconds = round(time.monotonic() - begun, 2)
    results = [
        asdict(one.measured)
        | {
            "original_path": str(original.path),
            "candidate_path": str(where.path),
            "original_size": asdict(size) | {"bpw": round(size.bpw, 4)},
            "candidate_size": asdict(one.size) | {"bpw": round(one.size.bpw, 4)},
            "seconds": seconds,
            "gates": gates,
            "passed": not one.missed,
        }
        for one, where in zip(judged, found, strict=True)
    ]
    shown = single(judged[0], size) if len(judged) == 1 else several(judged, size)
    if drift:
        shown += "\n\n" + per_layer(judged)
    emit(results[0] if len(results) == 1 else results, shown, as_json=as_json)
    _fail(judged, found)


def _located(candidates: Sequence[str], against: str | None, catalog: Catalog) -> tuple[list[Located], Located]:
    """Where the candidates and their one original lie."""
    from weightsmith.locate import locate

    found = [locate(one, catalog) for one in candidates]
    if against is not None:
        return found, locate(against, catalog)
    roots = [_root(catalog, one, text) for one, text in zip(found, candidates, strict=True)]
    for root, text in zip(roots, candidates, strict=True):
        if root.path != roots[0].path:
            raise UsageError(
                f"{candidates[0]!r} and {text!r} were made from different originals", hint="Pass --against ORIGINAL."
            )
    return found, roots[0]


def _root(catalog: Catalog, found: Located, candidate: str) -> Located:
    from weightsmith.locate import locate

    chain = catalog.lineage(found.entry.ref) if found.entry is not None else []
    if len(chain) < 2:
        raise UsageError(f"what {candidate!r} was made from is not known", hint="Pass --against ORIGINAL.")
    return locate(chain[-1].ref, catalog)


def _labels(candidates: Sequence[str], found: Sequence[Located]) -> list[str]:
    """What each candidate is called: as in the catalog, or by its file's name where no other has the same."""
    short = [text if one.kind == "catalog" else one.path.name for text, one in zip(candidates, found, strict=True)]
    return [name if short.count(name) == 1 else text for name, text in zip(short, candidates, strict=True)]


def _judged(
    labels: Sequence[str], readers: Sequence[Any], base: Any, text: str, ruler: Any, gates: Gates, own: bool
) -> tuple[list[Judged], Any]:
    """Every candidate with its numbers and the gates it missed, and the original's size."""
    from weightsmith.evals.report import Judged
    from weightsmith.evals.sizes import footprint
    from weightsmith.evals.together import together

    measured = together(readers, base, text, ruler, own=own)
    judged = [
        Judged(label, footprint(reader), one, tuple(_missed(one, gates)), _gates_text(gates))
        for label, reader, one in zip(labels, readers, measured, strict=True)
    ]
    return judged, footprint(base)


def _report(path: Path, judged: Sequence[Judged], readers: Sequence[Any], base: Any) -> None:
    from weightsmith._version import __version__
    from weightsmith.atomic import write_text
    from weightsmith.evals.report import render
    from weightsmith.evals.weights_error import tensor_errors

    errors = [tensor_errors(reader, base) for reader in readers]
    write_text(path, render(base, judged, errors, version=__version__))


def _missed(measured: Comparison, gates: Gates) -> list[str]:
    """The gates that were not met; a value that is no number meets none."""
    missed = []
    ratio, kld = gates["max_ppl_ratio"], gates["max_kld"]
    if ratio is not None and not measured.ratio <= ratio:
        missed.append(f"perplexity ratio {measured.ratio:.4f} is above {ratio:g}")
    if kld is not None and not measured.kld_mean <= kld:
        missed.append(f"mean KL divergence {measured.kld_mean:.5f} nats is above {kld:g}")
    return missed


def _gates_text(gates: Gates) -> str:
    names = {"max_ppl_ratio": "perplexity ratio", "max_kld": "mean KL divergence"}
    return ", ".join(f"{names[name]} <= {value:g}" for name, value in gates.items() if value is not None)


def _fail(judged: Sequence[Judged], found: Sequence[Located]) -> None:
    """QualityGateError if any candidate missed a gate."""
    failed = [(one, where) for one, where in zip(judged, found, strict=True) if one.missed]
    if not failed:
        return
    if len(judged) == 1:
        raise QualityGateError("; ".join(judged[0].missed), path=found[0].path)
    raise QualityGateError("; ".join(f"{one.label}: {', '.join(one.missed)}" for one, _ in failed))
