"""Two processes pull one model while a third collects garbage and removes: nothing lost, nothing twice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.loopback.hub import Hub
from tests.oci.whole import check_settled, model
from weightsmith import usage
from weightsmith.catalog import Catalog

ROOT = Path(__file__).parent.parent.parent
ROUNDS = 50

# One line in, one line out: `pull K NAME`, `gc NAME`; the parent sends a round's lines together.
WORKER = """
import sys
from pathlib import Path
from tests.oci.whole import check
from weightsmith import usage
from weightsmith.catalog import Catalog
from weightsmith.errors import NotFoundError
from weightsmith.pull import pull
from weightsmith.store import locked
catalog = Catalog(Path(sys.argv[1]))
def collect():
    for _ in range(3):
        usage.collect(catalog, usage.garbage(catalog))
        with locked(catalog.models / ".lock"):
            check(catalog.home) if (catalog.home / "index.json").exists() else None
print("ready", flush=True)
for line in sys.stdin:
    what, *words = line.split()
    if what == "pull":
        print(pull(catalog, f"hf://o/r{words[0]}", name=words[1]).ref, flush=True)
    else:
        collect()
        try:
            catalog.remove(words[0])
        except NotFoundError:
            pass
        collect()
        print("collected", flush=True)
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.close()


@pytest.mark.slow
def test_two_pulls_and_a_gc(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    for k in range(ROUNDS):
        hub.add(f"o/r{k}", {"model.gguf": model(f"{k}"), "LICENSE": b"the same everywhere"})
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"PYTHONPATH": str(ROOT)}
    env |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", WORKER, str(home)]
    workers = [subprocess.Popen(command, cwd=ROOT, env=env, text=True, bufsize=1, **pipes) for _ in range(3)]  # type: ignore[call-overload]
    expected = set()
    try:
        told = [answers(workers)]
        for k in range(ROUNDS):
            # In every other round the two want it under one name, else under two.
            first, second = (f"m{k}", f"m{k}") if k % 2 else (f"m{k}", f"n{k}")
            for worker, line in zip(workers, (f"pull {k} {first}", f"pull {k} {second}", f"gc n{k - 2}"), strict=True):
                worker.stdin.write(line + "\n")
            told.append(answers(workers))
            assert told[-1] == [f"{first}:original", f"{second}:original", "collected"]
            expected |= {first, second}
            expected.discard(f"n{k - 2}")
    finally:
        for worker in workers:
            worker.stdin.close()
            worker.wait()
            errors = worker.stderr.read()
            worker.stdout.close()
            worker.stderr.close()
            assert not errors.strip(), errors
    catalog = Catalog(home)
    assert {entry.name for entry in catalog.entries()} == expected
    usage.collect(catalog, usage.garbage(catalog, older_than=0))
    check_settled(home)
    assert not list((home / "downloads").glob("[!.]*"))
    fetched = Counter(request.path for request in hub.log if request.method == "GET" and "/resolve/" in request.path)
    assert {path for path, times in fetched.items() if times > 1} == set(), "each file came once"


def answers(workers: list[subprocess.Popen[str]]) -> list[str]:
    lines = [worker.stdout.readline().strip() for worker in workers if worker.stdout is not None]
    for worker, line in zip(workers, lines, strict=True):
        if not line and worker.stderr is not None:
            raise AssertionError(worker.stderr.read())
    return lines
