"""Every cell, forward and back, against the oracle's equations and against finite differences.

A calculation is a dict of all its results by name: y, the last states, and every gradient.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nbrnn
from nbrnn.cells.cell import CELLS
from nbrnn.kernels import schedule
from nbrnn.kernels.schedule import Schedule
from nbrnn.layers.dropout import draw, draw_mask
from nbrnn.layers.sequences import Steps, even_steps

CELL = pytest.mark.parametrize("cell", CELLS)
# Each pair costs a compilation: all cells in float64, the great ones in float32 too.
PAIRS = [*((cell, "float64") for cell in CELLS), ("lstm", "float32"), ("gru", "float32")]
CELL_AND_DTYPE = pytest.mark.parametrize(("cell", "dtype"), PAIRS)
# Tokens are one more compilation: the great cells, one with a second product, and one without a recurrent product.
GREAT = ("elman_tanh", "lstm", "gru")
TOKENS = (*GREAT, "gru_reset_before", "mingru")
CELL_AND_TOKENS = pytest.mark.parametrize(
    ("cell", "tokens"), [*((cell, False) for cell in CELLS), *((cell, True) for cell in TOKENS)]
)
CASES = [(*pair, False) for pair in PAIRS] + [(cell, "float64", True) for cell in TOKENS]
CASE = pytest.mark.parametrize(("cell", "dtype", "tokens"), CASES)
BOUND = {"float64": 1e-10, "float32": 2e-5}

OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "three layers": {"num_layers": 3},
    "both directions": {"bidirectional": True},
    "batch first": {"batch_first": True},
    "unbatched": {"single": True},
    "tokens": {"tokens": True},
    "no state": {"stateless": True},
    "both directions, unbatched": {"bidirectional": True, "single": True},
    "dropout": {"num_layers": 3, "dropout": 0.4},
    "two layers, both directions, no bias": {"num_layers": 2, "bidirectional": True, "bias": False},
    "two layers, both directions, dropout": {"num_layers": 2, "bidirectional": True, "dropout": 0.4},
    "both directions, batch first, tokens": {"bidirectional": True, "batch_first": True, "tokens": True},
    "both directions, unbatched tokens": {"bidirectional": True, "single": True, "tokens": True},
    "two layers, batch first, no state": {"num_layers": 2, "batch_first": True, "stateless": True},
}
WITHOUT_TOKENS = [name for name, options in OPTIONS.items() if "tokens" not in options]
# What every cell goes through; the great ones go through all of it
FEW = (
    "plain",
    "both directions, unbatched",
    "two layers, both directions, no bias",
    "two layers, both directions, dropout",
    "two layers, batch first, no state",
)
CELL_AND_OPTION = [(cell, option) for cell in CELLS for option in (OPTIONS if cell in GREAT else FEW)]

# ------------------------------------------------------------------ calculations


class Problem(NamedTuple):
    """A layer and the arguments of its calls."""

    layer: nbrnn.Recurrent
    x: np.ndarray
    state: Any
    dy: np.ndarray
    dstate_n: Any
    seed: int  # of what training draws


def make_problem(
    cell, T=4, B=3, I=5, H=6, *, dtype="float64", seed=0, tokens=False, single=False, stateless=False, **options
):
    """A problem of a cell, or of a cell's name."""
    rng, cell = np.random.default_rng(seed), CELLS.get(cell, cell)
    if cell.given:
        options = {"given": dict.fromkeys(cell.given, 0.3)} | options
    layer = nbrnn.Recurrent(cell, I, H, dtype=dtype, seed=rng, **options)
    D, L, B = layer.directions, layer.num_layers, 1 if single else B

    def draw(*shape):
        return rng.normal(size=shape).astype(dtype)

    def arrange(array):
        """As the caller has it: one sequence, or the batch first."""
        return array[:, 0].copy() if single else array.swapaxes(0, 1).copy() if layer.batch_first else array

    def states(scale):
        if stateless:
            return None
        arrays = [scale * draw(L * D, B, size) for size in layer._sizes]
        return pack([array[:, 0] if single else array for array in arrays])

    for view in layer.params.values():
        if (view == view.flat[0]).all():
            # What begins with a constant
            view += 0.3 * draw(*view.shape)
    x = arrange(rng.integers(0, I, (T, B)) if tokens else draw(T, B, I))
    return Problem(layer, x, states(0.5), arrange(draw(T, B, layer.output_size)), states(1), seed)


def pack(states):
    return tuple(states) if len(states) > 1 else states[0]


def unpack(state):
    return list(state) if isinstance(state, tuple) else [state]


def name_all(y, state_n, dx, dstate0, grads):
    """All results by name; those of the first and last states are there also where the caller gave none."""
    results = {"y": y, **{f"state_n {n}": array for n, array in enumerate(unpack(state_n))}}
    results |= {} if dx is None else {"dx": dx}
    results |= {f"dstate0 {n}": array for n, array in enumerate(unpack(dstate0))}
    return results | dict(grads)


def reseed(problem):
    """Let the next training call draw the same again."""
    problem.layer.rng = np.random.default_rng(problem.seed)


