"""The options of cells, cells that are others in disguise, the integrators of CTRNN, and arguments that are refused."""

import dataclasses
import operator
from itertools import pairwise

import numpy as np
import oracle
import pytest
from scipy.integrate import solve_ivp
from test_recurrent import (
    BOUND,
    assert_agree,
    assert_same_bits,
    away_from_kinks,
    by_finite_differences,
    by_layer,
    by_oracle,
    make_problem,
    unpack,
)

import nbrnn
from nbrnn.cells.activation import ACTIVATIONS, Activation
from nbrnn.cells.cell import CELLS, Cell, Own
from nbrnn.cells.equations import FUNCTIONS, Value, _in_order, exp
from nbrnn.cells.program import Options, _Traced

# ------------------------------------------------------------------ activation functions

KINDS = [(name,) for name in ACTIVATIONS] + [
    ("affine", 0.7, -0.3),
    ("leaky_relu", 0.2),
    ("thresholded_relu", 0.4),
    ("scaled_tanh", 1.5, 0.6),
    ("scaled_tanh", -0.5, 2.0),
    ("hard_sigmoid", 0.4, 0.3),
    ("elu", 0.5),
]


@pytest.mark.parametrize("limit", [None, 0.9])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_activation_function_and_its_slope_are_those_of_the_oracle(kind, limit):
    ours, theirs = Activation(*kind), oracle.Activation(*kind, limit=limit or np.inf)
    if limit:
        ours = ours.clipped(limit, 1e-14)
    a = np.linspace(-4, 4, 1001) + 1e-3
    np.testing.assert_allclose(ours(a), theirs(a), rtol=0, atol=1e-14)
    np.testing.assert_allclose(np.broadcast_to(ours.slope(ours(a)), a.shape), theirs.slope(a), rtol=0, atol=1e-12)


# ------------------------------------------------------------------ options

BOTH = {"num_layers": 2, "bidirectional": True}
LEARN = {"learn_state": True, "stateless": True}
OPTIONS = [
    # Activation functions, as many at a time as a cell has, and clip
    ("lstm", {"activations": [("hard_sigmoid", 0.4, 0.3), ("scaled_tanh", 1.5, 0.6), ("elu", 0.5)]}),
    ("lstm", {"activations": [("leaky_relu", 0.2), "softsign", "softplus"]}),
    (
        "coupled_lstm_input_fo",
        {"clip": 0.4, "activations": ["sigmoid", ("affine", 0.7, -0.3), ("thresholded_relu", 0.05)]},
    ),
    # Projection
    ("lstm", {"proj_size": 3} | BOTH),
    ("peephole_lstm", {"proj_size": 3, "projection": "tanh", "dropout": 0.3, "zoneout": (0, 0.4)} | BOTH),
    ("jordan", {"proj_size": 3, "projection": ("scaled_tanh", 1.5, 0.6), "batch_first": True} | BOTH),
    # What training draws
    ("elman_tanh", {"zoneout": 0.3, "recurrent_dropout": 0.4, "input_dropout": 0.3, "dropout": 0.2} | BOTH),
    ("lstm", {"zoneout": (0.3, 0.2), "recurrent_dropout": 0.4, "clip": 0.8}),
    ("gru", {"recurrent_dropout": 0.4, "zoneout": 0.3}),
    ("gru_reset_before", {"recurrent_dropout": 0.4, "bidirectional": True} | LEARN),
    ("ctrnn", {"recurrent_dropout": 0.4, "zoneout": 0.3, "num_layers": 2} | LEARN),
    # What the layer does around any cell: no equations of its own, and no compilation
    ("lstm", {"input_dropout": 0.4, "single": True, "bidirectional": True}),
    ("elman_relu", LEARN | BOTH),
    ("sru", {"input_dropout": 0.3} | LEARN),
    ("jordan", {"proj_size": 3, "single": True} | LEARN),
    ("mingru", {"input_dropout": 0.4} | LEARN | BOTH),
    ("ctrnn_exponential", {"input_dropout": 0.4, "bidirectional": True} | LEARN),
]
OPTION = pytest.mark.parametrize(("cell", "options"), OPTIONS, ids=str)


