"""`weightsmith provenance`: statements and bills of materials, signed and checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli.options import common, source_argument
from weightsmith.cli.output import emit

if TYPE_CHECKING:
    from weightsmith.catalog import Catalog
    from weightsmith.locate import Located

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("provenance")
@source_argument()
@click.option(
    "--format",
    "form",
    type=click.Choice(["slsa", "cyclonedx"]),
    default="slsa",
    show_default=True,
    help="An in-toto statement with SLSA provenance, or a CycloneDX bill of materials.",
)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write to this file.")
@click.option("--force", is_flag=True, help="Replace the file.")
@click.option("--sign", "key", type=_FILE, metavar="KEY", help="Wrap the statement in a DSSE envelope, signed.")
@click.option("--attach", is_flag=True, help="Hang it on the entry's manifest in the catalog.")
@click.option("--verify", "public", type=_FILE, metavar="PUBKEY", help="Check a signed statement and the files.")
@click.option("--envelope", type=_FILE, help="The signed statement to check; by default one that hangs on the entry.")
@common
def command(
    source: str,
    form: str,
    output: Path | None,
    force: bool,
    key: Path | None,
    attach: bool,
    public: Path | None,
    envelope: Path | None,
    as_json: bool,
) -> None:
    """Say where SOURCE comes from: which files it was made from, by which recipe and arithmetic.

    --sign KEY takes an ed25519 key in PEM form. --verify PUBKEY checks the signature, the hash of every file and, of a
    catalog entry, its record; it needs no network, and exits with 3 where anything differs. SOURCE may then also be a
    file or folder that is in no catalog, with its --envelope.
    """
    from weightsmith.catalog import Catalog
    from weightsmith.errors import UsageError
    from weightsmith.locate import locate

    if key is not None and (public is not None or form != "slsa"):
        raise UsageError("--sign signs a statement: it goes with neither --verify nor --format cyclonedx")
    if public is not None and (attach or output is not None):
        raise UsageError("--verify makes nothing that could be kept: it goes with neither --attach nor -o")
    if envelope is not None and public is None:
        raise UsageError("--envelope is for --verify PUBKEY")
    catalog = Catalog()
    located = locate(source, catalog)
    if public is not None:
        _verify(source, located, catalog, public, envelope, as_json=as_json)
        return
    document, media_type = _document(source, located, catalog, form)
    if key is not None:
        from weightsmith.provenance import signing

        document, media_type = signing.sign(_text(document), key), signing.MEDIA_TYPE
    where = _kept(catalog, located, document, media_type, attach=attach, output=output, force=force)
    if not where:
        emit(document, _text(document).rstrip("\n"), as_json=False)
        return
    emit({"format": form, "signed": key is not None} | where, "\n".join(where.values()), as_json=as_json)


def _kept(
    catalog: Catalog,
    located: Located,
    document: dict[str, Any],
    media_type: str,
    *,
    attach: bool,
    output: Path | None,
    force: bool,
) -> dict[str, str]:
    """Write it to a file and hang it on the entry, as asked; returns where it is."""
    from weightsmith.atomic import refuse_existing, write_text
    from weightsmith.provenance.hung import hang

    where = {}
    if output is not None:
        refuse_existing(output, overwrite=force)
        write_text(output, _text(document))
        where["path"] = str(output)
    if attach and located.entry is not None:
        where["attached"] = hang(catalog, located.entry, document, media_type)
    return where


def _text(document: dict[str, Any]) -> str:
    from weightsmith.provenance.statement import text

    return text(document)


def _document(source: str, located: Located, catalog: Catalog, form: str) -> tuple[dict[str, Any], str]:
    """The statement or bill of a catalog entry, and its media type."""
    from weightsmith.errors import UsageError
    from weightsmith.provenance import bom, statement

    entry = located.entry
    if entry is None:
        raise UsageError(
            f"{source!r} is not in the catalog, so nothing is known of where it comes from",
            hint="--verify PUBKEY --envelope FILE checks it against a signed statement.",
        )
    chain = catalog.lineage(entry.ref)[1:]
    if form == "cyclonedx":
        return bom.bill(entry, chain, bom.read_model(entry)), bom.MEDIA_TYPE
    return statement.statement(entry, chain), statement.MEDIA_TYPE


def _verify(
    source: str, located: Located, catalog: Catalog, public: Path, envelope: Path | None, *, as_json: bool
) -> None:
    from weightsmith.provenance import signing
    from weightsmith.store import RECORD

    found = _opened(source, located, catalog, public, envelope)
    entry = located.entry
    where = entry.folder if entry is not None else located.path
    files = signing.check_files(found, where, also=frozenset({RECORD}) if entry is not None else frozenset())
    recorded = entry is not None and entry.parent is not None
    if recorded:
        signing.check_record(found, _document(source, located, catalog, "slsa")[0])
    made = found["predicate"]["buildDefinition"].get("externalParameters", {})
    result = {"source": source, "files": files, "verified": True, "record": recorded}
    emit(
        result | {"derived_from": made.get("source"), "recipe": made.get("recipe")},
        f"The signature holds, and so do the hashes of {files} file(s): {source} is what was signed.",
        as_json=as_json,
    )


def _opened(source: str, located: Located, catalog: Catalog, public: Path, envelope: Path | None) -> dict[str, Any]:
    """The statement that is signed by `public`: of the file `envelope`, else the latest that hangs on the entry."""
    from weightsmith.errors import IntegrityError, NotFoundError
    from weightsmith.provenance import signing
    from weightsmith.provenance.hung import hung

    if envelope is not None:
        return signing.opened(signing.read_envelope(envelope), public, path=envelope)
    there = hung(catalog, located.entry, signing.MEDIA_TYPE) if located.entry is not None else []
    if not there:
        hint = "Pass --envelope FILE, or sign it: weightsmith provenance REF --sign KEY --attach"
        raise NotFoundError(f"no signed statement hangs on {source}", hint=hint)
    fault = None
    for one in reversed(there):
        try:
            return signing.opened(one, public)
        except IntegrityError as error:
            fault = fault or error
    raise IntegrityError(f"none of the {len(there)} signed statements of {source} holds: {fault}") from fault
