"""Which files of a folder hold the weights, and whether they are all there.

Sharded weights are `model-0000k-of-0000n.safetensors` beside `model.safetensors.index.json`:

    {"metadata": {"total_size": BYTES}, "weight_map": {"TENSOR": "FILE", ...}}

The index and the parts must name the same tensors, each in the file where the index says. `total_size` is not
checked: published indexes count shared tensors in different ways. A folder that has both forms is read as transformers
reads it, the single file first.

Checkpoints from before safetensors are laid out in the same way under names of their own (`TORCH`).

Ref: huggingface.co/docs/safetensors; index check of llama.cpp's conversion/base.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from weightsmith.errors import IntegrityError, NotFoundError, UnsafeInputError
from weightsmith.formats.safetensors.header import AGAIN, MAX_HEADER, Header
from weightsmith.formats.safetensors.strictjson import read_object
from weightsmith.safename import resolve_inside

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX = MAX_HEADER


@dataclass(frozen=True, slots=True)
class Form:
    """How the weight files of a folder are called: the only one, the index of several, and a glob for all."""

    single: str
    index: str
    every: str


SAFETENSORS = Form(SINGLE_NAME, INDEX_NAME, "*.safetensors")
TORCH = Form("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model*.bin")


@dataclass(frozen=True, slots=True)
class Weights:
    """The weight files of a checkpoint in order of name; `weight_map` and `index` only where they are sharded."""

    folder: Path
    files: list[Path]
    index: Path | None = None
    weight_map: Mapping[str, str] | None = None


def is_checkpoint(folder: Path, form: Form = SAFETENSORS) -> bool:
    """True if `folder` holds config.json and weights of `form`, or the index of some that are still missing."""
    has_weights = (folder / form.index).exists() or any(folder.glob(form.every))
    return has_weights and (folder / "config.json").exists()


def find_weights(path: Path, form: Form = SAFETENSORS) -> Weights:
    """Find the weight files of a folder, or take the file `path` for the only one.

    Raises NotFoundError (a shard or all weights are missing), IntegrityError (the index is damaged), UnsafeInputError
    (a name leads out of the folder).
    """
    if not path.is_dir():
        return Weights(path.parent, [path])
    if (path / form.single).exists():
        return Weights(path, [resolve_inside(path, form.single)])
    if (path / form.index).exists():
        return read_index(path, resolve_inside(path, form.index))
    found = sorted(file.name for file in path.glob(form.every))
    if len(found) == 1:
        return Weights(path, [resolve_inside(path, found[0])])
    if found:
        raise NotFoundError(
            f"{len(found)} weight files such as {found[0]!r}, but no {form.index}", path=path, hint=AGAIN
        )
    raise NotFoundError(f"neither {form.single} nor {form.index}", path=path, hint=AGAIN)


def read_index(folder: Path, index: Path) -> Weights:
    """Read the shard index at `index`, "NAME.SUFFIX.index.json" of files *.SUFFIX; raises what `find_weights` does."""
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    weight_map = read_object(index, limit=MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise IntegrityError("no weight_map, expected tensor names and their files", path=index, hint=AGAIN)
    names: dict[str, Path] = {}
    folded: set[str] = set()
    for tensor, name in weight_map.items():
        if isinstance(name, str) and name in names:
            continue
        file = resolve_inside(folder, name, source=index)
        if not name.endswith(suffix):
            raise UnsafeInputError(f"names {name!r}, which is no {suffix[1:]} file", path=index, tensor=tensor)
        if name.casefold() in folded:
            raise UnsafeInputError(f"names {name!r} twice, in upper and lower case", path=index)
        folded.add(name.casefold())
        names[name] = file
    # Path.exists would raise for a name that is too long for the file system.
    missing = sorted(name for name, file in names.items() if not os.path.exists(file))
    if missing:
        raise NotFoundError(
            f"{len(missing)} of {len(names)} weight files are missing, first {missing[0]!r}", path=folder, hint=AGAIN
        )
    return Weights(folder, [names[name] for name in sorted(names)], index, weight_map)


def merge(weights: Weights, headers: Iterable[Header]) -> Header:
    """Join the headers of all files (in their order) into one, held against the index.

    Raises IntegrityError naming a tensor that is twice, missing, unlisted, or in another file than the index says.
    """
    joined = Header({}, {})
    for header in headers:
        for name, info in header.tensors.items():
            if other := joined.tensors.get(name):
                raise IntegrityError(f"stored twice, here and in {other.path}", path=info.path, tensor=name)
            joined.tensors[name] = info
        for key, text in header.metadata.items():
            joined.metadata.setdefault(key, text)
    if weights.weight_map is None or weights.index is None:
        return joined
    for name, file in weights.weight_map.items():
        found = joined.tensors.get(name)
        if found is None:
            raise IntegrityError(
                f"listed for {file}, which does not hold it", path=weights.index, tensor=name, hint=AGAIN
            )
        if found.path != weights.folder / file:
            raise IntegrityError(f"listed for {file}, but stored in {found.path}", path=weights.index, tensor=name)
    for name, info in joined.tensors.items():
        if name not in weights.weight_map:
            raise IntegrityError(f"not listed in {weights.index.name}", path=info.path, tensor=name, hint=AGAIN)
    return joined


def dump_index(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """The index of sharded weights; `total_size` in bytes without headers."""
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
