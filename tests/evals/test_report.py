"""The report: well-formed, complete, safe with hostile names, the same bytes for the same input; scales and sizes."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.evals import letters
from tests.evals.memory_reader import MemoryReader, tiny
from weightsmith.evals import report
from weightsmith.evals.report.scales import linear, logarithmic
from weightsmith.evals.ruler import Ruler
from weightsmith.evals.sizes import footprint
from weightsmith.evals.together import together
from weightsmith.evals.weights_error import moved, tensor_errors

HOSTILE = '<script>alert("1")</script>&amp;\x00\x1b[31m\u202eevil\ud800\'"]]>{{ 7*7 }}'


def disturbed(reader: MemoryReader, amount: float, seed: int = 9) -> MemoryReader:
    rng = np.random.default_rng(seed)
    tensors = {
        name: value + np.float32(amount) * value * rng.standard_normal(value.shape, dtype=np.float32)
        if value.ndim > 1
        else value
        for name, value in reader.tensors.items()
    }
    return MemoryReader(reader.config, tensors, reader.tokenizer)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that renders candidates with these labels."""
    letters.install(monkeypatch)
    original = tiny(tokenizer=letters.vocab())

    def render(*labels: str, name: str = "", own: bool = True, gates: str = "") -> str:
        base = replace(original, config=replace(original.config, name=name))
        readers = [disturbed(base, 0.01 * (k + 1)) for k in range(len(labels))]
        measured = together(readers, base, letters.text(150), Ruler(ctx=16), own=own)
        judged = [
            report.Judged(label, footprint(reader), one, ("too much",) if gates and k else (), gates)
            for k, (label, reader, one) in enumerate(zip(labels, readers, measured, strict=True))
        ]
        render.measured = measured  # type: ignore[attr-defined]
        return report.render(base, judged, [tensor_errors(reader, base) for reader in readers], version="1.2.3")

    return render


def parsed(text: str) -> ET.Element:
    head, _, rest = text.partition("\n")
    assert head == "<!DOCTYPE html>"
    return ET.fromstring(rest)


def test_it_holds_the_numbers_and_every_figure(page: Any) -> None:
    text = page("one", "two", name="A model", gates="mean KL divergence <= 1")
    root = parsed(text)
    words = " ".join(root.itertext())
    for one in page.measured:
        for number in (f"{one.kld_mean:.5f}", f"{one.ratio:.4f}", f"{100 * one.drift.final:.2f}"):
            assert number in words
        assert f"layer 1: {100 * one.drift.layers[1]:.4g} %" in words
        assert f"layer 0: {100 * one.drift.own[0]:.4g} %" in words
    assert "✓ met" in words
    assert "✗ missed" in words
    assert "weightsmith 1.2.3" in words
    figures = root.findall(".//{http://www.w3.org/2000/svg}svg")
    assert len(figures) == 3 + 2 * 2  # size, drift, own; bits and error of each
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for figure in figures:
        assert figure.get("role") == "img"
        named = (figure.get("aria-labelledby") or "").split()
        assert len(named) == 2
        assert set(named) <= set(ids)


def test_what_was_not_measured_is_left_out(page: Any) -> None:
    root = parsed(page("alone", own=False))
    assert len(root.findall(".//{http://www.w3.org/2000/svg}svg")) == 1 + 2
    assert "gates" not in " ".join(root.itertext())


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [f"{key}={value}" for key, value in attrs if key in ("href", "src", "style") or key[:2] == "on"]


def test_hostile_names_are_only_text(page: Any) -> None:
    text = page(HOSTILE, "two", name=HOSTILE)
    text.encode("utf-8")
    words = " ".join(parsed(text).itertext())
    assert '<script>alert("1")</script>&amp;' in words
    assert "{{ 7*7 }}" in words
    assert not set(words) & set("\x00\x1b\u202e")
    tags = _Tags()
    tags.feed(text)
    assert "script" not in tags.tags
    assert "a" not in tags.tags
    assert tags.links == []


def test_nothing_is_fetched(page: Any) -> None:
    text = page("one")
    assert "default-src 'none'" in text
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/1999/xhtml", "http://www.w3.org/2000/svg"}
    assert "url(" not in text
    assert "@import" not in text


def test_equal_input_gives_equal_bytes(page: Any) -> None:
    assert page("one", "two") == page("one", "two")


def test_every_colour_is_defined_for_light_and_dark(page: Any) -> None:
    text = page("one")
    for name in set(re.findall(r"var\(--(\w+)\)", text)):
        assert len(re.findall(rf"--{name}: #[0-9a-f]{{6}};", text)) == 2, name


def test_weight_errors_by_a_plain_formula() -> None:
    original = tiny(unit=8)
    candidate = disturbed(original, 0.05)
    errors = tensor_errors(candidate, original)
    assert [one.name for one in errors] == list(original.tensors)
    for one in errors:
        a, b = original.tensors[one.name].astype(np.float64), candidate.tensors[one.name].astype(np.float64)
        assert one.error == pytest.approx(np.sqrt(((b - a) ** 2).sum() / (a**2).sum()), rel=1e-5)
        assert one.bits == 32
    assert not moved(errors)
    candidate.tensors["model.norm.weight"] = candidate.tensors["model.norm.weight"] * 2
    del original.tensors["lm_head.weight"]
    errors = tensor_errors(candidate, original)
    assert moved(errors)
    assert {one.name: one.error for one in errors}["lm_head.weight"] is None


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=8))
def test_scales_keep_every_value_inside(values: list[float]) -> None:
    for scale in (linear(values, 10, 200), logarithmic(values, 10, 200), linear(values, 10, 200, zero=False)):
        for value in values:
            assert 10 - 1e-6 <= scale(value) <= 200 + 1e-6
        pixels = [scale(tick) for tick in scale.ticks]
        assert pixels == sorted(pixels)
        assert 1 <= len(pixels) <= 24


def test_scales_of_odd_values() -> None:
    assert linear([], 0, 1)(0) == 0
    assert linear([0.0, 0.0], 0, 1)(0) == 0
    assert math.isfinite(linear([5.0], 0, 1, zero=False)(5.0))
    assert logarithmic([0.0], 0, 1)(0.0) == 0
    assert linear([0, 31], 0, 31, whole=True).ticks == (0, 10, 20, 30)
    assert logarithmic([1e-3, 0.4], 0, 1).ticks == (0.001, 0.01, 0.1)
    assert logarithmic([0.03, 0.4], 0, 1).ticks == (0.02, 0.05, 0.1, 0.2, 0.5)
