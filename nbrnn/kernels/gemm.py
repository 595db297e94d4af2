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

from nbrnn.kernels.constants import Constants
from nbrnn.kernels.jit import jitable, sharded
from nbrnn.kernels.memory import aligned
from nbrnn.kernels.simd import lanes_of, load, load_transposed, pointer, shift, store, store_first
from nbrnn.kernels.tiles import VECTORS, outer, panel_width, prefetch, product

FACTORS = np.random.default_rng(0).integers(2**64, size=2048, dtype=np.uint64) | np.uint64(1)  # of fingerprints
ROWS = 48  # rows that share a pass over a panel: a whole number of tiles of 4, 6 or 8
PIECE, GROUP = 1 << 16, 3 << 16  # numbers of a panel, and of several, that stay in the second cache for all rows
DEPTH = 128  # steps of depth for which a block of both factors stays in the nearest cache
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


def runs_of(rows: int, dtype: object, first_row: int = 0, column: int = 0, piece: int = 0, step: int = 0) -> np.ndarray:
    """Divide consecutive rows of a weight into runs of at most a panel: (column, row, count) each.

    The gradient of the rows stands in columns of dy: from `column` on where `piece` is 0, else in pieces of `piece`
    columns that lie `step` apart.
    """
    P = panel_width(VECTORS, dtype)
    starts = np.arange(0, rows, P)
    columns = starts // piece * step if piece else starts
    return np.stack([column + columns, first_row + starts, np.minimum(P, rows - starts)], axis=1)


# ------------------------------------------------------------------ packing


