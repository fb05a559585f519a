"""Reading a safetensors folder whose linears are packed: X.qweight and its companions stand for X.weight.

Everything else (embedding, norms, biases, a linear that was left out) lies there under its canonical name. A packed
weight is handed out as F32 rows, computed from the columns of the packed words that they need; nothing is kept.
Which linears are packed is read off the tensors; a layout says what they consist of. Old writers gave every linear a
bias of zeros: one that the family does not have is passed over if it is zero throughout.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from weightsmith.errors import IntegrityError, UnsupportedError, WeightsmithError
from weightsmith.formats import archs
from weightsmith.formats.gptq.layout import Load, Part
from weightsmith.formats.safetensors.config import CONFIG_NAME, MAX_CONFIG, parse, read_raw
from weightsmith.formats.safetensors.header import AGAIN
from weightsmith.formats.safetensors.index import is_checkpoint
from weightsmith.formats.safetensors.reader import EMBEDDING, HEAD, SafetensorsReader
from weightsmith.formats.safetensors.strictjson import open_regular, read_object
from weightsmith.safename import resolve_inside
from weightsmith.types import ModelConfig, Packed, Rows, TensorInfo, Vocab

OLD_NAME = "quantize_config.json"
KEY = "quantization_config"
_STORED = {"I32": "<i4", "I64": "<i8", "F16": "<f2", "BF16": "<u2", "F32": "<f4"}
_PIECE = 8 << 20  # bytes compared at a time


class Layout(Protocol):
    """What a packed linear consists of; made from the checkpoint's settings."""

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """Stored tensors by suffix for a linear (out, in)."""

    def rows(self, load: Load, shape: tuple[int, int], start: int, stop: int, *, has_index: bool) -> Rows:
        """Weights float32 [stop - start, in]."""


class _Linear(NamedTuple):
    """A packed linear: its parts by suffix."""

    shape: tuple[int, int]
    parts: dict[str, TensorInfo]