def draws_of(problem, T, B):
    """What training draws after `reseed`, in the same order, as the oracle takes it."""
    layer, rng = problem.layer, np.random.default_rng(problem.seed)

    def mask(p, *shape):
        return draw_mask(rng, shape, p, np.dtype("float64"))

    masks, feedback_masks, zoneout = {}, {}, {}
    for row in range(layer.num_layers * layer.directions):
        H = layer.hidden_size
        zoneout[row] = [draw(rng, p, np.empty((T, B, H))) if p else 1 for p in layer.zoneout]
        if layer.recurrent_dropout:
            feedback_masks[row] = mask(layer.recurrent_dropout, B, H)
    for k in range(layer.num_layers):
        inputs = layer.output_size if k else layer.input_size
        if layer.dropout and k:
            masks[k] = mask(layer.dropout, T, B, inputs)
        if layer.input_dropout:
            masks[k] = masks.get(k, 1) * mask(layer.input_dropout, 1, B, inputs)
    return {"masks": masks, "feedback_masks": feedback_masks, "zoneout": zoneout}


def means_of(problem):
    """What inference takes in place of draws."""
    layer = problem.layer
    return {"zoneout": {row: [1 - p for p in layer.zoneout] for row in range(layer.num_layers * layer.directions)}}


def by_layer(problem, **beside):
    layer, x, state, dy, dstate_n, _ = problem
    reseed(problem)
    y, state_n, pullback = layer.vjp(x, state, **beside)
    return name_all(y, state_n, *pullback(dy, dstate_n))


def by_oracle(problem, training=True, dt=None):
    """All results; `dt` time-major."""
    layer, x, state, dy, dstate_n, _ = problem
    single = np.ndim(dy) == 2

    def inner(array):
        return array[:, None] if single else array.swapaxes(0, 1) if layer.batch_first else array

    def outer(array):
        return array[:, 0] if single else array.swapaxes(0, 1) if layer.batch_first else array

    def states(state, change):
        return None if state is None else pack([change(array) for array in unpack(state)])

    def with_batch(array):
        return array[:, None] if single else array

    def without_batch(array):
        return array[:, 0] if single else array

    name, params, how = layer.cell.name, layer.state_dict(), {"num_layers": layer.num_layers}
    how |= {"bidirectional": layer.bidirectional, "state": states(state, with_batch)}
    how |= draws_of(problem, *inner(dy).shape[:2]) if training else means_of(problem)
    how |= {"activations": [(act.name, act.alpha, act.beta) for act in layer.activations]}
    how |= {"projection": (layer.projection.name, layer.projection.alpha, layer.projection.beta)}
    how |= {"clip": layer.clip or np.inf, "dt": layer.given.get("dt") if dt is None else dt}
    y, state_n = oracle.forward(name, params, inner(x), **how)
    dx, dstate0, grads = oracle.backward(name, params, inner(x), inner(dy), states(dstate_n, with_batch), **how)
    dx = None if dx is None else outer(dx)
    return name_all(outer(y), states(state_n, without_batch), dx, states(dstate0, without_batch), grads)


def by_finite_differences(problem, **beside):
    """The gradients alone. All arrays are nudged in place and put back."""
    layer, x, state, dy, dstate_n, _ = problem
    # Small enough for functions that bend as much as a normalisation of few units
    step = 2.0**-13
    drawn = any((layer.dropout, layer.input_dropout, layer.recurrent_dropout, *layer.zoneout))

    def loss():
        reseed(problem)
        y, state_n = layer.vjp(x, state, **beside)[:2] if drawn else layer(x, state, **beside)
        value = np.vdot(y, dy)
        if dstate_n is not None:
            value += sum(np.vdot(*pair) for pair in zip(unpack(state_n), unpack(dstate_n)))
        return value

    results = {name: oracle.numeric_gradient(loss, array, step) for name, array in layer.params.items()}
    if x.dtype.kind == "f":
        results["dx"] = oracle.numeric_gradient(loss, x, step)
    if state is not None:
        results |= {f"dstate0 {n}": oracle.numeric_gradient(loss, array, step) for n, array in enumerate(unpack(state))}
    return results


def disagreements(got, want, bound):
    """Names of the results that differ by more than `bound`, relative to the largest number of the tensor."""
    errors = {name: oracle.relative_error(got[name], want[name]) for name in want}
    return {name: error for name, error in errors.items() if not error <= bound}


def assert_agree(got, want, bound):
    assert not disagreements(got, want, bound)


def assert_same_bits(got, want):
    """Two dicts of results are the same to the last bit."""
    assert got.keys() == want.keys()
    for name, array in got.items():
        assert np.shape(array) == np.shape(want[name]), name
        assert array.tobytes() == want[name].tobytes(), f"{name} differs"


# ------------------------------------------------------------------ against the oracle


def test_the_oracle_knows_every_cell():
    assert set(CELLS) <= set(oracle.CELLS)
    for name, cell in CELLS.items():
        assert (cell.states, len(cell.gates)) == (oracle.CELLS[name].states, oracle.CELLS[name].gates)


@pytest.mark.parametrize(
    ("cell", "dtype", "option"),
    [(cell, "float64", option) for cell, option in CELL_AND_OPTION]
    + [(cell, "float64", "both directions, batch first, tokens") for cell in TOKENS if cell not in GREAT]
    + [(cell, "float32", option) for cell in ("lstm", "gru") for option in WITHOUT_TOKENS]
    + [(cell, "float32", "two layers, both directions, no bias") for cell in ("gru_reset_before", "peephole_lstm")],
)
def test_all_results_agree_with_the_oracle(cell, dtype, option):
    problem = make_problem(cell, dtype=dtype, **OPTIONS[option])
    got, want = by_layer(problem), by_oracle(problem)
    assert got.keys() == want.keys()
    assert all(array.dtype == dtype for array in got.values())
    assert_agree(got, want, BOUND[dtype])


