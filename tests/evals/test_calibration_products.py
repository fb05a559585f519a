"""Products of a calibration pass: in bfloat16 only where told, and only those of the rows' states."""

from __future__ import annotations

import pytest
import torch

from tests.evals import letters
from tests.evals.memory_reader import tiny
from weightsmith.evals.calibration import Options, calibrate, products
from weightsmith.quant.calibration import Moments

ALL = Options(rows=None, ctx=16)
TEXT = letters.text(16 * 9 + 5)


def test_the_precision_is_put_back_even_by_an_error() -> None:
    def fails() -> None:
        assert torch.get_float32_matmul_precision() == "medium"
        raise KeyError

    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), products.precision("medium"):
        fails()
    assert torch.get_float32_matmul_precision() == before


def test_without_a_unit_for_bfloat16_everything_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert products.quick(torch.device("cpu")) == "highest"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert products.quick(torch.device("cpu")) == "medium"
    assert products.quick(torch.device("cuda")) == "highest"


def test_rows_go_through_in_bfloat16_and_moments_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    letters.install(monkeypatch)
    monkeypatch.setattr(products, "quick", lambda _device: "medium")
    linear, add, seen = torch.nn.functional.linear, Moments.add, {"linear": set(), "add": set()}

    def watched_linear(*args: torch.Tensor | None) -> torch.Tensor:
        seen["linear"].add(torch.get_float32_matmul_precision())
        return linear(*args)  # type: ignore[arg-type]

    def watched_add(self: Moments, x: torch.Tensor) -> None:
        seen["add"].add(torch.get_float32_matmul_precision())
        add(self, x)

    monkeypatch.setattr(torch.nn.functional, "linear", watched_linear)
    monkeypatch.setattr(Moments, "add", watched_add)
    for _ in calibrate(tiny(tokenizer=letters.vocab()), TEXT, ALL):
        assert torch.get_float32_matmul_precision() == "highest"  # so whoever quantizes a block computes exactly
    assert seen == {"linear": {"medium"}, "add": {"highest"}}
