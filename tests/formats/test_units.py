"""Packed linears before they are scaled: what they multiply out to, and where else a weight could have gone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.formats.bnb import oracle as bnb
from tests.formats.compressed_tensors import oracle as compressed
from tests.formats.gptq import oracle as gptq
from weightsmith import formats
from weightsmith.formats.packed.reader import PackedReader
from weightsmith.quant import codecs
from weightsmith.quant.bounds import judge, of_units

CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}


def _compressed(form: str, make: Any, weights: dict[str, Any], **kinds: Any) -> Callable[[Path], Path]:
    settings = compressed.settings_for(form, **weights)
    return lambda folder: compressed.write_folder(folder, settings, make, **kinds)[0]


KINDS: dict[str, Callable[[Path], Path]] = {
    "gptq": lambda folder: gptq.write_folder(folder)[0],
    "gptq 3": lambda folder: gptq.write_folder(folder, bits=3, group=-1)[0],
    "gptq scattered": lambda folder: gptq.write_folder(folder, bits=8, scattered=True)[0],
    "nf4": lambda folder: bnb.write_folder(folder)[0],
    "fp4": lambda folder: bnb.write_folder(folder, "fp4")[0],
    "nf4 nested": lambda folder: bnb.write_folder(folder, nested=True)[0],
    "int8": lambda folder: bnb.write_folder(folder, "int8")[0],
    "fp8": _compressed("float-quantized", compressed.one_by_one, CHANNEL),
    "integers": _compressed(
        "pack-quantized",
        compressed.integers,
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
        symmetric=False,
    ),
    "nvfp4": _compressed(
        "nvfp4-pack-quantized",
        compressed.fours,
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True},
        kind="nvfp4",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_units_multiply_out_and_say_what_lies_beside(kind: str, tmp_path: Path) -> None:
    reader = formats.open_reader(KINDS[kind](tmp_path / "m"))
    assert isinstance(reader, PackedReader)
    name = "model.layers.0.mlp.down_proj.weight"
    info = reader.infos()[name]
    units = reader.units(name, 3, 40)
    assert units is not None
    assert reader.units("model.norm.weight", 0, 1) is None
    made = units.numbers * units.scales
    stored = codecs.decode(info.codec, reader.rows(name, 3, 40), info.row_len)
    np.testing.assert_allclose(made, stored, rtol=2**-8 if info.codec != "F32" else 1e-6)
    if units.table is None:
        assert (units.numbers >= units.low).all()
        assert (units.numbers <= units.high).all()
    else:
        assert np.isin(units.numbers, units.table).all()
    grid = of_units(units)
    signs = np.random.default_rng(0).choice([-1, 1], made.shape)
    gap = np.where(signs > 0, grid.up, grid.down)
    inside = (made + signs * gap * 0.45).astype(np.float32)
    assert judge(inside, grid).outside == 0
    column = int(np.flatnonzero((grid.up[0] > 8 * grid.slack[0]) & (np.abs(made[0]) > 0))[0])
    inside[0, column] = made[0, column] + grid.up[0, column]
    found = judge(inside, grid)
    assert (found.outside, found.at) == (1, (0, column))
    reader.close()
