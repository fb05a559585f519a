"""Scales moved by the original's logits: slopes against autograd through a whole model in transformers, and runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.evals import letters, test_calibrate_encoded
from tests.evals.memory_reader import MemoryReader, tiny
from tests.evals.oracle import oracle
from tests.evals.test_calibrate_experts import MIXTRAL
from tests.evals.test_calibrate_packed import OPTIONS, digests, quantize, source
from tests.tiny import write_llama
from weightsmith import formats
from weightsmith.evals.calibration import calibrate, distil, products
from weightsmith.evals.calibration.best import Best
from weightsmith.evals.calibration.distil import Settings
from weightsmith.evals.calibration.rows import Options, draw
from weightsmith.evals.calibration.stream import Run
from weightsmith.evals.calibration.student import Student
from weightsmith.evals.calibration.work import Work
from weightsmith.quant.algorithms import scales
from weightsmith.quant.algorithms.scales import Halves, Movable

assert source  # a fixture

ALL = Options(rows=None, ctx=16)
TEXT = letters.text(16 * 12 + 5)
DISTILLED = replace(OPTIONS, best=Best(distilled=Settings(epochs=4)))


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "is_quick", lambda _device: False)


def movables(reader: MemoryReader, seed: int = 4) -> dict[str, Movable]:
    """Every matrix of the layers, off by some noise, in runs of 8 columns, half of them with an offset."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, value in reader.tensors.items():
        if "_proj.weight" in name:
            w = torch.from_numpy(value) + 0.1 * torch.randn(value.shape, generator=generator)
            shape = (value.shape[0], value.shape[1] // 8)
            halves = [torch.rand(shape, generator=generator).half().float() + 0.5 for _ in range(2)]
            offset = 0.1 * torch.randn(shape, generator=generator)
            found[name] = Movable(w, tuple(halves), offset) if "down" in name else Movable(w, (halves[0],))
    return found


def of_layer(found: Mapping[str, Movable], index: int) -> dict[str, Movable]:
    prefix = f"model.layers.{index}."
    return {name.removeprefix(prefix): one for name, one in found.items() if name.startswith(prefix)}


def at_the_end(reader: MemoryReader, tokens: np.ndarray, do: Any, options: Options = ALL) -> Any:
    """What `do` makes of a run at its end."""
    made: list[Any] = []
    for _ in calibrate(reader, tokens, options, drift=True, ended=lambda run: made.append(do(run))):
        pass
    return made[0]


def divergence(reader: MemoryReader, changed: Mapping[str, Tensor], tokens: np.ndarray) -> Tensor:
    """The mean KL divergence by transformers, differentiable along `changed`, in float64."""
    ids = torch.from_numpy(tokens)
    theirs, ours = (oracle(reader.config, reader.tensors).double() for _ in range(2))
    with torch.no_grad():
        p = theirs(ids).logits.log_softmax(-1)
    q = torch.func.functional_call(ours, dict(changed), (ids,)).logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


@pytest.mark.parametrize("memory", [1 << 30, 1 << 16], ids=["kept", "in files, in pieces"])
def test_slopes_of_a_step_are_those_of_the_whole_model(monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    letters.install(monkeypatch)
    reader = tiny(tokenizer=letters.vocab())
    tokens = draw(reader, TEXT, ALL)[:4]
    found = movables(reader)
    seen: list[Halves] = []
    monkeypatch.setattr(distil._Moving, "step", lambda _self, slopes, _rate, _number: seen.append(slopes))

    def do(run: Run) -> float:
        student = Student(run, lambda index: of_layer(found, index), tokens)
        made = distil.Progress()
        rows = np.arange(4)
        with closing(distil.States((8, 16, 32), memory=memory // 4)) as entering:
            distil._step(student, made, rows, entering, 0.0)
        return distil.judged(student, rows, {})

    value = at_the_end(reader, tokens, do, replace(ALL, memory=memory))
    leaves = {name: tuple(half.double().requires_grad_() for half in one.halves) for name, one in found.items()}
    wide = {
        name: Movable(
            one.whole.double(),
            tuple(half.double() for half in one.halves),
            None if one.offset is None else one.offset.double(),
        )
        for name, one in found.items()
    }
    loss = divergence(reader, {name: wide[name].weights(leaves[name]) for name in found}, tokens)
    assert value == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()  # type: ignore[no-untyped-call]
    order = [f"model.layers.{index}.{key}" for index in (1, 0) for key in of_layer(found, index)]
    assert len(seen) == len(order)
    for name, slopes in zip(order, seen, strict=True):
        for half, slope in zip(leaves[name], slopes, strict=True):
            assert half.grad is not None
            torch.testing.assert_close(slope.double(), half.grad * half, rtol=2e-3, atol=2e-6)


def run(reader: MemoryReader, tokens: np.ndarray, settings: Settings, **rest: Any) -> Any:
    found = movables(reader)
    return at_the_end(
        reader, tokens, lambda run: distil.distil(run, lambda index: of_layer(found, index), tokens, settings, **rest)
    )


def test_it_comes_nearer_to_the_original_on_rows_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    letters.install(monkeypatch)
    reader = tiny(tokenizer=letters.vocab())
    tokens = draw(reader, TEXT, ALL)
    _, held = distil.split(len(tokens), 0)
    found = movables(reader)
    before = divergence(reader, {name: one.whole.double() for name, one in found.items()}, tokens[held])
    halves = run(reader, tokens, Settings(rate=0.02, epochs=20))
    after = divergence(
        reader,
        {
            name: one.weights(halves[int(name.split(".")[2])][name.split(".", 3)[3]]).double()
            for name, one in found.items()
        },
        tokens[held],
    )
    assert after < 0.99 * before


def test_a_rate_far_too_high_ends_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    letters.install(monkeypatch)
    reader = tiny(tokenizer=letters.vocab())
    assert run(reader, draw(reader, TEXT, ALL), Settings(rate=100.0, epochs=3)) is None


def test_it_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    letters.install(monkeypatch)
    monkeypatch.setattr(distil, "SAVE_EVERY", -1.0)
    monkeypatch.setattr(distil, "TOKENS", 64)
    reader = tiny(tokenizer=letters.vocab())
    tokens = draw(reader, TEXT, ALL)
    settings, saved = Settings(rate=0.002, epochs=16), []
    whole = run(reader, tokens, settings, save=lambda parts: saved.append(copy.deepcopy(parts)))
    assert len(saved) == 44
    again = run(reader, tokens, settings, begin=saved[9])
    for index, of_one in whole.items():
        for key, halves in of_one.items():
            assert all(torch.equal(one, other) for one, other in zip(halves, again[index][key], strict=True))


def test_rows_are_held_out_once_and_all_others_are_learnt_from() -> None:
    for count in (2, 3, 8, 9, 64, 128, 1000):
        train, held = distil.split(count, 1)
        assert sorted([*train, *held]) == list(range(count))
        assert 1 <= len(held) <= 8
    assert list(distil.split(64, 1)[1]) != list(distil.split(64, 2)[1])


def test_codes_stay_and_the_same_bytes_come_out_of_a_run_that_was_stopped(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.numpy import load_file

    plain = quantize(source, tmp_path / "plain", replace(OPTIONS, best=Best())).path
    made = quantize(source, tmp_path / "made", DISTILLED).path
    before, after = (load_file(next(folder.glob("*.safetensors"))) for folder in (plain, made))
    assert set(before) == set(after)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(".scales")}

    monkeypatch.setattr(distil, "SAVE_EVERY", -1.0)
    for stop in (
        "distil",
        "scales",
        1,
    ):  # while distilling, before its result is there, and while it is given to layers
        with monkeypatch.context() as patch:
            store, count = Work.store, iter(range(100))

            def stopping(self: Work, name: int | str, parts: Any, stop: Any = stop, count: Any = count) -> None:
                if name == stop and (stop == "scales" or next(count) == 1):
                    raise KeyboardInterrupt
                store(self, name, parts)  # noqa: B023

            patch.setattr(Work, "store", stopping)
            with pytest.raises(KeyboardInterrupt):
                quantize(source, tmp_path / f"stopped-{stop}", DISTILLED)
        assert not (tmp_path / f"stopped-{stop}").exists()
        assert digests(quantize(source, tmp_path / f"stopped-{stop}", DISTILLED).path) == digests(made)


def test_blocks_keep_their_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "judged", lambda _student, _rows, moves: -len(moves))  # whatever comes out is used
    folder = write_llama(tmp_path / "blocks", dtype="F32", hidden_size=256, intermediate_size=256)
    plain = test_calibrate_encoded.encode(folder, tmp_path / "plain", best=Best())
    made = test_calibrate_encoded.encode(folder, tmp_path / "made", best=Best(distilled=Settings()))
    again = test_calibrate_encoded.encode(folder, tmp_path / "again", best=Best(distilled=Settings()))
    assert made == again
    reader = formats.open_reader(folder)
    layouts, infos = test_calibrate_encoded.options(reader).layouts, reader.infos()
    reader.close()
    changed = 0
    for name, before in plain.items():
        codec = layouts[name]
        old, new = (np.frombuffer(data, np.uint8).reshape(infos[name].n_rows, -1) for data in (before, made[name]))
        halves = scales.of_blocks(codec, new, infos[name].row_len).halves
        assert np.array_equal(scales.into_blocks(codec, old, [half.numpy() for half in halves]), new)
        changed += before != made[name]
    assert changed > len(plain) // 2


def test_a_mixture_and_a_single_row_are_left_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    letters.install(monkeypatch)
    caplog.set_level("INFO", logger=distil.__name__)
    layers = Untouched()
    for number, (reader, rows) in enumerate(
        [(tiny(MIXTRAL, tokenizer=letters.vocab()), 2), (tiny(tokenizer=letters.vocab()), 1)]
    ):
        tokens = draw(reader, TEXT, ALL)[:rows]
        with Work(tmp_path / str(number), "") as work:
            work.begin(2)
            at_the_end(reader, tokens, lambda run: distil.keep(run, work, layers, tokens, Settings()))  # noqa: B023
            distil.give(work, layers)
    assert [record.getMessage() for record in caplog.records if record.name == distil.__name__] == [
        "scales are not distilled: the model has experts",
        "scales are not distilled: one row is too few",
    ]


class Untouched:
    """Layers that nobody asks for."""

    def movable(self, index: int) -> Any:
        raise AssertionError(index)

    def give(self, index: int, halves: Any) -> None:
        raise AssertionError(index, halves)
