"""The original's rows beside ours: against two models in transformers whose linears tell what they were fed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.evals import letters
from tests.evals.memory_reader import MemoryReader, tiny
from tests.evals.oracle import oracle
from tests.evals.test_calibrate import ALL, TEXT, inputs_by_hooks, model
from tests.evals.test_calibrate_experts import MIXTRAL
from weightsmith.errors import IntegrityError
from weightsmith.evals.calibration import Block, calibrate, products
from weightsmith.evals.calibration.rows import draw
from weightsmith.evals.calibration.stream import held_out, nearest, wanted

CLOSING = ("o_proj.weight", "down_proj.weight")


@pytest.fixture(autouse=True)
def _letters(monkeypatch: pytest.MonkeyPatch) -> None:
    letters.install(monkeypatch)
    monkeypatch.setattr(products, "is_quick", lambda _device: False)


def changed_like(reader: MemoryReader, *, seed: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: value + rng.standard_normal(value.shape).astype(np.float32) * np.float32(0.05 * ("_proj" in name))
        for name, value in reader.tensors.items()
    }


def blocks(reader: MemoryReader, changed: dict[str, np.ndarray], **options: Any) -> Iterator[Block]:
    """What is measured while every linear is replaced in turn."""
    for block in calibrate(reader, TEXT, options.pop("options", ALL), drift=True, **options):
        yield block
        for name in block.moments:
            block.weights[name.removeprefix(block.prefix)] = torch.from_numpy(changed[name])


def drifts(reader: MemoryReader, changed: dict[str, np.ndarray], **options: Any) -> dict[str, Any]:
    """What is measured while every linear is replaced in turn, tokens held out among the others, by canonical name."""
    found = {}
    for block in blocks(reader, changed, **options):
        for name in block.moments:
            if name in block.drifts:
                drift = block.drifts[name]
                sums, tokens = drift.sums.clone(), drift.tokens
                for into, lost in drift.held:
                    sums += lost.T @ into
                    tokens += len(into)
                assert tokens == block.moments[name].tokens > drift.tokens > 0
                found[name] = (sums, tokens)
    return found


def stream_behind(reader: MemoryReader, tensors: dict[str, np.ndarray], name: str) -> torch.Tensor:
    """The residual stream that linear `name` adds to, [tokens, hidden], told from what the next norm is fed."""
    net = oracle(reader.config, tensors)
    index = int(name.split(".")[2])
    seen: list[torch.Tensor] = []
    block = net.model.layers[index]
    norm = block.input_layernorm if "o_proj" in name else block.post_attention_layernorm
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1).double()))
    with torch.no_grad():
        net(torch.from_numpy(draw(reader, TEXT, ALL)))
    return seen[0]


def test_it_is_that_of_two_models() -> None:
    reader = model()
    changed = changed_like(reader)
    rows = draw(reader, TEXT, ALL)
    before, after = inputs_by_hooks(reader, rows), inputs_by_hooks(MemoryReader(reader.config, changed), rows)
    found = drifts(reader, changed)
    assert set(found) == {name for name in before if "_proj" in name}
    for name, (sums, tokens) in found.items():
        x, ours = before[name], after[name]
        assert tokens == len(x)
        lost = x - ours
        if name.endswith(CLOSING):
            off = stream_behind(reader, reader.tensors, name) - stream_behind(reader, changed, name)
            lost = lost @ torch.from_numpy(reader.tensors[name]).double().T + off
        torch.testing.assert_close(sums.double(), lost.T @ ours, rtol=1e-3, atol=2e-2)
    assert found["model.layers.1.mlp.down_proj.weight"][0].abs().max() > 1  # or the test would show nothing
    assert not found["model.layers.0.self_attn.q_proj.weight"][0].any()  # nothing lies before it


@pytest.mark.parametrize(("rows", "count"), [(1, 0), (2, 1), (64, 1), (128, 2), (200, 3), (10_000, 4)])
def test_the_last_rows_are_held_out(rows: int, count: int) -> None:
    assert held_out(rows) == count


def test_rows_held_out_are_what_the_model_is_fed() -> None:
    reader = model()
    changed = changed_like(reader)
    rows = draw(reader, TEXT, ALL)
    ours = inputs_by_hooks(MemoryReader(reader.config, changed), rows)
    name = "model.layers.1.mlp.down_proj.weight"
    for block in blocks(reader, changed):
        if name in block.drifts:
            ((into, _),) = block.drifts[name].held
            torch.testing.assert_close(into.double(), ours[name][-rows.shape[1] :], rtol=1e-3, atol=2e-2)
            return
    pytest.fail("it was not measured")


def test_what_is_nearest_on_rows_held_out_is_taken() -> None:
    reader = model()
    changed = changed_like(reader)
    rows = draw(reader, TEXT, ALL)
    before, after = inputs_by_hooks(reader, rows), inputs_by_hooks(MemoryReader(reader.config, changed), rows)
    for block in blocks(reader, changed):
        for name, choices in zip(block.moments, wanted(block, list(block.moments)), strict=True):
            w = choices[0]
            assert torch.equal(w, block.weights[name.removeprefix(block.prefix)])
            if name == "model.layers.1.self_attn.q_proj.weight":
                assert len(choices) == 2  # something was lost before it
                held = slice(-rows.shape[1], None)
                for seed in range(4):
                    noise = 0.05 * torch.randn(2, *w.shape, generator=torch.Generator().manual_seed(seed))
                    rounded = [one + by for one, by in zip(choices, noise, strict=True)]
                    outputs = [after[name][held] @ q.double().T for q in rounded]
                    errors = [float((out - before[name][held] @ w.double().T).square().sum()) for out in outputs]
                    assert nearest(block, name, w, rounded) == errors.index(min(errors))
                    assert nearest(block, name, w, rounded[::-1]) == 1 - errors.index(min(errors))
                assert nearest(block, name, w, rounded[:1]) == 0
                return
    pytest.fail("it was not measured")


def test_finished_layers_leave_the_original_where_it_was() -> None:
    reader = model()
    changed = changed_like(reader)
    whole = drifts(reader, changed)
    ready = {
        name.removeprefix("model.layers.0."): torch.from_numpy(value)
        for name, value in changed.items()
        if name.startswith("model.layers.0.")
    }
    resumed = drifts(reader, changed, finished=lambda index: ready if index == 0 else None)
    assert resumed
    assert set(resumed) == {name for name in whole if ".layers.1." in name}
    for name, (sums, _) in resumed.items():
        torch.testing.assert_close(sums, whole[name][0])


def test_spilled_states_change_nothing(tmp_path: Path) -> None:
    reader = model()
    changed = changed_like(reader)
    plain = drifts(reader, changed)
    spilled = drifts(reader, changed, options=replace(ALL, memory=1, spill=tmp_path))
    for name, (sums, tokens) in plain.items():
        torch.testing.assert_close(spilled[name][0], sums, rtol=1e-4, atol=1e-3)
        assert spilled[name][1] == tokens
    assert list(tmp_path.iterdir()) == []


def mixture(**fields: Any) -> tuple[MemoryReader, dict[str, np.ndarray]]:
    """A mixture, and weights that its linears and experts are to be replaced by."""
    reader = tiny(replace(MIXTRAL, **fields), tokenizer=letters.vocab())
    changed = changed_like(reader)
    for name in changed:
        if ".experts." in name:
            changed[name] = reader.tensors[name] * np.float32(1.2)
    return reader, changed


def test_attention_is_compared_behind_the_original_s_own_experts() -> None:
    reader, changed = mixture()
    rows = draw(reader, TEXT, ALL)
    before, after = inputs_by_hooks(reader, rows), inputs_by_hooks(MemoryReader(reader.config, changed), rows)
    found = drifts(reader, changed)
    assert set(found) == {name for name in reader.tensors if "_proj" in name or ".experts." in name}
    name = "model.layers.1.self_attn.q_proj.weight"
    x, ours = before[name], after[name]
    torch.testing.assert_close(found[name][0].double(), (x - ours).T @ ours, rtol=2e-3, atol=5e-2)


def behind_attention(reader: MemoryReader, tensors: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream that the experts of layer 1 add to, and what they are fed, [tokens, hidden]."""
    net = oracle(reader.config, tensors)
    seen: list[torch.Tensor] = []
    norm = net.model.layers[1].post_attention_layernorm
    norm.register_forward_hook(lambda _, inputs, out: seen.extend((inputs[0].flatten(0, 1), out.flatten(0, 1))))
    with torch.no_grad():
        net(torch.from_numpy(draw(reader, TEXT, ALL)))
    return seen[0].double(), seen[1].double()


