"""Containers: bytes on disk to canonical tensors, and back, one package per container.

A container is found by listing this folder: any subpackage that has `sniff`. Each offers:

- `NAME`, and `TYPES`: the codecs its tensors can be written in;
- `sniff(path) -> bool`: cheap, by content (a file's magic, a folder's files), never by suffix alone;
- `open_reader(path) -> Reader`;
- `plan(reader, recipe) -> Plan`: which canonical tensor gets which codec;
- `create(path, config, infos, vocab, *, source, overwrite, split_bytes, file_type, notes, keep) -> Writer`: `source`
  passes on what only its own container has, `file_type` is the plan's, `notes` say where the result comes from, `keep`
  takes over what an unfinished run of the same work left.

One whose writer honours `keep` says `RESUMES = True`. One that is only read (a vendor's original form) has no `TYPES`,
`plan` and `create`. One whose weights may be pickled says `PICKLED = True`, and its `open_reader` takes `allow_pickle`.
`ALIASES` are targets by themselves (`--to nf4`), each one of its types.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path
from types import ModuleType

from weightsmith.errors import NotFoundError, UnsupportedError
from weightsmith.types import Reader

if not __name__.startswith("weightsmith."):
    raise ImportError("import weightsmith.formats")


@cache
def containers() -> dict[str, ModuleType]:
    """Every container by name."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        if module.ispkg:
            package = importlib.import_module(f"{__name__}.{module.name}")
            if hasattr(package, "sniff"):
                found[package.NAME] = package
    return found


def targets() -> dict[str, ModuleType]:
    """The containers that can be written, by name."""
    return {name: package for name, package in containers().items() if hasattr(package, "create")}


def open_reader(path: Path, *, allow_pickle: bool = False) -> Reader:
    """Open whatever checkpoint lies at `path` (a file or a folder).

    allow_pickle: the user asked for pickled weights to be read; nothing in them is run even then.
    Raises NotFoundError (nothing there), UnsupportedError (no container known), IntegrityError or UnsafeInputError
    (the container's header is damaged or hostile, or the weights are pickled and that was not allowed).
    """
    if not path.exists():
        raise NotFoundError("no such file or folder", path=path)
    for container in containers().values():
        if container.sniff(path):
            pickled = getattr(container, "PICKLED", False)
            reader: Reader = container.open_reader(path, **({"allow_pickle": allow_pickle} if pickled else {}))
            return reader
    raise UnsupportedError(
        "not a checkpoint that can be read",
        path=path,
        hint=f"Known containers: {', '.join(containers())}. A folder needs its config.json beside the weights.",
    )
