"""The plots of a report, each as SVG text that may stand in a page; names passed in must be clean (`report.clean`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement

from weightsmith.evals.compare import Comparison
from weightsmith.evals.report import svg
from weightsmith.evals.report.scales import Scale, linear, logarithmic, spread

WIDTH, LEFT, RIGHT, TOP = 760.0, 70.0, 740.0, 12.0
PLOT_HEIGHT = 260.0
ROLES, VALUES = 190.0, 690.0  # where the bars of `bits` and `weight_error` begin and end

Named = Sequence[tuple[str, Comparison]]


@dataclass(frozen=True, slots=True)
class Line:
    """A series of one value for each layer. dashed: it is something to compare with, not a candidate."""

    name: str
    values: tuple[float, ...]
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """One tensor for the bar plots."""

    name: str
    is_matrix: bool
    codec: str
    bits: float
    error: float | None


def drift(named: Named) -> str | None:
    """Drift after every layer, candidates and noise floor; None if no candidate has any."""
    lines = [Line(name, one.drift.layers) for name, one in named if one.drift is not None]
    floor = named[0][1].noise
    if not lines:
        return None
    if floor is not None and floor.drift is not None:
        lines.append(Line("noise floor", floor.drift.layers, dashed=True))
    about = "Mean relative error of the hidden state after each layer, in per cent."
    return _lines("drift", "Drift by layer", about, "drift (%)", lines)


def own(named: Named) -> str | None:
    """What every layer adds by itself; None where it was not measured."""
    drifts = [(name, one.drift) for name, one in named if one.drift is not None]
    lines = [Line(name, found.own) for name, found in drifts if found.own is not None]
    if not lines:
        return None
    about = "Mean relative error that each layer alone adds to the original's hidden state, in per cent."
    return _lines("own", "What each layer adds by itself", about, "own error (%)", lines)


def _lines(key: str, title: str, about: str, unit: str, lines: Sequence[Line]) -> str:
    bottom, percent = TOP + PLOT_HEIGHT, [[100 * value for value in one.values] for one in lines]
    height = bottom + 48 + 20 * len(lines)
    root = svg.canvas(key, WIDTH, height, title, about)
    every = [value for values in percent for value in values]
    y = logarithmic(every, bottom, TOP) if spread(every) else linear(every, bottom, TOP)
    depth = max(len(values) for values in percent)
    x = linear([0, depth - 1], LEFT + 10, RIGHT, whole=True)
    _frame(root, x, y, "layer", unit)
    for series, (one, values) in enumerate(zip(lines, percent, strict=True)):
        style = f"line s{series % svg.SERIES}" + (" dashed" if one.dashed else "")
        svg.path(root, [(x(layer), y(value)) for layer, value in enumerate(values)], style)
        for layer, value in enumerate(values):
            svg.marker(root, x(layer), y(value), series, f"{one.name}, layer {layer}: {value:.4g} %")
        at = bottom + 56 + 20 * series
        svg.line(root, (LEFT, LEFT + 30), (at - 4, at - 4), style)
        svg.marker(root, LEFT + 15, at - 4, series)
        svg.text(root, LEFT + 38, at, one.name)
    return svg.markup(root)


def _frame(root: Element, x: Scale, y: Scale, x_label: str, y_label: str) -> None:
    """Axes with ticks, a grid and labels."""
    left, right, bottom, top = LEFT, RIGHT, y.start, y.stop
    for tick in y.ticks:
        svg.line(root, (left, right), (y(tick), y(tick)), "grid")
        svg.text(root, left - 6, y(tick) + 4, f"{tick:g}", anchor="end")
    for tick in x.ticks:
        svg.line(root, (x(tick), x(tick)), (bottom, bottom + 4), "axis")
        svg.text(root, x(tick), bottom + 18, f"{tick:g}", anchor="middle")
    svg.line(root, (left, right), (bottom, bottom), "axis")
    svg.line(root, (left, left), (bottom, top), "axis")
    svg.text(root, (left + right) / 2, bottom + 36, x_label, anchor="middle")
    svg.text(root, 16, (top + bottom) / 2, y_label, anchor="middle", turned=True)


def size_against_loss(points: Sequence[tuple[str, int, Comparison]]) -> str | None:
    """Bytes of each candidate against its mean KL divergence; None for a single one."""
    if len(points) < 2:
        return None
    bottom = TOP + PLOT_HEIGHT
    root = svg.canvas(
        "size", WIDTH, bottom + 48, "Size against loss", "Bytes of tensors and mean KL divergence of every candidate."
    )
    unit, divisor = ("GB", 1e9) if max(nbytes for _, nbytes, _ in points) >= 1e9 else ("MB", 1e6)
    floor = points[0][2].noise
    losses = [max(0.0, one.kld_mean) for _, _, one in points]
    every = [*losses, floor.kld_mean] if floor is not None else losses
    y = logarithmic(every, bottom - 10, TOP) if spread(every) else linear(every, bottom - 10, TOP)
    x = linear([nbytes / divisor for _, nbytes, _ in points], LEFT + 20, RIGHT - 20, zero=False)
    _frame(root, x, y, f"size of the tensors ({unit})", "mean KL divergence (nats)")
    if floor is not None:
        at = y(floor.kld_mean)
        svg.line(root, (LEFT, RIGHT), (at, at), "line floor dashed")
        svg.text(root, LEFT + 6, at - 5, f"noise floor {floor.kld_mean:.2g}")
    for series, ((name, nbytes, one), loss) in enumerate(zip(points, losses, strict=True)):
        px, py = x(nbytes / divisor), y(loss)
        svg.marker(root, px, py, series, f"{name}: {nbytes:,} bytes, {one.kld_mean:.5g} nats")
        late, below = px > (LEFT + RIGHT) / 2, series % 2 and py < bottom - 30
        where = (px - 9 if late else px + 9, py + 15 if below else py - 7)  # neighbours on different sides
        svg.text(root, *where, name, anchor="end" if late else "start")
    return svg.markup(root)


def bits(key: str, cells: Sequence[Cell]) -> str:
    """Stored bits per weight of every matrix: a row for each role, a bar for each layer, coloured by type."""
    found = [cell for cell in cells if cell.is_matrix]
    kinds = sorted({cell.codec for cell in found}, key=lambda codec: (_mean_bits(codec, found), codec))
    title, about = (
        "Bits by tensor",
        "Stored bits per weight of every matrix, a row for each role, a bar for each layer.",
    )
    return _bars(key, title, about, found, lambda cell: cell.bits, "bits", kinds)


def weight_error(key: str, cells: Sequence[Cell]) -> str:
    """Relative error of every matrix's weights, as `bits`."""
    found = [cell for cell in cells if cell.is_matrix and cell.error is not None]
    title, about = "Weight error by tensor", "Relative error of every matrix's weights, in per cent."
    return _bars(key, title, about, found, lambda cell: 100 * (cell.error or 0.0), "%", [])


