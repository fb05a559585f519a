# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-subclassing-any
"""Search for blocks of 32 that share nothing: w = d * (q - c) (Q4_0, Q5_0) or w = d * q + m (Q4_1, Q5_1).

Minimises sum weight * (x - w)^2 of each block over what is stored:

1. A fan of scales by the rules of `symmetric` (both signs of the extreme weight's anchor) or of `asymmetric` (anchored
   at both ends), judged by closed formulas.
2. The winner and ggml's own choice, both as half precision stores them and with the codes nearest to that, are judged
   by their summed errors, so no block is worse off than with ggml.
3. Rounds of least squares for the present codes, kept where the summed error falls.

ggml's choice without an imatrix is the plain one: the extreme weight (or the minimum and the maximum) at the end of the
range. With one it is the same search as for k-quants, with importance * sqrt(S + x * x) as weights and S the mean
square of the whole row.

Ref: ggml-quants.c, quantize_row_q4_0_ref, quantize_row_q4_0_impl and their like.
"""

from __future__ import annotations

import numpy as np

from weightsmith.quant.algorithms import asymmetric, reference, symmetric
from weightsmith.quant.algorithms.lanes import (
    LANES,
    clip,
    larger,
    load,
    nearest,
    quotient,
    root,
    smaller,
    spread,
    store,
    store_bytes,
    where,
)
from weightsmith.quant.algorithms.tiles import stored
from weightsmith.quant.kernels import inner

ARITHMETIC_VERSION = 2  # changes whenever the same input would give other bytes
WIDTH = 32
ZERO = np.float32(0.0)
ONE = np.float32(1.0)
INFINITE = np.float32(np.inf)
SCALE_FAN = (1, 9, np.float32(0.1), np.float32(-1.0), 0)  # ggml's steps of a symmetric scale
LINE_FAN = (37, np.float32(-0.9), np.float32(0.05))  # and of scale and offset
# Steps of the fan and rounds after it: normal without an imatrix, where ggml is at its fastest; normal with; best.
PLANS = ((8, 1), (24, 2), (64, 4))
N_STATE = max(symmetric.N_STATE, asymmetric.N_STATE)


@inner
def plan(effort, guided):
    """Position in PLANS."""
    return 2 if effort == 2 else (1 if guided else 0)


@inner
def row_means(x, first, period, units, cache, means):
    """Mean square of the row that each lane's block lies in, in tile units, into means (float32 [1, 16]).

    x: float32 [n_blocks, 32], `period` blocks a row. cache: float32 [1], the last row's; summed in order, as ggml does.
    """
    for lane in range(LANES):
        b = first + lane
        if b < x.shape[0]:
            if b % period == 0:
                total = ZERO
                for i in range(b, b + period):
                    for e in range(x.shape[1]):
                        total += np.float32(x[i, e] * x[i, e])
                cache[0] = total / np.float32(period * x.shape[1])
            means[0, lane] = np.float32(cache[0] * units[1, lane]) * units[1, lane]
        else:
            means[0, lane] = ZERO


@inner
def row_weights(tile, means, weights):
    """importance * sqrt(S + x * x) of a tile into weights (float32 [32, 16])."""
    mean = load(means, 0)
    for e in range(WIDTH):
        v = load(tile[0], e)
        store(weights, e, load(tile[1], e) * root(mean + v * v))


@inner
def reference_scale(tile, means, weights, shape, guided):
    """ggml's real scale of each block."""
    if guided:
        row_weights(tile, means, weights)
        return reference.scale_fan(tile, weights, (0, WIDTH), shape, None, SCALE_FAN)[0]
    return symmetric.extreme(tile, (0, WIDTH)) / spread(ZERO - shape[2])


@inner
def reference_line(tile, means, weights, nmax, guided):
    """ggml's real scale and offset of each block."""
    if guided:
        row_weights(tile, means, weights)
        scale, offset, _sw = reference.line_fan(tile, weights, (0, WIDTH), nmax, LINE_FAN)
        return scale, offset
    low = load(tile[0], 0)
    high = low
    for e in range(1, WIDTH):
        v = load(tile[0], e)
        low = smaller(low, v)
        high = larger(high, v)
    return (high - low) / spread(nmax), low


@inner
def _known(error):
    """Errors, infinite where they are no numbers: a scale beyond half precision."""
    return where(error < INFINITE, error, INFINITE)


@inner
def search_scale(tile, units, state, shape, chosen, ref):
    """The stored d of each block, in tile units. chosen: steps and rounds. ref: ggml's real d."""
    span = (0, WIDTH)
    top = shape[2]
    symmetric.fit_sub(tile, state, 0, shape, None, chosen[0])
    d = stored(load(state[symmetric.SCALE], 0), units)
    d_ref = stored(ref, units)
    total, trial = symmetric.errors(tile, span, d, d_ref, top, None)
    total = _known(total)
    better = trial < total
    total = where(better, trial, total)
    d = where(better, d_ref, d)
    for _ in range(chosen[1]):
        sxc, scc = symmetric.sums(tile, span, quotient(spread(ONE), d), top, None)
        d_new = stored(quotient(sxc, scc), units)
        trial = symmetric.errors(tile, span, d_new, d_new, top, None)[0]
        better = (trial < total) & (total < INFINITE)
        total = where(better, trial, total)
        d = where(better, d_new, d)
    return d


@inner
def scale_codes(tile, d, top, codes):
    """Codes nearest to x / d, plus top, into codes (uint8 [32, 16])."""
    inv = quotient(spread(ONE), d)
    for e in range(WIDTH):
        store_bytes(codes, e, clip(nearest(load(tile[0], e) * inv), ZERO - top, top - ONE) + top)


@inner
def search_line(tile, units, state, shape, chosen, ref):
    """The stored d and m of each block, in tile units, after which the tile may be mirrored. ref: ggml's d and m."""
    span = (0, WIDTH)
    nmax = shape[2]
    before = load(units, 0)
    asymmetric.mirror(tile, units)
    sign = where(before == load(units, 0), ONE, spread(ZERO - ONE))
    asymmetric.fit_sub(tile, state, 0, shape, chosen[0])
    sx = load(state[asymmetric.S_X], 0)
    sw = load(state[asymmetric.S_W], 0)
    d = stored(load(state[asymmetric.SCALE], 0), units)
    m = stored(load(state[asymmetric.OFFSET], 0), units)
    d_ref = stored(ref[0] * sign, units)
    m_ref = stored(ref[1] * sign, units)
    total, trial = asymmetric.errors(tile, span, (d, m), (d_ref, m_ref), nmax)
    total = _known(total)
    better = trial < total
    total = where(better, trial, total)
    d = where(better, d_ref, d)
    m = where(better, m_ref, m)
    for _ in range(chosen[1]):
        sl, sll, sxl = asymmetric.sums(tile, span, d, m, nmax)
        d_new, m_new, _gain = asymmetric.solve(sl, sll, sxl, sx, sw)
        d_new = stored(d_new, units)
        m_new = stored(m_new, units)
        trial = asymmetric.errors(tile, span, (d_new, m_new), (d_new, m_new), nmax)[0]
        better = (trial < total) & (total < INFINITE)
        total = where(better, trial, total)
        d = where(better, d_new, d)
        m = where(better, m_new, m)
    return d, m


@inner
def line_codes(tile, d, m, nmax, codes):
    """Codes nearest to (x - m) / d into codes (uint8 [32, 16])."""
    inv = quotient(spread(ONE), d)
    for e in range(WIDTH):
        store_bytes(codes, e, clip(nearest((load(tile[0], e) - m) * inv), ZERO, nmax))
