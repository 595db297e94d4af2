"""Register tiles against NumPy: every number of rows and columns, and bits that no neighbour changes."""

import numba
import numpy as np
import pytest
from test_simd import DTYPES, NEEDS_PAGES, UNTOUCHED, assert_same_bits, fenced, survives

from nbrnn.kernels import tiles
from nbrnn.kernels.jit import OPTIONS
from nbrnn.kernels.simd import REGISTERS, pointer, width
from nbrnn.kernels.tiles import column_groups, panel_width, rows_per_tile

VECTORS = pytest.mark.parametrize("vectors", [1, 2, 3, 4, 5])
ROWS = range(1, 21)
DEPTHS = (0, 1, 2, 7, 65)
COMPILE = OPTIONS

# ------------------------------------------------------------------ the kernels, on arrays


@numba.njit(**COMPILE)
def run_product(kernel, a, b, depth, start, ld_start, c, rows, columns):
    lda, ldc = a.shape[1], c.shape[1]
    a, b, start, c = pointer(a, 0), pointer(b, 0), pointer(start, 0), pointer(c, 0)
    tiles.product(kernel, a, lda, b, depth, start, ld_start, c, ldc, rows, columns, b)


@numba.njit(**COMPILE)
def run_outer(kernel, a, first, b, depth, c, rows, columns):
    lda, ldc = a.shape[1], c.shape[1]
    a, b, c = pointer(a, first), pointer(b, 0), pointer(c, 0)
    tiles.outer(kernel, a, lda, b, depth, c, ldc, c, ldc, rows, columns)


def product_of(vectors):
    return lambda a, *args: run_product(tiles.product_kernel(vectors, a.dtype), a, *args)


def outer_of(vectors):
    return lambda a, *args: run_outer(tiles.outer_kernel(vectors, a.dtype), a, *args)