@pytest.mark.parametrize("at_once", [True, False])
def test_an_expert_is_compared_on_the_tokens_that_ours_are_sent(at_once: bool) -> None:
    """Whatever experts the original sends them to; its w2 makes up for all that the stream has lost."""
    reader, changed = mixture()
    prefix = "model.layers.1.block_sparse_moe."
    (stream, x), (our_stream, ours) = (behind_attention(reader, own) for own in (reader.tensors, changed))
    router = torch.from_numpy(reader.tensors[f"{prefix}gate.weight"]).double()
    chosen, theirs = ((into @ router.T).topk(2).indices for into in (ours, x))
    assert (chosen.sort().values != theirs.sort().values).any()  # or the test would show nothing
    found = drifts(reader, changed, options=ALL if at_once else replace(ALL, memory=1))

    def inner(into: torch.Tensor, tensors: dict[str, np.ndarray], name: str) -> torch.Tensor:
        gate, up = (into @ torch.from_numpy(tensors[f"{name}.{w}.weight"]).double().T for w in ("w1", "w3"))
        return torch.nn.functional.silu(gate) * up

    for expert in range(4):
        name, mine = f"{prefix}experts.{expert}", (chosen == expert).any(1)
        for part in ("w1", "w3"):
            sums, tokens = found[f"{name}.{part}.weight"]
            assert tokens == mine.sum()
            torch.testing.assert_close(sums.double(), (x - ours)[mine].T @ ours[mine], rtol=2e-3, atol=5e-2)
        before, after = inner(x[mine], reader.tensors, name), inner(ours[mine], changed, name)
        matrix = torch.from_numpy(reader.tensors[f"{name}.w2.weight"]).double()
        lost = (before - after) @ matrix.T + (stream - our_stream)[mine]
        sums, tokens = found[f"{name}.w2.weight"]
        assert tokens == mine.sum()
        torch.testing.assert_close(sums.double(), lost.T @ after, rtol=2e-3, atol=5e-2)


