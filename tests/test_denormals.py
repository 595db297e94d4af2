"""Numbers too small for a full mantissa: zero inside kernels, and untouched outside."""

import numpy as np
import pytest
from test_recurrent import everything_parallel, needs_threads

import nbrnn
from nbrnn.kernels import denormals

pytestmark = pytest.mark.skipif(not denormals.IS_X86, reason="nothing is changed on other processors")
TINY = {"float32": 1e-40, "float64": 1e-310}


def has_denormals(dtype):
    """Whether this thread computes with them."""
    return np.array([TINY[dtype]], dtype)[0] * np.array([0.5], dtype)[0] != 0


@pytest.mark.parametrize("dtype", TINY)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_layer_takes_them_for_zero_and_puts_the_mode_back(dtype, threads, monkeypatch):
    needs_threads(threads)
    nbrnn.set_num_threads(threads)
    everything_parallel(monkeypatch)
    layer = nbrnn.LSTM(5, 33, dtype=dtype, seed=0)
    assert has_denormals(dtype)
    zeros = np.zeros((7, 16, 5), dtype)
    y, _, pullback = layer.vjp(zeros + np.array(TINY[dtype], dtype))
    want, _, other = layer.vjp(zeros)
    np.testing.assert_array_equal(y, want)
    tiny = np.full(y.shape, TINY[dtype], dtype)
    dx, _, grads = pullback(tiny)
    assert (dx == 0).all()
    assert (grads.flat == 0).all()
    assert (other(np.zeros_like(y))[2].flat == 0).all()
    assert has_denormals(dtype)


@pytest.mark.parametrize("dtype", TINY)
def test_a_product_too_small_is_zero(dtype):
    small = np.sqrt(np.finfo(dtype).tiny) / 100
    dy = np.full((4, 3), small, dtype)
    x = np.full((4, 2), small, dtype)
    assert (dy.T @ x != 0).all()
    linear = nbrnn.Linear(2, 3, dtype=dtype, seed=0)
    _, _, grads = linear.vjp(x)[2](dy)
    assert (grads["weight"] == 0).all()
