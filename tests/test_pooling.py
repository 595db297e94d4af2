"""Pooling over time and repetition: against plain NumPy, finite differences, and every promise about bits."""

import re

import numpy as np
import oracle
import pytest
from test_recurrent import assert_same_bits, everything_parallel, needs_threads

import nbrnn
from nbrnn.data.ragged import Ragged
from nbrnn.layers.module import Parameters
from nbrnn.layers.pooling import AttentionPooling, LastStep, MaxPooling, MeanPooling, RepeatSteps

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
POOLS = {
    "last": lambda I, **options: LastStep(**options),
    "mean": lambda I, **options: MeanPooling(**options),
    "max": lambda I, **options: MaxPooling(**options),
    "attention": lambda I, **options: AttentionPooling(I, hidden_size=21, seed=0, **options),
}
POOL = pytest.mark.parametrize("pool", POOLS)
# Within one vector, beyond several, and not a whole number of them
SIZE = pytest.mark.parametrize("I", [3, 16, 37])
LENGTHS = np.array([4, 0, 7, 1, 6])


def normal(*shape, seed=0, dtype="float64"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def raises(kind, message):
    """The error has exactly this text."""
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


def ragged(I, dtype="float64", lengths=LENGTHS):
    return Ragged(normal(sum(lengths), I, dtype=dtype), np.append(0, np.cumsum(lengths)))


def padded(batch, batch_first=False):
    """(T, B, I) with NaN in the padding, longer than the longest sequence."""
    x = np.full((9, len(batch), batch.values.shape[1]), np.nan, batch.dtype)
    short, _ = batch.to_padded(fill=np.nan)
    x[: len(short)] = short
    return np.ascontiguousarray(x.swapaxes(0, 1)) if batch_first else x


def results(module, x, dy, **call):
    """Everything of inference and training as arrays by name."""
    inference, state_n = module(x, **call)
    y, state_v, pullback = module.vjp(x, **call)
    dx, dstate0, grads = pullback(dy)
    assert (state_n, state_v, dstate0) == (None, None, None)
    assert isinstance(dx, Ragged) == isinstance(x, Ragged)
    dx = dx.values if isinstance(dx, Ragged) else dx
    return {"inference": inference, "y": y, "dx": dx, **{name: array.copy() for name, array in grads.items()}}


# ------------------------------------------------------------------ plain NumPy, one sequence at a time


def reference(pool, module, x):
    """The pooled row of one sequence (L, I), in float64."""
    x = x.astype(np.float64)
    if not len(x):
        return np.zeros(x.shape[1])
    if pool == "attention":
        V, b, w = (module.params[name].astype(np.float64) for name in ("weight", "bias", "score"))
        a = np.tanh(x @ V.T + b) @ w
        p = np.exp(a - a.max())
        return p @ x / p.sum()
    return {"last": x[-1], "mean": x.mean(axis=0), "max": x.max(axis=0)}[pool]


@POOL
@SIZE
@DTYPES
def test_pooling_agrees_with_numpy_in_every_form(pool, I, dtype):
    module, batch = POOLS[pool](I, dtype=dtype), ragged(I, dtype)
    want = np.array([reference(pool, module, one) for one in batch])
    rows_first = POOLS[pool](I, dtype=dtype, batch_first=True)
    even = np.stack([normal(6, I, seed=n, dtype=dtype) for n in range(5)], axis=1)
    pairs = [
        (module(batch)[0], want),
        (module(padded(batch), lengths=LENGTHS)[0], want),
        (rows_first(padded(batch, True), lengths=list(LENGTHS))[0], want),
        (module(batch[2])[0], want[2]),
        (module(padded(batch)[:, 2], lengths=7)[0], want[2]),
        (module(even)[0], [reference(pool, module, even[:, b]) for b in range(5)]),
        (rows_first(even.swapaxes(0, 1))[0], module(even)[0]),
    ]
    for got, right in pairs:
        assert got.dtype == dtype
        np.testing.assert_allclose(got, right, rtol=0, atol=16 * np.finfo(dtype).eps)


@POOL
@pytest.mark.parametrize("form", ["ragged", "padded", "batch first", "even", "single"])
def test_gradients_against_finite_differences(pool, form):
    I = 5
    module, batch = POOLS[pool](I, dtype="float64", batch_first=form == "batch first"), ragged(I)
    x, call = {
        "ragged": (batch, {}),
        "padded": (padded(batch), {"lengths": LENGTHS}),
        "batch first": (padded(batch, True), {"lengths": LENGTHS}),
        "even": (normal(4, 3, I), {}),
        "single": (normal(4, I), {}),
    }[form]
    dy = normal(*module(x, **call)[0].shape, seed=1)
    got = results(module, x, dy, **call)
    values = x.values if form == "ragged" else x

    def loss():
        return np.vdot(module(x, **call)[0], dy)

    there = np.isfinite(values)
    assert (got["dx"][~there] == 0).all()
    assert oracle.relative_error(got["dx"], oracle.numeric_gradient(loss, values)) < 1e-7
    for name, array in module.params.items():
        assert oracle.relative_error(got[name], oracle.numeric_gradient(loss, array)) < 1e-7, name


@DTYPES
def test_the_gradient_of_a_maximum_goes_to_the_first_of_equals(dtype):
    x = np.array([[1, 5, -0.0], [3, 5, 0.0], [3, 2, -0.0], [0, 5, 0.0]], dtype)
    y, _, pullback = MaxPooling(dtype=dtype).vjp(x)
    np.testing.assert_array_equal(y, [3, 5, 0])
    y[:] = 77  # the caller's own
    dx, _, _ = pullback(np.array([7, 8, 9], dtype))
    np.testing.assert_array_equal(dx, [[0, 8, 9], [7, 0, 0], [0, 0, 0], [0, 0, 0]])


@DTYPES
def test_nan_and_infinity_of_a_maximum(dtype):
    nan, inf = np.nan, np.inf
    x = np.array([[1, nan, -inf, inf, nan], [nan, 2, -inf, inf, inf], [inf, nan, -inf, nan, 0]], dtype)
    y, _, pullback = MaxPooling(dtype=dtype).vjp(x)
    np.testing.assert_array_equal(y, [nan, nan, -inf, nan, nan])
    dx, _, _ = pullback(np.array([1, 2, 3, 4, nan], dtype))
    np.testing.assert_array_equal(dx, [[0, 2, 3, 0, nan], [1, 0, 0, 0, 0], [0, 0, 0, 4, 0]])


def test_attention_of_scores_of_any_size():
    """The largest score is taken off before exp, which would overflow."""
    module = AttentionPooling(2, dtype="float32", seed=0)
    module.params["weight"][...], module.params["bias"][...] = 20 * np.eye(2), 0
    module.params["score"][...] = 5000
    x = np.array([[-1, -1], [1, 1], [1, -1]], np.float32)
    y, _, pullback = module.vjp(x)
    np.testing.assert_array_equal(y, [1, 1])
    assert np.isfinite(pullback(np.ones(2, np.float32))[0]).all()


# ------------------------------------------------------------------ promises


@POOL
@SIZE
@DTYPES
def test_padded_with_lengths_is_the_same_as_ragged(pool, I, dtype):
    batch, dy = ragged(I, dtype), normal(len(LENGTHS), I, seed=1, dtype=dtype)
    want = results(POOLS[pool](I, dtype=dtype), batch, dy)
    there = np.arange(9) < LENGTHS[:, None]
    for rows_first in (False, True):
        module = POOLS[pool](I, dtype=dtype, batch_first=rows_first)
        x = padded(batch, rows_first)
        got = results(module, x, dy, lengths=LENGTHS)
        assert got["dx"].shape == x.shape
        dx = got["dx"] if rows_first else got["dx"].swapaxes(0, 1)
        assert (dx[~there] == 0).all()
        assert_same_bits(got | {"dx": dx[there]}, want)


@POOL
@SIZE
@DTYPES
def test_a_row_has_the_same_bits_alone_and_in_any_batch(pool, I, dtype):
    module, batch = POOLS[pool](I, dtype=dtype), ragged(I, dtype)
    dy = normal(len(LENGTHS), I, seed=1, dtype=dtype)
    whole = results(module, batch, dy)
    dx = batch.with_values(whole["dx"])
    for b, one in enumerate(batch):
        alone = results(module, one, dy[b])
        assert_same_bits(
            {"inference": whole["inference"][b], "y": whole["y"][b], "dx": dx[b]},
            {name: alone[name] for name in ("inference", "y", "dx")},
        )
    even = normal(6, 50, I, dtype=dtype)
    dys = normal(50, I, seed=1, dtype=dtype)
    many, few = results(module, even, dys), results(module, even[:, 11:14], dys[11:14])
    assert_same_bits({"y": many["y"][11:14], "dx": many["dx"][:, 11:14]}, {"y": few["y"], "dx": few["dx"]})


@POOL
@DTYPES
@pytest.mark.parametrize("I", [3, 100])
def test_one_and_two_threads_give_the_same_bits(pool, I, dtype, monkeypatch):
    needs_threads(2)
    everything_parallel(monkeypatch)
    module = POOLS[pool](I, dtype=dtype)
    even = normal(8, 30, I, dtype=dtype)
    for x in (ragged(I, dtype, [5, 0, 3, 40, 1, 20, 2]), ragged(I, dtype, [50]), even, even[:, 0]):
        dy, found = normal(*module(x)[0].shape, seed=1, dtype=dtype), []
        for threads in (1, 2):
            nbrnn.set_num_threads(threads)
            found.append(results(module, x, dy))
        assert_same_bits(*found)


@POOL
@DTYPES
@pytest.mark.parametrize("where", ["x", "dy"])
def test_nan_stays_in_its_row(pool, dtype, where):
    I, b = 19, 2
    module, batch, dy = POOLS[pool](I, dtype=dtype), ragged(I, dtype), normal(len(LENGTHS), I, seed=1, dtype=dtype)
    want = results(module, batch, dy)
    bad = batch.with_values(batch.values.copy())
    if where == "x":
        bad[b][-1, 5] = np.nan
    else:
        dy[b, 5] = np.nan
    got = results(module, bad, dy)
    others = np.arange(len(batch)) != b
    steps = np.repeat(others, LENGTHS)
    assert_same_bits({"y": got["y"][others], "dx": got["dx"][steps]}, {"y": want["y"][others], "dx": want["dx"][steps]})
    assert np.isnan(got["y" if where == "x" else "dx"]).any()
    if pool != "attention":  # no unit of these knows another one
        assert_same_bits(*({"y": np.delete(one["y"], 5, 1), "dx": np.delete(one["dx"], 5, 1)} for one in (got, want)))


@POOL
@DTYPES
def test_empty_sequences_give_zeros_and_get_no_gradient(pool, dtype):
    module = POOLS[pool](4, dtype=dtype)
    dy = normal(3, 4, dtype=dtype)
    forms = [
        (np.full((5, 3, 4), np.nan, dtype), {"lengths": [0, 0, 0]}),
        (np.empty((0, 3, 4), dtype), {}),
        (Ragged(np.empty((0, 4), dtype), [0, 0, 0, 0]), {}),
    ]
    for x, call in forms:
        found = results(module, x, np.full_like(dy, np.nan), **call)
        assert found["y"].shape == (3, 4)
        for name, array in found.items():
            assert (array == 0).all(), name
    assert results(module, np.empty((0, 4), dtype), dy[0])["y"].tolist() == [0, 0, 0, 0]
    assert results(module, np.empty((5, 0, 4), dtype), dy[:0])["y"].shape == (0, 4)


@POOL
def test_nothing_is_changed_and_gradients_overwrite_what_is_in_out(pool):
    module, batch, dy = POOLS[pool](6, dtype="float64"), ragged(6), normal(5, 6, seed=1)
    before = batch.values.copy(), dy.copy(), module.params.flat.copy()
    want = results(module, batch, dy)
    out = Parameters.zeros(module.params.shapes, module.dtype)
    out.flat[:] = np.nan
    pullback = module.vjp(batch)[2]
    for _ in range(2):
        dx, _, grads = pullback(dy, None, out=out)
        assert grads is out
        assert_same_bits({"dx": dx.values, **out}, {name: want[name] for name in ("dx", *out)})
    for array, old in zip((batch.values, dy, module.params.flat), before):
        np.testing.assert_array_equal(array, old)


# ------------------------------------------------------------------ RepeatSteps


@DTYPES
@SIZE
@pytest.mark.parametrize("batch_first", [False, True])
def test_repetition(batch_first, I, dtype):
    module, x = RepeatSteps(4, batch_first=batch_first, dtype=dtype), normal(3, I, dtype=dtype)
    dy = normal(*((3, 4) if batch_first else (4, 3)), I, seed=1, dtype=dtype)
    found = results(module, x, dy)
    want = np.repeat(x[:, None] if batch_first else x[None], 4, axis=int(batch_first))
    assert_same_bits({"y": found["y"], "inference": found["inference"]}, {"y": want, "inference": want})
    rows = dy.swapaxes(0, 1) if batch_first else dy
    in_order = rows[0] + rows[1] + rows[2] + rows[3]
    assert_same_bits({"dx": found["dx"]}, {"dx": in_order})
    alone = results(module, x[1], rows[:, 1])
    assert_same_bits({"y": alone["y"], "dx": alone["dx"]}, {"y": np.repeat(x[1:2], 4, axis=0), "dx": in_order[1]})


@DTYPES
def test_repetition_with_lengths(dtype):
    x, lengths = normal(3, 5, dtype=dtype), [2, 0, 4]
    there = np.arange(4) < np.array(lengths)[:, None]
    dy = normal(3, 4, 5, seed=1, dtype=dtype)
    dy[~there] = np.nan
    found = results(RepeatSteps(4, batch_first=True, dtype=dtype), x, dy, lengths=lengths)
    np.testing.assert_array_equal(found["y"], there[:, :, None] * x[:, None])
    np.testing.assert_array_equal(found["dx"][:2], [dy[0, 0] + dy[0, 1], np.zeros(5)])
    other = results(RepeatSteps(4, dtype=dtype), x, dy.swapaxes(0, 1), lengths=lengths)
    assert_same_bits({"y": other["y"].swapaxes(0, 1), "dx": other["dx"]}, {"y": found["y"], "dx": found["dx"]})


def test_gradient_of_repetition_against_finite_differences():
    module, x, dy = RepeatSteps(4, dtype="float64"), normal(3, 5), normal(4, 3, 5, seed=1)
    numeric = oracle.numeric_gradient(lambda: np.vdot(module(x)[0], dy), x)
    assert oracle.relative_error(module.vjp(x)[2](dy)[0], numeric) < 1e-7


@DTYPES
def test_repetition_keeps_nan_in_its_row_on_any_threads(dtype, monkeypatch):
    needs_threads(2)
    everything_parallel(monkeypatch)
    module, x, dy = RepeatSteps(9, dtype=dtype), normal(7, 30, dtype=dtype), normal(9, 7, 30, seed=1, dtype=dtype)
    x[2, 3] = dy[4, 5, 6] = np.nan
    found = []
    for threads in (1, 2):
        nbrnn.set_num_threads(threads)
        found.append(results(module, x, dy))
    assert_same_bits(*found)
    assert np.argwhere(np.isnan(found[0]["y"]))[:, 1:].tolist() == [[2, 3]] * 9
    assert np.argwhere(np.isnan(found[0]["dx"])).tolist() == [[5, 6]]


# ------------------------------------------------------------------ as modules


def test_attention_moves_its_parameters_into_a_sequential():
    alone, x = AttentionPooling(3, dtype="float64", seed=0), normal(4, 2, 3)
    y, values = alone(x)[0], alone.state_dict()
    model = nbrnn.Sequential(nbrnn.Linear(3, 3, dtype="float64", seed=1), alone)
    assert list(model.params) == ["0.weight", "0.bias", "1.weight", "1.bias", "1.score"]
    assert_same_bits(alone.state_dict(), values)
    np.testing.assert_array_equal(alone(x)[0], y)
    for name in values:
        assert np.shares_memory(alone.params[name], model.params[f"1.{name}"])
        before = alone(x)[0]
        model.params[f"1.{name}"][...] += np.random.default_rng(0).normal(size=values[name].shape)
        assert (alone(x)[0] != before).any(), name
    dy = normal(2, 3)
    _, _, pullback = model.vjp(x)
    _, _, grads = pullback(dy)
    for name, array in model.params.items():
        numeric = oracle.numeric_gradient(lambda: np.vdot(model(x)[0], dy), array)
        assert oracle.relative_error(grads[name], numeric) < 1e-7, name


@pytest.mark.parametrize("init", ["torch", "glorot", "orthogonal"])
def test_first_values_of_attention(init):
    one, two = (AttentionPooling(30, hidden_size=50, init=init, seed=5) for _ in range(2))
    assert one.params.shapes == {"weight": (50, 30), "bias": (50,), "score": (50,)}
    assert_same_bits(one.state_dict(), two.state_dict())
    bounds = {"weight": 1 / np.sqrt(30), "bias": 1 / np.sqrt(30), "score": 1 / np.sqrt(50)}
    if init != "torch":
        bounds = {"weight": np.sqrt(6 / 80), "bias": 0, "score": np.sqrt(6 / 51)}
    for name, bound in bounds.items():
        assert 0.8 * bound <= np.abs(one.params[name]).max() <= bound * (1 + 1e-6), name
    assert AttentionPooling(30).hidden_size == 30


@pytest.mark.parametrize(
    "module",
    [
        LastStep(True, "float64"),
        MeanPooling(dtype="float64"),
        MaxPooling(batch_first=True),
        AttentionPooling(3, hidden_size=4, batch_first=True, dtype="float64", init="glorot"),
        RepeatSteps(5, batch_first=True, dtype="float64"),
    ],
    ids=lambda module: type(module).__name__,
)
def test_config_builds_the_same_module(module):
    config = module.config()
    again = type(module)(**config)
    assert again.config() == config
    assert (again.dtype, again.batch_first) == (module.dtype, module.batch_first)
    assert again.params.shapes == module.params.shapes
    assert module.changes_time


# ------------------------------------------------------------------ errors


@POOL
def test_what_pooling_refuses(pool):
    module, batch = POOLS[pool](3), ragged(3, "float32")
    size = "3" if pool == "attention" else "I"
    x = normal(4, 2, 3, dtype="float32")
    with raises(TypeError, "x: expected float32 values, got int64; convert them with .astype('float32')"):
        module(np.zeros((4, 2, 3), int))
    for wrong in (np.zeros(3), np.zeros((1, 4, 2, 3))):
        with raises(ValueError, f"x: expected (T, B, {size}), got {wrong.shape}"):
            module(wrong)
    with raises(ValueError, f"x: expected (N, {size}), got (5,)"):
        module(Ragged(np.zeros(5), [0, 5]))
    with raises(ValueError, "lengths: expected None beside a Ragged, which has its own"):
        module(batch, lengths=LENGTHS)
    with raises(ValueError, "lengths: expected (2,), one for each row, got (3,)"):
        module.vjp(x, lengths=[1, 2, 3])
    with raises(ValueError, "lengths: expected (1,), one for each row, got (2,)"):
        module(x[:, 0], lengths=[1, 2])
    with raises(ValueError, "lengths: expected numbers from 0 to 4, got 1 to 5"):
        module(x, lengths=[1, 5])
    with raises(TypeError, "lengths: expected integers, got float64"):
        module(x, lengths=[1.0, 2.0])
    for given, shape in ((x, (2, 3)), (x[:, 0], (3,)), (batch, (5, 3))):
        with raises(ValueError, f"dy: expected {shape}, got (4, 4)"):
            module.vjp(given)[2](np.zeros((4, 4)))
    with raises(TypeError, "dy: expected float32 values, got int64; convert them with .astype('float32')"):
        module.vjp(batch)[2](np.zeros((5, 3), int))
    with raises(ValueError, "dtype: expected float32 or float64, got 'int8'"):
        POOLS[pool](3, dtype="int8")


def test_what_attention_refuses():
    x = normal(4, 2, 3, dtype="float32")
    with raises(ValueError, "x: expected (T, B, 4), got (4, 2, 3)"):
        AttentionPooling(4)(x)
    with raises(ValueError, "x: expected (B, T, 4), got (4, 2, 3)"):
        AttentionPooling(4, batch_first=True)(x)
    with raises(ValueError, "x: expected (T, 4), got (4, 3)"):
        AttentionPooling(4)(x[:, 0])
    with raises(ValueError, "input_size: expected at least 1, got 0"):
        AttentionPooling(0)
    with raises(TypeError, "hidden_size: expected an integer, got 2.0"):
        AttentionPooling(4, hidden_size=2.0)
    with raises(ValueError, "init: expected one of torch, glorot, orthogonal, got 'zeros'"):
        AttentionPooling(4, init="zeros")


def test_what_repetition_refuses():
    module = RepeatSteps(3)
    with raises(ValueError, "steps: expected at least 1, got 0"):
        RepeatSteps(0)
    with raises(ValueError, "x: expected (B, I), got (2, 3, 4)"):
        module(np.zeros((2, 3, 4)))
    with raises(TypeError, "x: expected (B, I), one row for each sequence, got a Ragged"):
        module(ragged(3))
    with raises(ValueError, "lengths: expected numbers from 0 to 3, got 1 to 4"):
        module(np.zeros((2, 5)), lengths=[1, 4])
    with raises(ValueError, "dy: expected (3, 2, 5), got (2, 3, 5)"):
        module.vjp(np.zeros((2, 5)))[2](np.zeros((2, 3, 5)))
