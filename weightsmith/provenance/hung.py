"""Statements, bills and signatures that hang on an entry's manifest in the image layout (see `weightsmith.oci`).

    artifact type                                     what
    application/vnd.in-toto+json                      the statement; hung there when the entry is made
    application/vnd.dsse.envelope.v1+json             a signed statement, on demand
    application/vnd.cyclonedx+json                    a bill of materials, on demand

They travel with a copy of the layout, to a registry for instance, and go with the last entry of the same manifest.
"""

from __future__ import annotations

import logging
from typing import Any

from weightsmith import oci
from weightsmith.catalog import Catalog
from weightsmith.errors import WeightsmithError
from weightsmith.provenance import statement as statements
from weightsmith.store import Entry

log = logging.getLogger(__name__)


def hang(catalog: Catalog, entry: Entry, document: dict[str, Any], media_type: str) -> str:
    """Hang `document` on `entry`; returns the digest of its manifest. The same document hangs there once."""
    data = statements.text(document).encode()
    return oci.attach(catalog.home, entry, artifact_type=media_type, media_type=media_type, data=data)


def hung(catalog: Catalog, entry: Entry, media_type: str) -> list[bytes]:
    """The documents of one type that hang on `entry`, oldest first, each verified against its digest."""
    return [oci.read(catalog.home, one.data) for one in oci.attached(catalog.home, entry, media_type)]


def hang_statement(catalog: Catalog, entry: Entry) -> None:
    """Hang the statement on an entry that was just made. It can be told at any time, so a failure is a warning."""
    try:
        told = statements.statement(entry, catalog.lineage(entry.ref)[1:])
        hang(catalog, entry, told, statements.MEDIA_TYPE)
    except WeightsmithError as error:
        log.warning("no statement hangs on %s: %s", entry.ref, error)
