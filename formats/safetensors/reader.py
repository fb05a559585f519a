"""Reading a safetensors checkpoint: canonical names are its own, rows come straight from the file.

Whatever else holds tensors as ranges of files under Hugging Face's names, beside a config.json, is read by the same
reader: `formats.pytorch` gives it other files and another way to find the tensors in one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.errors import IntegrityError
from weightsmith.formats import archs
from weightsmith.formats.safetensors.config import CONFIG_NAME, parse, read_raw
from weightsmith.formats.safetensors.header import AGAIN, Header, read_at, read_header
from weightsmith.formats.safetensors.index import Weights, find_weights, merge
from weightsmith.formats.safetensors.stacked import cut
from weightsmith.formats.safetensors.strictjson import open_regular
from weightsmith.safename import resolve_inside
from weightsmith.types import ModelConfig, Packed, TensorInfo, Vocab

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_SLAB = 8 << 20  # bytes compared at a time
# What travels with the weights: the tokenizer, how to generate, and the terms. Never code, never weights again.
_COMPANION = re.compile(
    r"tokenizer\.json|tokenizer\.model(\.v\d+\w*)?|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.json|merges\.txt|tekken\.json|chat_template\.(jinja|json)|generation_config\.json"
    r"|(LICENSE|LICENCE|NOTICE|USE_POLICY)(\.txt|\.md)?"
)


class SafetensorsReader:
    """A folder or single file, open for reading (see `weightsmith.types.Reader`).

    weights, read: the files, and what finds the tensors of an open one (handle, size, path=); safetensors by default.
    Opening raises NotFoundError (no weights, a missing shard), IntegrityError (a damaged header or index),
    UnsafeInputError (a shard outside the folder) and UnsupportedError (an unknown dtype).
    """

    def __init__(
        self,
        path: Path,
        *,
        container: str = "safetensors",
        weights: Weights | None = None,
        read: Callable[..., Header] = read_header,
    ) -> None:
        self.path, self.container = path, container
        self._weights = weights or find_weights(path)
        self._handles: dict[Path, int] = {}
        self._config: ModelConfig | None = None
        self._infos: dict[str, TensorInfo] | None = None
        try:
            headers = []
            for file in self._weights.files:
                handle, size = open_regular(file)
                self._handles[file] = handle
                headers.append(read(handle, size, path=file))
            self._header: Header = merge(self._weights, headers)
        except BaseException:
            self.close()
            raise

    def files(self) -> list[Path]:
        """Every file the checkpoint consists of: configuration, index, weights, tokenizer, licence."""
        folder = self._weights.folder
        config = [resolve_inside(folder, CONFIG_NAME)] if (folder / CONFIG_NAME).is_file() else []
        index = [self._weights.index] if self._weights.index else []
        return [*config, *index, *self._weights.files, *self.companions()]

    def companions(self) -> list[Path]:
        """Tokenizer, generation settings and licence, ordered by name.

        UnsafeInputError for one that is a link out of the folder.
        """
        folder = self._weights.folder
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if _COMPANION.fullmatch(entry.name) and entry.is_file())
        return [resolve_inside(folder, name) for name in names]

    def metadata(self) -> Mapping[str, Any]:
        """config.json as found, and the weights' own `__metadata__` under that key."""
        folder = self._weights.folder
        raw = read_raw(resolve_inside(folder, CONFIG_NAME)) if (folder / CONFIG_NAME).exists() else {}
        return {**raw, "__metadata__": dict(self._header.metadata)}

    def native_infos(self) -> Mapping[str, TensorInfo]:
        """Tensors as stored, in file order."""
        return self._header.tensors

    @property
    def config(self) -> ModelConfig:
        """The model. UnsupportedError or IntegrityError as `config.parse` says; NotFoundError without config.json."""
        if self._config is None:
            path = resolve_inside(self._weights.folder, CONFIG_NAME)
            config = parse(read_raw(path), path=path, dtype=self._main_dtype())
            # A head that is stored although it is said to be tied counts unless it is a plain copy.
            stored = archs.renamed(archs.by_name(config.family), self._header.tensors)
            if config.tie_word_embeddings and HEAD in stored and not self._is_copy(stored[HEAD], stored.get(EMBEDDING)):
                config = replace(config, tie_word_embeddings=False)
            self._config = config
        return self._config

    def _main_dtype(self) -> str:
        """The float type that most weight bytes are stored in."""
        sizes = {"F32": 0, "F16": 0, "BF16": 0}
        for info in self._header.tensors.values():
            if info.codec in sizes:
                sizes[info.codec] += info.nbytes
        return max(sizes, key=lambda codec: sizes[codec])

    def _is_copy(self, head: TensorInfo, embedding: TensorInfo | None) -> bool:
        if embedding is None or (head.shape, head.codec) != (embedding.shape, embedding.codec):
            return False
        if (head.path, head.offset) == (embedding.path, embedding.offset):  # one storage for both
            return True
        for begin in range(0, head.nbytes, _SLAB):
            nbytes = min(_SLAB, head.nbytes - begin)
            if not np.array_equal(self._pread(head, begin, nbytes), self._pread(embedding, begin, nbytes)):
                return False
        return True

    def infos(self) -> Mapping[str, TensorInfo]:
        """Canonical tensors in the family's order; IntegrityError for one missing, unknown or of another shape."""
        if self._infos is None:
            config = self.config
            family = archs.by_name(config.family)
            expected = family.tensors(config)
            stored = archs.renamed(family, self._header.tensors)
            if config.n_experts:
                stored = cut(stored, config)
            if config.tie_word_embeddings:
                stored.pop(HEAD, None)
            for name, shape in expected.items():
                self._check(name, shape, stored.get(name))
            for name, info in stored.items():
                if name not in expected and not family.is_dropped(name):
                    raise IntegrityError(
                        f"not part of a {config.family} model as {CONFIG_NAME} describes it",
                        path=info.path,
                        tensor=name,
                    )
            self._infos = {name: stored[name] for name in expected}
        return self._infos

    def _check(self, name: str, shape: tuple[int, ...], info: TensorInfo | None) -> None:
        if info is None:
            untied = "; the embedding may not stand in for it, as tie_word_embeddings is false" if name == HEAD else ""
            raise IntegrityError(
                f"missing, {CONFIG_NAME} calls for it{untied}",
                path=self.path,
                tensor=name,
                hint=AGAIN if not untied else f"Correct {CONFIG_NAME}, or pull the checkpoint again.",
            )
        if info.shape != shape:
            raise IntegrityError(
                f"shape {list(info.shape)}, {CONFIG_NAME} calls for {list(shape)}", path=info.path, tensor=name
            )

    def rows(self, name: str, start: int, stop: int) -> Packed:
        """Stored bytes of rows [start, stop): uint8 [stop - start, row_bytes], a fresh array; any thread."""
        info = self.infos()[name]
        if not 0 <= start <= stop <= info.n_rows:
            raise IndexError(f"rows {start}:{stop} of {name}, which has {info.n_rows}")
        data = self._pread(info, start * info.row_bytes, (stop - start) * info.row_bytes)
        return data.reshape(stop - start, info.row_bytes)

    def _pread(self, info: TensorInfo, begin: int, nbytes: int) -> Packed:
        """Bytes [begin, begin + nbytes) of a tensor."""
        assert info.path is not None
        return read_at(self._handles[info.path], info, begin, nbytes)

    def row_unit(self, name: str) -> int:
        """Rows are stored as they are handed out, so any number comes cheaply."""
        del name
        return 1

    def vocab(self, pre: str | None = None) -> Vocab | None:
        """The tokenizer of the folder, or None; `pre` names the pre-tokenizer of one that is not known."""
        from weightsmith.formats.tokenizer import from_folder  # noqa: PLC0415  (loads the tokenizer libraries)

        return from_folder(self._weights.folder, self.config, pre=pre)

    def close(self) -> None:
        """Release file handles."""
        while self._handles:
            os.close(self._handles.popitem()[1])
