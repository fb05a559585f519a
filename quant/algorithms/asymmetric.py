# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-subclassing-any
"""Search for super-blocks of w = d * scale * q - dmin * min: integer scales and mins per sub-block, half d and dmin.

Minimises sum weight * (x - w)^2 of each super-block over everything that is stored, in four steps:

1. A fan of real scales and offsets per sub-block (`fit_sub`): codes for 1/scale = (nmax + r) / (max - min), r over a
   range, anchored in turn at the smallest and at the largest weight, each followed by the closed-form least squares of
   scale and offset. Two anchors matter more than many r: with one the offset hardly moves (Gaussian rows, 4 bits:
   1.5 % of the error). Then codes are assigned and fitted once more.
2. d and dmin from a grid (`seed`). Around a sub-block's fit the error is a known quadratic of scale and offset, so a
   pair (d, dmin) with the integers it implies is judged in a dozen operations per sub-block, without touching weights.
3. Rounds of `walk` and `refit`: each sub-block tries the neighbours of its two integers with codes rounded anew and
   the error measured, then d and dmin become the least squares for the codes, as half precision stores them, if that
   measures better. Scale and min mostly move together (1, 1), (2, 2), (2, 1): that keeps the middle of the range.
4. The choice that ggml makes (`reference`) is measured too and taken over where it is better, so that no block is
   worse off. Not at effort `fast`; for Q2_K without an imatrix only at `best`, because it would halve the speed and
   ggml's choice wins there in one block of ten thousand.

Super-blocks without a negative weight are searched mirrored (-x), which d < 0 and dmin < 0 express: offsets must not be
positive, and this way they need not be. Refs: ggml-quants.c, make_qkx3_quants (the fan); llama.cpp PR 12557 and
ik_llama.cpp PR 295 on what a wider search gains.
"""

from __future__ import annotations

import numpy as np

from weightsmith.quant.algorithms import reference
from weightsmith.quant.algorithms.lanes import (
    clip,
    larger,
    load,
    nearest,
    quotient,
    smaller,
    spread,
    store,
    store_bytes,
    where,
)
from weightsmith.quant.algorithms.tiles import stored
from weightsmith.quant.kernels import inner

ARITHMETIC_VERSION = 2  # changes whenever the same input would give other bytes
ZERO = np.float32(0.0)
ONE = np.float32(1.0)
TINY = np.float32(1e-5)  # below this share a determinant is rounding noise
# Rows of a tile's state, each [n_sub, 16].
SCALE, OFFSET, LS, LM, ERROR, TRIAL, S_L, S_LL, S_X, S_W, REF_LS, REF_LM = range(12)
N_STATE = 12
# Steps for a sub-block's integers (scale, min), best first; efforts use 6, 8 and 24 of them.
_NEAR = [(1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0), (2, 2), (-2, -2), (2, 1), (-2, -1), (1, -1), (-1, 1)]
_FAR = [(1, 2), (-1, -2), (0, 2), (0, -2), (2, 0), (-2, 0), (3, 3), (-3, -3), (3, 2), (-3, -2), (2, 3), (-2, -3)]
NEIGHBOURS = np.array(_NEAR + _FAR, np.float32)
# Effort: steps of the fan, rounds before and after the reference's choice joins, neighbours, d and dmin tried.
PLANS = ((8, 1, 0, 6, 5), (12, 0, 1, 8, 9), (48, 3, 3, 24, 17))


@inner
def _fan_sums(tile, span, inv, shift, nmax):
    """Weighted sums of q, q * q and x * q for codes q = round(x * inv - shift) of elements span[0] to span[1]."""
    sl = spread(ZERO)
    sll = sl
    sxl = sl
    for e in range(span[0], span[1]):
        v = load(tile[0], e)
        q = clip(nearest(v * inv - shift), ZERO, nmax)
        wq = load(tile[1], e) * q
        sl = sl + wq
        sll = sll + wq * q
        sxl = sxl + wq * v
    return sl, sll, sxl


