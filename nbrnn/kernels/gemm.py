"""Products of whole matrices: packing, rows by panels, and the transposed products of weight gradients.

A weight matrix is packed into panels ``[J, K, P]`` (panel, depth, column; P = `PANEL` columns or a cell's own width)
once, and every product then streams them in order. `order` maps a panel's columns (or its depth) to rows of the
weight matrix as torch lays it out; -1 stands for a column of zeros that only fills a vector.

All entries divide their work so that no sum depends on the number of shards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nbrnn.kernels import amx
from nbrnn.kernels.constants import Constants
from nbrnn.kernels.jit import Kernel, jitable, sharded
from nbrnn.kernels.memory import aligned
from nbrnn.kernels.simd import (
    accumulate_many,
    lanes_of,
    load,
    load_many,
    load_transposed,
    pointer,
    shift,
    store,
    store_first,
    store_many,
)
from nbrnn.kernels.tiles import VECTORS, outer, panel_width, prefetch, product

FACTORS = np.random.default_rng(0).integers(2**64, size=2048, dtype=np.uint64) | np.uint64(1)  # of fingerprints
ROWS = 48  # rows that share a pass over a panel: a whole number of tiles of 4, 6 or 8
PIECE, GROUP = 1 << 16, 3 << 16  # numbers of a panel, and of several, that stay in the second cache for all rows
DEPTH = 128  # steps of depth for which a block of both factors stays in the nearest cache
COPY, SUM = 40, 50  # what it takes to copy a number, and to sum it as well, in multiplications and additions
PAIR = VECTORS // 2
LARGE, SPAN = 1 << 19, 32  # numbers of a gradient that is too large for the second cache, panels that are not


def panels(columns: int, dtype: object) -> int:
    """The number of panels of a plain matrix with so many columns."""
    return -(-columns // panel_width(VECTORS, dtype))


def padded(columns: int, dtype: object) -> int:
    """`columns` rounded up to whole panels."""
    return panels(columns, dtype) * panel_width(VECTORS, dtype)


def plain_order(count: int, dtype: object) -> np.ndarray:
    """The order of a plain matrix: its own, filled up with -1."""
    order = np.full(padded(count, dtype), -1)
    order[:count] = np.arange(count)
    return order


def runs_of(
    rows: int,
    dtype: object,
    first_rows: tuple[int, int] = (0, -1),
    column: int = 0,
    piece: int = 0,
    step: int = 0,
) -> np.ndarray:
    """Divide consecutive rows of one or two weights into runs of at most a panel: (column, count, row, row) each.

    The gradient of the rows stands in columns of dy: from `column` on where `piece` is 0, else in pieces of `piece`
    columns that lie `step` apart. first_rows: where the rows begin in both weights, -1: that one has none of them.
    """
    P = panel_width(VECTORS, dtype)
    starts = np.arange(0, rows, P)
    columns = starts // piece * step if piece else starts
    places = (first + starts if first >= 0 else np.full_like(starts, -1) for first in first_rows)
    return np.stack([column + columns, np.minimum(P, rows - starts), *places], axis=1)


# ------------------------------------------------------------------ packing


@sharded
def pack_rows(s, shards, weight, order, out):
    """out[j, k, c] = weight[order[j P + c], k]: panels for ``x @ weight.T``.

    weight: [R, K]; order: [J P]; out: [J, K, P].
    """
    J, K, P = out.shape
    W = lanes_of(pointer(out, 0))
    for j in range(J * s // shards, J * (s + 1) // shards):
        for c in range(0, P, W):
            # A few whole rows at a time: parts of many would not come from far memory in time
            for k in range(0, K, W):
                block = load_transposed(pointer(weight, k), pointer(order, j * P + c), K, K - k)
                store_first(pointer(out, (j * K + k) * P + c), P, block, K - k, W)


@sharded
def pack_columns(s, shards, weight, order, out):
    """out[j, k, c] = weight[order[k], j P + c]: panels for ``dy @ weight``.

    weight: [R, N]; order: [K]; out: [J, K, P] with J P >= N, filled up with zeros.
    """
    J, K, P = out.shape
    N, W = weight.shape[1], lanes_of(pointer(out, 0))
    # Whole rows, one after the other: a part of each would not come from far memory in time
    for k in range(K * s // shards, K * (s + 1) // shards):
        row = order[k]
        for n in range(0, J * P, W):
            value = load(pointer(weight, max(row, 0) * N + n), N - n if row >= 0 else 0)
            store(pointer(out, (n // P * K + k) * P + n % P), value, W)


@jitable
def pack_bias(s, shards, bias, order, first, out):
    """Add biases to the slots of panels from column `first` on; order: as in `pack_rows`; out: [J, P]."""
    J = len(out)
    columns = len(order) // J
    for j in range(J * s // shards, J * (s + 1) // shards):
        for c in range(columns):
            row = order[j * columns + c]
            if row >= 0:
                out[j, first + c] += bias[row]


@sharded
def pack_layer(
    s, shards, w_ih, order_ih, out_ih, w_hh, order_hh, out_hh, order_mid, out_mid, bias_ih, bias_hh, first, stop, bias
):
    """`pack_rows` of all that a layer's step multiplies with, and its biases, in one region.

    first, stop: columns where the recurrent and the second product's slots begin; bias_ih, bias_hh: empty for none;
    bias: [J, P].
    """
    J = len(bias)
    bias[J * s // shards : J * (s + 1) // shards] = 0.0
    pack_rows(s, shards, w_ih, order_ih, out_ih)
    pack_rows(s, shards, w_hh, order_hh, out_hh)
    pack_rows(s, shards, w_hh, order_mid, out_mid)
    if len(bias_ih):
        pack_bias(s, shards, bias_ih, order_ih, 0, bias)
    if len(bias_hh):
        pack_bias(s, shards, bias_hh, order_hh, first, bias)
        pack_bias(s, shards, bias_hh, order_mid, stop, bias)


@sharded
def pack_layer_back(s, shards, w_hh, order_hh, out_hh, order_mid, out_mid, w_ih, order_ih, out_ih):
    """`pack_columns` of all that a layer's step back multiplies with, in one region."""
    pack_columns(s, shards, w_hh, order_hh, out_hh)
    pack_columns(s, shards, w_hh, order_mid, out_mid)
    pack_columns(s, shards, w_ih, order_ih, out_ih)


