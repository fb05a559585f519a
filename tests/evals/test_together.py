"""Several candidates in lock step: the numbers of single comparisons, drift by plain loops, the noise floor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.evals import letters
from tests.evals.memory_reader import TINY, MemoryReader, tiny
from weightsmith.errors import IntegrityError, UsageError
from weightsmith.evals import compare, forward, noise
from weightsmith.evals.drift import Meter
from weightsmith.evals.ruler import Ruler
from weightsmith.evals.together import together

CTX = 16
RULERS = {
    "llama.cpp": Ruler(ctx=CTX),
    "paper": Ruler(convention="paper", ctx=CTX),
    "no memory": Ruler(ctx=CTX, memory=1),
    "few windows at once": Ruler(ctx=CTX, memory=2 * 3 * CTX * 32 * 4),
}


@pytest.fixture(autouse=True)
def _letters(monkeypatch: pytest.MonkeyPatch) -> None:
    letters.install(monkeypatch)


def model(seed: int = 0, **fields: Any) -> MemoryReader:
    return tiny(seed=seed, **({"tokenizer": letters.vocab()} | fields))


def disturbed(reader: MemoryReader, amount: float = 0.05, only: str = "") -> MemoryReader:
    rng = np.random.default_rng(9)
    tensors = {
        name: value * (1 + np.float32(amount) * rng.standard_normal(value.shape, dtype=np.float32))
        if only in name
        else value
        for name, value in reader.tensors.items()
    }
    return MemoryReader(reader.config, tensors, reader.tokenizer)


def states(reader: MemoryReader, text: str, ruler: Ruler) -> list[np.ndarray]:
    """float64 [scored, hidden] after every layer and after the norm, one window after the other."""
    prepared = compare.prepare(reader, text, ruler)
    windows, decoder = prepared.windows, forward.load(reader)
    found: list[list[np.ndarray]] = [[] for _ in range(reader.config.n_layers + 1)]
    for window in windows.tokens:

        def keep(number: int, x: torch.Tensor) -> None:
            found[number].append(x[0, windows.first : windows.last].double().numpy().copy())

        keep(reader.config.n_layers, decoder.hidden(torch.from_numpy(window[None]), on_layer=keep))
    return [np.concatenate(layer) for layer in found]


def relative(changed: np.ndarray, original: np.ndarray) -> float:
    ratios = []
    for b, a in zip(changed, original, strict=True):
        ratios.append(np.sqrt(((b - a) ** 2).sum()) / np.sqrt((a**2).sum()))
    return float(np.mean(ratios))


@pytest.mark.parametrize("name", RULERS)
def test_each_candidate_gets_what_a_single_comparison_gives(name: str) -> None:
    original, text, ruler = model(), letters.text(150), RULERS[name]
    candidates = [disturbed(original), original, disturbed(original, 0.1)]
    found = together(candidates, original, text, ruler)
    for reader, one in zip(candidates, found, strict=True):
        alone = compare.compare(reader, original, text, ruler)
        assert one.ratio == pytest.approx(alone.ratio, rel=1e-6)
        assert one.kld_mean == pytest.approx(alone.kld_mean, abs=1e-6)
        assert one.kld_99 == pytest.approx(alone.kld_99, abs=1e-6)
        assert one.top1 == alone.top1
        assert one.candidate.tokens_sha256 == alone.candidate.tokens_sha256
    assert (found[1].kld_mean, found[1].kld_max, found[1].ratio, found[1].top1) == (0, 0, 1, 1)
    assert found[1].drift is not None
    assert found[1].drift.layers == (0, 0)


@pytest.mark.parametrize("name", RULERS)
def test_drift_by_a_plain_loop(name: str) -> None:
    original, text, ruler = model(), letters.text(150), RULERS[name]
    candidate = disturbed(original)
    (found,) = together([candidate], original, text, ruler)
    pairs = zip(states(candidate, text, ruler), states(original, text, ruler), strict=True)
    expected = [relative(b, a) for b, a in pairs]
    assert found.drift is not None
    assert [*found.drift.layers, found.drift.final] == pytest.approx(expected, rel=1e-4)
    assert found.drift.own is None
    assert 0 < expected[0] < expected[1]


@pytest.mark.parametrize("name", RULERS)
def test_what_a_layer_adds_by_itself(name: str) -> None:
    """Of a model whose second layer alone differs, own is the drift there; of a first layer alone, nothing after it."""
    original, text, ruler = model(), letters.text(150), RULERS[name]
    first, second = disturbed(original, only="layers.0."), disturbed(original, only="layers.1.")
    found = [one.drift for one in together([first, second], original, text, ruler, own=True)]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].own == pytest.approx((found[0].layers[0], 0), rel=1e-6)
    assert found[0].layers[1] > 0.001
    assert found[1].layers[0] == 0
    assert found[1].own == pytest.approx((0, found[1].layers[1]), rel=1e-6)


@pytest.mark.parametrize("name", RULERS)
def test_the_noise_floor_is_the_original_with_rounded_states(name: str) -> None:
    original, text, ruler = model(), letters.text(150), RULERS[name]
    (found,) = together([original], original, text, ruler)
    windows, decoder = compare.prepare(original, text, ruler).windows, forward.load(original)
    kld, top = [], []
    for window in windows.tokens[: noise.TWIN_WINDOWS]:
        tokens = torch.from_numpy(window[None])
        a = decoder.logits(decoder.hidden(tokens)[0, windows.first : windows.last]).double()
        x, tables = decoder.embed(tokens).bfloat16().float(), decoder.kind.tables(decoder.config, CTX, decoder.place)
        for layer in decoder.layers():
            x = decoder.kind.layer(layer, x, tables, decoder.config).bfloat16().float()
        decoder.finish(x)
        b = decoder.logits(x[0, windows.first : windows.last]).double()
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        kld += (p.exp() * (p - q)).sum(-1).tolist()
        top += (a.argmax(-1) == b.argmax(-1)).tolist()
    assert found.noise is not None
    assert found.noise.kld_mean == pytest.approx(np.mean(kld), abs=1e-6)
    assert found.noise.kld_mean > 3e-6
    assert found.noise.kld_99 == pytest.approx(np.quantile(kld, 0.99), abs=2e-6)
    assert found.noise.top1 == pytest.approx(np.mean(top))
    assert found.noise.tokens == len(kld) == windows.scored // len(windows.tokens) * noise.TWIN_WINDOWS
    assert found.noise.drift is not None
    assert 0.0005 < found.noise.drift.final < 0.02


def test_every_model_is_read_once() -> None:
    original = model()
    candidates = [disturbed(original), disturbed(original, 0.1)]
    together(candidates, original, letters.text(150), Ruler(ctx=CTX), own=True)
    for reader in (original, *candidates):
        for name, value in reader.tensors.items():
            if "layers" in name:
                assert reader.asked[name] == (len(value) if value.ndim == 2 else 1), name


def test_another_depth_has_no_drift() -> None:
    original = model()
    short = tiny(replace(TINY, n_layers=1), tokenizer=letters.vocab())
    deep = tiny(replace(TINY, n_layers=3), tokenizer=letters.vocab())
    found = together([short, disturbed(original), deep], original, letters.text(150), Ruler(ctx=CTX), own=True)
    assert [one.drift is None for one in found] == [True, False, True]
    alone = compare.compare(deep, original, letters.text(150), Ruler(ctx=CTX))
    assert found[2].kld_mean == pytest.approx(alone.kld_mean, abs=1e-6)


def test_models_that_cannot_be_compared() -> None:
    text, ruler, original = letters.text(150), Ruler(ctx=CTX), model()
    with pytest.raises(UsageError, match=r"other tokens"):
        together([original, model(tokenizer=letters.vocab(add_bos=False))], original, text, ruler)
    broken = disturbed(original)
    broken.tensors["model.layers.1.mlp.up_proj.weight"] = broken.tensors["model.layers.1.mlp.up_proj.weight"] * np.nan
    with pytest.raises(IntegrityError, match=r"not finite"):
        together([original, broken], original, text, ruler)


def test_a_state_of_zeros_that_stays_has_not_moved() -> None:
    meter = Meter(1)
    meter.add(0, torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
    meter.add(0, torch.ones(1, 2, 4) * 1.5, torch.ones(1, 2, 4))
    assert meter.means() == (0.25,)