@sharded
def pack_rows(s, shards, weight, order, out):
    """out[j, k, c] = weight[order[j P + c], k]: panels for ``x @ weight.T``.

    weight: [R, K]; order: [J P]; out: [J, K, P].
    """
    J, K, P = out.shape
    W = lanes_of(pointer(out, 0))
    for j in range(J * s // shards, J * (s + 1) // shards):
        for k in range(0, K, W):
            for c in range(0, P, W):
                block = load_transposed(pointer(weight, k), pointer(order, j * P + c), K, K - k)
                store_first(pointer(out, (j * K + k) * P + c), P, block, K - k)


@sharded
def pack_columns(s, shards, weight, order, out):
    """out[j, k, c] = weight[order[k], j P + c]: panels for ``dy @ weight``.

    weight: [R, N]; order: [K]; out: [J, K, P] with J P >= N, filled up with zeros.
    """
    J, K, P = out.shape
    N, W = weight.shape[1], lanes_of(pointer(out, 0))
    for j in range(J * s // shards, J * (s + 1) // shards):
        for k in range(K):
            row = order[k]
            for c in range(0, P, W):
                there = N - j * P - c if row >= 0 else 0
                value = load(pointer(weight, max(row, 0) * N + j * P + c), there)
                store(pointer(out, (j * K + k) * P + c), value, W)


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
            if n == 0 and k0 == 0:
                product(kernel, left, lda, b, k1 - k0, pointer(start, j * P), 0, c, N, rows, columns)
            else:
                product(kernel, left, lda, b, k1 - k0, c, N, c, N, rows, columns)


# ------------------------------------------------------------------ weight gradients
#
# dy: [M, ldy]; runs: [n, 3] and pieces as in `runs_of`; dw: [R, N]; db: [R]. Only the rows of the runs are written; to
# what stands there the sums are added where `add` says so. Sums begin with the last row: a sequence that is taken piece
# by piece, from its end, gives the same bits as a whole one.


@dataclass(frozen=True)
class Factors(Constants):
    """How a weight gradient is multiplied; `half` has another way.

    Parameters
    ----------
    name : str
    depth : int
        Rows of dy for which a block of both factors stays in the nearest cache.
    room : callable
        ``room(dy, blocks, span)``: memory for a block of dy, and for `span` times `blocks` panels of x.
    left, right : callable
        What `_gather` and `_gather_panels` do.
    add : callable
        ``add(kernel, left, block, n, depth, c, N, count, columns)``: to a tile of dw the product of a block of dy with
        the panel of x that begins with column n.
    """

    name: str
    depth: int
    room: Callable
    left: Callable
    right: Callable
    add: Callable


@sharded
def gradient(s, shards, kernel, dy, x, offset, ldx, rows, runs, piece, step, add, dw, db):
    """dw = dy.T @ x and db = the sum of dy's rows.

    kernel: `outer_kernel`; x: rows of N numbers, `ldx` apart, from element `offset` of the array on; rows: [M], which
    of them stand beside the rows of dy, empty: the first M.
    """
    gradient_by(WHOLE, s, shards, kernel, dy, x, offset, ldx, rows, runs, piece, step, add, dw, db)


@jitable
def gradient_by(factors, s, shards, kernel, dy, x, offset, ldx, rows, runs, piece, step, add, dw, db):
    """`gradient` by some kind of factors."""
    # Where dw is too large for the second cache, each part of it takes several blocks before the next part does.
    P = VECTORS * lanes_of(pointer(dy, 0))
    blocks = (dw.shape[1] + P - 1) // P
    span = 1 if dw.size <= LARGE else max(1, SPAN // max(1, blocks))
    scratch = factors.room(dy, blocks, span)
    for k in range(0, max(1, len(dy)), factors.depth * span):
        here = x, offset, ldx, rows, runs, piece, step, add, dw, db
        _gradient_block(factors, s, shards, kernel, dy, k, here, scratch)


@sharded
def gradient_with_tokens(
    s, shards, kernel, dy, x, offset, ldx, rows, runs, piece, step, add, tokens, token_runs, dw, db, token_dw, token_db
):
    """`gradient`, and the same where x holds the one-hot rows of `tokens`: dy comes from far memory once for both.

    tokens: [M] integers in [0, N).
    """
    P = VECTORS * lanes_of(pointer(dy, 0))
    scratch = _scratch(dy, (dw.shape[1] + P - 1) // P, 1)
    here = x, offset, ldx, rows, runs, piece, step, add, dw, db
    sums, places = _token_sums(s, shards, dy, token_runs, piece, step, add, token_dw)
    for k in range(0, max(1, len(dy)), DEPTH):
        _gradient_block(WHOLE, s, shards, kernel, dy, k, here, scratch)
        _token_block(s, shards, dy, k, tokens, token_runs, sums, places)
    _token_end(s, shards, token_runs, sums, token_dw, token_db)


@jitable
def _scratch(dy, blocks, span):
    """Room for a block of dy, and for `span` blocks of x in panels: [DEPTH, P] and [span, blocks, DEPTH, P]."""
    P = VECTORS * lanes_of(pointer(dy, 0))
    right = aligned(span * blocks * DEPTH * P, dy).reshape(span, blocks, DEPTH, P)
    return aligned(DEPTH * P, dy).reshape(DEPTH, P), right


@jitable
def _gradient_block(factors, s, shards, kernel, dy, k, here, scratch):
    """Add what some blocks of rows of dy give, k before the end: all runs find them in a near cache, put there by the
    first."""
    (x, offset, ldx, rows, runs, piece, step, add, dw, db), (left, right) = here, scratch
    P, span, DEPTH = VECTORS * lanes_of(pointer(dy, 0)), len(right), factors.depth
    N = dw.shape[1]
    blocks = (N + P - 1) // P
    piece, step = (P, P) if piece == 0 else (piece, step)
    # By rows of dw where there are enough of them, else also by columns.
    parts = 1 if len(runs) >= 2 * shards else min(shards, blocks)
    tasks = len(runs) * parts
    first, last = tasks * s // shards, tasks * (s + 1) // shards
    stop = min(len(dy), k + DEPTH * span)
    for k0 in range(k, stop if first < last else k, DEPTH):
        depth = min(DEPTH, stop - k0)
        factors.right(x, offset, ldx, rows, len(dy) - k0, depth, N, right[(k0 - k) // DEPTH])
    for task in range(first, last):
        column, row, count = runs[task // parts]
        part = task % parts
        n0, n1 = blocks * part // parts * P, min(N, blocks * (part + 1) // parts * P)
        if k == 0 and not add:
            clear_rows(dw, row, count, n0, n1)
            clear(pointer(db, row), count if part == 0 else 0)
        for k0 in range(k, stop, DEPTH):
            depth, block = min(DEPTH, stop - k0), right[(k0 - k) // DEPTH]
            factors.left(dy, k0, depth, column, count, piece, step, left, db, row, part == 0)
            for n in range(n0, n1, P):
                factors.add(kernel, left, block, n, depth, pointer(dw, row * N + n), N, count, min(P, n1 - n))


@jitable
def _add_block(kernel, left, block, n, depth, c, N, count, columns):
    """A tile of dw plus the product of a block of dy with one panel of x."""
    outer(kernel, pointer(left, 0), left.shape[1], pointer(block, n * DEPTH), depth, c, N, count, columns)


@jitable
def _gather_panels(x, offset, ldx, rows, stop, depth, N, out):
    """Copy the rows of x before row `stop`, the last one first, into panels [blocks, DEPTH, P]: its own rows may lie so
    that they evict each other."""
    W, P = lanes_of(pointer(x, 0)), out.shape[2]
    for n in range(0, N, P):
        for k in range(depth):
            row = stop - 1 - k
            at = offset + (rows[row] if len(rows) else row) * ldx
            for c in range(n, n + P, W):
                store(pointer(out, n * DEPTH + k * P + c - n), load(pointer(x, at + c), N - c), W)


@jitable
def _gather(dy, k, depth, column, count, piece, step, out, db, row, sums):
    """Copy `count` columns of dy side by side, so that the tile walks through them in order, and add them to db."""
    W = lanes_of(pointer(dy, 0))
    ldy, P = dy.shape[1], VECTORS * W
    for n in range(0, count, piece):
        for c in range(n, min(n + piece, count), W):
            at = (len(dy) - 1 - k) * ldy + column + n // piece * step + c - n
            total = load(pointer(db, row + c), count - c)
            for m in range(depth):
                value = load(pointer(dy, at - m * ldy), count - c)
                # Rows lie too far apart for the CPU to see what the next run will read.
                prefetch(pointer(dy, at - m * ldy), P)
                store(pointer(out, m * P + c), value, W)
                total += value
            if sums:
                store(pointer(db, row + c), total, count - c)


WHOLE = Factors("whole", DEPTH, _scratch, _gather, _gather_panels, _add_block)


@jitable
def clear_rows(dw, row, count, n0, n1):
    for r in range(row, row + count):
        clear(pointer(dw, r * dw.shape[1] + n0), n1 - n0)


@jitable
def clear(p, count):
    for n in range(0, count, lanes_of(p)):
        store(shift(p, n), 0.0, count - n)


@jitable
def _token_sums(s, shards, dy, runs, piece, step, add, dw):
    """The sums [runs, N, P] of one shard at the beginning, and where each vector of its runs stands in a row of dy."""
    W = lanes_of(pointer(dy, 0))
    P = VECTORS * W
    piece = P if piece == 0 else piece
    first, last = len(runs) * s // shards, len(runs) * (s + 1) // shards
    sums = aligned((last - first) * dw.shape[1] * P, dy).reshape(last - first, dw.shape[1], P)
    clear(pointer(sums, 0), sums.size)
    places = np.empty((last - first, VECTORS), np.int64)
    for r in range(first, last):
        _, row, count = runs[r]
        for c in range(count if add else 0):
            for n in range(dw.shape[1]):
                sums[r - first, n, c] = dw[row + c, n]
        for v in range(VECTORS):
            places[r - first, v] = runs[r, 0] + v * W // piece * step + v * W % piece
    return sums, places


@jitable
def _token_block(s, shards, dy, k, tokens, runs, sums, places):
    """Add DEPTH rows of dy, k before the end, to the sums of their tokens."""
    W, ldy, first = lanes_of(pointer(dy, 0)), dy.shape[1], len(runs) * s // shards
    _, N, P = sums.shape
    for m in range(len(dy) - 1 - k, max(-1, len(dy) - 1 - k - DEPTH), -1):
        token = tokens[m]
        for r in range(len(sums)):
            count, one = runs[first + r, 2], pointer(sums, (r * N + token) * P)
            for v in range((count + W - 1) // W):
                value = load(pointer(dy, m * ldy + places[r, v]), count - v * W)
                store(shift(one, v * W), load(shift(one, v * W), W) + value, W)


@jitable
def _token_end(s, shards, runs, sums, dw, db):
    """Bring the sums to their places: column n of dw is the sum of dy's rows whose token is n."""
    first = len(runs) * s // shards
    for r in range(len(sums)):
        _, row, count = runs[first + r]
        for c in range(count):
            total = sums[r, 0, c]
            dw[row + c, 0] = total
            for n in range(1, dw.shape[1]):
                dw[row + c, n] = sums[r, n, c]
                total += sums[r, n, c]
            db[row + c] = total


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