@OPTION
def test_results_with_options_agree_with_the_oracle(cell, options):
    problem = make_problem(cell, T=5, H=9, **options)
    assert_agree(by_layer(problem), by_oracle(problem), BOUND["float64"])
    want = by_oracle(problem, training=False)
    y, state_n = problem.layer(problem.x, problem.state)
    got = {"y": y, **{f"state_n {n}": array for n, array in enumerate(unpack(state_n))}}
    assert_agree(got, {name: want[name] for name in got}, BOUND["float64"])


@OPTION
def test_gradients_with_options_agree_with_finite_differences(cell, options, monkeypatch):
    problem = away_from_kinks(cell, monkeypatch, **options, H=3 if "num_layers" in options else 4)
    assert_agree(by_layer(problem), by_finite_differences(problem), 1e-7)


def test_clip_bounds_what_the_gates_see():
    # Every gate saturates at its limit, whatever the input
    layer = nbrnn.LSTM(1, 2, clip=0.5, dtype="float64", seed=0)
    for view in layer.params.values():
        view[...] = 100.0
    y, (_, c) = layer(np.ones((1, 1, 1)))
    gate = 1 / (1 + np.exp(-0.5))
    np.testing.assert_allclose(c, gate * np.tanh(0.5), rtol=1e-14)
    # ... but c, which is no pre-activation, does not
    y, (_, c) = layer(np.ones((1, 1, 1)), (np.zeros((1, 1, 2)), np.full((1, 1, 2), 3.0)))
    np.testing.assert_allclose(y[0], gate * np.tanh(c[0]), rtol=1e-14)
    assert (c > 1).all()


def test_training_draws_each_time_and_one_seed_draws_the_same():
    options = {"zoneout": 0.3, "recurrent_dropout": 0.4, "input_dropout": 0.3, "dropout": 0.2, **BOTH}
    one, two = (make_problem("elman_tanh", T=5, H=9, **options) for _ in range(2))
    first = by_layer(one)
    assert_same_bits(by_layer(two), first)
    again = one.layer.vjp(one.x, one.state)[0]
    assert not np.array_equal(again, first["y"])


def test_a_learnt_state_is_where_calls_without_a_state_begin_and_no_other():
    problem = make_problem("lstm", learn_state=True, **BOTH)
    layer, x, state, dy, *_ = problem
    learnt = tuple(
        np.stack([np.broadcast_to(layer.params[f"{name}_0{end}"], (3, 6)) for end, _ in layer._ends()])
        for name in ("h", "c")
    )
    assert_same_bits({"y": layer(x)[0]}, {"y": layer(x, learnt)[0]})
    grads = layer.vjp(x, state)[2](dy)[2]
    assert all((grads[name] == 0).all() for name in grads if name.startswith(("h_0", "c_0")))
    _, dstate0, grads = layer.vjp(x)[2](dy)
    for n, name in enumerate(("h", "c")):
        for row, (end, _) in enumerate(layer._ends()):
            np.testing.assert_array_equal(grads[f"{name}_0{end}"], dstate0[n][row].sum(axis=0))
            assert (grads[f"{name}_0{end}"] != 0).all()


# ------------------------------------------------------------------ one cell as another


def load(layer, values):
    layer.load_state_dict({name: values.get(name, view) for name, view in layer.params.items()})


def test_an_lstm_whose_peepholes_are_zero_is_an_lstm():
    problem = make_problem("peephole_lstm", T=7, H=9, **BOTH)
    for name, view in problem.layer.params.items():
        if name.startswith("weight_ch"):
            view[...] = 0
    plain = make_problem("lstm", T=7, H=9, **BOTH).layer
    load(plain, problem.layer.state_dict())
    got, want = by_layer(problem), by_layer(problem._replace(layer=plain))
    assert_agree(got, want, 1e-14)
    assert all((got[name] != 0).all() for name in got.keys() - want.keys())