SIZES = (1, 7, 33, 100, 1000)


@pytest.mark.parametrize(
    ("cell", "size"), [(cell, size) for cell in CELLS for size in (SIZES if cell in GREAT else (1, 33, 100))]
)
@pytest.mark.parametrize("dimension", ["T", "B", "I", "H"])
def test_any_size_agrees_with_the_oracle(cell, dimension, size):
    sizes = {"T": 3, "B": 5, "I": 4, "H": 9} | {dimension: size}
    problem = make_problem(cell, **sizes, bidirectional=dimension != "H")
    assert_agree(by_layer(problem), by_oracle(problem), BOUND["float64"])


@pytest.mark.parametrize("cell", TOKENS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dimension", ["T", "B", "I", "H"])
def test_tokens_of_any_size_agree_with_the_oracle(cell, dimension, size):
    sizes = {"T": 3, "B": 5, "I": 4, "H": 9} | {dimension: min(size, 333)}
    problem = make_problem(cell, **sizes, tokens=True)
    assert_agree(by_layer(problem), by_oracle(problem), BOUND["float64"])


@CELL_AND_TOKENS
@pytest.mark.parametrize("shape", [{"T": 0}, {"B": 0}, {"T": 0, "B": 0}], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
def test_nothing_in_gives_nothing_out(cell, shape, tokens, options):
    problem = make_problem(cell, **shape, tokens=tokens, **options)
    got = by_layer(problem)
    assert_agree(got, by_oracle(problem), 0)
    assert got["y"].size == 0
    if "B" not in shape:
        # No step was taken: the states are what they were.
        for n, (first, dlast) in enumerate(zip(unpack(problem.state), unpack(problem.dstate_n))):
            assert_same_bits(
                {"state_n": got[f"state_n {n}"], "dstate0": got[f"dstate0 {n}"]}, {"state_n": first, "dstate0": dlast}
            )
            assert not np.shares_memory(got[f"state_n {n}"], first)
            assert not np.shares_memory(got[f"dstate0 {n}"], dlast)
    assert all((got[name] == 0).all() for name in problem.layer.params)


SHAPES_AND_OPTIONS = st.fixed_dictionaries(
    {"T": st.integers(0, 6), "B": st.integers(0, 9), "I": st.integers(1, 20), "H": st.integers(1, 70)}
    | {name: st.booleans() for name in ("bias", "bidirectional", "batch_first", "tokens", "single", "stateless")}
    | {"num_layers": st.integers(1, 3), "seed": st.integers(0, 99)}
)


@CELL
@given(how=SHAPES_AND_OPTIONS)
def test_any_shape_and_options_agree_with_the_oracle(cell, how):
    if CELLS[cell].norms:
        how["H"] += 2  # one unit normalised is 0, two are 1 and -1: their gradients are nothing but rounding
    problem = make_problem(cell, **how | {"tokens": how["tokens"] and cell in TOKENS})
    got = by_layer(problem)
    assert_agree(got, by_oracle(problem), BOUND["float64"])
    y, state_n = problem.layer(problem.x, problem.state)
    names = {name: got[name] for name in got if name == "y" or name.startswith("state_n")}
    assert_same_bits({"y": y, **{f"state_n {n}": array for n, array in enumerate(unpack(state_n))}}, names)


# ------------------------------------------------------------------ finite differences


def away_from_kinks(cell, monkeypatch, **options):
    """A problem in which no activation function has its argument near a kink."""
    call, distances = oracle.Activation.__call__, []

    def watch(act, a):
        distances.extend(np.abs(a - kink).min() for kink in act.kinks)
        return call(act, a)

    for seed in range(1000):
        problem = make_problem(cell, **{"T": 3, "B": 2, "I": 3, "H": 4, "seed": seed} | options)
        distances.clear()
        with monkeypatch.context() as patch:
            patch.setattr(oracle.Activation, "__call__", watch)
            by_oracle(problem)
        if min(distances, default=1) > 0.01:
            return problem
    raise AssertionError("every problem has an argument near a kink")


@pytest.mark.parametrize(("cell", "option"), CELL_AND_OPTION)
def test_gradients_agree_with_finite_differences(cell, option, monkeypatch):
    problem = away_from_kinks(cell, monkeypatch, **OPTIONS[option])
    assert_agree(by_layer(problem), by_finite_differences(problem), 1e-7)


@CELL
def test_the_check_notices_a_wrong_gradient_of_any_gate(cell, monkeypatch):
    problem = away_from_kinks(cell, monkeypatch)
    got, want, H = by_layer(problem), by_finite_differences(problem), problem.layer.hidden_size
    assert not disagreements(got, want, 1e-7)
    for name in problem.layer.params:
        # A gate's rows of weights and biases, or a row of the cell's own parameters
        rows = H if len(got[name]) == H * len(CELLS[cell].gates) else 1
        for first in range(0, len(got[name]), rows):
            wrong = {key: array.copy() for key, array in got.items()}
            wrong[name][first : first + rows] += 1e-3 * np.abs(got[name]).max()
            assert list(disagreements(wrong, want, 1e-7)) == [name], first
    for name in want.keys() - problem.layer.params.keys():
        wrong = got | {name: got[name] + 1e-6 * (np.abs(got[name]).max() or 1)}
        assert list(disagreements(wrong, want, 1e-7)) == [name]
    for lost in (np.zeros_like(got["dx"]), np.full_like(got["dx"], np.nan)):
        assert disagreements(got | {"dx": lost}, want, 1e-7)


def _wrong_backward(dnew, kept, prev, new, own, act):
    (dh,), (h,) = dnew, new
    # One square is missing
    return (dh * (1.0 - h),), (0.0,)


def test_the_checks_notice_a_cell_with_a_wrong_equation(monkeypatch):
    cell = dataclasses.replace(CELLS["elman_tanh"], backward=_wrong_backward)
    problem = make_problem("elman_tanh", T=3, B=2, I=3, H=4)
    layer = nbrnn.Recurrent(cell, 3, 4, dtype="float64")
    layer.load_state_dict(problem.layer.state_dict())
    problem = problem._replace(layer=layer)
    names = {"dx", "dstate0 0", *layer.params}
    assert disagreements(by_layer(problem), by_oracle(problem), BOUND["float64"]).keys() == names
    assert disagreements(by_layer(problem), by_finite_differences(problem), 1e-7).keys() == names


# ------------------------------------------------------------------ schedules

SCHEDULES = [("serial", 1, 1), ("serial", 1, 3), ("batch", 2, 1), ("batch", 2, 3), ("units", 2, 2), ("units", 2, 50)]


def needs_threads(count):
    before = nbrnn.get_num_threads()
    if before < count:
        pytest.skip(f"needs {count} threads, this process has {before}")
    nbrnn.set_num_threads(count)


def force(layer, plan, monkeypatch):
    """Let a layer run by a schedule, also where it has tapes of another one."""
    monkeypatch.setattr(schedule, "choose", lambda *args: plan)
    for part in layer._parts:
        for tapes in part._spare:
            tapes.clear()
    assert plan.reason in layer.explain(7, 1)


def everything_parallel(monkeypatch):
    """Let no work be too small for a parallel region."""
    for layer in schedule.REGION_WORK:
        monkeypatch.setitem(schedule.REGION_WORK, layer, 0)


@CASE
def test_every_schedule_gives_the_same_bits(cell, dtype, tokens, monkeypatch):
    needs_threads(2)
    everything_parallel(monkeypatch)
    for sizes in ({"T": 7, "B": 1, "H": 70}, {"T": 5, "B": 5, "H": 150}):
        problem = make_problem(cell, I=9, dtype=dtype, tokens=tokens, num_layers=2, bidirectional=True, **sizes)
        results = []
        for kind, shards, block in SCHEDULES:
            if kind == "units" and CELLS[cell].norms:
                continue  # never chosen: a normalisation takes whole rows
            force(problem.layer, Schedule(kind, shards, block, "forced"), monkeypatch)
            results.append(by_layer(problem) | {"y of inference": problem.layer(problem.x, problem.state)[0]})
        for result in results[1:]:
            assert_same_bits(result, results[0])
        assert_agree(results[0], by_oracle(problem), BOUND[dtype])


def with_caches(megabytes, folder, monkeypatch):
    """Let schedules be those of another machine."""
    for index, (level, kind, size) in enumerate([(1, "Data", "48K"), (1, "Instruction", "32K"), (2, "Unified", None)]):
        here = folder / f"index{index}"
        here.mkdir(parents=True)
        for name, text in {"level": level, "type": kind, "size": size or f"{1024 * megabytes}K"}.items():
            (here / name).write_text(f"{text}\n")
    found = schedule.second_cache.__wrapped__(folder)
    assert found == megabytes << 20
    monkeypatch.setattr(schedule, "second_cache", lambda: found)
    monkeypatch.setattr(schedule, "choose", schedule.choose.__wrapped__)


@pytest.mark.parametrize(("T", "B", "kind"), [(2, 1, "serial"), (50, 32, "batch"), (50, 1, "units")])
def test_explain_names_the_schedule_and_the_bits_are_those_of_one_thread(T, B, kind, tmp_path, monkeypatch):
    needs_threads(2)
    with_caches(2, tmp_path, monkeypatch)
    problem = make_problem("lstm", T=T, B=B, I=8, H=8 if kind == "serial" else 200)
    assert f"forward: {kind}" in problem.layer.explain(T, B)
    assert f"backward: {kind}" in problem.layer.explain(T, B)
    on_two = by_layer(problem)
    nbrnn.set_num_threads(1)
    assert "forward: serial" in problem.layer.explain(T, B)
    assert_same_bits(on_two, by_layer(problem))


@pytest.mark.parametrize("I", [1, 64, 1000])
def test_whether_units_are_divided_does_not_depend_on_the_input_whose_product_comes_before(I):
    needs_threads(2)
    assert "forward: units" in nbrnn.LSTM(I, 64).explain(1000, 1)
    assert "forward: serial" in nbrnn.LSTM(I, 48).explain(1000, 1)


def test_weights_that_a_smaller_cache_cannot_hold_are_divided(tmp_path, monkeypatch):
    needs_threads(2)
    for megabytes, kind in (1, "units"), (2, "batch"):
        with_caches(megabytes, tmp_path / kind, monkeypatch)
        plan = nbrnn.LSTM(64, 256).explain(35, 32)  # a megabyte of recurrent weights
        assert f"forward: {kind}" in plan
        assert "backward: batch" in plan  # which would hand 128 kB of gradients from thread to thread in each step
        assert "backward: units" in nbrnn.LSTM(64, 640).explain(35, 10)
        monkeypatch.undo()
    assert schedule.second_cache.__wrapped__(tmp_path / "nothing") == 2 << 20


@pytest.mark.parametrize(
    ("cell", "H", "B", "forward", "backward"),
    [
        (nbrnn.LSTM, 192, 5, "units", "units"),
        (nbrnn.LSTM, 192, 6, "units", "batch"),
        (nbrnn.LSTM, 192, 8, "batch", "batch"),
        (nbrnn.LSTM, 192, 9, "units", "batch"),  # of which one thread would have five
        (nbrnn.LSTM, 192, 17, "batch", "batch"),
        (nbrnn.RNN, 160, 9, "batch", "batch"),  # three panels of units are more uneven
        (nbrnn.LSTM, 64, 9, "batch", "batch"),  # a meeting takes as long as half a row
    ],
)
def test_a_few_rows_are_divided_or_the_units_whichever_is_more_even(
    cell, H, B, forward, backward, tmp_path, monkeypatch
):
    needs_threads(2)
    with_caches(2, tmp_path, monkeypatch)
    plan = cell(64, H).explain(50, B)
    assert f"forward: {forward}" in plan
    assert f"backward: {backward}" in plan


def test_rows_of_different_lengths_are_divided_by_their_steps():
    needs_threads(2)
    part = nbrnn.LSTM(64, 192)._parts[0]
    even, uneven = Steps(np.full(9, 50)), Steps(np.array([*[51] * 4, *[50] * 5]))
    assert [part.schedules(steps)[0].kind for steps in (even, uneven)] == ["units", "batch"]


@pytest.mark.parametrize(("B", "I", "at_once"), [(16, 200, True), (16, 8, False), (17, 200, False)])
def test_with_few_rows_and_large_weights_the_input_product_of_several_steps_is_one(
    B, I, at_once, tmp_path, monkeypatch
):
    needs_threads(2)
    with_caches(2, tmp_path, monkeypatch)
    problem = make_problem("lstm", T=9, B=B, I=I, H=200)
    plan = problem.layer.explain(9, B)
    assert "forward: batch" in plan
    assert ("input product of 8 steps at once" in plan) == at_once
    on_two = by_layer(problem)
    nbrnn.set_num_threads(1)
    assert "steps at once" not in problem.layer.explain(9, B)
    assert_same_bits(on_two, by_layer(problem))


# ------------------------------------------------------------------ blocks of the way back


BLOCKS_BACK = schedule.blocks_back


def by_threes(T, tape, gradients):
    return [(max(0, stop - 3), stop) for stop in range(T, 0, -3)] or [(0, 0)]


def in_blocks_and_whole(cell, monkeypatch, lengths=None, **options):
    """The results of a layer that adds to the gradients of weights after every three steps, and of one that has all."""
    want, problem = by_layer(make_problem(cell, **options), lengths=lengths), make_problem(cell, **options)
    monkeypatch.setattr(schedule, "blocks_back", by_threes)
    assert "gradients of weights after every 3 steps" in problem.layer.explain(7, 5)
    return by_layer(problem, lengths=lengths), want


@CELL_AND_TOKENS
@pytest.mark.parametrize("lengths", [None, [3, 7, 0, 6, 7]], ids=["even", "ragged"])
def test_gradients_of_weights_block_by_block_have_the_same_bits(cell, tokens, lengths, monkeypatch):
    sizes = {"T": 7, "B": 5, "H": 9, "num_layers": 2, "tokens": tokens}
    assert_same_bits(*in_blocks_and_whole(cell, monkeypatch, lengths, **sizes))


@pytest.mark.parametrize("options", [{"proj_size": 3}, {"learn_state": True, "stateless": True}, {"recompute": 4}])
def test_nor_do_options_change_bits_of_blocks(options, monkeypatch):
    assert_same_bits(*in_blocks_and_whole("lstm", monkeypatch, T=7, B=5, H=9, **options))


def test_threads_that_divide_hidden_units_meet_anew_in_every_block(monkeypatch):
    needs_threads(2)
    everything_parallel(monkeypatch)
    monkeypatch.setattr(schedule, "choose", lambda *args: Schedule("units", 2, 2, "forced"))
    for cell in ("gru_reset_before", "lstm"):
        assert_same_bits(*in_blocks_and_whole(cell, monkeypatch, T=8, B=5, H=150))
        monkeypatch.setattr(schedule, "blocks_back", BLOCKS_BACK)


def test_blocks_of_the_second_direction_begin_at_its_end(monkeypatch):
    got, want = in_blocks_and_whole("lstm", monkeypatch, T=7, B=5, bidirectional=True)
    # The sums of its weights take the blocks in another order; nothing else is a sum over time.
    names = [name for name in got if "reverse" in name]
    assert names
    assert_same_bits(*({name: some[name] for name in some if name not in names} for some in (got, want)))
    assert_agree(*({name: some[name] for name in names} for some in (got, want)), BOUND["float64"])


@given(T=st.integers(0, 99), row=st.integers(1, 10**6), gradients=st.integers(0, 10**7))
def test_blocks_take_all_steps_from_the_last_one_on(T, row, gradients):
    blocks = schedule.blocks_back(T, T * row, gradients)
    steps = [step for first, stop in blocks for step in reversed(range(first, stop))]
    assert steps == list(reversed(range(T)))
    least = max(schedule.BLOCK_CACHES * schedule.second_cache(), gradients)
    if T * row < schedule.FEWEST_BLOCKS * least:
        assert len(blocks) == 1
    else:
        # No smaller than wanted, and no more than a step larger than they would be if they were equal
        assert least <= (blocks[0][1] - blocks[0][0]) * row <= 4 / 3 * least + row


# ------------------------------------------------------------------ gradients in two halves


def in_halves(cell, monkeypatch, **options):
    """A problem of a layer that sums its gradients apart for two halves of the rows."""
    monkeypatch.setattr(schedule, "in_halves", lambda B, tape, gradients: B > 1)
    problem = make_problem(cell, **options)
    assert "two halves" in problem.layer.explain(4, 5)
    return problem


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_in_halves_agree_with_the_oracle_twice(cell, monkeypatch):
    problem = in_halves(cell, monkeypatch, T=4, B=5, num_layers=2, bidirectional=True)
    for _ in range(2):  # the second time in the memory of the first
        assert_agree(by_layer(problem), by_oracle(problem), BOUND["float64"])
    problem.x[...] *= 0.5
    assert_agree(by_layer(problem), by_oracle(problem), BOUND["float64"])


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before", "ctrnn"])
def test_halves_are_the_same_on_any_number_of_threads(cell, monkeypatch):
    needs_threads(2)
    everything_parallel(monkeypatch)
    problem = in_halves(cell, monkeypatch, T=6, B=33, H=70)
    on_two = by_layer(problem)
    nbrnn.set_num_threads(1)
    assert_same_bits(on_two, by_layer(problem))


@pytest.mark.parametrize("options", [{}, {"proj_size": 3}])
def test_halves_of_pieces_of_a_sequence_are_those_of_the_whole(options, monkeypatch):
    sizes = {"T": 11, "B": 5, "H": 9} | options
    whole = by_layer(in_halves("lstm", monkeypatch, **sizes))
    assert_same_bits(by_layer(in_halves("lstm", monkeypatch, recompute=4, **sizes)), whole)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "tokens": True}])