@sharded
def take_rows(s, shards, x, rows, out):
    """out[n] = x[rows[n]], zeros where that is negative; x: [M, N], of floats."""
    N, W = x.shape[1], lanes_of(pointer(out, 0))
    for n in range(len(rows) * s // shards, len(rows) * (s + 1) // shards):
        row = rows[n]
        for c in range(0, N, W):
            store(pointer(out, n * N + c), load(pointer(x, max(row, 0) * N + c), N - c if row >= 0 else 0), N - c)


@sharded
def sum_rows(s, shards, dy, tokens, out):
    """out[n] = the sum, in their order, of the rows of dy whose token is n; dy: [M, N], tokens: [M], out: [V, N]."""
    V, N = out.shape
    W, lo, hi = lanes_of(pointer(out, 0)), V * s // shards, V * (s + 1) // shards
    out[lo:hi] = 0.0
    for m in range(len(tokens)):
        if lo <= tokens[m] < hi:
            row = pointer(out, tokens[m] * N)
            for c in range(0, N, W):
                store(shift(row, c), load(shift(row, c), N - c) + load(pointer(dy, m * N + c), N - c), N - c)


# ------------------------------------------------------------------ rows by panels


@sharded
def multiply(s, shards, kernel, a, first, step, depth, packed, start, out):
    """out = start + a @ packed.

    kernel: `product_kernel` of the panels; a: [M, lda], of which the columns that count are `depth` long pieces,
    `step` apart, from column `first` on;
    packed: [J, K, P], K a whole number of pieces; start: [J P], a row added to every row; out: [M, N].
    """
    M, (J, K, P) = len(a), packed.shape
    lo, hi, j0, j1 = 0, M, 0, J
    if M >= 8 * shards:
        lo, hi = M * s // shards, M * (s + 1) // shards
    else:
        j0, j1 = J * s // shards, J * (s + 1) // shards
    # Pieces that are taken at once, the part of each, and panels that are taken at once
    pieces, part = max(1, PIECE // (P * max(1, depth))), min(depth, PIECE // P)
    group = max(1, GROUP // (P * max(1, min(K, pieces * part))))
    for n0 in range(0, K // depth, pieces):
        n1 = min(n0 + pieces, K // depth)
        for k0 in range(0, depth, part):
            k1 = min(k0 + part, depth)
            for g0 in range(j0, j1, group):
                here = n0, n1, k0, k1, g0, min(g0 + group, j1)
                for row in range(lo, hi, ROWS):
                    _multiply_block(kernel, a, first, step, depth, packed, start, out, row, min(ROWS, hi - row), here)


@jitable
def _multiply_block(kernel, a, first, step, depth, packed, start, out, row, rows, here):
    """Some rows of `multiply` by the part from k0 to k1 of some pieces of some panels."""
    (n0, n1, k0, k1, g0, g1), (_, K, P), lda, N = here, packed.shape, a.shape[1], out.shape[1]
    for j in range(g0, g1):
        c, columns = pointer(out, row * N + j * P), min(P, N - j * P)
        for n in range(n0, n1):
            left = pointer(a, row * lda + first + n * step + k0)
            b = pointer(packed, (j * K + n * depth + k0) * P)
            before, ld = (pointer(start, j * P), 0) if n == 0 and k0 == 0 else (c, N)
            product(kernel, left, lda, b, k1 - k0, before, ld, c, N, rows, columns, shift(b, K * P))


# ------------------------------------------------------------------ weight gradients
#
# dy: [M, ldy]; runs: [n, 4] and pieces as in `runs_of`. The gradients of one or two matrices are taken at once, since
# dy comes from far memory. What a kernel is given for each matrix:
#
#     x, offset, ldx, rows    rows of N numbers, `ldx` apart, from element `offset` of an array on; rows: [M], which of
#                             them stand beside the rows of dy, empty: the first M
#     dw, db                  [R, N] and [R]; N = 0: there is no such matrix
#
# and what it makes of that, a `side`: x from its first element on, ldx, rows, N, dw, db.
#
# Only the rows of the runs are written; to what stands there the sums are added where `add` says so. Sums begin with
# the last row: a sequence that is taken piece by piece, from its end, gives the same bits as a whole one. The first
# `blank` rows of the first matrix's x are zeros, which are left out.


@dataclass(frozen=True)
class Factors(Constants):
    """How a weight gradient is multiplied; `half_gemm` has another way.

    Parameters
    ----------
    name : str
    narrow : int
        1 if the factors are rounded.
    depth : int
        Rows of dy for which a block of both factors stays in the nearest cache.
    room : callable
        ``room(dy, blocks, span)``: memory for a block of dy, and for `span` times `blocks` panels of x; a row of zeros.
    left, right : callable
        What `_gather` and `_gather_panels` do.
    add : callable
        ``add(kernel, left, block, n, depth, start, ld, c, N, count, columns)``: a tile of dw is start plus the product
        of a block of dy with the panel of x that begins with column n.
    """

    name: str
    narrow: int
    depth: int
    room: Callable
    left: Callable
    right: Callable
    add: Callable


def alone(dtype: object) -> tuple:
    """The second side where there is one matrix."""
    return np.empty(0, dtype), 0, 0, np.empty(0, np.int64), np.empty((0, 0), dtype), np.empty(0, dtype)


@jitable
def gradient_by(
    s, shards, factors, kernel, dy, runs, piece, step, add, blank, x, offset, ldx, rows, dw, db, x2, offset2, ldx2,
    rows2, dw2, db2,
):  # fmt: skip
    """dw = dy.T @ x and db = the sum of dy's rows, for two sides; kernel: `outer_kernel`, or the factors' own."""
    side = pointer(x, offset), ldx, rows, dw.shape[1], dw, db
    sides, order = (side, (pointer(x2, offset2), ldx2, rows2, dw2.shape[1], dw2, db2)), np.empty(0, np.int64)
    share = _share(s, shards, dy, runs, sides)
    _gradient(factors, kernel, dy, order, len(dy), runs, piece, step, add, blank, sides, share, None)


@jitable
def _gradient(factors, kernel, dy, order, M, runs, piece, step, add, blank, sides, share, words):
    """A shard's share of the gradients of both sides from the first M rows of dy, or from those in `order`; words: the
    tokens of the second side, the first one of them, and their sums, or None."""
    span = _span(dy, sides)
    scratch = factors.room(dy, _panels_of(dy, share), span)
    if factors.narrow:
        amx.begin()
    for k in range(0, max(1, M), factors.depth * span):
        _gradient_block(factors, kernel, dy, order, M, k, runs, piece, step, add, blank, sides, share, scratch, words)
    if factors.narrow:
        amx.end()


@sharded
def gradient_in_halves(
    s, shards, kernel, dy, runs, piece, step, add, blank, x, offset, ldx, x2, offset2, ldx2, order, dw, db, dw2, db2,
    order_b, dw_b, db_b, dw2_b, db2_b,
):  # fmt: skip
    """`gradient` of two matrices, apart for the rows in `order` and for those in `order_b`.

    Half of the threads take one, half of them the other: the rows that they had in the scan, which stand in their own
    caches.
    """
    for half in range(2):
        first, last = (half * shards // 2, (half + 1) * shards // 2) if shards > 1 else (0, 1)
        if first <= s < last:
            rows = order if half == 0 else order_b
            side = pointer(x, offset), ldx, rows, dw.shape[1], dw if half == 0 else dw_b, db if half == 0 else db_b
            side2 = dw2 if half == 0 else dw2_b, db2 if half == 0 else db2_b
            sides = side, (pointer(x2, offset2), ldx2, rows, dw2.shape[1], *side2)
            M, none = len(rows), blank * len(rows) // max(1, len(dy))
            share = _share(s - first, last - first, dy, runs, sides)
            _gradient(WHOLE, kernel, dy, rows, M, runs, piece, step, add, none, sides, share, None)


@sharded
def gradient_with_tokens(
    s, shards, kernel, dy, runs, piece, step, add, blank, x, offset, ldx, rows, tokens, first, dw, db, token_dw,
    token_db,
):  # fmt: skip
    """`gradient` of two matrices, where x of the second one holds the one-hot rows of `tokens`.

    tokens: integers in [0, N), M of them from element `first` on.
    """
    sides = (pointer(x, offset), ldx, rows, dw.shape[1], dw, db), (pointer(x, 0), 0, rows, 0, token_dw, token_db)
    share, order = _share(s, shards, dy, runs, sides), np.empty(0, np.int64)
    sums = _token_sums(dy, runs, share, add, token_dw)
    words = tokens, first, sums
    _gradient(WHOLE, kernel, dy, order, len(dy), runs, piece, step, add, blank, sides, share, words)
    _token_end(runs, share, sums, token_dw)


@jitable
def _scratch(dy, blocks, span):
    """Room for a block of dy, and for `span` blocks of x in panels: [DEPTH, P] and [span, blocks, DEPTH, P]; zeros."""
    P = VECTORS * lanes_of(pointer(dy, 0))
    right, zeros = aligned(span * blocks * DEPTH * P, dy).reshape(span, blocks, DEPTH, P), aligned(P, dy)
    clear(pointer(zeros, 0), P)
    return aligned(DEPTH * P, dy).reshape(DEPTH, P), right, zeros


@jitable
def _span(dy, sides):
    """Blocks of rows that one part of the gradients takes before the next does, where all are too large for the second
    cache."""
    (_, _, _, N, dw, _), (_, _, _, N2, dw2, _) = sides
    P = VECTORS * lanes_of(pointer(dy, 0))
    return 1 if len(dw) * N + len(dw2) * N2 <= LARGE else max(1, SPAN * P // (N + N2))


@jitable
def _share(s, shards, dy, runs, sides):
    """What one shard computes: its runs, from `first` to `last`; its first column of each side and how many; and of how
    many shards with the same runs it is which: these take turns in summing the rows of dy.
    """
    W, N, N2 = lanes_of(pointer(dy, 0)), sides[0][3], sides[1][3]
    n, m = (N + W - 1) // W, (N2 + W - 1) // W
    parts = _parts(shards, len(runs), n + m, W)
    part, others = s % parts, shards // parts
    first, last = _first_run(runs, N, N2, s // parts, others), _first_run(runs, N, N2, s // parts + 1, others)
    lo, hi = (n + m) * part // parts * W, (n + m) * (part + 1) // parts * W
    return first, last, (_columns(N, lo, hi), _columns(N2, lo - n * W, hi - n * W)), (part, parts)


@jitable
def _parts(shards, runs, length, W):
    """In how many parts the vectors of a row of dw are divided, while the runs are divided into as many as make one for
    each shard, so that the slowest takes least: it copies its columns of dy and of x.
    """
    parts, least = 1, -1
    for n in range(1, shards + 1):
        if shards % n == 0:
            rows, columns = (runs * n + shards - 1) // shards * VECTORS, (length + n - 1) // n
            cost = rows * columns * W + SUM * rows + COPY * columns
            if least < 0 or cost < least:
                parts, least = n, cost
    return parts


@jitable
def _first_run(runs, N, N2, part, parts):
    """Where the runs of one of several parts begin, which take about as long each."""
    total = 0
    for n in range(len(runs)):
        total += _cost_of(runs, n, N, N2)
    here = 0
    for n in range(len(runs)):
        cost = _cost_of(runs, n, N, N2)
        if (here + cost // 2) * parts >= total * part:
            return n
        here += cost
    return len(runs)


@jitable
def _cost_of(runs, n, N, N2):
    return runs[n, 1] * (SUM + (N if runs[n, 2] >= 0 else 0) + (N2 if runs[n, 3] >= 0 else 0))


@jitable
def _columns(N, lo, hi):
    """The columns from lo to hi, as far as a side has such: the first one, and how many."""
    first, last = min(max(lo, 0), N), min(max(hi, 0), N)
    return first, last - first


@jitable
def _panels_of(dy, share):
    """Panels of a shard's columns of x."""
    ((_, count), (_, count2)), P = share[2], VECTORS * lanes_of(pointer(dy, 0))
    return (count + P - 1) // P + (count2 + P - 1) // P


@jitable
def _gradient_block(factors, kernel, dy, order, M, k, runs, piece, step, add, blank, sides, share, scratch, words):
    """Add what some blocks of the M rows of dy give, k before the end."""
    (first, last, parts, turns), (left, right, zeros) = share, scratch
    P, DEPTH = VECTORS * lanes_of(pointer(dy, 0)), factors.depth
    piece, step = (P, P) if piece == 0 else (piece, step)
    stop = min(M, k + DEPTH * len(right))
    for k0 in range(k, stop if first < last else k, DEPTH):
        depth, block, behind = min(DEPTH, stop - k0), right[(k0 - k) // DEPTH], 0
        for (x, ldx, rows, _, _, _), (column, count), none in zip(sides, parts, (blank, 0)):
            there = max(0, min(depth, M - none - k0))
            factors.right(shift(x, column), ldx, rows, M - k0, there, count, block, behind)
            behind += (count + P - 1) // P * P
    for run in range(first, last):
        column, count, row, row2 = runs[run]
        db, at = (sides[0][5], row) if row >= 0 else (sides[1][5], row2)
        sums = _sums_here(run - first, turns)
        if sums and k == 0 and not add:
            clear(pointer(db, at), count)
        for k0 in range(k, max(stop, k + 1), DEPTH):
            depth, block, behind = min(DEPTH, stop - k0), right[(k0 - k) // DEPTH], 0
            factors.left(dy, order, M - k0, depth, column, count, piece, step, left, db, at, sums)
            if words is not None and sums and row2 >= 0:
                _add_tokens(left, M - k0, depth, words, run - first, turns)
            fresh = k0 == 0 and not add
            for side, part, row_of, none in zip(sides, parts, (row, row2), (blank, 0)):
                if row_of >= 0:
                    there = max(0, min(depth, M - none - k0))
                    _add_side(factors, kernel, left, block, behind, P, there, zeros, fresh, side, part, row_of, count)
                behind += (part[1] + P - 1) // P * P
        if sums and row >= 0 and row2 >= 0:
            for n in range(count):
                sides[1][5][row2 + n] = db[row + n]


@jitable
def _add_side(factors, kernel, left, block, behind, P, depth, zeros, fresh, side, part, row, count):
    """Add a block's product to the rows of a run, or to zeros."""
    (_, _, _, N, dw, _), (first, columns) = side, part
    for n in range(0, columns, P):
        c = pointer(dw, row * N + first + n)
        start, ld = (pointer(zeros, 0), 0) if fresh else (c, N)
        factors.add(kernel, left, block, behind + n, depth, start, ld, c, N, count, min(P, columns - n))


@jitable
def _add_block(kernel, left, block, n, depth, start, ld, c, N, count, columns):
    """A tile of dw is start plus the product of a block of dy with one panel of x."""
    outer(kernel, pointer(left, 0), left.shape[1], pointer(block, n * DEPTH), depth, start, ld, c, N, count, columns)


@jitable
def _gather_panels(x, ldx, rows, stop, depth, N, out, first):
    """Copy the rows of x before row `stop`, the last one first, into panels [blocks, DEPTH, P] from column `first` on:
    its own rows may lie so that they evict each other."""
    W, P = lanes_of(x), out.shape[2]
    for n in range(0, N, P):
        for k in range(depth):
            row = stop - 1 - k
            at = (rows[row] if len(rows) else row) * ldx
            for c in range(n, n + P, W):
                store(pointer(out, (first + n) * DEPTH + k * P + c - n), load(shift(x, at + c), N - c), W)


@jitable
def _gather(dy, order, stop, depth, column, count, piece, step, out, db, row, sums):
    """Copy `count` columns of the rows of dy before row `stop`, the last one first, side by side, as the tile walks
    through them, and add them to db."""
    W = lanes_of(pointer(dy, 0))
    ldy, P = dy.shape[1], VECTORS * W
    if count == P:
        _gather_whole(dy, order, stop, depth, column, piece, step, out, db, row, sums)
        return
    for n in range(0, count, piece):
        for c in range(n, min(n + piece, count), W):
            at = column + n // piece * step + c - n
            total = load(pointer(db, row + c), count - c)
            for m in range(depth):
                one = stop - 1 - m
                here = (order[one] if len(order) else one) * ldy + at
                value = load(pointer(dy, here), count - c)
                # Rows lie too far apart for the CPU to see what the next run will read.
                prefetch(pointer(dy, here), P)
                store(pointer(out, m * P + c), value, W)
                total += value
            if sums:
                store(pointer(db, row + c), total, count - c)


@jitable
def _gather_whole(dy, order, stop, depth, column, piece, step, out, db, row, sums):
    """The same for a whole panel, row by row: rows lie a page apart."""
    W, ldy = lanes_of(pointer(dy, 0)), dy.shape[1]
    # From one vector to the next, and from the first two to the others
    one, two = step if piece == W else W, 2 * step if piece == W else step if piece == 2 * W else 2 * W
    for m in range(depth):
        n = stop - 1 - m
        here = (order[n] if len(order) else n) * ldy + column
        value = load_many(pointer(dy, here), one, W, PAIR) + load_many(pointer(dy, here + two), one, W, PAIR)
        store_many(pointer(out, m * VECTORS * W), W, value, W)
        if sums:
            accumulate_many(pointer(db, row), W, value)


WHOLE = Factors("whole", 0, DEPTH, _scratch, _gather, _gather_panels, _add_block)
gradient = Kernel(gradient_by, "gradient", WHOLE)


@jitable
def clear(p, count):
    for n in range(0, count, lanes_of(p)):
        store(shift(p, n), 0.0, count - n)


@jitable
def _sums_here(run, turns):
    """Whether a shard sums the rows of dy of one of its runs."""
    part, parts = turns
    return run % parts == part


@jitable
def _token_sums(dy, runs, share, add, dw):
    """The sums of one shard at the beginning: [runs that it sums, N, P], N filled up to whole vectors."""
    (first, last, _, (part, parts)), W = share, lanes_of(pointer(dy, 0))
    P, N = VECTORS * W, (dw.shape[1] + W - 1) // W * W
    count = (last - first + parts - 1) // parts
    sums = aligned(count * N * P, dy).reshape(count, N, P)
    clear(pointer(sums, 0), sums.size)
    for run in range(first + part, last if add else first, parts):
        _, count, _, row = runs[run]
        for c in range(count if row >= 0 else 0):
            for n in range(dw.shape[1]):
                sums[(run - first) // parts, n, c] = dw[row + c, n]
    return sums


@jitable
def _add_tokens(left, stop, depth, words, run, turns):
    """Add the rows of dy before row `stop`, which have been gathered, to the sums of their tokens."""
    (tokens, first, sums), W, (_, P) = words, lanes_of(pointer(left, 0)), left.shape
    here = run // turns[1] * sums.shape[1]
    for m in range(depth):
        row = here + tokens[first + stop - 1 - m]
        accumulate_many(pointer(sums, row * P), W, load_many(pointer(left, m * P), W, W, VECTORS))


@jitable
def _token_end(runs, share, sums, dw):
    """Bring the sums to their places: column n of dw is the sum of dy's rows whose token is n."""
    (first, last, _, (part, parts)), W, (_, N, P) = share, lanes_of(pointer(sums, 0)), sums.shape
    order = np.arange(W)
    for run in range(first + part, last, parts):
        _, count, _, row = runs[run]
        for c in range(0, count if row >= 0 else 0, W):
            for n in range(0, dw.shape[1], W):
                place = ((run - first) // parts * N + n) * P + c
                block = load_transposed(pointer(sums, place), pointer(order, 0), P, W)
                at, left = pointer(dw, (row + c) * dw.shape[1] + n), dw.shape[1] - n
                store_first(at, dw.shape[1], block, count - c, left)


@sharded
def fingerprint(s, shards, words, factors, out):
    """A number for each block of a vector of 32-bit words, another one where any word of the block is another.

    That is certain where one word differs, since factors are odd. Where several do, the sum of their differences, times
    random odd numbers of 64 bits, would have to be zero by chance: at most one in 2^32 for each block, and mostly far
    less (J. L. Carter and M. N. Wegman, 1979).

    words: [N] of uint32; factors: [block] of uint64; out: [blocks] of uint64.
    """
    blocks, block = len(out), len(factors)
    for b in range(blocks * s // shards, blocks * (s + 1) // shards):
        here, total = words[b * block : (b + 1) * block], np.uint64(0)
        for n in range(len(here)):
            total += np.uint64(here[n]) * factors[n]
        out[b] = total
