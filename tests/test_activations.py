"""Activations on lanes against float64 and long double: the errors that their documentation states, and the edges."""

import re

import numba
import numpy as np
import pytest

from nbrnn.kernels import activations
from nbrnn.kernels.jit import OPTIONS
from nbrnn.kernels.simd import lanes_of, load, pointer, store, width

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
SMOOTH = pytest.mark.parametrize("name", ["exp", "sigmoid", "tanh", "softplus"])
SAMPLES = 200_000

# ------------------------------------------------------------------ the functions, on arrays


def on_arrays(function):
    """The function of lanes as one of whole arrays."""

    @numba.njit(**OPTIONS | {"cache": False})
    def apply(x, y):
        for n in range(0, len(x), lanes_of(pointer(x, 0))):
            store(pointer(y, n), function(load(pointer(x, n), len(x) - n)), len(x) - n)

    def call(x):
        y = np.empty_like(x)
        apply(x, y)
        return y

    return call


OURS = {name: on_arrays(getattr(activations, name)) for name in ("exp", "sigmoid", "tanh", "softplus")}


def exact(name, x):
    """The same function with more digits than x has."""
    x = x.astype(np.float64 if x.dtype == np.float32 else np.longdouble)
    with np.errstate(over="ignore", under="ignore"):
        functions = {"exp": np.exp, "tanh": np.tanh, "sigmoid": lambda x: 1 / (1 + np.exp(-x))}
        return (functions | {"softplus": lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))})[name](x)


def has_reference(dtype):
    if dtype == np.float64 and np.finfo(np.longdouble).nmant <= np.finfo(np.float64).nmant:
        pytest.skip("long double is no longer than double here")


def stated(name, dtype):
    """The largest error that the module's documentation states, in units in the last place."""
    row = re.search(rf"^ +{name} +([\d.]+) +([\d.]+) +\S", activations.__doc__, re.MULTILINE)
    assert row, f"no row for {name} in the documentation"
    return float(row[1 if dtype == np.float32 else 2])


# ------------------------------------------------------------------ samples


def smallest_normal_result(name, dtype):
    """The x from which on the stated errors hold."""
    if name == "tanh":
        return -np.inf
    if name == "sigmoid":
        return -87.0 if dtype == np.float32 else -708.0
    return np.log(np.finfo(dtype).tiny)


def samples(name, dtype):
    """Numbers of all kinds at which the result is a normal number: dense, tails, near 0, and random bit patterns."""
    rng = np.random.default_rng(0)
    end = 88.7 if dtype == np.float32 else 709.7
    bits = np.frombuffer(rng.bytes(SAMPLES * np.dtype(dtype).itemsize), dtype)
    tiny = np.logspace(np.log10(np.finfo(dtype).tiny), 0, SAMPLES)
    # Where the reduction of the exponent changes from one power of two to the next
    edges = ((np.arange(-1100, 1100) + 0.5) * np.log(2) * np.array([[0.5], [1]])).ravel().astype(dtype)
    x = np.concatenate(
        [
            np.linspace(-end, end, SAMPLES),
            np.linspace(-2, 2, SAMPLES),
            rng.normal(0, 5, SAMPLES),
            tiny,
            -tiny,
            edges,
            np.nextafter(edges, dtype(-np.inf)),
            np.nextafter(edges, dtype(np.inf)),
        ]
    )
    x = np.concatenate([x.astype(dtype), bits])
    x = x[np.isfinite(x) & (x > smallest_normal_result(name, dtype))]
    return x if name != "exp" else x[x <= end]


# ------------------------------------------------------------------ accuracy


@SMOOTH
@DTYPES
def test_errors_are_as_small_as_documented(name, dtype):
    has_reference(dtype)
    x = samples(name, dtype)
    assert len(x) > 3 * SAMPLES
    want = exact(name, x)
    unit = np.maximum(np.spacing(np.abs(want.astype(dtype))), np.finfo(dtype).smallest_subnormal)
    errors = np.abs(OURS[name](x).astype(want.dtype) - want) / unit
    worst = errors.argmax()
    assert errors[worst] <= stated(name, dtype), f"{name}({x[worst]!r})"
    # The documented bound is neither generous nor larger than what is asked for.
    assert errors[worst] > stated(name, dtype) / 4
    assert stated(name, dtype) <= 4


@DTYPES
def test_sigmoid_is_relatively_accurate_in_its_tail_and_constant_beyond(dtype):
    end = 87 if dtype == np.float32 else 708
    x = np.linspace(-end, -20, SAMPLES).astype(dtype)
    np.testing.assert_allclose(OURS["sigmoid"](x), exact("sigmoid", x), rtol=4 * np.finfo(dtype).eps, atol=0)
    beyond = np.array([-end - 1, -2 * end, -1e30], dtype)
    assert (OURS["sigmoid"](beyond) == OURS["sigmoid"](np.array([-end], dtype))).all()
    assert OURS["sigmoid"](beyond)[0] < 2 * np.finfo(dtype).tiny


@DTYPES
def test_exp_goes_to_zero_through_the_subnormal_numbers(dtype):
    has_reference(dtype)
    floor, smallest = np.log(np.finfo(dtype).tiny), np.finfo(dtype).smallest_subnormal
    x = np.linspace(floor - 20, floor, 2000).astype(dtype) if dtype == np.float32 else np.linspace(-747, floor, 2000)
    want = exact("exp", x)
    error = np.abs(OURS["exp"](x).astype(want.dtype) - want)
    assert (error <= 2 * stated("exp", dtype) * smallest).all()


# ------------------------------------------------------------------ edges


@DTYPES
def test_special_values(dtype):
    x = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0], dtype)
    expected = {
        "exp": [np.nan, np.nan, np.inf, 0, 1, 1],
        "sigmoid": [np.nan, np.nan, 1, 0, 0.5, 0.5],
        "tanh": [np.nan, np.nan, 1, -1, 0, 0],
        "softplus": [np.nan, np.nan, np.inf, 0, np.log(2), np.log(2)],
    }
    for name, values in expected.items():
        # sigmoid ends at the smallest normal numbers, not at 0
        eps, tiny = np.finfo(dtype).eps, np.finfo(dtype).tiny
        np.testing.assert_allclose(OURS[name](x), values, rtol=2 * eps, atol=2 * tiny, err_msg=name)


@SMOOTH
@DTYPES
def test_results_stay_in_range_and_never_turn_back_far(name, dtype):
    x = np.sort(samples(name, dtype))
    y = OURS[name](x)
    low, high = {"exp": (0, np.inf), "sigmoid": (0, 1), "tanh": (-1, 1), "softplus": (0, np.inf)}[name]
    assert y.min() >= low
    assert y.max() <= high
    # y may fall by its rounding errors only.
    assert (np.diff(y) >= -2 * stated(name, dtype) * np.spacing(np.abs(y[1:]))).all()


@DTYPES
@pytest.mark.parametrize("name", OURS)
def test_a_result_does_not_depend_on_its_lane_or_on_the_length(name, dtype):
    W = width(dtype)
    x = np.random.default_rng(2).normal(0, 3, 3 * W).astype(dtype)
    whole = OURS[name](x)
    for first in range(W):
        for stop in range(first + 1, len(x)):
            np.testing.assert_array_equal(OURS[name](x[first:stop]), whole[first:stop])
