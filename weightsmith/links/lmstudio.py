"""LM Studio: HOME/models/PUBLISHER/NAME/, files under their own names.

HOME is what ~/.lmstudio-home-pointer says (one line, written by LM Studio), else ~/.lmstudio, else ~/.cache/lm-studio
of older versions (lmstudio.ai/docs, "Import models"). A models folder chosen in its settings is not looked up: name it
with --root. PUBLISHER is the organisation that a model was pulled from, else `weightsmith`. LM Studio lists GGUF files
(and, on a Mac, MLX folders, which are not made here).
"""

from __future__ import annotations

import shlex
from pathlib import Path

from weightsmith.catalog import Catalog
from weightsmith.errors import UsageError
from weightsmith.links.place import Plan, Way, Wish
from weightsmith.safename import check_name
from weightsmith.store import Entry

POINTER = ".lmstudio-home-pointer"


def plan(catalog: Catalog, entry: Entry, root: Path | None, *, name: str | None, way: Way) -> Plan:
    """The GGUF files of `entry` in the models folder `root`, as `name` (publisher/name)."""
    del catalog, way
    if entry.container != "gguf":
        hint = f"Convert it first: weightsmith convert {entry.ref} --to gguf"
        raise UsageError(f"LM Studio reads GGUF, {entry.ref} is {entry.container}", hint=hint)
    repo = str(entry.origin.get("repo") or "")
    publisher = repo.partition("/")[0] if entry.parent is None and "/" in repo else "weightsmith"
    place = check_name(name or f"{publisher}/{entry.name}")
    if len(place.parts) != 2:
        raise UsageError(f"not a name of LM Studio: {name!r}", hint="Written publisher/name.")
    base = (root or home() / "models").expanduser().absolute()
    wishes = [Wish(base / place / file.path, entry.folder / file.path, file) for file in entry.files]
    wishes = [wish for wish in wishes if wish.target.suffix == ".gguf"]
    undo = " ".join(["rm", *(shlex.quote(str(wish.target)) for wish in wishes)])
    return Plan(base, str(place), wishes, undo)


def home() -> Path:
    """LM Studio's folder."""
    user = Path.home()
    try:
        told = (user / POINTER).read_text(encoding="utf-8").strip().splitlines()
    except (OSError, ValueError):
        told = []
    places = [Path(told[0])] if told else []
    places += [user / ".lmstudio", user / ".cache" / "lm-studio"]
    return next((place for place in places if place.is_absolute() and place.is_dir()), user / ".lmstudio")
