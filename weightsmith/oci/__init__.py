"""The catalog as an OCI image layout, and statements about entries that hang on their manifests.

    HOME/oci-layout           says that this is one
    HOME/index.json           the manifest of every entry, by name; then the manifests of statements
    HOME/blobs/sha256/HEX     every file once, by content: a hard link of models/NAME/TAG/FILE; manifests; statements
    HOME/referrers/HEX/HEX    which manifest has which statements: empty files, named by digest

Records (see store.py) are the truth. A manifest is a function of a record (manifest.py) and the index one of all
records, so both can be written anew at any time; only what was attached has no other home, and `referrers/` is where
it is known.

The layout (layout.py, index.py) is written under the catalog's lock, in an order that leaves a whole layout wherever a
process dies: blobs before the manifest that names them, manifests before the index, and the other way round when they
go. What is missing (a home from before there were blobs, a killed run) is made up for by the next write.

Sources: opencontainers/image-spec v1.1 (image-layout.md, manifest.md: artifactType, subject), modelpack/model-spec.
"""

from __future__ import annotations

from weightsmith.oci.blobs import CannotLinkError, adopt, blob_path, read, share
from weightsmith.oci.held import Holding, holdings
from weightsmith.oci.layout import (
    begin,
    done,
    drop,
    exclusive,
    holders,
    publish,
    refresh,
    stray,
    sync,
    unite,
    unlinked,
)
from weightsmith.oci.manifest import manifest_of
from weightsmith.oci.referrers import Attached, attach, attached

__all__ = [
    "Attached",
    "CannotLinkError",
    "Holding",
    "adopt",
    "attach",
    "attached",
    "begin",
    "blob_path",
    "done",
    "drop",
    "exclusive",
    "holders",
    "holdings",
    "manifest_of",
    "publish",
    "read",
    "refresh",
    "share",
    "stray",
    "sync",
    "unite",
    "unlinked",
]
