"""Experts under calibration: each is measured on its own tokens, and what happens to those that saw too few."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.evals import letters
from tests.evals.memory_reader import TINY, MemoryReader, tiny
from weightsmith.evals import forward
from weightsmith.evals.calibration import Options, calibrate, imatrix, products
from weightsmith.evals.calibration.rows import draw
from weightsmith.quant.calibration import Moments

MIXTRAL = replace(TINY, family="mixtral", n_experts=4, n_experts_used=2)
ALL = Options(rows=None, ctx=16)
TEXT = letters.text(16 * 20 + 5)
MOE = "model.layers.{}.block_sparse_moe."


@pytest.fixture(autouse=True)
def _letters(monkeypatch: pytest.MonkeyPatch) -> None:
    letters.install(monkeypatch)
    monkeypatch.setattr(products, "is_quick", lambda _device: False)  # what is compared here is exact


def model(*, shy: int | None = None) -> MemoryReader:
    """shy: an expert that no token chooses: its logit is the mean of the others', and only the best one is used."""
    config = MIXTRAL if shy is None else replace(MIXTRAL, n_experts_used=1)
    reader = tiny(config, tokenizer=letters.vocab())
    for layer in range(2 if shy is not None else 0):
        router = reader.tensors[MOE.format(layer) + "gate.weight"]
        router[shy] = np.delete(router, shy or 0, axis=0).mean(axis=0)
    return reader


def by_hand(reader: MemoryReader, layer: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Normed inputs [tokens, hidden] of a layer's experts, the experts chosen, and the layer's weights."""
    tokens = torch.from_numpy(draw(reader, TEXT, ALL))
    seen: dict[str, torch.Tensor] = {}
    decoder = forward.load(reader)
    x = forward.decoder.weights.gather(reader, decoder.kind.EMBEDDING, tokens, decoder.place)
    tables = decoder.kind.tables(decoder.config, 16, decoder.place)
    for index in range(layer + 1):
        prefix = f"model.layers.{index}."
        own = {k.removeprefix(prefix): torch.from_numpy(v) for k, v in reader.tensors.items() if k.startswith(prefix)}
        x = decoder.kind.layer(
            own, x, tables, decoder.config, lambda names, into: seen.update(dict.fromkeys(names, into))
        )
    normed = seen["block_sparse_moe.gate"]
    logits = normed @ own["block_sparse_moe.gate.weight"].T
    return normed, logits.topk(reader.config.n_experts_used).indices, own


def test_each_expert_is_measured_on_its_own_tokens() -> None:
    reader = model()
    normed, chosen, own = by_hand(reader, 1)
    blocks = [{k: (m.h.clone(), m.tokens) for k, m in b.moments.items()} for b in calibrate(reader, TEXT, ALL)]
    groups = blocks[len(blocks) // 2 :]  # of layer 1
    kinds = [{name.split("block_sparse_moe.")[-1].removesuffix(".weight") for name in group} for group in groups]
    assert kinds[2:] == [
        {"gate"},
        {f"experts.{e}.{w}" for e in range(4) for w in ("w1", "w3")},
        {f"experts.{e}.w2" for e in range(4)},
    ]
    counts = []
    for expert in range(4):
        mine = normed[(chosen == expert).any(1)].double()
        for part in ("w1", "w3"):
            h, tokens = groups[3][f"{MOE.format(1)}experts.{expert}.{part}.weight"]
            assert tokens == len(mine)
            torch.testing.assert_close(h.double(), mine.T @ mine, rtol=1e-4, atol=1e-3)
        gate, up = (mine.float() @ own[f"block_sparse_moe.experts.{expert}.{w}.weight"].T for w in ("w1", "w3"))
        inner = (torch.nn.functional.silu(gate) * up).double()
        h, _ = groups[4][f"{MOE.format(1)}experts.{expert}.w2.weight"]
        torch.testing.assert_close(h.double(), inner.T @ inner, rtol=1e-3, atol=1e-3)
        counts.append(len(mine))
    assert sum(counts) == 2 * len(normed)
    assert len(set(counts)) > 1


def test_moments_take_turns_where_they_have_no_room_beside_each_other() -> None:
    """Bytes for two of the experts' w2, and for four of their smaller w1."""
    reader = model()
    narrow = replace(ALL, memory=2 * 4 * 48 * 48)
    found: dict[str, torch.Tensor] = {}
    groups = []
    for block in calibrate(reader, TEXT, narrow):
        groups.append(len(block.moments))
        found |= {name: moments.h.clone() for name, moments in block.moments.items()}
    assert groups == [3, 1, 1, 8, 2, 2] * 2
    for block in calibrate(reader, TEXT, ALL):
        for name, moments in block.moments.items():
            torch.testing.assert_close(found.pop(name), moments.h, rtol=1e-4, atol=1e-3)
    assert not found


def test_an_imatrix_counts_tokens_for_each_expert() -> None:
    reader = model(shy=2)
    found = imatrix(reader, TEXT, ALL)
    normed, chosen, _ = by_hand(reader, 0)
    for stack in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
        entry = found.entries[f"blk.0.{stack}.weight"]
        assert entry.counts.tolist() == [int((chosen == e).sum()) for e in range(4)]
        assert entry.counts[2] == 0
        assert not entry.sums[2].any()
    mine = normed[(chosen == 1).any(1)].double()
    np.testing.assert_allclose(found.entries["blk.0.ffn_up_exps.weight"].sums[1], (mine**2).sum(0), rtol=1e-3)
    assert found.entries["blk.0.ffn_gate_inp.weight"].sums.shape == (1, 32)
    assert (found.importance("blk.0.ffn_up_exps.weight", 32, matrices=4)[2] == 1).all()


def test_an_expert_that_saw_nothing_is_filled_up_and_named(caplog: pytest.LogCaptureFixture) -> None:
    reader = model(shy=2)
    found: dict[str, Moments] = {}
    with caplog.at_level(logging.WARNING):
        for block in calibrate(reader, TEXT, ALL):
            found |= block.moments
    assert "model.layers.0: too few" in caplog.text
    assert "experts.2.w1 0" in caplog.text
    linears = {name for name in reader.tensors if reader.tensors[name].ndim == 2 and ".layers." in name}
    assert set(found) == linears
    prefix = MOE.format(0) + "experts."
    others = [found[f"{prefix}{e}.w1.weight"] for e in (0, 1, 3)]
    mean = sum(one.h for one in others) / sum(one.tokens for one in others)
    empty = found[f"{prefix}2.w1.weight"]
    assert empty.tokens == 32 // 4
    assert empty is found[f"{prefix}2.w3.weight"]
    torch.testing.assert_close(empty.h, mean * 8, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[f"{prefix}2.w2.weight"].h, torch.eye(48) * 12)


def test_filling_up_keeps_what_was_seen() -> None:
    rng = torch.Generator().manual_seed(0)
    one, pool = Moments(6), Moments(6)
    few, many = torch.randn(2, 6, generator=rng), torch.randn(50, 6, generator=rng)
    one.add(few)
    pool.add(many)
    one.fill(pool, 10)
    torch.testing.assert_close(one.h, few.T @ few + many.T @ many * 10 / 50)
    torch.testing.assert_close(one.diagonal.float(), one.h.diagonal())
    assert one.tokens == 12
    alone = Moments(6)
    alone.add(few)
    alone.fill(None, 4)
    torch.testing.assert_close(alone.h, few.T @ few + torch.eye(6) * (few**2).mean() * 4)