@pytest.mark.parametrize("peepholes", ["i", "f", "o", "if", "io", "fo"])
def test_a_missing_peephole_is_a_zero_one_whose_gradient_is_zero(peepholes):
    part, full = nbrnn.PeepholeLSTM(3, 4, peepholes=peepholes).cell, CELLS["peephole_lstm"]
    rng, act = np.random.default_rng(0), [Activation(name) for name in full.activations]
    gates, prev, dnew, own = (list(rng.normal(size=(n, 50))) for n in (4, 2, 2, 3))
    missing = [n for n, letter in enumerate("ifo") if letter not in peepholes]
    zeroed = [0 * p if n in missing else p for n, p in enumerate(own)]
    new, kept = full.forward(gates, prev, zeroed, act)
    got, _ = part.forward(gates, prev, own, act)
    np.testing.assert_array_equal(got, new)
    dgates, (_, dc), down = full.backward(dnew, kept, prev, new, zeroed, act)
    got_gates, (_, got_c), got_own = part.backward(dnew, kept, prev, new, own, act)
    np.testing.assert_array_equal([*got_gates, got_c], [*dgates, dc])
    for n, (got, want) in enumerate(zip(got_own, down)):
        np.testing.assert_array_equal(got, 0 if n in missing else want)


def test_an_lstm_that_is_projected_by_the_identity_is_an_lstm():
    plain = make_problem("lstm", T=7, H=9, **BOTH)
    projected = make_problem("lstm", T=7, H=9, proj_size=9, **BOTH).layer
    eyes = {name: np.eye(9) for name in projected.params if name.startswith("weight_hr")}
    load(projected, plain.layer.state_dict() | eyes)
    got, want = by_layer(plain._replace(layer=projected)), by_layer(plain)
    assert_agree(got, want, 1e-13)


def test_a_jordan_network_with_the_identity_as_output_layer_is_an_elman_network():
    elman = make_problem("elman_tanh", T=7, H=9, **BOTH)
    jordan = nbrnn.JordanRNN(5, 9, projection="linear", dtype="float64", seed=0, **BOTH)
    assert not [name for name in jordan.params if name.startswith("bias_hr")]
    load(jordan, elman.layer.state_dict() | {n: np.eye(9) for n in jordan.params if n.startswith("weight_hr")})
    got, want = by_layer(elman._replace(layer=jordan)), by_layer(elman)
    assert_agree(got, want, 1e-13)


def test_a_ctrnn_whose_time_constants_are_the_time_step_is_an_elman_network_of_sigmoids():
    problem = make_problem("ctrnn", T=7, H=9, given={"dt": 0.4})
    layer, x, state, *_ = problem
    layer.params["log_tau_l0"][...] = np.log(0.4)
    theta = layer.params["theta_l0"]
    elman = nbrnn.RNN(5, 9, activations=["sigmoid"], dtype="float64", seed=0)
    load(elman, layer.state_dict() | {"bias_hh_l0": layer.params["bias_hh_l0"] + theta})
    y, v = layer(x, state)
    want, h = elman(x, oracle.sigmoid(state + theta))
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-14)
    np.testing.assert_allclose(oracle.sigmoid(v + theta), h, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("couple", "left", "other"), [("input", 1, 0), ("forget", 0, 1)])
def test_a_coupled_lstm_is_an_lstm_in_which_one_gate_follows_from_the_other(couple, left, other):
    # 1 - s(a) = s(-a)
    problem = make_problem(f"coupled_lstm_{couple}", T=7, H=9)
    plain = make_problem("lstm", T=7, H=9).layer
    values = {}
    for name, view in problem.layer.params.items():
        gate, candidate, output = np.split(view, 3)
        rows = [None, None, candidate, output]
        rows[left], rows[other] = gate, -gate
        values[name] = np.concatenate(rows)
    load(plain, values)
    got, want = by_layer(problem), by_layer(problem._replace(layer=plain))
    for name, view in problem.layer.params.items():
        rows = np.split(want[name], 4)
        want[name] = np.concatenate([rows[left] - rows[other], rows[2], rows[3]])
        assert want[name].shape == view.shape
    assert_agree(got, want, 1e-13)


