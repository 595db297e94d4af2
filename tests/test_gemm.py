"""Packing, products and weight gradients against NumPy, with the same bits on any number of shards."""

import numpy as np
import pytest
from test_simd import DTYPES, UNTOUCHED, assert_same_bits
from test_tiles import assert_close, normal

from nbrnn.kernels import gemm
from nbrnn.kernels.simd import width
from nbrnn.kernels.tiles import VECTORS, outer_kernel, panel_width, product_kernel
from nbrnn.layers import sequences

SIZES = (1, 7, 33, 100, 1000)
# One dimension takes every size while the others stay small: rows, depth, columns.
SHAPES = [(size, 5, 9) for size in SIZES] + [(6, size, 40) for size in SIZES] + [(7, 11, size) for size in SIZES]
# And what is larger than caches: depth and columns taken in pieces, a gradient in several blocks
SHAPES += [(60, 2500, 70), (50, 40, 5000), (300, 1100, 500)]
SHAPE = pytest.mark.parametrize(("M", "K", "N"), SHAPES, ids=str)
SHARDS = (1, 2, 5)
KERNELS = {gemm.multiply: product_kernel, gemm.gradient: outer_kernel, gemm.gradient_with_tokens: outer_kernel}


def on_shards(function, make_outputs, *args, behind=()):
    """The outputs of a function, its last arguments but those `behind`; they have to be the same on any number of
    shards."""
    if function in KERNELS:
        args = (KERNELS[function](VECTORS, args[0].dtype), *args)
    results = []
    for shards in SHARDS:
        outputs = make_outputs()
        getattr(function, "entry", function)(shards, *args, *outputs, *behind)
        results.append(outputs)
    for outputs in results[1:]:
        for got, want in zip(outputs, results[0]):
            assert_same_bits(got, want)
    return results[0]


def untouched(*shapes, dtype):
    return lambda: [np.full(shape, UNTOUCHED, dtype) for shape in shapes]


# ------------------------------------------------------------------ packing


def some_order(rows, length, rng):
    """Rows of a matrix in any order, some of them missing."""
    return np.where(rng.random(length) < 0.2, -1, rng.integers(0, rows, length))


def in_order(weight, order):
    """The rows of a matrix that an order names, zeros for -1."""
    return np.where(order[:, None] < 0, 0, weight[order])


