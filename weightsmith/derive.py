"""Deriving: from one entry of the catalog to another, resumable, with its lineage recorded.

Work lies in HOME/work/KEY, where KEY names what is made from what; a killed run's part is found there by the next run
of the same work. What is complete moves into the catalog by rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

from weightsmith import jobs
from weightsmith.catalog import Catalog
from weightsmith.errors import OutputExistsError
from weightsmith.provenance.hung import hang_statement
from weightsmith.store import Entry

log = logging.getLogger(__name__)

STALE_SECONDS = 7 * 24 * 3600  # unfinished work that nobody touched for so long is given up


def derive(
    catalog: Catalog, parent: Entry, target: jobs.Target, options: jobs.Options, *, tag: str
) -> tuple[jobs.Report, Entry]:
    """Make `target` from `parent` and keep it as `parent.name:tag`.

    Raises OutputExistsError if that is taken (unless `options.overwrite`) and what `jobs.convert` raises.
    """
    if catalog.has(parent.name, tag) and not options.overwrite:
        raise OutputExistsError(f"{parent.name}:{tag} is already in the catalog", hint="Pass --force or another --tag.")
    folder = _work_folder(catalog.home, parent, target, options)
    made = folder / (f"{parent.name}-{tag}" + (".gguf" if target.container == "gguf" else ""))
    try:
        named = replace(options, overwrite=True, source_digest=parent.digest)
        report = jobs.convert(parent.path, target, made, named)
        with catalog.reserve(parent.name, tag) as reservation:
            for path in folder.iterdir():
                os.replace(path, reservation.folder / path.name)
            recipe = {"target": str(target)} | options.record()
            recipe |= {key: report.notes[key] for key in ("imatrix", "arithmetic") if key in report.notes}
            entry = reservation.commit(parent=parent, recipe=recipe, overwrite=options.overwrite)
        hang_statement(catalog, entry)
    finally:
        with contextlib.suppress(OSError):  # not empty: a part that the next run goes on with
            folder.rmdir()
    return report, entry


def _work_folder(home: Path, parent: Entry, target: jobs.Target, options: jobs.Options) -> Path:
    root = home / "work"
    for old in root.glob("*"):
        try:
            touched = max(path.lstat().st_mtime for path in [old, *old.rglob("*")])
        except FileNotFoundError:
            continue  # somebody is at work there
        if touched < time.time() - STALE_SECONDS:
            log.info("removed unfinished work that is older than a week: %s", old)
            shutil.rmtree(old, ignore_errors=True)
    work = json.dumps([parent.digest, parent.name, str(target), options.record()], sort_keys=True)
    folder = root / hashlib.sha256(work.encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    return folder