def test_a_minimal_gru_is_a_linear_scan():
    layer, x, h, *_ = make_problem("mingru", T=20, H=9)
    a = x @ layer.params["weight_ih_l0"].T + layer.params["bias_ih_l0"]
    z, n = oracle.sigmoid(a[..., :9]), a[..., 9:]
    # h_t = P_t (h_0 + sum over s up to t of z_s n_s / P_s), P: cumulative product of 1 - z
    P = np.cumprod(1 - z, axis=0)
    np.testing.assert_allclose(layer(x, h)[0], P * (h + np.cumsum(z * n / P, axis=0)), rtol=0, atol=1e-9)


# ------------------------------------------------------------------ CTRNN


def ctrnn(integrator, dt, H=5, **options):
    layer = nbrnn.CTRNN(3, H, dt=dt, integrator=integrator, dtype="float64", seed=1, **options)
    rng = np.random.default_rng(2)
    layer.params["weight_hh_l0"][...] = rng.normal(size=(H, H))
    layer.params["log_tau_l0"][...] = rng.uniform(-0.5, 0.5, H)
    layer.params["theta_l0"][...] = rng.normal(size=H)
    return layer


def solution(layer, x, v, until):
    """v at the time `until` for a constant input."""
    p = {name.removesuffix("_l0"): value for name, value in layer.state_dict().items()}

    def slope(t, v):
        a = p["weight_ih"] @ x + p["bias_ih"] + p["weight_hh"] @ oracle.sigmoid(v + p["theta"]) + p["bias_hh"]
        return (a - v) / np.exp(p["log_tau"])

    return solve_ivp(slope, (0, until), v, rtol=1e-12, atol=1e-12).y[:, -1]


@pytest.mark.parametrize("integrator", ["euler", "exponential"])
def test_a_ctrnn_approaches_the_solution_and_half_the_step_halves_the_error(integrator):
    x, v = np.array([0.3, -0.7, 0.5]), np.linspace(-1, 1, 5)
    errors = []
    for steps in (100, 200, 400, 800):
        layer = ctrnn(integrator, 2 / steps)
        _, last = layer(np.tile(x, (steps, 1)), v[None])
        errors.append(np.abs(last[0] - solution(layer, x, v, 2)).max())
    assert errors[-1] < 2e-3
    for coarse, fine in pairwise(errors):
        assert 1.9 < coarse / fine < 2.1


@pytest.mark.parametrize("dt", [0.01, 0.7, 50.0])
def test_the_exponential_integrator_is_exact_for_a_constant_right_side(dt):
    layer = ctrnn("exponential", dt)
    layer.params["weight_hh_l0"][...] = 0
    x, v = np.array([0.3, -0.7, 0.5]), np.linspace(-1, 1, 5)
    _, last = layer(np.tile(x, (3, 1)), v[None])
    np.testing.assert_allclose(last[0], solution(layer, x, v, 3 * dt), rtol=0, atol=1e-10)


def test_one_step_of_the_exponential_integrator_is_many_short_ones():
    layer = ctrnn("exponential", 0.1)
    layer.params["weight_hh_l0"][...] = 0
    x, v = np.tile([0.3, -0.7, 0.5], (7, 1)), np.linspace(-1, 1, 5)[None]
    _, many = layer(x, v)
    _, one = layer(x[:1], v, dt=0.7)
    np.testing.assert_allclose(one, many, rtol=0, atol=1e-14)


