# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-subclassing-any
"""Search for super-blocks of w = d * scale * c(q): signed integer scales per sub-block, half d, no offset.

c(q) are the codes themselves (Q3_K, Q6_K) or a table (IQ4_NL, IQ4_XS; see `levels`). Minimises sum weight * (x - w)^2
of each super-block in four steps:

1. A fan of real scales per sub-block (`fit_sub`): the weight of largest magnitude is put near the lowest value and, in
   turn, near the highest one, since ranges such as -4..3 treat the two signs differently; then least squares.
2. d from a grid (`_seed`): around a fit the error is a known quadratic of the scale, so a d and the integers it implies
   are judged without touching weights.
3. Rounds of `_walk` and `_refit`: each integer tries its neighbours and its negative with codes rounded anew, then d
   becomes the least squares for the codes, as half precision stores it, if that measures better.
4. The choice that ggml makes (`reference`) is measured too and taken over where it is better, so that no block is
   worse off. Not at effort `fast`.

Refs: ggml-quants.c, make_qx_quants (the fan of one sign); ik_llama.cpp PR 295 and 624 on the other sign and on
neighbouring integers.
"""

from __future__ import annotations

import numpy as np

from weightsmith.quant.algorithms import reference
from weightsmith.quant.algorithms.lanes import (
    any_lane,
    clip,
    larger,
    load,
    magnitude,
    nearest,
    quotient,
    smaller,
    spread,
    store,
    where,
)
from weightsmith.quant.algorithms.levels import TAME, WHOLE, nearest_value, within
from weightsmith.quant.algorithms.tiles import stored
from weightsmith.quant.kernels import inner

ARITHMETIC_VERSION = 2  # changes whenever the same input would give other bytes
ZERO = np.float32(0.0)
ONE = np.float32(1.0)
# Small scales come first and a larger one must gain more than rounding noise: where an outlier decides, several fit
# equally well, and the smallest leaves the finest d to the other sub-blocks.
LEAST = np.float32(1.0 - 2.0**-22)
# Rows of a tile's state, each [n_sub, 16].
SCALE, LS, ERROR, TRIAL, S_CC, REF_LS = range(6)
N_STATE = 6
# Moves of a sub-block's integer: times the first, plus the second. Efforts use 2, 2 and 14 of them.
_NEAR = [(1, 1), (1, -1), (1, 2), (1, -2), (-1, 0), (-1, 1), (1, 3), (1, -3)]
NEIGHBOURS = np.array([*_NEAR, (-1, -1), (1, 4), (1, -4), (-1, 2), (1, 5), (1, -5)], np.float32)
# Effort: steps of the fan, rounds before and after the reference's choice joins, neighbours, d tried.
PLANS = ((10, 1, 0, 2, 9), (12, 0, 1, 2, 17), (64, 3, 3, 14, 65))


@inner
def sums(tile, span, inv, top, table):
    """Weighted sums of x * c and c * c for values c nearest to x * inv."""
    sxc = spread(ZERO)
    scc = sxc
    for e in range(span[0], span[1]):
        v = load(tile[0], e)
        c = nearest_value(v * inv, top, table)
        wc = load(tile[1], e) * c
        sxc = sxc + wc * v
        scc = scc + wc * c
    return sxc, scc


@inner
def sums_of_two(tile, weights, span, inv0, inv1, top, table):
    """Weighted sums of x * c and c * c for values c nearest to x * inv0, and for those nearest to x * inv1."""
    sxc0 = spread(ZERO)
    scc0 = sxc0
    sxc1 = sxc0
    scc1 = sxc0
    for e in range(span[0], span[1]):
        v = load(tile, e)
        weight = load(weights, e)
        c0 = nearest_value(v * inv0, top, table)
        c1 = nearest_value(v * inv1, top, table)
        wc0 = weight * c0
        wc1 = weight * c1
        sxc0 = sxc0 + wc0 * v
        scc0 = scc0 + wc0 * c0
        sxc1 = sxc1 + wc1 * v
        scc1 = scc1 + wc1 * c1
    return sxc0, scc0, sxc1, scc1


@inner
def errors(tile, span, s0, s1, top, table):
    """Weighted squared errors of a sub-block for two scales, each with its nearest codes."""
    inv0 = quotient(spread(ONE), s0)
    inv1 = quotient(spread(ONE), s1)
    sum0 = spread(ZERO)
    sum1 = sum0
    for e in range(span[0], span[1]):
        v = load(tile[0], e)
        weight = load(tile[1], e)
        e0 = v - s0 * nearest_value(v * inv0, top, table)
        e1 = v - s1 * nearest_value(v * inv1, top, table)
        sum0 = sum0 + weight * e0 * e0
        sum1 = sum1 + weight * e1 * e1
    return sum0, sum1


