"""What layers with narrow factors promise, whatever those are; `test_half` and `test_int8` say what they compute."""

import numpy as np
import pytest
from test_half import assert_same_bits, normal
from test_recurrent import SCHEDULES, everything_parallel, force, needs_threads

import nbrnn
from nbrnn.kernels import jit
from nbrnn.kernels.products import NARROW
from nbrnn.kernels.schedule import Schedule

PRODUCTS = pytest.mark.parametrize("products", NARROW)
KIND = pytest.mark.parametrize("kind", ["LSTM", "GRU"])


@PRODUCTS
def test_tokens_are_their_one_hot_rows(products):
    layer, tokens = nbrnn.LSTM(7, 20, products=products, seed=0), np.random.default_rng(0).integers(0, 7, (5, 3))
    y, state = layer(tokens)
    want, want_state = layer(np.eye(7, dtype="f4")[tokens])
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-6)
    np.testing.assert_allclose(state[1], want_state[1], rtol=0, atol=1e-6)


@KIND
@PRODUCTS
def test_rows_chunks_threads_and_streams_have_the_same_bits(kind, products, monkeypatch):
    layer, x = getattr(nbrnn, kind)(9, 70, 2, products=products, seed=0), normal(12, 35, 9)
    y, _ = layer(x)
    for rows in (slice(0, 1), slice(3, 20), slice(34, 35)):
        assert_same_bits([layer(x[:, rows])[0]], [y[:, rows]])
    one, between = layer(x[:5])
    assert_same_bits([one, layer(x[5:], between)[0]], [y[:5], y[5:]])
    session = layer.stream(35)
    assert_same_bits([session.step(x[t]).copy() for t in range(12)], list(y))
    lengths = np.random.default_rng(1).integers(0, 13, 35)
    ragged, _ = layer(x, lengths=lengths)
    for row, length in enumerate(lengths):
        assert_same_bits([ragged[:length, row]], [y[:length, row]])
    tokens = np.random.default_rng(2).integers(0, 9, (12, 3))
    session, want = layer.stream(3), layer(tokens)[0]
    assert_same_bits([session.step(one).copy() for one in tokens], list(want))
    for count in (1, jit.numba.config.NUMBA_NUM_THREADS):
        monkeypatch.setattr(jit, "_limit", count)
        assert_same_bits([layer(x)[0], layer(x[:, :3])[0]], [y, y[:, :3]])


@KIND
def test_gradients_have_the_same_bits_on_any_number_of_threads(kind, monkeypatch):
    layer, x, results = getattr(nbrnn, kind)(9, 70, products="bfloat16", seed=0), normal(12, 35, 9), []
    for count in (1, jit.numba.config.NUMBA_NUM_THREADS):
        monkeypatch.setattr(jit, "_limit", count)
        y, _, pullback = layer.vjp(x)
        dx, _, grads = pullback(normal(*y.shape, seed=2))
        results.append([y, dx, grads.flat])
    assert_same_bits(*results)


@PRODUCTS
def test_every_schedule_gives_the_same_bits(products, monkeypatch):
    needs_threads(2)
    everything_parallel(monkeypatch)
    for B in (1, 5, 20):
        layer, x = nbrnn.LSTM(9, 150, 2, bidirectional=True, products=products, seed=0), normal(7, B, 9)
        results = []
        for forced in SCHEDULES:
            force(layer, Schedule(*forced, "forced"), monkeypatch)
            results.append(layer(x)[0])
        assert_same_bits(results, results[:1] * len(results))


@PRODUCTS
def test_the_configuration_tells_of_them(products):
    layer = nbrnn.LSTM(3, 5, products=products, seed=0)
    again, x = nbrnn.LSTM(**layer.config()), normal(4, 2, 3)
    again.params.flat[:] = layer.params.flat
    assert_same_bits([again(x)[0]], [layer(x)[0]])
