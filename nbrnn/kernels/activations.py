"""exp, sigmoid, tanh and softplus on lanes, written as plain equations.

All three exponentials come from one reduction: with n = round(x / log 2) and r = x - n log 2,

    exp(x)     = 2^n (1 + p)                 p = exp(r) - 1 = r + r^2 q(r),  |r| <= log(2) / 2
    sigmoid(x) = 1 / (1 + exp(-x))
    tanh(x)    = e / (e + 2)                 e = exp(2 x) - 1 = 2^n p + (2^n - 1)
    softplus(x) = max(x, 0) + 2 artanh(s)    s = u / (u + 2), u = exp(-|x|)

None of them cancels: tanh keeps its relative accuracy around 0, sigmoid in its tails. q is the Chebyshev interpolant
of (exp(r) - 1 - r) / r^2, which changes p by less than 3e-8 of its value (float32) and 5e-17 (float64).

Largest error, in units in the last place of the correctly rounded value (`tests/test_activations.py` measures it):

              float32   float64   range
    exp         1.5       1.5     everywhere but for results below the normal numbers
    sigmoid     2.5       2.5     x > -87 (float32), x > -708 (float64); constant below
    tanh        3         3       everywhere
    softplus    3         3       everywhere but for results below the normal numbers

NaN gives NaN.
"""

from __future__ import annotations

from numba.core import types
from numba.extending import overload

from nbrnn.kernels.jit import jitable
from nbrnn.kernels.simd import Lanes, by_precision, clip, power_of_two, where_less


def _q_single(r):
    q = r * 0.001392618359 + 0.008363179053
    q = q * r + 0.04166655462
    q = q * r + 0.1666657699
    return q * r + 0.5


def _q_double(r):
    q = r * 2.510038549551031908e-8 + 2.762008844540974816e-7
    q = q * r + 2.755726845999706477e-6
    q = q * r + 0.00002480152129595437513
    q = q * r + 0.0001984126986305361688
    q = q * r + 0.00138888889172137169
    q = q * r + 0.008333333333330061833
    q = q * r + 0.04166666666662412787
    q = q * r + 0.1666666666666666745
    return q * r + 0.5000000000000001022


def _q(r):
    """(exp(r) - 1 - r) / r^2"""
    raise TypeError("callable from compiled code only")


@overload(_q)
def _q_by_precision(r):
    if isinstance(r, Lanes):
        return _q_single if r.dtype == types.float32 else _q_double


@jitable
def _reduce(x):
    """(p, shifted): exp(x) = (1 + p) power_of_two(shifted)."""
    # 1.5 * 2^23 or 2^52: adding it rounds to a whole number, which then stands in the lowest bits
    rounder = by_precision(x, 12582912.0, 6755399441055744.0)
    shifted = x * 1.44269504088896341 + rounder
    n = shifted - rounder
    # log 2 in two parts, the first short enough for n times it to be exact
    r = x - n * by_precision(x, 0.693359375, 0.6931471803691238)
    r = r - n * by_precision(x, -2.12194440054691e-4, 1.9082149292705878161e-10)
    return _q(r) * (r * r) + r, shifted


@jitable
def exp(x):
    p, shifted = _reduce(clip(x, by_precision(x, -104.0, -746.0), by_precision(x, 89.0, 710.0)))
    # 2^n in two factors, since 2^n itself may be beyond the normal numbers
    rounder = by_precision(x, 12582912.0, 6755399441055744.0)
    n = shifted - rounder
    half = n * 0.5 + rounder
    rest = (n - (half - rounder)) + rounder
    return (p + 1.0) * power_of_two(half) * power_of_two(rest)


@jitable
def sigmoid(x):
    # 1 / (1 + e), e = exp(-x) = 2^n (1 + p)
    limit = by_precision(x, 87.0, 708.0)
    p, shifted = _reduce(clip(-x, -limit, limit))
    scale = power_of_two(shifted)
    return 1.0 / ((p * scale + scale) + 1.0)


@jitable
def tanh(x):
    # e / (e + 2), e = exp(2 x) - 1
    limit = by_precision(x, 9.02, 19.07)
    p, shifted = _reduce(clip(x, -limit, limit) * 2.0)
    scale = power_of_two(shifted)
    e = p * scale + (scale - 1.0)
    return e / (e + 2.0)


def _t_single(s2):
    t = s2 * 0.1176470588 + 0.1333333333
    t = t * s2 + 0.1538461538
    t = t * s2 + 0.1818181818
    t = t * s2 + 0.2222222222
    t = t * s2 + 0.2857142857
    t = t * s2 + 0.4
    return t * s2 + 0.6666666667


def _t_double(s2):
    # 2/3 + 2/5 s^2 + 2/7 s^4 + ...
    t = s2 * 0.05128205128205128 + 0.05405405405405406
    t = t * s2 + 0.05714285714285714
    t = t * s2 + 0.06060606060606061
    t = t * s2 + 0.06451612903225806
    t = t * s2 + 0.06896551724137931
    t = t * s2 + 0.07407407407407407
    t = t * s2 + 0.08
    t = t * s2 + 0.08695652173913043
    t = t * s2 + 0.09523809523809523
    t = t * s2 + 0.10526315789473684
    t = t * s2 + 0.11764705882352941
    t = t * s2 + 0.13333333333333333
    t = t * s2 + 0.15384615384615385
    t = t * s2 + 0.18181818181818182
    t = t * s2 + 0.2222222222222222
    t = t * s2 + 0.2857142857142857
    t = t * s2 + 0.4
    return t * s2 + 0.6666666666666666


def _t(s2):
    """(log((1 + s) / (1 - s)) - 2 s) / s^3"""
    raise TypeError("callable from compiled code only")


@overload(_t)
def _t_by_precision(s2):
    if isinstance(s2, Lanes):
        return _t_single if s2.dtype == types.float32 else _t_double


@jitable
def softplus(x):
    # max(x, 0) + log(1 + u), u = exp(-|x|); log(1 + u) = 2 artanh(s), s = u / (2 + u), at most 1/3
    u = exp(where_less(x, 0.0, x, -x))
    s = u / (u + 2.0)
    s2 = s * s
    return where_less(x, 0.0, 0.0, x) + (_t(s2) * s2 * s + 2.0 * s)
