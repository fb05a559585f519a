"""`weightsmith pull`: fetch a checkpoint, verified and pinned, into the catalog."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from weightsmith.cli.options import common, pickle_option, source_argument
from weightsmith.cli.output import emit, fields, size_text

if TYPE_CHECKING:
    from weightsmith.store import Entry

LOCK = "weights.lock"


@click.command("pull")
@source_argument(required=False)
@click.option("--revision", help="Branch, tag or commit of a hub repository; its commit is recorded.")
@click.option("--include", multiple=True, metavar="GLOB", help="Only weights that match; repeatable.")
@click.option("--name", help="Name in the catalog; from the source by default.")
@click.option("--tag", help="Tag in the catalog.  [default: original]")
@click.option("--offline", is_flag=True, help="Use only what is already on this machine.")
@click.option("--force", is_flag=True, help="Replace an entry of the same name and tag.")
@click.option(
    "--lock",
    type=click.Path(dir_okay=False, path_type=Path),
    is_flag=False,
    flag_value=Path(LOCK),
    help=f"Write commit, files and hashes of what was pulled into FILE (by default {LOCK}), beside others there.",
    metavar="[FILE]",
)
@click.option(
    "--locked",
    type=click.Path(dir_okay=False, path_type=Path),
    is_flag=False,
    flag_value=Path(LOCK),
    help="Pull exactly what FILE says, all of it or SOURCE; exit 3 on any difference.",
    metavar="[FILE]",
)
@click.option(
    "--registry",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A registry.yaml whose names come before all others.",
)
@pickle_option
@common
def command(
    source: str | None,
    revision: str | None,
    include: tuple[str, ...],
    name: str | None,
    tag: str | None,
    offline: bool,
    force: bool,
    lock: Path | None,
    locked: Path | None,
    registry: Path | None,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Fetch SOURCE into the catalog.

    Weights come in one format (safetensors if there are any, else GGUF); scripts are never taken, pickles only on
    demand. Every hash that the source publishes is checked before the files become visible. What a stopped run has
    fetched is kept: run the same command again.
    """
    from weightsmith import lock as locks
    from weightsmith.catalog import ORIGINAL, Catalog
    from weightsmith.errors import UsageError
    from weightsmith.pull import pull, pull_locked

    if locked is not None:
        given = {"--revision": revision, "--include": include, "--name": name, "--tag": tag, "--lock": lock}
        for option, value in {**given, "--registry": registry}.items():
            if value:
                raise UsageError(
                    f"{option} does not go with --locked", hint="The lock says what is pulled, and as what."
                )
        models = locks.choose(locks.read(locked), source, locked)
        entries = pull_locked(Catalog(), models, offline=offline, overwrite=force, allow_pickle=allow_pickle)
        told = [_result(entry) for entry in entries] if as_json else []
        emit({"locked": told}, "\n\n".join(map(_text, entries)) or "The lock is empty.", as_json=as_json)
        return
    if source is None:
        before = "The word after --lock is its FILE: write SOURCE before it, or --lock=FILE."
        hint = before if lock is not None else "See weightsmith pull --help."
        raise UsageError("no SOURCE", hint=hint)
    entry = pull(
        Catalog(),
        source,
        name=name,
        tag=tag or ORIGINAL,
        revision=revision,
        include=include,
        offline=offline,
        overwrite=force,
        registry=registry,
        allow_pickle=allow_pickle,
    )
    if lock is not None:
        locks.write(lock, [entry])
    emit(_result(entry) if as_json else {}, _text(entry), as_json=as_json)


def _result(entry: Entry) -> dict[str, object]:
    from weightsmith.pull import found_in

    found = [asdict(one) for one in found_in(entry)]
    files = [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in entry.files]
    result = {"ref": entry.ref, "path": str(entry.path), "bytes": entry.nbytes, "origin": entry.origin}
    return {**result, "files": files, "chat_template": entry.chat_template, "findings": found}


def _text(entry: Entry) -> str:
    return fields({"pulled": entry.ref, "path": entry.path, "size": size_text(entry.nbytes)})
