"""tag, lineage, du, gc, diff and list: what they say of a catalog, and what they leave alone."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.tiny import write_llama
from weightsmith.cli.app import run
from weightsmith.usage import on_disk

Told = Callable[..., dict[str, Any]]
OLD = time.time() - 8 * 24 * 3600


@pytest.fixture
def catalog(tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tiny:original, tiny:f16, tiny:q8_0 made from that; returns the home folder."""
    write_llama(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    told("pull", "tiny")
    told("convert", "tiny", "--to", "gguf")
    told("quantize", "tiny:f16", "--to", "gguf:Q8_0")
    return tmp_path / "weightsmith-home"


def test_an_alias_is_a_model_and_keeps_its_bytes(catalog: Path, told: Told) -> None:
    assert told("tag", "tiny:q8_0", "prod") == told("tag", "tiny:q8_0", "tiny:prod") | {"moved": True}
    path = Path(told("path", "tiny:prod")["path"])
    assert path.read_bytes() == Path(told("path", "tiny:q8_0")["path"]).read_bytes()
    assert os.path.samefile(path, told("path", "tiny:q8_0")["path"])
    assert told("show", "tiny:prod")["catalog"]["alias_of"] == "q8_0"
    assert told("show", "tiny:prod")["catalog"]["lineage"] == ["tiny:prod", "tiny:f16", "tiny:original"]
    digest = told("tag")["aliases"][0]["digest"]
    told("quantize", "tiny:f16", "--to", "gguf:Q4_0", "--tag", "q8_0", "--force")
    assert told("show", "tiny:prod")["catalog"]["digest"] == digest, "the tag was made anew, the alias stays"
    assert told("tag", "tiny:q8_0", "prod")["moved"]
    assert told("show", "tiny:prod")["catalog"]["digest"] != digest
    told("rm", "tiny:prod")
    assert told("tag")["aliases"] == []
    assert Path(told("path", "tiny:q8_0")["path"]).exists()


def test_what_can_be_no_alias(catalog: Path, told: Told) -> None:
    assert "not an alias" in told("tag", "tiny:q8_0", "f16", code=2)["error"]["message"]
    told("tag", "tiny:q8_0", "prod")
    assert "is an alias itself" in told("tag", "tiny:prod", "other", code=2)["error"]["message"]
    assert "stays within its model" in told("tag", "tiny:q8_0", "huge:prod", code=2)["error"]["message"]
    told("tag", "tiny:q8_0", "../x", code=2)


def test_an_alias_that_stands_alone_keeps_the_original_from_being_removed(catalog: Path, told: Told) -> None:
    told("tag", "tiny:q8_0", "prod")
    told("rm", "tiny:q8_0")
    assert "tiny:prod" in told("rm", "tiny:f16", code=2)["error"]["message"]
    assert told("lineage", "tiny:prod")["lineage"] == ["tiny:prod", "tiny:f16", "tiny:original"]


def test_lineage(catalog: Path, told: Told, capsys: pytest.CaptureFixture[str]) -> None:
    told("tag", "tiny:q8_0", "prod")
    found = told("lineage", "tiny:prod")
    assert found["lineage"] == ["tiny:prod", "tiny:f16", "tiny:original"]
    (f16,) = found["family"]["made"]
    (q8,) = f16["made"]
    assert (q8["ref"], q8["aliases"], q8["recipe"]["target"]) == ("tiny:q8_0", ["tiny:prod"], "gguf:Q8_0")
    assert run(["lineage", "tiny:f16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["tiny:original", "`-", "`-"]
    assert lines[2].startswith("   `- tiny:q8_0 = tiny:prod  gguf:Q8_0, ")
    assert lines[1].endswith("<- this")
    dot = told("lineage", "tiny", "--dot")["dot"]
    assert '"tiny:f16" -> "tiny:q8_0";' in dot
    assert '"tiny:prod" -> "tiny:q8_0" [style=dashed];' in dot
    told("rm", "tiny:f16", "--force")
    assert run(["lineage", "tiny:q8_0"]) == 0
    assert "tiny:f16, which is not in the catalog any more" in capsys.readouterr().out
    told("lineage", str(Path("tiny").absolute()), code=2)


def test_records_that_name_each_other_are_no_endless_tree(catalog: Path, told: Told) -> None:
    q8, f16 = (catalog / "models" / "tiny" / tag / "weightsmith.json" for tag in ("q8_0", "f16"))
    f16.write_text(json.dumps(json.loads(f16.read_text()) | {"parent": json.loads(q8.read_text())["digest"]}))
    assert len(told("lineage", "tiny:q8_0")["lineage"]) == 2
    assert told("list", "--tree")["models"]


def test_list_filters_and_sorts(catalog: Path, told: Told, capsys: pytest.CaptureFixture[str]) -> None:
    def refs(*args: str) -> list[str]:
        return [model["ref"] for model in told("list", *args)["models"]]

    assert refs() == ["tiny:f16", "tiny:original", "tiny:q8_0"]
    assert refs("--sort", "size") == ["tiny:original", "tiny:f16", "tiny:q8_0"]
    assert refs("--container", "GGUF") == ["tiny:f16", "tiny:q8_0"]
    assert refs("--type", "q8_0") == refs("*:q8*") == refs("--smaller", "200kB") == ["tiny:q8_0"]
    assert refs("--larger", "200kB") == ["tiny:f16", "tiny:original"]
    assert refs("other*") == refs("--licence", "MIT") == []
    assert run(["list", "--tree"]) == 0
    assert "\n   `- tiny:q8_0" in capsys.readouterr().out


def test_du_counts_shared_bytes_once(catalog: Path, told: Told) -> None:
    told("tag", "tiny:q8_0", "prod")
    found = told("du")
    by_ref = {entry["ref"]: entry for entry in found["entries"]}
    size = Path(told("path", "tiny:q8_0")["path"]).stat().st_size
    assert by_ref["tiny:q8_0"]["shared"] == by_ref["tiny:prod"]["shared"] == size
    assert by_ref["tiny:f16"]["shared"] == 0
    apparent = sum(entry["bytes"] for entry in found["entries"])
    assert found["bytes"] == apparent - size
    # The truth, measured: what removing one entry and then the whole model gives back.
    assert told("rm", "tiny:q8_0")["freed"] == by_ref["tiny:q8_0"]["freed"]
    assert told("du", "tiny:prod")["entries"][0]["shared"] == 0

    def measured() -> int:
        return on_disk([catalog]) - (catalog / "index.json").stat().st_size

    before, promised, removed = measured(), told("du")["models"]["tiny"], 0
    for ref in ("tiny:prod", "tiny:f16", "tiny:original"):
        by_ref = {entry["ref"]: entry for entry in told("du")["entries"]}
        at = measured()
        freed = told("rm", ref)["freed"]
        mine = sum(p.stat().st_size for p in Path("tiny").iterdir()) if ref == "tiny:original" else 0
        assert freed == by_ref[ref]["freed"] == at - measured() - mine
        removed += freed
    assert removed == promised
    assert before - promised == measured() + mine, "of what was pulled from a folder, the folder still holds the bytes"
    assert not list((catalog / "blobs" / "sha256").iterdir())


def test_gc_takes_garbage_and_nothing_else(catalog: Path, told: Told) -> None:
    old = catalog / "work" / "old"
    fresh, held = catalog / "work" / "fresh", catalog / "downloads" / "held"
    for folder in (old, fresh, held, catalog / "staging" / "dead" / "files", catalog / "models" / "tiny" / ".x.gone"):
        folder.mkdir(parents=True)
        (folder / "part").write_bytes(b"x" * 1000)
    (catalog / "staging" / "dead" / ".lock").touch()
    (catalog / "models" / "tiny" / "unknown").mkdir()
    for folder in (old, held):
        for path in (folder / "part", folder):
            os.utime(path, (OLD, OLD))
    before = told("list")["models"]
    with open(held / "part", "rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        planned = told("gc", "--dry-run")
        names = {Path(item["path"]).name for item in planned["garbage"]}
        assert names == {"old", "dead", ".x.gone"}
        assert old.exists(), "a dry run removes nothing"
        assert told("gc")["freed"] == planned["freed"] == 3000
        assert told("gc", "--older-than", "0", "--dry-run")["garbage"][0]["path"] == str(fresh)
    assert not old.exists()
    assert fresh.exists()
    assert held.exists()
    assert (catalog / "models" / "tiny" / "unknown").exists()
    assert told("list")["models"] == before
    assert told("gc", "--older-than", "0")["freed"] == 2000
    assert not held.exists()


def test_gc_follows_no_links(catalog: Path, told: Told, tmp_path: Path) -> None:
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "file").write_text("x")
    os.utime(outside, (OLD, OLD))
    (catalog / "work").mkdir(exist_ok=True)
    (catalog / "work" / "link").symlink_to(outside)
    (catalog / "work" / "w").mkdir()
    (catalog / "work" / "w" / "inner").symlink_to(outside)
    told("gc", "--older-than", "0")
    assert (outside / "file").exists()


def test_diff_of_one_model_in_two_containers(catalog: Path, told: Told) -> None:
    found = told("diff", "tiny", "tiny:f16", "--exit-code")
    assert (found["equal"], found["same_tensors"], found["same_values"]) == (True, 16, 5)
    found = told("diff", "tiny:f16", "tiny:q8_0", "--exit-code", code=1)
    assert {(c["a"], c["b"]) for c in found["changes"] if "q_proj" in c["name"]} == {("64x64 F16", "64x64 Q8_0")}
    assert {c["what"] for c in found["changes"]} == {"tensor"}


def test_diff_finds_each_kind_of_change(tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a = write_llama(tmp_path / "a")
    b = write_llama(tmp_path / "b", rope_theta=20000.0)
    tensors = load_file(b / "model.safetensors")
    tensors["model.norm.weight"][3] += np.float16(1)
    save_file(tensors, b / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((b / "tokenizer_config.json").read_text())
    (b / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ x }}"}))
    found = told("diff", str(a), str(b))
    assert [(c["what"], c["name"]) for c in found["changes"]] == [
        ("config", "rope_theta"),
        ("template", "chat_template"),
        ("tensor", "model.norm.weight"),
    ]
    assert found["changes"][0]["b"] == 20000.0
    assert found["same_tensors"] == 20
    headers = told("diff", str(a), str(b), "--headers")
    assert headers["not_read"] == 21
    assert "tensor" not in {c["what"] for c in headers["changes"]}
    c = write_llama(tmp_path / "c", num_hidden_layers=1, tokenizer=False)
    names = {(c["what"], c["name"]): (c["a"], c["b"]) for c in told("diff", "./a", str(c))["changes"]}
    assert names["config", "n_layers"] == (2, 1)
    assert names["tensor", "model.layers.1.mlp.up_proj.weight"] == ("96x64 F16", None)
    assert names["tokenizer", "tokenizer"] == ("384 tokens", "none")
