"""Run one pull in a process of its own and print what came of it as JSON.

huggingface_hub reads its environment when it is imported, so each test that needs another one starts another process.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from weightsmith.catalog import Catalog, Entry
from weightsmith.errors import WeightsmithError
from weightsmith.sources import catalog_name, download, fetch, parse, settle

ROOT = Path(__file__).resolve().parents[2]


def run_pull(home: Path, source: str, *, env: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
    """Pull `source` into the catalog at `home`; returns {"ok": record...} or {"error": class, "exit": code, ...}.

    "said" holds all that the process wrote to stdout and stderr.
    """
    child = start_pull(home, source, env=env, **options)
    stdout, stderr = child.communicate(timeout=120)
    try:
        answer: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise AssertionError(f"no answer; stderr:\n{stderr}") from error
    return {**answer, "said": stdout + stderr}


def start_pull(home: Path, source: str, *, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    """Start what `run_pull` runs."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k != "WEIGHTSMITH_WHEELS"}
    clean |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(home / "hf")}
    clean |= {"WEIGHTSMITH_HOME": str(home / "weightsmith"), "PYTHONPATH": str(ROOT), **(env or {})}
    home.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.loopback.pull", source, json.dumps(options)]
    return subprocess.Popen(command, cwd=ROOT, env=clean, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def take(catalog: Catalog, text: str, *, name: str | None = None, tag: str = "original", **options: Any) -> Entry:
    """Fetch the source `text` into `catalog`: the two steps of a pull, without its shortcuts."""
    source = parse(text)
    with catalog.reserve(name or catalog_name(source), tag) as reservation:
        fetched = fetch(source, reservation.folder, home=catalog.home, **options)
        hashes = {file.path: file.sha256 for file in fetched.files}
        allow_pickle = options.get("allow_pickle", False)
        entry = reservation.commit(origin=fetched.origin, hashes=hashes, allow_pickle=allow_pickle)
        settle(fetched)
        return entry


def main() -> None:
    """Pull what the command line says."""

    logging.basicConfig(level=logging.DEBUG)
    options = json.loads(sys.argv[2])
    download.WAITS = tuple(options.pop("waits", [0, 0]))
    download.CHUNK = options.pop("chunk", download.CHUNK)
    try:
        entry = take(Catalog(), sys.argv[1], **options)
    except WeightsmithError as error:
        answer = {"error": type(error).__name__, "exit": error.exit_code, "text": str(error)}
    else:
        files = {file.path: file.sha256 for file in entry.files}
        answer = {"ok": entry.ref, "files": files, "origin": entry.origin, "path": str(entry.path)}
        answer["container"] = entry.container
        answer |= {"licence": entry.licence, "modules": sorted(sys.modules)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