@pytest.mark.parametrize("cell", ["ctrnn", "ctrnn_exponential"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_time_step_for_each_step_and_row_is_that_of_calls_of_one_step_and_row(cell, batch_first):
    layer, x, state, *_ = make_problem(cell, T=6, B=4, batch_first=batch_first)
    dt = np.random.default_rng(0).uniform(0.05, 0.5, x.shape[:2])
    y, v = layer(x, state, dt=dt)
    x, y, dt = (array.swapaxes(0, 1) if batch_first else array for array in (x, y, dt))
    for row in range(4):
        state_row = state[:, row].copy()
        for t in range(6):
            here, state_row = layer(x[t : t + 1, row], state_row, dt=dt[t, row])
            assert_same_bits({"y": here[0].copy()}, {"y": y[t, row].copy()})
        assert_same_bits({"v": state_row}, {"v": v[:, row].copy()})


@pytest.mark.parametrize("cell", ["ctrnn", "ctrnn_exponential"])
def test_a_time_step_for_each_step_is_the_same_for_all_rows(cell):
    problem = make_problem(cell, T=6, B=4)
    dt = np.random.default_rng(0).uniform(0.05, 0.5, 6)
    assert_same_bits(by_layer(problem, dt=dt), by_layer(problem, dt=np.tile(dt[:, None], 4)))
    assert_same_bits(by_layer(problem, dt=0.3), by_layer(problem))


@pytest.mark.parametrize("cell", ["ctrnn", "ctrnn_exponential"])
def test_gradients_with_a_time_step_for_each_step_and_row_are_right(cell):
    problem = make_problem(cell, T=3, B=2, I=3, H=4, **BOTH)
    dt = np.random.default_rng(0).uniform(0.05, 0.5, (3, 2))
    got = by_layer(problem, dt=dt)
    assert_agree(got, by_oracle(problem, dt=dt[:, :, None]), BOUND["float64"])
    assert_agree(got, by_finite_differences(problem, dt=dt), 1e-7)


# ------------------------------------------------------------------ what no step changes


def leaky(gates, prev, own, act, given):
    (a,), (h,), (p,), (s,), (g,) = gates, prev, own, act, given
    k = s(p) * 2.0  # of the parameter
    e = exp(-(k / g))  # of both
    return (h * e + s(a) * (1.0 - e) * g,)


LEAKY = Cell("leaky", ("a",), ("h",), leaky, own=(Own("p"),), activations=("sigmoid",), given=("g",))


@pytest.mark.parametrize(
    ("cell", "fixed"),
    [("ctrnn", []), ("ctrnn_exponential", ["exp"]), (LEAKY, ["exp", "sigmoid"]), ("peephole_lstm", [])],
    ids=lambda value: getattr(value, "name", None),
)
def test_costly_values_of_given_numbers_alone_are_computed_once(cell, fixed):
    cell = CELLS.get(cell, cell)
    for one in (cell, dataclasses.replace(cell, backward=None)):
        traced = _Traced(one, Options(tuple(map(Activation, cell.activations))), np.dtype("float64"))
        found = traced.fix([x for group in (traced.new, *traced.backward()) for x in group])
        assert list(found) == ["fix"] * bool(fixed)
        assert sorted(value.op for value in traced.given[len(cell.given) :]) == fixed


def test_such_a_cell_agrees_with_finite_differences_and_with_itself_step_by_step():
    problem = make_problem(LEAKY, T=4, B=3, dtype="float64", given={"g": 0.7}, **BOTH)
    g = np.random.default_rng(0).uniform(0.5, 1.5, (4, 3))
    for beside in ({}, {"g": g}, {"g": 0.9}):
        assert_agree(by_layer(problem, **beside), by_finite_differences(problem, **beside), 1e-7)
    layer, x, *_ = make_problem(LEAKY, T=4, B=3, dtype="float64", given={"g": 0.7})
    session, y = layer.stream(3), layer(x, g=g)[0]
    assert_same_bits({"y": np.stack([session.step(x[t], g=g[t]).copy() for t in range(4)])}, {"y": y})


# ------------------------------------------------------------------ gradients by the chain rule


def evaluate(results, given, arrays):
    """The results in NumPy, from arrays for the given values."""
    found = {id(value): array for value, array in zip(given, arrays)}
    operators = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "neg": operator.neg}
    for value in _in_order(results, set(found)):
        if id(value) not in found:
            args = [found[id(arg)] if isinstance(arg, Value) else arg for arg in value.args]
            function = FUNCTIONS[value.op].on_arrays if value.op in FUNCTIONS else operators[value.op]
            found[id(value)] = function(*args)
    return [found[id(x)] if isinstance(x, Value) else x for x in results]


@pytest.mark.parametrize("cell", [name for name, cell in CELLS.items() if cell.backward])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_chain_rule_finds_the_gradients_that_are_written_out(cell, clip):
    cell = CELLS[cell]
    feedback = {"recurrent_dropout": cell.feedback, "zoneout": (True,) * len(cell.states)}
    options = Options(tuple(map(Activation, cell.activations)), clip, **feedback)
    found = []
    for one in (cell, dataclasses.replace(cell, backward=None)):
        traced = _Traced(one, options, np.dtype("float64"))
        given = (*traced.gates, *traced.prev, *traced.own, *traced.given, *traced.dnew)
        rng = np.random.default_rng(0)
        arrays = [rng.uniform(0.1, 2.0, 200) * rng.choice([-1, 1], 200) for _ in given]
        results = [x for group in traced.backward() for x in group]
        found.append(evaluate(results, given, arrays))
        assert sum(isinstance(x, Value) for x in results) > cell.slots - len(cell.separate + cell.second)
    for got, want in zip(*found):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12)


