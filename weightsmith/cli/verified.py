"""What `verify` prints: one candidate as a list of measures, several as a line each, drift as a line per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from weightsmith.cli.output import size_text, table

if TYPE_CHECKING:
    from weightsmith.evals.noise import Noise
    from weightsmith.evals.report import Judged
    from weightsmith.evals.sizes import Footprint


def single(judged: Judged, original_size: Footprint) -> str:
    """One candidate beside its original."""
    measured, size = judged.measured, judged.size
    original, candidate, floor = measured.original, measured.candidate, measured.noise
    rows = [
        ("original", _size(original_size), ""),
        ("candidate", _size(size), ""),
        ("perplexity of the original", f"{original.perplexity:.4f} +- {original.stderr:.4f}", ""),
        ("perplexity of the candidate", f"{candidate.perplexity:.4f} +- {candidate.stderr:.4f}", ""),
        ("ratio", f"{measured.ratio:.4f} +- {measured.ratio_stderr:.4f}", floor and f"{floor.ratio:.4f}"),
        (
            "KL divergence, mean",
            f"{measured.kld_mean:.5f} +- {measured.kld_stderr:.5f} nats",
            floor and f"{floor.kld_mean:.5f}",
        ),
        ("KL divergence, median", f"{measured.kld_median:.5f} nats", floor and f"{floor.kld_median:.5f}"),
        ("KL divergence, 99 %", f"{measured.kld_99:.5f} nats", floor and f"{floor.kld_99:.5f}"),
        ("same top token", f"{100 * measured.top1:.2f} %", floor and f"{100 * floor.top1:.2f} %"),
    ]
    if measured.drift is not None:
        rows.append(("drift of the last hidden state", f"{100 * measured.drift.final:.2f} %", _floor_drift(floor)))
    tokens = f"{original.tokens} in {original.windows} windows of {original.ctx} ({original.convention})"
    rows.append(("tokens scored", tokens, floor and f"{floor.tokens}"))
    if judged.gates:
        rows.append(("gates", f"{judged.gates}: {'missed' if judged.missed else 'met'}", ""))
    return table([(name, value, noise or "") for name, value, noise in rows], ["measure", "value", "noise floor"])


def several(judged: Sequence[Judged], original_size: Footprint) -> str:
    """A line for the original, one for each candidate, one for the noise floor."""
    original, floor = judged[0].measured.original, judged[0].measured.noise
    gated = bool(judged[0].gates)
    headers = ["model", "type", "bytes", "bpw", "ppl ratio", "KL mean", "KL median", "KL 99 %", "top-1 %", "drift %"]
    rows = [["original", *_columns(original_size), "1", "0", "0", "0", "100", "0"]]
    for one in judged:
        m = one.measured
        cells = [f"{m.ratio:.4f} +- {m.ratio_stderr:.4f}", f"{m.kld_mean:.5f}", f"{m.kld_median:.5f}"]
        cells += [f"{m.kld_99:.5f}", f"{100 * m.top1:.2f}", f"{100 * m.drift.final:.2f}" if m.drift else ""]
        rows.append([one.label, *_columns(one.size), *cells])
    if floor is not None:
        cells = [f"{floor.ratio:.4f}", f"{floor.kld_mean:.5f}", f"{floor.kld_median:.5f}", f"{floor.kld_99:.5f}"]
        drift = f"{100 * floor.drift.final:.2f}" if floor.drift else ""
        rows.append(["noise floor", "", "", "", *cells, f"{100 * floor.top1:.2f}", drift])
    if gated:
        headers.append("gates")
        verdicts = ["", *("missed" if one.missed else "met" for one in judged), *([""] if floor else [])]
        rows = [[*row, verdict] for row, verdict in zip(rows, verdicts, strict=True)]
    tokens = f"{original.tokens} tokens scored in {original.windows} windows of {original.ctx} ({original.convention})"
    notes = [f"perplexity of the original {original.perplexity:.4f} +- {original.stderr:.4f}; {tokens}; KL in nats"]
    if gated:
        notes.append(f"gates: {judged[0].gates}")
    return "\n".join([table(rows, headers), "", *notes])


def per_layer(judged: Sequence[Judged]) -> str:
    """Drift after every layer in per cent, and in brackets what the layer adds by itself."""
    shown = [one for one in judged if one.measured.drift is not None]
    if not shown:
        return "Drift: no candidate has the original's layers."
    floor = judged[0].measured.noise
    columns = [_percents(one) for one in shown]
    names = [one.label for one in shown]
    if floor is not None and floor.drift is not None:
        columns.append([f"{100 * value:.3f}" for value in (*floor.drift.layers, floor.drift.final)])
        names.append("noise floor")
    layers = [*map(str, range(len(columns[0]) - 1)), "norm"]
    rows = [(layer, *cells) for layer, *cells in zip(layers, *columns, strict=True)]
    return "\n".join(["Drift in %, in brackets what the layer adds by itself:", table(rows, ["layer", *names])])


def _percents(one: Judged) -> list[str]:
    drift = one.measured.drift
    if drift is None:
        return []
    if drift.own is None:
        return [f"{100 * value:.3f}" for value in (*drift.layers, drift.final)]
    pairs = zip(drift.layers, drift.own, strict=True)
    return [*(f"{100 * value:.3f} ({100 * own:.3f})" for value, own in pairs), f"{100 * drift.final:.3f}"]


def _size(size: Footprint) -> str:
    return f"{size.container} {size.type}, {size_text(size.nbytes)}, {size.bpw:.3f} bits per weight"


def _columns(size: Footprint) -> list[str]:
    return [f"{size.container} {size.type}", f"{size.nbytes:,}", f"{size.bpw:.3f}"]


def _floor_drift(floor: Noise | None) -> str:
    return f"{100 * floor.drift.final:.2f} %" if floor is not None and floor.drift is not None else ""