@inner
def extreme(tile, span):
    """The weight of largest magnitude, with its sign."""
    low = load(tile[0], span[0])
    high = low
    for e in range(span[0], span[1]):
        v = load(tile[0], e)
        low = smaller(low, v)
        high = larger(high, v)
    return where(high > ZERO - low, high, low)


@inner
def _anchors(shape, i, steps):
    """Where steps i and i + 1 of the fan put the weight of largest magnitude: near the lowest and the highest value."""
    _n_sub, _sub, top, high, _largest, below, above = shape
    more0 = above - (below + above) * np.float32(i) / np.float32(steps - 1)
    more1 = above - (below + above) * np.float32(i + 1) / np.float32(steps - 1)
    return top + more0, high + more1


@inner
def _better_fit(sxc, scc, best, scale, at_cc):
    """What the best is after a fit that has these sums: gain, scale and sum of c * c."""
    s = sxc / scc  # 0 / 0 is no number, so not better
    gain = s * sxc
    better = gain * LEAST > best
    return where(better, gain, best), where(better, s, scale), where(better, scc, at_cc)


@inner
def fit_sub(tile, state, k, shape, table, steps):
    """Real scale of sub-block k and the sum that describes the error around it."""
    _n_sub, sub, top = shape[:3]
    span = (k * sub, k * sub + sub)
    unit = quotient(spread(ONE), extreme(tile, span))
    best = spread(ZERO)
    scale = best
    at_cc = best
    tame = not any_lane(magnitude(unit) > TAME)
    low, high = _anchors(shape, 0, steps)
    inv0, inv1 = unit * (ZERO - low), unit * high
    for i in range(0, steps, 2):  # two at a time: the low anchor and the high one
        inside = tame and max(low, high) <= within(top)
        low, high = _anchors(shape, i + 2, steps)
        next0, next1 = unit * (ZERO - low), unit * high  # now, since the sums are to begin without waiting for them
        if table is None and inside:
            sxc, scc, sxc1, scc1 = sums_of_two(tile[0], tile[1], span, inv0, inv1, top, WHOLE)
        else:
            sxc, scc, sxc1, scc1 = sums_of_two(tile[0], tile[1], span, inv0, inv1, top, table)
        inv0, inv1 = next0, next1
        best, scale, at_cc = _better_fit(sxc, scc, best, scale, at_cc)
        best, scale, at_cc = _better_fit(sxc1, scc1, best, scale, at_cc)
    sxc, scc = sums(tile, span, quotient(spread(ONE), scale), top, table)
    best, scale, at_cc = _better_fit(sxc, scc, best, scale, at_cc)
    store(state[SCALE], k, scale)
    store(state[S_CC], k, at_cc)


@inner
def _place(state, shape, d):
    """Integers for d by the quadratic around each sub-block's fit; returns what they add to the error."""
    n_sub, largest = shape[0], shape[4]
    inv = quotient(spread(ONE), d)
    total = spread(ZERO)
    for k in range(n_sub):
        scale = load(state[SCALE], k)
        ls = clip(nearest(scale * inv), ZERO - largest, largest - ONE)
        off = d * ls - scale
        total = total + off * off * load(state[S_CC], k)
        store(state[LS], k, ls)
    return total


@inner
def _seed(state, shape, units, tries):
    """The best of `tries` d; its integers are left in the state. A lone sub-block has the integer 1."""
    n_sub, largest = shape[0], shape[4]
    if n_sub == 1:
        store(state[LS], 0, spread(ONE))
        return stored(load(state[SCALE], 0), units)
    widest = spread(ZERO)
    for k in range(n_sub):
        scale = load(state[SCALE], k)
        widest = where(larger(scale, ZERO - scale) > larger(widest, ZERO - widest), scale, widest)
    # The widest scale gets integers from -largest up to 5/8 of that.
    step = largest * np.float32(0.375) / np.float32(tries - 1)
    best = spread(np.float32(np.inf))
    d = spread(ZERO)
    for i in range(tries):
        d_i = stored(widest / (step * np.float32(i) - largest), units)
        error = _place(state, shape, d_i)
        better = error < best
        best = where(better, error, best)
        d = where(better, d_i, d)
    _place(state, shape, d)
    return d


