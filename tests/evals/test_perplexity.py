"""Perplexity and comparison of whole models, against loops over full logits."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.evals import letters
from tests.evals.memory_reader import TINY, MemoryReader, tiny
from weightsmith.errors import IntegrityError, UnsupportedError, UsageError
from weightsmith.evals import compare, engines, forward, perplexity
from weightsmith.evals.ruler import Ruler

CTX = 16
RULERS = {
    "llama.cpp": Ruler(ctx=CTX),
    "paper": Ruler(convention="paper", ctx=CTX),
    "no memory": Ruler(ctx=CTX, memory=1),
    "few windows at once": Ruler(ctx=CTX, memory=2 * 3 * CTX * 32 * 4),
    "one thread": Ruler(ctx=CTX, threads=1),
}


@pytest.fixture(autouse=True)
def _letters(monkeypatch: pytest.MonkeyPatch) -> None:
    letters.install(monkeypatch)


def model(seed: int = 0, **fields: Any) -> MemoryReader:
    return tiny(seed=seed, **({"tokenizer": letters.vocab()} | fields))


def disturbed(reader: MemoryReader, amount: float = 0.05) -> MemoryReader:
    rng = np.random.default_rng(9)
    tensors = {
        name: value * (1 + np.float32(amount) * rng.standard_normal(value.shape, dtype=np.float32))
        for name, value in reader.tensors.items()
    }
    return MemoryReader(reader.config, tensors, reader.tokenizer)


def slow_rows(reader: MemoryReader, text: str, ruler: Ruler) -> list[tuple[np.ndarray, int]]:
    """(log-probabilities float64 [V], target) of every scored prediction, one window and one position after another."""
    add = reader.tokenizer is not None and reader.tokenizer.add_bos
    tokens = letters.Encoder(letters.vocab()).encode(text, add_bos=add)
    decoder = forward.load(reader)
    rows = []
    for start in range(0, len(tokens) - CTX + 1, CTX):
        window = tokens[start : start + CTX]
        if ruler.convention == "llama.cpp" and add:
            window[0] = letters.BOS
        logits = decoder.logits(decoder.hidden(torch.tensor([window]))[0]).double().numpy()
        for position in range(CTX // 2 if ruler.convention == "llama.cpp" else 0, CTX - 1):
            x = logits[position] - logits[position].max()
            rows.append((x - math.log(np.exp(x).sum()), window[position + 1]))
    return rows


@pytest.mark.parametrize("name", RULERS)
@pytest.mark.parametrize("add_bos", [True, False])
def test_perplexity_by_a_slow_loop(name: str, add_bos: bool) -> None:
    reader, text, ruler = model(tokenizer=letters.vocab(add_bos=add_bos)), letters.text(150), RULERS[name]
    nll = np.array([-row[target] for row, target in slow_rows(reader, text, ruler)])
    found = perplexity.measure(reader, text, ruler)
    n = len(nll)
    assert found.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-6)
    assert found.stderr == pytest.approx(
        math.sqrt(((nll**2).mean() - nll.mean() ** 2) / (n - 1)) * math.exp(nll.mean()), rel=1e-5
    )
    assert found.nll == pytest.approx(nll.mean(), rel=1e-6)
    assert (found.tokens, found.windows, found.ctx) == (n, 9, CTX)
    assert (found.convention, found.engine, found.metrics_version) == (ruler.convention, "torch", 1)
    assert found.text_sha256 == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("name", RULERS)
def test_comparison_by_a_slow_loop(name: str) -> None:
    original, text, ruler = model(), letters.text(150), RULERS[name]
    candidate = disturbed(original)
    a, b = slow_rows(original, text, ruler), slow_rows(candidate, text, ruler)
    kld = np.array([(np.exp(p) * (p - q)).sum() for (p, _), (q, _) in zip(a, b, strict=True)])
    difference = np.array([p[t] - q[t] for (p, t), (q, _) in zip(a, b, strict=True)])
    top = np.mean([p.argmax() == q.argmax() for (p, _), (q, _) in zip(a, b, strict=True)])
    found = compare.compare(candidate, original, text, ruler)
    assert found.ratio == pytest.approx(math.exp(difference.mean()), rel=1e-6)
    assert found.ratio_stderr == pytest.approx(found.ratio * difference.std() / math.sqrt(len(kld) - 1), rel=1e-4)
    assert found.kld_mean == pytest.approx(kld.mean(), abs=1e-6)
    assert found.kld_median == pytest.approx(np.quantile(kld, 0.5), abs=1e-6)
    assert found.kld_99 == pytest.approx(np.quantile(kld, 0.99), abs=1e-6)
    assert found.kld_max == pytest.approx(kld.max(), abs=1e-6)
    assert found.top1 == pytest.approx(top, abs=1e-12)
    assert found.kld_mean > 0.005
    assert found.top1 < 1
    assert found.candidate == perplexity.measure(candidate, text, ruler)
    assert found.original == perplexity.measure(original, text, ruler)


def test_a_model_against_itself_has_lost_nothing() -> None:
    found = compare.compare(model(), model(), letters.text(150), Ruler(ctx=CTX))
    assert (found.kld_mean, found.kld_max, found.ratio, found.top1) == (0, 0, 1, 1)


def test_several_candidates_cost_one_pass_over_the_original() -> None:
    original, text = model(), letters.text(150)
    prepared = compare.prepare(original, text, Ruler(ctx=CTX))
    name = "model.layers.0.mlp.up_proj.weight"
    first = compare.against(disturbed(original), prepared)
    once = original.asked[name]
    second = compare.against(disturbed(original, 0.1), prepared)
    assert original.asked[name] == once
    assert compare.against(disturbed(original), prepared) == first
    assert second.kld_mean > first.kld_mean


def test_models_that_cannot_be_compared() -> None:
    text, ruler = letters.text(150), Ruler(ctx=CTX)
    with pytest.raises(UsageError, match=r"90 tokens.* 96"):
        compare.compare(tiny(replace(TINY, vocab_size=90), tokenizer=letters.vocab(90)), model(), text, ruler)
    swapped = letters.vocab()
    swapped.tokens[5], swapped.tokens[6] = swapped.tokens[6], swapped.tokens[5]
    with pytest.raises(UsageError, match=r"other tokens"):
        compare.compare(model(tokenizer=swapped), model(), text, ruler)
    with pytest.raises(UsageError, match=r"other tokens.*BOS None"):
        compare.compare(model(tokenizer=letters.vocab(add_bos=False)), model(), text, ruler)
    with pytest.raises(UnsupportedError, match=r"no tokenizer"):
        compare.compare(model(), model(tokenizer=None), text, ruler)
    assert compare.compare(model(tokenizer=None), model(), text, ruler).kld_mean == 0


def test_output_that_is_no_number_is_an_error() -> None:
    reader = model()
    reader.tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    with pytest.raises(IntegrityError, match=r"not finite"):
        perplexity.measure(reader, letters.text(150), Ruler(ctx=CTX))
    with pytest.raises(IntegrityError, match=r"not finite"):
        compare.compare(reader, model(), letters.text(150), Ruler(ctx=CTX))


def test_engines_by_name() -> None:
    assert set(engines.engines()) == {"torch", "llama.cpp"}
    with pytest.raises(UsageError, match=r"unknown engine 'vllm'"):
        perplexity.measure(model(), letters.text(150), Ruler(ctx=CTX, engine="vllm"))
    with pytest.raises(UsageError, match=r"GGUF"):
        perplexity.measure(model(), letters.text(150), Ruler(ctx=CTX, engine="llama.cpp"))


def test_llama_cpp_absent_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UnsupportedError, match=r"pip install weightsmith\[llama\]"):
        perplexity.measure(model(container="gguf"), letters.text(150), Ruler(ctx=CTX, engine="llama.cpp"))


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    perplexity.measure(model(), letters.text(150), Ruler(ctx=CTX, threads=before + 1))
    assert torch.get_num_threads() == before


def test_short_text_is_refused_before_any_weight_is_read() -> None:
    reader = model()
    with pytest.raises(UsageError, match=r"31 tokens.* needs 32"):
        perplexity.measure(reader, letters.text(30), Ruler(ctx=CTX))
    assert not reader.asked
