"""A checkpoint that already lies on disk: taken into the catalog without a copy where the file system allows it.

Only the files that its container says belong to it are taken (`Reader.files()`), so a folder's other contents stay out.
A symbolic link may point anywhere inside the folder, or inside the cache for a Hugging Face snapshot; one that leads
elsewhere is refused, since a downloaded folder could so pull in a private file.
"""

from __future__ import annotations

from pathlib import Path

from weightsmith.errors import NotFoundError, UnsafeInputError
from weightsmith.formats import open_reader
from weightsmith.progress import progress
from weightsmith.safename import resolve_inside
from weightsmith.sources import choose
from weightsmith.sources.source import Fetched, FetchedFile, Source
from weightsmith.store import sha256_file, take_in


def fetch(source: Source, into: Path, *, allow_pickle: bool = False) -> Fetched:
    """Take the checkpoint at the path of `source` into folder `into`; the user's files stay as they are.

    allow_pickle: it may consist of pickled weights.

    Raises NotFoundError, UnsupportedError (no container known), UnsafeInputError (a link out of the folder) and what
    opening the container raises.
    """
    path = Path(source.target).expanduser().absolute()  # as readers name their files
    if not path.exists():
        raise NotFoundError("no such file or folder", path=path)
    folder = path if path.is_dir() else path.parent
    reader = open_reader(path, allow_pickle=allow_pickle)
    try:
        container, found = reader.container, reader.files()
    finally:
        reader.close()
    outside = [file for file in found if not file.is_relative_to(folder)]
    if outside:
        raise UnsafeInputError(f"{outside[0]} lies outside the folder", path=path)
    names = choose.check_all(sorted(file.relative_to(folder).as_posix() for file in found), where=str(path))
    files, ways = [], set()
    total = sum((folder / name).stat().st_size for name in names)
    with progress(f"take in {path.name}", total) as ticker:
        for name in names:
            # A file that the user named is his choice, link or not; what lies in a folder may be somebody else's.
            given = path if folder != path and name == path.name else resolve_inside(folder, name, source=path)
            ways.add(take_in(given, into / name))
            target = into / name
            files.append(FetchedFile(name, target.stat().st_size, sha256_file(target, ticker)))
    origin = {"kind": "path", "source": str(path.resolve()), "path": str(path.resolve()), "container": container}
    return Fetched(into, tuple(files), {**origin, "taken": "+".join(sorted(ways))})
