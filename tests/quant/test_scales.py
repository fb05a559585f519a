"""Scales that move: against autograd, against what is read from the bytes, and against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from weightsmith.quant import codecs
from weightsmith.quant.algorithms import scales
from weightsmith.quant.algorithms.scales import Movable

BLOCKS = sorted(codecs.OPEN | {"Q8_0"})


def packed_rows(codec: str, *, rows: int = 6, columns: int = 512) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    w = rng.standard_t(5, (rows, columns)).astype(np.float32) * 0.02 + np.float32(0.01)
    return w, codecs.encode(codec, w)


def some_moves(movable: Movable, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.1 * torch.randn(half.shape, generator=generator) for half in movable.halves]


@pytest.mark.parametrize("codec", BLOCKS)
def test_moved_blocks_are_read_as_what_they_were_moved_to(codec: str) -> None:
    _, packed = packed_rows(codec)
    movable = scales.of_blocks(codec, packed, 512)
    assert torch.equal(movable.weights(movable.halves), torch.from_numpy(codecs.decode(codec, packed, 512)))
    halves = movable.moved(some_moves(movable))
    for half, old in zip(halves, movable.halves, strict=True):
        assert torch.equal(half, half.half().float())
        assert not torch.equal(half, old)
    given = scales.into_blocks(codec, packed, [half.numpy() for half in halves])
    assert given.shape == packed.shape
    assert not np.array_equal(given, packed)
    read = torch.from_numpy(codecs.decode(codec, given, 512))
    torch.testing.assert_close(movable.weights(halves), read, rtol=1e-5, atol=1e-7)
    again = scales.of_blocks(codec, given, 512)
    assert all(torch.equal(one, other) for one, other in zip(again.halves, halves, strict=True))
    same = scales.into_blocks(codec, given, [half.numpy() for half in movable.halves])
    assert np.array_equal(same, packed)  # so nothing else was touched


@pytest.mark.parametrize("codec", BLOCKS)
def test_slopes_are_those_of_autograd(codec: str) -> None:
    _, packed = packed_rows(codec)
    movable = scales.of_blocks(codec, packed, 512)
    check_slopes(movable)


@pytest.mark.parametrize("places", [None, torch.randperm(512, generator=torch.Generator().manual_seed(0)) % 7])
def test_slopes_of_groups_that_are_no_runs(places: Tensor | None) -> None:
    torch.manual_seed(1)
    groups = 8 if places is None else 7
    check_slopes(Movable(torch.randn(6, 512), (torch.rand(6, groups).half().float(),), places=places))


def check_slopes(movable: Movable) -> None:
    torch.manual_seed(2)
    gradient = torch.randn(movable.whole.shape, dtype=torch.float64)
    by = [torch.zeros(half.shape, dtype=torch.float64, requires_grad=True) for half in movable.halves]
    wide = Movable(
        movable.whole.double(),
        tuple(half.double() for half in movable.halves),
        None if movable.offset is None else movable.offset.double(),
        movable.places,
    )
    halves = tuple(half * (1 + one) for half, one in zip(wide.halves, by, strict=True))
    loss = (wide.weights(halves) * gradient).sum()
    expected = torch.autograd.grad(loss, by)
    found = movable.slopes(gradient.float())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4)


def test_a_scale_of_nothing_stays_and_one_at_the_end_of_its_range_does_not_leave_it() -> None:
    movable = Movable(torch.tensor([[0.0, 0.0, 65504.0, 32752.0]]), (torch.tensor([[0.0, 65504.0]]),))
    (half,) = movable.moved([torch.tensor([[0.3, 0.3]])])
    assert half.tolist() == [[0.0, 65504.0]]
    assert torch.equal(movable.weights((half,)), movable.whole)
