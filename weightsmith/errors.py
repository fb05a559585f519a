"""The error tree. Each class carries the exit code that the command line ends with.

| code | meaning |
|---|---|
| 0 | done |
| 1 | failure: something this version cannot do (unknown family, unknown tokenizer, unsupported type) |
| 2 | usage: the command line, registry.yaml or an output that is in the way |
| 3 | integrity: truncated, hash mismatch, a header that contradicts itself, weights that are no numbers |
| 4 | unsafe input refused: it would reach outside its folder, or run code |
| 5 | a quality gate failed |
| 6 | not enough disk or memory |
| 7 | not found, or no access (which of the two is in the message) |
| 8 | a name stands for somebody or something else than it did |
| 130 | interrupted |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

DISK_HINT = (
    "Free some space or write elsewhere; no half-written file stays, but what a repeated call goes on from does."
)


class WeightsmithError(Exception):
    """Any failure that is told to the user in one message and no traceback.

    `message` says what was found and what was expected; `path` and `tensor` say where; `hint` says what to do.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self, message: str, *, path: Path | str | None = None, tensor: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.tensor = tensor
        self.hint = hint

    def __str__(self) -> str:
        where = [str(self.path)] if self.path is not None else []
        if self.tensor is not None:
            where.append(f"tensor {self.tensor!r}")
        text = f"{', '.join(where)}: {self.message}" if where else self.message
        return f"{text}\n  {self.hint}" if self.hint else text

    def told(self) -> dict[str, Any]:
        """The same for machines, as plain values."""
        where = {"path": str(self.path) if self.path else None, "tensor": self.tensor, "hint": self.hint}
        return {"kind": type(self).__name__, "exit_code": self.exit_code, "message": self.message} | where


class UnsupportedError(WeightsmithError):
    """The input is sound, but this version does not know its family, tokenizer, type or route."""


class UsageError(WeightsmithError):
    """The request itself is wrong: options that exclude each other, a name that is no name."""

    exit_code = 2


class OutputExistsError(UsageError):
    """Something already stands where the result would go."""


class IntegrityError(WeightsmithError):
    """The bytes are damaged: truncated, mismatched hashes, a header that contradicts the file."""

    exit_code = 3


class UnsafeInputError(WeightsmithError):
    """The input would reach outside its folder or make something run, and is refused."""

    exit_code = 4


class QualityGateError(WeightsmithError):
    """More was lost than the gate allows."""

    exit_code = 5


class ResourceError(WeightsmithError):
    """Not enough disk or memory."""

    exit_code = 6


class NotFoundError(WeightsmithError):
    """No such name, file, repository or revision."""

    exit_code = 7


class AccessError(WeightsmithError):
    """It exists but may not be read: no token, or a licence not accepted yet."""

    exit_code = 7


class OwnerChangedError(WeightsmithError):
    """A repository's name was taken anew, or leads elsewhere: what is there now need not be from whom it was."""

    exit_code = 8


class InterruptedRunError(WeightsmithError):
    """Stopped by the user; the message says how to resume."""

    exit_code = 130
