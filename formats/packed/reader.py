"""Reading a safetensors folder whose linears are packed: some stored tensors together stand for X.weight.

Everything else (embedding, norms, biases, a linear that was left out) lies there under its canonical name. A packed
weight is handed out as rows of floats, computed from the stored parts that they need; nothing is kept. Which linears
are packed is read off the tensors, by the container's `Scheme`. Old writers gave every linear a bias of zeros: one
that the family does not have is passed over if it is zero throughout.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from weightsmith.errors import IntegrityError, UnsupportedError, WeightsmithError
from weightsmith.formats import archs
from weightsmith.formats.packed.parts import FLOATS, Linear, Part, Scheme, Source
from weightsmith.formats.packed.settings import EARLIER_KEY, KEY, OLD_NAME, settings_of
from weightsmith.formats.safetensors.config import CONFIG_NAME, parse, read_raw
from weightsmith.formats.safetensors.header import AGAIN, read_at
from weightsmith.formats.safetensors.reader import EMBEDDING, HEAD, SafetensorsReader
from weightsmith.formats.safetensors.strictjson import open_regular
from weightsmith.quant import codecs
from weightsmith.quant.blocks import row_nbytes
from weightsmith.quant.units import Units
from weightsmith.safename import resolve_inside
from weightsmith.types import ModelConfig, Packed, TensorInfo, Vocab

_PIECE = 8 << 20  # bytes compared at a time


class _Found(NamedTuple):
    """A packed linear and where its parts lie."""

    linear: Linear
    source: Source


class PackedReader:
    """A folder of packed linears, open for reading (see `weightsmith.types.Reader`).

    make: the scheme for raw settings and the file they stand in. Opening raises what `SafetensorsReader` raises and
    what `make` raises for settings that are not known.
    """

    def __init__(self, path: Path, container: str, make: Callable[[dict[str, Any], Path], Scheme]) -> None:
        self.path, self.container = Path(os.path.abspath(path)), container
        found = settings_of(self.path)
        if found is None:
            raise UnsupportedError("has no quantization settings", path=path)
        self._scheme = make(*found)
        self._plain = SafetensorsReader(self.path)  # its headers, companions and checks; never its configuration
        self._handles: dict[Path, int] = {}
        self._config: ModelConfig | None = None
        self._infos: dict[str, TensorInfo] | None = None
        self._linears: dict[str, _Found] = {}
        try:
            for info in self._plain.native_infos().values():
                if info.path is not None and info.path not in self._handles:
                    self._handles[info.path] = open_regular(info.path)[0]
        except BaseException:
            self.close()
            raise

    def files(self) -> list[Path]:
        """Every file the checkpoint consists of."""
        old = [resolve_inside(self.path, OLD_NAME)] if (self.path / OLD_NAME).is_file() else []
        return [*self._plain.files(), *old]

    def companions(self) -> list[Path]:
        """Tokenizer, generation settings and licence, ordered by name."""
        return self._plain.companions()

    def metadata(self) -> Mapping[str, Any]:
        """config.json as found, and the weights' own `__metadata__` under that key."""
        return self._plain.metadata()

    def native_infos(self) -> Mapping[str, TensorInfo]:
        """Tensors as stored, in file order."""
        return self._plain.native_infos()

    @property
    def config(self) -> ModelConfig:
        """The model; raises what `safetensors.config.parse` raises."""
        if self._config is None:
            path = resolve_inside(self.path, CONFIG_NAME)
            raw = {key: value for key, value in read_raw(path).items() if key not in (KEY, EARLIER_KEY)}
            config = parse(raw, path=path, dtype=self._plain_dtype())
            if config.tie_word_embeddings and self._has_head(config) and not self._head_is_copy():
                config = parse(raw | {"tie_word_embeddings": False}, path=path, dtype=config.dtype)
            self._config = config
        return self._config

    def _plain_dtype(self) -> str:
        """What is not packed is stored as: the embedding's type, F16 where that is none."""
        embedding = self.native_infos().get(EMBEDDING)
        return embedding.codec if embedding is not None and embedding.codec in FLOATS else "F16"

    def _has_head(self, config: ModelConfig) -> bool:
        return HEAD in self.native_infos() or self._linear(HEAD, (config.vocab_size, config.hidden_size)) is not None

    def _head_is_copy(self) -> bool:
        head, embedding = self.native_infos().get(HEAD), self.native_infos().get(EMBEDDING)
        if head is None or embedding is None or (head.shape, head.codec) != (embedding.shape, embedding.codec):
            return False
        for begin in range(0, head.nbytes, _PIECE):
            nbytes = min(_PIECE, head.nbytes - begin)
            if not np.array_equal(self._read(head, begin, nbytes), self._read(embedding, begin, nbytes)):
                return False
        return True

    def infos(self) -> Mapping[str, TensorInfo]:
        """Canonical tensors in the family's order, packed ones in the type that their weights are handed out in.

        IntegrityError for one missing, unknown or of another shape or type than the configuration calls for,
        UnsupportedError for names that a wrapper or another program gave (see `archs.renamed`).
        """
        if self._infos is None:
            config = self.config
            family = archs.by_name(config.family)
            left = dict(self.native_infos())
            self._refuse_other_names(family)
            if config.tie_word_embeddings:
                left.pop(HEAD, None)
            found = {name: self._take(name, shape, left) for name, shape in family.tensors(config).items()}
            for name, info in left.items():
                if not (family.is_dropped(name) or self._scheme.is_dropped(name) or self._is_idle_bias(info)):
                    raise IntegrityError(
                        f"not part of a {config.family} model as {CONFIG_NAME} describes it",
                        path=info.path,
                        tensor=name,
                    )
            self._infos = found
        return self._infos

    def _refuse_other_names(self, family: ModuleType) -> None:
        rename = getattr(family, "hf_name", str)
        other = next((name for name in self.native_infos() if rename(name) != name), None)
        if other is not None:
            raise UnsupportedError(
                f"packed weights are read under {rename(other)!r} and the like only",
                path=self.path,
                tensor=other,
                hint="Start from the original checkpoint in full precision.",
            )

    def _linear(self, name: str, shape: tuple[int, int]) -> Linear | None:
        stored = self.native_infos()
        try:
            return self._scheme.linear(name, shape, stored, Source(stored, self._read))
        except WeightsmithError as error:
            error.path, error.tensor = error.path or self.path, error.tensor or name
            raise

    def _take(self, name: str, shape: tuple[int, ...], left: dict[str, TensorInfo]) -> TensorInfo:
        """One canonical tensor, its stored parts taken out of `left`."""
        linear = self._linear(name, (shape[0], shape[1])) if len(shape) == 2 else None
        if linear is None:
            info = left.pop(name, None)
            if info is None:
                raise IntegrityError(f"missing, {CONFIG_NAME} calls for it", path=self.path, tensor=name, hint=AGAIN)
            _check(info, Part(shape, FLOATS))
            return info
        stem = name.removesuffix(".weight")
        taken = {}
        for suffix, part in linear.parts.items():
            info = left.pop(f"{stem}.{suffix}", None)
            if info is not None:
                _check(info, part)
                taken[suffix] = info
            elif not part.optional:
                raise IntegrityError("missing", path=self.path, tensor=f"{stem}.{suffix}", hint=AGAIN)
        self._linears[name] = _Found(linear, Source(taken, self._read))
        nbytes = shape[0] * row_nbytes(linear.codec, shape[1])
        return TensorInfo(name, shape, linear.codec, nbytes, next(iter(taken.values())).path)

    def _is_idle_bias(self, info: TensorInfo) -> bool:
        stem = info.name.removesuffix(".bias")
        if stem == info.name or f"{stem}.weight" not in self._linears or info.nbytes > _PIECE:
            return False
        return not self._read(info, 0, info.nbytes).any()

    def rows(self, name: str, start: int, stop: int) -> Packed:
        """Bytes of rows [start, stop): uint8 [stop - start, row_bytes], a fresh array; any thread."""
        info = self.infos()[name]
        if not 0 <= start <= stop <= info.n_rows:
            raise IndexError(f"rows {start}:{stop} of {name}, which has {info.n_rows}")
        found = self._linears.get(name)
        if found is None:
            data = self._read(info, start * info.row_bytes, (stop - start) * info.row_bytes)
            return data.reshape(stop - start, info.row_bytes)
        if start == stop:
            return np.empty((0, info.row_bytes), np.uint8)
        try:
            return codecs.encode(info.codec, found.linear.rows(found.source, start, stop))
        except WeightsmithError as error:
            error.path, error.tensor = error.path or info.path, error.tensor or name
            raise

    def block_codecs(self, name: str) -> tuple[str, ...] | None:
        """Block layouts that may take the codes of a tensor over; None for one that is not packed."""
        self.infos()
        found = self._linears.get(name)
        return found.linear.blocks if found is not None else None

    def blocks(self, name: str, codec: str, start: int, stop: int) -> tuple[Packed, float] | None:
        """Rows [start, stop) as blocks of `codec` without requantizing, and the largest error of a weight.

        None where they do not fit: another zero, columns out of order, a scale that is no half.
        """
        if codec not in (self.block_codecs(name) or ()):
            return None
        found = self._linears[name]
        return found.linear.as_blocks(codec, found.source, start, stop)

    def units(self, name: str, start: int, stop: int) -> Units | None:
        """Rows [start, stop) of a packed tensor before they are scaled; None for one that is not packed."""
        self.infos()
        found = self._linears.get(name)
        return found.linear.units(found.source, start, stop) if found is not None else None

    def _read(self, info: TensorInfo, begin: int, nbytes: int, *, into: Packed | None = None) -> Packed:
        """Bytes [begin, begin + nbytes) of a stored tensor."""
        assert info.path is not None
        return read_at(self._handles[info.path], info, begin, nbytes, into=into)

    def row_unit(self, name: str) -> int:
        """Any number of rows comes cheaply."""
        del name
        return 1

    def vocab(self, pre: str | None = None) -> Vocab | None:
        """The tokenizer of the folder, or None; `pre` names the pre-tokenizer of one that is not known."""
        from weightsmith.formats.tokenizer import from_folder  # noqa: PLC0415  (loads the tokenizer libraries)

        return from_folder(self.path, self.config, pre=pre)

    def close(self) -> None:
        """Release file handles."""
        self._plain.close()
        while self._handles:
            os.close(self._handles.popitem()[1])


def _check(info: TensorInfo, part: Part) -> None:
    if info.shape != part.shape:
        raise IntegrityError(
            f"shape {list(info.shape)}, the configuration calls for {list(part.shape)}",
            path=info.path,
            tensor=info.name,
        )
    if info.codec not in part.codecs:
        raise IntegrityError(
            f"stored as {info.codec}, expected {' or '.join(part.codecs)}", path=info.path, tensor=info.name
        )
