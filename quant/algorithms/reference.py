# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-subclassing-any
"""The choice that ggml's quantizers make, sixteen super-blocks at a time, as a start for the search.

ggml minimises sum v * (x - w)^2 in two steps that do not see each other: real scales (and offsets) per sub-block, then
integers that are close to those. With an imatrix v = importance * sqrt(S + x * x), S = c * the mean square of the
super-block (c is 2, for Q2_K 1); without one v = rms + |x| (Q4_K, Q5_K) or x * x. The order of its sums is kept, so the
choice is ggml's own up to near-ties: fits are compared by closed formulas here and by summed errors there, and its
compilers place fused multiply-adds freely. Of Q4_K super-blocks, 98 % get its exact d, dmin and integers.

Ref: ggml-quants.c, make_qkx3_quants, make_qx_quants, make_qp_quants and the quantize_row_*_impl functions.
"""

from __future__ import annotations

import numpy as np

from weightsmith.quant.algorithms.lanes import (
    clip,
    larger,
    load,
    nearest,
    quotient,
    root,
    smaller,
    spread,
    store,
    where,
)
from weightsmith.quant.algorithms.levels import nearest_value
from weightsmith.quant.kernels import inner

ZERO = np.float32(0.0)
ONE = np.float32(1.0)


@inner
def heuristic_weights(tile, factor):
    """importance * sqrt(factor * mean(x * x) + x * x) of a tile, float32 [width, 16]."""
    width = tile.shape[1]
    weights = np.empty((width, 16), np.float32)
    squares = spread(ZERO)
    for e in range(width):
        v = load(tile[0], e)
        squares = squares + v * v
    mean = squares * factor / np.float32(width)
    for e in range(width):
        v = load(tile[0], e)
        store(weights, e, load(tile[1], e) * root(mean + v * v))
    return weights


@inner
def squares(tile):
    """x * x of a tile, float32 [width, 16]: ggml's weights where ranges are symmetric and no imatrix is there."""
    weights = np.empty((tile.shape[1], 16), np.float32)
    for e in range(tile.shape[1]):
        v = load(tile[0], e)
        store(weights, e, v * v)
    return weights


