"""Which files of a folder are Mistral's original weights.

| files | |
|---|---|
| consolidated.safetensors | most repositories |
| consolidated-0000k-of-0000n.safetensors and consolidated.safetensors.index.json | newer, large ones |
| consolidated.00.pth | older ones; a pickle |
| consolidated.00.pt to 07.pt | the first Mixtral 8x7B; pickles that hold different tensors |

params.json tells them from Meta's: it states the width of the feed-forward block (`hidden_dim`), Meta's does not.
Mistral's repositories often hold Hugging Face's form too, which then counts, unless it is pickled and Mistral's is not.
"""

from __future__ import annotations

import re
from pathlib import Path

from weightsmith.errors import NotFoundError, UnsupportedError
from weightsmith.formats.consolidated.params import MAX_PARAMS, PARAMS_NAME
from weightsmith.formats.safetensors.index import TORCH, Weights, is_checkpoint, read_index
from weightsmith.safename import resolve_inside

SINGLE_NAME, INDEX_NAME = "consolidated.safetensors", "consolidated.safetensors.index.json"
_PICKLED = re.compile(r"consolidated\.\d\d\.pth?")
_WEIGHTS = re.compile(r"consolidated(-\d{5}-of-\d{5})?\.safetensors|consolidated\.\d\d\.pth?")
_OWN_KEYS = (b'"hidden_dim"', b'"num_local_experts"')  # the second in the first Mixtral


def is_weight_file(name: str) -> bool:
    """Whether a file is called like Mistral's original weights."""
    return _WEIGHTS.fullmatch(name) is not None


def is_native(folder: Path) -> bool:
    """Whether `folder` holds Mistral's params.json and weights under Mistral's names."""
    path = folder / PARAMS_NAME
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            text = file.read(MAX_PARAMS)
    except OSError:
        return False
    has_weights = (folder / INDEX_NAME).exists() or any(is_weight_file(file.name) for file in folder.iterdir())
    return has_weights and any(key in text for key in _OWN_KEYS)


def has_other_form(folder: Path) -> bool:
    """Whether `folder` also holds weights in Hugging Face's form that are read instead: no pickles for safetensors."""
    found = [file.name for file in folder.glob("*.safetensors")]
    has_hf = any(not is_weight_file(name) for name in found) or (folder / "model.safetensors.index.json").exists()
    return (has_hf and (folder / "config.json").exists()) or (not found and is_checkpoint(folder, TORCH))


def pickled(folder: Path) -> list[str]:
    """Names of pickled weights in `folder`, in order."""
    return sorted(file.name for file in folder.iterdir() if _PICKLED.fullmatch(file.name))


def find(folder: Path) -> Weights | None:
    """The safetensors files of `folder`; None if its weights are pickled.

    Raises NotFoundError (a shard is missing), IntegrityError or UnsafeInputError (a damaged or hostile index),
    UnsupportedError (both forms at once, where neither says which counts).
    """
    if (folder / SINGLE_NAME).exists():
        weights = Weights(folder, [resolve_inside(folder, SINGLE_NAME)])
    elif (folder / INDEX_NAME).exists():
        weights = read_index(folder, resolve_inside(folder, INDEX_NAME))
    elif pickled(folder):
        return None
    else:
        raise NotFoundError(f"neither {SINGLE_NAME} nor {INDEX_NAME}", path=folder, hint="Pull it again.")
    if pickled(folder):
        raise UnsupportedError(
            "both safetensors and pickled weights, and which of them count is not said",
            path=folder,
            hint="Remove the pickled ones.",
        )
    return weights