@inner
def sums(tile, span, s, m, nmax):
    """As _fan_sums, for codes nearest to (x - m) / s."""
    inv = quotient(spread(ONE), s)
    sl = spread(ZERO)
    sll = sl
    sxl = sl
    for e in range(span[0], span[1]):
        v = load(tile[0], e)
        q = clip(nearest((v - m) * inv), ZERO, nmax)
        wq = load(tile[1], e) * q
        sl = sl + wq
        sll = sll + wq * q
        sxl = sxl + wq * v
    return sl, sll, sxl


@inner
def errors(tile, span, first, second, nmax):
    """Weighted squared errors of a sub-block for two pairs (scale, offset), each with its nearest codes."""
    s0, m0 = first
    s1, m1 = second
    inv0 = quotient(spread(ONE), s0)
    inv1 = quotient(spread(ONE), s1)
    sum0 = spread(ZERO)
    sum1 = sum0
    for e in range(span[0], span[1]):
        v = load(tile[0], e)
        weight = load(tile[1], e)
        v0 = v - m0
        v1 = v - m1
        e0 = v0 - s0 * clip(nearest(v0 * inv0), ZERO, nmax)
        e1 = v1 - s1 * clip(nearest(v1 * inv1), ZERO, nmax)
        sum0 = sum0 + weight * e0 * e0
        sum1 = sum1 + weight * e1 * e1
    return sum0, sum1


@inner
def solve(sl, sll, sxl, sx, sw):
    """Least-squares scale and offset (not above 0) for given codes, and what they take off sum w * x * x."""
    det = sw * sll - sl * sl
    sound = det > sw * sll * TINY
    s = quotient(sw * sxl - sx * sl, det)
    m = quotient(sll * sx - sl * sxl, det)
    sound = sound & (m <= ZERO)
    s = where(sound, s, quotient(sxl, sll))
    m = where(sound, m, ZERO)
    return s, m, s * sxl + m * sx


@inner
def fit_sub(tile, state, k, shape, steps):
    """Real scale and offset of sub-block k, with the sums that describe the error around them."""
    sub, nmax, reach = shape[1], shape[2], shape[4]
    span = (k * sub, k * sub + sub)
    low = spread(ZERO)
    high = load(tile[0], span[0])
    sw = spread(ZERO)
    sx = sw
    for e in range(span[0], span[1]):
        v = load(tile[0], e)
        weight = load(tile[1], e)
        low = smaller(low, v)
        high = larger(high, v)
        sw = sw + weight
        sx = sx + weight * v
    unit = quotient(spread(ONE), high - low)
    scale = spread(ZERO)
    offset = smaller(quotient(sx, sw), spread(ZERO))
    best = offset * sx
    at_l = spread(ZERO)
    at_ll = at_l
    for i in range(steps + 1):
        if i < steps:
            inv = unit * (nmax - reach + (reach + np.float32(0.8)) * np.float32(i) / np.float32(steps - 1))
            shift = low * inv if i % 2 == 0 else high * inv - nmax
            sl, sll, sxl = _fan_sums(tile, span, inv, shift, nmax)
        else:
            sl, sll, sxl = sums(tile, span, scale, offset, nmax)
        s, m, gain = solve(sl, sll, sxl, sx, sw)
        better = gain > best
        best = where(better, gain, best)
        scale = where(better, s, scale)
        offset = where(better, m, offset)
        at_l = where(better, sl, at_l)
        at_ll = where(better, sll, at_ll)
    store(state[SCALE], k, scale)
    store(state[OFFSET], k, offset)
    store(state[S_L], k, at_l)
    store(state[S_LL], k, at_ll)
    store(state[S_X], k, sx)
    store(state[S_W], k, sw)


@inner
def _place(state, shape, d, dmin):
    """Integers for d and dmin by the quadratic around each sub-block's fit; returns what they add to the error."""
    n_sub, smax = shape[0], shape[3]
    inv = quotient(spread(ONE), d)
    inv_min = quotient(spread(ONE), dmin)
    total = spread(ZERO)
    for k in range(n_sub):
        scale = load(state[SCALE], k)
        offset = load(state[OFFSET], k)
        sl = load(state[S_L], k)
        sw = load(state[S_W], k)
        ls = clip(nearest(scale * inv), ZERO, smax)
        ds = d * ls - scale
        lm = clip(nearest((quotient(ds * sl, sw) - offset) * inv_min), ZERO, smax)
        dm = ZERO - dmin * lm - offset
        total = total + (ds * ds * load(state[S_LL], k) + dm * dm * sw + ds * dm * sl * np.float32(2.0))
        store(state[LS], k, ls)
        store(state[LM], k, lm)
    return total


