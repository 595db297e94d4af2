"""Pooling over time: from the steps of each sequence to one row, and back.

The steps of sequence b are rows of a matrix [M, I], `lengths[b]` of them from row `starts[b]` on, `step` rows apart:
sequences one behind the other, (T, B, I) and (B, T, I) are all of this kind. Rows that belong to no sequence are
neither read nor written. A sum over time runs in order, from the first step to the last, and the threads divide the
sequences: a row's bits depend on its sequence alone.
"""

from __future__ import annotations

import numpy as np

from nbrnn.kernels.activations import exp, tanh
from nbrnn.kernels.jit import jitable, sharded
from nbrnn.kernels.simd import lane_sum, lanes_of, load, pointer, shift, store, where_less

# ------------------------------------------------------------------ sums


@sharded
def sum_steps(s, shards, x, starts, lengths, step, scales, out):
    """out[b] = scales[b] times the sum of b's steps; x: [M, I], scales: [B], out: [B, I]."""
    I, W = x.shape[1], lanes_of(pointer(x, 0))
    for b in range(len(out) * s // shards, len(out) * (s + 1) // shards):
        total, scale = pointer(out, b * I), scales[b]
        for c in range(0, I, W):
            store(shift(total, c), 0.0, I - c)
        for n in range(lengths[b]):
            row = pointer(x, (starts[b] + n * step) * I)
            for c in range(0, I, W):
                store(shift(total, c), load(shift(total, c), I - c) + load(shift(row, c), I - c), I - c)
        for c in range(0, I, W):
            store(shift(total, c), load(shift(total, c), I - c) * scale, I - c)


@sharded
def spread(s, shards, dy, scales, starts, lengths, step, out):
    """out = scales[b] dy[b] at each of b's steps; dy: [B, I], scales: [B], out: [M, I]."""
    I, W = dy.shape[1], lanes_of(pointer(dy, 0))
    for b in range(len(dy) * s // shards, len(dy) * (s + 1) // shards):
        scale = scales[b]
        for n in range(lengths[b]):
            row = (starts[b] + n * step) * I
            for c in range(0, I, W):
                store(pointer(out, row + c), load(pointer(dy, b * I + c), I - c) * scale, I - c)


# ------------------------------------------------------------------ the largest


@jitable
def _where_nan(x, y, z):
    """y where x is NaN, which is neither below 0 nor above -1, else z."""
    return where_less(x, 0.0, z, where_less(-1.0, x, z, y))


@sharded
def max_steps(s, shards, x, starts, lengths, step, out):
    """out[b] = the largest of b's steps, unit by unit, NaN where one of them is NaN; x: [M, I], out: [B, I]."""
    I, W = x.shape[1], lanes_of(pointer(x, 0))
    for b in range(len(out) * s // shards, len(out) * (s + 1) // shards):
        for c in range(0, I, W):
            first = load(pointer(x, starts[b] * I + c), I - c if lengths[b] else 0)
            store(pointer(out, b * I + c), first, I - c)
        for n in range(1, lengths[b]):
            row = (starts[b] + n * step) * I
            for c in range(0, I, W):
                one, most = load(pointer(x, row + c), I - c), load(pointer(out, b * I + c), I - c)
                store(pointer(out, b * I + c), _where_nan(one, one, where_less(most, one, one, most)), I - c)


@sharded
def max_steps_back(s, shards, x, y, dy, starts, lengths, step, out):
    """out = dy[b] at the first of b's steps where x is y[b], else 0; y, dy: [B, I], x, out: [M, I]."""
    I, W = dy.shape[1], lanes_of(pointer(dy, 0))
    left = np.empty(I, dy.dtype)  # of dy, for the steps to come
    for b in range(len(dy) * s // shards, len(dy) * (s + 1) // shards):
        for c in range(0, I, W):
            store(pointer(left, c), load(pointer(dy, b * I + c), I - c), I - c)
        for n in range(lengths[b]):
            row = (starts[b] + n * step) * I
            for c in range(0, I, W):
                one, most = load(pointer(x, row + c), I - c), load(pointer(y, b * I + c), I - c)
                rest = load(pointer(left, c), I - c)
                # No step exceeds the largest, so that one not below it is it.
                is_most = where_less(one, most, 0.0, _where_nan(most, 0.0, 1.0))
                is_most = _where_nan(one, 1.0, is_most)
                store(pointer(out, row + c), where_less(0.0, is_most, rest, 0.0), I - c)
                store(pointer(left, c), where_less(0.0, is_most, 0.0, rest), I - c)


# ------------------------------------------------------------------ attention
#
# Here the sequences lie one behind the other: b is the rows from offsets[b] to offsets[b + 1].


@sharded
def attend(s, shards, hidden, score, x, offsets, weights, out):
    """The weighted means, out[b] = sum of weights[n] x[n]; weights: the softmax of score . tanh(hidden[n]) over b.

    hidden: [N, H], replaced by its tanh; score: [H]; x: [N, I]; weights: [N]; out: [B, I].
    """
    I, W = x.shape[1], lanes_of(pointer(x, 0))
    for b in range(len(out) * s // shards, len(out) * (s + 1) // shards):
        first, stop, total = offsets[b], offsets[b + 1], pointer(out, b * I)
        for n in range(first, stop):
            weights[n] = _score(hidden, score, n)
        _softmax(weights, first, stop)
        for c in range(0, I, W):
            store(shift(total, c), 0.0, I - c)
        for n in range(first, stop):
            weight, row = weights[n], pointer(x, n * I)
            for c in range(0, I, W):
                before, one = load(shift(total, c), I - c), load(shift(row, c), I - c)
                store(shift(total, c), before + one * weight, I - c)


@jitable
def _score(hidden, score, n):
    """score . tanh(hidden[n]), and the tanh in place."""
    H, W = hidden.shape[1], lanes_of(pointer(hidden, 0))
    total = load(pointer(hidden, 0), 0)
    for c in range(0, H, W):
        one, factor = tanh(load(pointer(hidden, n * H + c), H - c)), load(pointer(score, c), H - c)
        store(pointer(hidden, n * H + c), one, H - c)
        total += one * factor
    return lane_sum(total)


@jitable
def _softmax(a, first, stop):
    """The softmax of a[first:stop], in place."""
    W, most, total = lanes_of(pointer(a, 0)), -np.inf, 0.0
    for n in range(first, stop):
        if a[n] > most:
            most = a[n]
    for n in range(first, stop, W):
        store(pointer(a, n), exp(load(pointer(a, n), stop - n) - most), stop - n)
    for n in range(first, stop):
        total += a[n]
    scale = 1.0 / total
    for n in range(first, stop, W):
        store(pointer(a, n), load(pointer(a, n), stop - n) * scale, stop - n)


@sharded
def attend_back(s, shards, x, weights, offsets, dy, dscores):
    """dscores[n] = weights[n] (g[n] - mean of g over b, weighted), with g[n] = dy[b] . x[n]."""
    I, W = x.shape[1], lanes_of(pointer(x, 0))
    for b in range(len(dy) * s // shards, len(dy) * (s + 1) // shards):
        mean = 0.0
        for n in range(offsets[b], offsets[b + 1]):
            total = load(pointer(x, 0), 0)
            for c in range(0, I, W):
                left, right = load(pointer(dy, b * I + c), I - c), load(pointer(x, n * I + c), I - c)
                total += left * right
            dscores[n] = lane_sum(total)
            mean += dscores[n] * weights[n]
        for n in range(offsets[b], offsets[b + 1]):
            dscores[n] = weights[n] * (dscores[n] - mean)


@sharded
def score_back(s, shards, hidden, score, dscores, dhidden, dscore):
    """dhidden[n] = dscores[n] score (1 - hidden[n]^2), dscore = sum of dscores[n] hidden[n]; hidden: [N, H], the tanh.

    The threads divide the units.
    """
    N, H = hidden.shape
    W = lanes_of(pointer(hidden, 0))
    vectors = (H + W - 1) // W
    start, stop = vectors * s // shards * W, min(H, vectors * (s + 1) // shards * W)
    for c in range(start, stop, W):
        store(pointer(dscore, c), 0.0, H - c)
    for n in range(N):
        d = dscores[n]
        for c in range(start, stop, W):
            one, factor = load(pointer(hidden, n * H + c), H - c), load(pointer(score, c), H - c)
            total = load(pointer(dscore, c), H - c)
            store(pointer(dscore, c), total + one * d, H - c)
            store(pointer(dhidden, n * H + c), (1.0 - one * one) * (factor * d), H - c)


@sharded
def add_weighted(s, shards, dy, weights, offsets, dx):
    """dx[n] += weights[n] dy[b]; dy: [B, I], dx: [N, I]."""
    I, W = dy.shape[1], lanes_of(pointer(dy, 0))
    for b in range(len(dy) * s // shards, len(dy) * (s + 1) // shards):
        for n in range(offsets[b], offsets[b + 1]):
            weight = weights[n]
            for c in range(0, I, W):
                before, one = load(pointer(dx, n * I + c), I - c), load(pointer(dy, b * I + c), I - c)
                store(pointer(dx, n * I + c), before + one * weight, I - c)
