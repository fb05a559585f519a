"""A signed statement: a DSSE envelope with an ed25519 signature, made and checked offline.

    {"payloadType": "application/vnd.in-toto+json", "payload": base64(statement),
     "signatures": [{"keyid": sha256 of the public key's DER form, "sig": base64(signature)}]}

    signed bytes = "DSSEv1" SP len(type) SP type SP len(payload) SP payload

Keys are PEM files as `openssl genpkey -algorithm ed25519` writes them. A signature proves that whoever holds the key
made the statement; the files' hashes, checked here too, tie the bytes on disk to it. Neither says that a model is good.

Ref: secure-systems-lab/dsse, protocol.md and envelope.md; RFC 8032.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith import store
from weightsmith.errors import IntegrityError, NotFoundError, UnsupportedError, UsageError
from weightsmith.progress import progress
from weightsmith.provenance import statement as statements
from weightsmith.safename import check_name

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

MEDIA_TYPE = "application/vnd.dsse.envelope.v1+json"
MAX_ENVELOPE = 32 << 20
MAX_KEY = 1 << 16


def sign(payload: str, key: Path, *, payload_type: str = statements.MEDIA_TYPE) -> dict[str, Any]:
    """The envelope of `payload`, signed by the private key in the PEM file `key`.

    Raises UsageError for a file that holds no plain ed25519 key, UnsupportedError without the cryptography package.
    """
    serialization, ed25519 = _library()
    raw = _read_key(key)
    try:
        private = serialization.load_pem_private_key(raw, password=None)
    except (ValueError, TypeError, _unsupported()) as error:
        raise UsageError("no private key in PEM form without a password", path=key, hint=_KEYS) from error
    if not isinstance(private, ed25519.Ed25519PrivateKey):
        raise UsageError("the key is not of ed25519", path=key, hint=_KEYS)
    body = payload.encode()
    signature = private.sign(_signed_bytes(payload_type, body))
    return {
        "payloadType": payload_type,
        "payload": base64.b64encode(body).decode(),
        "signatures": [{"keyid": _key_id(private.public_key()), "sig": base64.b64encode(signature).decode()}],
    }


def opened(envelope: bytes, key: Path, *, path: Path | None = None) -> dict[str, Any]:
    """The statement in `envelope`, once a signature in it is found to be of the public key in the PEM file `key`.

    path: of the envelope, for messages. Raises IntegrityError for anything else than such an envelope, UsageError for a
    file that holds no ed25519 key.
    """
    public = _public_key(key)
    try:
        parsed = json.loads(envelope)
        kind, body = parsed["payloadType"], base64.b64decode(parsed["payload"], validate=True)
        signatures = [base64.b64decode(one["sig"], validate=True) for one in parsed["signatures"]]
        signed = _signed_bytes(kind, body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error) as error:
        raise IntegrityError("not a DSSE envelope", path=path) from error
    if not any(_holds(public, signature, signed) for signature in signatures):
        raise IntegrityError(
            "no signature in the envelope is of this key", path=path, hint=f"The key's id is {_key_id(public)}."
        )
    if kind != statements.MEDIA_TYPE:
        raise IntegrityError(f"the envelope holds {str(kind)[:60]!r}, expected {statements.MEDIA_TYPE}", path=path)
    try:
        found: dict[str, Any] = json.loads(body)
        sound = found["_type"] == statements.STATEMENT and found["predicateType"] == statements.PREDICATE
        sound = sound and isinstance(found["predicate"]["buildDefinition"], dict) and bool(subjects(found))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError("what was signed is no statement", path=path) from error
    if not sound:
        raise IntegrityError("what was signed is no statement of SLSA provenance v1", path=path)
    return found


def subjects(statement: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 by file name. Raises KeyError or TypeError for no list of subjects, UnsafeInputError for a name."""
    return {str(check_name(one["name"])): str(one["digest"]["sha256"]) for one in statement["subject"]}


def check_files(statement: Mapping[str, Any], where: Path, *, also: frozenset[str] = frozenset()) -> int:
    """Hash the files at `where` (a folder, or the one file) against the statement; returns how many there are.

    also: names in the folder that belong to no statement. Raises IntegrityError for one that differs, is missing or is
    not in the statement, NotFoundError if there is nothing.
    """
    wanted = subjects(statement)
    if not where.exists():
        raise NotFoundError("no such file or folder", path=where)
    if where.is_dir():
        there = {path.relative_to(where).as_posix(): path for path in where.rglob("*") if not path.is_dir()}
        there = {name: path for name, path in there.items() if name not in also}
    else:
        name = where.name if where.name in wanted or len(wanted) != 1 else next(iter(wanted))  # a file may be renamed
        there = {name: where}
    for name in sorted(wanted.keys() | there.keys()):
        if name not in there:
            raise IntegrityError(f"{name!r} is in the statement and not here", path=where)
        if name not in wanted:
            raise IntegrityError("is not in the statement", path=there[name])
    with progress("verify", sum(path.stat().st_size for path in there.values())) as ticker:
        for name, path in there.items():
            found = store.sha256_file(path, ticker)
            if found != wanted[name]:
                raise IntegrityError(f"sha256 is {found}, the statement says {wanted[name]}", path=path)
    return len(wanted)


def check_record(statement: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """IntegrityError if the catalog's record says something else than `statement` does of how the files were made.

    Dependencies are not compared: they follow from the source's digest, and can be told only while the source is there.
    """
    signed, known = (side["predicate"]["buildDefinition"] for side in (statement, expected))
    for name in ("buildType", "externalParameters", "internalParameters"):
        if signed.get(name) != known[name]:
            raise IntegrityError(
                f"{name} of the statement is not what the catalog says",
                hint=f"Signed: {json.dumps(signed.get(name))[:400]}. In the record: {json.dumps(known[name])[:400]}.",
            )


def read_envelope(path: Path) -> bytes:
    """The envelope file at `path`, of a size that one may have."""
    with open(path, "rb") as file:
        found = file.read(MAX_ENVELOPE + 1)
    if len(found) > MAX_ENVELOPE:
        raise IntegrityError(f"more than {MAX_ENVELOPE} bytes, too many for an envelope", path=path)
    return found


_KEYS = "Make one: openssl genpkey -algorithm ed25519 -out key.pem; openssl pkey -in key.pem -pubout -out public.pem"


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization  # noqa: PLC0415  (an extra)
        from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415
    except ImportError as error:
        raise UnsupportedError(
            "signatures need the package cryptography", hint="pip install 'weightsmith[sign]'"
        ) from error
    return serialization, ed25519


def _unsupported() -> type[Exception]:
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415

    found: type[Exception] = UnsupportedAlgorithm
    return found


def _read_key(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(MAX_KEY)


def _public_key(path: Path) -> Ed25519PublicKey:
    serialization, ed25519 = _library()
    try:
        found = serialization.load_pem_public_key(_read_key(path))
    except (ValueError, _unsupported()) as error:
        raise UsageError("no public key in PEM form", path=path, hint=_KEYS) from error
    if not isinstance(found, ed25519.Ed25519PublicKey):
        raise UsageError("the key is not of ed25519", path=path, hint=_KEYS)
    return found


def _key_id(public: Ed25519PublicKey) -> str:
    serialization, _ = _library()
    kind, form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(public.public_bytes(kind, form)).hexdigest()


def _holds(public: Ed25519PublicKey, signature: bytes, signed: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415

    try:
        public.verify(signature, signed)
    except InvalidSignature:
        return False
    return True


def _signed_bytes(kind: str, body: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    name = kind.encode()
    return b"DSSEv1 %d %s %d %s" % (len(name), name, len(body), body)