def test_halves_of_blocks_of_steps_are_those_of_all_steps(options, monkeypatch):
    monkeypatch.setattr(schedule, "in_halves", lambda B, tape, gradients: B > 1)
    assert_same_bits(*in_blocks_and_whole("lstm", monkeypatch, T=7, B=5, H=9, **options))


def test_small_gradients_of_many_even_rows_are_summed_in_halves():
    def words(layer, T, B):
        return "two halves" in layer.explain(T, B)

    layer = nbrnn.LSTM(64, 128)  # 393 kB of parameters, 2 kB of tape for a step of a row
    assert words(layer, 100, 64)
    assert words(layer, 60, 16)
    assert not words(layer, 60, 15)  # rows
    assert not words(layer, 40, 16)  # tape
    assert not words(nbrnn.LSTM(64, 256), 100, 64)  # gradients
    assert not words(nbrnn.LSTM(64, 128, products="bfloat16"), 100, 64)


# ------------------------------------------------------------------ NaN


def without_row(results, row):
    """What belongs to the other rows alone."""
    kinds = ("y", "dx", "state_n", "dstate0")
    each = {name: array for name, array in results.items() if name.split()[0] in kinds}
    return {name: np.ascontiguousarray(np.delete(array, row, axis=1)) for name, array in each.items()}


