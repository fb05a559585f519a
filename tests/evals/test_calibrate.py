"""The calibration pass against a model in transformers whose linears tell what they were fed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.evals import letters
from tests.evals.memory_reader import TINY, MemoryReader, tiny
from tests.evals.oracle import oracle
from weightsmith.errors import IntegrityError, UsageError
from weightsmith.evals.calibration import Block, Options, calibrate, imatrix, products
from weightsmith.evals.calibration.rows import draw
from weightsmith.evals.calibration.states import States
from weightsmith.evals.forward import stages
from weightsmith.quant.calibration import Moments

CTX = 16
ALL = Options(rows=None, ctx=CTX)
TEXT = letters.text(CTX * 9 + 5)
GROUPS = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]


@pytest.fixture(autouse=True)
def _letters(monkeypatch: pytest.MonkeyPatch) -> None:
    letters.install(monkeypatch)
    monkeypatch.setattr(products, "is_quick", lambda _device: False)  # what is compared here is exact


def model(**fields: Any) -> MemoryReader:
    return tiny(**({"tokenizer": letters.vocab()} | fields))


def inputs_by_hooks(reader: MemoryReader, tokens: np.ndarray) -> dict[str, torch.Tensor]:
    """What every linear of the transformers model is fed, float64 [tokens, in], by canonical weight name."""
    net = oracle(reader.config, reader.tensors)
    seen: dict[str, torch.Tensor] = {}
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear):

            def hook(_: Any, inputs: Any, name: str = name) -> None:
                seen[f"{name}.weight"] = inputs[0].flatten(0, 1).double()

            module.register_forward_pre_hook(hook)
    with torch.no_grad():
        net(torch.from_numpy(tokens))
    return seen


def test_moments_are_those_of_transformers() -> None:
    reader = model()
    expected = inputs_by_hooks(reader, draw(reader, TEXT, ALL))
    found = {}
    for block in calibrate(reader, TEXT, ALL, sequential=False):
        for name, moments in block.moments.items():
            found[name] = (moments.h.clone(), moments.diagonal, moments.tokens)
    assert set(found) == {name for name in expected if name != "lm_head.weight"}
    for name, (h, diagonal, tokens) in found.items():
        x = expected[name]
        assert tokens == len(x) == CTX * 9
        torch.testing.assert_close(h.double(), x.T @ x, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(diagonal, (x * x).sum(0), rtol=1e-4, atol=1e-3)


def test_a_sequential_pass_measures_the_same_if_nothing_is_replaced() -> None:
    reader = model()
    at_once = {
        name: moments.h.clone()
        for block in calibrate(reader, TEXT, ALL, sequential=False)
        for name, moments in block.moments.items()
    }
    groups, found = [], {}
    for block in calibrate(reader, TEXT, ALL):
        assert all(name.startswith(block.prefix) for name in block.moments)
        groups.append((block.index, {name.split(".")[-2] for name in block.moments}))
        assert len({id(moments) for moments in block.moments.values()}) == 1
        found.update({name: moments.h.clone() for name, moments in block.moments.items()})
    assert groups == [(layer, group) for layer in range(2) for group in GROUPS]
    assert set(found) == set(at_once)
    for name, h in found.items():
        torch.testing.assert_close(h, at_once[name], rtol=1e-5, atol=1e-4)


def test_replaced_weights_are_what_the_rows_pass_through() -> None:
    """Replacing every linear in turn must give what a model of the replaced weights is fed."""
    reader = model()
    rng = np.random.default_rng(5)
    changed = dict(reader.tensors)
    for name, value in reader.tensors.items():
        if "_proj" in name:
            changed[name] = value + rng.standard_normal(value.shape).astype(np.float32) * np.float32(0.05)
    expected = inputs_by_hooks(MemoryReader(TINY, changed), draw(reader, TEXT, ALL))
    original = inputs_by_hooks(reader, draw(reader, TEXT, ALL))
    for block in calibrate(reader, TEXT, ALL):
        for name, moments in block.moments.items():
            x = expected[name]
            torch.testing.assert_close(moments.h.double(), x.T @ x, rtol=1e-3, atol=1e-2)
            block.weights[name.removeprefix(block.prefix)] = torch.from_numpy(changed[name])
    last = "model.layers.1.mlp.down_proj.weight"
    assert (original[last] - expected[last]).abs().max() > 0.05  # or the test would show nothing


def test_every_linear_computes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many groups a layer is measured in, and from rows that were drawn before as from a text."""
    calls = 0
    plain = stages.linear

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return plain(*arguments)

    monkeypatch.setattr(stages, "linear", counted)
    reader = model()
    for _ in calibrate(reader, draw(reader, TEXT, ALL), ALL):
        pass
    assert calls == 2 * 7


def test_scales_are_prepared_from_moments_of_the_next_group() -> None:
    """Of one step of rows here, which is all of them: what the next group is then fed if nothing is replaced."""
    reader = model()
    ahead: list[dict[str, torch.Tensor]] = []

    def prepare(_: Block, found: Mapping[str, Moments]) -> None:
        ahead.append({name: moments.h.clone() for name, moments in found.items()})

    blocks = [
        {name: moments.h.clone() for name, moments in block.moments.items()}
        for block in calibrate(reader, TEXT, ALL, prepare=prepare)
    ]
    assert [len(found) for found in ahead] == [1, 0, 1, 0] * 2
    for found, following in zip(ahead[::2], blocks[1::2], strict=True):
        assert set(found) == set(following)
        for name, h in found.items():
            torch.testing.assert_close(h, following[name])


