"""oneDNN's products against PyTorch's own, whatever the processor at hand would choose."""

from __future__ import annotations

import pytest
import torch

from weightsmith.quant import multiply


@pytest.fixture(params=[True, False], ids=["onednn", "as it is"])
def _chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiply, "LEAST", 0)
    if request.param:
        operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
        if operator is None or not torch.backends.mkldnn.is_available():
            pytest.skip("this PyTorch has no such operator of oneDNN")
        monkeypatch.setattr(multiply, "_onednn", lambda: operator)
    else:
        monkeypatch.setattr(multiply, "_onednn", lambda: None)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("_chosen")
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(shape: tuple[int, ...], with_bias: bool) -> None:
    x, w, bias = drawn(*shape), drawn(48, 64, seed=1), drawn(48, seed=2) if with_bias else None
    wanted = x.double() @ w.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(multiply.linear(x, w, bias).double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("_chosen")
def test_linear_of_what_is_not_contiguous() -> None:
    x, w = drawn(64, 7).T, drawn(64, 96, seed=1).T[::2]
    torch.testing.assert_close(multiply.linear(x, w), x @ w.T, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("_chosen")
def test_slopes_and_other_precisions_are_pytorchs_own() -> None:
    x, w = drawn(5, 64).requires_grad_(), drawn(48, 64, seed=1)
    multiply.linear(x, w).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    torch.testing.assert_close(x.grad, w.sum(0).expand(5, -1), rtol=1e-5, atol=1e-4)
    for dtype in (torch.bfloat16, torch.float64):
        found = multiply.linear(x.detach().to(dtype), w.to(dtype))
        assert found.dtype == dtype


@pytest.mark.usefixtures("_chosen")
def test_sums() -> None:
    a, b, sums = drawn(30, 40), drawn(30, 24, seed=1), drawn(40, 24, seed=2)
    wanted = sums.double() + a.double().T @ b.double()
    multiply.add_product(sums, a, b)
    torch.testing.assert_close(sums.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("_chosen")
@pytest.mark.parametrize("strip", [7, 16, 40, 64])
def test_squares(strip: int) -> None:
    rows, sums = drawn(30, 40), torch.zeros(40, 40)
    multiply.add_square(sums, rows, strip)
    multiply.add_square(sums, rows, strip)
    wanted = 2 * rows.double().T @ rows.double()
    torch.testing.assert_close(sums.triu().double(), wanted.triu(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("known", "quick"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_f": True}, True),
        ({"cpu_name": "AMD Ryzen 5 5600X", "avx512_f": False}, False),
        ({"cpu_name": "Intel(R) Xeon(R)", "avx512_f": True}, False),
        ({"architecture": "arm64"}, False),
        ({}, False),
    ],
)
def test_the_processor_decides(known: dict[str, object], quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    multiply._onednn.cache_clear()
    assert (multiply._onednn() is not None) == quick
    multiply._onednn.cache_clear()