@CELL_AND_DTYPE
@pytest.mark.parametrize("where", ["x", "state", "dy"])
def test_nan_stays_in_its_row(cell, dtype, where):
    problem = make_problem(cell, T=5, B=11, dtype=dtype)
    clean = by_layer(problem)
    t, row, feedback = 2, 6, problem.layer.cell.feedback
    # Without a recurrent product a unit sees itself alone, and not always its h.
    state = unpack(problem.state)[0 if feedback else -1]
    dirty = {"x": problem.x, "state": state, "dy": problem.dy}[where]
    dirty[0 if where == "state" else t, row, 1] = np.nan
    results = by_layer(problem)
    assert_same_bits(without_row(results, row), without_row(clean, row))
    y, dx = results["y"][:, row], results["dx"][:, row]
    if where == "dy":
        assert_same_bits({"y": y.copy()}, {"y": clean["y"][:, row].copy()})
        assert np.isnan(dx[: t + 1]).all()
        assert np.isfinite(dx[t + 1 :]).all()
    else:
        # From the step on, no output hides it, and no gradient.
        first = t if where == "x" else 0
        assert np.isnan(y[first:] if feedback or where == "x" else y[first:, 1]).all()
        assert np.isfinite(y[:first]).all()
        assert np.isnan(dx).all()
    for name in problem.layer.params:
        assert np.isnan(results[name]).any(), name


