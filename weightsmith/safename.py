"""One check for every file name that comes from outside: repositories, shard indexes, split files, archives.

A name passes only if it is a plain relative path that means the same file on every system and stays below the folder
it is joined to. See also huggingface_hub#4086 and CVE-2024-37032 for what happens without it.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path, PurePosixPath

from weightsmith.errors import UnsafeInputError

MAX_BYTES = 1024
MAX_PART_BYTES = 255  # of one name between slashes, on every common file system
_DIGITS = "123456789\u00b9\u00b2\u00b3"  # Windows reads superscript digits as digits here
_RESERVED = {"con", "prn", "aux", "nul", "conin$", "conout$"}
_RESERVED |= {f"{port}{digit}" for port in ("com", "lpt") for digit in _DIGITS}


def check_name(name: object, *, path: Path | str | None = None) -> PurePosixPath:
    """Return `name` as a relative path, or raise UnsafeInputError saying why not. `path` names the file it stood in."""
    reason = _fault(name)
    if reason:
        raise UnsafeInputError(f"unsafe file name {name!r}: {reason}", path=path, hint="The input was refused.")
    return PurePosixPath(str(name))


def _fault(name: object) -> str | None:
    if not isinstance(name, str):
        return "not a string"
    if not name or len(name.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        return f"empty or longer than {MAX_BYTES} bytes"
    if any(unicodedata.category(c) in ("Cc", "Cs", "Cf", "Zl", "Zp") for c in name):
        return "it holds control or formatting characters"
    if unicodedata.normalize("NFC", name) != name:
        return "it is not in Unicode normal form C"
    if any(c in name for c in '\\:*?"<>|'):
        return "it holds a character that other systems read as a drive, stream or wildcard"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return "it leaves its folder or has an empty part"
        if len(part.encode("utf-8", "surrogatepass")) > MAX_PART_BYTES:
            return f"a part is longer than {MAX_PART_BYTES} bytes"
        if part != part.strip() or part.endswith("."):
            return "a part begins or ends with a space, or ends with a dot"
        if part.split(".")[0].lower() in _RESERVED:
            return "a part is a reserved device name"
    return None


def resolve_inside(folder: Path, name: object, *, source: Path | str | None = None) -> Path:
    """Join a checked `name` to `folder`; raise UnsafeInputError if a symbolic link leads outside it or in a circle."""
    target = folder / check_name(name, path=source)
    real = Path(os.path.realpath(target))
    if real.is_symlink():
        raise UnsafeInputError(f"{name!r} is a link to itself", path=source or folder)
    if not real.is_relative_to(_trusted_root(Path(os.path.realpath(folder)))):
        raise UnsafeInputError(f"{name!r} is a link that leaves its folder", path=source or folder)
    return target


def _trusted_root(folder: Path) -> Path:
    """The folder that links may point into: itself, or the whole cache for a Hugging Face cache snapshot."""
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.parent
    return folder