def test_finished_layers_are_passed_through() -> None:
    reader = model()
    changed = {
        name.removeprefix("model.layers.0."): torch.from_numpy(value * np.float32(1.1))
        for name, value in reader.tensors.items()
        if name.startswith("model.layers.0.") and "_proj" in name
    }
    whole: dict[str, torch.Tensor] = {}
    for block in calibrate(reader, TEXT, ALL):
        whole.update({name: moments.diagonal for name, moments in block.moments.items()})
        if block.index == 0:
            block.weights.update(
                {name.removeprefix(block.prefix): changed[name.removeprefix(block.prefix)] for name in block.moments}
            )
    resumed = {
        name: moments.diagonal
        for block in calibrate(reader, TEXT, ALL, finished=lambda index: changed if index == 0 else None)
        for name, moments in block.moments.items()
    }
    assert resumed
    assert not any(".layers.0." in name for name in resumed)
    for name, diagonal in resumed.items():
        torch.testing.assert_close(diagonal, whole[name])


@pytest.mark.parametrize("sequential", [False, True])
def test_spilled_states_change_nothing(tmp_path: Path, sequential: bool) -> None:
    reader = model()
    plain = [
        moments.h.clone()
        for block in calibrate(reader, TEXT, ALL, sequential=sequential)
        for moments in block.moments.values()
    ]
    tight = replace(ALL, memory=1, spill=tmp_path)
    spilled = [
        moments.h.clone()
        for block in calibrate(reader, TEXT, tight, sequential=sequential)
        for moments in block.moments.values()
    ]
    for one, other in zip(plain, spilled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    assert list(tmp_path.iterdir()) == []


def test_states_in_memory_and_in_a_file(tmp_path: Path) -> None:
    value = torch.arange(5 * 3 * 4, dtype=torch.float32).view(5, 3, 4)
    for memory, spilled in ((5 * 3 * 4 * 4, False), (5 * 3 * 4 * 4 - 1, True)):
        with States((5, 3, 4), memory=memory, spill=tmp_path) as states:
            assert states.spilled == spilled
            states.put(0, value[:2])
            states.put(2, value[2:])
            states.put(1, -value[1:3])
            assert torch.equal(states.take(1, 3), -value[1:3])
            assert len(states.take(4, 6)) == 1
            assert torch.equal(states.take(3, 5), value[3:])


def test_each_layer_is_read_once() -> None:
    reader = model()
    for _ in calibrate(reader, TEXT, replace(ALL, memory=1)):
        pass
    for name, info in reader.infos().items():
        if ".layers." in name:
            assert reader.asked[name] == info.n_rows, name


def test_rows_are_a_seeded_sample_in_order() -> None:
    reader = model()
    whole = draw(reader, TEXT, ALL)
    assert whole.shape == (9, CTX)
    assert (whole[:, 0] == letters.BOS).all()
    some = draw(reader, TEXT, replace(ALL, rows=4))
    again = draw(reader, TEXT, replace(ALL, rows=4))
    other = draw(reader, TEXT, replace(ALL, rows=4, seed=1))
    places = [int(np.flatnonzero((whole == row).all(axis=1))[0]) for row in some]
    assert len(set(places)) == 4
    assert places == sorted(places)
    assert (some == again).all()
    assert (some != other).any()
    assert (draw(reader, TEXT, replace(ALL, rows=99)) == whole).all()


def test_imatrix_is_the_diagonal_under_gguf_names() -> None:
    reader = model()
    expected = inputs_by_hooks(reader, draw(reader, TEXT, ALL))
    found = imatrix(reader, TEXT, ALL, output=True, dataset="letters")
    assert (found.chunk_count, found.chunk_size, list(found.datasets)) == (9, CTX, ["letters"])
    assert len(found.entries) == 2 * 7 + 1
    for gguf, name in {
        "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
        "output.weight": "lm_head.weight",
    }.items():
        entry = found.entries[gguf]
        assert entry.counts.tolist() == [CTX * 9]
        np.testing.assert_allclose(entry.sums[0], (expected[name] ** 2).sum(0).numpy(), rtol=1e-3)
    for others in (("attn_k", "attn_v"), ("ffn_gate", "ffn_up")):
        one, other = (found.entries[f"blk.0.{part}.weight"].sums for part in others)
        np.testing.assert_array_equal(one, other)
    assert "output.weight" not in imatrix(reader, TEXT, ALL).entries


def test_a_tied_output_matrix_is_the_embedding() -> None:
    reader = model(config=replace(TINY, tie_word_embeddings=True))
    assert "token_embd.weight" in imatrix(reader, TEXT, ALL, output=True).entries


def test_an_abandoned_pass_leaves_torch_as_it_was() -> None:
    before = torch.get_num_threads()
    blocks = calibrate(model(), TEXT, replace(ALL, threads=1))
    next(blocks)
    blocks.close()
    assert torch.get_num_threads() == before


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(UsageError, match="rows is 0"):
        Options(rows=0)
    with pytest.raises(UsageError, match="has 31 tokens"):
        next(calibrate(model(), letters.text(30), ALL))
    reader = model()
    reader.tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = np.inf
    with pytest.raises(IntegrityError, match="not finite") as caught:
        list(calibrate(reader, TEXT, ALL, sequential=False))
    assert caught.value.tensor == "model.layers.0.mlp.down_proj.weight"