def test_a_layer_whose_gradients_come_from_the_chain_rule_has_the_same():
    problem = make_problem("gru_reset_before", T=7, H=9, **BOTH)
    derived = dataclasses.replace(CELLS["gru_reset_before"], backward=None, name="derived")
    layer = make_problem(derived, T=7, H=9, **BOTH).layer
    load(layer, problem.layer.state_dict())
    assert_agree(by_layer(problem._replace(layer=layer)), by_layer(problem), 1e-12)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nbrnn.GRU(3, 4, proj_size=2), "proj_size"),
        (lambda: nbrnn.GRU(3, 4, reset_after=False, proj_size=2), "proj_size"),
        (lambda: nbrnn.MinGRU(3, 4, proj_size=2), "proj_size"),
        (lambda: nbrnn.SRU(3, 4, proj_size=2), "proj_size"),
        (lambda: nbrnn.CTRNN(3, 4, proj_size=2), "proj_size"),
        (lambda: nbrnn.LiGRU(3, 4, proj_size=2), "proj_size"),
        (lambda: nbrnn.LSTM(3, 4, proj_size=-1), "proj_size"),
        (lambda: nbrnn.LSTM(3, 4, proj_size=2, zoneout=0.1), "proj_size.*zoneout"),
        (lambda: nbrnn.LSTM(3, 4, proj_size=2, recurrent_dropout=0.1), "proj_size.*recurrent_dropout"),
        (lambda: nbrnn.JordanRNN(3, 4, zoneout=0.1), "zoneout"),
        (lambda: nbrnn.JordanRNN(3, 4, projection="swish"), "projection"),
        (lambda: nbrnn.CTRNN(3, 4, clip=1.0), "clip"),
        (lambda: nbrnn.LayerNormLSTM(3, 4, unit_forget_bias=True), "unit_forget_bias"),
        (lambda: nbrnn.LSTM(3, 4, activations=("relu", "tanh", ("elu", np.inf))), "activations"),
        (lambda: nbrnn.CTRNN(3, 4)(np.zeros((5, 2, 3), "float32"), dt=-1.0), "dt"),
        (lambda: nbrnn.LSTM(3, 4, projection="tanh"), "projection"),
        (lambda: nbrnn.MinGRU(3, 4, recurrent_dropout=0.1), "recurrent_dropout"),
        (lambda: nbrnn.IndRNN(3, 4, recurrent_dropout=0.1), "recurrent_dropout"),
        (lambda: nbrnn.LSTM(3, 4, recurrent_dropout=1.0), "recurrent_dropout"),
        (lambda: nbrnn.LSTM(3, 4, input_dropout=-0.1), "input_dropout"),
        (lambda: nbrnn.LSTM(3, 4, zoneout=1.0), "zoneout"),
        (lambda: nbrnn.LSTM(3, 4, zoneout=(0.1, -0.1)), "zoneout"),
        (lambda: nbrnn.LSTM(3, 4, zoneout=(0.1, 0.1, 0.1)), "zoneout: expected a number or 2"),
        (lambda: nbrnn.LSTM(3, 4, zoneout="much"), "zoneout"),
        (lambda: nbrnn.LSTM(3, 4, clip=0.0), "clip"),
        (lambda: nbrnn.LSTM(3, 4, clip=-1.0), "clip"),
        (lambda: nbrnn.LSTM(3, 4, clip=np.nan), "clip"),
        (lambda: nbrnn.LSTM(3, 4, clip="tight"), "clip"),
        (lambda: nbrnn.LSTM(3, 4, activations=["sigmoid", "tanh"]), "activations: expected 3"),
        (lambda: nbrnn.LSTM(3, 4, activations="sigmoid"), "activations: expected 3"),
        (lambda: nbrnn.LSTM(3, 4, activations=["sigmoid", "tanh", "swish"]), "activations: .*swish"),
        (lambda: nbrnn.RNN(3, 4, activations=[("elu", 1, 2, 3)]), "activations: .*elu"),
        (lambda: nbrnn.RNN(3, 4, activations=[("elu", -1.0)]), "activations: .*alpha of elu"),
        (lambda: nbrnn.RNN(3, 4, activations=[("affine", "steep")]), "activations: .*alpha of affine"),
        (lambda: nbrnn.RNN(3, 4, activations=[7]), "activations: .*7"),
        (lambda: nbrnn.RNN(3, 4, nonlinearity="sine"), "nonlinearity"),
        (lambda: nbrnn.PeepholeLSTM(3, 4, peepholes="x"), "peepholes"),
        (lambda: nbrnn.PeepholeLSTM(3, 4, peepholes=""), "peepholes"),
        (lambda: nbrnn.CoupledLSTM(3, 4, peepholes="i"), "peepholes"),
        (lambda: nbrnn.CoupledLSTM(3, 4, couple="output"), "couple"),
        (lambda: nbrnn.GRU(3, 4, reset_after="never"), "reset_after"),
        (lambda: nbrnn.CTRNN(3, 4, dt=0.0), "dt"),
        (lambda: nbrnn.CTRNN(3, 4, integrator="leapfrog"), "integrator"),
        (lambda: nbrnn.Recurrent(CELLS["ctrnn"], 3, 4), "given: expected dt"),
        (lambda: nbrnn.Recurrent(CELLS["ctrnn"], 3, 4, given={"dt": 0.1, "speed": 1.0}), "given: .*speed"),
        (lambda: nbrnn.Recurrent(CELLS["ctrnn"], 3, 4, given={"dt": "slow"}), "dt"),
        (lambda: nbrnn.LSTM(3, 4, given={"dt": 0.1}), "given"),
        (lambda: nbrnn.LSTM(3, 4, peepholes="ifo"), "peepholes"),
        (lambda: nbrnn.GRU(3, 4, unit_forget_bias=True), "unit_forget_bias"),
    ],
)
def test_a_layer_refuses_what_does_not_fit_and_names_it(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make()


@pytest.mark.parametrize("way", ["call", "vjp"])
@pytest.mark.parametrize(
    ("dt", "error", "words"),
    [
        (np.ones(4), ValueError, r"dt: expected a number, \(5,\) or \(T, B\)"),
        (np.ones((2, 5)), ValueError, "dt: expected"),
        (np.ones((5, 2, 1)), ValueError, "dt: expected"),
        (np.full(5, np.nan), TypeError, "dt: expected finite"),
        ("fast", TypeError, "dt: expected finite"),
        (None, TypeError, "dt: expected finite"),
    ],
    ids=str,
)
def test_a_call_refuses_time_steps_that_do_not_fit(way, dt, error, words):
    layer = nbrnn.CTRNN(3, 4, dtype="float64", seed=0)
    call = layer if way == "call" else layer.vjp
    with pytest.raises(error, match=words):
        call(np.zeros((5, 2, 3)), dt=dt)


def test_a_call_refuses_arguments_that_its_cell_does_not_know():
    x = np.zeros((5, 2, 3))
    with pytest.raises(TypeError, match="dt: unknown; lstm takes nothing"):
        nbrnn.LSTM(3, 4)(x, dt=0.1)
    with pytest.raises(TypeError, match="speed: unknown; ctrnn takes dt"):
        nbrnn.CTRNN(3, 4).vjp(x, speed=0.1)


def test_input_dropout_refuses_tokens():
    layer = nbrnn.LSTM(3, 4, input_dropout=0.5)
    with pytest.raises(ValueError, match=r"input_dropout: .*tokens"):
        layer.vjp(np.zeros((5, 2), np.int64))