@inner
def _measure(tile, state, shape, table, d, row):
    """Errors of all sub-blocks with the integers in a row of the state, into TRIAL; their sum."""
    n_sub, sub, top = shape[0], shape[1], shape[2]
    total = spread(ZERO)
    for k in range(n_sub):
        s = d * load(state[row], k)
        error = errors(tile, (k * sub, k * sub + sub), s, s, top, table)[0]
        store(state[TRIAL], k, error)
        total = total + error
    return total


@inner
def _walk(tile, state, shape, table, d, reach):
    """Move each sub-block's integer to the best of `reach` neighbours; the new sum of errors."""
    n_sub, sub, top, _high, largest, _below, _above = shape
    total = spread(ZERO)
    for k in range(n_sub):
        span = (k * sub, k * sub + sub)
        ls = load(state[LS], k)
        best = load(state[ERROR], k)
        best_ls = ls
        for i in range(0, reach, 2):
            a0 = clip(ls * NEIGHBOURS[i, 0] + NEIGHBOURS[i, 1], ZERO - largest, largest - ONE)
            a1 = clip(ls * NEIGHBOURS[i + 1, 0] + NEIGHBOURS[i + 1, 1], ZERO - largest, largest - ONE)
            e0, e1 = errors(tile, span, d * a0, d * a1, top, table)
            better = e0 < best
            best = where(better, e0, best)
            best_ls = where(better, a0, best_ls)
            better = e1 < best
            best = where(better, e1, best)
            best_ls = where(better, a1, best_ls)
        store(state[LS], k, best_ls)
        store(state[ERROR], k, best)
        total = total + best
    return total


@inner
def _refit(tile, state, shape, table, d):
    """Least-squares d for the present codes and integers."""
    n_sub, sub, top = shape[0], shape[1], shape[2]
    sxc_all = spread(ZERO)
    scc_all = sxc_all
    for k in range(n_sub):
        ls = load(state[LS], k)
        inv = quotient(spread(ONE), d * ls)
        sxc, scc = sums(tile, (k * sub, k * sub + sub), inv, top, table)
        sxc_all = sxc_all + ls * sxc
        scc_all = scc_all + ls * ls * scc
    return quotient(sxc_all, scc_all)


@inner
def _adopt(state, n_sub, better):
    """Where `better`, the errors in TRIAL become the present ones."""
    for k in range(n_sub):
        store(state[ERROR], k, where(better, load(state[TRIAL], k), load(state[ERROR], k)))


@inner
def _round(tile, state, shape, table, units, best, reach):
    """Walk, then refit d if that measures better. best: error, d."""
    total, d = best
    if shape[0] > 1:
        total = _walk(tile, state, shape, table, d, reach)
    d_new = stored(_refit(tile, state, shape, table, d), units)
    trial = _measure(tile, state, shape, table, d_new, LS)
    better = trial < total
    _adopt(state, shape[0], better)
    return where(better, trial, total), where(better, d_new, d)


@inner
def _join_reference(tile, state, shape, table, units, best, manner):
    """Take over the reference's integers and d in the lanes where they measure better."""
    total, d = best
    d_ref = stored(reference.symmetric(tile, state, shape, table, manner), units)
    trial = _measure(tile, state, shape, table, d_ref, REF_LS)
    better = trial < total
    for k in range(shape[0]):
        store(state[LS], k, where(better, load(state[REF_LS], k), load(state[LS], k)))
    _adopt(state, shape[0], better)
    return where(better, trial, total), where(better, d_ref, d)


@inner
def search(tile, units, state, shape, table, effort, manner):
    """Fill row LS of the state and return d in tile units; codes are then the nearest to x / (d * LS).

    tile: float32 [2, width, 16], weights and their importances. shape: (sub-blocks, weights in one, lowest value
    negated, highest value, lowest integer negated, how far the fan goes below and above the
    plain range). table: see `levels`. effort: 0, 1, 2. manner: how the
    reference chooses (see `reference.symmetric`).
    """
    steps, before, after, reach, tries = PLANS[effort]
    for k in range(shape[0]):
        fit_sub(tile, state, k, shape, table, steps)
    d = _seed(state, shape, units, tries)
    total = _measure(tile, state, shape, table, d, LS)
    _adopt(state, shape[0], total >= ZERO)
    best = (total, d)
    for i in range(before + after):
        if i == before and after > 0:
            best = _join_reference(tile, state, shape, table, units, best, manner)
        best = _round(tile, state, shape, table, units, best, reach)
    return best[1]
