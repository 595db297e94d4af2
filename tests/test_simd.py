"""Lanes against NumPy: every operator bit by bit, and loads and stores that touch nothing beyond their count."""

import ctypes
import faulthandler
import mmap
import operator
import os
import sys
from functools import lru_cache

import numba
import numpy as np
import pytest

from nbrnn.kernels import simd
from nbrnn.kernels.jit import OPTIONS
from nbrnn.kernels.simd import (
    clip,
    lane_max,
    lane_sum,
    lanes_of,
    load,
    load_many,
    pointer,
    shift,
    store,
    store_many,
    store_padded,
    where_less,
    width,
)

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
COMPILE = {**OPTIONS, "cache": False}
UNTOUCHED = -77.0


def numbers(count, dtype, seed=0):
    """Numbers of many sizes and both signs."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=count) * 10.0 ** rng.integers(-3, 4, count)).astype(dtype)


def counts(dtype):
    """Every count of lanes: none, some, all, more than there are."""
    return range(width(dtype) + 3)


def assert_same_bits(got, want):
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got.view(f"u{got.itemsize}"), want.view(f"u{want.itemsize}"))


# ------------------------------------------------------------------ operators

BINARY = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "iadd": operator.iadd,
    "isub": operator.isub,
    "imul": operator.imul,
}
DIVISIONS = {"truediv": operator.truediv, "itruediv": operator.itruediv}


@lru_cache(None)
def on_lanes(operation):
    """``operation(lanes, lanes)`` of a vector's worth of numbers."""

    @numba.njit(**COMPILE)
    def apply(x, y, out):
        store(pointer(out, 0), operation(load(pointer(x, 0), len(x)), load(pointer(y, 0), len(y))), len(out))

    def call(x, y):
        out = np.empty_like(x)
        apply(x, y, out)
        return out

    return call


@DTYPES
@pytest.mark.parametrize("name", BINARY)
def test_operators_on_two_lanes(name, dtype):
    x, y = numbers(width(dtype), dtype), numbers(width(dtype), dtype, seed=1)
    assert_same_bits(on_lanes(BINARY[name])(x, y), BINARY[name](x.copy(), y))


@DTYPES
@pytest.mark.parametrize("name", DIVISIONS)
def test_division(name, dtype):
    x, y = numbers(width(dtype), dtype), numbers(width(dtype), dtype, seed=1)
    # Reciprocals are allowed, so the last bit may differ.
    np.testing.assert_array_max_ulp(on_lanes(DIVISIONS[name])(x, y), x / y, maxulp=1)


@numba.njit(**COMPILE)
def all_mixed(x, number, out):
    W = lanes_of(pointer(x, 0))
    value = load(pointer(x, 0), W)
    results = (
        value + number, number + value,
        value - number, number - value,
        value * number, number * value,
        value / number, number / value,
        -value, value + 1, 3 * value, 0.1 * value,
    )  # fmt: skip
    store_many(pointer(out, 0), W, results, W)


@DTYPES
@pytest.mark.parametrize("number", [0.1, 3, np.float32(0.1), np.int64(-7)], ids=repr)
def test_numbers_broadcast_in_the_precision_of_the_lanes(number, dtype):
    x = numbers(width(dtype), dtype)
    out = np.empty((12, width(dtype)), dtype)
    all_mixed(x, number, out)
    n, tenth = dtype(number), dtype(0.1)
    with np.errstate(divide="ignore"):
        want = [x + n, n + x, x - n, n - x, x * n, n * x, x / n, n / x, -x, x + dtype(1), dtype(3) * x, tenth * x]
    for line, (got, expected) in enumerate(zip(out, want)):
        if line in (6, 7):
            np.testing.assert_array_max_ulp(got, expected, maxulp=1)
        else:
            assert_same_bits(got, expected)


@DTYPES
def test_operators_let_nan_and_infinity_through(dtype):
    W = width(dtype)
    x = np.resize(np.array([np.nan, np.inf, -np.inf, 1], dtype), W)
    y = np.resize(np.array([1, np.inf], dtype), W)
    for operation in (*BINARY.values(), *DIVISIONS.values()):
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(on_lanes(operation)(x, y), operation(x.copy(), y))


