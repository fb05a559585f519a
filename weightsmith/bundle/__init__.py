"""Entries of a catalog in one file, for a machine that no network reaches: a plain tar of an OCI image layout.

    oci-layout, index.json                  as in HOME (see oci/): the chosen entries by name, and statements about them
    blobs/sha256/HEX                        files, manifests, configurations, statements, each once

So any tool that reads an image layout in a tar reads it. What such a tool has no place for is a statement about an
entry's manifest (`subject`), like all evidence here:

| artifactType | says |
|---|---|
| application/vnd.weightsmith.record.v1+json | the entry's record: name, tag, origin, recipe, evaluations |
| application/vnd.weightsmith.lineage.v1+json | the records of what it was made from, up to the original |
| any other | what was attached to the entry (provenance, bills of materials, reports) |

The bytes depend on the entries alone: names are sorted, times and owners are zero, and where on this machine something
lay is left out. A bundle is hostile input (read.py).
"""

from __future__ import annotations

from weightsmith.bundle.read import Imported, take
from weightsmith.bundle.write import Exported, export

__all__ = ["Exported", "Imported", "export", "take"]
