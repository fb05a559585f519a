"""Experts are loaded one by one: the same results as with all of them at hand, read once, and few in memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evals.memory_reader import TINY, MemoryReader, tiny
from tests.formats.grok import grok2
from tests.moe import write_mixtral
from tests.tiny import CORPUS
from weightsmith import formats
from weightsmith.evals import forward
from weightsmith.evals.calibration import Options, imatrix
from weightsmith.evals.calibration.best import Best
from weightsmith.evals.calibration.encoded import EncodedOptions, encode_layers
from weightsmith.evals.calibration.packed import PackedOptions, quantize_packed
from weightsmith.evals.forward import decoder as decoders
from weightsmith.evals.forward import weights
from weightsmith.evals.ruler import Ruler
from weightsmith.evals.together import together
from weightsmith.formats.archs import expert_of
from weightsmith.quant.algorithms.rtn import Grid
from weightsmith.quant.recipes import is_matrix
from weightsmith.types import Reader

MIXTRAL = replace(TINY, family="mixtral", n_experts=4, n_experts_used=2)
TEXT = " ".join(CORPUS[:2]) * 4
OPTIONS = Options(rows=20, ctx=16)


def model() -> MemoryReader:
    return tiny(MIXTRAL)


def original(form: str, folder: Path) -> Reader:
    if form == "mixtral":
        return model()
    grok2.write_grok2(folder / "in", dtype="float32")
    return formats.open_reader(folder / "in")


@pytest.mark.parametrize("form", ["mixtral", "grok-2"])
def test_steps_through_one_expert_at_a_time_are_what_a_layer_makes_of_each(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: `kind.layer` has all experts at hand and knows no other steps."""
    reader = original(form, tmp_path)
    monkeypatch.setattr(decoders, "STEP_TOKENS", 32)
    decoder = forward.load(reader)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, reader.config.vocab_size, (7, 16)))
    assert decoder.step(16) == 2
    tables = decoder.kind.tables(decoder.config, 16, decoder.place)
    x = decoder.embed(tokens)
    expected = x.clone()
    with torch.inference_mode():
        for layer in decoder.layers(whole=True):
            parts = expected.split(2)
            expected = torch.cat([decoder.kind.layer(dict(layer), part, tables, decoder.config) for part in parts])
        for layer in decoder.layers():
            decoder.through(layer, tables, x)
    assert torch.equal(x, expected)
    assert expected.std() > 0.1


class Watched:
    """Counts the experts' matrices that are alive, of those that were loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most, self._alive, self._load = 0, [], weights.tensor
        monkeypatch.setattr(weights, "tensor", self)

    def __call__(self, reader: Reader, name: str, place: weights.Place) -> torch.Tensor:
        found = self._load(reader, name, place)
        if expert_of(name) is not None:
            self._alive = [one for one in self._alive if one() is not None] + [weakref.ref(found)]
            self.most = max(self.most, len(self._alive))
        return found


def in_gptq(reader: Reader, out: Path, best: Best | None = None) -> None:
    quantize_packed(reader, out, TEXT, PackedOptions(grid=Grid(4, 32), calibration=OPTIONS, best=best))


def layouts(reader: Reader) -> dict[str, str]:
    return {name: "Q4_0" if is_matrix(name, info.shape) else "F16" for name, info in reader.infos().items()}


def in_blocks(reader: Reader, out: Path) -> None:
    encode_layers(reader, out, TEXT, EncodedOptions(layouts(reader), OPTIONS)).close()


def in_comparison(reader: Reader, out: Path) -> None:
    del out
    together([reader], reader, TEXT, Ruler(ctx=16), own=True)


def in_measuring(reader: Reader, out: Path) -> None:
    del out
    imatrix(reader, TEXT, OPTIONS)


@pytest.mark.parametrize(
    ("verb", "most"),
    [(in_comparison, 3), (in_measuring, 3), (in_gptq, 4), (partial(in_gptq, best=Best()), 4), (in_blocks, 2)],
)
def test_few_matrices_of_experts_are_in_memory(
    verb: Callable[[Reader, Path], None], most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 12 in a layer."""
    watched = Watched(monkeypatch)
    with closing(formats.open_reader(write_mixtral(tmp_path / "in"))) as reader:
        verb(reader, tmp_path / "out")
    assert 0 < watched.most <= most


def test_an_expert_is_read_once_for_all_windows() -> None:
    reader = model()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, reader.config.vocab_size, (3, 2048)))
    decoder = forward.load(reader)
    assert decoder.step(2048) == 1
    decoder.hidden(tokens)
    experts = [name for name in reader.tensors if expert_of(name) is not None]
    assert {reader.asked[name] / len(reader.tensors[name]) for name in experts} == {1.0}
