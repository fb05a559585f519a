"""What the catalog holds is found again, also when a model arrives within the tick of the clock of another change."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from weightsmith.catalog import Catalog
from weightsmith.sources.listing import Listed
from weightsmith.sources.shelf import Shelf


def test_a_model_that_arrives_in_the_same_tick_is_seen(tmp_path: Path, llama_files: dict[str, bytes]) -> None:
    catalog = Catalog(tmp_path)
    data = llama_files["config.json"]
    wanted = Listed(len(data), hashlib.sha256(data).hexdigest(), "0" * 40)
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder.parent / ".lock").touch()
    before = folder.stat().st_mtime_ns
    shelf = Shelf(tmp_path)
    assert list(shelf.holding(wanted, "config.json")) == []
    with catalog.reserve("tiny", "one") as reservation:
        for name, content in llama_files.items():
            path = reservation.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        reservation.commit(origin={"kind": "path"}, hashes={})
    os.utime(folder, ns=(before, before))
    assert [path.name for path in shelf.holding(wanted, "config.json")] == ["config.json"]
