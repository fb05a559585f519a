"""SVG as an element tree: text and attributes are escaped by the XML writer, coordinates have two decimals.

Colours are CSS classes (`s0` to `s6`: series, see page.html), so that the page decides them for light and dark. Series
also differ by marker and dash, because colour alone is not enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

SERIES = 7  # colours of the palette
_MARKERS = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",  # circle
    "M-3.5,-3.5h7v7h-7z",  # square
    "M0,-4.5l4.5,8h-9z",  # triangle
    "M0,-5l4,5l-4,5l-4,-5z",  # diamond
    "M0,4.5l4.5,-8h-9z",  # triangle downwards
    "M-1.5,-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",  # plus
    "M-4,-4l3,0l1,2l1,-2l3,0l-2.5,4l2.5,4l-3,0l-1,-2l-1,2l-3,0l2.5,-4z",  # cross
)


def number(value: float) -> str:
    """A coordinate."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def canvas(key: str, width: float, height: float, title: str, description: str) -> Element:
    """An empty drawing with its accessible name. key: unique on the page."""
    root = Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {number(width)} {number(height)}",
            "role": "img",
            "aria-labelledby": f"{key}-title {key}-description",
        },
    )
    SubElement(root, "title", id=f"{key}-title").text = title
    SubElement(root, "desc", id=f"{key}-description").text = description
    return root


def text(parent: Element, x: float, y: float, content: str, *, anchor: str = "start", turned: bool = False) -> Element:
    """A line of text; anchor: start, middle or end at x. turned: upwards."""
    where = {"x": number(x), "y": number(y), "text-anchor": anchor}
    if turned:
        where["transform"] = f"rotate(-90 {number(x)} {number(y)})"
    made = SubElement(parent, "text", where)
    made.text = content
    return made


def line(parent: Element, x: tuple[float, float], y: tuple[float, float], style: str) -> None:
    """A straight line of a CSS class."""
    ends = {"x1": number(x[0]), "x2": number(x[1]), "y1": number(y[0]), "y2": number(y[1])}
    SubElement(parent, "line", ends | {"class": style})


def path(parent: Element, points: Sequence[tuple[float, float]], style: str) -> None:
    """A line through points."""
    steps = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    SubElement(parent, "polyline", {"points": steps, "class": style})


def marker(parent: Element, x: float, y: float, series: int, tip: str = "") -> None:
    """A series' marker, its numbers in a tooltip."""
    style = f"m s{series % SERIES}"
    where = {"d": _MARKERS[series % len(_MARKERS)], "transform": f"translate({number(x)} {number(y)})", "class": style}
    made = SubElement(parent, "path", where)
    if tip:
        SubElement(made, "title").text = tip


def bar(parent: Element, x: tuple[float, float], y: tuple[float, float], style: str, tip: str) -> None:
    """A filled rectangle with a tooltip; x and y are (low, high)."""
    box = {"x": number(x[0]), "y": number(y[0]), "width": number(x[1] - x[0]), "height": number(y[1] - y[0])}
    SubElement(SubElement(parent, "rect", box | {"class": style}), "title").text = tip


def markup(root: Element) -> str:
    """The drawing as text, to stand in a page."""
    return tostring(root, encoding="unicode")