@CELL
def test_nan_in_a_parameter_is_not_hidden(cell):
    for name in make_problem(cell).layer.params:
        problem = make_problem(cell)
        problem.layer.params[name].flat[-1] = np.nan
        results = by_layer(problem)
        assert np.isnan(results["y"]).any(axis=(0, 2)).all()
        assert np.isnan(results["dx"]).all(axis=(0, 2)).any()


# ------------------------------------------------------------------ first states


@CASE
@pytest.mark.parametrize("lengths", [None, (5, 0, 2, 5, 1, 3, 4)])
@pytest.mark.parametrize("T", [1, 5])
def test_no_state_is_a_state_of_zeros_bit_for_bit(cell, dtype, tokens, T, lengths):
    lengths = None if lengths is None else np.minimum(lengths, T)
    problem = make_problem(cell, T=T, B=7, H=33, dtype=dtype, tokens=tokens, num_layers=2, bidirectional=True)
    zeros = problem._replace(state=pack([np.zeros_like(array) for array in unpack(problem.state)]))
    want = by_layer(zeros, lengths=lengths)
    assert_same_bits(by_layer(problem._replace(state=None), lengths=lengths), want)
    layer, x, state, *_ = zeros
    assert_same_bits({"y": layer(x, None, lengths)[0]}, {"y": layer(x, state, lengths)[0]})