def _mean_bits(codec: str, cells: Sequence[Cell]) -> float:
    values = [cell.bits for cell in cells if cell.codec == codec]
    return sum(values) / len(values)


def _bars(
    key: str,
    title: str,
    about: str,
    cells: Sequence[Cell],
    value_of: Callable[[Cell], float],
    unit: str,
    kinds: Sequence[str],
) -> str:
    """Small bar charts under each other on one scale. kinds: types to colour by and to name in a legend."""
    rows = _by_role(cells)
    top, row = 34.0, 34.0
    most = max((value_of(cell) for cell in cells), default=0.0) or 1.0
    depth = 1 + max((layer for layers in rows.values() for layer in layers), default=0)
    root = svg.canvas(key, WIDTH, top + row * len(rows) + 46 + (20 if kinds else 0), title, about)
    wide = (VALUES - ROLES) / depth
    svg.text(root, ROLES, top - 12, f"full height: {most:.4g} {unit}")
    svg.text(root, WIDTH - 6, top - 12, f"mean ({unit})", anchor="end")
    for index, (role, layers) in enumerate(rows.items()):
        base = top + row * (index + 1) - 6
        svg.text(root, ROLES - 8, base - 4, role, anchor="end")
        svg.line(root, (ROLES, VALUES), (base, base), "grid")
        means = []
        for layer, group in layers.items():
            mean = sum(map(value_of, group)) / len(group)
            means.append(mean)
            x = ROLES + wide * max(layer, 0)
            style = f"bar s{kinds.index(group[0].codec) % svg.SERIES}" if kinds else "bar s0"
            high = base - max(0.5, (row - 8) * mean / most)
            svg.bar(root, (x + wide * 0.08, x + wide * 0.92), (high, base), style, _tip(group, mean, unit))
        svg.text(root, WIDTH - 6, base - 4, f"{sum(means) / len(means):.4g}", anchor="end")
    bottom = top + row * len(rows)
    x_axis = linear([0, depth - 1], ROLES + wide / 2, VALUES - wide / 2, whole=True)
    for tick in x_axis.ticks:
        svg.text(root, x_axis(tick) if depth > 1 else ROLES + wide / 2, bottom + 12, f"{tick:g}", anchor="middle")
    svg.text(root, (ROLES + VALUES) / 2, bottom + 30, "layer", anchor="middle")
    _legend(root, kinds, bottom + 52)
    return svg.markup(root)


def _legend(root: Element, kinds: Sequence[str], y: float) -> None:
    x = ROLES
    for index, kind in enumerate(kinds):
        group = SubElement(root, "g")
        svg.bar(group, (x, x + 12), (y - 10, y + 2), f"bar s{index % svg.SERIES}", kind)
        svg.text(group, x + 17, y, kind)
        x += 34 + 8 * len(kind)


def _tip(group: Sequence[Cell], mean: float, unit: str) -> str:
    one = group[0]
    many = f" and {len(group) - 1} more" if len(group) > 1 else ""
    return f"{one.name}{many}: {one.codec}, {mean:.4g} {unit}"


def _by_role(cells: Sequence[Cell]) -> dict[str, dict[int, list[Cell]]]:
    """Tensors by role and layer; a layer's experts share a role, a tensor outside the layers stands at -1."""
    found: dict[str, dict[int, list[Cell]]] = {}
    for cell in cells:
        layer = re.search(r"(?<=\.layers\.)\d{1,6}(?=\.)", cell.name)
        role = cell.name.removesuffix(".weight")
        role = re.sub(r"^.*\.layers\.\d+\.", "", role)
        role = re.sub(r"(?<=experts)\.\d+", "", role)
        role = role.removeprefix("model.")
        short = role if len(role) <= 26 else "…" + role[-25:]
        found.setdefault(short, {}).setdefault(int(layer[0]) if layer else -1, []).append(cell)
    return found