def settings_of(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The quantization settings of a folder and the file they stand in, None if there are none."""
    path = resolve_inside(folder, CONFIG_NAME)
    found = read_raw(path).get(KEY)
    if isinstance(found, dict):
        return found, path
    if not (folder / OLD_NAME).exists():
        return None
    path = resolve_inside(folder, OLD_NAME)
    return read_object(path, limit=MAX_CONFIG), path


def method_of(path: Path) -> str | None:
    """The quant_method of a safetensors folder: "gptq" where quantize_config.json names none, None if it has none."""
    if not path.is_dir() or not is_checkpoint(path):
        return None
    try:
        found = settings_of(path)
    except WeightsmithError:
        return None  # whoever opens it will say what is wrong
    if found is None:
        return None
    raw, where = found
    method = raw.get("quant_method") or ("gptq" if where.name == OLD_NAME else None)
    return method.lower() if isinstance(method, str) else None


class PackedReader:
    """A folder of packed linears, open for reading (see `weightsmith.types.Reader`).

    make: the layout for raw settings and the file they stand in. Opening raises what `SafetensorsReader` raises and
    what `make` raises for settings that are not known.
    """

    def __init__(self, path: Path, container: str, make: Callable[[dict[str, Any], Path], Layout]) -> None:
        self.path, self.container = Path(os.path.abspath(path)), container
        found = settings_of(self.path)
        if found is None:
            raise UnsupportedError("has no quantization settings", path=path)
        self._settings_path = found[1]
        self._layout = make(*found)
        self._plain = SafetensorsReader(self.path)  # its headers, companions and checks; never its configuration
        self._handles: dict[Path, int] = {}
        self._config: ModelConfig | None = None
        self._infos: dict[str, TensorInfo] | None = None
        self._linears: dict[str, _Linear] = {}
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
            raw = {key: value for key, value in read_raw(path).items() if key != KEY}
            config = parse(raw, path=path, dtype="F16")
            stored = self.native_infos()
            if config.tie_word_embeddings and (HEAD in stored or self._is_packed(HEAD)) and not self._head_is_copy():
                config = parse(raw | {"tie_word_embeddings": False}, path=path, dtype="F16")
            self._config = config
        return self._config

    def _is_packed(self, name: str) -> bool:
        return f"{name.removesuffix('.weight')}.qweight" in self.native_infos()

    def _head_is_copy(self) -> bool:
        head, embedding = self.native_infos().get(HEAD), self.native_infos().get(EMBEDDING)
        if head is None or embedding is None or (head.shape, head.codec) != (embedding.shape, embedding.codec):
            return False
        for begin in range(0, head.nbytes, _PIECE):
            nbytes = min(_PIECE, head.nbytes - begin)
            if not np.array_equal(self._pread(head, begin, nbytes), self._pread(embedding, begin, nbytes)):
                return False
        return True

    def infos(self) -> Mapping[str, TensorInfo]:
        """Canonical tensors in the family's order, packed ones as F32.

        IntegrityError for one missing, unknown or of another shape or type than the configuration calls for.
        """
        if self._infos is None:
            config = self.config
            family = archs.by_name(config.family)
            left = dict(self.native_infos())
            if config.tie_word_embeddings:
                left.pop(HEAD, None)
            found = {name: self._take(name, shape, left) for name, shape in family.tensors(config).items()}
            for name, info in left.items():
                if not family.is_dropped(name) and not self._is_idle_bias(info):
                    raise IntegrityError(
                        f"not part of a {config.family} model as {CONFIG_NAME} describes it",
                        path=info.path,
                        tensor=name,
                    )
            self._infos = found
        return self._infos

    def _take(self, name: str, shape: tuple[int, ...], left: dict[str, TensorInfo]) -> TensorInfo:
        """One canonical tensor, its stored parts taken out of `left`."""
        stem = name.removesuffix(".weight")
        if len(shape) != 2 or f"{stem}.qweight" not in left:
            info = left.pop(name, None)
            if info is None:
                raise IntegrityError(f"missing, {CONFIG_NAME} calls for it", path=self.path, tensor=name, hint=AGAIN)
            _check(info, Part(shape, ("F16", "BF16", "F32")))
            return info
        out, columns = shape
        try:
            parts = self._layout.parts((out, columns))
        except WeightsmithError as error:
            error.path, error.tensor = error.path or self.path, error.tensor or name
            raise
        taken = {}
        for suffix, part in parts.items():
            info = left.pop(f"{stem}.{suffix}", None)
            if info is not None:
                _check(info, part)
                taken[suffix] = info
            elif not part.optional:
                raise IntegrityError("missing", path=self.path, tensor=f"{stem}.{suffix}", hint=AGAIN)
        self._linears[name] = _Linear((out, columns), taken)
        return TensorInfo(name, shape, "F32", 4 * out * columns, taken["qweight"].path)

    def _is_idle_bias(self, info: TensorInfo) -> bool:
        stem = info.name.removesuffix(".bias")
        if stem == info.name or f"{stem}.weight" not in self._linears or info.nbytes > _PIECE:
            return False
        return not self._pread(info, 0, info.nbytes).any()

    def rows(self, name: str, start: int, stop: int) -> Packed:
        """Bytes of rows [start, stop): uint8 [stop - start, row_bytes], a fresh array; any thread."""
        info = self.infos()[name]
        if not 0 <= start <= stop <= info.n_rows:
            raise IndexError(f"rows {start}:{stop} of {name}, which has {info.n_rows}")
        linear = self._linears.get(name)
        if linear is None:
            data = self._pread(info, start * info.row_bytes, (stop - start) * info.row_bytes)
            return data.reshape(stop - start, info.row_bytes)

        def load(suffix: str, begin: int, end: int) -> NDArray[Any]:
            return self._columns(linear.parts[suffix], begin, end)

        try:
            found = self._layout.rows(load, linear.shape, start, stop, has_index="g_idx" in linear.parts)
        except WeightsmithError as error:
            error.path, error.tensor = error.path or info.path, error.tensor or name
            raise
        return found.view(np.uint8).reshape(stop - start, info.row_bytes)

    def _columns(self, info: TensorInfo, begin: int, end: int) -> NDArray[Any]:
        """Columns [begin, end) of a stored tensor, [rows, end - begin]; a vector as such."""
        dtype = np.dtype(_STORED[info.codec])
        width = info.row_len
        first, nbytes = begin * dtype.itemsize, (end - begin) * dtype.itemsize
        if end - begin == width:
            data = self._pread(info, 0, info.nbytes)
        else:
            data = np.empty(info.n_rows * nbytes, np.uint8)
            for row in range(info.n_rows):
                self._pread(info, row * info.row_bytes + first, nbytes, into=data[row * nbytes : (row + 1) * nbytes])
        found = data.view(dtype)
        if info.codec == "BF16":
            found = (found.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return found if len(info.shape) == 1 else found.reshape(info.n_rows, end - begin)

    def _pread(self, info: TensorInfo, begin: int, nbytes: int, *, into: Packed | None = None) -> Packed:
        """Bytes [begin, begin + nbytes) of a stored tensor. Reading at a position shares no state between threads."""
        data = np.empty(nbytes, np.uint8) if into is None else into
        view, done = data.data, 0
        while info.path is not None and done < nbytes:
            try:
                got = os.preadv(self._handles[info.path], [view[done:]], info.offset + begin + done)
            except OSError as error:
                raise WeightsmithError(f"cannot read: {error.strerror}", path=info.path, tensor=info.name) from error
            if got == 0:
                raise IntegrityError("the file became shorter while it was read", path=info.path, tensor=info.name)
            done += got
        return data

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
