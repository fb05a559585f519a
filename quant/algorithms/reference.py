# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-subclassing-any
"""The choice that ggml's quantizers make, sixteen super-blocks at a time, as a start for the search.

ggml minimises sum v * (x - w)^2 in two steps that do not see each other: real scales (and offsets) per sub-block, then
integers that are close to those. With an imatrix v = importance * sqrt(S + x * x), S = c * the mean square of the
super-block (c is 2, for Q2_K 1); without one v = rms + |x| (Q4_K, Q5_K) or x * x. Every product, quotient
and sum is taken in ggml's order (w * x * q, not w * q * x: where integers are chosen among near-ties the last bit
decides), so that the choice is ggml's own: on x86, where its quantizers are built without fused multiply-adds, more
than 99.9 % of the super-blocks get its exact scales and integers. Elsewhere its compilers place them freely.

Ref: ggml-quants.c, make_qkx3_quants, make_qx_quants, make_qp_quants and the quantize_row_*_impl functions.
"""

from __future__ import annotations

import numpy as np

from weightsmith.quant.algorithms.lanes import (
    any_lane,
    clip,
    larger,
    load,
    magnitude,
    nearest,
    quotient,
    root,
    smaller,
    spread,
    store,
    where,
)
from weightsmith.quant.algorithms.levels import TAME, WHOLE, moment, nearest_value, within
from weightsmith.quant.kernels import inner

ZERO = np.float32(0.0)
ONE = np.float32(1.0)
# Rounding noise of the closed formula for a fit's error, as a share of sum v * (x * x + offset * offset). Fits that are
# closer than that are compared by their summed errors, as ggml compares all of them (Q5_K: without it 92 % agree).
NOISE = np.float32(2.0**-20)


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
def magnitudes(tile):
    """|x| of a tile, float32 [width, 16]: ggml's weights for Q2_K without an imatrix."""
    weights = np.empty((tile.shape[1], 16), np.float32)
    for e in range(tile.shape[1]):
        v = load(tile[0], e)
        store(weights, e, larger(v, ZERO - v))
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
def _residue(tile, weights, span, rule, fit, nmax):
    """Weighted squared error of a sub-block: codes round(inv * (x - anchor)) by `rule`, the fit's scale and offset."""
    inv, anchor = rule
    scale, offset = fit
    error = spread(ZERO)
    for e in range(span[0], span[1]):
        v = load(tile[0], e)
        diff = scale * clip(nearest(inv * (v - anchor)), ZERO, nmax) + offset - v
        error = error + load(weights, e) * (diff * diff)
    return error


@inner
def _line(tile, weights, span, rule, known, nmax):
    """Least squares for the codes that a rule (inverse scale, anchor) gives: scale, offset, determinant, sums."""
    inv, anchor = rule
    sx, sw = known
    sl = spread(ZERO)
    sll = sl
    sxl = sl
    for e in range(span[0], span[1]):
        v = load(tile[0], e)
        q = clip(nearest(inv * (v - anchor)), ZERO, nmax)
        wq = load(weights, e) * q
        sl = sl + wq
        sll = sll + wq * q
        sxl = sxl + wq * v
    det = sw * sll - sl * sl
    s = quotient(sw * sxl - sx * sl, det)
    m = quotient(sll * sx - sl * sxl, det)
    s = where(m > ZERO, quotient(sxl, sll), s)
    m = where(m > ZERO, ZERO, m)
    return s, m, det, sl, sll, sxl


@inner
def line_fan(tile, weights, span, nmax, rays):
    """Scale, offset (not above 0) and sum of weights of one sub-block.

    rays: how many scales are tried, the first and the step. They are anchored at the minimum at first, then at the
    offset of the best so far.
    """
    low = load(tile[0], span[0])
    high = low
    sw = spread(ZERO)
    sx = sw
    sxx = sw
    for e in range(span[0], span[1]):
        v = load(tile[0], e)
        weight = load(weights, e)
        low = smaller(low, v)
        high = larger(high, v)
        sw = sw + weight
        sx = sx + weight * v
        sxx = sxx + weight * v * v
    offset = smaller(low, spread(ZERO))
    noise = (sxx + sw * offset * offset) * NOISE
    noise = noise * noise
    best_inv = quotient(spread(nmax), high - offset)
    scale = quotient(spread(ONE), best_inv)
    best_anchor = offset
    best_sxl = ZERO - sxx
    best = _plain_gain(tile, weights, span, (scale, offset), nmax)
    for i in range(rays[0]):
        inv = quotient(spread(rays[1] + rays[2] * np.float32(i) + nmax), high - offset)
        s, m, det, sl, sll, sxl = _line(tile, weights, span, (inv, offset), (sx, sw), nmax)
        gain = np.float32(2.0) * (s * sxl + m * sx) - s * s * sll - m * m * sw - np.float32(2.0) * (s * m * sl)
        lead = gain - best
        apart = sxl - best_sxl
        close = (det > ZERO) & (lead * lead < noise) & (apart * apart > ZERO)
        if any_lane(close):
            mine = _residue(tile, weights, span, (inv, offset), (s, m), nmax)
            lead = where(
                close, _residue(tile, weights, span, (best_inv, best_anchor), (scale, offset), nmax) - mine, lead
            )
        better = (det > ZERO) & (lead > ZERO)
        best = where(better, gain, best)
        best_inv = where(better, inv, best_inv)
        best_anchor = where(better, offset, best_anchor)
        best_sxl = where(better, sxl, best_sxl)
        scale = where(better, s, scale)
        offset = where(better, m, offset)
    return scale, offset, sw


