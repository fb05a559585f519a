"""The searches as slow, obvious loops over single weights and candidates, written for reading and not for speed.

Every variable is a column with one float32 per super-block; nothing ever mixes super-blocks. Rounding is numpy's
(rint, float16). Each function returns the integers, the halves and the codes that the kernels must find as well, bit
for bit. Steps: fan per sub-block, d (and dmin) from a grid, rounds of neighbours and least squares, ggml's choice.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

F = np.float32
K = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], F)
NEAR = [(1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0), (2, 2), (-2, -2), (2, 1), (-2, -1), (1, -1), (-1, 1)]
FAR = [(1, 2), (-1, -2), (0, 2), (0, -2), (2, 0), (-2, 0), (3, 3), (-3, -3), (3, 2), (-3, -2), (2, 3), (-2, -3)]
MOVES = [(1, 1), (1, -1), (1, 2), (1, -2), (-1, 0), (-1, 1), (1, 3), (1, -3)]
MOVES += [(-1, -1), (1, 4), (1, -4), (-1, 2), (1, 5), (1, -5)]


def over(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, or 0 where b is 0."""
    return np.where(b == 0, F(0), a / np.where(b == 0, F(1), b)).astype(F)


def clip(v: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.minimum(np.maximum(v, F(low)), F(high))


def total(terms: Iterable[np.ndarray]) -> np.ndarray:
    """A sum in float32, one term after the other."""
    result: np.ndarray = F(0)
    for term in terms:
        result = (result + term).astype(F)
    return result


class Blocks:
    """Super-blocks [n, width] and importances, in the size that the search sees them in."""

    def __init__(self, x: np.ndarray, importance: np.ndarray, sub: int, *, mirrored: bool) -> None:
        top = np.abs(x).max(1)
        self.unit = np.where(top > 0, F(2) ** np.floor(np.log2(np.where(top > 0, top, 1))), 1).astype(F)
        if mirrored:
            self.unit = np.where((x >= 0).all(1), -self.unit, self.unit)
        self.x = [x[:, e] / self.unit for e in range(x.shape[1])]
        self.w = [importance[:, e] for e in range(x.shape[1])]
        self.subs = [range(a, a + sub) for a in range(0, x.shape[1], sub)]
        self.sub = sub

    def half(self, v: np.ndarray) -> np.ndarray:
        """v as half precision at the true size; what is not zero does not become zero."""
        true = (v * self.unit).astype(F)
        with np.errstate(over="ignore"):
            half = true.astype(np.float16)
        least = np.copysign(np.float16(2.0**-24), true).astype(np.float16)
        return np.where((true != 0) & (half == 0), least, half).astype(F) / self.unit


# --- w = d * s * q - dmin * m ---


def best_of_fan(b, k, top, reach, steps):  # type: ignore[no-untyped-def]
    x, w = b.x, b.w
    low = np.minimum.reduce([x[e] for e in b.subs[k]] + [np.zeros_like(x[0])])
    high = np.maximum.reduce([x[e] for e in b.subs[k]])
    sw, sx = total(w[e] for e in b.subs[k]), total(w[e] * x[e] for e in b.subs[k])
    unit = over(np.ones_like(high), high - low)
    s, m = np.zeros_like(high), np.minimum(over(sx, sw), 0)
    gain, sq, sqq = m * sx, np.zeros_like(s), np.zeros_like(s)
    for i in range(steps + 1):
        if i < steps:
            inv = unit * (F(top) - F(reach) + (F(reach) + F(0.8)) * F(i) / F(steps - 1))
            shift = low * inv if i % 2 == 0 else high * inv - F(top)
            q = {e: clip(np.rint(x[e] * inv - shift), 0, top) for e in b.subs[k]}
        else:
            q = codes(b, k, s, m, top)
        s1, m1, sums = line(b, k, q, sx, sw)
        gain1 = s1 * sums[2] + m1 * sx
        better = gain1 > gain
        s, m, gain = np.where(better, s1, s), np.where(better, m1, m), np.where(better, gain1, gain)
        sq, sqq = np.where(better, sums[0], sq), np.where(better, sums[1], sqq)
    return s, m, sq, sqq, sx, sw


def codes(b, k, s, m, top):  # type: ignore[no-untyped-def]
    inv = over(np.ones_like(s), s)
    return {e: clip(np.rint((b.x[e] - m) * inv), 0, top) for e in b.subs[k]}


def line(b, k, q, sx, sw):  # type: ignore[no-untyped-def]
    """Least squares of scale and offset (not above 0) for codes q."""
    sq, sqq = total(b.w[e] * q[e] for e in b.subs[k]), total(b.w[e] * q[e] * q[e] for e in b.subs[k])
    sxq = total(b.w[e] * q[e] * b.x[e] for e in b.subs[k])
    det = sw * sqq - sq * sq
    m = over(sqq * sx - sq * sxq, det)
    sound = (det > sw * sqq * F(1e-5)) & (m <= 0)
    s = np.where(sound, over(sw * sxq - sx * sq, det), over(sxq, sqq))
    return s, np.where(sound, m, F(0)), (sq, sqq, sxq)


def cost(b, k, s, m, top):  # type: ignore[no-untyped-def]
    q = codes(b, k, s, m, top)
    errors = {e: (b.x[e] - m) - s * q[e] for e in b.subs[k]}
    return total(b.w[e] * errors[e] * errors[e] for e in b.subs[k])


def integers_near(fits, d, dmin, largest):  # type: ignore[no-untyped-def]
    ls, lm, error = [], [], []
    for s, m, sq, sqq, _sx, sw in fits:
        ls.append(clip(np.rint(s * over(np.ones_like(d), d)), 0, largest))
        ds = d * ls[-1] - s
        lm.append(clip(np.rint((over(ds * sq, sw) - m) * over(np.ones_like(d), dmin)), 0, largest))
        dm = F(0) - dmin * lm[-1] - m
        error.append(ds * ds * sqq + dm * dm * sw + ds * dm * sq * F(2))
    return ls, lm, total(error)


def asymmetric(x, importance, *, sub, top, largest, reach, effort):  # type: ignore[no-untyped-def]
    """d, dmin, s, m, q of super-blocks [n, 256], without ggml's choice."""
    steps, rounds, moves, tries = ((8, 1, 6, 5), (12, 1, 8, 9), (48, 6, 24, 17))[effort]
    b = Blocks(x, importance, sub, mirrored=True)
    fits = [best_of_fan(b, k, top, reach, steps) for k in range(len(b.subs))]
    widest = np.maximum.reduce([fit[0] for fit in fits] + [np.zeros_like(fits[0][0])])
    deepest = np.maximum.reduce([-fit[1] for fit in fits] + [np.zeros_like(fits[0][0])])
    step = F(largest) / F(63) * F(8) / F(tries - 1)
    d = dmin = np.zeros_like(widest)
    least = np.full_like(widest, np.inf)
    for i in range(tries):
        for j in range(tries):
            d1 = b.half(widest / (F(largest) + F(1) - step * F(i)))
            dmin1 = b.half(deepest / (F(largest) + F(1) - step * F(j)))
            error = integers_near(fits, d1, dmin1, largest)[2]
            better = error < least
            d, dmin = np.where(better, d1, d), np.where(better, dmin1, dmin)
            least = np.where(better, error, least)
    ls, lm, _ = integers_near(fits, d, dmin, largest)
    for _ in range(rounds):
        errors = [cost(b, k, d * ls[k], F(0) - dmin * lm[k], top) for k in range(len(b.subs))]
        for k in range(len(b.subs)):
            s0, m0 = ls[k], lm[k]
            for step_s, step_m in (NEAR + FAR)[:moves]:
                s1, m1 = clip(s0 + F(step_s), 0, largest), clip(m0 + F(step_m), 0, largest)
                error = cost(b, k, d * s1, F(0) - dmin * m1, top)
                better = error < errors[k]
                ls[k], lm[k] = np.where(better, s1, ls[k]), np.where(better, m1, lm[k])
                errors[k] = np.where(better, error, errors[k])
        d1, dmin1 = refit_pair(b, fits, ls, lm, d, dmin, top)
        again = total(cost(b, k, d1 * ls[k], F(0) - dmin1 * lm[k], top) for k in range(len(b.subs)))
        better = again < total(errors)
        d, dmin = np.where(better, d1, d), np.where(better, dmin1, dmin)
    q = [codes(b, k, d * ls[k], F(0) - dmin * lm[k], top) for k in range(len(b.subs))]
    flat = np.stack([q[k][e] for k in range(len(b.subs)) for e in b.subs[k]], 1)
    return d * b.unit, dmin * b.unit, np.stack(ls, 1), np.stack(lm, 1), flat


def refit_pair(b, fits, ls, lm, d, dmin, top):  # type: ignore[no-untyped-def]
    a11, a12, a22, b1, b2 = [], [], [], [], []
    for k, (_s, _m, _sq, _sqq, sx, sw) in enumerate(fits):
        q = codes(b, k, d * ls[k], F(0) - dmin * lm[k], top)
        _, _, (sq, sqq, sxq) = line(b, k, q, sx, sw)
        a11.append(ls[k] * ls[k] * sqq)
        a12.append(-(ls[k] * lm[k] * sq))
        a22.append(lm[k] * lm[k] * sw)
        b1.append(ls[k] * sxq)
        b2.append(-(lm[k] * sx))
    a11, a12, a22, b1, b2 = map(total, (a11, a12, a22, b1, b2))
    det = a11 * a22 - a12 * a12
    sound = det > a11 * a22 * F(1e-5)
    d1, dmin1 = over(a22 * b1 - a12 * b2, det), over(a11 * b2 - a12 * b1, det)
    return b.half(np.where(sound, d1, d)), b.half(np.where(sound, dmin1, dmin))


# --- w = d * s * c(q) ---


def value(v, low, table):  # type: ignore[no-untyped-def]
    """Nearest value; between two of the table the larger."""
    if not table:
        return clip(np.rint(v), -low, low - 1)
    return K[np.searchsorted((K[1:] + K[:-1]) / 2, v, side="right")]


def signed_sums(b, k, inv, low, table):  # type: ignore[no-untyped-def]
    c = {e: value(b.x[e] * inv, low, table) for e in b.subs[k]}
    return total(b.w[e] * c[e] * b.x[e] for e in b.subs[k]), total(b.w[e] * c[e] * c[e] for e in b.subs[k])


def signed_cost(b, k, s, low, table):  # type: ignore[no-untyped-def]
    inv = over(np.ones_like(s), s)
    errors = {e: b.x[e] - s * value(b.x[e] * inv, low, table) for e in b.subs[k]}
    return total(b.w[e] * errors[e] * errors[e] for e in b.subs[k])


def signed_fan(b, k, low, high, below, above, steps, table):  # type: ignore[no-untyped-def]
    """The best of a fan of real scales, and the curve of the error around it."""
    smallest = np.minimum.reduce([b.x[e] for e in b.subs[k]])
    greatest = np.maximum.reduce([b.x[e] for e in b.subs[k]])
    unit = over(np.ones_like(greatest), np.where(greatest > -smallest, greatest, smallest))
    s = gain = curve = np.zeros_like(unit)
    for i in range(steps + 1):
        more = F(above) - (F(below) + F(above)) * F(i) / F(steps - 1)
        inv = unit * ((-F(low) - more) if i % 2 == 0 else (F(high) + more))
        sxc, scc = signed_sums(b, k, inv if i < steps else over(np.ones_like(s), s), low, table)
        s1 = over(sxc, scc)
        better = s1 * sxc * F(1 - 2.0**-22) > gain
        s, gain, curve = np.where(better, s1, s), np.where(better, s1 * sxc, gain), np.where(better, scc, curve)
    return s, curve


def symmetric(x, importance, *, sub, low, high, largest, below, above, effort):  # type: ignore[no-untyped-def]
    """d, s and values c of super-blocks [n, width], without ggml's choice; low 127 means the table."""
    steps, rounds, moves, tries = ((10, 1, 2, 9), (12, 1, 2, 17), (64, 6, 14, 65))[effort]
    b, table = Blocks(x, importance, sub, mirrored=False), low == 127
    fits = [signed_fan(b, k, low, high, below, above, steps, table) for k in range(len(b.subs))]
    d, ls = signed_seed(b, fits, largest, tries)
    for _ in range(rounds):
        errors = [signed_cost(b, k, d * ls[k], low, table) for k in range(len(b.subs))]
        for k in range(len(b.subs) if len(b.subs) > 1 else 0):
            s0 = ls[k]
            for factor, step in MOVES[:moves]:
                s1 = clip(s0 * F(factor) + F(step), -largest, largest - 1)
                error = signed_cost(b, k, d * s1, low, table)
                better = error < errors[k]
                ls[k], errors[k] = np.where(better, s1, ls[k]), np.where(better, error, errors[k])
        sums = [signed_sums(b, k, over(np.ones_like(d), d * ls[k]), low, table) for k in range(len(b.subs))]
        d1 = b.half(
            over(
                total(ls[k] * sums[k][0] for k in range(len(b.subs))),
                total(ls[k] * ls[k] * sums[k][1] for k in range(len(b.subs))),
            )
        )
        again = total(signed_cost(b, k, d1 * ls[k], low, table) for k in range(len(b.subs)))
        d = np.where(again < total(errors), d1, d)
    found = []
    for k in range(len(b.subs)):
        inv = over(np.ones_like(d), d * ls[k])
        found += [value(b.x[e] * inv, low, table) for e in b.subs[k]]
    return d * b.unit, np.stack(ls, 1), np.stack(found, 1)


def signed_seed(b, fits, largest, tries):  # type: ignore[no-untyped-def]
    if len(fits) == 1:
        return b.half(fits[0][0]), [np.ones_like(fits[0][0])]
    widest = np.zeros_like(fits[0][0])
    for s, _ in fits:
        widest = np.where(np.abs(s) > np.abs(widest), s, widest)
    d, least = np.zeros_like(widest), np.full_like(widest, np.inf)

    def near(d):  # type: ignore[no-untyped-def]
        inv = over(np.ones_like(d), d)
        ls = [clip(np.rint(s * inv), -largest, largest - 1) for s, _ in fits]
        offs = [d * integer - s for integer, (s, _) in zip(ls, fits, strict=True)]
        return ls, total(off * off * curve for off, (_, curve) in zip(offs, fits, strict=True))

    step = F(largest) * F(0.375) / F(tries - 1)
    for i in range(tries):
        d1 = b.half(widest / (step * F(i) - F(largest)))
        error = near(d1)[1]
        better = error < least
        d, least = np.where(better, d1, d), np.where(better, error, least)
    return d, near(d)[0]


# --- lone blocks: w = d * q or w = d * q + m ---


def lone(x, form, *, best):  # type: ignore[no-untyped-def]
    """d, m, q of blocks [n, 32] without an imatrix, ggml's plain rounding among the choices."""
    steps, rounds = (64, 4) if best else (8, 1)
    ones = np.ones_like(x)
    return lone_scale(x, ones, form, steps, rounds) if len(form) == 3 else lone_line(x, ones, form, steps, rounds)


def lone_scale(x, ones, form, steps, rounds):  # type: ignore[no-untyped-def]
    low, below, above = form
    b = Blocks(x, ones, 32, mirrored=False)
    d = b.half(signed_fan(b, 0, low, low - 1, below, above, steps, False)[0])
    first = np.abs(x).argmax(1)
    plain = b.half((x[np.arange(len(x)), first] / b.unit) / F(-low))
    error, trial = signed_cost(b, 0, d, low, False), signed_cost(b, 0, plain, low, False)
    d, error = np.where(trial < error, plain, d), np.minimum(trial, error)
    for _ in range(rounds):
        d1 = b.half(over(*signed_sums(b, 0, over(np.ones_like(d), d), low, False)))
        trial = signed_cost(b, 0, d1, low, False)
        d, error = np.where(trial < error, d1, d), np.minimum(trial, error)
    inv = over(np.ones_like(d), d)
    return d * b.unit, np.zeros_like(d), np.stack([value(b.x[e] * inv, low, False) for e in range(32)], 1)


def lone_line(x, ones, form, steps, rounds):  # type: ignore[no-untyped-def]
    top, reach = form
    b = Blocks(x, ones, 32, mirrored=True)
    s, m, _sq, _sqq, sx, sw = best_of_fan(b, 0, top, reach, steps)
    d, m = b.half(s), b.half(m)
    size = np.abs(b.unit)
    plain, bottom = (x.max(1) / size - x.min(1) / size) / F(top), x.min(1) / size
    plain, bottom = (b.half(v * np.sign(b.unit)) for v in (plain, bottom))
    error, trial = cost(b, 0, d, m, top), cost(b, 0, plain, bottom, top)
    better = trial < error
    d, m, error = np.where(better, plain, d), np.where(better, bottom, m), np.minimum(trial, error)
    for _ in range(rounds):
        s1, m1, _ = line(b, 0, codes(b, 0, d, m, top), sx, sw)
        d1, m1 = b.half(s1), b.half(m1)
        trial = cost(b, 0, d1, m1, top)
        better = trial < error
        d, m, error = np.where(better, d1, d), np.where(better, m1, m), np.minimum(trial, error)
    q = codes(b, 0, d, m, top)
    return d * b.unit, m * b.unit, np.stack([q[e] for e in range(32)], 1)
