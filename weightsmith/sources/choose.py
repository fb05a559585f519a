"""Which files of a listing make up a checkpoint: weights in exactly one format, and what belongs to them.

A repository often holds the same weights several times (safetensors, pickles, the vendor's own `consolidated` form,
GGUF in ten types) and scripts. Taken are:

1. the shards that `model.safetensors.index.json` names, or `model.safetensors`, or the only other safetensors there are
   (`consolidated*.safetensors`, with an index of their own if they are several, last: they repeat the same weights
   under the vendor's names);
2. else the one GGUF (all its splits count as one);
3. else, if pickles are allowed, those that can be read without running them: `pytorch_model.bin` or the shards that
   `pytorch_model.bin.index.json` names, the vendor's `consolidated.NN.pth` (or .pt), Grok-1's `ckpt-0/tensorNNNNN_000`;
4. with safetensors and pickles, the configuration, tokenizer and licence files beside them (and above ckpt-0); a GGUF
   carries its own.

Other pickles (.bin .pth .pt .pkl .ckpt .h5 .npy .msgpack) and scripts are never taken, whatever `include` says: reading
them can run code. Every name that is chosen passes `safename`, and two names that differ only in case are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import NoReturn

from weightsmith.errors import NotFoundError, UnsafeInputError, UsageError
from weightsmith.safename import check_name

INDEX, VENDOR_INDEX = "model.safetensors.index.json", "consolidated.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"
_INDEXES = (VENDOR_INDEX, INDEX, TORCH_INDEX)
_REFUSED = (".bin", ".pth", ".pt", ".pkl", ".pickle", ".ckpt", ".h5", ".npy", ".npz", ".msgpack", ".py", ".so", ".sh")
_COMPANIONS = re.compile(
    r"(?:config|generation_config|quantize_config|quantization_config|params|tekken|vocab|tokenizer|added_tokens"
    r"|tokenizer_config|special_tokens_map|chat_template|tokenizer\.tok)\.json"
    r"|merges\.txt|chat_template\.jinja|tokenizer\.model(?:\.v\d+\w*)?|(?:LICEN[CS]E|NOTICE|USE_POLICY)(?:\.txt|\.md)?"
)
# What is read without running it: by `formats.pytorch`, by `formats.meta` and `formats.mistral`, by `formats.grok1`.
_TORCH = re.compile(r"pytorch_model[\w.-]*\.bin")
_VENDOR = re.compile(r"consolidated\.\d\d\.pth?")
_GROK1 = re.compile(r"(?:.*/)?ckpt-0/tensor\d{5}_\d{3}")
_SPLIT = re.compile(r"(.*)-\d{5}-of-\d{5}\.gguf")


_OTHER_FORM = "Pull a repository that holds safetensors or GGUF; many models have such a copy"
_BY_HAND = ", or pass --allow-pickle: then they are read without running anything in them."


def select(names: Iterable[str], *, include: Sequence[str] = (), where: str, allow_pickle: bool = False) -> list[str]:
    """The files to take out of `names` (relative paths with forward slashes), sorted; `where` is for messages.

    include: globs that the weights must match; "*" does not cross a slash unless the pattern has one.
    allow_pickle: the vendor's pickled form may be chosen where there is no other.
    Raises NotFoundError (no weights), UnsafeInputError (only pickles, or a hostile name), UsageError (several models).
    """
    all_names = list(names)
    top = {name for name in all_names if "/" not in name}
    top |= {name for name in all_names if _GROK1.fullmatch(name) and name.count("/") == 1}
    wanted = [name for name in all_names if _matches(name, include)] if include else sorted(top)
    weights = _weights(wanted, explicit=bool(include), where=where, allow_pickle=allow_pickle)
    folders = {weights[0].rpartition("/")[0]}
    if _GROK1.fullmatch(weights[0]):
        folders.add(weights[0].rpartition("ckpt-0/")[0].rstrip("/"))  # tokenizer.model lies there
    chosen, own = list(weights), _own_index(weights)
    if not weights[0].endswith(".gguf"):
        beside = [name for name in all_names if name.rpartition("/")[0] in folders]
        chosen += [name for name in beside if _is_companion(name, own)]
    if include:
        chosen += [name for name in wanted if _is_companion(name, own)]
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


def index_in(names: Sequence[str]) -> str | None:
    """The index among chosen top-level files that says which shards there are; None without one."""
    return next((name for name in _INDEXES if name in names), None)


def suffix_of(index: str) -> str:
    """What the names of all shards end in that an index of this name lists."""
    return ".bin" if index == TORCH_INDEX else ".safetensors"


def shards_of(index: object, *, suffix: str = ".safetensors", where: str) -> list[str]:
    """The weight files that a parsed index of shards names, sorted.

    Raises UnsafeInputError for a name that is no plain file name with that suffix, beside the index.
    """
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnsafeInputError("no weight_map in the index", path=where)
    found = set()
    for value in weight_map.values():
        name = str(check_name(value, path=where))
        if "/" in name or not name.endswith(suffix):
            raise UnsafeInputError(f"it names {name!r}, which is no {suffix[1:]} file beside it", path=where)
        found.add(name)
    return sorted(found)


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _own_index(weights: Sequence[str]) -> str:
    """The name of the index that would list `weights`: each form has its own, which lists only its own shards."""
    if all(_last(name).startswith("consolidated") for name in weights):
        return VENDOR_INDEX
    return {".bin": TORCH_INDEX, ".safetensors": INDEX}.get(PurePosixPath(weights[0]).suffix, "")


def _is_companion(name: str, own_index: str) -> bool:
    """Whether a file belongs to the weights beside it that `own_index` would list."""
    return _last(name) == own_index or _COMPANIONS.fullmatch(_last(name)) is not None


def _matches(name: str, patterns: Sequence[str]) -> bool:
    last = name.rpartition("/")[2]
    return any(fnmatchcase(name, p) if "/" in p else ("/" not in name and fnmatchcase(last, p)) for p in patterns)


def _weights(names: Sequence[str], *, explicit: bool, where: str, allow_pickle: bool) -> list[str]:
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
    if not ggufs and allow_pickle and (pickles := _pickles(names, explicit=explicit)):
        folders = sorted({name.rpartition("/")[0] for name in pickles})
        if len(folders) > 1:
            hint = f"Choose one, for example --include '{folders[-1]}/*'."
            raise UsageError(f"pickled weights in {len(folders)} folders: {', '.join(folders)}", path=where, hint=hint)
        return pickles
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


def _pickles(names: Sequence[str], *, explicit: bool) -> list[str]:
    """Pickled weights of one kind: Hugging Face's form before the vendor's, if its configuration is there too."""
    torch = [name for name in names if _TORCH.fullmatch(_last(name))]
    vendor = [name for name in names if _VENDOR.fullmatch(_last(name))]
    if vendor and not (torch and "config.json" in names):
        return vendor
    if torch and not explicit:
        shards = [name for name in torch if name.startswith("pytorch_model-")]
        return ["pytorch_model.bin"] if "pytorch_model.bin" in torch else shards or torch
    return torch or [name for name in names if _GROK1.fullmatch(name)]


def _prefer(names: Sequence[str]) -> list[str]:
    if "model.safetensors" in names:
        return ["model.safetensors"]
    others = [name for name in names if not name.startswith("consolidated")]
    model = [name for name in others if name.startswith("model-")]
    return model or others or (["consolidated.safetensors"] if "consolidated.safetensors" in names else list(names))


def _group(name: str) -> str:
    split = _SPLIT.fullmatch(name)
    return f"{split[1]}-*.gguf" if split else name


def _no_weights(names: Sequence[str], *, explicit: bool, where: str) -> NoReturn:
    refused = [name for name in names if name.endswith(_REFUSED) or _GROK1.fullmatch(name)]
    pickles = [name for name in refused if not name.endswith((".py", ".so", ".sh"))]
    if pickles:
        raise UnsafeInputError(
            f"only pickled weights ({pickles[0]}{', ...' if len(pickles) > 1 else ''}), which can run code",
            path=where,
            hint=_OTHER_FORM + (_BY_HAND if _pickles(pickles, explicit=explicit) else "."),
        )
    if explicit:
        raise NotFoundError("no weights match --include", path=where, hint="Patterns are globs, as '*Q8_0.gguf'.")
    raise NotFoundError("no safetensors and no GGUF here", path=where)
