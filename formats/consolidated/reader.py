"""An original checkpoint behind the `Reader` protocol: canonical names, and half-split query and key rows."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from weightsmith.errors import IntegrityError, NotFoundError
from weightsmith.formats import archs
from weightsmith.formats.consolidated import names
from weightsmith.formats.consolidated.params import PARAMS_NAME, read_file, read_params
from weightsmith.formats.consolidated.shards import Joined, Shards
from weightsmith.formats.rope_rows import halve
from weightsmith.formats.safetensors.keys import Keys
from weightsmith.safename import resolve_inside
from weightsmith.types import ModelConfig, Packed, TensorInfo, Vocab

log = logging.getLogger(__name__)

HEAD = "lm_head.weight"
TRANSPOSED_ROWS = 256  # a slab of these costs a pass over the whole tensor
_TOKENIZER = re.compile(r"tokenizer\.model(\.v\d+\w*)?|tekken\.json|tokenizer\.json")
_COMPANION = re.compile(r"chat_template\.jinja|tokenizer_config\.json|(LICENSE|LICENCE|NOTICE|USE_POLICY)(\.txt|\.md)?")

# params.json and weights to the model and its tensors by native name.
Configure = Callable[[Keys, Shards, Path], tuple[ModelConfig, Mapping[str, Joined]]]


class ConsolidatedReader:
    """A folder of params.json and consolidated weights, open for reading (see `weightsmith.types.Reader`)."""

    def __init__(self, container: str, folder: Path, shards: Shards, configure: Configure) -> None:
        self.container, self.path = container, folder
        self._shards, self._configure = shards, configure
        self._resolved: tuple[ModelConfig, dict[str, Joined]] | None = None
        self._infos: dict[str, TensorInfo] = {}

    def files(self) -> list[Path]:
        """params.json, weights, tokenizer and licence in the folder itself."""
        with os.scandir(self.path) as entries:
            found = sorted(entry.name for entry in entries if entry.is_file())
        wanted = [name for name in found if _TOKENIZER.fullmatch(name) or _COMPANION.fullmatch(name)]
        params = [PARAMS_NAME] if PARAMS_NAME in found else []
        return [*(resolve_inside(self.path, name) for name in params + wanted), *self._shards.files]

    def metadata(self) -> Mapping[str, Any]:
        """params.json as found; empty without one."""
        return read_file(self.path) if (self.path / PARAMS_NAME).exists() else {}

    def native_infos(self) -> Mapping[str, TensorInfo]:
        """Whole tensors under their original names; path and offset are those of the first rank's part."""
        return {name: joined.info for name, joined in self._shards.tensors.items()}

    @property
    def config(self) -> ModelConfig:
        """The model. NotFoundError without params.json, UnsupportedError or IntegrityError as the container says."""
        return self._resolve()[0]

    def infos(self) -> Mapping[str, TensorInfo]:
        """Canonical tensors in the family's order; IntegrityError for one missing, unknown or of another shape."""
        self._resolve()
        return self._infos

    def _resolve(self) -> tuple[ModelConfig, dict[str, Joined]]:
        if self._resolved is None:
            config, native = self._configure(read_params(self.path), self._shards, self.path)
            joined = canonical(config, native, self.path)
            self._infos = {
                name: TensorInfo(name, one.info.shape, one.info.codec, one.info.nbytes, one.info.path, one.info.offset)
                for name, one in joined.items()
            }
            self._resolved = config, joined
        return self._resolved

    def rows(self, name: str, start: int, stop: int) -> Packed:
        """Rows [start, stop) in canonical order: uint8 [stop - start, row_bytes], fresh; any thread."""
        joined = self._joined(name)
        if not 0 <= start <= stop <= joined.info.n_rows:
            raise IndexError(f"rows {start} to {stop} of {name}, which has {joined.info.n_rows}")
        unit = self.row_unit(name)
        if unit == 1 or joined.transposed:
            return self._shards.read(joined, start, stop)
        first, last = start // unit * unit, -(-stop // unit) * unit
        return halve(self._shards.read(joined, first, last), unit)[start - first : stop - first]

    def row_unit(self, name: str) -> int:
        """The head_dim for query and key matrices, many for one that is stored transposed, else 1."""
        if self._joined(name).transposed:
            return TRANSPOSED_ROWS
        return self.config.head_dim if archs.by_name(self.config.family).permuted_heads(name, self.config) else 1

    def vocab(self, pre: str | None = None) -> Vocab | None:
        """The tokenizer of the folder, or of the one above it, where Llama 2's download puts it; None without one."""
        from weightsmith.formats.tokenizer import from_folder  # noqa: PLC0415  (loads the tokenizer libraries)

        folder = tokenizer_folder(self.path)
        if folder is None:
            return None
        if folder != self.path:
            log.info("the tokenizer is taken from %s", folder)
        return from_folder(folder, self.config, pre=pre)

    def close(self) -> None:
        """Release file handles."""
        self._shards.close()

    def _joined(self, name: str) -> Joined:
        joined = self._resolve()[1].get(name)
        if joined is None:
            raise NotFoundError("no such tensor", path=self.path, tensor=name)
        return joined


def tokenizer_folder(folder: Path) -> Path | None:
    """Where the tokenizer of the checkpoint in `folder` lies: there, or for a tokenizer.model one level up."""
    if any(_TOKENIZER.fullmatch(name) for name in os.listdir(folder)):
        return folder
    above = folder.absolute().parent
    return above if (above / "tokenizer.model").is_file() else None


def canonical(config: ModelConfig, native: Mapping[str, Joined], folder: Path) -> dict[str, Joined]:
    """`native` tensors under canonical names, in the family's order.

    Raises IntegrityError naming the first tensor that is missing, of another shape, or not the family's.
    """
    found: dict[str, Joined] = {}
    wanted = {names.native_name(name): name for name in archs.by_name(config.family).tensors(config)}
    shapes = archs.by_name(config.family).tensors(config)
    for original, name in wanted.items():
        joined = native.get(original)
        if joined is None:
            raise IntegrityError(f"missing, {PARAMS_NAME} calls for it", path=folder, tensor=original)
        if joined.info.shape != shapes[name]:
            raise IntegrityError(
                f"shape {list(joined.info.shape)}, {PARAMS_NAME} calls for {list(shapes[name])}",
                path=joined.info.path,
                tensor=original,
                hint="A consolidated.NN.pth may be missing, or params.json is another model's.",
            )
        found[name] = joined
    for original, joined in native.items():
        tied = config.tie_word_embeddings and original == names.HEAD
        if original not in wanted and not tied and not names.is_dropped(original):
            text = f"not part of a {config.family} model as {PARAMS_NAME} describes it"
            raise IntegrityError(text, path=joined.info.path, tensor=original)
    return found
