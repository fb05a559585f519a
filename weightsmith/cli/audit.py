"""`weightsmith audit`: whether a file can have been made from an original, tensor by tensor."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli.options import common, pickle_option, source_argument
from weightsmith.cli.output import emit, table

if TYPE_CHECKING:
    from weightsmith.audit import Audit, Audited

_SHOWN = 20


@click.command("audit")
@source_argument("file")
@click.option("--against", required=True, metavar="ORIGINAL", help="What it is said to be made from.")
@click.option(
    "--moved",
    type=click.FloatRange(min=0),
    default=0,
    show_default=True,
    help="Gaps between stored values that error feedback (GPTQ) may have moved a weight by before rounding.",
)
@click.option("--all", "every", is_flag=True, help="One line for every tensor, not only for what is not explained.")
@click.option("--threads", type=click.IntRange(1), help="Worker threads; all cores by default.")
@pickle_option
@common
def command(
    file: str, against: str, moved: float, every: bool, threads: int | None, allow_pickle: bool, as_json: bool
) -> None:
    """Say of every tensor of FILE whether rounding ORIGINAL explains it, and what else differs: chat template,
    tokenizer, configuration.

    Works on files of any origin. Exits 5 when anything is not explained. What is explained need not be safe: honest
    rounding of a bad original is explained too.
    """
    from weightsmith import formats
    from weightsmith.audit import audit
    from weightsmith.catalog import Catalog
    from weightsmith.errors import QualityGateError
    from weightsmith.locate import locate
    from weightsmith.transcode import default_threads

    catalog = Catalog()
    places = [locate(one, catalog).path for one in (file, against)]
    with ExitStack() as stack:
        reader, base = (
            stack.enter_context(closing(formats.open_reader(path, allow_pickle=allow_pickle))) for path in places
        )
        found = audit(reader, base, moved=moved, threads=threads or default_threads())
    emit(_result(found, file, against), _text(found, every=every), as_json=as_json)
    if not found.explained:
        bad = sum(one.verdict == "unexplained" for one in found.tensors)
        raise QualityGateError(
            f"{bad} tensors are not explained, {len(found.changes)} settings differ from {against}", path=places[0]
        )


def _result(found: Audit, file: str, against: str) -> dict[str, Any]:
    verdicts = Counter(one.verdict for one in found.tensors)
    return {
        "file": file,
        "against": against,
        "explained": found.explained,
        "verdicts": dict(verdicts),
        "tensors": [_tensor(one) for one in found.tensors],
        "changes": [asdict(change) for change in found.changes],
    }


def _tensor(one: Audited) -> dict[str, Any]:
    outcome = one.outcome
    plain: dict[str, Any] = {"tensor": one.name, "type": one.type, "verdict": one.verdict}
    plain |= {name: getattr(outcome, name) for name in ("weights", "outside", "shifted", "wide", "fitted")}
    plain["outside_share"] = outcome.outside / max(1, outcome.weights)
    if one.verdict in ("within", "moved") or outcome.outside:
        plain["worst"] = {
            "gaps": outcome.worst if outcome.worst != float("inf") else None,
            "row": outcome.at[0],
            "column": outcome.at[1],
            "original": outcome.wanted,
            "file": outcome.found if outcome.found == outcome.found else None,
        }
    return plain | ({"reason": one.reason} if one.reason else {})


def _text(found: Audit, *, every: bool) -> str:
    counts = Counter((one.type, one.verdict) for one in found.tensors)
    weights: Counter[tuple[str, str]] = Counter()
    worst: dict[tuple[str, str], float] = {}
    for one in found.tensors:
        key = one.type, one.verdict
        weights[key] += one.outcome.weights
        worst[key] = max(worst.get(key, 0.0), one.outcome.worst)
    rows = [
        (kind, verdict, count, weights[kind, verdict], f"{worst[kind, verdict]:.3g}")
        for (kind, verdict), count in counts.items()
    ]
    parts = [table(rows, ["type", "verdict", "tensors", "weights", "worst, gaps"])]
    shown = [one for one in found.tensors if every or one.verdict == "unexplained"]
    if shown:
        lines = [_line(one) for one in (shown if every else shown[:_SHOWN])]
        parts.append(table(lines, ["tensor", "verdict", "outside, %", "worst, gaps", "what"]))
    if not every and len(shown) > _SHOWN:
        parts.append(f"... and {len(shown) - _SHOWN} more (--all shows them)")
    if found.changes:
        changed = [(one.what, one.name, _short(one.a), _short(one.b)) for one in found.changes]
        parts.append(table(changed, ["differs", "name", "file", "original"]))
    if any(one.verdict == "unexplained" and one.name.endswith("norm.weight") for one in found.tensors):
        parts.append(
            "Norms differ: AWQ and its kin move factors between norms and linears, which is not followed here."
        )
    said = "Everything is explained by rounding the original." if found.explained else "Not everything is explained."
    return "\n\n".join([*parts, said])


def _line(one: Audited) -> tuple[str, ...]:
    outcome = one.outcome
    share = f"{100 * outcome.outside / max(1, outcome.weights):.3g}" if outcome.weights else ""
    what = one.reason
    if outcome.outside:
        what += f"; worst at row {outcome.at[0]}, column {outcome.at[1]}: {outcome.found:.6g} for {outcome.wanted:.6g}"
    return one.name, one.verdict, share, f"{outcome.worst:.3g}" if outcome.weights else "", what


def _short(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
