"""Near misses of names."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.oci.whole import put
from weightsmith import pull as pull_module
from weightsmith.catalog import Catalog
from weightsmith.errors import WeightsmithError
from weightsmith.suggest import lookalike

KNOWN = ["meta-llama/Llama-3.1-8B", "mistralai/Mistral-7B-v0.1", "someone/else"]


@pytest.mark.parametrize(
    ("repo", "other"),
    [
        ("meta-IIama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("meta-1lama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("meta_llama/Llama-3.1-8b-", "meta-llama/Llama-3.1-8B"),
        ("mistra1ai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.1"),
        ("meta-llama/Llama-3.2-8B", None),
        ("meta-llama/Llama-3.1-8B", None),
        ("unsloth/Llama-3.1-8B", None),
        ("mistra1ai/Codestral-22B", None),
    ],
)
def test_lookalikes(repo: str, other: str | None) -> None:
    assert lookalike(repo, KNOWN) == other


def test_a_pull_warns_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """R21: against what the catalog has, without asking anybody."""
    catalog = Catalog(tmp_path / "home")
    put(catalog, "llama-3.1-8b:original", origin={"kind": "hf", "repo": KNOWN[0]})

    def nothing(*_: object, **__: object) -> None:
        raise WeightsmithError("not fetched in this test")

    monkeypatch.setattr(pull_module, "fetch", nothing)
    for repo, words in (("meta-1lama/Llama-3.1-8B", "is not meta-llama/Llama-3.1-8B"), (KNOWN[0], "")):
        caplog.clear()
        with caplog.at_level(logging.WARNING), pytest.raises(WeightsmithError):
            pull_module.pull(catalog, f"hf://{repo}", name="other")
        warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(warned) == bool(words)
        assert words in "".join(warned)
