"""Kills a process before each change it would make to the file system, and looks at what it left. Run by test_kills.py.

For every scenario a home is prepared and copied; a child does the work in the copy and kills itself before its N-th
change, for N = 1, 2, ... until it gets through. After each kill the layout must be whole and every entry sound, as it
was before or as it is to be; after the next write the index must name every entry, and after one `gc` the store must be
exactly one of the two, with nothing left over.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tests.oci.whole import check, check_settled, model, put
from weightsmith import oci, usage
from weightsmith.catalog import Catalog

CHANGES = ("replace", "rename", "link", "unlink", "mkdir", "rmdir", "ftruncate", "pwrite")
MORE = {"config.json": b"{}"}
CREATED = {"org.opencontainers.image.created": "2020-01-01T00:00:00Z"}
KIND = "application/vnd.test.v1"


def empty(catalog: Catalog) -> None:
    """Nothing there yet."""


def two(catalog: Catalog) -> None:
    """Two entries that share a file, and a statement about the first."""
    put(catalog, "m:a", "a", more=MORE)
    put(catalog, "m:b", "b", more=MORE)
    state(catalog, b"first")


def without_blobs(catalog: Catalog) -> None:
    """As homes were before they had blobs; and one file is there twice."""
    put(catalog, "m:a", "a")
    second = put(catalog, "m:b", "a")
    shutil.rmtree(catalog.home / "blobs")
    (catalog.home / "index.json").unlink()
    (catalog.home / "oci-layout").unlink()
    second.path.unlink()
    second.path.write_bytes(model("a"))


def strays(catalog: Catalog) -> None:
    """What killed runs leave."""
    two(catalog)
    (catalog.home / "blobs" / "sha256" / ("0" * 64)).write_bytes(b"x")
    shutil.copytree(catalog.models / "m" / "b", catalog.models / "m" / ".x.gone")
    os.replace(catalog.models / "m" / "b", catalog.models / "m" / ".b.old")
    (catalog.models / ".changing").touch()


def state(catalog: Catalog, data: bytes) -> None:
    entry = catalog.get("m:a")
    oci.attach(catalog.home, entry, artifact_type=KIND, media_type="text/plain", data=data, annotations=CREATED)


def alias(catalog: Catalog) -> None:
    with catalog.reserve("m", "prod") as reservation:
        reservation.link(catalog.get("m:a"))


def gc(catalog: Catalog) -> None:
    usage.collect(catalog, usage.garbage(catalog, older_than=0))


SCENARIOS: dict[str, tuple[Callable[[Catalog], None], Callable[[Catalog], object]]] = {
    "first entry": (empty, lambda catalog: put(catalog, "m:a", "a", more=MORE)),
    "another entry": (two, lambda catalog: put(catalog, "n:c", "c", more=MORE)),
    "a copy of an entry": (two, lambda catalog: put(catalog, "n:a", "a", more=MORE)),
    "replacing": (two, lambda catalog: put(catalog, "m:a", "c", overwrite=True)),
    "alias": (two, alias),
    "removing": (two, lambda catalog: catalog.remove("m:a")),
    "removing the last": (lambda catalog: put(catalog, "m:a") and None, lambda catalog: catalog.remove("m:a")),
    "attaching": (two, lambda catalog: state(catalog, b"second")),
    "taking over": (without_blobs, lambda catalog: put(catalog, "n:c", "c")),
    "taking over by gc": (without_blobs, gc),
    "collecting": (strays, gc),
}


def armed(work: Callable[[Catalog], object], catalog: Catalog, left: int) -> None:
    """Do `work`, and die before change number `left`."""

    def dying(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in CHANGES:
        setattr(os, name, dying(getattr(os, name)))
    work(catalog)


def seen(catalog: Catalog) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Every entry with its digest and its statements."""
    found = {}
    for entry in catalog.entries():
        stated = tuple(one.digest for one in oci.attached(catalog.home, entry))
        found[entry.ref] = (entry.digest, stated)
        for file in entry.files:
            assert (entry.folder / file.path).stat().st_size == file.size, file
    return found


def next_write(catalog: Catalog) -> None:
    """Whatever it is, it makes the index tell the truth again."""
    put(catalog, "next:write", "z")
    assert {name for name in check(catalog.home) if not name.startswith("sha256:")} == {
        entry.ref for entry in catalog.entries()
    }
    catalog.remove("next:write")


def run(home: Path, name: str) -> int:
    """Kill scenario `name` at every change; returns how many there are."""
    prepare, work = SCENARIOS[name]
    before, after, tried = home / "before", home / "after", home / "tried"
    prepare(Catalog(before))
    relinked(before, after)
    work(Catalog(after))
    gc(Catalog(after))
    relinked(before, tried)
    gc(Catalog(tried))
    ends = [seen(Catalog(tried)), seen(Catalog(after))]
    for count in range(1, 1000):
        relinked(before, tried)
        child = os.fork()
        if child == 0:
            try:
                armed(work, Catalog(tried), count)
            except BaseException as error:  # noqa: BLE001  (told by the exit status)
                print(repr(error), file=sys.stderr)
                os._exit(3)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL), f"{name}: change {count}: {status}"
        told = f"{name}: killed before change {count}"
        try:
            if (tried / "index.json").exists():
                check(tried)
            assert all(pair in (*ends[0].items(), *ends[1].items()) for pair in seen(Catalog(tried)).items()), told
            next_write(Catalog(tried))
            gc(Catalog(tried))
            if (tried / "models").is_dir():
                check_settled(tried)
            assert seen(Catalog(tried)) in ends, told
        except AssertionError as error:
            raise AssertionError(told) from error
        if status == 0:
            assert seen(Catalog(tried)) == ends[1], told
            return count - 1
    raise AssertionError(f"{name} does not end")


def relinked(source: Path, target: Path) -> None:
    """Copy a home so that files with several names keep them."""
    shutil.rmtree(target, ignore_errors=True)
    first: dict[int, str] = {}

    def copy(name: str, place: str) -> str:
        inode = os.stat(name).st_ino
        if inode in first:
            os.link(first[inode], place)
        else:
            first[inode] = place
            shutil.copyfile(name, place)
        return place

    if source.exists():
        shutil.copytree(source, target, copy_function=copy)


if __name__ == "__main__":
    os.fsync = lambda _handle: None  # a killed process needs none, and they are what takes long
    print(json.dumps({name: run(Path(sys.argv[1]) / str(k), name) for k, name in enumerate(SCENARIOS)}))
