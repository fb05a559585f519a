"""What an entry was made from, as package URLs and as in-toto resource descriptors.

    pkg:huggingface/ORG/NAME@COMMIT     a commit of a repository on the Hugging Face Hub
    pkg:pypi/NAME@VERSION               a wheel

What was pulled from another URL or taken from a path has no package URL: its files' digests say what it is, and a path
or a host would say where somebody's machine keeps it.

Ref: purl-spec, types/huggingface and types/pypi; in-toto attestation spec/v1/resource_descriptor.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from weightsmith.sources.source import COMMIT
from weightsmith.store import Entry, File

Descriptor = dict[str, Any]


def purl(entry: Entry) -> str | None:
    """The package URL of what was pulled as `entry`; None where it has none."""
    origin = entry.origin
    repo, commit = origin.get("repo"), origin.get("commit")
    if origin.get("kind") == "hf" and isinstance(repo, str) and isinstance(commit, str) and COMMIT.fullmatch(commit):
        return f"pkg:huggingface/{quote(repo, safe='/')}@{commit}"
    package, version = origin.get("package"), origin.get("version")
    if origin.get("kind") == "pypi" and isinstance(package, str) and isinstance(version, str):
        return f"pkg:pypi/{quote(re.sub(r'[-_.]+', '-', package).lower(), safe='')}@{quote(version, safe='')}"
    return None


def commit_of(entry: Entry) -> str | None:
    """The commit that was pulled as `entry`, 40 hex digits."""
    commit = entry.origin.get("commit")
    return commit if isinstance(commit, str) and COMMIT.fullmatch(commit) else None


def file_descriptor(file: File) -> Descriptor:
    """One file by name and SHA-256."""
    return {"name": file.path, "digest": {"sha256": file.sha256}}


def dependencies(entry: Entry, chain: Sequence[Entry]) -> list[Descriptor]:
    """What `entry` was made from. chain: its ancestors, nearest first, as far as they are in the catalog.

    The parent's files; the repository or package that the first of the chain was pulled from; the calibration text and
    the imatrix by their digests.
    """
    found = [{**file_descriptor(file), "annotations": {"role": "source"}} for file in (chain[0].files if chain else ())]
    root = chain[-1] if chain else None
    if root is not None and (where := purl(root)) is not None:
        found.append(_origin(root, where))
    recipe = entry.recipe or {}
    calibration = recipe.get("calibration")
    text = _sha256(calibration.get("text")) if isinstance(calibration, dict) else None
    if text is not None:
        found.append({"name": "calibration-text", "digest": {"sha256": text}, "annotations": {"role": "calibration"}})
    if (imatrix := _sha256(recipe.get("imatrix"))) is not None:
        # Over the importances themselves (formats.imatrix), which llama-imatrix stores in two forms of file.
        annotations = {"role": "imatrix", "digestOf": "importances"}
        found.append({"name": "imatrix", "digest": {"sha256": imatrix}, "annotations": annotations})
    return found


def _origin(root: Entry, where: str) -> Descriptor:
    found: Descriptor = {"name": where.partition("@")[0].partition("/")[2], "uri": where}
    wheel, commit = root.origin.get("wheel_sha256"), commit_of(root)
    if commit is not None:
        found["digest"] = {"gitCommit": commit}
    elif isinstance(wheel, str):
        found["digest"] = {"sha256": wheel}
    return {**found, "annotations": {"role": "origin"}}


def _sha256(noted: Any) -> str | None:
    """The hex digits of a "sha256:..." of a recipe."""
    return noted.removeprefix("sha256:") if isinstance(noted, str) and noted.startswith("sha256:") else None