@pytest.mark.parametrize("options", [{}, {"recompute": 7}, {"products": "bfloat16"}], ids=str)
def test_nor_does_it_matter_where_gradients_are_summed_in_halves_and_block_by_block(options, monkeypatch):
    monkeypatch.setattr(schedule, "second_cache", lambda: 1 << 12)
    problem = make_problem("lstm", T=20, B=16, H=8, dtype="float32", **options)
    part, steps = problem.layer._parts[0], even_steps(20, 16)
    assert len(part.blocks(steps)) > 2
    assert part.in_halves(steps) == (options.get("products") is None)
    zeros = problem._replace(state=pack([np.zeros_like(array) for array in unpack(problem.state)]))
    assert_same_bits(by_layer(problem._replace(state=None)), by_layer(zeros))


def test_nor_for_factors_of_eight_bits():
    layer, x, state, *_ = make_problem("gru", T=5, B=7, H=33, dtype="float32", products="int8")
    assert_same_bits({"y": layer(x)[0]}, {"y": layer(x, np.zeros_like(state))[0]})


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before", "jordan", "layernorm_lstm"])
def test_states_of_zeros_are_not_multiplied(cell):
    layer, x, state, *_ = make_problem(cell, T=3)
    layer.params["weight_hh_l0"][...] = np.nan
    y, _ = layer(x)
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1:]).all()
    # But a weight that is NaN is not passed over altogether, and a state is multiplied, zero or not
    assert np.isnan(layer(x[:1])[0]).all()
    assert np.isnan(layer(x, pack([np.zeros_like(array) for array in unpack(state)]))[0]).all()


# ------------------------------------------------------------------ what a call keeps, and what it leaves alone


def arrays_of(problem):
    _, x, state, dy, dstate_n, _ = problem
    return [x, dy, *unpack(state), *unpack(dstate_n)]


@CELL
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}], ids=str)
def test_inputs_and_parameters_are_not_modified(cell, options):
    problem = make_problem(cell, **options)
    arrays = [*arrays_of(problem), problem.layer.params.flat]
    before = [array.copy() for array in arrays]
    results = [*by_layer(problem).values(), problem.layer(problem.x, problem.state)[0]]
    for array, copy in zip(arrays, before):
        assert array.tobytes() == copy.tobytes()
        assert not any(np.shares_memory(array, result) for result in results)


def test_inputs_may_be_read_only():
    problem = make_problem("elman_relu", num_layers=2)
    want = by_layer(problem)
    for array in (*arrays_of(problem), problem.layer.params.flat):
        array.flags.writeable = False
    assert_same_bits(by_layer(problem), want)


@CELL
def test_arrays_may_lie_in_memory_as_they_like(cell):
    problem = make_problem(cell, num_layers=2, bidirectional=True)
    want = by_layer(problem)

    def strided(array):
        wide = np.full([2 * n for n in array.shape], np.nan, array.dtype)
        view = wide[tuple(slice(None, None, -2) for _ in array.shape)]
        view[...] = array
        return view

    for change in (np.asfortranarray, strided, lambda array: array[::-1].copy()[::-1]):
        _, x, state, dy, dstate_n, _ = problem
        states = [pack([change(array) for array in unpack(given)]) for given in (state, dstate_n)]
        moved = problem._replace(x=change(x), state=states[0], dy=change(dy), dstate_n=states[1])
        assert_same_bits(by_layer(moved), want)


@pytest.mark.parametrize("kind", ["int8", "uint8", "int32", "uint64"])
def test_tokens_are_integers_of_any_kind(kind):
    problem = make_problem("lstm", tokens=True)
    want = by_layer(problem)
    assert_same_bits(by_layer(problem._replace(x=problem.x.astype(kind)[:, ::1])), want)


def test_float32_and_float64_are_converted_into_the_dtype_of_the_layer():
    problem = make_problem("lstm", dtype="float32")
    converted = problem._replace(x=problem.x.astype(np.float64), dy=problem.dy.astype(np.float64))
    assert_same_bits(by_layer(converted), by_layer(problem))


def test_the_output_of_vjp_is_read_only_and_its_pullback_works_once():
    layer, x, state, dy, dstate_n, _ = make_problem("lstm")
    y, _, pullback = layer.vjp(x, state)
    with pytest.raises(ValueError, match="read-only"):
        y[...] = 0
    with pytest.raises(ValueError, match="dy: expected"):
        pullback(dy[:-1])  # which does not use it up
    pullback(dy, dstate_n)
    with pytest.raises(RuntimeError, match="pullback: called twice"):
        pullback(dy, dstate_n)


@pytest.mark.parametrize("cell", ["lstm", "ctrnn"])
def test_states_may_come_from_anywhere_in_every_call(cell):
    """Calls that go on in the memory of earlier ones: with states, without, and with one array as several of them."""
    options = {"num_layers": 2, "bidirectional": True}
    problem = make_problem(cell, **options)
    one, d = (unpack(states)[0] for states in (problem.state, problem.dstate_n))
    count = len(CELLS[cell].states)
    same, none = ({"state": pack([one] * count), "dstate_n": pack([d] * count)}, {"state": None, "dstate_n": None})
    for change in ({}, same, none, {}, {"state": None}, same):
        case = problem._replace(**change)
        assert_same_bits(by_layer(case), by_layer(case._replace(layer=make_problem(cell, **options).layer)))


