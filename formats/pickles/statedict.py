"""torch.save's dialect of pickle: a dict of names to views into storages.

A tensor is a call of _rebuild_tensor_v2 with a storage (a persistent id), an offset, a size and strides; a parameter
wraps one. The dict may be an OrderedDict, whose one BUILD sets `_metadata` and is ignored.

Ref: torch/_utils.py (_rebuild_tensor_v2, _rebuild_parameter), torch/serialization.py (persistent_id).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from weightsmith.formats.pickles.machine import Dialect, Machine, Mark, are_counts, is_count

DICT, VIEW, PARAMETER = "collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
STORAGES = {
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.DoubleStorage": "F64",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
}


@dataclass(frozen=True, slots=True)
class Storage:
    """One storage: `count` values of `codec` in the member data/`key`."""

    codec: str
    key: str
    count: int


@dataclass(frozen=True, slots=True)
class Strided:
    """A view into a storage; offset and strides count values."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _call(machine: Machine, called: Mark, given: tuple[Any, ...]) -> Any:
    if called.name == DICT and given == ():
        return {}
    if called.name == VIEW:
        return _view(machine, given)
    if called.name == PARAMETER and len(given) == 3 and type(given[0]) is Strided:
        return given[0]
    raise machine.unsafe(f"a call of {called.name} with other arguments than torch writes")


def _view(machine: Machine, given: tuple[Any, ...]) -> Strided:
    if len(given) not in (6, 7):
        raise machine.unsafe("a tensor with other parts than torch writes")
    storage, offset, size, stride, grad, hooks, *more = given
    fits = type(storage) is Storage and type(grad) is bool and type(hooks) is dict and not hooks
    fits = fits and is_count(offset) and are_counts(size) and are_counts(stride) and len(size) == len(stride)
    if not fits or any(more):
        raise machine.unsafe("a tensor with other parts than torch writes")
    return Strided(storage, offset, size, stride)


def _build(machine: Machine, target: Any, state: Any) -> None:
    if type(target) is not dict or type(state) is not dict or set(state) != {"_metadata"}:
        raise machine.unsafe("an object that sets its own state (BUILD)")


def _persistent(machine: Machine) -> None:
    id_ = machine.pop()
    fits = type(id_) is tuple and len(id_) == 5 and type(id_[0]) is str and id_[0] == "storage"
    if not fits or type(id_[1]) is not Mark or type(id_[2]) is not str or not is_count(id_[4]):
        raise machine.unsafe("a reference that is no storage")
    codec, key = STORAGES.get(id_[1].name), id_[2]
    if codec is None or not (key.isascii() and key.isalnum() and len(key) <= 64):
        raise machine.unsafe(f"a storage of {id_[1].name} under the key {key[:80]!r}")
    machine.stack.append(Storage(codec, key, id_[4]))


STATE_DICT = Dialect(frozenset((DICT, VIEW, PARAMETER, *STORAGES)), _call, _build, {b"Q": _persistent})
