"""Statements about entries: attached once, found again, gone with their subject."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from tests.oci.whole import check_settled, put
from weightsmith import oci, usage
from weightsmith.catalog import Catalog, Entry
from weightsmith.errors import NotFoundError, UsageError

KIND, TYPE = "application/vnd.test.statement.v1", "application/vnd.in-toto+json"


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "home")


def attach(catalog: Catalog, entry: Entry, data: bytes = b"{}", kind: str = KIND, **notes: str) -> str:
    return oci.attach(catalog.home, entry, artifact_type=kind, media_type=TYPE, data=data, annotations=notes)


def test_what_is_attached_is_found(catalog: Catalog) -> None:
    entry = put(catalog, "m:t")
    assert oci.attached(catalog.home, entry) == []
    first = attach(catalog, entry, b"one", gate="close")
    second = attach(catalog, entry, b"two", "application/other")
    found = oci.attached(catalog.home, entry)
    assert {one.digest for one in found} == {first, second}
    (one,) = oci.attached(catalog.home, entry, KIND)
    assert (one.digest, one.artifact_type, one.media_type) == (first, KIND, TYPE)
    assert one.annotations == {"gate": "close", "org.opencontainers.image.created": one.created}
    assert oci.read(catalog.home, one.data) == b"one"
    layout = check_settled(catalog.home)
    assert layout.keys() == {"m:t", first, second}
    digest, data = oci.manifest_of(catalog.home, entry)
    assert layout[first]["subject"] == {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": digest,
        "size": len(data),
    }
    assert json.loads(oci.read(catalog.home, first)) == layout[first]


def test_the_same_statement_twice_is_one(catalog: Catalog) -> None:
    entry = put(catalog, "m:t")
    assert attach(catalog, entry, a="1") == attach(catalog, entry, a="1")
    assert len({attach(catalog, entry, a="1"), attach(catalog, entry, a="2"), attach(catalog, entry, kind="x")}) == 3
    assert len(oci.attached(catalog.home, entry)) == 3
    created = {"org.opencontainers.image.created": "2020-01-01T00:00:00Z"}
    dated = attach(catalog, entry, **created)
    assert dated == attach(catalog, entry, **created)
    assert oci.attached(catalog.home, entry)[0].digest == dated, "oldest first"
    check_settled(catalog.home)


def test_an_alias_and_a_copy_have_the_statements_too(catalog: Catalog) -> None:
    entry, copy = put(catalog, "m:t"), put(catalog, "copy:t")
    with catalog.reserve("m", "prod") as reservation:
        alias = reservation.link(entry)
    digest = attach(catalog, alias)
    assert [one.digest for one in oci.attached(catalog.home, copy)] == [digest]
    catalog.remove("m:t")
    catalog.remove("m:prod")
    assert [one.digest for one in oci.attached(catalog.home, copy)] == [digest]
    check_settled(catalog.home)
    freed = catalog.remove("copy:t").freed
    assert freed > copy.nbytes
    assert check_settled(catalog.home) == {}
    assert list((catalog.home / "referrers").iterdir()) == []


def test_statements_outlive_evaluations_and_go_when_the_tag_is_made_anew(catalog: Catalog) -> None:
    entry = put(catalog, "m:t")
    attach(catalog, entry)
    entry = catalog.evaluated("m:t", {"ppl": 7.5})
    assert len(oci.attached(catalog.home, entry)) == 1
    entry = put(catalog, "m:t", overwrite=True)
    assert len(oci.attached(catalog.home, entry)) == 1, "the same bytes from the same place"
    entry = put(catalog, "m:t", "b", overwrite=True)
    assert oci.attached(catalog.home, entry) == []
    check_settled(catalog.home)


def test_nothing_hangs_on_what_is_not_there(catalog: Catalog) -> None:
    entry = put(catalog, "m:t")
    catalog.remove("m:t")
    with pytest.raises(NotFoundError):
        attach(catalog, entry)
    with pytest.raises(UsageError):
        attach(catalog, put(catalog, "m:t"), kind="")
    assert oci.attached(catalog.home, entry) == []
    check_settled(catalog.home)


@pytest.mark.parametrize("damage", [b"", b"{}", b"[" * 9000])
def test_a_damaged_statement_is_told_and_left_out(
    catalog: Catalog, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    entry = put(catalog, "m:t")
    lost, kept = attach(catalog, entry, b"one"), attach(catalog, entry, b"two")
    oci.blob_path(catalog.home, lost).write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert [one.digest for one in oci.attached(catalog.home, entry)] == [kept]
    assert lost.removeprefix("sha256:") in caplog.text
    put(catalog, "n:t", "b")
    assert catalog.entries()[0] == entry


def test_what_rm_frees_counts_statements(catalog: Catalog) -> None:
    entry = put(catalog, "m:t")
    attach(catalog, entry, b"x" * 5000)
    index = catalog.home / "index.json"

    def measured() -> int:
        shrinks = (index, catalog.models / ".index")
        return usage.on_disk([catalog.home]) - sum(path.stat().st_size for path in shrinks if path.exists())

    (told,), models = usage.by_entry(catalog)
    assert told.shared == 0
    assert models == {"m": told.freed}
    before = measured()
    assert catalog.remove("m:t").freed == told.freed == before - measured()
