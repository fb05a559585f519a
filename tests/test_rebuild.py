"""rebuild --check: what comes out again, what does not, and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_llama
from weightsmith.formats import open_reader
from weightsmith.store import File, digest_of

Told = Callable[..., dict[str, Any]]


@pytest.fixture
def models(tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tiny:original and, made from it, tiny:f16; returns HOME/models/tiny."""
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "tiny", hidden_size=256, intermediate_size=256, num_attention_heads=4)
    told("pull", "tiny")
    told("convert", "tiny", "--to", "gguf")
    return tmp_path / "weightsmith-home" / "models" / "tiny"


def edit(record: Path, **changes: Any) -> None:
    record.write_text(json.dumps(json.loads(record.read_text()) | changes))


def test_every_kind_of_result_comes_out_again(models: Path, told: Told, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The forge was cold and the smith was late. " * 40)
    told("imatrix", "tiny:original", "--text", "text.txt", "--rows", "2", "--ctx", "32", "-o", "m.gguf")
    override = ("--tensor-type", "attn_v=Q6_K", "--output-type", "q8_0", "--effort", "fast", "--threads", "1")
    told("quantize", "tiny:f16", "--to", "gguf:Q4_K_M", *override)
    told("quantize", "tiny", "--to", "gguf:Q4_0", "--imatrix", "m.gguf", "--split", "100kB")
    told("quantize", "tiny", "--to", "nf4")
    told("convert", "tiny:q4_k_m", "--to", "safetensors", "--tag", "back")
    made = [model["ref"] for model in told("list")["models"] if model["ref"] not in ("tiny:original", "tiny:q4_0")]
    assert len(made) == 4
    for ref in made:
        assert told("rebuild", "--check", ref, "--threads", "2")["equal"], ref
    assert told("rebuild", "--check", "tiny:q4_0", code=2)["error"]["hint"].endswith("--imatrix.")
    found = told("rebuild", "--check", "tiny:q4_0", "--imatrix", "m.gguf")
    assert found["equal"]
    assert len(found["files"]) > 1, "it was split"
    told("rebuild", "--check", "tiny:f16", "--imatrix", "m.gguf", code=2)
    assert list((models.parent.parent / "staging").iterdir()) == [models.parent.parent / "staging" / ".lock"]


@pytest.mark.slow
def test_a_calibrated_result_needs_its_text(models: Path, told: Told, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The forge was cold and the smith was late. " * 40)
    (tmp_path / "other.txt").write_text("Quite another text. " * 80)
    how = ("--calibrate", "text.txt", "--rows", "2", "--ctx", "32", "--group-size", "32")
    told("quantize", "tiny", "--to", "gptq:4", *how)
    told("quantize", "tiny", "--to", "gguf:Q4_0", *how)
    for tag in ("gptq-4", "q4_0"):
        assert told("rebuild", "--check", f"tiny:{tag}", code=2)["error"]["hint"].endswith("--calibrate.")
        other = told("rebuild", "--check", f"tiny:{tag}", "--calibrate", "other.txt", code=2)
        assert "the text is" in other["error"]["message"]
        assert told("rebuild", "--check", f"tiny:{tag}", "--calibrate", "text.txt")["equal"]


def test_an_alias_is_checked_as_what_it_stands_for(models: Path, told: Told) -> None:
    told("tag", "tiny:f16", "prod")
    assert told("rebuild", "--check", "tiny:prod")["equal"]


def test_a_swapped_tensor_is_named(models: Path, told: Told) -> None:
    """A file that was changed together with its record: only making it again can tell."""
    path, record = models / "f16" / "tiny-f16.gguf", models / "f16" / "weightsmith.json"
    data = bytearray(path.read_bytes())
    reader = open_reader(path)
    info = reader.native_infos()["blk.1.ffn_up.weight"]
    reader.close()
    data[info.offset + 6] ^= 1
    path.write_bytes(data)
    found = told("rebuild", "--check", "tiny:f16", code=3)
    assert found["files"][0]["where"].startswith("the file in the catalog was changed: ")
    assert "'blk.1.ffn_up.weight', from byte 6 of" in found["files"][0]["where"]
    file = File("tiny-f16.gguf", len(data), hashlib.sha256(data).hexdigest())
    edit(record, files=[{"path": file.path, "size": file.size, "sha256": file.sha256}], digest=digest_of([file]))
    found = told("rebuild", "--check", "tiny:f16", code=3)
    assert found["files"][0]["where"].startswith("tensor 'blk.1.ffn_up.weight', from byte 6 of")


def test_another_recipe_or_template_is_told(models: Path, told: Told) -> None:
    record = models / "f16" / "weightsmith.json"
    recipe = json.loads(record.read_text())["recipe"]
    edit(record, recipe=recipe | {"version": "0.0.1"})
    found = told("rebuild", "--check", "tiny:f16", code=3)
    assert "the header is not: weightsmith.provenance.tool" in found["files"][0]["where"]
    edit(record, recipe=recipe | {"target": "gguf:Q8_0"})
    assert "again" in told("rebuild", "--check", "tiny:f16", code=3)["files"][0]["where"]


def test_what_cannot_be_repeated_is_refused(models: Path, told: Told) -> None:
    record = models / "f16" / "weightsmith.json"
    recipe = json.loads(record.read_text())["recipe"]
    for changes, code in (
        ({"arithmetic": "1"}, 1),
        ({"arithmetic": None}, 1),
        ({"future": 1}, 1),
        ({"target": "gguf:NONE"}, 2),
        ({"split_bytes": "5"}, 3),
        ({"overrides": [1]}, 3),
        ({"calibration": {"text": "self"}}, 3),
    ):
        edit(record, recipe=recipe | changes)
        told("rebuild", "--check", "tiny:f16", code=code)
    edit(record, recipe=recipe)
    told("rebuild", "tiny:f16", code=2)
    told("rebuild", "--check", "tiny:original", code=2)
    weights = models / "original" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert "the record says" in told("rebuild", "--check", "tiny:f16", code=3)["error"]["message"]
    weights.write_bytes(kept)
    told("rm", "tiny:original", "--force")
    assert "not in the catalog any more" in told("rebuild", "--check", "tiny:f16", code=7)["error"]["message"]


def test_gc_drops_what_came_out_again(models: Path, told: Told) -> None:
    """f16 has a child, prod an alias, seen a measurement, other no known recipe, wrong not its recipe's bytes."""
    for tag in ("child", "aliased", "seen", "other", "wrong"):
        told("convert", "tiny:f16", "--to", "gguf:Q8_0", "--tag", tag)
    told("tag", "tiny:aliased", "prod")
    edit(models / "seen" / "weightsmith.json", evaluations=[{"kind": "measurement"}])
    for tag, change in (("other", {"future": 1}), ("wrong", {"target": "gguf:F16"})):
        record = models / tag / "weightsmith.json"
        edit(record, recipe=json.loads(record.read_text())["recipe"] | change)
    found = told("gc", "--rebuildable", "--dry-run")
    assert [one["ref"] for one in found["rebuildable"]] == ["tiny:child", "tiny:wrong"]
    assert len(told("list")["models"]) == 8
    found = told("gc", "--rebuildable")
    by_ref = {one["ref"]: one for one in found["rebuildable"]}
    assert by_ref["tiny:child"]["kept_because"] is None
    assert by_ref["tiny:child"]["recipe"]["target"] == "gguf:Q8_0"
    assert "again" in by_ref["tiny:wrong"]["kept_because"]
    left = [model["ref"].partition(":")[2] for model in told("list")["models"]]
    assert left == ["aliased", "f16", "original", "other", "prod", "seen", "wrong"]
    told("gc", "--rebuildable", "--unproved")
    assert not (models / "wrong").exists()
    told("gc", "--unproved", code=2)
    told("rm", "tiny:original", "--force")
    for tag in ("aliased", "other", "prod", "seen"):
        told("rm", f"tiny:{tag}")
    assert told("gc", "--rebuildable")["rebuildable"] == [], "its parent is gone"
