"""Products of a calibration pass: in bfloat16 only where told, and only those of the rows' states."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.evals import letters
from tests.evals.memory_reader import tiny
from weightsmith.evals.calibration import Options, calibrate, products
from weightsmith.evals.forward import stages
from weightsmith.evals.forward.weights import Later, Layer, Place
from weightsmith.quant.calibration import Moments

ALL = Options(rows=None, ctx=16)
TEXT = letters.text(16 * 9 + 5)
HERE = Place(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("known", "quick"),
    [({}, False), ({"avx512_f": True}, False), ({"amx_bf16": True}, True), ({"avx512_bf16": True}, True)],
)
def test_products_are_in_bfloat16_where_the_processor_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, known: dict[str, bool], quick: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert products.is_quick(torch.device("cpu")) == quick
    assert not products.is_quick(torch.device("cuda"))
    layer = Layer(HERE, {"a.weight": torch.randn(4, 4)}, {})
    found = products.multiplied(layer, HERE.device)["a.weight"]
    assert found.dtype == (torch.bfloat16 if quick else torch.float32)


def test_rows_go_through_in_bfloat16_and_moments_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    letters.install(monkeypatch)
    monkeypatch.setattr(products, "is_quick", lambda _device: True)
    linear, add = stages.linear, Moments.add
    seen: dict[str, set[torch.dtype]] = {"linear": set(), "add": set()}

    def watched_linear(x: Tensor, weight: Tensor, *more: Tensor | None) -> Tensor:
        seen["linear"] |= {x.dtype, weight.dtype}
        return linear(x, weight, *more)

    def watched_add(self: Moments, x: Tensor) -> None:
        seen["add"].add(x.dtype)
        assert not torch.equal(x, x.bfloat16().float())  # not a rounded input in a wider type
        add(self, x)

    monkeypatch.setattr(stages, "linear", watched_linear)
    monkeypatch.setattr(Moments, "add", watched_add)
    for block in calibrate(tiny(tokenizer=letters.vocab()), TEXT, ALL):
        assert {block.weights[name].dtype for name in block.weights} == {torch.float32}  # for whoever quantizes it
    assert seen == {"linear": {torch.bfloat16}, "add": {torch.float32}}


def test_a_product_has_the_dtype_of_what_is_multiplied_and_its_bias_whole() -> None:
    torch.manual_seed(0)
    w, bias, x = torch.randn(8, 32), torch.randn(8), torch.randn(2, 3, 32)
    layer = Layer(HERE, {"a.weight": w, "a.bias": bias, "b.weight": w + 1}, {})
    shown: list[Tensor] = []
    exact = stages.linears(layer, None, ("a", "b"), x)
    found = stages.linears(layer.rounded(), lambda _names, into: shown.append(into), ("a", "b"), x)
    assert shown[0] is x
    assert [one.dtype for one in found] == [torch.float32] * 2
    plain = (x.bfloat16() @ w.bfloat16().T).float() + bias
    assert torch.equal(found[0], plain)
    for one, other in zip(found, exact, strict=True):
        assert 0 < float((one - other).norm() / other.norm()) < 0.01


def test_a_rounded_layer_keeps_its_matrices_and_those_of_an_expert_while_it_is_held() -> None:
    loads: list[str] = []

    def load() -> Tensor:
        loads.append("expert")
        return torch.ones(4, 4)

    layer = Layer(HERE, {"a.weight": torch.randn(4, 4), "norm.weight": torch.randn(4)}, {"e.0.w1": Later((4, 4), load)})
    rounded = layer.rounded()
    assert list(rounded) == list(layer)
    assert len(rounded) == 3
    assert "e.0.w1" in rounded
    assert rounded["a.weight"] is rounded["a.weight"]
    assert rounded["norm.weight"] is layer["norm.weight"]
    assert rounded["e.0.w1"].dtype == torch.bfloat16
    with rounded.held("e.0."):
        assert rounded["e.0.w1"] is rounded["e.0.w1"]
    assert loads == ["expert"] * 2
    assert rounded["e.0.w1"].dtype == torch.bfloat16
    assert loads == ["expert"] * 3
