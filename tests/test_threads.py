"""Threads: from many Python threads at once, on every threading layer, and after a fork."""

import os

import numba
import numpy as np
import pytest
from test_promises import everything
from test_recurrent import assert_same_bits

import nbrnn

LAYERS = pytest.mark.parametrize("layer", ["default", "workqueue"])

# Work that is large enough for a parallel region even where entering one is slow, and its results on one thread
COMMON = """
import os, sys, threading
import numba
import numpy as np
import nbrnn
from nbrnn.kernels.jit import threading_layer

layer, ctrnn = (kind(24, 64, dtype="float64", seed=0) for kind in (nbrnn.LSTM, nbrnn.CTRNN))
linear = nbrnn.Linear(24, 7, dtype="float64", seed=0)
firsts = [np.random.default_rng(n).normal(size=(1, 40, 64)) for n in range(8)]
xs = [np.random.default_rng(n).normal(size=(30, 40, 24)) for n in range(8)]
row = np.random.default_rng(9).normal(size=(30, 1, 24))

def work(n):
    y, _, pullback = layer.vjp(xs[n])
    dx, _, grads = pullback(y)
    arrays = [y, dx, grads.flat, layer(xs[n])[0], layer(row)[0]]
    y, _, pullback = ctrnn.vjp(xs[n], firsts[n])  # whose first states are computed
    arrays += [y, *pullback(y)[:2], ctrnn(xs[n], firsts[n])[0]]
    y, _, pullback = linear.vjp(xs[n])
    arrays += [y, pullback(y)[0], linear(xs[n])[0]]
    return [array.tobytes() for array in arrays]

nbrnn.set_num_threads(1)
serial = [work(n) for n in range(8)]
nbrnn.set_num_threads(2)
"""
CONCURRENT = """
assert "batch, 2 thread" in layer.explain(30, 40), layer.explain(30, 40)
wrong = []

def repeat(n):
    start.wait()
    for _ in range(5):
        if work(n) != serial[n]:
            wrong.append(n)

start = threading.Barrier(8)
threads = [threading.Thread(target=repeat, args=(n,)) for n in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not wrong, wrong
print(threading_layer())
"""
FORK = """
assert work(0) == serial[0]  # the threads of the pool have started

def child():
    return nbrnn.get_num_threads() == 1 and "serial" in layer.explain(30, 40) and work(1) == serial[1]

pid = os.fork()
if pid == 0:
    os._exit(0 if child() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert (nbrnn.get_num_threads(), work(2)) == (2, serial[2])  # the parent has lost nothing

import multiprocessing
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(work, range(4)) == serial[:4]
print(threading_layer())
"""


def on_layer(layer):
    variables = {"NUMBA_NUM_THREADS": "2"}
    return variables if layer == "default" else variables | {"NUMBA_THREADING_LAYER": layer}


@LAYERS
def test_eight_python_threads_at_once(layer, python):
    used = python(COMMON + CONCURRENT, **on_layer(layer)).strip()
    assert used == layer or layer == "default"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@LAYERS
def test_a_forked_child_computes_the_same(layer, python):
    used = python(COMMON + FORK, **on_layer(layer)).strip()
    assert used == layer or layer == "default"


# ------------------------------------------------------------------ the limit


def test_set_num_threads():
    most = numba.config.NUMBA_NUM_THREADS
    for n in range(1, most + 1):
        nbrnn.set_num_threads(n)
        assert nbrnn.get_num_threads() == n
    for n in (0, -1, most + 1):
        with pytest.raises(ValueError, match=f"^n: expected 1 to {most} threads, got {n}$"):
            nbrnn.set_num_threads(n)
    for n in (True, 1.0, "1", None):
        with pytest.raises(TypeError, match=r"^n: expected an integer, got "):
            nbrnn.set_num_threads(n)
    assert nbrnn.get_num_threads() == most


def test_numba_keeps_its_own_limit():
    before = numba.get_num_threads()
    if before < 2:
        pytest.skip("needs 2 threads")
    nbrnn.set_num_threads(2)
    two = everything("lstm", "float64", False, (4, 24, 150))
    assert numba.get_num_threads() == before
    try:
        numba.set_num_threads(1)
        assert_same_bits(everything("lstm", "float64", False, (4, 24, 150)), two)
        assert numba.get_num_threads() == 1
    finally:
        numba.set_num_threads(before)


def test_an_error_leaves_the_limit_alone():
    before = numba.get_num_threads()
    layer = nbrnn.LSTM(3, 4)
    with pytest.raises(ValueError, match="x: expected"):
        layer(np.zeros((2, 3, 4), np.float32))
    assert numba.get_num_threads() == before