@pytest.mark.parametrize(("make", "kept"), [
    (lambda: nbrnn.CTRNN(2, 5), 3),
    (lambda: nbrnn.CTRNN(2, 5, integrator="exponential"), 3),
    (lambda: nbrnn.CTRNN(2, 5, recurrent_dropout=0.5), 7 * 3 + 2 * 3),  # whose output is such a state
    (lambda: nbrnn.LSTM(2, 5), 7 * 3 + 2 * 3),
])  # fmt: skip
def test_states_that_backward_does_not_read_are_not_kept(make, kept):
    layer = make()
    _, _, pullback = layer.vjp(np.zeros((7, 3, 2), "f4"))
    pullback(np.zeros((7, 3, 5), "f4"))
    (tape,) = layer._parts[0]._spare[1]
    assert tape.inner.shape[1] == kept


@pytest.mark.parametrize("lengths", [None, [3, 1]], ids=["even", "ragged"])
def test_outputs_of_inference_belong_to_the_caller(lengths):
    layer, x = nbrnn.LSTM(2, 5, 2, seed=0), np.random.default_rng(0).standard_normal((3, 2, 2)).astype("f4")
    y, state = layer(x, lengths=lengths)
    before = y.copy(), state[0].copy()
    y[...] = 7
    assert_same_bits({"state": state[0]}, {"state": before[1]})
    again, _ = layer(x, lengths=lengths)
    again += 0
    assert_same_bits({"y": again}, {"y": before[0]})
    assert (y == 7).all()


@CELL
def test_pullbacks_may_wait_for_each_other(cell):
    """Two calls before the first pullback: each has its own tape."""
    one, two = make_problem(cell, seed=1), make_problem(cell, seed=2)
    two = two._replace(layer=one.layer)
    want = [by_layer(one), by_layer(two)]
    calls = [one.layer.vjp(problem.x, problem.state) for problem in (one, two)]
    for n in (1, 0):
        y, state_n, pullback = calls[n]
        problem = (one, two)[n]
        assert_same_bits(name_all(y, state_n, *pullback(problem.dy, problem.dstate_n)), want[n])


@CELL_AND_TOKENS
@pytest.mark.parametrize("bias", [False, True])
def test_memory_that_is_used_again_leaves_no_trace(cell, tokens, bias):
    """Neither an earlier call's tape nor the old contents of `out` may show."""
    problem = make_problem(cell, H=9, tokens=tokens, bias=bias)
    want = by_layer(problem)
    for array in unpack(problem.state):
        dirty = problem._replace(state=pack([np.full_like(array, np.nan) for _ in problem.layer.cell.states]))
    assert np.isnan(by_layer(dirty)["y"]).all()
    assert_same_bits(by_layer(problem), want)
    layer, x, state, dy, dstate_n, _ = problem
    out = nbrnn.Parameters.zeros(layer.params.shapes, layer.dtype)
    out.flat[:] = np.nan
    y, state_n, pullback = layer.vjp(x, state)
    dx, dstate0, grads = pullback(dy, dstate_n, out=out)
    assert grads is out
    assert_same_bits(name_all(y, state_n, dx, dstate0, grads), want)


@CELL
@pytest.mark.parametrize("H", [6, 150])
def test_inference_sees_every_change_of_a_parameter(cell, H):
    """Inference packs its weights once: a single number that changes must make it pack them again."""
    problem = make_problem(cell, H=H, bidirectional=True)
    layer, x, state = problem[:3]
    layer(x, state)
    for view in layer.params.values():
        for index in (0, view.size // 2, view.size - 1):
            view.flat[index] += 1
            assert_same_bits({"y": layer(x, state)[0]}, {"y": layer.vjp(x, state)[0]})


# ------------------------------------------------------------------ against torch, where there is one


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", ["elman_tanh", "elman_relu", "lstm", "gru"])
def test_torch_gives_the_same(cell, bidirectional):
    torch = pytest.importorskip("torch")
    problem = make_problem(cell, num_layers=2, bidirectional=bidirectional)
    kind, own = {
        "elman_tanh": (torch.nn.RNN, {"nonlinearity": "tanh"}),
        "elman_relu": (torch.nn.RNN, {"nonlinearity": "relu"}),
        "lstm": (torch.nn.LSTM, {}),
        "gru": (torch.nn.GRU, {}),
    }[cell]
    theirs = kind(5, 6, num_layers=2, bidirectional=bidirectional, dtype=torch.float64, **own)
    theirs.load_state_dict({name: torch.from_numpy(array) for name, array in problem.layer.state_dict().items()})
    x, *states = (torch.from_numpy(a).requires_grad_() for a in (problem.x, *unpack(problem.state)))
    y, state_n = theirs(x, pack(states))
    outputs = [y, *unpack(state_n)]
    torch.autograd.backward(outputs, [torch.from_numpy(a) for a in (problem.dy, *unpack(problem.dstate_n))])
    want = name_all(
        y.detach().numpy(),
        pack([a.detach().numpy() for a in outputs[1:]]),
        x.grad.numpy(),
        pack([a.grad.numpy() for a in states]),
        {name: p.grad.numpy() for name, p in theirs.named_parameters()},
    )
    assert_agree(by_layer(problem), want, BOUND["float64"])
