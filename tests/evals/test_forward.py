"""The decoder against transformers, and what streaming promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.evals.memory_reader import TINY, MemoryReader, random_tensors, tiny
from tests.evals.oracle import oracle
from weightsmith.errors import UnsupportedError, UsageError
from weightsmith.evals import forward
from weightsmith.evals.forward import rope, weights
from weightsmith.types import RopeScaling

CASES = {
    "plain": TINY,
    "multi-head": replace(TINY, n_kv_heads=4),
    "multi-query": replace(TINY, n_kv_heads=1),
    "wide heads": replace(TINY, head_dim=12),
    "linear": replace(TINY, rope_scaling=RopeScaling("linear", 4.0)),
    "llama3": replace(TINY, head_dim=32, rope_theta=500.0, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64)),
    "biases": replace(TINY, attention_bias=True, mlp_bias=True),
    "tied": replace(TINY, tie_word_embeddings=True),
    "mistral": replace(TINY, family="mistral", head_dim=16),
    "sliding": replace(TINY, family="mistral", sliding_window=4),
    "window of one": replace(TINY, family="mistral", sliding_window=1),
    "mixtral": replace(TINY, family="mixtral", n_experts=5, n_experts_used=2),
    "one expert": replace(TINY, family="mixtral", n_experts=3, n_experts_used=1, n_kv_heads=4),
    "all experts": replace(TINY, family="mixtral", n_experts=3, n_experts_used=3, sliding_window=7),
    "window as long": replace(TINY, family="mistral", sliding_window=24),
}


def some_tokens(batch: int = 3, length: int = 24, vocab_size: int = 96) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, vocab_size, (batch, length)))


def run(reader: MemoryReader, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    decoder = forward.load(reader, **options)
    hidden = decoder.hidden(tokens)
    return decoder.logits(hidden.flatten(0, 1)).unflatten(0, tokens.shape)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str) -> None:
    reader = tiny(CASES[case])
    tokens = some_tokens()
    with torch.no_grad():
        expected = oracle(reader.config, reader.tensors)(tokens).logits
    found = run(reader, tokens)
    assert expected.std() > 0.5
    assert (found - expected).abs().max() < 1e-4


def test_sliding_window_and_scaling_change_the_result() -> None:
    """The cases above would prove nothing if these settings had no effect at this size."""
    tokens = some_tokens()
    plain = run(MemoryReader(TINY, random_tensors(TINY)), tokens)
    for case in ("linear", "sliding"):
        assert (run(tiny(CASES[case]), tokens) - plain).abs().max() > 1e-2
    unscaled = replace(CASES["llama3"], rope_scaling=None)
    assert (run(tiny(CASES["llama3"]), tokens) - run(tiny(unscaled), tokens)).abs().max() > 1e-2


def test_llama3_frequencies_by_the_formula() -> None:
    config = CASES["llama3"]
    scaling = config.rope_scaling
    assert scaling is not None
    found = rope.frequencies(config)
    branches = set()
    for i, value in enumerate(found.tolist()):
        freq = config.rope_theta ** (-2 * i / config.head_dim)
        length = 2 * np.pi / freq
        old = scaling.original_max_position_embeddings
        if length < old / scaling.high_freq_factor:
            branches.add("kept")
            expected = freq
        elif length > old / scaling.low_freq_factor:
            branches.add("divided")
            expected = freq / scaling.factor
        else:
            branches.add("blended")
            smooth = (old / length - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
            expected = (1 - smooth) * freq / scaling.factor + smooth * freq
        assert value == pytest.approx(expected, rel=1e-12)
    assert branches == {"kept", "divided", "blended"}


def test_small_slabs_and_budget_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = some_tokens()
    expected = run(tiny(), tokens)
    monkeypatch.setattr(weights, "SLAB", 1000)
    reader = tiny(unit=8)
    assert (run(reader, tokens, memory=1) - expected).abs().max() < 1e-5


def test_each_layer_is_read_once_for_all_windows() -> None:
    reader = tiny()
    decoder = forward.load(reader)
    decoder.hidden(some_tokens(batch=7))
    for name, info in reader.infos().items():
        if ".layers." in name:
            assert reader.asked[name] == info.n_rows, name
    assert "lm_head.weight" not in reader.asked


def test_two_layers_at_most_are_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    config = replace(TINY, n_layers=6)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    original = weights.tensor

    def counted(reader: Any, name: str, place: Any) -> torch.Tensor:
        nonlocal most
        value = original(reader, name, place)
        if name.endswith("up_proj.weight"):
            alive.append(weakref.ref(value))
            most = max(most, sum(ref() is not None for ref in alive))
        return value

    monkeypatch.setattr(weights, "tensor", counted)
    gc.disable()
    try:
        forward.load(tiny(config)).hidden(some_tokens())
    finally:
        gc.enable()
    assert len(alive) == 6
    assert most <= 2


def test_embedding_rows_that_nobody_wants_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = tiny()
    monkeypatch.setattr(weights, "SLAB", 4 * 32 * 4)  # four rows
    place = weights.Place(torch.device("cpu"), torch.float32)
    ids = torch.tensor([[90, 3], [5, 3], [91, 40]])
    found = weights.gather(reader, "model.embed_tokens.weight", ids, place)
    np.testing.assert_array_equal(found.numpy(), reader.tensors["model.embed_tokens.weight"][ids.numpy()])
    assert reader.asked["model.embed_tokens.weight"] == 3 + 1 + 2  # 3..5, 40, 90..91


def test_windows_do_not_see_each_other() -> None:
    tokens = some_tokens(batch=4)
    together = run(tiny(), tokens)
    for i in range(4):
        torch.testing.assert_close(run(tiny(), tokens[i : i + 1])[0], together[i], atol=1e-5, rtol=0)


def test_on_layer_sees_every_layer_and_a_layer_is_a_pure_function() -> None:
    """Streaming by hand, as lock-step runs and calibration will, gives the same states."""
    reader, tokens = tiny(), some_tokens()
    decoder = forward.load(reader)
    seen: list[torch.Tensor] = []
    numbers: list[int] = []

    def keep(number: int, hidden: torch.Tensor) -> None:
        numbers.append(number)
        seen.append(hidden.clone())

    decoder.hidden(tokens, on_layer=keep)
    assert numbers == [0, 1]
    kind = decoder.kind
    x = weights.gather(reader, kind.EMBEDDING, tokens, decoder.place)
    tables = kind.tables(reader.config, tokens.shape[1], decoder.place)
    taps: dict[str, tuple[int, ...]] = {}
    for number, layer in enumerate(decoder.layers()):
        before = x.clone()
        after = kind.layer(
            layer, x, tables, reader.config, lambda names, into: taps.update(dict.fromkeys(names, tuple(into.shape)))
        )
        torch.testing.assert_close(x, before, atol=0, rtol=0)
        torch.testing.assert_close(after, seen[number], atol=1e-5, rtol=0)
        x = after
    assert taps == {
        **{f"self_attn.{part}_proj": (3, 24, 32) for part in "qkvo"},
        "mlp.gate_proj": (3, 24, 32),
        "mlp.up_proj": (3, 24, 32),
        "mlp.down_proj": (3, 24, 48),
    }


def test_a_failing_read_surfaces() -> None:
    reader = tiny()
    del reader.tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(KeyError):
        forward.load(reader).hidden(some_tokens())


def test_half_precision_stays_close() -> None:
    tokens = some_tokens()
    expected = run(tiny(), tokens)
    found = run(tiny(), tokens, dtype=torch.bfloat16)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.5


def test_unknown_family_and_device() -> None:
    reader = tiny()
    reader.config = replace(TINY, family="gpt2")
    with pytest.raises(UnsupportedError, match="gpt2"):
        forward.load(reader)
    with pytest.raises(UsageError, match="cannot be used"):
        forward.load(tiny(), device="quantum")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_cpu() -> None:
    tokens = some_tokens()
    found = run(tiny(), tokens, device="cuda").cpu()
    assert (found - run(tiny(), tokens)).abs().max() < 1e-3
