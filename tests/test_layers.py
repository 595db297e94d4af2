"""Linear, Embedding, Dropout and Sequential; parameters and their first values; every error at the edge."""

import json
import re

import numpy as np
import oracle
import pytest
from test_recurrent import assert_same_bits

import nbrnn
from nbrnn.kernels import gemm, masks
from nbrnn.layers.dropout import draw, draw_mask

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])


def normal(*shape, seed=0, dtype="float64"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def raises(kind, message):
    """The error has exactly this text."""
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


def network(dtype="float64", seed=0):
    """Modules with and without memory, with and without parameters, and one within another."""
    rng = np.random.default_rng(seed)
    lstm = nbrnn.LSTM(3, 4, dtype=dtype, seed=rng)
    inner = nbrnn.Sequential(nbrnn.Dropout(0.3, dtype=dtype, seed=rng), nbrnn.RNN(4, 5, dtype=dtype, seed=rng))
    return nbrnn.Sequential(
        nbrnn.Embedding(7, 3, dtype=dtype, seed=rng), lstm, inner, nbrnn.Linear(5, 7, dtype=dtype, seed=rng)
    )


def assert_finite_differences(module, x, dy, **call):
    """All gradients of a module against finite differences, with the dice of its dropout thrown alike every time."""
    generators = module.generators()
    states = [rng.bit_generator.state for rng in generators]

    def vjp():
        for rng, state in zip(generators, states):
            rng.bit_generator.state = state
        return module.vjp(x, **call)

    def loss():
        return np.vdot(vjp()[0], dy)

    dx, _, grads = vjp()[2](dy)
    assert grads.keys() == module.params.keys()
    for name, array in module.params.items():
        assert oracle.relative_error(grads[name], oracle.numeric_gradient(loss, array)) < 1e-7, name
    if dx is not None:
        assert oracle.relative_error(dx, oracle.numeric_gradient(loss, x)) < 1e-7
    return dx


# ------------------------------------------------------------------ Linear


@DTYPES
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (2, 3, 4), (0,), (3, 0)], ids=str)
def test_linear_is_a_product(shape, bias, dtype):
    layer, x = nbrnn.Linear(5, 70, bias, dtype=dtype, seed=0), normal(*shape, 5, dtype=dtype)
    y, state_n = layer(x)
    assert (y.dtype, y.shape, state_n) == (np.dtype(dtype), (*shape, 70), None)
    want = x.astype(np.float64) @ layer.params["weight"].T + (layer.params["bias"] if bias else 0)
    np.testing.assert_allclose(y, want, rtol=0, atol=8 * np.finfo(dtype).eps)
    assert_same_bits({"y": layer.vjp(x)[0]}, {"y": y})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3,), (2, 3)], ids=str)
def test_gradients_of_linear(shape, bias):
    layer = nbrnn.Linear(5, 4, bias, dtype="float64", seed=0)
    assert_finite_differences(layer, normal(*shape, 5), normal(*shape, 4, seed=1))


@pytest.mark.parametrize("rows", [1, 7, 33, 100, 1000])
def test_gradients_of_linear_of_any_size(rows):
    layer, x, dy = nbrnn.Linear(33, 100, dtype="float64", seed=0), normal(rows, 33), normal(rows, 100, seed=1)
    dx, dstate0, grads = layer.vjp(x)[2](dy)
    assert dstate0 is None
    want = {"dx": dy @ layer.params["weight"], "weight": dy.T @ x, "bias": dy.sum(axis=0)}
    for name, got in {"dx": dx, **grads}.items():
        assert oracle.relative_error(got, want[name]) < 1e-13, name


# ------------------------------------------------------------------ Embedding


@DTYPES
@pytest.mark.parametrize("shape", [(), (4,), (4, 3), (2, 3, 4), (0, 3)], ids=str)
def test_embedding_takes_rows_of_its_table(shape, dtype):
    layer = nbrnn.Embedding(7, 5, dtype=dtype, seed=0)
    x = np.random.default_rng(0).integers(0, 7, shape)
    y, state_n, pullback = layer.vjp(x)
    table = layer.params["weight"]
    assert (y.dtype, state_n) == (np.dtype(dtype), None)
    np.testing.assert_array_equal(y, np.reshape([table[token] for token in x.flat], (*shape, 5)))
    np.testing.assert_array_equal(layer(x)[0], y)
    dy = normal(*shape, 5, seed=1, dtype=dtype)
    dx, dstate0, grads = pullback(dy)
    assert (dx, dstate0) == (None, None)
    want = np.eye(7)[x.ravel()].T @ dy.reshape(-1, 5)
    np.testing.assert_allclose(grads["weight"], want, rtol=0, atol=20 * np.finfo(dtype).eps)


def test_gradients_of_embedding():
    x = np.array([[1, 2, 2], [6, 2, 1]])
    assert assert_finite_differences(nbrnn.Embedding(7, 4, dtype="float64", seed=0), x, normal(2, 3, 4)) is None


