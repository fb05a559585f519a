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
| 429, 5xx, no connection | any | WeightsmithError: run again, what is finished is kept |
"""

from __future__ import annotations

import errno

from weightsmith.errors import AccessError, NotFoundError, ResourceError, WeightsmithError

PASSING = (408, 429, 500, 502, 503, 504)
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
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


def explain(error: BaseException, *, repo: str, revision: str, name: str | None, offline: bool) -> WeightsmithError:
    """The error to raise for `error`, met while asking for `name` (or the listing) of `repo` at `revision`."""
    from huggingface_hub import errors  # noqa: PLC0415

    where = f"hf://{repo}/{name}" if name else f"hf://{repo}"
    cause = _root(error)
    if offline or isinstance(cause, errors.OfflineModeIsEnabled):
        return NotFoundError(
            "offline, and not in the local cache", path=where, hint="Pull it once without --offline and HF_HUB_OFFLINE."
        )
    if isinstance(cause, errors.GatedRepoError) or _status(cause) in (401, 403):
        refusal = _refusal(cause, repo, where)
        if refusal is not None:
            return refusal
    if isinstance(cause, errors.RepositoryNotFoundError):
        return _no_repository(repo, where)
    if isinstance(cause, errors.RevisionNotFoundError):
        hint = f"See the branches and tags at https://huggingface.co/{repo}/tree/main."
        return NotFoundError(f"no revision {revision!r}", path=where, hint=hint)
    if isinstance(cause, errors.EntryNotFoundError) and not isinstance(cause, errors.LocalEntryNotFoundError):
        return NotFoundError(f"no such file at revision {revision!r}", path=where)
    if isinstance(cause, OSError) and cause.errno in _LOCAL:
        kind = ResourceError if cause.errno in (errno.ENOSPC, errno.EDQUOT) else WeightsmithError
        hint = "The cache is at $HF_HOME; free some space there or set HF_HOME to a larger disk."
        return kind(f"cannot write to the Hugging Face cache ({cause.strerror})", path=where, hint=hint)
    again = "Run the same command again: finished files are kept in the Hugging Face cache and are not fetched twice."
    status = _status(cause)
    if status is not None:
        told = "asks to slow down" if status == 429 else "failed"
        return WeightsmithError(f"the hub {told} (HTTP {status})", path=where, hint=again)
    if is_passing(cause):
        return WeightsmithError(f"the connection failed ({_short(cause)})", path=where, hint=again)
    return WeightsmithError(
        f"the answer is not one of a hub ({_short(cause)})", path=where, hint="Check HF_ENDPOINT, proxy and firewall."
    )


def _refusal(cause: BaseException, repo: str, where: str) -> WeightsmithError | None:
    from huggingface_hub import errors, get_token  # noqa: PLC0415

    page = f"https://huggingface.co/{repo}"
    if isinstance(cause, errors.GatedRepoError):
        if get_token() is None:
            hint = f"Accept the licence at {page}, then {_LOGIN}."
            return AccessError("this repository is gated and no token was found", path=where, hint=hint)
        hint = f"Accept it at {page} with the account of your token; some owners grant access only after a while."
        return AccessError("the licence was not accepted for this token's account", path=where, hint=hint)
    if isinstance(cause, errors.RepositoryNotFoundError):
        return None
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