@inner
def plain_weights(tile, sub):
    """Root mean square of each `sub` weights plus their own magnitudes, float32 [width, 16]: ggml's without imatrix."""
    width = tile.shape[1]
    weights = np.empty((width, 16), np.float32)
    for k in range(width // sub):
        squares = spread(ZERO)
        for e in range(k * sub, k * sub + sub):
            v = load(tile[0], e)
            squares = squares + v * v
        size = root(squares / np.float32(sub))
        for e in range(k * sub, k * sub + sub):
            v = load(tile[0], e)
            store(weights, e, size + larger(v, ZERO - v))
    return weights


@inner
def _plain_gain(tile, weights, span, fit, nmax):
    """What codes for the whole range, taken as they are, take off sum v * x * x."""
    scale, offset = fit
    inv = quotient(spread(ONE), scale)
    gain = spread(ZERO)
    for e in range(span[0], span[1]):
        v = load(tile[0], e)
        w = scale * clip(nearest(inv * (v - offset)), ZERO, nmax) + offset
        gain = gain + load(weights, e) * w * (v + v - w)
    return gain


@inner
def _fan(tile, weights, span, nmax, rays):
    """Scale, offset (not above 0) and sum of weights of one sub-block.

    rays: how many scales are tried, the first and the step. They are anchored at the minimum at first, then at the
    offset of the best so far.
    """
    low = load(tile[0], span[0])
    high = low
    sw = spread(ZERO)
    sx = sw
    for e in range(span[0], span[1]):
        v = load(tile[0], e)
        weight = load(weights, e)
        low = smaller(low, v)
        high = larger(high, v)
        sw = sw + weight
        sx = sx + weight * v
    offset = smaller(low, spread(ZERO))
    scale = quotient(high - offset, spread(nmax))
    best = _plain_gain(tile, weights, span, (scale, offset), nmax)
    for i in range(rays[0]):
        inv = quotient(spread(rays[1] + rays[2] * np.float32(i) + nmax), high - offset)
        sl = spread(ZERO)
        sll = sl
        sxl = sl
        for e in range(span[0], span[1]):
            v = load(tile[0], e)
            q = clip(nearest(inv * (v - offset)), ZERO, nmax)
            wq = load(weights, e) * q
            sl = sl + wq
            sll = sll + wq * q
            sxl = sxl + wq * v
        det = sw * sll - sl * sl
        s = quotient(sw * sxl - sx * sl, det)
        m = quotient(sll * sx - sl * sxl, det)
        s = where(m > ZERO, quotient(sxl, sll), s)
        m = where(m > ZERO, ZERO, m)
        gain = np.float32(2.0) * (s * sxl + m * sx) - s * s * sll - m * m * sw - np.float32(2.0) * (s * m * sl)
        better = (det > ZERO) & (gain > best)
        best = where(better, gain, best)
        scale = where(better, s, scale)
        offset = where(better, m, offset)
    return scale, offset, sw


@inner
def _integers(values, weights, rows, smax, searched):
    """Whole numbers 0..smax into rows (float32 [n, 16]) that times the returned scale are close to values [n, 16]."""
    n = values.shape[0]
    top = spread(ZERO)
    for k in range(n):
        top = larger(top, load(values, k))
    unit = quotient(spread(ONE), top)
    best = spread(np.float32(np.inf))
    inv = spread(ZERO)
    for i in range(9 if searched else 1):
        # The plain range comes first, and a later one must be better to replace it.
        tenth = 0 if i == 0 else (i - 5 if i < 5 else i - 4)
        inv_i = unit * (np.float32(0.1) * np.float32(tenth) + smax)
        step = quotient(spread(ONE), inv_i)
        error = spread(ZERO)
        for k in range(n):
            v = load(values, k)
            e = v - step * smaller(nearest(inv_i * v), smax)
            error = error + load(weights, k) * e * e
        better = error < best
        best = where(better, error, best)
        inv = where(better, inv_i, inv)
    slx = spread(ZERO)
    sll = slx
    for k in range(n):
        v = load(values, k)
        q = smaller(nearest(inv * v), smax)
        store(rows, k, q)
        wq = load(weights, k) * q
        slx = slx + wq * v
        sll = sll + wq * q
    for _ in range(5 if searched else 0):
        for k in range(n):
            v = load(values, k)
            w = load(weights, k)
            q = load(rows, k)
            slx_k = slx - w * v * q
            sll_k = sll - w * q * q
            sound = (slx_k > ZERO) & (sll_k > ZERO)
            new = clip(nearest(where(sound, quotient(v * sll_k, slx_k), q)), ZERO, smax)
            slx_k = slx_k + w * v * new
            sll_k = sll_k + w * new * new
            better = sound & (slx_k * slx_k * sll > slx * slx * sll_k)
            store(rows, k, where(better, new, q))
            slx = where(better, slx_k, slx)
            sll = where(better, sll_k, sll)
    return quotient(slx, sll) if searched else top / smax


@inner
def asymmetric(tile, state, shape, guided):
    """The reference's integers into the last two rows of the state; returns its real d and dmin."""
    n_sub, sub, nmax, smax = shape[:4]
    if guided:
        weights = heuristic_weights(tile, np.float32(1.0) if n_sub == 16 else np.float32(2.0))
        rays = (37, np.float32(-0.9), np.float32(0.05))
    else:
        weights = plain_weights(tile, sub)
        rays = (shape[5], shape[6], np.float32(0.1))
    values = np.empty((3, n_sub, 16), np.float32)
    for k in range(n_sub):
        scale, offset, sw = _fan(tile, weights, (k * sub, k * sub + sub), nmax, rays)
        store(values[0], k, scale)
        store(values[1], k, ZERO - offset)
        store(values[2], k, sw)
    last = state.shape[0] - 1
    d = _integers(values[0], values[2], state[last - 1], smax, guided)
    dmin = _integers(values[1], values[2], state[last], smax, guided)
    return d, dmin


@inner
def _scale_fan(tile, weights, span, shape, table, manner):
    """Scale of one sub-block: the weight of largest magnitude near the lowest value, in manner[1] steps each way."""
    top = shape[2]
    extreme = load(tile[0], span[0])
    sw = spread(ZERO)
    for e in range(span[0], span[1]):
        v = load(tile[0], e)
        extreme = where(larger(v, ZERO - v) > larger(extreme, ZERO - extreme), v, extreme)
        sw = sw + load(weights, e)
    unit = quotient(spread(ONE), extreme)
    best = spread(ZERO)
    scale = best
    for i in range(-1 - manner[1], manner[1] + 1):
        # The plain start comes first; a table's start has the other sign.
        inv = unit * (ZERO - top - manner[2] * np.float32(i))
        if i < -manner[1]:
            inv = unit * (top * manner[3])
        sxc = spread(ZERO)
        scc = sxc
        for e in range(span[0], span[1]):
            v = load(tile[0], e)
            c = nearest_value(v * inv, top, table)
            wc = load(weights, e) * c
            sxc = sxc + wc * v
            scc = scc + wc * c
        better = (sxc * sxc > best * scc) & (scc > ZERO)
        s = quotient(sxc, scc)
        scale = where(better, s, scale)
        best = where(better, s * sxc, best)
    return scale, sw


@inner
def _signed_integers(values, weights, rows, largest, searched):
    """Whole numbers -largest..largest - 1 into rows [n, 16]; the scale that brings them close to values [n, 16]."""
    n = values.shape[0]
    widest = load(values, 0)
    for k in range(n):
        v = load(values, k)
        widest = where(larger(v, ZERO - v) > larger(widest, ZERO - widest), v, widest)
    unit = quotient(spread(ONE), widest)
    best = spread(ZERO)
    inv = unit * (ZERO - largest)
    scale = quotient(widest, spread(ZERO - largest))
    for i in range(-10, 10 if searched else -10):
        inv_i = unit * (ZERO - largest - (np.float32(0.1) * np.float32(i) if i > -10 else ZERO))
        sxl = spread(ZERO)
        sll = sxl
        for k in range(n):
            v = load(values, k)
            q = clip(nearest(inv_i * v), ZERO - largest, largest - ONE)
            wq = load(weights, k) * q
            sxl = sxl + wq * v
            sll = sll + wq * q
        better = (sxl * sxl > best * sll) & (sll > ZERO)
        s = quotient(sxl, sll)
        best = where(better, s * sxl, best)
        scale = where(better, s, scale)
        inv = where(better, inv_i, inv)
    for k in range(n):
        store(rows, k, clip(nearest(inv * load(values, k)), ZERO - largest, largest - ONE))
    return scale


@inner
def symmetric(tile, state, shape, table, manner):
    """The reference's integers into the last row of the state; returns its real d.

    manner: (1: heuristic weights, 2: plain importances, 3: squares of the weights themselves; steps of the fan each
    way; their size; sign of the start; 1: the integers are searched as well).
    """
    n_sub, sub, _top, _high, largest, _below, _above = shape
    if manner[0] == 1:
        weights = heuristic_weights(tile, np.float32(2.0))
    elif manner[0] == 2:
        weights = tile[1]
    else:
        weights = squares(tile)
    values = np.empty((2, n_sub, 16), np.float32)
    for k in range(n_sub):
        scale, sw = _scale_fan(tile, weights, (k * sub, k * sub + sub), shape, table, manner)
        store(values[0], k, scale)
        store(values[1], k, sw)
    last = state.shape[0] - 1
    if n_sub == 1:
        store(state[last], 0, spread(ONE))
        return load(values[0], 0)
    return _signed_integers(values[0], values[1], state[last], largest, manner[4] == 1)
