"""Signed statements: what holds, and every way in which one does not."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_llama
from weightsmith import oci
from weightsmith.catalog import Catalog
from weightsmith.cli.app import run

serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization", reason="the extra `sign` is absent")
ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")


def write_keys(folder: Path, name: str) -> Any:
    """NAME.pem and NAME.pub as openssl writes them; returns the private key."""
    key = ed25519.Ed25519PrivateKey.generate()
    plain, pem = serialization.NoEncryption(), serialization.Encoding.PEM
    (folder / f"{name}.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(public)
    return key


@pytest.fixture
def signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tiny:f16 in the catalog; mine.pem, mine.pub, other.pem, other.pub; envelope.json signed by mine."""
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "tiny")
    assert run(["pull", "tiny", "-q"]) == run(["convert", "tiny", "--to", "gguf", "-q"]) == 0
    write_keys(tmp_path, "mine")
    write_keys(tmp_path, "other")
    assert run(["provenance", "tiny:f16", "--sign", "mine.pem", "-o", "envelope.json", "-q"]) == 0
    return tmp_path


def verify(source: str, key: str = "mine.pub", envelope: str = "envelope.json") -> int:
    return run(["provenance", source, "--verify", key, "--envelope", envelope, "-q", "--json"])


def file_of(home: Path) -> Path:
    return home / "weightsmith-home" / "models" / "tiny" / "f16" / "tiny-f16.gguf"


def test_it_holds_for_the_entry_and_for_its_file_elsewhere(signed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert verify("tiny:f16") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["verified"], told["record"], told["files"]) == (True, True, 1)
    (signed / "renamed.gguf").write_bytes(file_of(signed).read_bytes())
    assert verify("./renamed.gguf") == 0
    assert json.loads(capsys.readouterr().out)["record"] is False


def test_the_signature_is_over_dsse_s_bytes(signed: Path) -> None:
    """Put together by hand as protocol.md of DSSE says, and checked by the library alone."""
    envelope = json.loads((signed / "envelope.json").read_text())
    body = base64.b64decode(envelope["payload"])
    kind = envelope["payloadType"].encode()
    wanted = b" ".join([b"DSSEv1", str(len(kind)).encode(), kind, str(len(body)).encode(), body])
    public = serialization.load_pem_public_key((signed / "mine.pub").read_bytes())
    public.verify(base64.b64decode(envelope["signatures"][0]["sig"]), wanted)
    assert json.loads(body)["predicateType"] == "https://slsa.dev/provenance/v1"


def test_another_key_another_file_another_record(signed: Path) -> None:
    assert verify("tiny:f16", "other.pub") == 3
    path = file_of(signed)
    data = bytearray(path.read_bytes())
    record = path.with_name("weightsmith.json")
    kept = record.read_text()
    changed = json.loads(kept)
    changed["recipe"]["target"] = "gguf:Q8_0"
    record.write_text(json.dumps(changed))
    assert verify("tiny:f16") == 3, "the record says another recipe"
    record.write_text(kept)
    assert verify("tiny:f16") == 0
    data[-1] ^= 1
    path.write_bytes(data)
    assert verify("tiny:f16") == verify(str(path)) == 3, "one bit of one file"


def test_envelopes_that_are_none(signed: Path) -> None:
    envelope = json.loads((signed / "envelope.json").read_text())
    body = json.loads(base64.b64decode(envelope["payload"]))
    body["subject"][0]["digest"]["sha256"] = "0" * 64
    payload = base64.b64encode(json.dumps(body).encode()).decode()
    hostile: list[Any] = [
        envelope | {"payload": payload},
        envelope | {"payloadType": "application/json"},
        envelope | {"signatures": []},
        envelope | {"signatures": [{"sig": ""}]},
        envelope | {"signatures": [{"sig": "!"}]},
        envelope | {"payload": 3},
        envelope | {"payloadType": None},
        [],
        {},
        "x",
    ]
    for bad in hostile:
        (signed / "bad.json").write_text(json.dumps(bad))
        assert verify("tiny:f16", envelope="bad.json") == 3, bad
    (signed / "bad.json").write_bytes(b"[" * 100000)
    assert verify("tiny:f16", envelope="bad.json") == 3


