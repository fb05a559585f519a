"""What a calibration is said to take: with a clock that is told the time, and with passes that really run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.evals import letters
from tests.evals.memory_reader import TINY, tiny
from tests.tiny import write_llama
from weightsmith import formats
from weightsmith.evals.calibration import Options, cost, encoded, packed
from weightsmith.evals.calibration.best import Best
from weightsmith.evals.calibration.cost import Cost, measure
from weightsmith.evals.calibration.distil import Settings
from weightsmith.evals.calibration.encoded import EncodedOptions
from weightsmith.evals.calibration.packed import PackedOptions
from weightsmith.quant.algorithms.rtn import Grid

OPTIONS = Options(rows=128, ctx=16)


def test_it_is_projected_to_layers_and_rows() -> None:
    assert Cost(step=0.5, layer=3.0, rows=4, layers=10).seconds(128) == 10 * (3.0 + 0.5 * 32)
    assert Cost(step=0.5, layer=3.0, rows=4, layers=10, ending=2.0).seconds(128) == 10 * (3.0 + 0.5 * 32) + 256


@pytest.mark.parametrize("layers", [1, 2, 3, 7])
def test_one_layer_is_measured(monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    """Four blocks a layer, 2 s before each and 1 s behind the last; 5 s to quantize one. The first layer is slower."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock.now)
    asked: dict[str, Any] = {}

    def passes(_reader: Any, tokens: Any, _options: Any, **rest: Any) -> Iterator[Any]:
        asked.update(rest, tokens=tokens)
        for index in range(layers):
            for block in range(4):
                clock.now += 2.0 + 50.0 * (index == 0 and block == 0)
                yield SimpleNamespace(index=index)
            clock.now += 1.0

    seen: list[int] = []

    def make(block: Any) -> None:
        seen.append(block.index)
        clock.now += 5.0 + 10.0 * (block.index == 0 and layers > 1)

    monkeypatch.setattr(cost, "calibrate", passes)
    reader = tiny(replace(TINY, n_layers=layers), tokenizer=letters.vocab())
    found = measure(reader, OPTIONS, make, drift=True)
    assert seen == [0] * 4 + [1] * 4 * (layers > 1)
    assert asked["drift"] is True
    assert asked["tokens"].shape == (found.rows, 16)
    assert asked["tokens"].max() < reader.config.vocab_size
    # Where a third layer begins, what leads up to its first block stands for what led up to this one's.
    whole = 9.0 if layers > 2 else 7.0
    assert found == Cost(step=whole, layer=20.0, rows=found.rows, layers=layers)


def test_moving_scales_is_a_cost_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock.now)

    def passes(*_: Any, prepare: Any, **__: Any) -> Iterator[Any]:
        for index in range(3):
            clock.now += 1.0
            prepare(SimpleNamespace(index=index), {})
            yield SimpleNamespace(index=index)

    def prepare(_block: Any, _ahead: Any) -> None:
        clock.now += 7.0

    monkeypatch.setattr(cost, "calibrate", passes)
    found = measure(
        tiny(replace(TINY, n_layers=3), tokenizer=letters.vocab()), OPTIONS, lambda _: None, prepare=prepare
    )
    assert (found.step, found.layer) == (1.0, 7.0)


@pytest.mark.parametrize(
    "options",
    [
        PackedOptions(Grid(4, 32), calibration=OPTIONS),
        PackedOptions(Grid(4, 32), calibration=OPTIONS, best=Best()),
        PackedOptions(Grid(4, 32), calibration=OPTIONS, best=Best(distilled=Settings())),
        PackedOptions(Grid(4, 32, sym=False), calibration=OPTIONS, scaled=True, checkpoint_format="awq"),
    ],
    ids=["plain", "drift", "distilled", "scaled"],
)
def test_packed_linears_are_really_made(tmp_path: Path, options: PackedOptions) -> None:
    reader = formats.open_reader(write_llama(tmp_path / "source", dtype="F32"))
    found = packed.cost(reader, options)
    assert found.layers == reader.config.n_layers
    assert found.step > 0
    assert found.layer > 0
    assert (found.ending > 0) == (options.best not in (None, Best()))
    reader.close()
    assert [path.name for path in tmp_path.iterdir() if path.name != "weightsmith-home"] == ["source"]


def test_blocks_are_really_made(tmp_path: Path) -> None:
    reader = formats.open_reader(write_llama(tmp_path / "source", dtype="F32", hidden_size=256, intermediate_size=256))
    layouts = {name: "Q4_K" if "_proj" in name else "F32" for name in reader.infos()}
    found = encoded.cost(reader, EncodedOptions(layouts, OPTIONS, sweeps=1, best=Best(distilled=Settings())))
    assert found.ending > 0
    assert found.step > 0
    assert found.layer > 0
    reader.close()