def normal(*shape, dtype, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def edges(vectors, dtype):
    """Numbers of columns around the ends of vectors."""
    W, P = width(dtype), panel_width(vectors, dtype)
    return sorted({n for v in range(vectors + 1) for n in (v * W - 1, v * W, v * W + 1) if 0 < n <= P})


def assert_close(c, start, a, b):
    """c = start + a @ b up to the rounding of a chain of so many additions."""
    exact_a, exact_b, exact_start = (x.astype(np.float64) for x in (a, b, start))
    size = np.abs(exact_start) + np.abs(exact_a) @ np.abs(exact_b)
    error = np.abs(c - (exact_start + exact_a @ exact_b))
    assert (error <= (a.shape[1] + 2) * np.finfo(c.dtype).eps * size).all()


# ------------------------------------------------------------------ product


@VECTORS
@DTYPES
def test_product_equals_numpy_and_writes_nothing_else(vectors, dtype):
    P = panel_width(vectors, dtype)
    bias = normal(P, dtype=dtype)
    for depth in DEPTHS:
        a, b = normal(20, depth + 3, dtype=dtype), normal(depth, P, dtype=dtype)
        for rows in ROWS:
            for columns in edges(vectors, dtype) if rows in (1, 5, 20) else (P,):
                c = np.full((rows + 1, P + 2), UNTOUCHED, dtype)
                product_of(vectors)(a, b, depth, bias, 0, c, rows, columns)
                start = np.broadcast_to(bias[:columns], (rows, columns))
                assert_close(c[:rows, :columns], start, a[:rows, :depth], b[:, :columns])
                assert (c[:, columns:] == UNTOUCHED).all()
                assert (c[rows] == UNTOUCHED).all()


@VECTORS
@DTYPES
def test_product_adds_to_what_is_there(vectors, dtype):
    P, depth = panel_width(vectors, dtype), 9
    a, b = normal(20, depth, dtype=dtype), normal(depth, P, dtype=dtype)
    for rows in ROWS:
        before = normal(rows, P + 2, dtype=dtype, seed=1)
        c = before.copy()
        product_of(vectors)(a, b, depth, c, P + 2, c, rows, P - 1)
        assert_close(c[:, : P - 1], before[:, : P - 1], a[:rows], b[:, : P - 1])
        assert_same_bits(c[:, P - 1 :].copy(), before[:, P - 1 :].copy())


@VECTORS
@DTYPES
def test_bits_of_a_row_do_not_depend_on_the_rows_and_columns_around_it(vectors, dtype):
    P, depth = panel_width(vectors, dtype), 65
    a, b, bias = normal(20, depth, dtype=dtype), normal(depth, P, dtype=dtype), normal(P, dtype=dtype, seed=1)
    alone = np.empty((20, P), dtype)
    for row in range(20):
        product_of(vectors)(a[row : row + 1], b, depth, bias, 0, alone[row : row + 1], 1, P)
    for rows in ROWS:
        for columns in (1, P - 1, P):
            c = np.empty((rows, P), dtype)
            product_of(vectors)(a, b, depth, bias, 0, c, rows, columns)
            assert_same_bits(c[:, :columns].copy(), alone[:rows, :columns].copy())


@VECTORS
@DTYPES
def test_bits_of_a_sum_do_not_depend_on_where_its_depth_is_cut(vectors, dtype):
    P, depth = panel_width(vectors, dtype), 40
    a, b, bias = normal(7, depth, dtype=dtype), normal(depth, P, dtype=dtype), normal(P, dtype=dtype, seed=1)
    whole, parts = np.empty((7, P), dtype), np.empty((7, P), dtype)
    product_of(vectors)(a, b, depth, bias, 0, whole, 7, P)
    product_of(vectors)(a[:, :13].copy(), b, 13, bias, 0, parts, 7, P)
    product_of(vectors)(a[:, 13:].copy(), b[13:], depth - 13, parts, P, parts, 7, P)
    assert_same_bits(parts, whole)


@DTYPES
def test_nan_stays_in_its_row(dtype):
    P = panel_width(4, dtype)
    a, b = normal(20, 9, dtype=dtype), normal(9, P, dtype=dtype)
    a[11, 4] = np.nan
    c = np.empty((20, P), dtype)
    product_of(4)(a, b, 9, np.zeros(P, dtype), 0, c, 20, P)
    assert np.isnan(c[11]).all()
    assert np.isfinite(np.delete(c, 11, axis=0)).all()


# ------------------------------------------------------------------ outer


@VECTORS
@DTYPES
def test_outer_equals_numpy_and_writes_nothing_else(vectors, dtype):
    P = panel_width(vectors, dtype)
    for depth in DEPTHS:
        a, b = normal(depth, 23, dtype=dtype), normal(depth + 1, P, dtype=dtype)
        for rows in ROWS:
            for columns in edges(vectors, dtype) if rows in (1, 5, 20) else (P,):
                before = normal(rows + 1, P + 2, dtype=dtype, seed=1)
                c = before.copy()
                outer_of(vectors)(a, 0, b, depth, c, rows, columns)
                assert_close(c[:rows, :columns], before[:rows, :columns], a[:, :rows].T, b[:depth, :columns])
                assert_same_bits(c[:, columns:].copy(), before[:, columns:].copy())
                assert_same_bits(c[rows], before[rows])


@VECTORS
@DTYPES
def test_bits_of_outer_do_not_depend_on_its_neighbours_either(vectors, dtype):
    P, depth = panel_width(vectors, dtype), 33
    a, b = normal(depth, 20, dtype=dtype), normal(depth, P, dtype=dtype)
    whole = np.zeros((20, P), dtype)
    outer_of(vectors)(a, 0, b, depth, whole, 20, P)
    for row in range(20):
        alone = np.zeros((1, P), dtype)
        outer_of(vectors)(a, row, b, depth, alone, 1, P)
        assert_same_bits(alone[0], whole[row])


# ------------------------------------------------------------------ memory


@NEEDS_PAGES
@VECTORS
@DTYPES
def test_nothing_beyond_the_arrays_is_read(vectors, dtype):
    P = panel_width(vectors, dtype)

    def products(depth, rows, columns):
        a, b, start = (fenced(np.ones(shape, dtype)) for shape in ((rows, depth), (depth, P), columns))
        c = fenced(np.ones((rows, columns), dtype))
        product_of(vectors)(a, b, depth, start, 0, c, rows, columns)
        a, b = fenced(np.ones((depth, rows), dtype)), fenced(np.ones((depth, P), dtype))
        outer_of(vectors)(a, 0, b, depth, c, rows, columns)

    def all_sizes():
        for depth in (0, 1, 9):
            for rows in (1, 3, 8, 13):
                for columns in edges(vectors, dtype):
                    products(depth, rows, columns)

    products(1, 1, P)  # compile before the fork
    assert survives(all_sizes)


# ------------------------------------------------------------------ shapes


def test_tiles_fit_the_registers():
    for vectors in range(1, 7):
        groups = column_groups(vectors)
        assert sum(groups) == vectors
        for group in groups:
            # accumulators, one vector of each column, and the broadcast factor
            assert rows_per_tile(group) >= 1
            assert rows_per_tile(group) * group + group + 1 <= REGISTERS