@pytest.mark.parametrize("statement", [[], {}, {"_type": "x"}, "text", {"subject": [{"name": "../x"}]}])
def test_what_is_signed_must_be_a_statement(signed: Path, statement: Any) -> None:
    from weightsmith.provenance.signing import sign

    (signed / "bad.json").write_text(json.dumps(sign(json.dumps(statement), signed / "mine.pem")))
    assert verify("tiny:f16", envelope="bad.json") == 3


def test_a_file_more_or_less_is_told(signed: Path) -> None:
    (signed / "folder").mkdir()
    (signed / "folder" / "tiny-f16.gguf").write_bytes(file_of(signed).read_bytes())
    assert verify("./folder") == 0
    (signed / "folder" / "more.txt").write_text("x")
    assert verify("./folder") == 3
    (signed / "folder" / "tiny-f16.gguf").unlink()
    (signed / "folder" / "more.txt").unlink()
    assert verify("./folder") == 3


def test_keys_that_are_none(signed: Path) -> None:
    assert run(["provenance", "tiny:f16", "--sign", "mine.pub", "-q"]) == 2
    assert run(["provenance", "tiny:f16", "--sign", "envelope.json", "-q"]) == 2
    assert verify("tiny:f16", "mine.pem") == 2
    assert run(["provenance", "tiny:f16", "--envelope", "envelope.json", "-q"]) == 2, "without a key"
    assert run(["provenance", "tiny:f16", "--format", "cyclonedx", "--sign", "mine.pem", "-q"]) == 2
    assert run(["provenance", "tiny:f16", "--verify", "mine.pub", "--attach", "-q"]) == 2


def test_signed_statements_hang_on_the_entry(signed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own hangs there from the start, unsigned; of several signed ones the key's is found."""
    assert run(["provenance", "tiny:f16", "--verify", "mine.pub", "-q"]) == 7, "none is signed yet"
    assert run(["provenance", "tiny:f16", "--sign", "mine.pem", "--attach", "-q"]) == 0
    assert run(["provenance", "tiny:f16", "--sign", "other.pem", "--attach", "-q"]) == 0
    assert run(["provenance", "tiny:f16", "--verify", "mine.pub", "-q"]) == 0
    assert run(["provenance", "tiny:f16", "--verify", "other.pub", "-q"]) == 0
    write_keys(signed, "third")
    assert run(["provenance", "tiny:f16", "--verify", "third.pub", "-q"]) == 3
    capsys.readouterr()
    for _ in range(2):
        assert run(["provenance", "tiny:f16", "--format", "cyclonedx", "--attach", "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out.split("}\n{")[0] + "}")["attached"].startswith("sha256:")
    catalog = Catalog()
    kinds = [one.artifact_type for one in oci.attached(catalog.home, catalog.get("tiny:f16"))]
    assert sorted(kinds) == [
        "application/vnd.cyclonedx+json",
        "application/vnd.dsse.envelope.v1+json",
        "application/vnd.dsse.envelope.v1+json",
        "application/vnd.in-toto+json",
    ]
    (own,) = oci.attached(catalog.home, catalog.get("tiny:f16"), "application/vnd.in-toto+json")
    capsys.readouterr()
    assert run(["provenance", "tiny:f16"]) == 0
    assert json.loads(oci.read(catalog.home, own.data)) == json.loads(capsys.readouterr().out)
    assert run(["tag", "tiny:f16", "prod", "-q"]) == 0
    assert run(["provenance", "tiny:prod", "--verify", "mine.pub", "-q"]) == 0, "an alias has the same manifest"
