"""R18: the chat template's hash stands in every record, survives every route, and a change of it is told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_llama
from weightsmith.catalog import Catalog
from weightsmith.cli.app import run
from weightsmith.errors import IntegrityError
from weightsmith.formats import open_reader
from weightsmith.formats.tokenizer.template import template_of

Told = Callable[..., dict[str, Any]]
TEMPLATE = "{% for m in messages %}\r\n{{ m.content }} \u00e9\U0001f600\u2028\t\n{% endfor %}\n"
SHA256 = hashlib.sha256(TEMPLATE.encode()).hexdigest()


def in_config(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))


def in_list(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": named}))


def in_jinja(folder: Path) -> None:
    path = folder / "tokenizer_config.json"  # the file counts, not this
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "other"}))
    (folder / "chat_template.jinja").write_bytes(TEMPLATE.encode())


def in_json(folder: Path) -> None:
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))


def recorded(ref: str) -> str | None:
    return Catalog().get(ref).chat_template


@pytest.mark.slow
@pytest.mark.parametrize("put", [in_config, in_list, in_jinja, in_json])
def test_one_template_on_every_route(
    put: Callable[[Path], None], tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    put(write_llama(tmp_path / "tiny"))
    assert told("pull", "tiny")["chat_template"] == SHA256
    told("convert", "tiny", "--to", "gguf")
    told("quantize", "tiny:f16", "--to", "gguf:Q8_0")
    told("convert", "tiny:q8_0", "--to", "safetensors:F16", "--tag", "back")
    told("convert", "tiny", "--to", "safetensors:BF16", "--tag", "same")
    for ref in ("tiny:original", "tiny:f16", "tiny:q8_0", "tiny:back", "tiny:same"):
        assert recorded(ref) == SHA256, ref
        shown = told("show", ref)
        assert shown["chat_template"] == {"sha256": SHA256, "characters": len(TEMPLATE)}
        assert shown["catalog"]["chat_template_change"] is None
        reader = open_reader(Catalog().path(ref))
        assert template_of(reader) == TEMPLATE
        reader.close()
    bom = json.loads(told_text("provenance", "tiny:q8_0", "--format", "cyclonedx", "-o", "bom.json", at="bom.json"))
    (one,) = [part for part in bom["metadata"]["component"]["components"] if part["name"] == "chat template"]
    assert one["hashes"] == [{"alg": "SHA-256", "content": SHA256}]
    told("export", "tiny:q8_0", "-o", "tiny.tar")
    monkeypatch.setenv("WEIGHTSMITH_HOME", str(tmp_path / "other"))
    told("import", "tiny.tar")
    assert recorded("tiny:q8_0") == SHA256


def told_text(*args: str, at: str) -> str:
    assert run([*args, "-q"]) == 0
    return Path(at).read_text()


def test_another_template_than_the_parents_is_told(
    tmp_path: Path, told: Told, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    in_config(write_llama(tmp_path / "tiny"))
    told("pull", "tiny")
    parent, catalog = Catalog().get("tiny"), Catalog()
    for tag, put in (("swapped", in_jinja), ("lost", lambda folder: None), ("kept", in_config)):
        with catalog.reserve("tiny", tag) as reservation:
            put(write_llama(reservation.folder, seed=1))
            if tag == "swapped":
                (reservation.folder / "chat_template.jinja").write_text("{{ evil }}")
            reservation.commit(parent=parent, recipe={"target": tag})
    evil = hashlib.sha256(b"{{ evil }}").hexdigest()
    assert recorded("tiny:lost") == ""
    words = {
        "swapped": f"the chat template (sha256 {evil[:12]}) is not that of tiny:original, sha256 {SHA256[:12]}",
        "lost": f"the chat template of tiny:original (sha256 {SHA256[:12]}) is missing",
        "kept": None,
    }
    assert {tag: told("show", f"tiny:{tag}")["catalog"]["chat_template_change"] for tag in words} == words
    made = {one["ref"]: one for one in told("lineage", "tiny")["family"]["made"]}
    assert {tag: made[f"tiny:{tag}"]["chat_template_change"] for tag in words} == words
    assert made["tiny:swapped"]["chat_template"] == evil
    capsys.readouterr()
    assert run(["show", "tiny:swapped", "-q"]) == run(["lineage", "tiny", "-q"]) == 0
    assert capsys.readouterr().out.count(str(words["swapped"])) == 2


def test_records_from_before_stay_readable(tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    in_config(write_llama(tmp_path / "tiny"))
    told("pull", "tiny")
    record = Catalog().get("tiny").folder / "weightsmith.json"
    raw = json.loads(record.read_text())
    assert raw.pop("chat_template") == SHA256
    record.write_text(json.dumps(raw))
    assert recorded("tiny") is None
    told("convert", "tiny", "--to", "gguf")
    assert recorded("tiny:f16") == SHA256
    assert told("show", "tiny:f16")["catalog"]["chat_template_change"] is None, "nobody looked at the parent's"
    assert told("show", "tiny")["chat_template"]["sha256"] == SHA256, "the file is looked at, not the record"
    record.write_text(json.dumps(raw | {"chat_template": "../x"}))
    with pytest.raises(IntegrityError):
        recorded("tiny")


def test_an_imported_record_that_lies_about_its_template(tmp_path: Path) -> None:
    import dataclasses

    catalog = Catalog()
    in_config(write_llama(tmp_path / "tiny"))
    entry = catalog.add("tiny", "original", tmp_path / "tiny")
    lying = dataclasses.replace(entry, tag="other", chat_template="0" * 64)
    with catalog.reserve("tiny", "other") as reservation:
        in_config(write_llama(reservation.folder))
        with pytest.raises(IntegrityError, match="chat template"):
            reservation.examine(lying)


@pytest.mark.parametrize("value", [b"3", b'"\\ud800"', b"\xff"])
def test_a_template_that_is_no_text(value: bytes, tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not keep the weights from being pulled, and is not copied anywhere."""
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "tiny")
    if value == b"\xff":
        (tmp_path / "tiny" / "chat_template.jinja").write_bytes(value)
    else:
        (tmp_path / "tiny" / "chat_template.json").write_bytes(b'{"chat_template": ' + value + b"}")
    assert told("pull", "tiny")["chat_template"] is None
    assert "unreadable" in told("show", "tiny")["chat_template"]
    assert told("convert", "tiny", "--to", "gguf", code=3)["error"]["kind"] == "IntegrityError"