@inner
def _absolute_fan(tile, weights, span, nmax, rays):
    """As line_fan, but the fit of least weighted absolute error wins: Q2_K without an imatrix."""
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
    inv = quotient(spread(nmax), high - offset)
    scale = quotient(spread(ONE), inv)
    best = _absolute(tile, weights, span, (inv, offset), (scale, offset), nmax)
    for i in range(rays[0]):
        inv = quotient(spread(rays[1] + rays[2] * np.float32(i) + nmax), high - offset)
        s, m, det, _, _, _ = _line(tile, weights, span, (inv, offset), (sx, sw), nmax)
        error = _absolute(tile, weights, span, (inv, offset), (s, m), nmax)
        better = (det > ZERO) & (error < best)
        best = where(better, error, best)
        scale = where(better, s, scale)
        offset = where(better, m, offset)
    return scale, offset, sw


@inner
def _absolute(tile, weights, span, rule, fit, nmax):
    """As _residue, with absolute errors."""
    inv, anchor = rule
    scale, offset = fit
    error = spread(ZERO)
    for e in range(span[0], span[1]):
        v = load(tile[0], e)
        diff = scale * clip(nearest(inv * (v - anchor)), ZERO, nmax) + offset - v
        error = error + load(weights, e) * larger(diff, ZERO - diff)
    return error


@inner
def _integers(values, weights, rows, smax, searched):
    """Whole numbers 0..smax into rows (float32 [n, 16]) that times the returned scale are close to values [n, 16]."""
    n = values.shape[0]
    top = spread(ZERO)
    for k in range(n):
        top = larger(top, load(values, k))
    best = spread(np.float32(np.inf))
    inv = spread(ZERO)
    for i in range(9 if searched else 1):
        # The plain range comes first, and a later one must be better to replace it.
        tenth = 0 if i == 0 else (i - 5 if i < 5 else i - 4)
        inv_i = quotient(spread(np.float32(0.1) * np.float32(tenth) + smax), top)
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
        w = load(weights, k)
        q = smaller(nearest(inv * v), smax)
        store(rows, k, q)
        slx = slx + w * v * q
        sll = sll + w * q * q
    for _ in range(5 if searched else 0):
        for k in range(n):
            v = load(values, k)
            w = load(weights, k)
            q = load(rows, k)
            slx_k = slx - w * v * q
            sll_k = sll - w * q * q
            sound = (slx_k > ZERO) & (sll_k > ZERO)
            new = clip(nearest(where(sound, quotient(v * sll_k, slx_k), q)), ZERO, smax)
            sound = sound & ((new - q) * (new - q) > ZERO)
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
    absolute = n_sub == 16 and not guided
    if guided:
        weights = heuristic_weights(tile, np.float32(1.0) if n_sub == 16 else np.float32(2.0))
        rays = (37, np.float32(-0.9), np.float32(0.05))
    else:
        weights = magnitudes(tile) if absolute else plain_weights(tile, sub)
        rays = (shape[5], shape[6], np.float32(0.1))
    values = np.empty((3, n_sub, 16), np.float32)
    for k in range(n_sub):
        span = (k * sub, k * sub + sub)
        if absolute:
            scale, offset, sw = _absolute_fan(tile, weights, span, nmax, rays)
        else:
            scale, offset, sw = line_fan(tile, weights, span, nmax, rays)
        store(values[0], k, scale)
        store(values[1], k, ZERO - offset)
        store(values[2], k, sw)
    last = state.shape[0] - 1
    d = _integers(values[0], values[2], state[last - 1], smax, guided)
    dmin = _integers(values[1], values[2], state[last], smax, guided)
    return d, dmin


@inner
def _scale_sums(tile, weights, span, inv, top, table):
    """Weighted sums of x * c and c * c for values c nearest to x * inv, in ggml's order of multiplying."""
    sxc = spread(ZERO)
    scc = sxc
    for e in range(span[0], span[1]):
        v = load(tile[0], e)
        weight = load(weights, e)
        c = nearest_value(v * inv, top, table)
        sxc = sxc + moment(weight, v, c, table)
        scc = scc + weight * c * c
    return sxc, scc