@inner
def _seed(state, shape, units, tries):
    """The best of tries * tries pairs of d and dmin; their integers are left in the state."""
    n_sub, smax = shape[0], shape[3]
    top = spread(ZERO)
    deep = spread(ZERO)
    for k in range(n_sub):
        top = larger(top, load(state[SCALE], k))
        deep = larger(deep, ZERO - load(state[OFFSET], k))
    step = smax / np.float32(63.0) * np.float32(8.0) / np.float32(tries - 1)
    best = spread(np.float32(np.inf))
    d = spread(ZERO)
    dmin = d
    for i in range(tries):
        d_i = stored(top / (smax + ONE - step * np.float32(i)), units)
        for j in range(tries):
            dmin_j = stored(deep / (smax + ONE - step * np.float32(j)), units)
            error = _place(state, shape, d_i, dmin_j)
            better = error < best
            best = where(better, error, best)
            d = where(better, d_i, d)
            dmin = where(better, dmin_j, dmin)
    _place(state, shape, d, dmin)
    return d, dmin


@inner
def _measure(tile, state, shape, d, dmin, ls_row, lm_row):
    """Errors of all sub-blocks with the integers in two rows of the state, into TRIAL; their sum."""
    n_sub, sub, nmax = shape[:3]
    total = spread(ZERO)
    for k in range(n_sub):
        s = d * load(state[ls_row], k)
        m = ZERO - dmin * load(state[lm_row], k)
        error = errors(tile, (k * sub, k * sub + sub), (s, m), (s, m), nmax)[0]
        store(state[TRIAL], k, error)
        total = total + error
    return total


@inner
def _walk(tile, state, shape, d, dmin, reach):
    """Move each sub-block's integers to the best of `reach` neighbours; the new sum of errors."""
    n_sub, sub, nmax, smax = shape[:4]
    total = spread(ZERO)
    for k in range(n_sub):
        span = (k * sub, k * sub + sub)
        ls = load(state[LS], k)
        lm = load(state[LM], k)
        best = load(state[ERROR], k)
        best_ls = ls
        best_lm = lm
        for i in range(0, reach, 2):
            a0 = clip(ls + NEIGHBOURS[i, 0], ZERO, smax)
            b0 = clip(lm + NEIGHBOURS[i, 1], ZERO, smax)
            a1 = clip(ls + NEIGHBOURS[i + 1, 0], ZERO, smax)
            b1 = clip(lm + NEIGHBOURS[i + 1, 1], ZERO, smax)
            e0, e1 = errors(tile, span, (d * a0, ZERO - dmin * b0), (d * a1, ZERO - dmin * b1), nmax)
            better = e0 < best
            best = where(better, e0, best)
            best_ls = where(better, a0, best_ls)
            best_lm = where(better, b0, best_lm)
            better = e1 < best
            best = where(better, e1, best)
            best_ls = where(better, a1, best_ls)
            best_lm = where(better, b1, best_lm)
        store(state[LS], k, best_ls)
        store(state[LM], k, best_lm)
        store(state[ERROR], k, best)
        total = total + best
    return total


@inner
def _refit(tile, state, shape, d, dmin):
    """Least-squares d and dmin for the present codes and integers."""
    n_sub, sub, nmax = shape[:3]
    a11 = spread(ZERO)
    a12 = a11
    a22 = a11
    b1 = a11
    b2 = a11
    for k in range(n_sub):
        ls = load(state[LS], k)
        lm = load(state[LM], k)
        sl, sll, sxl = sums(tile, (k * sub, k * sub + sub), d * ls, ZERO - dmin * lm, nmax)
        a11 = a11 + ls * ls * sll
        a12 = a12 - ls * lm * sl
        a22 = a22 + lm * lm * load(state[S_W], k)
        b1 = b1 + ls * sxl
        b2 = b2 - lm * load(state[S_X], k)
    det = a11 * a22 - a12 * a12
    sound = det > a11 * a22 * TINY
    return where(sound, quotient(a22 * b1 - a12 * b2, det), d), where(sound, quotient(a11 * b2 - a12 * b1, det), dmin)