# ------------------------------------------------------------------ selection


@numba.njit(**COMPILE)
def all_selections(a, b, x, y, out):
    W = lanes_of(pointer(a, 0))
    a, b, x, y = (load(pointer(a, 0), W), load(pointer(b, 0), W), load(pointer(x, 0), W), load(pointer(y, 0), W))
    results = (
        where_less(a, b, x, y),
        where_less(a, 0.5, x, 0.25),
        where_less(0.5, a, 2, y),
        clip(x, -1.0, 1),
        clip(x, a, b),
    )
    store_many(pointer(out, 0), W, results, W)


@DTYPES
def test_where_less_and_clip_with_nan(dtype):
    W = width(dtype)
    special = np.array([np.nan, -np.inf, np.inf, 0.0, 0.5, -0.5, 1.0, -3.0], dtype)
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b, x, y = (rng.choice(special, W) for _ in range(4))
        a, b = np.where(a > b, b, a), np.where(a > b, a, b)
        out = np.empty((5, W), dtype)
        all_selections(a, b, x, y, out)
        np.testing.assert_array_equal(out[0], np.where(a < b, x, y))
        np.testing.assert_array_equal(out[1], np.where(a < 0.5, x, dtype(0.25)))
        np.testing.assert_array_equal(out[2], np.where(a > 0.5, dtype(2), y))
        np.testing.assert_array_equal(out[3], np.clip(x, -1, 1))
        # A bound that is NaN is no bound.
        low, high = np.where(np.isnan(a), -np.inf, a), np.where(np.isnan(b), np.inf, b)
        np.testing.assert_array_equal(out[4], np.clip(x, low, high))


# ------------------------------------------------------------------ sums and maxima


@numba.njit(**COMPILE)
def fold(x):
    value = load(pointer(x, 0), len(x))
    return lane_sum(value), lane_max(value)


def pairwise(x):
    """The sum of both halves, until one number is left."""
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


@DTYPES
def test_sum_has_one_order_and_max_is_exact(dtype):
    for seed in range(20):
        x = numbers(width(dtype), dtype, seed)
        total, largest = fold(x)
        assert total == pairwise(x)
        assert largest == x.max()


@DTYPES
def test_nan_in_any_lane_reaches_sum_and_max(dtype):
    for lane in range(width(dtype)):
        x = numbers(width(dtype), dtype)
        x[lane] = np.nan
        assert np.isnan(fold(x)).all()
        x[lane] = np.inf
        assert fold(x) == (np.inf, np.inf)
    x[:] = -np.inf
    assert fold(x)[1] == -np.inf


# ------------------------------------------------------------------ memory


@numba.njit(**COMPILE)
def copy(x, count, out, stored):
    store(pointer(out, 0), load(pointer(x, 0), count), stored)


@numba.njit(**COMPILE)
def fill(out, number, count):
    store(shift(pointer(out, 0), 1), number, count)


@DTYPES
def test_load_takes_so_many_lanes_and_zeros_behind_them(dtype):
    W, x = width(dtype), numbers(width(dtype) + 3, dtype)
    for count in counts(dtype):
        out = np.full(W + 3, UNTOUCHED, dtype)
        copy(x, count, out, W)
        want = np.where(np.arange(W) < count, x[:W], 0)
        np.testing.assert_array_equal(out, np.concatenate([want, np.full(3, UNTOUCHED)]))


@DTYPES
def test_store_leaves_the_rest_alone(dtype):
    W, x = width(dtype), numbers(width(dtype) + 3, dtype)
    for count in counts(dtype):
        out = np.full(W + 3, UNTOUCHED, dtype)
        copy(x, W, out, count)
        np.testing.assert_array_equal(out[: min(count, W)], x[: min(count, W)])
        assert (out[min(count, W) :] == UNTOUCHED).all()
        out[:] = UNTOUCHED
        fill(out, 2, count)
        assert (out[1 : 1 + min(count, W)] == 2).all()
        assert out[0] == UNTOUCHED
        assert (out[1 + min(count, W) :] == UNTOUCHED).all()


