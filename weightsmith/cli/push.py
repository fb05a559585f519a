"""`weightsmith push`: upload an entry of the catalog to a model hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli.options import common, source_argument
from weightsmith.cli.output import emit, fields, size_text, table

if TYPE_CHECKING:
    from weightsmith.push import Planned
    from weightsmith.store import Entry

_README = {
    "own": "the entry's own",
    "kept": "the repository's, kept",
    "written": "a card, written",
    "replaced": "a card, replacing the repository's",
}


@click.command("push")
@source_argument("model")
@click.argument("target", metavar="hf://ORG/REPO[@BRANCH]")
@click.option("--private", is_flag=True, help="Make a new repository private; refuse one that is there and public.")
@click.option("--message", help="Of the commit; names the entry by default.")
@click.option("--card", is_flag=True, help="Write a model card even where the repository has a README.md.")
@click.option("--check", is_flag=True, help="Hash every file of MODEL first; sizes are always checked.")
@click.option("--dry-run", is_flag=True, help="Say what would be sent and what is there already; change nothing.")
@common
def command(
    model: str,
    target: str,
    private: bool,
    message: str | None,
    card: bool,
    check: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Upload MODEL, with a model card, in one commit; what the hub lists afterwards is compared with the catalog.

    Repository and branch are made where they are missing. What is there already is not sent again, and nothing is
    deleted. The token is that of `hf auth login` or HF_TOKEN; the hub is HF_ENDPOINT.
    """
    from weightsmith import push as pushing
    from weightsmith.catalog import Catalog

    catalog = Catalog()
    entry, where = catalog.get(model), pushing.target_of(target)
    if dry_run:
        planned = pushing.plan(catalog, entry, where, check=check, card=card, dry=True)
        result = _result(entry, planned) | {"dry_run": True}
        told = "nothing to send" if not planned.nbytes else f"{size_text(planned.nbytes)} would be sent"
        emit(result, "\n\n".join([_table(planned), _text(entry, planned, {"send": told})]), as_json=as_json)
        return
    done = pushing.push(catalog, entry, where, private=private, message=message, check=check, card=card)
    url = f"{done.planned.endpoint}/{done.planned.repo}/tree/{done.commit}"
    result = _result(entry, done.planned) | {"dry_run": False, "commit": done.commit, "changed": done.changed}
    shown = {"commit": done.commit, "url": url, "sent": size_text(done.planned.nbytes) if done.changed else "nothing"}
    emit(result | {"url": url}, _text(entry, done.planned, shown), as_json=as_json)


def _result(entry: Entry, planned: Planned) -> dict[str, Any]:
    files = [
        {"path": one.file.path, "size": one.file.size, "sha256": one.file.sha256, "state": one.state}
        for one in planned.items
    ]
    place = {"ref": entry.ref, "repo": planned.repo, "branch": planned.branch, "new_repository": not planned.exists}
    return place | {"bytes": planned.nbytes, "files": files, "readme": planned.readme, "card": planned.card}


def _table(planned: Planned) -> str:
    rows = [(one.file.path, size_text(one.file.size), one.file.sha256[:16], one.state) for one in planned.items]
    return table(rows, ["file", "size", "sha256", "on the hub"])


def _text(entry: Entry, planned: Planned, more: dict[str, str]) -> str:
    where = f"hf://{planned.repo}@{planned.branch}{'' if planned.exists else ', a new repository'}"
    return fields({"model": entry.ref, "to": where, "README.md": _README[planned.readme], **more})
