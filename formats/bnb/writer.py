"""Writing a bitsandbytes checkpoint: blocks arrive in rows, nibbles go straight to their place, absmax waits.

The absmax of one linear (4 bytes for 64 weights) are kept until all its rows have come, because double quantization
takes their mean. Only linears under way are kept, so memory does not grow with the model.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from weightsmith.errors import OutputExistsError
from weightsmith.formats.bnb import state as states
from weightsmith.formats.bnb.settings import DOUBLED, TYPES
from weightsmith.formats.bnb.settings import dump as dump_settings
from weightsmith.formats.packed.parts import FLOATS
from weightsmith.formats.packed.reader import PackedReader
from weightsmith.formats.packed.settings import KEY
from weightsmith.formats.safetensors.config import CONFIG_NAME, dump
from weightsmith.formats.safetensors.index import is_checkpoint
from weightsmith.formats.safetensors.reader import HEAD, SafetensorsReader
from weightsmith.formats.safetensors.writer import SPLIT_BYTES, SafetensorsWriter
from weightsmith.quant import doubled, float4
from weightsmith.quant.blocks import BLOCKS
from weightsmith.safename import check_name
from weightsmith.types import NOTES, ModelConfig, Packed, Reader, TensorInfo, Vocab


@dataclass(slots=True)
class _Waiting:
    """Absmax of a linear whose rows are coming: float32 [out, in / 64]."""

    absmax: NDArray[np.float32]
    missing: int


def create(  # noqa: PLR0913  (every choice of a checkpoint, all by keyword)
    path: Path,
    config: ModelConfig,
    infos: Iterable[TensorInfo],
    vocab: Vocab | None,
    *,
    source: Reader | None = None,
    overwrite: bool = False,
    split_bytes: int | None = None,
    file_type: int | None = None,
    notes: Mapping[str, str] | None = None,
    keep: bool = False,
) -> BnbWriter:
    """Begin to write the folder `path` with planned canonical tensors (NF4, FP4 and floats).

    file_type: place of the type in TYPES, which says whether absmax is quantized too. The rest as
    `formats.safetensors.create`.
    """
    del keep
    order = list(infos)
    if path.is_dir() and any(path.iterdir()) and not is_checkpoint(path):
        raise OutputExistsError("the folder is no checkpoint and is not replaced", path=path, hint="Remove it first.")
    type_ = TYPES[file_type or 0]
    double, kind = type_.endswith(DOUBLED), type_.removesuffix(DOUBLED)
    dtype = config.dtype if config.dtype in FLOATS else "F16"
    skipped = [name for info in order if (name := info.name.removesuffix(".weight")) and _is_skipped(info)]
    extras = _companions(config, vocab, source)
    raw = json.loads(dump(config, dtype=dtype))
    raw[KEY] = dump_settings(
        kind.lower(), doubled=double, dtype=dtype, skipped=skipped or [HEAD.removesuffix(".weight")]
    )
    extras[CONFIG_NAME] = (json.dumps(raw, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
    stored, linears = parts_of(order, dtype, double=double)
    files = SafetensorsWriter(
        path,
        stored,
        extras,
        overwrite=overwrite,
        split_bytes=split_bytes or SPLIT_BYTES,
        notes={NOTES + name: value for name, value in (notes or {}).items()},
        shapes={info.name: (info.n_weights // 2, 1) for info in order if info.name in linears},
    )
    return BnbWriter(path, order, files, {info.name: info for info in stored}, linears)


def parts_of(
    order: Iterable[TensorInfo], dtype: str, *, double: bool
) -> tuple[list[TensorInfo], dict[str, states.State]]:
    """What is stored for planned tensors, and the 4-bit linears among them. dtype: codec of the rest; double: of absmax
    too."""
    stored: list[TensorInfo] = []
    linears: dict[str, states.State] = {}
    for info in order:
        if info.codec in FLOATS:
            stored.append(info)
            continue
        linear = states.of_plan(info.codec, (info.shape[0], info.shape[1]), dtype, double=double)
        linears[info.name] = linear
        stored += _parts(info.name, linear)
    return stored, linears


def _is_skipped(info: TensorInfo) -> bool:
    """A linear of the model that is left as it is: the head, or one that does not divide into blocks."""
    return info.codec in FLOATS and (info.name == HEAD or info.name.endswith("_proj.weight"))


def _parts(name: str, state: states.State) -> list[TensorInfo]:
    """Stored tensors of a 4-bit linear; the nibbles as they come, in rows."""
    out, columns = state.shape
    sizes = {"absmax": ("U8" if state.nested else "F32", state.n_blocks), "quant_map": ("F32", 16)}
    if state.nested:
        sizes["nested_absmax"] = ("F32", -(-state.n_blocks // state.nested))
        sizes["nested_quant_map"] = ("F32", 256)
    sizes[_state_key(state)] = ("U8", states.SIZE)
    found = [TensorInfo(name, (out, columns // 2), "U8", out * columns // 2)]
    return found + [
        TensorInfo(f"{name}.{suffix}", (count,), codec, count * BLOCKS[codec].nbytes)
        for suffix, (codec, count) in sizes.items()
    ]


def _state_key(state: states.State) -> str:
    return f"{states.KEY}{state.kind.lower()}".removeprefix("weight.")


def _companions(config: ModelConfig, vocab: Vocab | None, source: Reader | None) -> dict[str, bytes | Path]:
    if isinstance(source, SafetensorsReader | PackedReader):
        return {file.name: file for file in source.companions()}
    if vocab is None:
        return {}
    from weightsmith.formats.tokenizer import to_files  # noqa: PLC0415  (loads the tokenizer libraries)

    return {str(check_name(name)): content for name, content in to_files(vocab, config).items()}


class BnbWriter:
    """A folder in the making (see `weightsmith.types.Writer`); made by `create`."""

    def __init__(
        self,
        path: Path,
        order: Sequence[TensorInfo],
        files: SafetensorsWriter,
        stored: Mapping[str, TensorInfo],
        linears: Mapping[str, states.State],
    ) -> None:
        self.path, self.order = path, order
        self._files, self._stored, self._linears = files, stored, linears
        self.stored_bytes = sum(info.nbytes for info in stored.values())
        self._waiting: dict[str, _Waiting] = {}
        self._lock = threading.Lock()

    def write(self, info: TensorInfo, start: int, rows: Packed) -> None:
        """Store packed rows uint8 [n, row_bytes] from row `start` on; any order, any thread, every row once."""
        state = self._linears.get(info.name)
        if state is None:
            self._files.write(info, start, rows)
            return
        blocks = rows.reshape(len(rows), -1, BLOCKS[info.codec].nbytes)
        nibbles = np.ascontiguousarray(blocks[:, :, 4:]).reshape(len(rows), -1)
        self._files.write(self._stored[info.name], start, nibbles)
        absmax = np.ascontiguousarray(blocks[:, :, :4]).view("<f4")[:, :, 0]
        with self._lock:
            waiting = self._waiting.get(info.name)
            if waiting is None:
                shape = (info.n_rows, absmax.shape[1])
                waiting = self._waiting[info.name] = _Waiting(np.empty(shape, np.float32), info.n_rows)
            waiting.absmax[start : start + len(rows)] = absmax
            waiting.missing -= len(rows)
            if waiting.missing:
                return
            del self._waiting[info.name]
        self._finish(info.name, state, waiting.absmax.reshape(-1))

    def _finish(self, name: str, state: states.State, absmax: NDArray[np.float32]) -> None:
        """All rows of a linear are there: store what goes with them."""
        parts: dict[str, NDArray[Any]] = {"absmax": absmax, "quant_map": float4.LEVELS[state.kind]}
        offset = 0.0
        if state.nested:
            parts["absmax"], parts["nested_absmax"], mean = doubled.double(absmax)
            parts["nested_quant_map"], offset = doubled.levels(), float(mean)
        whole = states.State(state.kind, state.shape, state.codec, state.blocksize, state.nested, offset)
        parts[_state_key(state)] = np.frombuffer(whole.dump(), np.uint8)
        for suffix, value in parts.items():
            info = self._stored[f"{name}.{suffix}"]
            self._files.write(info, 0, np.ascontiguousarray(value).view(np.uint8).reshape(1, -1))

    def row_unit(self, info: TensorInfo) -> int:
        """Rows are stored as they come, so any number will do."""
        del info
        return 1

    def holds(self, info: TensorInfo, start: int, stop: int, total: int) -> bool:
        """Always False: a folder is begun anew."""
        del info, start, stop, total
        return False

    def close(self) -> Path:
        """Check that every row arrived, flush, rename into place; on any failure nothing is left. The final path."""
        return self._files.close()

    def abort(self) -> None:
        """Remove what was written."""
        self._files.abort()

    def suspend(self) -> None:
        """As `abort`."""
        self.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()
