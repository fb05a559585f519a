"""The hub's refusals in our words, told apart so that the user knows what to do.

Without a token the hub answers 401 both for what does not exist and for what is private; with one it can say more:

| what the hub says | token | becomes |
|---|---|---|
| GatedRepo | no | AccessError: accept the licence, then log in |
| GatedRepo | yes | AccessError: the licence was not accepted by this account |
| 401 bad credentials | yes | AccessError: the token is wrong or expired |
| RepoNotFound, 401 | no | NotFoundError: no such repository, or it is private |
| RepoNotFound | yes | NotFoundError: no such repository for this account |
| RevisionNotFound, EntryNotFound | any | NotFoundError |
| 429, 5xx, no connection | any | WeightsmithError: run again, what has arrived is kept |

The listing comes through huggingface_hub, whose exceptions are read here; files come through our own client, whose
`Refused` carries the same codes.
"""

from __future__ import annotations

import errno

from weightsmith.errors import AccessError, NotFoundError, ResourceError, WeightsmithError
from weightsmith.sources.connection import Refused

PASSING = (408, 429, 500, 502, 503, 504)
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_AGAIN = "Run the same command again: what has arrived is kept and is not fetched twice."
_LOGIN = "run `hf auth login` or set HF_TOKEN"


def connection_errors() -> tuple[type[BaseException], ...]:
    """What huggingface_hub raises when the hub or the way to it fails, or its answer makes no sense."""
    from huggingface_hub import errors  # noqa: PLC0415

    http: type[BaseException] = vars(errors)["HTTPError"]  # of the HTTP client that huggingface_hub itself uses
    return (http, OSError, errors.EntryNotFoundError, ValueError, KeyError, TypeError, RuntimeError)


def is_passing(error: BaseException) -> bool:
    """Whether a further try may succeed without anybody doing anything."""
    from huggingface_hub import errors  # noqa: PLC0415

    error = _root(error)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return False
    status = _status(error)
    if status is not None:
        return status in PASSING
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.FileMetadataError)):
        return False
    if isinstance(error, OSError) and error.errno in _LOCAL:
        return False
    return isinstance(error, (OSError, vars(errors)["HTTPError"]))


def explain(error: BaseException, *, repo: str, revision: str, where: str) -> WeightsmithError:
    """The error to raise for `error`, which huggingface_hub met while asking about `repo` at `revision`."""
    from huggingface_hub import errors  # noqa: PLC0415

    cause = _root(error)
    if isinstance(cause, errors.OfflineModeIsEnabled):
        hint = "Pull it once without --offline and HF_HUB_OFFLINE."
        return NotFoundError("offline, and not on this machine", path=where, hint=hint)
    status = _status(cause)
    codes = {
        "GatedRepo": errors.GatedRepoError,
        "RepoNotFound": errors.RepositoryNotFoundError,
        "RevisionNotFound": errors.RevisionNotFoundError,
        "EntryNotFound": errors.EntryNotFoundError,
    }
    code = next((code for code, kind in codes.items() if isinstance(cause, kind)), "")
    if isinstance(cause, errors.LocalEntryNotFoundError):
        code = ""
    refusal = _by_code(code, status, repo, revision, where)
    if refusal is not None:
        return refusal
    if isinstance(cause, OSError) and cause.errno in _LOCAL:
        kind = ResourceError if cause.errno in (errno.ENOSPC, errno.EDQUOT) else WeightsmithError
        hint = "The cache is at $HF_HOME; free some space there or set HF_HOME to a larger disk."
        return kind(f"cannot write to the Hugging Face cache ({cause.strerror})", path=where, hint=hint)
    if status is not None:
        told = "asks to slow down" if status == 429 else "failed"
        return WeightsmithError(f"the hub {told} (HTTP {status})", path=where, hint=_AGAIN)
    if is_passing(cause):
        return WeightsmithError(f"the connection failed ({_short(cause)})", path=where, hint=_AGAIN)
    return WeightsmithError(
        f"the answer is not one of a hub ({_short(cause)})", path=where, hint="Check HF_ENDPOINT, proxy and firewall."
    )


def explain_refusal(refusal: Refused, *, repo: str, revision: str, where: str) -> WeightsmithError:
    """The error to raise for a file that the hub refuses to send."""
    code = refusal.code
    if not code and refusal.status == 401 and "invalid credentials" not in refusal.message.lower():
        code = "RepoNotFound"  # as huggingface_hub reads a bare 401
    if not code and refusal.status in (404, 410):
        code = "EntryNotFound"
    found = _by_code(code, refusal.status, repo, revision, where)
    return found or WeightsmithError(f"the hub failed (HTTP {refusal.status})", path=where, hint=_AGAIN)


def _by_code(code: str, status: int | None, repo: str, revision: str, where: str) -> WeightsmithError | None:
    """The refusal that the hub's X-Error-Code, or a bare status, means; None for what is no refusal."""
    if code == "RepoNotFound":
        return _no_repository(repo, where)
    if code == "RevisionNotFound":
        hint = f"See the branches and tags at https://huggingface.co/{repo}/tree/main."
        return NotFoundError(f"no revision {revision!r}", path=where, hint=hint)
    if code == "EntryNotFound":
        return NotFoundError(f"no such file at revision {revision!r}", path=where)
    if code == "GatedRepo" or status in (401, 403):
        return _no_access(repo, where, gated=code == "GatedRepo")
    return None


def _no_access(repo: str, where: str, *, gated: bool) -> AccessError:
    from huggingface_hub import get_token  # noqa: PLC0415

    page = f"https://huggingface.co/{repo}"
    if gated and get_token() is None:
        hint = f"Accept the licence at {page}, then {_LOGIN}."
        return AccessError("this repository is gated and no token was found", path=where, hint=hint)
    if gated:
        hint = f"Accept it at {page} with the account of your token; some owners grant access only after a while."
        return AccessError("the licence was not accepted for this token's account", path=where, hint=hint)
    if get_token() is None:
        return AccessError("access needs a token and none was found", path=where, hint=f"To log in, {_LOGIN}.")
    return AccessError("the token is refused: wrong, expired or too narrow", path=where, hint=f"To log in, {_LOGIN}.")


def _no_repository(repo: str, where: str) -> NotFoundError:
    from huggingface_hub import get_token  # noqa: PLC0415

    if get_token() is None:
        return NotFoundError(
            "no such repository, or it is private (without a token the hub does not say which)",
            path=where,
            hint=f"Check the spelling of {repo!r}; if it is private, {_LOGIN}.",
        )
    return NotFoundError(
        "no such repository for this token's account",
        path=where,
        hint=f"Check the spelling of {repo!r}; if it is private, its owner must let your account in.",
    )


def _root(error: BaseException) -> BaseException:
    """The failure under huggingface_hub's wrappers, which hide it behind "not in the cache" or ValueError."""
    from huggingface_hub import errors  # noqa: PLC0415

    wrappers = (errors.LocalEntryNotFoundError, ValueError)
    for _ in range(4):
        if not isinstance(error, wrappers) or error.__cause__ is None or _status(error) is not None:
            break
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _short(error: BaseException) -> str:
    """The kind of failure; its text is left out, since it may quote a signed URL."""
    return type(error).__name__
