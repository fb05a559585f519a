"""Which type every tensor gets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from tests.tiny import write_llama
from weightsmith.errors import UnsupportedError
from weightsmith.formats import safetensors
from weightsmith.formats.safetensors import create, open_reader, plan
from weightsmith.quant.blocks import row_nbytes
from weightsmith.types import Reader, Recipe, TensorInfo

SHAPES = {"matrix": (4, 256), "vector": (256,)}


@dataclass
class Fake:
    """As much of a Reader as a plan looks at."""

    codecs: dict[str, str]
    container: str = "gguf"
    shapes: dict[str, tuple[int, ...]] = field(default_factory=lambda: dict(SHAPES))

    def infos(self) -> dict[str, TensorInfo]:
        found = {}
        for name, codec in self.codecs.items():
            shape = self.shapes[name]
            nbytes = int(np.prod(shape[:-1])) * row_nbytes(codec, shape[-1])
            found[name] = TensorInfo(name, shape, codec, nbytes, Path("model"), 0)
        return found


def targets(matrix: str, vector: str, codec: str | None, container: str = "gguf") -> tuple[str, ...]:
    fake = Fake({"matrix": matrix, "vector": vector}, container)
    planned = plan(cast(Reader, fake), Recipe(codec)).tensors
    assert [info.name for info in planned] == ["matrix", "vector"]
    assert all(info.nbytes == info.n_weights * (4 if info.codec == "F32" else 2) for info in planned)
    assert all(info.path is None for info in planned)
    return tuple(info.codec for info in planned)


@pytest.mark.parametrize(
    ("stored", "codec", "expected"),
    [
        (("F16", "F32"), None, ("F16", "F32")),
        (("BF16", "F32"), None, ("BF16", "F32")),
        (("F32", "F32"), None, ("F32", "F32")),
        (("F16", "BF16"), None, ("F16", "BF16")),
        (("Q8_0", "F32"), None, ("F16", "F32")),
        (("Q4_K", "F32"), None, ("F16", "F32")),
        (("IQ2_XXS", "F16"), None, ("F16", "F16")),
        (("Q8_0", "F32"), "BF16", ("BF16", "F32")),
        (("F16", "F32"), "F16", ("F16", "F32")),
        (("F16", "F16"), "F32", ("F32", "F32")),
        (("F32", "BF16"), "F16", ("F16", "F16")),
    ],
)
def test_from_gguf(stored: tuple[str, str], codec: str | None, expected: tuple[str, str]) -> None:
    assert targets(*stored, codec) == expected


@pytest.mark.parametrize(
    ("stored", "codec", "expected"),
    [
        (("F16", "F32"), None, ("F16", "F32")),
        (("F32", "F32"), "F16", ("F16", "F16")),
        (("BF16", "F32"), "BF16", ("BF16", "BF16")),
        (("F64", "F8_E4M3"), "F32", ("F32", "F32")),
    ],
)
def test_from_elsewhere(stored: tuple[str, str], codec: str | None, expected: tuple[str, str]) -> None:
    assert targets(*stored, codec, "safetensors") == expected


@pytest.mark.parametrize("codec", ["I8", "U8", "I32", "BOOL", "I64", "U16"])
@pytest.mark.parametrize("asked", [None, "F16"])
def test_integers_are_no_weights(codec: str, asked: str | None) -> None:
    with pytest.raises(UnsupportedError, match=codec) as caught:
        targets(codec, "F32", asked)
    assert caught.value.tensor == "matrix"


@pytest.mark.parametrize("codec", ["F64", "F8_E4M3"])
def test_other_floats_are_not_rounded_unasked(codec: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{codec} cannot be kept") as caught:
        targets(codec, "F32", None)
    assert caught.value.tensor == "matrix"


def test_asked_for_a_type_that_it_has_not() -> None:
    with pytest.raises(UnsupportedError, match="not written as Q8_0"):
        targets("F16", "F32", "Q8_0")
    assert safetensors.TYPES == ("F32", "F16", "BF16")


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_gguf_and_back_changes_no_byte(tmp_path: Path, dtype: str) -> None:
    """A GGUF keeps its vectors in F32 beside matrices of `dtype`; the way through safetensors keeps both."""
    reader = open_reader(write_llama(tmp_path / "model", dtype=dtype, tokenizer=False))
    rng = np.random.default_rng(1)
    stored: dict[str, Any] = {}
    infos = {}
    for name, info in reader.infos().items():
        codec = "F32" if len(info.shape) == 1 else dtype
        infos[name] = replace(info, codec=codec, nbytes=info.n_rows * row_nbytes(codec, info.row_len))
        stored[name] = rng.integers(0, 255, (info.n_rows, infos[name].row_bytes), np.uint8)
    fake = Fake({name: info.codec for name, info in infos.items()}, shapes={n: i.shape for n, i in infos.items()})
    with create(tmp_path / "out", reader.config, plan(cast(Reader, fake), Recipe()).tensors, None) as writer:
        for info in writer.order:
            writer.write(info, 0, stored[info.name])
    again = open_reader(tmp_path / "out")
    assert again.config == reader.config
    for name, info in again.infos().items():
        assert (info.codec, info.shape) == (infos[name].codec, infos[name].shape)
        assert np.array_equal(again.rows(name, 0, info.n_rows), stored[name])


def one(name: str) -> Any:
    from weightsmith import formats

    package = formats.containers().get(name)
    if package is None or not hasattr(package, "create"):
        pytest.skip(f"formats.{name} is not there")
    return package


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_through_a_real_gguf(tmp_path: Path, dtype: str) -> None:
    """safetensors -> GGUF -> safetensors -> GGUF: both GGUFs hold the same tensor bytes."""
    gguf = one("gguf")

    def write(container: Any, reader: Any, path: Path) -> Any:
        planned = container.plan(reader, Recipe()).tensors
        with container.create(
            path, reader.config, planned, None, source=None, overwrite=False, split_bytes=None
        ) as out:
            for info in out.order:
                stored = reader.infos()[info.name]
                if stored.codec == info.codec:
                    out.write(info, 0, reader.rows(info.name, 0, info.n_rows))
                else:
                    from weightsmith.quant import codecs

                    rows = codecs.decode(stored.codec, reader.rows(info.name, 0, info.n_rows), info.row_len)
                    out.write(info, 0, codecs.encode(info.codec, rows))
        return container.open_reader(path)

    source = open_reader(write_llama(tmp_path / "source", dtype=dtype, tokenizer=False))
    first = write(gguf, source, tmp_path / "first.gguf")
    between = write(safetensors, first, tmp_path / "between")
    second = write(gguf, between, tmp_path / "second.gguf")
    assert second.infos().keys() == first.infos().keys() == source.infos().keys()
    for name, info in first.infos().items():
        assert second.infos()[name].codec == info.codec
        assert np.array_equal(second.rows(name, 0, info.n_rows), first.rows(name, 0, info.n_rows))