@inner
def _scale_sums_of_two(tile, weights, span, inv0, inv1, top, table):
    """_scale_sums for inv0 and for inv1."""
    sxc0 = spread(ZERO)
    scc0 = sxc0
    sxc1 = sxc0
    scc1 = sxc0
    for e in range(span[0], span[1]):
        v = load(tile[0], e)
        weight = load(weights, e)
        c0 = nearest_value(v * inv0, top, table)
        c1 = nearest_value(v * inv1, top, table)
        sxc0 = sxc0 + moment(weight, v, c0, table)
        scc0 = scc0 + weight * c0 * c0
        sxc1 = sxc1 + moment(weight, v, c1, table)
        scc1 = scc1 + weight * c1 * c1
    return (sxc0, scc0), (sxc1, scc1)


@inner
def _better_scale(sums, best):
    """What the best is after a fit that has these sums: gain and scale."""
    gain, scale = best
    sxc, scc = sums
    better = (sxc * sxc > gain * scc) & (scc > ZERO)
    s = sxc / scc
    return where(better, s * sxc, gain), where(better, s, scale)


@inner
def _steps(manner, k):
    """The k-th two of the steps -manner[1]..manner[1], without 0."""
    i, j = 2 * k - manner[1], 2 * k - manner[1] + 1
    return i if i < 0 else i + 1, j if j < 0 else j + 1


@inner
def _step(extreme, top, manner, i):
    return spread(ZERO - top - manner[2] * np.float32(i)) / extreme


@inner
def scale_fan(tile, weights, span, shape, table, manner):
    """Scale of one sub-block: the weight of largest magnitude near the lowest value, in manner[1] steps each way."""
    top = shape[2]
    extreme = load(tile[0], span[0])
    sw = spread(ZERO)
    for e in range(span[0], span[1]):
        v = load(tile[0], e)
        extreme = where(larger(v, ZERO - v) > larger(extreme, ZERO - extreme), v, extreme)
        sw = sw + load(weights, e)
    extreme = where(extreme == ZERO, ONE, extreme)  # a sub-block of zeros, whose codes are the same for any scale
    plain = quotient(spread(ONE), quotient(extreme, spread(top * manner[3])))  # a table's start has the other sign
    plain_sums = _scale_sums(tile, weights, span, plain, top, table)
    best = spread(ZERO), spread(ZERO)
    best = _better_scale(plain_sums, best)
    # Where the start's scale is among the steps (rounding apart), its sums are not taken again.
    middle = quotient(spread(ZERO - top), extreme)
    again = any_lane(middle < plain) or any_lane(middle > plain)
    tame = not any_lane(magnitude(middle) > TAME)
    i, j = _steps(manner, 0)
    inv0, inv1 = _step(extreme, top, manner, i), _step(extreme, top, manner, j)
    for k in range(manner[1]):  # two at a time, without the one in the middle
        i, j = _steps(manner, k)
        i_next, j_next = _steps(manner, k + 1)
        next0, next1 = _step(extreme, top, manner, i_next), _step(extreme, top, manner, j_next)
        if table is None and tame and manner[2] > ZERO and top + manner[2] * np.float32(j) <= within(top):
            sums0, sums1 = _scale_sums_of_two(tile, weights, span, inv0, inv1, top, WHOLE)
        else:
            sums0, sums1 = _scale_sums_of_two(tile, weights, span, inv0, inv1, top, table)
        inv0, inv1 = next0, next1
        best = _better_scale(sums0, best)
        if i == -1:
            if again:
                plain_sums = _scale_sums(tile, weights, span, middle, top, table)
            best = _better_scale(plain_sums, best)
        best = _better_scale(sums1, best)
    return best[1], sw


@inner
def _flip(v, known, q, sums, top):
    """The code that suits one weight best while the others stay: code, sums with it, where it moved.

    known: x * x and its product with x.
    """
    sxl, sll = sums
    weight, cube = known
    sxl_e = sxl - cube * q
    sll_e = sll - weight * q * q
    sound = sxl_e > ZERO
    new = clip(nearest(where(sound, v * sll_e / sxl_e, q)), ZERO - top, top - ONE)
    sxl_e = sxl_e + cube * new
    sll_e = sll_e + weight * new * new
    better = sound & (new != q) & (sll_e > ZERO) & (sxl_e * sxl_e * sll > sxl * sxl * sll_e)
    return where(better, new, q), (where(better, sxl_e, sxl), where(better, sll_e, sll)), better


