"""in-toto Statement v1 with a SLSA provenance v1 predicate: which files came from which files, by which recipe.

    subject                       every file of the entry, by SHA-256
    buildDefinition
      buildType                   BUILD_TYPE
      externalParameters          source: digest of the parent checkpoint (store.digest_of); recipe: target and options
      internalParameters          arithmetic: version of the codecs' arithmetic
      resolvedDependencies        see `sources.dependencies`
    runDetails
      builder                     weightsmith and its version
      metadata.finishedOn         the only time in it
      byproducts                  reports of evaluations, by digest (see `reports`); left out where nothing was measured

Everything above runDetails is what decides the bytes; the same derivation has the same buildDefinition wherever it ran.

Ref: in-toto attestation spec/v1/statement.md; SLSA v1.0 provenance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from weightsmith.errors import UsageError
from weightsmith.provenance.reports import byproducts
from weightsmith.provenance.sources import dependencies, file_descriptor
from weightsmith.store import Entry

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:weightsmith:derivation:v1"
MEDIA_TYPE = "application/vnd.in-toto+json"
_TOOL = ("tool", "version", "arithmetic")


def statement(entry: Entry, chain: Sequence[Entry]) -> dict[str, Any]:
    """The statement of `entry`; chain: its ancestors, nearest first. UsageError if it was not made here."""
    if entry.parent is None or entry.recipe is None:
        raise UsageError(
            f"{entry.ref} was pulled, not made here, so there is no derivation to state",
            hint="--format cyclonedx says where it came from.",
        )
    recipe, version = entry.recipe, str(entry.recipe.get("version", ""))
    wanted = {key: value for key, value in recipe.items() if key not in _TOOL}
    definition = {
        "buildType": BUILD_TYPE,
        "externalParameters": {"source": f"sha256:{entry.parent}", "recipe": wanted},
        "internalParameters": {"arithmetic": recipe["arithmetic"]} if "arithmetic" in recipe else {},
        "resolvedDependencies": dependencies(entry, chain),
    }
    details: dict[str, Any] = {
        "builder": {"id": f"pkg:generic/weightsmith@{version}", "version": {"weightsmith": version}},
        "metadata": {"finishedOn": entry.created.replace("+00:00", "Z")},
    }
    details |= {"byproducts": found} if (found := byproducts(entry)) else {}
    return {
        "_type": STATEMENT,
        "subject": [file_descriptor(file) for file in sorted(entry.files, key=lambda file: file.path)],
        "predicateType": PREDICATE,
        "predicate": {"buildDefinition": definition, "runDetails": details},
    }


def text(document: dict[str, Any]) -> str:
    """A statement or a bill as it is written."""
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
