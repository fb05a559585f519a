"""A model of the catalog where another program looks for it, without a second copy of its bytes.

| into | what appears there | module |
|---|---|---|
| a folder | the files under their own names | folder.py |
| `hf` | huggingface_hub's cache: blobs, a snapshot of the commit, its branch | hf.py |
| `ollama` | a blob, its config and a manifest | ollama.py |
| `lmstudio` | models/PUBLISHER/NAME/ | lmstudio.py |

Each module turns an entry into a list of `Wish`es; `place.py` fulfils all of them or none. What stands there already
and is the same is left as it is; what is another's is never replaced, moved or removed.

A hard link is the same file under a second name, so a program that edits it in place edits the catalog's: none of these
does, and `verify --integrity` would tell. Removing either name leaves the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from weightsmith.catalog import Catalog
from weightsmith.errors import UsageError
from weightsmith.links import folder, hf, lmstudio, ollama
from weightsmith.links.place import Placed, Way, fulfil
from weightsmith.store import Entry

PROGRAMS: Mapping[str, ModuleType] = {"hf": hf, "ollama": ollama, "lmstudio": lmstudio}


@dataclass(frozen=True, slots=True)
class Linked:
    """What now stands where. ref: what the program calls it. undo: the command that takes it away."""

    root: Path
    ref: str
    placed: tuple[Placed, ...]
    undo: str
    notes: tuple[str, ...] = field(default=())


def link(
    catalog: Catalog, entry: Entry, into: str, *, way: Way = "link", name: str | None = None, root: Path | None = None
) -> Linked:
    """Make `entry` appear in the store of the program `into` (a key of `PROGRAMS`), or in the folder of that path.

    way: "link" (reflink, else hard link), "symlink" or "copy". name: what the program shall call it, by default as the
    catalog does. root: the program's folder, by default the one that it uses itself.

    Raises UsageError (the program cannot use this entry, or no link is possible), OutputExistsError (something else
    stands there), NotFoundError (`hf` without a listing of the commit), IntegrityError, ResourceError.
    """
    program = PROGRAMS.get(into)
    if program is None:
        if name is not None or root is not None:
            raise UsageError("--as and --root are for programs", hint=f"Known: {', '.join(PROGRAMS)}.")
        program, root = folder, Path(into)
    plan = program.plan(catalog, entry, root, name=name, way=way)
    return Linked(plan.root, plan.ref, tuple(fulfil(plan.wishes, way)), plan.undo, tuple(plan.notes))