# ------------------------------------------------------------------ Dropout


@DTYPES
@pytest.mark.parametrize("p", [0.0, 0.2, 0.9])
def test_dropout_zeroes_a_share_and_keeps_the_mean(p, dtype):
    layer, x = nbrnn.Dropout(p, dtype=dtype, seed=0), np.ones((100, 1000), dtype)
    y, state_n, pullback = layer.vjp(x)
    assert (y.dtype, state_n) == (np.dtype(dtype), None)
    kept = y != 0
    np.testing.assert_allclose(y[kept], 1 / (1 - p), rtol=1e-6)
    # five standard deviations of 100,000 throws
    assert abs(kept.mean() - (1 - p)) <= 5 * np.sqrt(p * (1 - p) / x.size)
    dy = normal(*x.shape, dtype=dtype)
    dx, dstate0, grads = pullback(dy)
    np.testing.assert_array_equal(dx, dy * y)
    assert (dstate0, dict(grads)) == (None, {})
    np.testing.assert_array_equal(layer(x)[0], x)


def test_dropout_throws_new_dice_every_time_and_the_same_for_the_same_seed():
    x = np.ones((5, 6), np.float32)
    one, two = nbrnn.Dropout(0.5, seed=3), nbrnn.Dropout(0.5, seed=3)
    first, second = one.vjp(x)[0], one.vjp(x)[0]
    assert (first != second).any()
    np.testing.assert_array_equal(two.vjp(x)[0], first)
    np.testing.assert_array_equal(two.vjp(x)[0], second)


