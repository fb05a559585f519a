"""`weightsmith verify --integrity`: the options, and what is printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from weightsmith.cli.output import emit, size_text, table

if TYPE_CHECKING:
    from weightsmith.integrity import Checked, Damage

F = TypeVar("F", bound=Callable[..., Any])


def integrity_options(function: F) -> F:
    """--integrity, --repair, --from, --offline."""
    for option in (
        click.option("--offline", is_flag=True, help="With --repair: use only what is on this machine."),
        click.option(
            "--from",
            "given",
            multiple=True,
            type=click.Path(exists=True, path_type=Path),
            help="With --repair: a file, or a folder, to look for the right bytes in; repeatable.",
        ),
        click.option("--repair", is_flag=True, help="With --integrity: replace what is damaged by the right bytes."),
        click.option("--integrity", is_flag=True, help="Hash the files of the entries, all without names."),
    ):
        function = option(function)
    return function


def check_integrity(refs: Sequence[str], *, repair: bool, given: Sequence[Path], offline: bool, as_json: bool) -> None:
    """Check the entries `refs` (all of the catalog without), repair if asked to; exit code 3 if damage is left."""
    from weightsmith import integrity, inventory
    from weightsmith.catalog import Catalog
    from weightsmith.errors import IntegrityError, UsageError

    if (given or offline) and not repair:
        raise UsageError("--from and --offline go with --repair")
    catalog = Catalog()
    entries, faults = ([catalog.get(ref) for ref in refs], []) if refs else inventory.read_all(catalog.models)
    checked = integrity.check(catalog, entries)
    damaged = integrity.repair(catalog, checked.damaged, given=given, offline=offline) if repair else checked.damaged
    left = [one for one in damaged if one.repaired is None]
    result = {
        "entries": checked.entries,
        "files": checked.files,
        "bytes": checked.nbytes,
        "damaged": [
            {"ref": one.entry.ref, "path": str(one.path), "wrong": one.wrong, "repaired": one.repaired}
            for one in damaged
        ],
        "records": [str(fault.path) for fault in faults],
        "passed": not left and not faults,
    }
    emit(result, _text(checked, damaged, [str(fault.path) for fault in faults]), as_json=as_json)
    if left or faults:
        click.echo(f"error: {len(left) + len(faults)} of the catalog's files are damaged\n  {_hint(left)}", err=True)
        raise click.exceptions.Exit(IntegrityError.exit_code)


def _text(checked: Checked, damaged: Sequence[Damage], records: Sequence[str]) -> str:
    rows = [(one.entry.ref, one.file.path, one.wrong, one.repaired or "") for one in damaged]
    rows += [("", path, "the record is damaged", "") for path in records]
    said = f"{checked.files} files of {checked.entries} entries read, {size_text(checked.nbytes)}"
    if not rows:
        return f"{said}: all as recorded."
    return "\n\n".join([table(rows, ["model", "file", "what is wrong", "repaired from"]), said])


def _hint(left: Sequence[Damage]) -> str:
    made = sorted({one.entry.ref for one in left if one.entry.parent is not None})
    if made:
        said = f"--repair makes again what it can ({', '.join(made)}), where the parent is sound and no text is needed"
        return f"{said}; --from names a place that has the bytes."
    return "Repair with --repair, which looks in the catalog, at the origin and in what --from names."
