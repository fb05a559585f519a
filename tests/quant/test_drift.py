"""Weights that make up for drifted inputs, against least squares over the tokens themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weightsmith.errors import IntegrityError
from weightsmith.quant.algorithms import drift as algorithm
from weightsmith.quant.algorithms.drift import DAMP, STRENGTH, Drift, made_up_for
from weightsmith.quant.algorithms.moments import shrinkage
from weightsmith.quant.calibration import Moments

OUT, IN, TOKENS, HELD = 6, 10, 400, 100
COUNTED = TOKENS - HELD


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """w [OUT, IN]; what the original and ours feed it [TOKENS, IN]; how far the stream is off [TOKENS, OUT]."""
    rng = torch.Generator().manual_seed(seed)
    mixed = torch.randn(IN, IN, generator=rng)
    original = torch.randn(TOKENS, IN, generator=rng) @ mixed
    lost = torch.eye(IN) * 0.9 + 0.05 * torch.randn(IN, IN, generator=rng)  # a drift that weights can undo, and noise
    ours = original @ lost + 0.1 * torch.randn(TOKENS, IN, generator=rng)
    off = original @ (0.1 * torch.randn(IN, OUT, generator=rng)) + 0.1 * torch.randn(TOKENS, OUT, generator=rng)
    return torch.randn(OUT, IN, generator=rng), original, ours, off


def measured(
    w: torch.Tensor, original: torch.Tensor, ours: torch.Tensor, off: torch.Tensor | None, *, parts: int = 3
) -> tuple[Moments, Drift]:
    lost = original - ours if off is None else (original - ours) @ w.T + off
    moments, drift = Moments(IN), Drift(IN, 0 if off is None else OUT)
    for chosen in torch.arange(TOKENS).split([COUNTED, HELD]):
        take = drift.add if chosen[0] < COUNTED else drift.hold
        for some in chosen.chunk(parts):
            moments.add(ours[some])
            take(lost[some], ours[some][None])
    return moments, drift


def lost(v: torch.Tensor, w: torch.Tensor, original: torch.Tensor, ours: torch.Tensor, off: torch.Tensor) -> float:
    """The squared error of what v puts out, on tokens held out."""
    error = (original.double() @ w.double().T + off.double() - ours.double() @ v.double().T)[COUNTED:]
    return float(error.square().sum())


@pytest.mark.parametrize("with_stream", [False, True])
def test_it_is_ridge_regression(with_stream: bool) -> None:
    """Shrinking and damping H are rows of data that ask for W itself, so ordinary least squares is the oracle."""
    w, original, ours, off = drawn()
    moments, drift = measured(w, original, ours, off if with_stream else None)
    found = made_up_for(w, moments, drift).double()

    x, wanted = ours.double(), original.double() @ w.double().T
    if with_stream:
        wanted = wanted + off.double()
    h, share = x.T @ x, shrinkage(IN, TOKENS)
    # The quadratic form of the change: what is measured, less the share of it off the diagonal, and the damping.
    form = (1 - share) * h + share * torch.diag(h.diagonal()) + DAMP * h.diagonal().mean() * torch.eye(IN).double()
    missing = (x.T[:, :COUNTED] @ (wanted - x @ w.double().T)[:COUNTED]) * (TOKENS / COUNTED)
    change = np.linalg.solve(form.numpy(), missing.numpy()).T
    torch.testing.assert_close(found, w.double() + STRENGTH * torch.from_numpy(change), rtol=1e-4, atol=1e-5)


def test_what_is_put_out_comes_nearer() -> None:
    w, original, ours, off = drawn()
    v = made_up_for(w, *measured(w, original, ours, off))
    assert lost(v, w, original, ours, off) < 0.5 * lost(w, w, original, ours, off)


@pytest.mark.parametrize("strength", [STRENGTH, 100.0])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_never_worse_on_tokens_held_out(seed: int, strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drift of nothing but noise, which weights fit on the tokens that are counted and that others do not have."""
    monkeypatch.setattr(algorithm, "STRENGTH", strength)
    w, _, ours, off = drawn(seed)
    rng = torch.Generator().manual_seed(seed)
    original, off = ours + 0.1 * torch.randn(TOKENS, IN, generator=rng), torch.randn(TOKENS, OUT, generator=rng)
    v = made_up_for(w, *measured(w, original, ours, off))
    assert lost(v, w, original, ours, off) <= lost(w, w, original, ours, off) * (1 + 1e-6)


def test_no_more_is_made_than_is_best_for_tokens_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    w, original, ours, off = drawn()
    original[COUNTED:] = 0.7 * ours[COUNTED:] + 0.3 * original[COUNTED:]  # they drift by less
    off[COUNTED:] *= 0.3
    monkeypatch.setattr(algorithm, "STRENGTH", 100.0)
    v = made_up_for(w, *measured(w, original, ours, off))
    best = lost(v, w, original, ours, off)
    for share in (0.5, 0.9, 1.1, 2.0):
        assert lost(w + share * (v - w), w, original, ours, off) > best
    monkeypatch.setattr(algorithm, "STRENGTH", 0.1)
    less = made_up_for(w, *measured(w, original, ours, off))
    assert float((less - w).norm()) < 0.5 * float((v - w).norm())


def test_w_stays_where_tokens_held_out_drift_the_other_way() -> None:
    w, original, ours, off = drawn()
    original[COUNTED:] = 2 * ours[COUNTED:] - original[COUNTED:]
    off[COUNTED:] *= -1
    assert torch.equal(made_up_for(w, *measured(w, original, ours, off)), w)


def test_w_stays_where_nothing_is_held_out() -> None:
    w, original, ours, off = drawn()
    moments, drift = measured(w, original, ours, off)
    drift.held.clear()
    assert torch.equal(made_up_for(w, moments, drift), w)


def test_nothing_drifted() -> None:
    w, _, ours, _ = drawn()
    moments, drift = measured(w, ours, ours, torch.zeros(TOKENS, OUT))
    assert torch.equal(made_up_for(w, moments, drift), w)
    assert torch.equal(made_up_for(w.half(), moments, drift), w.half().float())


def test_tokens_may_come_in_any_parts() -> None:
    w, original, ours, off = drawn()
    one, other = (made_up_for(w, *measured(w, original, ours, off, parts=parts)) for parts in (1, 7))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_does_not_belong_together() -> None:
    w, original, ours, off = drawn()
    moments, drift = measured(w, original, ours, off)
    with pytest.raises(ValueError, match="10 inputs and 6 outputs"):
        made_up_for(w[:4], moments, drift)
    with pytest.raises(ValueError, match="matrix"):
        made_up_for(w[:, :8], moments, drift)
    with pytest.raises(IntegrityError, match="zero or not finite"):
        made_up_for(w, Moments(IN), drift)