@numba.njit(**COMPILE)
def copy_many(x, stride, count, out, ld, stored):
    store_many(pointer(out, 0), ld, load_many(pointer(x, 0), stride, count, 3), stored)


@numba.njit(**COMPILE)
def copy_padded(x, stride, out, ld, count):
    W = lanes_of(pointer(x, 0))
    first, second = load_many(pointer(x, 0), stride, W, 2)
    store_padded(pointer(out, 0), ld, (first, 5.0, second), count)


@DTYPES
def test_load_many_and_store_many(dtype):
    W, stride, ld = width(dtype), width(dtype) + 1, width(dtype) + 2
    x = numbers(3 * stride, dtype)
    for count in counts(dtype):
        for stored in counts(dtype):
            out = np.full((3, ld), UNTOUCHED, dtype)
            copy_many(x, stride, count, out, ld, stored)
            want = np.full((3, ld), UNTOUCHED, dtype)
            loaded = np.where(np.arange(W) < count, x.reshape(3, stride)[:, :W], 0)
            want[:, : min(stored, W)] = loaded[:, : min(stored, W)]
            np.testing.assert_array_equal(out, want)


@DTYPES
def test_store_padded_fills_up_with_zeros(dtype):
    W, stride, ld = width(dtype), width(dtype) + 1, width(dtype) + 2
    x = numbers(2 * stride, dtype)
    for count in counts(dtype):
        out = np.full((3, ld), UNTOUCHED, dtype)
        copy_padded(x, stride, out, ld, count)
        want = np.full((3, ld), UNTOUCHED, dtype)
        want[:, :W] = np.where(np.arange(W) < count, [x[:W], np.full(W, 5), x[stride : stride + W]], 0)
        np.testing.assert_array_equal(out, want)


def test_an_empty_tuple_stores_nothing():
    @numba.njit(**COMPILE)
    def nothing(out):
        store_many(pointer(out, 0), 0, (), 3)
        store_padded(pointer(out, 0), 0, (), 3)

    out = np.ones(3, np.float32)
    nothing(out)
    assert (out == 1).all()


# ------------------------------------------------------------------ the page behind


def fenced(array):
    """A copy that ends where a page begins that nobody may touch: an access beyond the end kills the process."""
    pages = -(-max(array.nbytes, 1) // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fence = ctypes.c_void_p(address + pages * mmap.PAGESIZE)
    assert ctypes.CDLL(None, use_errno=True).mprotect(fence, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    start = pages * mmap.PAGESIZE - array.nbytes
    result = np.frombuffer(memory, array.dtype, array.size, start).reshape(array.shape)
    result[...] = array
    return result


def survives(function, *args):
    """Whether ``function(*args)`` in a forked child ends without a signal."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        function(*args)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


NEEDS_PAGES = pytest.mark.skipif(sys.platform != "linux", reason="mprotect and fork as on Linux")


@NEEDS_PAGES
@DTYPES
def test_nothing_beyond_the_count_is_touched(dtype):
    W = width(dtype)

    def access(x, out, count):
        copy(x, count, out, count)
        copy_many(x, 0, count, out, 0, count)

    copy_many(np.ones(W, dtype), 0, 1, np.ones(W, dtype), 0, 1)  # compile before the fork
    copy(np.ones(W, dtype), 1, np.ones(W, dtype), 1)
    for count in range(W + 1):
        assert survives(access, fenced(numbers(count, dtype)), fenced(numbers(count, dtype)), count), count
    # The fence works: one lane too many, and the child is dead.
    assert not survives(access, fenced(numbers(1, dtype)), np.empty(W, dtype), 2)
    assert not survives(access, np.empty(W, dtype), fenced(numbers(1, dtype)), 2)


# ------------------------------------------------------------------ the host


def test_width_follows_from_the_vector_size():
    assert simd.VECTOR_BYTES in (16, 32, 64)
    assert (width(np.float32), width("float64")) == (simd.VECTOR_BYTES // 4, simd.VECTOR_BYTES // 8)
    assert simd.REGISTERS in (16, 32)
    assert simd.instruction_set() in ("AVX-512", "AVX2", "SSE", "NEON")
