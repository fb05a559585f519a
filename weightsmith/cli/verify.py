"""`weightsmith verify`: how much a candidate lost against its original, pass or fail."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli.options import (
    common,
    evaluation_options,
    evaluation_text,
    pickle_option,
    source_argument,
    torch_device,
)
from weightsmith.cli.output import emit, table
from weightsmith.errors import QualityGateError, UsageError

if TYPE_CHECKING:
    from weightsmith.catalog import Catalog
    from weightsmith.evals.compare import Comparison
    from weightsmith.locate import Located


@click.command("verify")
@source_argument("candidate")
@click.option("--against", metavar="ORIGINAL", help="The original; by default what a catalog entry was made from.")
@click.option("--max-ppl-ratio", type=click.FloatRange(min=0, min_open=True), help="Fail above this perplexity ratio.")
@click.option("--max-kld", type=click.FloatRange(min=0), help="Fail above this mean KL divergence (nats).")
@evaluation_options
@pickle_option
@common
def command(
    candidate: str,
    against: str | None,
    max_ppl_ratio: float | None,
    max_kld: float | None,
    text: Path | None,
    ctx: int | None,
    convention: str,
    windows: int | None,
    threads: int | None,
    device: str,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Measure CANDIDATE beside its original on the same tokens: perplexity, KL divergence, top-1 agreement.

    Exits 5 when a gate given with --max-ppl-ratio or --max-kld is not met.
    """
    from weightsmith.catalog import Catalog
    from weightsmith.evals.ruler import Ruler
    from weightsmith.locate import locate

    catalog = Catalog()
    found = locate(candidate, catalog)
    original = locate(against, catalog) if against else _root(catalog, found, candidate)
    ruler = Ruler(convention=convention, ctx=ctx, device=torch_device(device), threads=threads, max_windows=windows)
    begun = time.monotonic()
    measured = _measure(found.path, original.path, evaluation_text(text), ruler, allow_pickle)
    missed = _missed(measured, max_ppl_ratio, max_kld)
    result = asdict(measured) | {
        "original_path": str(original.path),
        "candidate_path": str(found.path),
        "seconds": round(time.monotonic() - begun, 2),
        "gates": {"max_ppl_ratio": max_ppl_ratio, "max_kld": max_kld},
        "passed": not missed,
    }
    emit(result, _text(measured), as_json=as_json)
    if missed:
        raise QualityGateError("; ".join(missed), path=found.path)


def _root(catalog: Catalog, found: Located, candidate: str) -> Located:
    from weightsmith.locate import locate

    chain = catalog.lineage(found.entry.ref) if found.entry is not None else []
    if len(chain) < 2:
        raise UsageError(f"what {candidate!r} was made from is not known", hint="Pass --against ORIGINAL.")
    return locate(chain[-1].ref, catalog)


def _measure(candidate: Path, original: Path, text: str, ruler: Any, allow_pickle: bool) -> Comparison:
    from weightsmith import formats
    from weightsmith.evals.compare import compare

    base = formats.open_reader(original, allow_pickle=allow_pickle)
    try:
        reader = formats.open_reader(candidate, allow_pickle=allow_pickle)
        try:
            return compare(reader, base, text, ruler)
        finally:
            reader.close()
    finally:
        base.close()


def _missed(measured: Comparison, max_ppl_ratio: float | None, max_kld: float | None) -> list[str]:
    """The gates that were not met; a value that is no number meets none."""
    missed = []
    if max_ppl_ratio is not None and not measured.ratio <= max_ppl_ratio:
        missed.append(f"perplexity ratio {measured.ratio:.4f} is above {max_ppl_ratio:g}")
    if max_kld is not None and not measured.kld_mean <= max_kld:
        missed.append(f"mean KL divergence {measured.kld_mean:.5f} nats is above {max_kld:g}")
    return missed


def _text(measured: Comparison) -> str:
    original, candidate = measured.original, measured.candidate
    rows = [
        ("perplexity of the original", f"{original.perplexity:.4f} +- {original.stderr:.4f}"),
        ("perplexity of the candidate", f"{candidate.perplexity:.4f} +- {candidate.stderr:.4f}"),
        ("ratio", f"{measured.ratio:.4f} +- {measured.ratio_stderr:.4f}"),
        ("KL divergence, mean", f"{measured.kld_mean:.5f} +- {measured.kld_stderr:.5f} nats"),
        ("KL divergence, median", f"{measured.kld_median:.5f} nats"),
        ("KL divergence, 99 %", f"{measured.kld_99:.5f} nats"),
        ("same top token", f"{100 * measured.top1:.2f} %"),
        ("tokens scored", f"{original.tokens} in {original.windows} windows of {original.ctx} ({original.convention})"),
    ]
    return table(rows, ["measure", "value"])
