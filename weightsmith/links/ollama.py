"""Ollama: a blob named by its SHA-256, a config, and a manifest that names both.

    MODELS/blobs/sha256-HEX                                        the GGUF file; the config, JSON
    MODELS/manifests/registry.ollama.ai/library/NAME/TAG           the manifest, JSON

MODELS is $OLLAMA_MODELS, else ~/.ollama/models (a service that runs as its own user has another: --root). Manifest and
config are those of a Docker image, version 2, with the layer type `application/vnd.ollama.image.model` for GGUF; the
config says family, size and quantization for `ollama list` (Ollama's server/images.go and types/model).

Ollama removes blobs that no manifest names when its server starts, so the manifest comes right after its blobs. Chat
templates in Ollama are Go templates: one cannot be made from a Jinja template, so none is written and prompts are
passed on as they are. `FROM NAME:TAG` and `TEMPLATE` in a Modelfile add one, without a copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import closing
from pathlib import Path
from typing import Any

from weightsmith.catalog import Catalog
from weightsmith.errors import UsageError
from weightsmith.links.place import Plan, Way, Wish
from weightsmith.store import Entry

MODEL = "application/vnd.ollama.image.model"
CONFIG = "application/vnd.docker.container.image.v1+json"
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
_HOST, _SPACE = "registry.ollama.ai", "library"
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")  # Ollama's own rule for names and tags


def plan(catalog: Catalog, entry: Entry, root: Path | None, *, name: str | None, way: Way) -> Plan:
    """Blob, config and manifest of the GGUF file of `entry` in the models folder `root`, as `name` (NAME[:TAG])."""
    del catalog, way
    ggufs = [file for file in entry.files if file.path.endswith(".gguf")]
    if entry.container != "gguf" or len(ggufs) != 1:
        what = f"{len(ggufs)} GGUF files" if entry.container == "gguf" else entry.container
        hint = f"Make one: weightsmith convert {entry.ref} --to gguf (without --split)"
        raise UsageError(f"Ollama reads a single GGUF file, {entry.ref} is {what}", hint=hint)
    title, _, tag = (name or entry.ref).partition(":")
    tag = tag or "latest"
    if not _PART.fullmatch(title) or not _PART.fullmatch(tag):
        raise UsageError(f"not a name of Ollama: {name or entry.ref!r}", hint="Give one: --as NAME:TAG")
    base = (root or models()).expanduser().absolute()
    (file,) = ggufs
    config = _compact(_config(entry, file.sha256))
    named = hashlib.sha256(config).hexdigest()
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "digest": f"sha256:{named}", "size": len(config)},
        "layers": [{"mediaType": MODEL, "digest": f"sha256:{file.sha256}", "size": file.size}],
    }
    wishes = [
        Wish(base / "blobs" / f"sha256-{file.sha256}", entry.folder / file.path, file),
        Wish(base / "blobs" / f"sha256-{named}", text=config),
        Wish(base / "manifests" / _HOST / _SPACE / title / tag, text=_compact(manifest)),
    ]
    note = "No chat template goes along; FROM and TEMPLATE in a Modelfile add one."
    return Plan(base, f"{title}:{tag}", wishes, f"ollama rm {title}:{tag}", [note])


def models() -> Path:
    """Ollama's models folder."""
    given = os.environ.get("OLLAMA_MODELS", "").strip()
    return Path(given) if given else Path.home() / ".ollama" / "models"


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def _config(entry: Entry, sha256: str) -> dict[str, Any]:
    from weightsmith.formats import open_reader  # noqa: PLC0415  (planning for another program needs no container)

    with closing(open_reader(entry.path)) as reader:
        family = str(reader.metadata().get("general.architecture", "unknown"))
        weights = sum(info.n_weights for info in reader.native_infos().values())
    target = str((entry.recipe or {}).get("target", ""))
    return {
        "model_format": "gguf",
        "model_family": family,
        "model_families": [family],
        "model_type": f"{weights / 1e9:.1f}B" if weights >= 1e9 else f"{weights / 1e6:.2f}M",
        "file_type": target.partition(":")[2] or entry.type,
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{sha256}"]},
    }
