"""The report of a comparison: one HTML file with tables and plots, to read offline, to keep, to publish.

Everything is inside: no script, no font, no address that is fetched, and a policy in the file that forbids all of that.
Plots are SVG made here (`figures`), each number of theirs also in a tooltip and in a table. Whatever comes from a file
(names, types) is escaped by the template engine or the XML writer, after characters that are no text were replaced.
The page is well-formed XML, and equal input gives equal bytes: it holds no time and no path.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from weightsmith.evals.compare import Comparison
from weightsmith.evals.report import figures
from weightsmith.evals.sizes import Footprint, footprint
from weightsmith.evals.weights_error import TensorError, moved
from weightsmith.types import Reader

__all__ = ["Judged", "clean", "render"]


@dataclass(frozen=True, slots=True)
class Judged:
    """One candidate's result. label: its name for people. missed: why it failed, if it did. gates: what was asked."""

    label: str
    size: Footprint
    measured: Comparison
    missed: tuple[str, ...] = ()
    gates: str = ""


def clean(text: str) -> str:
    """`text` with control, formatting and other characters that cannot be shown replaced by U+FFFD."""
    return "".join("\ufffd" if unicodedata.category(c) in _NO_TEXT or c in _NO_XML else c for c in text)


_NO_TEXT = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_NO_XML = frozenset("\ufffe\uffff")


def render(original: Reader, judged: Sequence[Judged], errors: Sequence[Sequence[TensorError]], *, version: str) -> str:
    """The page for one or more candidates of `original`, with their `tensor_errors`, made by weightsmith `version`."""
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415  (only reports need it)

    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_finalize, trim_blocks=True)
    environment.filters["percent"] = lambda value: f"{100 * value:.2f}"
    page = environment.from_string((files("weightsmith.evals.report") / "page.html").read_text(encoding="utf-8"))
    named = [(clean(one.label), one.measured) for one in judged]
    return page.render(
        version=version,
        config=original.config,
        name=original.config.name or original.path.name,
        size=footprint(original),
        judged=judged,
        first=judged[0].measured,
        drift=figures.drift(named),
        own=figures.own(named),
        scatter=figures.size_against_loss([(clean(one.label), one.size.nbytes, one.measured) for one in judged]),
        details=[_detail(number, one, found) for number, (one, found) in enumerate(zip(judged, errors, strict=True))],
    )


def _finalize(value: Any) -> Any:
    return clean(value) if type(value) is str else value  # markup is a subclass, and stays


def _detail(number: int, one: Judged, errors: Sequence[TensorError]) -> dict[str, Any]:
    """One candidate's own section."""
    shown = [figures.Cell(clean(e.name), len(e.shape) > 1, clean(e.codec), e.bits, e.error) for e in errors]
    return {
        "label": one.label,
        "bits": figures.bits(f"bits{number}", shown),
        "error": figures.weight_error(f"error{number}", shown),
        "moved": moved(errors),
        "tensors": [(e, "x".join(map(str, e.shape))) for e in errors],
    }