@SHAPE
@DTYPES
def test_pack_rows(M, K, N, dtype):
    P = 3 * width(dtype)
    J = -(-N // P)
    weight, order = normal(M, K, dtype=dtype), some_order(M, J * P, np.random.default_rng(0))
    (packed,) = on_shards(gemm.pack_rows, untouched((J, K, P), dtype=dtype), weight, order)
    assert_same_bits(packed, np.ascontiguousarray(in_order(weight, order).reshape(J, P, K).swapaxes(1, 2)))


@SHAPE
@DTYPES
def test_pack_columns(M, K, N, dtype):
    P = panel_width(4, dtype)
    J = -(-N // P)
    weight, order = normal(M, N, dtype=dtype), some_order(M, K, np.random.default_rng(0))
    (packed,) = on_shards(gemm.pack_columns, untouched((J, K, P), dtype=dtype), weight, order)
    wide = np.zeros((K, J * P), dtype)
    wide[:, :N] = in_order(weight, order)
    assert_same_bits(packed, np.ascontiguousarray(wide.reshape(K, J, P).swapaxes(0, 1)))


@DTYPES
@pytest.mark.parametrize("count", SIZES)
def test_plain_order_fills_whole_panels(count, dtype):
    order, P = gemm.plain_order(count, dtype), panel_width(4, dtype)
    assert len(order) == gemm.padded(count, dtype) == gemm.panels(count, dtype) * P
    assert len(order) - P < count <= len(order)
    np.testing.assert_array_equal(order[:count], np.arange(count))
    assert (order[count:] == -1).all()


# ------------------------------------------------------------------ rows by panels


def pack(matrix):
    """Panels for ``x @ matrix``, by NumPy."""
    K, N = matrix.shape
    P = panel_width(4, matrix.dtype)
    wide = np.zeros((K, -(-N // P) * P), matrix.dtype)
    wide[:, :N] = matrix
    return np.ascontiguousarray(wide.reshape(K, -1, P).swapaxes(0, 1))


@SHAPE
@DTYPES
def test_multiply(M, K, N, dtype):
    a, b = normal(M, K, dtype=dtype), normal(K, N, dtype=dtype, seed=1)
    start = normal(gemm.padded(N, dtype), dtype=dtype, seed=2)
    (out,) = on_shards(gemm.multiply, untouched((M, N), dtype=dtype), a, 0, 0, K, pack(b), start)
    assert_close(out, np.broadcast_to(start[:N], (M, N)), a, b)


@DTYPES
@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_multiply_takes_pieces_of_the_rows(pieces, dtype):
    M, N, depth, first, step = 13, 40, 9, 3, 16
    a = np.full((M, pieces * step), np.nan, dtype)
    a.reshape(M, pieces, step)[:, :, first : first + depth] = normal(M, pieces, depth, dtype=dtype)
    b, start = normal(pieces * depth, N, dtype=dtype, seed=1), np.zeros(gemm.padded(N, dtype), dtype)
    (out,) = on_shards(gemm.multiply, untouched((M, N), dtype=dtype), a, first, step, depth, pack(b), start)
    used = a.reshape(M, pieces, step)[:, :, first : first + depth].reshape(M, -1)
    assert_close(out, np.zeros((M, N)), used, b)


@DTYPES
def test_bits_of_a_row_do_not_depend_on_the_other_rows(dtype):
    M, K, N = 100, 33, 70
    a, packed = normal(M, K, dtype=dtype), pack(normal(K, N, dtype=dtype))
    start = normal(gemm.padded(N, dtype), dtype=dtype)
    (whole,) = on_shards(gemm.multiply, untouched((M, N), dtype=dtype), a, 0, 0, K, packed, start)
    for lo, hi in ((0, 1), (99, 100), (3, 11), (40, 97)):
        (part,) = on_shards(
            gemm.multiply, untouched((hi - lo, N), dtype=dtype), a[lo:hi].copy(), 0, 0, K, packed, start
        )
        assert_same_bits(part, whole[lo:hi])


# ------------------------------------------------------------------ weight gradients


ALL = np.empty(0, np.int64)


def gradient(dy, runs, piece, step, *side, shapes, blank=0):
    """dw and db of one matrix."""
    outputs, alone = untouched(*shapes, dtype=dy.dtype), gemm.alone(dy.dtype)
    return on_shards(gemm.gradient, outputs, dy, runs, piece, step, False, blank, *side, behind=alone)


def assert_gradient(dw, db, dy, x):
    """dw = dy.T @ x and db = the sum of dy."""
    assert_close(dw, np.zeros(dw.shape), dy.T, x)
    assert_close(db[:, None], np.zeros((len(db), 1)), dy.T, np.ones((len(dy), 1)))


@SHAPE
@DTYPES
def test_gradient(M, K, N, dtype):
    dy, x = normal(M, K, dtype=dtype), normal(M, N, dtype=dtype, seed=1)
    runs = gemm.runs_of(K, dtype)
    dw, db = gradient(dy, runs, 0, 0, x, 0, N, ALL, shapes=((K, N), K))
    assert_gradient(dw, db, dy, x)


@DTYPES
def test_gradient_without_rows_is_zero(dtype):
    dy, x, runs = np.empty((0, 7), dtype), np.empty((0, 9), dtype), gemm.runs_of(7, dtype)
    for result in gradient(dy, runs, 0, 0, x, 0, 9, ALL, shapes=((7, 9), 7)):
        assert (result == 0).all()


@DTYPES
def test_gradient_reads_x_from_the_middle_of_wider_rows(dtype):
    M, K, N, ldx, offset = 33, 7, 40, 50, 105
    dy, x = normal(M, K, dtype=dtype), normal(M + 3, ldx, dtype=dtype, seed=1)
    dw, db = gradient(dy, gemm.runs_of(K, dtype), 0, 0, x, offset, ldx, ALL, shapes=((K, N), K))
    assert_gradient(dw, db, dy, x[2:-1, 5 : 5 + N])


@DTYPES
def test_gradient_takes_the_rows_of_x_that_it_is_told(dtype):
    M, K, N = 300, 7, 40
    dy, x = normal(M, K, dtype=dtype), normal(50, N, dtype=dtype, seed=1)
    rows = np.random.default_rng(2).integers(0, 50, M)
    dw, db = gradient(dy, gemm.runs_of(K, dtype), 0, 0, x, 0, N, rows, shapes=((K, N), K))
    assert_gradient(dw, db, dy, x[rows])


@DTYPES
@pytest.mark.parametrize("blank", [0, 11, 132, 297, 330])
def test_blank_rows_count_as_zeros_and_are_not_read(blank, dtype):
    T, B, M, K, N = 30, 11, 330, 7, 40
    dy, x, tokens = normal(M, K, dtype=dtype), normal(M, N, dtype=dtype, seed=1), np.zeros(M, int)
    zeroed, runs, shapes = x.copy(), gemm.runs_of(K, dtype), ((K, N), K)
    x[:blank], zeroed[:blank] = np.nan, 0.0
    want = gradient(dy, runs, 0, 0, zeroed, 0, N, ALL, shapes=shapes)
    assert_gradient(*want, dy, zeroed)
    args = dy, gemm.runs_of(K, dtype, (0, 0)), 0, 0, False, blank, x, 0, N, ALL
    outputs = untouched(*shapes, *shapes, dtype=dtype)
    with_tokens = on_shards(gemm.gradient_with_tokens, outputs, *args, tokens, 0)
    for found in (gradient(dy, runs, 0, 0, *args[6:], shapes=shapes, blank=blank), with_tokens[:2]):
        for got, known in zip(found, want):
            assert_same_bits(got, known)
    # The second matrix has no such rows
    sides, halves = (zeroed, 0, N), sequences.halves(T, B)
    found = []
    for first, none in ((zeroed, 0), (x, blank)):
        outs = [untouched(*shapes, *shapes, dtype=dtype)() for _ in halves]
        args = [array for rows, out in zip(halves, outs) for array in (rows, *out)]
        how = gemm.runs_of(K, dtype, (0, 0)), 0, 0, False, none, first, 0, N
        gemm.gradient_in_halves.entry(2, outer_kernel(VECTORS, dtype), dy, *how, *sides, *args)
        found.append([array for out in outs for array in out])
    for got, known in zip(found[1], found[0]):
        assert_same_bits(got, known)


@DTYPES
@pytest.mark.parametrize("cut", [0, 1, 128, 300, 399])
def test_gradients_of_two_pieces_added_from_the_end_are_those_of_the_whole_bit_for_bit(cut, dtype):
    M, K, N = 400, 70, 40
    dy, x, tokens = normal(M, K, dtype=dtype), normal(M, N, dtype=dtype), np.random.default_rng(1).integers(0, N, M)
    runs, kernel = gemm.runs_of(K, dtype, (0, 0)), outer_kernel(4, dtype)

    def piece(first, stop, add, out):
        args = dy[first:stop].copy(), runs, 0, 0, add, 0, x, first * N, N, ALL, tokens, first
        gemm.gradient_with_tokens.entry(1, kernel, *args, *out)

    whole, parts = (untouched((K, N), K, (K, N), K, dtype=dtype)() for _ in range(2))
    piece(0, M, False, whole)
    piece(cut, M, False, parts)
    piece(0, cut, True, parts)
    for one, other in zip(whole, parts):
        assert_same_bits(one, other)


@DTYPES
def test_take_rows(dtype):
    x, rows = normal(9, 37, dtype=dtype), np.array([3, -1, 8, 0, 0, -1])
    x[4] = np.nan
    (out,) = on_shards(gemm.take_rows, untouched((6, 37), dtype=dtype), x, rows)
    np.testing.assert_array_equal(out, np.where(rows[:, None] < 0, 0, x[rows]))


def tape(M, H, slots, U, dtype, seed=0):
    """dy as a scan leaves it, and slot by slot: panels of U units, in each one slot after the other, NaN behind H."""
    J = -(-H // U)
    plain = normal(M, slots, H, dtype=dtype, seed=seed)
    wide = np.full((M, slots, J * U), np.nan, dtype)
    wide[:, :, :H] = plain
    return np.ascontiguousarray(wide.reshape(M, slots, J, U).swapaxes(1, 2)).reshape(M, -1), plain


@DTYPES
@pytest.mark.parametrize("H", [1, 7, 33, 100])
@pytest.mark.parametrize("vectors", [1, 2, 4])
def test_gradients_of_pieces_and_of_some_rows_only(H, vectors, dtype):
    M, N, slots, U = 33, 7, 3, vectors * width(dtype)
    dy, plain = tape(M, H, slots, U, dtype)
    x, tokens = normal(M, N, dtype=dtype, seed=1), np.random.default_rng(2).integers(0, N, M)
    # The second slot goes to the rows of the third block, the last slot to those of the first.
    places = {2: 1, 0: 2}
    runs = [gemm.runs_of(H, dtype, (block * H, -1), slot * U, U, slots * U) for block, slot in places.items()]
    runs, shapes = np.concatenate(runs), ((3 * H, N), 3 * H)
    floats = gradient(dy, runs, U, slots * U, x, 0, N, ALL, shapes=shapes)
    runs[:, 3] = runs[:, 2]
    args = dy, runs, U, slots * U, False, 0, x, 0, N, ALL, tokens, 0
    both = on_shards(gemm.gradient_with_tokens, untouched(*shapes, *shapes, dtype=dtype), *args)
    for (dw, db), right in ((floats, x), (both[:2], x), (both[2:], np.eye(N)[tokens])):
        for block, slot in places.items():
            rows = slice(block * H, (block + 1) * H)
            assert_gradient(dw[rows], db[rows], plain[:, slot], right)
        assert (dw[H : 2 * H] == UNTOUCHED).all()
        assert (db[H : 2 * H] == UNTOUCHED).all()


@DTYPES
@pytest.mark.parametrize(("H", "N", "N2"), [(1, 1, 1), (33, 33, 5), (100, 100, 300), (33, 70, 0), (33, 0, 70)])
def test_gradients_of_two_matrices_at_once_are_those_of_each(H, N, N2, dtype):
    M, slots, U = 300, 4, width(dtype)
    dy, _ = tape(M, H, slots, U, dtype)
    x, x2 = normal(M, N, dtype=dtype, seed=1), normal(M, N2, dtype=dtype, seed=2)
    # As in a GRU: the first slot belongs to the second matrix alone and the last one to the first.
    first_rows = [(-1, 2 * H), (0, 0), (H, H), (2 * H, -1)]
    how = U, slots * U
    runs = np.concatenate([gemm.runs_of(H, dtype, rows, n * U, *how) for n, rows in enumerate(first_rows)])
    shapes, shapes2 = ((3 * H, N), 3 * H), ((3 * H, N2), 3 * H)
    none = np.full(len(runs), -1)
    mine, its = (np.stack([*runs[:, :2].T, rows, none], axis=1)[rows >= 0] for rows in runs[:, 2:].T)
    want = [
        gradient(dy, mine, *how, x, 0, N, ALL, shapes=shapes),
        gradient(dy, its, *how, x2, 0, N2, ALL, shapes=shapes2),
    ]
    for shards in (1, 2, 3, 4, 7):
        one, two = untouched(*shapes, dtype=dtype)(), untouched(*shapes2, dtype=dtype)()
        sides = x, 0, N, ALL, *one, x2, 0, N2, ALL, *two
        gemm.gradient(shards, outer_kernel(VECTORS, dtype), dy, runs, *how, False, 0, *sides)
        for got, known in zip((*one, *two), (*want[0], *want[1])):
            assert_same_bits(got, known)


@DTYPES
@pytest.mark.parametrize(("H", "N", "N2"), [(1, 1, 1), (33, 33, 5), (100, 70, 0)])
@pytest.mark.parametrize("M", [0, 1, 300])
def test_gradients_in_halves_are_those_of_the_rows_in_each(M, H, N, N2, dtype):
    slots, U = 3, width(dtype)
    dy, plain = tape(300, H, slots, U, dtype)
    x, x2 = normal(300, N, dtype=dtype, seed=1), normal(300, N2, dtype=dtype, seed=2)
    first_rows, how = [(-1, 0), (0, H), (H, -1)], (U, slots * U)
    runs = np.concatenate([gemm.runs_of(H, dtype, rows, n * U, *how) for n, rows in enumerate(first_rows)])
    order = np.random.default_rng(3).permutation(300)
    orders = order[:M], order[M : M + M // 2]
    if N2 == 0:
        runs = runs[runs[:, 2] >= 0]
    shapes = (2 * H, N), 2 * H, (2 * H, N2), 2 * H
    found = []
    for shards in (1, 2, 3, 4, 7):
        outs = [untouched(*shapes, dtype=dtype)() for _ in orders]
        halves = [array for rows, out in zip(orders, outs) for array in (rows, *out)]
        sides = x, 0, N, x2, 0, N2
        gemm.gradient_in_halves.entry(shards, outer_kernel(VECTORS, dtype), dy, runs, *how, False, 0, *sides, *halves)
        found.append(outs)
    for outs in found[1:]:
        for half, first in zip(outs, found[0]):
            for got, known in zip(half, first):
                assert_same_bits(got, known)
    for rows, (dw, db, dw2, db2) in zip(orders, found[0]):
        one, two, three = (plain[rows, slot] for slot in range(slots))
        assert_gradient(dw[:H], db[:H], two, x[rows])
        assert_gradient(dw[H:], db[H:], three, x[rows])
        if N2:
            assert_gradient(dw2[:H], db2[:H], one, x2[rows])
            assert_gradient(dw2[H:], db2[H:], two, x2[rows])


@SHAPE
@DTYPES
def test_gradient_with_tokens(M, K, N, dtype):
    dy, x, tokens = normal(M, K, dtype=dtype), normal(M, 5, dtype=dtype), np.random.default_rng(1).integers(0, N, M)
    runs = gemm.runs_of(K, dtype, (0, 0))
    outputs = untouched((K, 5), K, (K, N), K, dtype=dtype)
    args = dy, runs, 0, 0, False, 0, x, 0, 5, ALL, tokens, 0
    dw, db, token_dw, token_db = on_shards(gemm.gradient_with_tokens, outputs, *args)
    assert_gradient(dw, db, dy, x)
    assert_gradient(token_dw, token_db, dy, np.eye(N)[tokens])


@DTYPES
@pytest.mark.parametrize(("H", "N"), [(1, 1), (33, 0), (100, 70), (33, 300)])
def test_tokens_beside_a_matrix_that_shares_some_runs_with_them(H, N, dtype):
    M, V, slots, U = 300, 37, 4, width(dtype)
    dy, plain = tape(M, H, slots, U, dtype)
    x, tokens = normal(M, N, dtype=dtype, seed=1), np.random.default_rng(2).integers(0, V, M + 3)
    first_rows, how = [(-1, 2 * H), (0, 0), (H, H), (2 * H, -1)], (U, slots * U)
    runs = np.concatenate([gemm.runs_of(H, dtype, rows, n * U, *how) for n, rows in enumerate(first_rows)])
    outputs, args = (
        untouched((3 * H, N), 3 * H, (3 * H, V), 3 * H, dtype=dtype),
        (dy, runs, *how, False, 0, x, 0, N, ALL),
    )
    dw, db, token_dw, token_db = on_shards(gemm.gradient_with_tokens, outputs, *args, tokens, 3)
    one_hot = np.eye(V)[tokens[3:]]
    for slot, (row, token_row) in enumerate(first_rows):
        if row >= 0:
            assert_gradient(dw[row : row + H], db[row : row + H], plain[:, slot], x)
        if token_row >= 0:
            here = slice(token_row, token_row + H)
            assert_gradient(token_dw[here], token_db[here], plain[:, slot], one_hot)


@DTYPES
@pytest.mark.parametrize("rows", SIZES)
def test_runs_cover_every_row_once(rows, dtype):
    runs = gemm.runs_of(rows, dtype, (5, -1), column=3)
    covered = np.concatenate([row + np.arange(count) for _, count, row, _ in runs])
    np.testing.assert_array_equal(covered, 5 + np.arange(rows))
    assert runs[:, 1].max() <= panel_width(4, dtype)
    np.testing.assert_array_equal(runs[:, 0] - 3, runs[:, 2] - 5)
    assert (runs[:, 3] == -1).all()


@DTYPES
@pytest.mark.parametrize(("M", "V", "N"), [(0, 3, 5), (1, 1, 1), (50, 7, 33), (20, 1000, 16)])
def test_sum_rows_is_the_scatter_of_rows(M, V, N, dtype):
    dy, tokens = normal(M, N, dtype=dtype), np.random.default_rng(0).integers(0, V, M)
    (out,) = on_shards(gemm.sum_rows, untouched((V, N), dtype=dtype), dy, tokens)
    want = np.zeros((V, N), dtype)
    np.add.at(want, tokens, dy)
    np.testing.assert_array_equal(out, want)


# ------------------------------------------------------------------ fingerprints


@DTYPES
@pytest.mark.parametrize("size", [*SIZES, 5000])
def test_a_fingerprint_shows_one_bit_anywhere(size, dtype):
    a = normal(size, dtype=dtype)
    a[0] = np.nan

    def fingerprint(a):
        words = a.view(np.uint32)
        (found,) = on_shards(
            gemm.fingerprint, untouched(-(-words.size // len(gemm.FACTORS)), dtype=np.uint64), words, gemm.FACTORS
        )
        return found

    known = fingerprint(a)
    np.testing.assert_array_equal(fingerprint(a.copy()), known)
    for at in {0, size // 3, size // 2, size - 1}:
        for bit in (0, 8 * a.itemsize - 1):
            b = a.copy()
            b.view(f"u{a.itemsize}")[at] ^= np.array(1 << bit, f"u{a.itemsize}")
            assert (fingerprint(b) != known).sum() == 1
    if size > 1:
        b = a.copy()
        b[[0, -1]] = b[[-1, 0]]  # a place counts
        assert (fingerprint(b) != known).any()


@DTYPES
@pytest.mark.parametrize("H", [1, 7, 33])
def test_a_layer_is_packed_in_one_region_as_it_is_piece_by_piece(H, dtype):
    P, N = 2 * width(dtype), 5
    J = -(-H // width(dtype))
    rng = np.random.default_rng(0)
    w_ih, w_hh = normal(2 * H, N, dtype=dtype), normal(2 * H, H, dtype=dtype, seed=1)
    bias_ih, bias_hh = normal(2 * H, dtype=dtype, seed=2), normal(2 * H, dtype=dtype, seed=3)
    ih, hh = some_order(2 * H, J * P, rng), some_order(2 * H, J * P, rng)
    mid = some_order(2 * H, J * width(dtype), rng)
    shapes = (J, N, P), (J, H, P), (J, H, width(dtype))
    for biases in ((bias_ih, bias_hh), (bias_ih, bias_hh[:0]), (bias_ih[:0], bias_hh[:0])):
        for shards in SHARDS:
            outs, bias = untouched(*shapes, dtype=dtype)(), np.zeros((J, 2 * P + width(dtype)), dtype)
            args = w_ih, ih, outs[0], w_hh, hh, outs[1], mid, outs[2]
            gemm.pack_layer.entry(shards, *args, *biases, P, 2 * P, bias)
            for out, weight, order in zip(outs, (w_ih, w_hh, w_hh), (ih, hh, mid)):
                (want,) = on_shards(gemm.pack_rows, untouched(out.shape, dtype=dtype), weight, order)
                assert_same_bits(out, want)
            sizes = len(biases[0]), len(biases[1]), len(biases[1])
            want = [
                in_order(b[:, None], order).reshape(J, -1) if size else np.zeros((J, len(order) // J))
                for b, order, size in zip((bias_ih, bias_hh, bias_hh), (ih, hh, mid), sizes)
            ]
            np.testing.assert_array_equal(bias, np.concatenate(want, axis=1))