@pytest.mark.parametrize("bits", [np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_every_generator_gives_the_share_and_no_pattern(bits, p):
    kept = draw(np.random.Generator(bits(0)), p, np.empty((401, 999)))
    assert set(np.unique(kept)) <= {0.0, 1.0}
    bound = 5 * np.sqrt(p * (1 - p) / 401)
    # in every column, every quarter, and where a number has the one before or the same place of another quarter for it
    assert np.abs(kept.mean(axis=0) - (1 - p)).max() <= bound
    quarters = kept.ravel()[: 401 * 996].reshape(4, -1) - (1 - p)
    assert np.abs(quarters.mean(axis=1)).max() <= bound / 10
    for others in (np.roll(quarters, 1, axis=0), np.roll(quarters, 1, axis=1), np.roll(quarters, 8, axis=1)):
        assert abs((quarters * others).mean()) <= bound / 10


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 511, 2048, 2051, 6000])
def test_a_mask_is_splitmix64_on_any_number_of_threads(size):
    z = (np.uint64(7) + np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = (z ^ (z >> np.uint64(31)))[: -(-size // 4)]
    bits = np.concatenate([z >> np.uint64(16 * part) & np.uint64(0xFFFF) for part in range(4)])[:size]
    for shards in (1, 2, 5):
        out = np.full(size + 1, np.nan, np.float32)
        masks.draw.entry(shards, 7, 20000, 2.5, out[:size])
        np.testing.assert_array_equal(out[:size], np.where(bits >= 20000, 2.5, 0.0))
        assert np.isnan(out[size])


def test_splitmix64_is_the_published_one():
    """The first numbers from seed 1234567, as in https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64."""
    want = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    out, bits = np.empty(20), np.zeros(20, np.int64)
    for bit in range(16):  # by bisection: which bits a number has is which bounds it reaches
        bound = bits + (1 << (15 - bit))
        for least in np.unique(bound):
            masks.draw.entry(1, 1234567, int(least), 1.0, out)
            bits[(bound == least) & (out == 1)] = least
    got = [sum(int(bits[part * 5 + n]) << (16 * part) for part in range(4)) for n in range(5)]
    assert got == want


def test_a_mask_is_the_same_for_both_dtypes():
    masks = [draw_mask(np.random.default_rng(0), (50, 60), 0.25, np.dtype(dtype)) for dtype in ("float32", "float64")]
    assert [mask.dtype for mask in masks] == ["float32", "float64"]
    np.testing.assert_array_equal(masks[0] == 0, masks[1] == 0)


def test_dropout_of_a_recurrent_layer_is_between_layers_and_in_training_only():
    x = normal(6, 3, 5)
    whole, dropped = (nbrnn.GRU(5, 6, 2, dropout=p, dtype="float64", seed=0) for p in (0.0, 0.5))
    np.testing.assert_array_equal(dropped(x)[0], whole(x)[0])
    np.testing.assert_array_equal(whole.vjp(x)[0], whole(x)[0])
    first, second = dropped.vjp(x)[0], dropped.vjp(x)[0]
    assert (first != second).any()
    assert (first != 0).all()
    single = nbrnn.GRU(5, 6, 1, dropout=0.5, dtype="float64", seed=0)
    np.testing.assert_array_equal(single.vjp(x)[0], single(x)[0])


# ------------------------------------------------------------------ Sequential


def test_sequential_calls_one_module_after_the_other():
    model, x = network(), np.random.default_rng(0).integers(0, 7, (4, 2))
    y, state_n = model(x)
    value, states = x, []
    for module in model:
        value, state = module(value)
        states.append(state)
    np.testing.assert_array_equal(y, value)
    assert isinstance(state_n, tuple)
    assert [type(state) for state in state_n] == [type(state) for state in states]
    np.testing.assert_array_equal(state_n[1], states[1])
    np.testing.assert_array_equal(state_n[2][1], states[2][1])
    assert (len(model), model[1], list(model)) == (4, model.modules[1], list(model.modules))


def test_gradients_of_sequential():
    model, x = network(), np.random.default_rng(0).integers(0, 7, (4, 2))
    _, state = model(x)
    assert assert_finite_differences(model, x, normal(4, 2, 7), state=state) is None


def test_sequential_carries_the_state_through():
    model, x = network(), np.random.default_rng(0).integers(0, 7, (9, 2))
    whole, last = model(x)
    first, state = model(x[:4])
    second, state = model(x[4:], state)
    np.testing.assert_array_equal(np.concatenate([first, second]), whole)
    np.testing.assert_array_equal(state[1], last[1])
    np.testing.assert_array_equal(state[2][1], last[2][1])


def test_sequential_takes_gradients_of_the_states():
    lstm, linear = nbrnn.LSTM(3, 4, dtype="float64", seed=0), nbrnn.Linear(4, 5, dtype="float64", seed=1)
    x, dy, dstate_n = normal(4, 2, 3), normal(4, 2, 5), (normal(1, 2, 4), normal(1, 2, 4, seed=1))
    hidden, _, pullback = lstm.vjp(x)
    dhidden, _, dlinear = linear.vjp(hidden)[2](dy)
    want = pullback(dhidden, dstate_n)
    dlstm = dict(want[2])
    model = nbrnn.Sequential(lstm, linear)
    dx, dstate0, grads = model.vjp(x)[2](dy, (dstate_n, None))
    np.testing.assert_array_equal(dx, want[0])
    np.testing.assert_array_equal(dstate0[0], want[1])
    assert dstate0[1] is None
    assert_same_bits(
        dict(grads), {f"0.{name}": a for name, a in dlstm.items()} | {f"1.{name}": a for name, a in dlinear.items()}
    )


def test_sequential_keeps_all_parameters_on_one_vector():
    modules = list(network())
    before = [module.state_dict() for module in modules]
    model = nbrnn.Sequential(*modules)
    assert list(model.params)[:2] == ["0.weight", "1.weight_ih_l0"]
    assert {"2.1.weight_hh_l0", "3.bias"} < model.params.keys()
    assert model.params.flat.size == sum(array.size for values in before for array in values.values())
    for n, (module, values) in enumerate(zip(modules, before)):
        assert_same_bits(module.state_dict(), values)
        for name in values:
            assert np.shares_memory(module.params[name], model.params.flat)
            assert np.shares_memory(module.params[name], model.params[f"{n}.{name}"])
    model.params.flat[:] = np.arange(model.params.flat.size)
    assert modules[0].params["weight"][0, 1] == 1
    assert modules[3].params["bias"][-1] == model.params.flat.size - 1
    assert modules[2][1].params["weight_ih_l0"][0, 0] == model.params["2.1.weight_ih_l0"][0, 0]


@pytest.mark.parametrize(
    "make", [lambda: network(), lambda: network()[3], lambda: network()[0]], ids=["sequential", "linear", "embedding"]
)
def test_gradients_overwrite_what_is_in_out(make):
    model = make()
    x = normal(4, 2, 5) if isinstance(model, nbrnn.Linear) else np.array([[1, 2], [2, 0]])
    out = nbrnn.Parameters.zeros(model.params.shapes, model.dtype)
    results = []
    for old in (np.nan, 7):
        for rng in model.generators():
            rng.bit_generator.state = np.random.default_rng(5).bit_generator.state
        out.flat[:] = old
        y, _, pullback = model.vjp(x)
        assert pullback(np.ones_like(y), out=out)[2] is out
        results.append({"grads": out.flat.copy()})
    assert np.isfinite(out.flat).all()
    assert_same_bits(*results)


def test_what_sequential_refuses():
    linear = nbrnn.Linear(3, 3)
    with raises(ValueError, "modules: expected at least one module, got none"):
        nbrnn.Sequential()
    with raises(TypeError, "module 1: expected a module, got int"):
        nbrnn.Sequential(linear, 3)
    with raises(ValueError, "module 2: expected each module once, got one that stands earlier too"):
        nbrnn.Sequential(linear, nbrnn.Linear(3, 3), linear)
    with raises(ValueError, "module 1: expected dtype float32, got float64"):
        nbrnn.Sequential(linear, nbrnn.Linear(3, 3, dtype="float64"))
    model, x = nbrnn.Sequential(linear, nbrnn.LSTM(3, 3)), normal(2, 2, 3)
    with raises(ValueError, "state: expected a tuple of 2 entries, one for each module, got 1"):
        model(x, (None,))
    with raises(ValueError, "state: expected a tuple of 2 entries, one for each module, got ndarray"):
        model.vjp(x, np.zeros((1, 2, 3)))


def test_a_module_may_not_hide_in_another_one():
    linear = nbrnn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"^module 1: expected each module once, got one that stands earlier too$"):
        nbrnn.Sequential(nbrnn.Sequential(linear), linear)


# ------------------------------------------------------------------ parameters


def test_parameters_are_named_views_on_one_vector():
    params = nbrnn.Parameters({"a": (2, 3), "b": (), "c.d": (4,), "c.e": (0, 2)}, np.arange(11.0))
    assert (list(params), len(params), "b" in params, params.flat.size) == (["a", "b", "c.d", "c.e"], 4, True, 11)
    assert params.shapes == {"a": (2, 3), "b": (), "c.d": (4,), "c.e": (0, 2)}
    np.testing.assert_array_equal(params["a"], [[0, 1, 2], [3, 4, 5]])
    params["c.d"][1] = -1
    assert params.flat[8] == -1
    params.flat[0] = -2
    assert params["a"][0, 0] == -2
    assert [params.name_of(n) for n in (0, 5, 6, 7, 10)] == ["a", "a", "b", "c.d", "c.d"]
    with pytest.raises(IndexError):
        params.name_of(11)
    part = params.part("c.")
    assert part.shapes == {"d": (4,), "e": (0, 2)}
    assert np.shares_memory(part["d"], params.flat)
    np.testing.assert_array_equal(params.span("a", "b"), params.flat[:7])
    np.testing.assert_array_equal(params.span("b", "c.d"), params.flat[6:11])
    assert "a 2x3" in repr(params)
    with raises(ValueError, "flat: expected a vector of 3 elements, got shape (4,)"):
        nbrnn.Parameters({"a": (3,)}, np.zeros(4))
    with raises(ValueError, "flat: expected a vector of 4 elements, got shape (2, 2)"):
        nbrnn.Parameters({"a": (4,)}, np.zeros((2, 2)))


def test_names_and_shapes_of_a_recurrent_layer_are_those_of_torch():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.LSTM(5, 6, num_layers=2, bidirectional=True)
    ours = nbrnn.LSTM(5, 6, num_layers=2, bidirectional=True)
    assert ours.params.shapes == {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    assert list(ours.params) == [name for name, _ in theirs.named_parameters()]


def test_a_state_dict_is_a_copy_and_goes_back():
    one, two = network(seed=0), network(seed=1)
    values = one.state_dict()
    assert isinstance(values, dict)
    values["0.weight"][...] = 7
    assert (one.params["0.weight"] != 7).all()
    two.load_state_dict(one.state_dict())
    assert_same_bits(two.state_dict(), one.state_dict())
    values["1.bias_ih_l0"] = values["1.bias_ih_l0"].astype(np.float32)
    values["3.bias"] = [1, 2, 3, 4, 5, 6, 7]
    two.load_state_dict(values)
    assert (two.params["0.weight"] == 7).all()
    np.testing.assert_array_equal(two.params["3.bias"], np.arange(1, 8))
    assert two.params["3.bias"].dtype == np.float64


def test_load_state_dict_names_everything_that_is_wrong_and_changes_nothing():
    model = nbrnn.Linear(3, 2)
    before = model.state_dict()
    good = {"weight": np.ones((2, 3)), "bias": np.ones(2)}

    def refuse(mapping, *problems, kind=ValueError):
        with pytest.raises(kind) as caught:
            model.load_state_dict(mapping)
        for problem in problems:
            assert problem in str(caught.value)
        assert_same_bits(model.state_dict(), before)

    refuse({"weight": good["weight"]}, "bias: missing")
    refuse(good | {"gain": np.ones(2)}, "gain: unknown")
    refuse(good | {"bias": np.ones((2, 1))}, "bias: expected shape (2,), got (2, 1)")
    for value in (np.nan, np.inf, 1e300):
        refuse(good | {"bias": np.array([1, value])}, "bias: expected finite values")
    refuse(
        {"weight": np.full((2, 3), np.nan), "gain": np.ones(2)},
        *("bias: missing", "gain: unknown", "weight: expected finite values"),
    )
    for array in (np.ones(2, complex), np.array(["a", "b"]), np.array([None, 1]), np.array([True, False])):
        refuse(good | {"bias": array}, "bias: expected an array of real numbers", kind=TypeError)
    model.load_state_dict(good)
    assert (model.params.flat == 1).all()


# ------------------------------------------------------------------ first values


@pytest.mark.parametrize(
    ("make", "bound"),
    [
        (lambda init: nbrnn.LSTM(9, 64, 2, bidirectional=True, init=init, seed=0), 1 / 8),
        (lambda init: nbrnn.Linear(25, 80, init=init, seed=0), 1 / 5),
    ],
    ids=["lstm", "linear"],
)
def test_first_values_have_the_documented_bounds(make, bound):
    for view in make("torch").params.values():
        assert 0.9 * bound < np.abs(view).max() <= bound
        assert abs(view.mean()) < 5 * bound / np.sqrt(3 * view.size)
    for name, view in make("glorot").params.items():
        if name.startswith("bias"):
            assert (view == 0).all()
        else:
            limit = np.sqrt(6 / sum(view.shape))
            assert 0.9 * limit < np.abs(view).max() <= limit
            assert abs(view.mean()) < 5 * limit / np.sqrt(3 * view.size)


def test_orthogonal_recurrent_weights():
    layer = nbrnn.LSTM(5, 32, 2, dtype="float64", init="orthogonal", seed=0)
    blocks = [block for name in ("weight_hh_l0", "weight_hh_l1") for block in np.split(layer.params[name], 4)]
    for block in blocks:
        np.testing.assert_allclose(block @ block.T, np.eye(32), atol=1e-12)
    assert len({block.tobytes() for block in blocks}) == 8
    assert (layer.params["bias_hh_l1"] == 0).all()
    # Neither reflections nor rotations alone
    assert len({np.sign(np.linalg.det(block)) for block in blocks}) == 2


@pytest.mark.parametrize("init", ["torch", "glorot"])
def test_unit_forget_bias(init):
    options = {"num_layers": 2, "bidirectional": True, "init": init, "seed": 0}
    layer, plain = nbrnn.LSTM(5, 6, unit_forget_bias=True, **options), nbrnn.LSTM(5, 6, **options)
    for name, view in layer.params.items():
        forget = slice(6, 12) if name.startswith("bias") else slice(0)
        assert (view[forget] == (1 if name.startswith("bias_ih") else 0)).all()
        rest = np.delete(np.arange(24), forget)
        np.testing.assert_array_equal(view[rest], plain.params[name][rest])
    for make in (
        lambda: nbrnn.GRU(5, 6, unit_forget_bias=True),
        lambda: nbrnn.LSTM(5, 6, bias=False, unit_forget_bias=True),
    ):
        with pytest.raises(ValueError, match="unit_forget_bias: expected a cell with a forget gate and biases, got"):
            make()


MAKERS = {
    "lstm": lambda seed: nbrnn.LSTM(5, 6, seed=seed),
    "linear": lambda seed: nbrnn.Linear(5, 6, seed=seed),
    "embedding": lambda seed: nbrnn.Embedding(5, 6, seed=seed),
    "orthogonal": lambda seed: nbrnn.GRU(5, 6, init="orthogonal", seed=seed),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_seeds(make):
    def values(seed):
        return make(seed).params.flat.tobytes()

    assert values(3) == values(3) == values(np.int64(3)) == values(np.random.default_rng(3))
    assert len({values(3), values(4), values(None), values(None)}) == 4
    rng = np.random.default_rng(3)
    assert values(rng) != values(rng)
    for seed in (-1, 1.5, "1", True):
        with raises(TypeError, f"seed: expected None, an integer from 0 on or a numpy.random.Generator, got {seed!r}"):
            make(seed)


def test_generators_are_those_that_training_draws_from():
    model = network()
    (rng,) = set(model.generators())
    before = rng.bit_generator.state
    x = np.array([[1, 2]])
    model(x)
    assert rng.bit_generator.state == before
    model.vjp(x)
    assert rng.bit_generator.state != before


@pytest.mark.parametrize(
    "module",
    [
        nbrnn.LSTM(3, 4, 2, batch_first=True, dropout=0.25, bidirectional=True, unit_forget_bias=True, dtype="float64"),
        nbrnn.GRU(3, 4, bias=False, init="orthogonal"),
        nbrnn.RNN(3, 4, nonlinearity="relu"),
        nbrnn.Linear(3, 4, bias=False, init="glorot"),
        nbrnn.Embedding(3, 4, dtype="float64"),
        nbrnn.Dropout(0.25),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_configuration_is_plain_and_builds_the_same_module(module):
    config = json.loads(json.dumps(module.config()))
    again = type(module)(**config)
    assert again.config() == module.config()
    assert (again.params.shapes, again.dtype) == (module.params.shapes, module.dtype)
    for name in {"bias", "batch_first", "bidirectional", "dropout", "p", "init"} & config.keys():
        assert getattr(again, name) == getattr(module, name) == config[name]


# ------------------------------------------------------------------ the edge


def lstm(**options):
    return nbrnn.LSTM(32, 8, **options)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


SHAPE_ERRORS = [
    (lstm(), zeros(35, 20, 28), "x: expected (T, B, 32), got (35, 20, 28)"),
    (lstm(batch_first=True), zeros(35, 20, 28), "x: expected (B, T, 32), got (35, 20, 28)"),
    (lstm(), zeros(35, 28), "x: expected (T, 32), got (35, 28)"),
    (lstm(), zeros(28), "x: expected (T, B, 32), got (28,)"),
    (lstm(), zeros(2, 3, 4, 32), "x: expected (T, B, 32), got (2, 3, 4, 32)"),
    (lstm(), np.float32(1), "x: expected (T, B, 32), got ()"),
    (lstm(), zeros(2, 3, 32, dtype=int), "x: expected (T, B), got (2, 3, 32)"),
    (lstm(batch_first=True), zeros(2, 3, 32, dtype=int), "x: expected (B, T), got (2, 3, 32)"),
    (lstm(), np.array([[0, -1], [31, 5]]), "x: expected tokens in [0, 32), got -1 to 31"),
    (lstm(), np.array([32]), "x: expected tokens in [0, 32), got 32 to 32"),
    (lstm(), np.array([2**63], np.uint64), f"x: expected tokens in [0, 32), got {2**63} to {2**63}"),
    (nbrnn.Linear(32, 8), zeros(5, 28), "x: expected (..., 32), got (5, 28)"),
    (nbrnn.Linear(32, 8), np.float32(1), "x: expected (..., 32), got ()"),
    (nbrnn.Embedding(32, 8), np.array([[0, 32]]), "x: expected tokens in [0, 32), got 0 to 32"),
]


@pytest.mark.parametrize(("layer", "x", "message"), SHAPE_ERRORS, ids=[message for _, _, message in SHAPE_ERRORS])
def test_wrong_shapes_and_tokens(layer, x, message):
    for call in (layer, layer.vjp):
        with raises(ValueError, message):
            call(x)


@pytest.mark.parametrize("dtype", ["float16", "complex64", "bool", "object", "U3", "longdouble"])
def test_wrong_dtypes(dtype):
    x = zeros(2, 3, 32).astype(dtype)
    advice = "expected float32 values, got {}; convert them with .astype('float32')"
    for layer in (lstm(), nbrnn.Linear(32, 8), nbrnn.Dropout()):
        for call in (layer, layer.vjp):
            with raises(TypeError, f"x: {advice.format(x.dtype)}"):
                call(x)
    with raises(TypeError, f"x: expected integer tokens, got {x.dtype}"):
        nbrnn.Embedding(32, 8)(x)
    with raises(TypeError, f"state c: {advice.format(x.dtype)}"):
        lstm()(zeros(2, 3, 32), (zeros(1, 3, 8), zeros(1, 3, 8).astype(dtype)))


def test_integers_are_no_floats():
    integers = zeros(2, 3, 32, dtype=int)
    with raises(TypeError, "x: expected float32 values, got int64; convert them with .astype('float32')"):
        nbrnn.Linear(32, 8)(integers)
    with raises(TypeError, "state: expected float32 values, got int64; convert them with .astype('float32')"):
        nbrnn.GRU(32, 8)(zeros(2, 3, 32), zeros(1, 3, 8, dtype=int))
    with raises(TypeError, "x: expected integer tokens, got float32"):
        nbrnn.Embedding(32, 8)(zeros(2, 3))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_wrong_states(bidirectional):
    x, rows = zeros(2, 3, 32), 4 if bidirectional else 2
    layer, gru = (kind(32, 8, 2, bidirectional=bidirectional) for kind in (nbrnn.LSTM, nbrnn.GRU))
    h = zeros(rows, 3, 8)
    for state in (h, (h,), (h, h, h), {"h": h, "c": h}):
        with raises(TypeError, f"state: expected a tuple (h, c), got {type(state).__name__}"):
            layer(x, state)
    for wrong in (zeros(rows, 3, 7), zeros(rows - 1, 3, 8), zeros(rows, 2, 8), zeros(3, 8), zeros(1, rows, 3, 8)):
        with raises(ValueError, f"state h: expected {h.shape}, got {wrong.shape}"):
            layer(x, (wrong, h))
        with raises(ValueError, f"state c: expected {h.shape}, got {wrong.shape}"):
            layer.vjp(x, (h, wrong))
        with raises(ValueError, f"state: expected {h.shape}, got {wrong.shape}"):
            gru(x, wrong)
    with raises(ValueError, f"state: expected ({rows}, 8), got {h.shape}"):
        gru(x[:, 0], h)


def test_wrong_gradients():
    x, h = zeros(2, 3, 32), zeros(1, 3, 8)
    with raises(ValueError, "dy: expected (2, 3, 8), got (2, 3, 7)"):
        lstm().vjp(x)[2](zeros(2, 3, 7))
    with raises(ValueError, "dy: expected (3, 2, 16), got (2, 3, 16)"):
        lstm(batch_first=True, bidirectional=True).vjp(x.swapaxes(0, 1))[2](zeros(2, 3, 16))
    with raises(TypeError, "dy: expected float32 values, got int64; convert them with .astype('float32')"):
        lstm().vjp(x)[2](zeros(2, 3, 8, dtype=int))
    with raises(TypeError, "dstate_n: expected a tuple (h, c), got ndarray"):
        lstm().vjp(x)[2](zeros(2, 3, 8), h)
    with raises(ValueError, "dstate_n c: expected (1, 3, 8), got (1, 3, 7)"):
        lstm().vjp(x)[2](zeros(2, 3, 8), (h, zeros(1, 3, 7)))
    for layer, tokens in ((nbrnn.Linear(32, 8), x), (nbrnn.Embedding(32, 8), zeros(2, 3, dtype=int))):
        with raises(ValueError, "dy: expected (2, 3, 8), got (2, 8)"):
            layer.vjp(tokens)[2](zeros(2, 8))
    with raises(ValueError, "dy: expected (2, 3, 32), got (2, 3)"):
        nbrnn.Dropout().vjp(x)[2](zeros(2, 3))


ARGUMENT_ERRORS = [
    (ValueError, "input_size: expected at least 1, got 0", lambda: nbrnn.LSTM(0, 3)),
    (ValueError, "hidden_size: expected at least 1, got -2", lambda: nbrnn.GRU(3, -2)),
    (ValueError, "num_layers: expected at least 1, got 0", lambda: nbrnn.RNN(3, 3, 0)),
    (TypeError, "input_size: expected an integer, got 3.0", lambda: nbrnn.LSTM(3.0, 3)),
    (TypeError, "hidden_size: expected an integer, got '3'", lambda: nbrnn.LSTM(3, "3")),
    (TypeError, "num_layers: expected an integer, got True", lambda: nbrnn.LSTM(3, 3, True)),
    (ValueError, "output_size: expected at least 1, got 0", lambda: nbrnn.Linear(3, 0)),
    (ValueError, "num_embeddings: expected at least 1, got 0", lambda: nbrnn.Embedding(0, 3)),
    (TypeError, "embedding_dim: expected an integer, got None", lambda: nbrnn.Embedding(3, None)),
    (ValueError, "dropout: expected a fraction in [0, 1), got 1.0", lambda: nbrnn.LSTM(3, 3, dropout=1.0)),
    (ValueError, "p: expected a fraction in [0, 1), got -0.1", lambda: nbrnn.Dropout(-0.1)),
    (ValueError, "p: expected a fraction in [0, 1), got nan", lambda: nbrnn.Dropout(float("nan"))),
    (TypeError, "p: expected a number, got '0.1'", lambda: nbrnn.Dropout("0.1")),
    (ValueError, "dtype: expected float32 or float64, got 'float16'", lambda: nbrnn.LSTM(3, 3, dtype="float16")),
    (ValueError, "dtype: expected float32 or float64, got 'nonsense'", lambda: nbrnn.Linear(3, 3, dtype="nonsense")),
    (ValueError, "init: expected one of torch, glorot, orthogonal, got 'he'", lambda: nbrnn.Linear(3, 3, init="he")),
    (
        ValueError,
        "nonlinearity: expected tanh or relu (for others: activations), got 'sin'",
        lambda: nbrnn.RNN(3, 3, nonlinearity="sin"),
    ),
]


@pytest.mark.parametrize(
    ("kind", "message", "make"), ARGUMENT_ERRORS, ids=[message for _, message, _ in ARGUMENT_ERRORS]
)
def test_wrong_arguments(kind, message, make):
    with raises(kind, message):
        make()


def test_explain_is_about_the_call():
    lines = nbrnn.LSTM(5, 6, 2, bidirectional=True).explain(7, 3).splitlines()
    assert "lstm" in lines[0]
    assert "float32" in lines[0]
    # forward and backward of two layers in two directions
    assert len(lines) == 1 + 8
    assert all(re.search("(serial|batch|units), 1 thread", line) for line in lines[1:])


def test_calls_of_all_kinds_may_take_turns():
    """What a call prepared for the next one must not be taken for another kind: every result is that of a new layer."""
    rng = np.random.default_rng(0)
    floats, tokens = rng.standard_normal((6, 6, 9)), rng.integers(0, 9, (6, 6))
    grads = [nbrnn.Parameters.zeros(nbrnn.CTRNN(9, 40, dtype="float64").params.shapes, "float64") for _ in range(2)]

    def results(layer, x, dt, out, first, last):
        begin, dlast = (np.full((1, x.shape[1], 40), 0.5) if there else None for there in (first, last))
        y, state, pullback = layer.vjp(x, begin, dt=dt)
        dx, dstate, found = pullback(np.cos(y), dlast, out=out)
        return [y, state, np.zeros(0) if dx is None else dx, dstate, found.flat.copy(), layer(x, begin, dt=dt)[0]]

    used = nbrnn.CTRNN(9, 40, dtype="float64", seed=0)
    dts = 0.5, np.linspace(0.1, 1.0, 6), np.linspace(0.1, 1.0, 36).reshape(6, 6)
    calls = [(x, dt, out) for x in (floats, tokens, floats[:, :2], floats[:3]) for dt in dts for out in (*grads, None)]
    calls = [call for call in calls if np.ndim(call[1]) == 0 or call[0].shape[:2] == (6, 6)]
    for n in rng.permutation(np.tile(np.arange(len(calls)), 3)):
        ends = rng.random(2) < 0.5
        want = results(nbrnn.CTRNN(9, 40, dtype="float64", seed=0), *calls[n], *ends)
        for one, other in zip(results(used, *calls[n], *ends), want):
            np.testing.assert_array_equal(one, other)


# ------------------------------------------------------------------ frozen parameters


def test_frozen_parameters_are_packed_once_and_cannot_change(monkeypatch):
    model = nbrnn.Sequential(nbrnn.LSTM(3, 4, seed=0), nbrnn.Linear(4, 2, seed=1))
    x, layer, looked = normal(5, 2, 3, dtype="float32"), model.modules[0], []
    look = gemm.fingerprint.entry.address
    monkeypatch.setattr(gemm.fingerprint.entry, "address", lambda kinds: looked.append(kinds) or look(kinds))
    want = model(x)[0]
    assert model.freeze() is model
    for _ in range(3):
        assert_same_bits({"y": model(x)[0]}, {"y": want})
    assert len(looked) == 2  # without freezing, and once more with it
    for params in (model.params, layer.params, model.params.part("1.")):
        for array in (params.flat, *params.values()):
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0
    trainer = nbrnn.Trainer(model, nbrnn.MSE(), nbrnn.SGD(1.0))
    with pytest.raises(ValueError, match=r"^flat_params: expected .* got a frozen one \(thaw the model\)$"):
        trainer.step(x, want)
    with pytest.raises(ValueError, match=r"^mapping: expected .* got a frozen one \(thaw it\)$"):
        model.load_state_dict(model.state_dict())
    assert_same_bits({"y": model(x)[0]}, {"y": want})


def test_a_frozen_linear_layer_is_packed_once():
    layer, x = nbrnn.Linear(4, 3, seed=0), normal(5, 4, dtype="float32")
    want = layer(x)[0]
    layer.freeze()
    assert_same_bits({"y": layer(x)[0]}, {"y": want})
    layer._spare[-1].packed[...] = 0
    np.testing.assert_array_equal(layer(x)[0], np.broadcast_to(layer.params["bias"], want.shape))
    layer.thaw()
    assert_same_bits({"y": layer(x)[0]}, {"y": want})


@pytest.mark.parametrize("make", [lambda: nbrnn.Linear(9, 70, seed=0), lambda: nbrnn.GRU(9, 70, seed=0)])
def test_gradients_of_a_frozen_layer_leave_its_outputs(make):
    """The way back packs the weights anew, into memory that those of the way forward had."""
    layer, x = make().freeze(), normal(5, 4, 9, dtype="float32")
    want = layer(x)[0]
    for _ in range(2):
        y, _, pullback = layer.vjp(x)
        dx, _, _ = pullback(np.ones_like(y))
        assert_same_bits({"y": y, "y of inference": layer(x)[0]}, {"y": want, "y of inference": want})
        assert np.isfinite(dx).all()
        assert dx.any()


def test_packed_weights_of_both_ways_share_their_memory_but_not_those_of_pieces():
    def rooms(layer, tokens=False):
        x = np.zeros((9, 2), int) if tokens else np.zeros((9, 2, 8), "f4")
        y, _, pullback = layer.vjp(x)
        pullback(y)
        (part,) = layer._parts
        panels = (part._spare_panels or [part._spare[True][-1].panels])[-1]
        return panels.ahead, panels.carry.back

    for layer in (nbrnn.LSTM(8, 64), nbrnn.LSTM(8, 64, recompute=3)):
        ahead, back = rooms(layer)
        for one, other in (ahead.w_hh, back.w_hh), (ahead.w_ih, back.w_ih):
            assert np.shares_memory(one, other) == (not layer.recompute)
    assert len(rooms(nbrnn.LSTM(8, 64), tokens=True)[1].w_ih) == 0


def test_what_changes_between_thawing_and_freezing_is_seen():
    layer, x = nbrnn.GRU(3, 4, seed=0).freeze(), normal(5, 2, 3, dtype="float32")
    before = layer(x)[0]
    layer.thaw().params.flat[:] *= 2
    after = nbrnn.GRU(3, 4)
    after.params.flat[:] = layer.params.flat
    layer.freeze()
    assert_same_bits({"y": layer(x)[0]}, {"y": after(x)[0]})
    assert (layer(x)[0] != before).any()
