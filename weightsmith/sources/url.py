"""One file over https, in chunks and resumed across runs (see download.py).

What has arrived lies in HOME/downloads/KEY/ (KEY: hash of the URL). It belongs together by the pin `#sha256=`, if there
is one, else by the server's strong ETag; without either nothing is resumed. The result is checked against the announced
size and the pin.

No token, cookie or password is ever sent. Redirects lead to https only, and from the outside never into this machine.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from urllib.parse import unquote, urlsplit

from weightsmith.errors import AccessError, IntegrityError, NotFoundError, UnsafeInputError, WeightsmithError
from weightsmith.progress import progress
from weightsmith.safename import check_name
from weightsmith.sources import keep
from weightsmith.sources.connection import Refused
from weightsmith.sources.download import Arrived, Remote
from weightsmith.sources.source import Fetched, FetchedFile, Source, bare_url
from weightsmith.store import take_in


def fetch(source: Source, into: Path, *, home: Path, offline: bool = False) -> Fetched:
    """Fetch the one file of `source` (kind "url") into folder `into`; `home` is the catalog's folder.

    Raises NotFoundError, AccessError, IntegrityError (pin or size), UnsafeInputError (a redirect to where it must not
    lead, or no weights), and WeightsmithError when the network failed; the part is then kept for the next run.
    """
    where = bare_url(source.target)
    name = str(check_name(unquote(urlsplit(source.target).path.rsplit("/", 1)[-1]), path=where))
    if not name.endswith((".gguf", ".safetensors")):
        raise UnsafeInputError(
            f"{name!r} is neither .gguf nor .safetensors", path=where, hint="Others are not fetched."
        )
    if offline:
        raise NotFoundError("offline", path=where, hint="Run without --offline.")
    remote = Remote(source.target, where, identity=source.sha256, refuse=lambda refusal: _refused(refusal, where))

    def fault(arrived: Arrived) -> str:
        pinned = source.sha256
        return "" if pinned in (None, arrived.sha256) else f"sha256 is {arrived.sha256}, {pinned} is pinned"

    key = hashlib.sha256(source.target.encode()).hexdigest()[:32]
    with keep.held(home, key) as folder, progress(f"pull {name}", 0) as ticker:
        keep.finished(folder).unlink(missing_ok=True)  # of a run that got no further; the server may have another now
        arrived, wrong = keep.bring(folder, remote, fault, ticker)
        if wrong:
            raise IntegrityError(wrong, path=where, hint="The server's file is another one.")
        take_in(keep.finished(folder), into / name)
    origin = {"kind": "url", "source": where, "url": where, "etag": arrived.etag, "pinned": source.sha256 is not None}
    return Fetched(into, (FetchedFile(name, arrived.size, arrived.sha256),), origin, (keep.folder_of(home, key),))


def _refused(refusal: Refused, where: str) -> WeightsmithError:
    if refusal.status in (401, 403):
        return AccessError(f"the server refuses (HTTP {refusal.status})", path=where)
    if refusal.status in (404, 410):
        return NotFoundError(f"no such file (HTTP {refusal.status})", path=where)
    return WeightsmithError(f"HTTP {refusal.status}", path=where)