@inner
def _adopt(state, n_sub, better):
    """Where `better`, the errors in TRIAL become the present ones."""
    for k in range(n_sub):
        store(state[ERROR], k, where(better, load(state[TRIAL], k), load(state[ERROR], k)))


@inner
def _rounds(tile, state, shape, units, best, count, reach):
    """`count` times: walk, then refit d and dmin if that measures better. best: error, d, dmin."""
    total, d, dmin = best
    for _ in range(count):
        total = _walk(tile, state, shape, d, dmin, reach)
        d_new, dmin_new = _refit(tile, state, shape, d, dmin)
        d_new = stored(d_new, units)
        dmin_new = stored(dmin_new, units)
        trial = _measure(tile, state, shape, d_new, dmin_new, LS, LM)
        better = trial < total
        _adopt(state, shape[0], better)
        total = where(better, trial, total)
        d = where(better, d_new, d)
        dmin = where(better, dmin_new, dmin)
    return total, d, dmin


@inner
def _join_reference(tile, state, shape, units, best, guided):
    """Take over the reference's integers, d and dmin in the lanes where they measure better."""
    total, d, dmin = best
    n_sub = shape[0]
    d_ref, dmin_ref = reference.asymmetric(tile, state, shape, guided)
    d_ref = stored(d_ref, units)
    dmin_ref = stored(dmin_ref, units)
    trial = _measure(tile, state, shape, d_ref, dmin_ref, REF_LS, REF_LM)
    better = trial < total
    for k in range(n_sub):
        store(state[LS], k, where(better, load(state[REF_LS], k), load(state[LS], k)))
        store(state[LM], k, where(better, load(state[REF_LM], k), load(state[LM], k)))
    _adopt(state, n_sub, better)
    return where(better, trial, total), where(better, d_ref, d), where(better, dmin_ref, dmin)


@inner
def mirror(tile, units):
    """Negate the super-blocks of a tile that have no negative weight, and their units with them."""
    low = spread(ZERO)
    for e in range(tile.shape[1]):
        low = smaller(low, load(tile[0], e))
    sign = where(low < ZERO, ONE, spread(np.float32(-1.0)))
    for e in range(tile.shape[1]):
        store(tile[0], e, load(tile[0], e) * sign)
    store(units, 0, load(units, 0) * sign)
    store(units, 1, load(units, 1) * sign)


@inner
def search(tile, units, state, codes, shape, effort, guided):
    """Fill codes (uint8 [width, 16]) and rows LS and LM of the state; returns d and dmin in tile units.

    tile: float32 [2, width, 16], weights and their importances. shape: (sub-blocks, weights in one, largest code,
    largest integer, reach of the fan, and of the reference's fan without imatrix how many scales and the first; 0 if it
    is not to join then). effort: 0, 1, 2. guided: an imatrix is there.
    """
    n_sub, sub, nmax = shape[:3]
    steps, before, after, reach, tries = PLANS[effort]
    mirror(tile, units)
    for k in range(n_sub):
        fit_sub(tile, state, k, shape, steps)
    d, dmin = _seed(state, shape, units, tries)
    total = _measure(tile, state, shape, d, dmin, LS, LM)
    _adopt(state, n_sub, total >= ZERO)
    best = (total, d, dmin)
    for stage in range(2):
        best = _rounds(tile, state, shape, units, best, before if stage == 0 else after, reach)
        if stage == 0 and after > 0 and (guided or n_sub < 16 or effort == 2):
            best = _join_reference(tile, state, shape, units, best, guided)
    _total, d, dmin = best
    for k in range(n_sub):
        m = ZERO - dmin * load(state[LM], k)
        inv = quotient(spread(ONE), d * load(state[LS], k))
        for e in range(k * sub, k * sub + sub):
            store_bytes(codes, e, clip(nearest((load(tile[0], e) - m) * inv), ZERO, nmax))
    return d, dmin
