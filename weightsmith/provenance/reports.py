"""Evaluation reports: what was measured of an entry, and what a gate said, as statements that hang on its manifest.

    artifact type, media type     application/vnd.weightsmith.evaluation.v1+json
    document                      {"format": 1, "model": "sha256:DIGEST", "kind": "measurement" or "gate", ...}

    measurement   key: against (digest of the original), text (SHA-256), ctx, windows, convention, metrics (version);
                  results: ratio, kld_mean, kld_median, kld_99, top1, with standard errors; perplexity,
                  original_perplexity; tokens
    gate          gate (its name), limits, passed, missed

The record in the catalog stays what is read here; this is the same for others, who get it with a copy of the layout, a
bundle or from a registry by the referrers of the manifest. The document is JSON with sorted keys and no spaces, and
holds numbers, digests and names: no time, no path, no host. The same result is the same bytes wherever it was measured,
and hangs there once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from weightsmith import oci
from weightsmith.catalog import Catalog
from weightsmith.errors import WeightsmithError
from weightsmith.oci.manifest import digest_of, to_json
from weightsmith.store import Entry

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/vnd.weightsmith.evaluation.v1+json"
_KEY = ("against", "text", "ctx", "windows", "convention", "metrics")
_RESULTS = (
    *("ratio", "ratio_stderr", "kld_mean", "kld_stderr", "kld_median", "kld_99", "top1", "top1_stderr"),
    *("perplexity", "original_perplexity", "tokens"),
)
_GATE = ("gate", "limits", "passed", "missed")


def report(entry: Entry, result: Mapping[str, Any]) -> bytes | None:
    """The document of one evaluation of the record of `entry`; None for a kind that has none."""
    head = {"format": 1, "model": f"sha256:{entry.digest}", "kind": result.get("kind")}
    if result.get("kind") == "measurement":
        key = result.get("key")
        said = {"key": _of(key, _KEY) if isinstance(key, dict) else {}, "results": _of(result, _RESULTS)}
    elif result.get("kind") == "gate":
        said = _of(result, _GATE)
    else:
        return None
    return to_json(head | said)


def evaluated(catalog: Catalog, ref: str, result: Mapping[str, Any]) -> Entry:
    """Append `result` to the record of `ref` and hang its report there; returns the entry as it is now.

    The record is what counts, so a report that cannot be hung is a warning.
    """
    entry = catalog.evaluated(ref, result)
    try:
        data = report(entry, result)
        if data is not None:
            oci.attach(catalog.home, entry, artifact_type=MEDIA_TYPE, media_type=MEDIA_TYPE, data=data)
    except WeightsmithError as error:
        log.warning("no report of its evaluation hangs on %s: %s", ref, error)
    return entry


def reports(catalog: Catalog, entry: Entry) -> list[dict[str, Any]]:
    """The reports that hang on `entry`, oldest first. Raises IntegrityError for damaged bytes."""
    found = oci.attached(catalog.home, entry, MEDIA_TYPE)
    return [json.loads(oci.read(catalog.home, one.data)) for one in found]


def byproducts(entry: Entry) -> list[dict[str, Any]]:
    """The reports of all evaluations in the record of `entry`, as resource descriptors, each once."""
    documents = [data for result in entry.evaluations if (data := report(entry, result)) is not None]
    return [
        {"name": "evaluation", "digest": {"sha256": digest.removeprefix("sha256:")}, "mediaType": MEDIA_TYPE}
        for digest in dict.fromkeys(map(digest_of, documents))
    ]


def _of(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}
