"""Evaluation reports: attached beside the record, the same bytes everywhere, carried along, gone with the entry."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.oci.whole import check_settled, put
from weightsmith import oci
from weightsmith.catalog import Catalog
from weightsmith.provenance.reports import MEDIA_TYPE, evaluated, reports
from weightsmith.provenance.statement import statement

Told = Callable[..., dict[str, Any]]
KEY = {"against": "a" * 64, "text": "sha256:" + "b" * 64, "ctx": 512, "windows": None, "convention": "llama.cpp"}
MEASURED = {"kind": "measurement", "key": KEY, "kld_mean": 0.01, "ratio": 1.5, "tokens": 9, "when": "2026-01-01T00:00"}
JUDGED = {
    "kind": "gate",
    "gate": "close",
    "limits": {"max_kld": 0.1},
    "passed": True,
    "missed": [],
    "aliases": ["prod"],
}


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """m:q8_0 made from m:original."""
    catalog = Catalog(tmp_path / "weightsmith-home")
    parent = put(catalog, "m:original", "p")
    put(catalog, "m:q8_0", "c", parent=parent, recipe={"target": "gguf:Q8_0", "arithmetic": "1"})
    return catalog


def test_a_report_has_the_numbers_and_neither_time_nor_path(catalog: Catalog) -> None:
    entry = evaluated(catalog, "m:q8_0", MEASURED | {"path": "/home/me/x", "key": KEY | {"file": "/home/me/text"}})
    assert entry.evaluations[-1]["when"] == "2026-01-01T00:00", "the record keeps what it kept"
    (one,) = oci.attached(catalog.home, entry, MEDIA_TYPE)
    data = oci.read(catalog.home, one.data)
    expected = {"format": 1, "kind": "measurement", "model": f"sha256:{entry.digest}", "key": KEY}
    expected |= {"results": {"kld_mean": 0.01, "ratio": 1.5, "tokens": 9}}
    assert data == json.dumps(expected, sort_keys=True, separators=(",", ":")).encode()
    entry = evaluated(catalog, "m:q8_0", JUDGED)
    gate = {"format": 1, "kind": "gate", "model": f"sha256:{entry.digest}", "gate": "close", "limits": {"max_kld": 0.1}}
    found = {one["kind"]: one for one in reports(catalog, entry)}
    assert found == {"measurement": expected, "gate": gate | {"passed": True, "missed": []}}
    assert Catalog(catalog.home).get("m:q8_0").evaluations == entry.evaluations
    check_settled(catalog.home)


def test_the_same_numbers_hang_once_and_others_beside_them(catalog: Catalog) -> None:
    evaluated(catalog, "m:q8_0", MEASURED)
    entry = evaluated(catalog, "m:q8_0", MEASURED | {"when": "2027-01-01T00:00"})
    assert len(entry.evaluations) == 2
    assert len(reports(catalog, entry)) == 1
    entry = evaluated(catalog, "m:q8_0", MEASURED | {"kld_mean": 0.02})
    assert {found["results"]["kld_mean"] for found in reports(catalog, entry)} == {0.01, 0.02}
    entry = evaluated(catalog, "m:q8_0", {"kind": "something else", "ppl": 7.5})
    assert len(reports(catalog, entry)) == 2


def test_reports_travel_and_go_with_the_entry(
    catalog: Catalog, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated(catalog, "m:q8_0", MEASURED)
    entry = evaluated(catalog, "m:q8_0", JUDGED)
    ours = reports(catalog, entry)
    told("export", "m:q8_0", "--with-parents", "-o", str(tmp_path / "m.tar"))
    monkeypatch.setenv("WEIGHTSMITH_HOME", str(tmp_path / "other"))
    told("import", str(tmp_path / "m.tar"))
    other = Catalog(tmp_path / "other")
    assert reports(other, other.get("m:q8_0")) == ours
    assert [one["artifact_type"] for one in told("show", "m:q8_0")["catalog"]["attached"]].count(MEDIA_TYPE) == 2
    check_settled(other.home)
    told("rm", "m:q8_0")
    assert [path for path in (other.home / "referrers").rglob("*") if path.is_file()] == []
    check_settled(other.home)


def test_a_statement_names_them(catalog: Catalog) -> None:
    entry = catalog.get("m:q8_0")
    chain = catalog.lineage("m:q8_0")[1:]
    assert "byproducts" not in statement(entry, chain)["predicate"]["runDetails"]
    entry = evaluated(catalog, "m:q8_0", MEASURED)
    (one,) = oci.attached(catalog.home, entry, MEDIA_TYPE)
    (named,) = statement(entry, chain)["predicate"]["runDetails"]["byproducts"]
    assert named["digest"]["sha256"] == hashlib.sha256(oci.read(catalog.home, one.data)).hexdigest()
    assert named["mediaType"] == MEDIA_TYPE