@inner
def _plain_codes(tile, span, top, codes, powers):
    """Codes of one sub-block with its weight of largest magnitude at the lowest value; their sums, weights x * x.

    powers: x * x and x * x * x of the sub-block are left there.
    """
    extreme = load(tile, span[0])
    for e in range(span[0], span[1]):
        v = load(tile, e)
        extreme = where(larger(v, ZERO - v) > larger(extreme, ZERO - extreme), v, extreme)
    inv = quotient(spread(ZERO - top), extreme)
    sxl = spread(ZERO)
    sll = sxl
    for e in range(span[0], span[1]):
        v = load(tile, e)
        weight = v * v
        cube = weight * v
        q = clip(nearest(inv * v), ZERO - top, top - ONE)
        store(codes, e, q)
        store(powers[0], e, weight)
        store(powers[1], e, cube)
        sxl = sxl + cube * q
        sll = sll + weight * q * q
    return sxl, sll


@inner
def _flip_at(tile, powers, codes, e, sums, top):
    return _flip(load(tile, e), (load(powers[0], e), load(powers[1], e)), load(codes, e), sums, top)


@inner
def _flips(tile, scales, sub, top):
    """Scales of Q3_K's sub-blocks without an imatrix: codes move one by one, five times around, weights x * x.

    Each move waits for the one before it, so four sub-blocks go side by side; once none moves, all stand.
    """
    codes = np.empty((4 * sub, 16), np.float32)
    powers = np.empty((2, 4 * sub, 16), np.float32)
    for first in range(0, tile.shape[1], 4 * sub):
        group = tile[0, first : first + 4 * sub]
        sums0 = _plain_codes(group, (0, sub), top, codes, powers)
        sums1 = _plain_codes(group, (sub, 2 * sub), top, codes, powers)
        sums2 = _plain_codes(group, (2 * sub, 3 * sub), top, codes, powers)
        sums3 = _plain_codes(group, (3 * sub, 4 * sub), top, codes, powers)
        for _ in range(5):
            moved = spread(ZERO) > ZERO
            for e in range(sub):
                q0, sums0, moved0 = _flip_at(group, powers, codes, e, sums0, top)
                q1, sums1, moved1 = _flip_at(group, powers, codes, e + sub, sums1, top)
                q2, sums2, moved2 = _flip_at(group, powers, codes, e + 2 * sub, sums2, top)
                q3, sums3, moved3 = _flip_at(group, powers, codes, e + 3 * sub, sums3, top)
                store(codes, e, q0)
                store(codes, e + sub, q1)
                store(codes, e + 2 * sub, q2)
                store(codes, e + 3 * sub, q3)
                moved = moved | moved0 | moved1 | moved2 | moved3
            if not any_lane(moved):
                break
        for i, sums in enumerate((sums0, sums1, sums2, sums3)):
            store(scales, first // sub + i, quotient(sums[0], sums[1]))


@inner
def _signed_integers(values, weights, rows, largest, searched):
    """Whole numbers -largest..largest - 1 into rows [n, 16]; the scale that brings them close to values [n, 16]."""
    n = values.shape[0]
    widest = load(values, 0)
    for k in range(n):
        v = load(values, k)
        widest = where(larger(v, ZERO - v) > larger(widest, ZERO - widest), v, widest)
    best = spread(ZERO)
    inv = quotient(spread(ZERO - largest), widest)
    scale = quotient(spread(ONE), inv)
    for i in range(-10, 10 if searched else -10):
        inv_i = quotient(spread(ZERO - largest - (np.float32(0.1) * np.float32(i) if i > -10 else ZERO)), widest)
        sxl = spread(ZERO)
        sll = sxl
        for k in range(n):
            v = load(values, k)
            w = load(weights, k)
            q = clip(nearest(inv_i * v), ZERO - largest, largest - ONE)
            sxl = sxl + w * v * q
            sll = sll + w * q * q
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

    manner: (1: heuristic weights, 2: plain importances, 3: squares of the weights themselves, 4: these, by flips; steps
    of the fan each way; their size; sign of the start; 1: the integers are searched as well).
    """
    n_sub, sub, _top, _high, largest, _below, _above = shape
    if manner[0] == 1:
        weights = heuristic_weights(tile, np.float32(2.0))
    elif manner[0] == 2:
        weights = tile[1]
    else:
        weights = squares(tile)
    values = np.empty((2, n_sub, 16), np.float32)
    if manner[0] == 4:
        _flips(tile, values[0], sub, shape[2])
    else:
        for k in range(n_sub):
            scale, sw = scale_fan(tile, weights, (k * sub, k * sub + sub), shape, table, manner)
            store(values[0], k, scale)
            store(values[1], k, sw)
    last = state.shape[0] - 1
    if n_sub == 1:
        store(state[last], 0, spread(ONE))
        return load(values[0], 0)
    return _signed_integers(values[0], values[1], state[last], largest, manner[4] == 1)
