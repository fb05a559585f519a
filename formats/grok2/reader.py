"""Grok-2's tensor-parallel files behind the `Reader` protocol: its names are the canonical ones."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightsmith.errors import IntegrityError, NotFoundError
from weightsmith.formats import archs
from weightsmith.formats.consolidated.shards import Joined
from weightsmith.formats.grok2.parts import AGAIN, open_parts
from weightsmith.formats.safetensors.config import CONFIG_NAME, parse, read_raw
from weightsmith.safename import resolve_inside
from weightsmith.types import ModelConfig, Packed, TensorInfo, Vocab

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_COMPANION = re.compile(
    r"config\.json|tokenizer\.(tok\.)?json|tokenizer_config\.json|special_tokens_map\.json|chat_template\.jinja"
    r"|generation_config\.json|(LICENSE|LICENCE|NOTICE)(\.txt|\.md)?"
)


class Grok2Reader:
    """A folder of config.json and pytorch_model-*-TP-*.safetensors; `parts.open_parts` says what opening raises."""

    container = "grok2"

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._shards = open_parts(folder)
        self._config: ModelConfig | None = None
        self._infos: dict[str, TensorInfo] = {}

    def files(self) -> list[Path]:
        """Configuration, tokenizer and licence, then the weights."""
        with os.scandir(self.path) as entries:
            names = sorted(entry.name for entry in entries if _COMPANION.fullmatch(entry.name) and entry.is_file())
        return [*(resolve_inside(self.path, name) for name in names), *self._shards.files]

    def metadata(self) -> Mapping[str, Any]:
        """config.json as found."""
        return read_raw(resolve_inside(self.path, CONFIG_NAME))

    def native_infos(self) -> Mapping[str, TensorInfo]:
        """Whole tensors; path and offset are those of the first rank's part."""
        return {name: joined.info for name, joined in self._shards.tensors.items()}

    @property
    def config(self) -> ModelConfig:
        """The model. Raises what `safetensors.config.parse` does."""
        if self._config is None:
            path = resolve_inside(self.path, CONFIG_NAME)
            stored = self._shards.tensors
            dtype = stored[EMBEDDING].info.codec if EMBEDDING in stored else "BF16"
            config = parse(read_raw(path), path=path, dtype=dtype)
            self._config = replace(config, tie_word_embeddings=HEAD not in stored)
        return self._config

    def infos(self) -> Mapping[str, TensorInfo]:
        """Tensors in the family's order; IntegrityError for one missing, unknown or of another shape."""
        if not self._infos:
            family = archs.by_name(self.config.family)
            expected = family.tensors(self.config)
            found = {name: self._checked(name, shape) for name, shape in expected.items()}
            for name, joined in self._shards.tensors.items():
                if name not in expected and not family.is_dropped(name):
                    text = f"not part of a {self.config.family} model as {CONFIG_NAME} describes it"
                    raise IntegrityError(text, path=joined.info.path, tensor=name)
            self._infos = found
        return self._infos

    def _checked(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        joined = self._shards.tensors.get(name)
        if joined is None:
            raise IntegrityError(f"missing, {CONFIG_NAME} calls for it", path=self.path, tensor=name, hint=AGAIN)
        if joined.info.shape != shape:
            text = (
                f"shape {list(joined.info.shape)} over {len(joined.parts)} ranks, {CONFIG_NAME} calls for {list(shape)}"
            )
            raise IntegrityError(text, path=joined.info.path, tensor=name)
        return joined.info

    def rows(self, name: str, start: int, stop: int) -> Packed:
        """Rows [start, stop): uint8 [stop - start, row_bytes], fresh; any thread."""
        joined = self._joined(name)
        if not 0 <= start <= stop <= joined.info.n_rows:
            raise IndexError(f"rows {start} to {stop} of {name}, which has {joined.info.n_rows}")
        return self._shards.read(joined, start, stop)

    def row_unit(self, name: str) -> int:
        """Any number of rows comes cheaply."""
        self._joined(name)
        return 1

    def vocab(self, pre: str | None = None) -> Vocab | None:
        """The tokenizer of the folder, or None."""
        from weightsmith.formats.tokenizer import from_folder  # noqa: PLC0415  (loads the tokenizer libraries)

        return from_folder(self.path, self.config, pre=pre)

    def close(self) -> None:
        """Release file handles."""
        self._shards.close()

    def _joined(self, name: str) -> Joined:
        if name not in self.infos():
            raise NotFoundError("no such tensor", path=self.path, tensor=name)
        return self._shards.tensors[name]
