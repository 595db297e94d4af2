"""Products of whole matrices by factors of half width, as in `gemm`; see `half` for how those are kept."""

from __future__ import annotations

import numpy as np

from nbrnn.kernels import amx
from nbrnn.kernels.gemm import Factors, clear, gradient_by
from nbrnn.kernels.half import KIND, load_side, padded, store_columns, store_half, store_pairs, store_pairs_of
from nbrnn.kernels.jit import Kernel, jitable, sharded
from nbrnn.kernels.memory import aligned
from nbrnn.kernels.simd import lanes_of, load, load_transposed, pointer, shift, store
from nbrnn.kernels.tiles import VECTORS, product

BLOCK = 256  # steps of depth of a weight gradient that are taken at once
ROWS, GROUP = 128, 1 << 19  # rows that share a pass over panels, and numbers of panels that stay in the second cache


# ------------------------------------------------------------------ rounding and packing


@jitable
def round_rows(source, stride, rows, step, piece, pieces, out, ld):
    """Round the pieces of some rows, `piece` numbers long and `step` apart, and put them side by side."""
    W = lanes_of(source)
    for m in range(rows):
        for n in range(pieces):
            for c in range(0, piece, W):
                value = load(shift(source, m * stride + n * step + c), piece - c)
                store_half(shift(out, m * ld + n * piece + c), value)


@jitable
def token_row(panel, depth, columns, token, c):
    """One vector of a row of a panel, from column c on."""
    return load_side(shift(panel, (token // 2 * columns + c) * 2), token % 2)


@sharded
def pack_rows(s, shards, weight, order, out):
    """out[j, k // 2, c, k % 2] = weight[order[j P + c], k]: panels for ``x @ weight.T``."""
    J, pairs, P, _ = out.shape
    K, W = weight.shape[1], lanes_of(pointer(weight, 0))
    for j in range(J * s // shards, J * (s + 1) // shards):
        for c in range(0, P, W):
            for k in range(0, 2 * pairs, W):
                block = load_transposed(pointer(weight, min(k, K)), pointer(order, j * P + c), K, K - k)
                store_pairs_of(pointer(out, ((j * pairs + k // 2) * P + c) * 2), 2 * P, block)


@sharded
def pack_columns(s, shards, weight, order, out):
    """out[j, k // 2, c, k % 2] = weight[order[k], j P + c]: panels for ``dy @ weight``."""
    J, pairs, P, _ = out.shape
    W = lanes_of(pointer(weight, 0))
    for j in range(J * s // shards, J * (s + 1) // shards):
        for k in range(pairs):
            for c in range(0, P, W):
                low, high = (_row(weight, order, 2 * k, j * P + c), _row(weight, order, 2 * k + 1, j * P + c))
                store_pairs(pointer(out, ((j * pairs + k) * P + c) * 2), low, high)


@jitable
def _row(weight, order, k, column):
    """One vector of row order[k] of a weight, zeros where there is none."""
    N, row = weight.shape[1], order[k] if k < len(order) else -1
    return load(pointer(weight, max(row, 0) * N + min(column, N)), N - column if row >= 0 else 0)


@sharded
def pack_layer_back(s, shards, w_hh, order_hh, out_hh, w_ih, order_ih, out_ih):
    """`gemm.pack_layer_back` of a cell with one product."""
    pack_columns(s, shards, w_hh, order_hh, out_hh)
    pack_columns(s, shards, w_ih, order_ih, out_ih)


# ------------------------------------------------------------------ products


def _multiply(s, shards, kernel, a, packed, start, out):
    """out = start + a @ packed; a: [>= M + BEHIND, K']; packed: [J, K' / 2, P, 2]; start: [J P]; out: [M, N]."""
    (M, N), (J, pairs, P, _) = out.shape, packed.shape
    depth, lo, hi = 2 * pairs, M * s // shards, M * (s + 1) // shards
    group = max(1, GROUP // (P * max(1, depth)))
    amx.begin()
    for j0 in range(0, J, group):
        for row in range(lo, hi, ROWS):
            for j in range(j0, min(j0 + group, J)):
                c, columns = pointer(out, row * N + j * P), min(P, N - j * P)
                left, b = pointer(a, row * depth), pointer(packed, j * P * depth)
                rows, before, ahead = min(ROWS, hi - row), pointer(start, j * P), shift(b, P * depth)
                product(kernel, left, depth, b, depth, before, 0, c, N, rows, columns, ahead)
    amx.end()


# Kernels that multiply are cached apart for each kind: a process may be denied AMX's tiles.
multiply = Kernel(_multiply, f"multiply_half-{KIND}")


# ------------------------------------------------------------------ weight gradients


@jitable
def _room(dy, blocks, span):
    """For a block of dy, and `span` blocks of x in panels: [P, BLOCK] and [span, blocks, BLOCK / 2, P, 2]; zeros."""
    P = VECTORS * lanes_of(pointer(dy, 0))
    kind = np.empty(0, np.uint16)
    right, zeros = aligned(span * blocks * BLOCK * P, kind).reshape(span, blocks, BLOCK // 2, P, 2), aligned(P, dy)
    clear(pointer(zeros, 0), P)
    return aligned(P * BLOCK, kind).reshape(P, BLOCK), right, zeros


@jitable
def _gather_panels(x, ldx, rows, stop, depth, N, out, first):
    """Round the rows of x before row `stop`, the last one first, into panels from column `first` on."""
    W, P = lanes_of(x), out.shape[2]
    for n in range(0, N, P):
        for k in range(0, padded(depth), 2):
            # Behind the depth stand zeros.
            low, high = max(stop - 1 - k, 0), max(stop - 2 - k, 0)
            if len(rows):
                low, high = rows[low], rows[high]
            for c in range(n, n + P, W):
                one = load(shift(x, low * ldx + c), N - c if k < depth else 0)
                other = load(shift(x, high * ldx + c), N - c if k + 1 < depth else 0)
                store_pairs(pointer(out, ((first + n) // P * BLOCK // 2 + k // 2) * 2 * P + 2 * (c - n)), one, other)


@jitable
def _gather(dy, order, stop, depth, column, count, piece, step, out, db, row, sums):
    """Round `count` columns of dy, whose rows have no other order, into rows, and add them to db."""
    W, ldy = lanes_of(pointer(dy, 0)), dy.shape[1]
    # Rows lie a page apart, or more: what is read of one is read at once.
    for m in range(0, padded(depth), 2 * W):
        for n in range(0, count, piece):
            for c in range(n, min(n + piece, count), W):
                at = pointer(dy, (stop - 1 - m) * ldy + column + n // piece * step + c - n)
                total = load(pointer(db, row + c), count - c)
                total = store_columns(pointer(out, c * BLOCK + m), BLOCK, at, -ldy, depth - m, count - c, total)
                if sums:
                    store(pointer(db, row + c), total, count - c)


@jitable
def _add_block(kernel, left, block, n, depth, start, ld, c, N, count, columns):
    """A tile of dw is start plus the product of a block of dy with one panel of x."""
    b = pointer(block, n * BLOCK)
    product(kernel, pointer(left, 0), BLOCK, b, padded(depth), start, ld, c, N, count, columns, b)


# db is the sum of numbers that are not rounded.
HALF = Factors(f"half-{KIND}", 1, BLOCK, _room, _gather, _gather_panels, _add_block)
gradient = Kernel(gradient_by, f"gradient-{HALF.name}", HALF)