def test_an_expert_that_saw_too_few_tokens_keeps_its_own_weights() -> None:
    reader, changed = mixture(hidden_size=64, intermediate_size=4096)  # a w2 wants 1024 tokens, and none has so many
    seen = set()
    for block in blocks(reader, changed):
        for name in block.moments:
            if ".experts." in name:
                seen.add(name)
                assert (name in block.drifts) == (not name.endswith("w2.weight"))
                assert len(next(wanted(block, [name]))) == (2 if name in block.drifts else 1)
    assert len(seen) == 2 * 4 * 3


def test_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match="sequential"):
        next(calibrate(model(), TEXT, ALL, drift=True, sequential=False))
    with pytest.raises(ValueError, match="prepared"):
        next(calibrate(model(), TEXT, ALL, drift=True, prepare=lambda _block, _ahead: None))


def test_second_moments_without_a_factor_name_the_tensor() -> None:
    reader = model()
    changed = changed_like(reader)
    for block in blocks(reader, changed):
        names = list(block.moments)
        if block.drifts[names[0]].sums.any():
            block.moments[names[0]].h.fill_(float("nan"))
            with pytest.raises(IntegrityError) as caught:
                list(wanted(block, names))
            assert caught.value.tensor == names[0]
            return
    pytest.fail("nothing drifted")
