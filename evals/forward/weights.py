"""Weights from a reader to torch, slab by slab, so that beside the finished tensor only one slab is ever in flight.

Plain float layouts are converted by torch in the copy itself; every other layout goes through `quant.codecs.decode`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from weightsmith.errors import WeightsmithError
from weightsmith.formats.archs import expert_of
from weightsmith.types import Packed, Reader, TensorInfo

SLAB = 16 << 20  # float32 bytes per slab

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Place(NamedTuple):
    """Where computing happens and in what precision."""

    device: torch.device
    dtype: torch.dtype


def _decoded(info: TensorInfo, packed: Packed) -> Tensor:
    plain = _PLAIN.get(info.codec)
    if plain is not None:
        return torch.from_numpy(packed).view(plain)
    from weightsmith.quant.codecs import decode  # noqa: PLC0415  (compiles kernels; not needed for plain floats)

    try:
        return torch.from_numpy(decode(info.codec, packed, info.row_len))
    except WeightsmithError as error:
        error.path, error.tensor = error.path or info.path, error.tensor or info.name
        raise


def slabs(reader: Reader, name: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """Rows [start, stop) of a canonical tensor as (first row, Tensor [rows, row_len]), stored dtype or float32."""
    info = reader.infos()[name]
    stop = info.n_rows if stop is None else stop
    unit = reader.row_unit(name)
    step = max(1, SLAB // (4 * info.row_len * unit)) * unit
    end = min(-(-stop // unit) * unit, info.n_rows)
    for at in range(start // unit * unit, end, step):  # on the grid of units; what lies outside the range is dropped
        rows = _decoded(info, reader.rows(name, at, min(at + step, end)))
        skip = max(start - at, 0)
        yield at + skip, rows[skip : stop - at]


def tensor(reader: Reader, name: str, place: Place) -> Tensor:
    """A whole canonical tensor in its own shape, at `place`."""
    info = reader.infos()[name]
    whole = torch.empty(info.n_rows, info.row_len, device=place.device, dtype=place.dtype)
    for start, rows in slabs(reader, name):
        whole[start : start + len(rows)] = rows
    return whole.reshape(info.shape)


def gather(reader: Reader, name: str, ids: Tensor, place: Place) -> Tensor:
    """Rows `ids` (int64 of any shape, on the CPU) of a matrix, as [*ids.shape, row_len].

    Slabs in which no row is wanted are not read.
    """
    info = reader.infos()[name]
    flat = ids.reshape(-1)
    order = flat.argsort()
    wanted = flat[order].contiguous()
    found = torch.empty(len(flat), info.row_len, device=place.device, dtype=place.dtype)
    step = max(1, SLAB // (4 * info.row_len))
    done = 0
    while done < len(wanted):
        first = int(wanted[done])
        upto = int(torch.searchsorted(wanted, min(first + step, info.n_rows)))
        for start, rows in slabs(reader, name, first, int(wanted[upto - 1]) + 1):
            here = slice(*torch.searchsorted(wanted, torch.tensor([start, start + len(rows)])).tolist())
            found[order[here].to(place.device)] = rows[wanted[here] - start].to(place.device, place.dtype)
        done = upto
    return found.reshape(*ids.shape, info.row_len)


class Later(NamedTuple):
    """A matrix that is made when it is asked for."""

    shape: tuple[int, ...]
    load: Callable[[], Tensor]


class Layer(MutableMapping[str, Tensor]):
    """A layer's weights by name within it. Experts' matrices are loaded when they are asked for, and not kept, except
    while they are `held`; everything else is there.
    """

    def __init__(self, place: Place, kept: dict[str, Tensor], later: dict[str, Later]) -> None:
        self._place, self._kept, self._later = place, kept, later
        self._held: dict[str, Tensor] = {}
        self._holding = ""

    def __getitem__(self, name: str) -> Tensor:
        if name in self._kept:
            return self._kept[name]
        if name in self._held:
            return self._held[name]
        found = self._later[name].load()
        if self._holding and name.startswith(self._holding):
            self._held[name] = found
        return found

    def __setitem__(self, name: str, value: Tensor | Later) -> None:
        """Replace a weight, by a tensor or by what makes one (at the layer's place, in either case)."""
        self._held.pop(name, None)
        if isinstance(value, Later):
            load = value.load
            self._later[name] = Later(value.shape, lambda: load().to(*self._place))
            self._kept.pop(name, None)
        else:
            self._kept[name] = value.to(*self._place)
            self._later.pop(name, None)

    def __delitem__(self, name: str) -> None:
        self._held.pop(name, None)
        if name in self._kept:
            del self._kept[name]
        else:
            del self._later[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._kept, *self._later])

    def __len__(self) -> int:
        return len(self._kept) + len(self._later)

    def __contains__(self, name: object) -> bool:
        return name in self._kept or name in self._later

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a weight, without loading it."""
        return tuple(self._kept[name].shape) if name in self._kept else self._later[name].shape

    def copy(self) -> Layer:
        """Another of the same weights, whose replacements are its own."""
        return Layer(self._place, dict(self._kept), dict(self._later))

    def rounded(self) -> Layer:
        """Another whose matrices are in bfloat16, and with them the products of `stages.linears`."""

        def load(name: str) -> Tensor:
            return self._later[name].load().bfloat16()

        kept = {name: weight.bfloat16() if weight.ndim == 2 else weight for name, weight in self._kept.items()}
        later = {name: Later(one.shape, partial(load, name)) for name, one in self._later.items()}
        return Layer(self._place, kept, later)

    def clear(self) -> None:
        """Drop everything."""
        self._kept.clear()
        self._later.clear()
        self._held.clear()

    @contextmanager
    def held(self, prefix: str) -> Iterator[None]:
        """Load what is asked for under `prefix` once only, and let it go at the end."""
        self._holding = prefix
        try:
            yield
        finally:
            self._holding = ""
            self._held.clear()


def layer(reader: Reader, prefix: str, place: Place, *, whole: bool = False) -> Layer:
    """Every tensor under `prefix`, by the rest of its name; experts' matrices at once only if `whole`."""
    kept, later = {}, {}
    for name, info in reader.infos().items():
        if name.startswith(prefix):
            load, key = partial(tensor, reader, name, place), name.removeprefix(prefix)
            if whole or expert_of(name) is None:
                kept[key] = load()
            else:
                later[key] = Later(info.shape, load)
    return Layer(place, kept, later)


def stream(places: Sequence[tuple[Reader, str]], place: Place, *, whole: bool = False) -> Iterator[Layer]:
    """The weights under each (reader, prefix) in turn; the next ones load in a thread while the caller computes.

    The caller must drop its reference before it asks for the next, so that two layers, not three, are in memory, of
    however many readers. whole: experts too, which are otherwise left for later (see `Layer`).
    """
    with ThreadPoolExecutor(1, thread_name_prefix="weights") as pool:
        coming = [pool.submit(layer, *places[0], place, whole=whole)]
        for following in [*places[1:], None]:
            ready = [coming.pop().result()]
            if following is not None:
                coming.append(pool.submit(layer, *following, place, whole=whole))
            yield ready.pop()  # popped, so that this frame holds no layer while the caller computes
