"""CycloneDX 1.6: a bill of materials whose one component is the model.

    metadata.component      machine-learning-model: name, tag as version, licence, architecture, measured quality
      components            every file with its SHA-256; the chat template as a component of its own
      pedigree.ancestors    what it was made from, nearest first; the original with its package URL and commit
      properties            digest, container, type, recipe

A chat template is a program that runs with the model, and can be changed without touching a weight, so it has a hash of
its own (asked for in CycloneDX/specification issue 862). The serial number is derived from the digest: the same entry
has the same bill.

Ref: ECMA-424 (CycloneDX 1.6), bom-1.6.schema.json.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from weightsmith._version import __version__
from weightsmith.errors import WeightsmithError
from weightsmith.provenance.sources import commit_of, purl
from weightsmith.store import Entry, File

MEDIA_TYPE = "application/vnd.cyclonedx+json"
SPEC = "1.6"

# Hub metadata writes licences in small letters; SPDX identifiers are case-sensitive in the schema.
_SPDX = {
    identifier.lower(): identifier
    for identifier in (
        *("Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0"),
        *("CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "GPL-3.0", "AGPL-3.0", "LGPL-3.0", "MPL-2.0", "Unlicense", "ISC"),
    )
}
_METRICS = {
    "kld_mean": "mean KL divergence, nats per token",
    "ratio": "perplexity ratio",
    "top1": "top-1 agreement",
}


@dataclass(frozen=True, slots=True)
class Model:
    """What the files say: the family (None if it is not known) and the chat template's text (None if there is none)."""

    family: str | None = None
    chat_template: str | None = None


def read_model(entry: Entry) -> Model:
    """What the files of `entry` say, from headers and the tokenizer; nothing of what this version cannot read."""
    from weightsmith import formats  # noqa: PLC0415  (a bill of what is known needs no container)
    from weightsmith.formats.tokenizer.template import template_of  # noqa: PLC0415

    try:
        reader = formats.open_reader(entry.path)
    except WeightsmithError:
        return Model()
    try:
        template = template_of(reader)
        try:
            return Model(reader.config.family, template)
        except WeightsmithError:
            return Model(None, template)
    except WeightsmithError:
        return Model()
    finally:
        reader.close()


def bill(entry: Entry, chain: Sequence[Entry], model: Model) -> dict[str, Any]:
    """The bill of `entry`. chain: its ancestors, nearest first, as far as they are in the catalog."""
    serial = uuid.uuid5(uuid.NAMESPACE_URL, f"urn:weightsmith:{entry.ref}:{entry.digest}")
    found = _component(entry, ref=f"model:{entry.digest}")
    found["components"] = [_file(file) for file in sorted(entry.files, key=lambda file: file.path)]
    if model.chat_template is not None:
        found["components"].append(_template(model.chat_template))
    if chain:
        found["pedigree"] = {"ancestors": [_component(one, ref=f"ancestor:{one.digest}") for one in chain]}
        if (commit := commit_of(chain[-1])) is not None:
            found["pedigree"]["commits"] = [{"uid": commit}]
    found["modelCard"] = _card(entry, model)
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC,
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {
            "timestamp": entry.created.replace("+00:00", "Z"),
            "tools": {"components": [{"type": "application", "name": "weightsmith", "version": __version__}]},
            "component": found,
        },
        "components": [],
    }


def _component(entry: Entry, *, ref: str) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "machine-learning-model", "bom-ref": ref, "name": entry.name, "version": entry.tag}
    if len(entry.files) == 1:
        found["hashes"] = [_hash(entry.files[0].sha256)]
    if entry.licence:
        spdx = _SPDX.get(entry.licence.lower())
        found["licenses"] = [{"license": {"id": spdx} if spdx else {"name": entry.licence}}]
    if (where := purl(entry)) is not None:
        found["purl"] = where
    if (commit := commit_of(entry)) is not None:
        found["pedigree"] = {"commits": [{"uid": commit}]}
    properties = {"digest": f"sha256:{entry.digest}", "container": entry.container, "type": entry.type}
    if entry.recipe is not None:
        properties["recipe"] = json.dumps(entry.recipe, sort_keys=True, ensure_ascii=False)
    if len(entry.files) > 1 and ref.startswith("ancestor:"):
        found["components"] = [_file(file, within=entry) for file in sorted(entry.files, key=lambda file: file.path)]
    found["properties"] = [{"name": f"weightsmith:{name}", "value": value} for name, value in properties.items()]
    return found


def _file(file: File, *, within: Entry | None = None) -> dict[str, Any]:
    ref = f"file:{within.digest + ':' if within else ''}{file.path}"
    return {"type": "file", "bom-ref": ref, "name": file.path, "hashes": [_hash(file.sha256)]}


def _template(chat_template: str) -> dict[str, Any]:
    from weightsmith.formats.tokenizer.template import template_sha256  # noqa: PLC0415  (as in read_model)

    data = [{"type": "source-code", "name": "chat template", "classification": "jinja"}]
    return {
        "type": "data",
        "bom-ref": "chat-template",
        "name": "chat template",
        "hashes": [_hash(template_sha256(chat_template))],
        "data": data,
    }


def _card(entry: Entry, model: Model) -> dict[str, Any]:
    parameters: dict[str, Any] = {"task": "text-generation"}
    if model.family is not None:
        parameters["architectureFamily"] = model.family
    card: dict[str, Any] = {"modelParameters": parameters}
    measured = [item for item in entry.evaluations if item.get("kind") == "measurement"]
    metrics = [
        {"type": said, "value": f"{float(measured[-1][name]):.6g}"}
        for name, said in _METRICS.items()
        if measured and isinstance(measured[-1].get(name), (int, float))
    ]
    return card | ({"quantitativeAnalysis": {"performanceMetrics": metrics}} if metrics else {})


def _hash(sha256: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": sha256}
