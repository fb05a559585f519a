"""Bounds: what our searches and ggml's make keeps them, what was altered does not, and a slow loop agrees."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.quant.kquants import ggml
from weightsmith.errors import UnsupportedError
from weightsmith.quant import bounds, codecs, refit
from weightsmith.quant.bounds import Outcome, judge, of_rows

CODECS = (*sorted(codecs.OPEN), "Q8_0")


def outcome(codec: str, x: np.ndarray, packed: np.ndarray) -> Outcome:
    return judge(x, of_rows(codec, packed, x.shape[1]))


def awkward() -> np.ndarray:
    """Rows of zeros, one value, both signs alone, subnormal and large weights, one outlier in a block."""
    x = ggml.rows("student", 8, row_len=512)
    x[0] = 0
    x[1] = 0.25
    x[2] = np.abs(x[2])
    x[3] = -np.abs(x[3])
    x[4] *= 1e-6
    x[5] *= 1e4
    x[6, ::32] = 3
    x[7, :256] = 0
    return x


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("effort", ["fast", "normal", "best"])
def test_what_our_searches_make_is_within(codec: str, effort: str) -> None:
    for x in (ggml.rows("gauss", 8, row_len=512), ggml.rows("student", 8, row_len=512), awkward()):
        for weights in (None, ggml.importance(row_len=512)):
            found = outcome(codec, x, codecs.encode(codec, x, importance=weights, effort=effort))
            assert found.within, found
            assert found.weights == x.size


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("weighted", [False, True])
def test_what_ggml_makes_is_within(codec: str, weighted: bool) -> None:
    for x in (ggml.rows("gauss", 32, row_len=512), ggml.rows("student", 32, row_len=512), awkward()):
        weights = ggml.importance(row_len=512) if weighted else None
        found = outcome(codec, x, ggml.quantize(codec, x, weights))
        assert found.within, found


@pytest.mark.parametrize("codec", sorted(codecs.OPEN))
def test_one_code_off_is_found(codec: str) -> None:
    """One code of every row one step off; a weight in the middle between two values may pass by its nature."""
    x = ggml.rows("student", 200, row_len=256)
    lattice = codecs.unpack(codec, codecs.encode(codec, x))
    rng, rows = np.random.default_rng(2), np.arange(len(x))
    columns = rng.integers(0, 256, len(x))
    old = lattice.codes[rows, columns].astype(int)
    new = np.where(old == 0, 1, np.where(old == lattice.shape.top, old - 1, old + rng.choice([-1, 1], len(x))))
    lattice.codes[rows, columns] = new
    packed = codecs.pack(codec, lattice)
    found = [outcome(codec, x[i : i + 1], packed[i : i + 1]) for i in range(len(x))]
    share = np.mean([not one.within for one in found])
    assert share > (0.7 if codec in ("Q2_K", "Q3_K") else 0.85), share
    sure = next(one for one in found if one.outside)
    row = found.index(sure)
    assert sure.at == (0, columns[row])
    assert (sure.wanted, sure.found) == (
        float(x[row, columns[row]]),
        float(codecs.decode(codec, packed[row : row + 1], 256)[0, columns[row]]),
    )


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("factor", [0.0, 0.8, 1.25, np.nan, np.inf])
def test_another_scale_is_found(codec: str, factor: float) -> None:
    x = ggml.rows("gauss", 8, row_len=512)
    packed = codecs.encode(codec, x)
    if codec == "Q8_0":
        blocks = packed.reshape(-1, 34)
        blocks[:, :2] = (blocks[:, :2].copy().view("<f2") * np.float16(factor)).view(np.uint8)
    else:
        lattice = codecs.unpack(codec, packed)
        with np.errstate(invalid="ignore"):
            lattice.d[:] = lattice.d * np.float32(factor)
        packed = codecs.pack(codec, lattice)
    found = outcome(codec, x, packed)
    assert not found.within
    assert found.outside > 0


@pytest.mark.parametrize("codec", ["Q4_K", "Q6_K", "IQ4_XS"])
def test_a_slow_loop_agrees(codec: str) -> None:
    """Every value a block can hold, weight by weight: half a gap inside, END gaps and rest beyond."""
    x = ggml.rows("gauss", 2, row_len=256)
    x[1] *= np.float32(1.2)  # so that some of them lie outside
    packed = codecs.encode(codec, ggml.rows("gauss", 2, row_len=256))
    lattice = codecs.unpack(codec, packed)
    shape = lattice.shape
    table = [float(v) for v in (shape.table or range(shape.top + 1))]
    outside = 0
    for row in range(2):
        d, dmin = float(lattice.d[row, 0]), float(lattice.dmin[row, 0])
        for i in range(256):
            scale, least = int(lattice.scales[row, i // shape.sub]), int(lattice.mins[row, i // shape.sub])
            values = sorted(d * scale * (v - shape.zero) - dmin * least for v in table)
            mine = d * scale * (table[lattice.codes[row, i]] - shape.zero) - dmin * least
            place = min(range(len(values)), key=lambda k: abs(values[k] - mine))
            w = float(x[row, i])
            nearest = place + (1 if w > mine else -1)
            parts = max(abs(d) * 2**-11, 2**-25) * abs(scale * (table[lattice.codes[row, i]] - shape.zero))
            parts += max(abs(dmin) * 2**-11, 2**-25) * abs(least)
            if 0 <= nearest < len(values):
                allowed = 0.51 * abs(values[nearest] - mine)
            else:
                reach = max(abs(v - shape.zero) for v in table)
                rest = reach * abs(d) + (abs(dmin) if shape.mins else 0)
                allowed = 32 * abs(values[place + (-1 if w > mine else 1)] - mine) + rest
            outside += abs(w - mine) > allowed + parts + 2**-20 * abs(mine) + 2**-25
    found = outcome(codec, x, packed)
    assert 0 < outside < 256
    assert found.outside == outside


def test_slabs_join() -> None:
    x = ggml.rows("gauss", 8, row_len=256)
    packed = codecs.encode("Q4_K", x)
    x[5, 77] += 1
    x[1, 3] -= np.float32(0.5)
    whole = outcome("Q4_K", x, packed)
    parts = Outcome()
    for start in range(0, 8, 3):
        parts = parts.joined(outcome("Q4_K", x[start : start + 3], packed[start : start + 3]), below=start)
    assert parts == whole
    assert whole.at == (5, 77)


def test_floats_may_be_truncated_or_rounded() -> None:
    x = ggml.rows("gauss", 4, row_len=256)
    rounded = codecs.encode("BF16", x)
    cut = (x.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(4, -1)
    assert outcome("BF16", x, rounded).within
    assert outcome("BF16", x, cut).within
    assert not outcome("BF16", x * np.float32(1.02), cut).within
    assert not outcome("F32", x, codecs.encode("F32", x * np.float32(1.0001))).within


def test_what_was_moved_is_allowed_only_where_asked_for() -> None:
    x = ggml.rows("gauss", 4, row_len=256)
    packed = codecs.encode("Q4_K", x)
    grid = of_rows("Q4_K", packed, 256)
    shifted = grid.values + np.float32(0.9) * np.where(grid.up > 0, grid.up, -grid.down)
    assert judge(shifted, grid).outside > 1000
    found = judge(shifted, grid, moved=1)
    assert found.within
    assert found.shifted > 1000


def test_a_layout_that_is_not_known() -> None:
    with pytest.raises(UnsupportedError, match="IQ2_XXS"):
        of_rows("IQ2_XXS", np.zeros((1, 66), np.uint8), 256)


def test_share_of_what_a_search_gives_up() -> None:
    base = Outcome(weights=1000, wide=20)
    assert base.within
    assert not replace(base, wide=21).within
    assert not replace(base, outside=1).within
    assert replace(base, fitted=100).within
    assert not replace(base, fitted=101).within


@pytest.mark.parametrize("offset", [False, True])
def test_a_grid_is_found_where_there_is_one(offset: bool) -> None:
    """Codes of a grid pass whatever step is stored near it, as far as the slopes go; slow search over steps agrees."""
    rng = np.random.default_rng(5)
    low, high = (0, 15) if offset else (-8, 7)
    for _ in range(40):
        step, start = rng.uniform(0.5, 2), rng.normal() if offset else 0.0
        w = rng.uniform(low * step + start, high * step + start, 32)
        codes = np.clip(np.rint((w - start) / step), low, high)
        if rng.random() < 0.5:  # a code that no grid gives
            at = rng.integers(32)
            codes[at] = np.clip(codes[at] + rng.choice([-2, 2]), low, high)
        slopes = w[codes != 0] / codes[codes != 0]
        if offset:
            stored, start = np.polyfit(codes, w, 1)
        else:
            stored = float(np.median(slopes))
        steps = np.linspace(stored / refit.REACH, stored * refit.REACH, 20000)[:, None]
        floor = np.where(codes < high, w - (codes + 0.5) * steps, -np.inf).max(axis=1)
        ceiling = np.where(codes > low, w - (codes - 0.5) * steps, np.inf).min(axis=1)
        room = (ceiling - floor if offset else np.minimum(ceiling, -floor)) / steps[:, 0]
        if abs(room.max() + 0.02) < 0.005:
            continue  # too near to tell by this search
        given = np.array([start]) if offset else None
        found = refit.exists(w[None], codes[None], (low, high), np.array([stored]), given)
        assert bool(found[0]) == bool(room.max() > -0.02)


def test_a_scale_that_no_weights_give_is_refused() -> None:
    codes = np.array([[1.0, 2, 3, 4, -5, 6, 7, -8]])
    for stored, fits in ((0.1, True), (0.102, True), (0.125, False), (0.08, False)):
        weights = codes * 0.1 * np.array([1.03, 0.99, 1, 1.01, 1, 1, 1, 1])
        assert refit.exists(weights, codes, (-8, 7), np.array([stored]))[0] == fits


def test_a_line_that_no_weights_give_is_refused() -> None:
    rng = np.random.default_rng(6)
    codes = np.arange(16.0)[None].repeat(2, axis=1)
    weights = 0.1 * codes + 0.3 + rng.uniform(-0.004, 0.004, codes.shape)
    # The second and third line lie on one side of all weights, the fourth above those of the upper codes alone.
    for step, start, fits in ((0.1, 0.3, True), (0.1, 0.35, False), (0.09, 0.25, False), (0.12, 0.21, False)):
        found = refit.exists(weights, codes, (0, 15), np.array([step]), np.array([start]))
        assert found[0] == fits, (step, start)


def test_every_known_layout_is_measured() -> None:
    assert bounds.FITTED <= codecs.OPEN
