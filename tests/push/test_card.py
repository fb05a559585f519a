"""The model card: what the catalog knows, in a form that the hub's own library reads, and nothing that it does not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.oci.whole import put
from weightsmith.catalog import Catalog, Entry
from weightsmith.push.card import card

HUB = "https://huggingface.co"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXT = "sha256:" + "5" * 64
ORIGIN = {"kind": "hf", "repo": "meta/Llama", "commit": COMMIT, "source": f"hf://meta/Llama@{COMMIT}", "endpoint": HUB}
RECIPE = {
    "target": "gguf:Q4_K_M",
    "arithmetic": "7",
    "effort": "best",
    "calibration": {"text": TEXT, "rows": 128, "ctx": 512, "seed": 0, "group_size": 128, "sym": False},
}
MEASURED = {
    "kind": "measurement",
    "key": {"against": "a" * 64, "text": TEXT, "ctx": 512, "convention": "llama.cpp"},
    "kld_mean": 0.0123456,
    "kld_stderr": 0.00045,
    "ratio": 1.0123,
    "perplexity": 8.25,
    "tokens": 1234,
    "when": "2026-11-24T00:00:00+00:00",
}


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "home")


def made(catalog: Catalog, **origin: Any) -> tuple[Entry, list[Entry]]:
    """An original, and what was made from it by RECIPE and measured, with its ancestors."""
    parent = put(catalog, "llama:original", "p", origin=ORIGIN | origin, licence="llama3.1")
    put(catalog, "llama:q4_k_m", "c", parent=parent, recipe=RECIPE, type="Q4_K_M")
    catalog.evaluated("llama:q4_k_m", MEASURED | {"kld_mean": 9.0})
    catalog.evaluated("llama:q4_k_m", MEASURED)
    entry, *chain = catalog.lineage("llama:q4_k_m")
    return entry, chain


def front(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_the_front_matter_is_what_the_hub_reads(catalog: Catalog) -> None:
    from huggingface_hub import ModelCard

    entry, chain = made(catalog)
    text = card(entry, chain, repo="me/Llama-GGUF", endpoint=HUB)
    expected = {
        "license": "llama3.1",
        "base_model": "meta/Llama",
        "base_model_relation": "quantized",
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "q4_k_m", "weightsmith"],
    }
    assert front(text) == expected
    assert {key: value for key, value in ModelCard(text).data.to_dict().items() if value is not None} == expected


def test_the_body_says_source_recipe_hashes_and_the_latest_numbers(catalog: Catalog) -> None:
    entry, chain = made(catalog)
    text = card(entry, chain, repo="me/Llama-GGUF", endpoint=HUB)
    assert f"[meta/Llama]({HUB}/meta/Llama/tree/{COMMIT})" in text
    for word in (
        chain[0].digest,
        entry.digest,
        entry.files[0].sha256,
        TEXT,
        "gguf:Q4_K_M",
        "best",
        "0.0123456 +- 0.00045",
    ):
        assert word in text, word
    assert "| 9 " not in text
    assert "--hf-repo me/Llama-GGUF --hf-file model.gguf" in text
    assert not re.search(r"\bsafe\b", text, re.IGNORECASE)
    assert str(catalog.home) not in text
    assert "2026" not in text, "no time"
    assert text == card(entry, chain, repo="me/Llama-GGUF", endpoint=HUB)


def test_what_is_not_known_is_not_said(catalog: Catalog) -> None:
    path = {
        "kind": "path",
        "path": "/home/somebody/model",
        "source": "/home/somebody/model",
        "repo": None,
        "commit": None,
    }
    entry, chain = made(catalog, **path)
    text = card(entry, chain, repo="me/x", endpoint=HUB)
    assert "somebody" not in text
    assert "base_model" not in front(text)
    entry = put(catalog, "alone:t", "z", licence="My Own Licence v2", more={"LICENSE": b"mine"})
    text = card(entry, [], repo="me/x", endpoint=HUB)
    assert "Nothing was measured" in text
    assert {key: front(text).get(key) for key in ("license", "license_name", "license_link")} == {
        "license": "other",
        "license_name": "my-own-licence-v2",
        "license_link": "LICENSE",
    }
    assert "license" not in front(card(put(catalog, "bare:t", "y"), [], repo="me/x", endpoint=HUB))


def test_a_repository_of_another_hub_is_no_base_model_here(catalog: Catalog) -> None:
    entry, chain = made(catalog, endpoint="https://models.corp.example")
    text = card(entry, chain, repo="me/x", endpoint=HUB)
    assert "corp.example" not in text
    assert "base_model" not in front(text)
    assert front(card(entry, chain, repo="me/x", endpoint="https://models.corp.example"))["base_model"] == "meta/Llama"


def test_records_cannot_write_the_card(catalog: Catalog) -> None:
    """Texts of a record may be a stranger's: no new front matter, cell, heading or link comes out of them."""
    evil = "x`|\n---\nlicense: mit\n# [click](http://evil.example) | `rm -rf`\u202e"
    parent = put(catalog, "m:original", "p", origin=ORIGIN | {"repo": evil}, licence=evil)
    recipe = RECIPE | {"effort": evil, evil: "x", "calibration": {evil: evil}}
    put(catalog, "m:q", "c", parent=parent, recipe=recipe, type=evil)
    catalog.evaluated("m:q", MEASURED | {"key": {"text": evil}, "kld_mean": "0.1", "ratio": float("1e9")})
    entry, *chain = catalog.lineage("m:q")
    text = card(entry, chain, repo="me/x", endpoint=HUB)
    found = front(text)
    assert found["license"] == "other"
    assert "base_model" not in found, "no repository has such a name"
    assert text.count("\n---\n") == 1
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# x",
        "## Files",
        "## Measured",
        "## How to run it",
        "## How to check it",
    ]
    body = text.split("---\n", 2)[2]
    bare = re.sub(r"`[^`]*`", "", body)
    assert not re.search(r"(?<!\\)\]\(http://evil", bare), "brackets are escaped"
    assert "\u202e" not in body
