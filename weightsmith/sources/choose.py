"""Which files of a listing make up a checkpoint: weights in exactly one format, and what belongs to them.

A repository often holds the same weights several times (safetensors, pickles, the vendor's own `consolidated` form,
GGUF in ten types) and scripts. Taken are:

1. the shards that `model.safetensors.index.json` names, or `model.safetensors`, or the only other safetensors there are
   (`consolidated*.safetensors` last: it repeats the same weights under the vendor's names);
2. else the one GGUF (all its splits count as one);
3. with safetensors, the configuration, tokenizer and licence files beside them; a GGUF carries its own.

Pickles (.bin .pth .pt .pkl .ckpt .h5 .npy .msgpack) and scripts are never taken, whatever `include` says: reading them
can run code. Every name that is chosen passes `safename`, and two names that differ only in case are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NoReturn

from weightsmith.errors import NotFoundError, UnsafeInputError, UsageError
from weightsmith.safename import check_name

INDEX = "model.safetensors.index.json"
_REFUSED = (".bin", ".pth", ".pt", ".pkl", ".pickle", ".ckpt", ".h5", ".npy", ".npz", ".msgpack", ".py", ".so", ".sh")
_COMPANIONS = re.compile(
    r"(?:config|generation_config|quantize_config|quantization_config|params|tekken|vocab|tokenizer|added_tokens"
    r"|tokenizer_config|special_tokens_map|chat_template|tokenizer\.tok|model\.safetensors\.index)\.json"
    r"|merges\.txt|chat_template\.jinja|tokenizer\.model(?:\.v\d+)?|(?:LICEN[CS]E|NOTICE|USE_POLICY)(?:\.txt|\.md)?"
)
_SPLIT = re.compile(r"(.*)-\d{5}-of-\d{5}\.gguf")


def select(names: Iterable[str], *, include: Sequence[str] = (), where: str) -> list[str]:
    """The files to take out of `names` (relative paths with forward slashes), sorted; `where` is for messages.

    include: globs that the weights must match; "*" does not cross a slash unless the pattern has one.
    Raises NotFoundError (no weights), UnsafeInputError (only pickles, or a hostile name), UsageError (several models).
    """
    all_names = list(names)
    top = {name for name in all_names if "/" not in name}
    wanted = [name for name in all_names if _matches(name, include)] if include else sorted(top)
    weights = _weights(wanted, explicit=bool(include), where=where)
    folder = weights[0].rpartition("/")[0]
    chosen = list(weights)
    if weights[0].endswith(".safetensors"):
        beside = [name for name in all_names if name.rpartition("/")[0] == folder]
        chosen += [name for name in beside if _COMPANIONS.fullmatch(name.rpartition("/")[2])]
    if include:
        chosen += [name for name in wanted if _COMPANIONS.fullmatch(name.rpartition("/")[2])]
    return check_all(sorted(set(chosen)), where=where)


def check_all(names: Sequence[str], *, where: str) -> list[str]:
    """Return `names` if each is a safe relative path and no two are the same file on a case-blind system."""
    folded: dict[str, str] = {}
    for name in names:
        check_name(name, path=where)
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            raise UnsafeInputError(f"{other!r} and {name!r} differ only in case", path=where)
    return list(names)


def placed(names: Sequence[str]) -> dict[str, str]:
    """Where each chosen name goes: its path without the folder that all of them share."""
    folders = [name.split("/")[:-1] for name in names]
    depth = 0
    while folders and all(len(f) > depth and f[depth] == folders[0][depth] for f in folders):
        depth += 1
    return {name: "/".join(name.split("/")[depth:]) for name in names}


def shards_of(index: object, *, where: str) -> list[str]:
    """The weight files that a parsed safetensors index names, sorted.

    Raises UnsafeInputError for a name that is no plain safetensors file name beside the index.
    """
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnsafeInputError(f"{INDEX} has no weight_map", path=where)
    found = set()
    for value in weight_map.values():
        name = str(check_name(value, path=where))
        if "/" in name or not name.endswith(".safetensors"):
            raise UnsafeInputError(f"{INDEX} names {name!r}, which is no safetensors file beside it", path=where)
        found.add(name)
    return sorted(found)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    last = name.rpartition("/")[2]
    return any(fnmatchcase(name, p) if "/" in p else ("/" not in name and fnmatchcase(last, p)) for p in patterns)


def _weights(names: Sequence[str], *, explicit: bool, where: str) -> list[str]:
    safetensors = [name for name in names if name.endswith(".safetensors")]
    ggufs = [name for name in names if name.endswith(".gguf")]
    if explicit and safetensors and ggufs:
        raise UsageError(
            "the globs match weights in two formats, safetensors and GGUF",
            path=where,
            hint="Narrow --include to one of them; a catalog entry is one checkpoint.",
        )
    if safetensors:
        return safetensors if explicit else _prefer(safetensors)
    if not ggufs:
        _no_weights(names, explicit=explicit, where=where)
    groups = sorted({_group(name) for name in ggufs})
    if len(groups) > 1:
        shown = ", ".join(groups[:20]) + (", ..." if len(groups) > 20 else "")
        raise UsageError(
            f"there are {len(groups)} GGUF models here: {shown}",
            path=where,
            hint=f"Choose one, for example --include '{groups[0]}'.",
        )
    return ggufs


def _prefer(names: Sequence[str]) -> list[str]:
    if "model.safetensors" in names:
        return ["model.safetensors"]
    others = [name for name in names if not name.startswith("consolidated")]
    model = [name for name in others if name.startswith("model-")]
    return model or others or list(names)


def _group(name: str) -> str:
    split = _SPLIT.fullmatch(name)
    return f"{split[1]}-*.gguf" if split else name


def _no_weights(names: Sequence[str], *, explicit: bool, where: str) -> NoReturn:
    refused = [name for name in names if name.endswith(_REFUSED)]
    pickles = [name for name in refused if not name.endswith((".py", ".so", ".sh"))]
    if pickles:
        raise UnsafeInputError(
            f"only pickled weights ({pickles[0]}{', ...' if len(pickles) > 1 else ''}), which can run code",
            path=where,
            hint="Pull a repository that holds safetensors or GGUF; many models have such a copy.",
        )
    if explicit:
        raise NotFoundError("no weights match --include", path=where, hint="Patterns are globs, as '*Q8_0.gguf'.")
    raise NotFoundError("no safetensors and no GGUF here", path=where)
