"""`weightsmith update`: where the branches point now that models were pulled from, and pulling that."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli.options import common, pickle_option, source_argument
from weightsmith.cli.output import emit, size_text

if TYPE_CHECKING:
    from weightsmith.update import FileChange, Outcome

LOCK = "weights.lock"
_SAID = {
    "same": "nothing to do",
    "pinned": "pinned to a commit, nothing to follow",
    "moved": "would be updated",
    "updated": "updated",
    "refused": "REFUSED, nothing was fetched",
    "failed": "failed",
}


@click.command("update")
@source_argument("names", many=True, required=False)
@click.option("--dry-run", is_flag=True, help="Only say what would change.")
@click.option(
    "--lock",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help=f"The lock whose models to follow, and to rewrite; {LOCK} where there is one.",
)
@click.option(
    "--accept-owner",
    is_flag=True,
    help="Go on although NAME stands for another repository or owner than it did; only with NAMES.",
)
@pickle_option
@common
def command(
    names: tuple[str, ...], dry_run: bool, lock: Path | None, accept_owner: bool, allow_pickle: bool, as_json: bool
) -> None:
    """Ask where the branch of each hub model points now, say what changed, and pull that.

    NAMES are of weights.lock or of the catalog; without any, all of the lock, else all of the catalog. The model is
    replaced in the catalog and its entry in the lock is rewritten. Models that were pulled by commit stay.

    A repository that was made anew, changed its owner, its number on the hub or its name is not followed: somebody else
    may have taken the name. Exit code 8; nothing is fetched. --accept-owner says that the new one is meant.
    """
    from weightsmith.catalog import Catalog
    from weightsmith.errors import UsageError
    from weightsmith.update import choose_models, exit_code, update

    if accept_owner and not names:
        raise UsageError("--accept-owner needs NAMES", hint="Look at each one, and accept it by its name.")
    if lock is None and Path(LOCK).is_file():
        lock = Path(LOCK)
    catalog = Catalog()
    models = choose_models(catalog, names, lock)
    outcomes = update(catalog, models, dry_run=dry_run, accept_owner=accept_owner, allow_pickle=allow_pickle)
    text = "\n".join(_text(outcome) for outcome in outcomes) or "No model was pulled from a hub."
    emit({"models": [_result(outcome) for outcome in outcomes]}, text, as_json=as_json)
    for outcome in outcomes:
        if outcome.error is not None:
            click.echo(f"error: {outcome.ref}: {outcome.error}", err=True)
    if (code := exit_code(outcomes)) != 0:
        raise click.exceptions.Exit(code)


def _result(outcome: Outcome) -> dict[str, Any]:
    changes = outcome.changes
    return {
        "ref": outcome.ref,
        "source": outcome.source,
        "revision": outcome.revision,
        "status": outcome.status,
        "old_commit": outcome.old,
        "new_commit": outcome.new,
        "added": [{"path": one.path, "size": one.new} for one in changes if one.old is None],
        "removed": [{"path": one.path, "size": one.old} for one in changes if one.new is None],
        "changed": [
            {"path": one.path, "old_size": one.old, "size": one.new}
            for one in changes
            if one.old is not None and one.new is not None
        ],
        "reasons": list(outcome.reasons),
        "made_from_the_old": list(outcome.derived),
        "error": outcome.error.told() if outcome.error is not None else None,
    }


def _text(outcome: Outcome) -> str:
    commits = outcome.old[:12]
    if outcome.new not in (None, outcome.old):
        commits += f" -> {str(outcome.new)[:12]}"
    lines = [f"{outcome.ref}  {outcome.source}@{outcome.revision}  {commits}  {_SAID[outcome.status]}"]
    lines += [f"  {_change(one)}" for one in outcome.changes]
    lines += [f"  ! {reason}" for reason in outcome.reasons]
    if outcome.derived:
        lines.append(f"  made from the old files: {', '.join(outcome.derived)}")
    return "\n".join(lines)


def _change(one: FileChange) -> str:
    if one.old is None or one.new is None:
        sign, size = ("+", one.new) if one.old is None else ("-", one.old)
        return f"{sign} {one.path}  {size_text(size or 0)}"
    sizes = size_text(one.new) if one.old == one.new else f"{size_text(one.old)} -> {size_text(one.new)}"
    return f"~ {one.path}  {sizes}"
