"""Sequences one step at a time: the bits of the whole, rows that come and go, kept states, and clear errors."""

import tracemalloc

import numpy as np
import pytest
from test_recurrent import CELL_AND_DTYPE, assert_same_bits, everything_parallel, make_problem, needs_threads, unpack

import nbrnn


def by_steps(session, x):
    return np.stack([session.step(x_t).copy() for x_t in x])


def assert_states(session, state):
    got = {str(n): array for n, array in enumerate(unpack(session.state))}
    assert_same_bits(got, {str(n): np.ascontiguousarray(array) for n, array in enumerate(unpack(state))})


@CELL_AND_DTYPE
@pytest.mark.parametrize("B", [1, 3, 13])
def test_steps_have_the_bits_of_the_whole_sequence(cell, dtype, B):
    layer, x, state, *_ = make_problem(cell, T=9, B=B, H=33, dtype=dtype, num_layers=2)
    session = layer.stream(B)
    session.state = state
    y, state_n = layer(x, state)
    assert_same_bits({"y": by_steps(session, x)}, {"y": y})
    assert_states(session, state_n)


@CELL_AND_DTYPE
def test_steps_and_chunks_can_be_mixed(cell, dtype):
    layer, x, *_ = make_problem(cell, T=9, B=3, H=33, dtype=dtype, num_layers=2)
    session, (y, state_n) = layer.stream(3), layer(x)
    pieces = [by_steps(session, x[:2]), session.run(x[2:5]), by_steps(session, x[5:6]), session.run(x[6:])]
    assert_same_bits({"y": np.concatenate(pieces)}, {"y": y})
    assert_states(session, state_n)


def test_steps_divided_among_threads_have_the_same_bits(monkeypatch):
    needs_threads(2)
    everything_parallel(monkeypatch)
    for B in (1, 16):
        layer, x, *_ = make_problem("lstm", T=30, B=B, H=150, dtype="float32", num_layers=2)
        assert_same_bits({"y": by_steps(layer.stream(B), x)}, {"y": layer(x)[0]})


def test_tokens_and_one_hot_rows_can_take_turns():
    layer, tokens, *_ = make_problem("lstm", T=8, B=3, tokens=True)
    session, y = layer.stream(3), layer(tokens)[0]
    x = [one if t % 3 else np.eye(5)[one] for t, one in enumerate(tokens)]
    np.testing.assert_allclose(by_steps(session, x), y, rtol=0, atol=1e-14)
    assert_same_bits({"y": by_steps(layer.stream(3), tokens)}, {"y": y})


def test_a_network_streams_like_its_layers():
    model = nbrnn.Sequential(nbrnn.Embedding(7, 5, seed=0), nbrnn.GRU(5, 33, seed=1), nbrnn.Linear(33, 4, seed=2))
    tokens = np.random.default_rng(0).integers(0, 7, (10, 3))
    session, (y, state_n) = model.stream(3), model(tokens)
    assert_same_bits({"y": by_steps(session, tokens)}, {"y": y})
    np.testing.assert_array_equal(session.state[1], state_n[1])


def test_time_steps_of_a_ctrnn_may_differ_by_step_and_row():
    layer, x, *_ = make_problem("ctrnn", T=6, B=4, num_layers=2)
    dt = np.random.default_rng(0).uniform(0.05, 0.5, (6, 4))
    session, y = layer.stream(4), layer(x, dt=dt)[0]
    assert_same_bits({"y": np.stack([session.step(a, dt=b).copy() for a, b in zip(x, dt)])}, {"y": y})
    # ... and without one it is the layer's own again
    session.reset()
    assert_same_bits({"y": by_steps(session, x)}, {"y": layer(x)[0]})


def test_what_a_step_is_given_does_not_reach_the_layer():
    layer, x, *_ = make_problem("ctrnn", T=2, B=4)
    want = layer(x)[0]
    layer.stream(4).step(x[0], dt=0.05)
    assert_same_bits({"y": layer(x)[0]}, {"y": want})
    assert_same_bits({"y": by_steps(layer.stream(4), x)}, {"y": want})


# ------------------------------------------------------------------ rows and states


@pytest.mark.parametrize("cell", ["lstm", "ctrnn"])
def test_rows_begin_anew_join_and_leave(cell):
    layer, x, *_ = make_problem(cell, T=12, B=4, H=33, num_layers=2)
    session = layer.stream(2)
    by_steps(session, x[:3, :2])
    assert session.join(2) == [2, 3]
    by_steps(session, x[3:6])
    session.reset([1])
    by_steps(session, x[6:9])
    session.leave([2])
    y = by_steps(session, x[9:][:, [0, 1, 3]])
    for place, (row, start) in enumerate([(0, 0), (1, 6), (3, 3)]):
        alone = layer(x[start:, row])[0]
        assert_same_bits({"y": y[:, place].copy()}, {"y": alone[9 - start :]})
    session.reset()
    assert all((state == 0).all() for state in unpack(session.state))


def test_a_learnt_state_is_where_rows_begin():
    layer, x, *_ = make_problem("lstm", T=4, B=3, learn_state=True)
    session = layer.stream(3)
    by_steps(session, x)
    session.reset()
    assert_same_bits({"y": by_steps(session, x)}, {"y": layer(x)[0]})


def test_a_state_that_was_kept_goes_on_in_another_session():
    layer, x, *_ = make_problem("lstm", T=8, B=3, num_layers=2)
    first, second = layer.stream(3), layer.stream(3)
    by_steps(first, x[:5])
    kept = first.state
    want = by_steps(first, x[5:])
    second.state = kept
    assert_same_bits({"y": by_steps(second, x[5:])}, {"y": want})


def test_a_state_that_is_read_is_a_copy():
    layer, x, *_ = make_problem("gru", T=2, B=3)
    session = layer.stream(3)
    session.step(x[0])
    session.state[...] = 7.0
    np.testing.assert_array_equal(session.state, layer(x[:1])[1])


def test_changed_parameters_count_after_a_refresh():
    layer, x, *_ = make_problem("lstm", T=3, B=2)
    session = layer.stream(2)
    before = session.step(x[0]).copy()
    layer.params.flat *= 1.5
    session.reset()
    session.refresh()
    after = session.step(x[0]).copy()
    assert_same_bits({"y": after}, {"y": layer(x[:1])[0][0]})
    assert not np.array_equal(before, after)


# ------------------------------------------------------------------ memory


def test_a_step_allocates_nothing():
    layer = nbrnn.LSTM(16, 64, num_layers=2, seed=0)
    session, x = layer.stream(2), np.ones((2, 16), "float32")
    for _ in range(3):
        session.step(x)
    tracemalloc.start()
    try:
        for _ in range(100):
            session.step(x)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2000  # the views and integers of Python itself; one row of output alone has 512 bytes


def test_an_output_stays_until_the_step_after_the_next():
    layer, x, *_ = make_problem("lstm", T=3, B=2)
    session = layer.stream(2)
    one = session.step(x[0])
    kept = one.copy()
    session.step(x[1])
    np.testing.assert_array_equal(one, kept)
    with pytest.raises(ValueError, match="read-only"):
        one[...] = 0


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda s: s.step(np.zeros((2, 5))), ValueError, r"x: expected \(3, 5\), got \(2, 5\)"),
        (lambda s: s.step(np.zeros((3, 4))), ValueError, r"x: expected \(3, 5\), got \(3, 4\)"),
        (lambda s: s.step(np.zeros((3, 5), "float16")), TypeError, "x: expected float64"),
        (lambda s: s.step(np.array([0, 5, 1])), ValueError, r"x: expected tokens in \[0, 5\)"),
        (lambda s: s.step(np.array([0, 1])), ValueError, r"x: expected \(3,\), got \(2,\)"),
        (lambda s: s.step(np.zeros((3, 5)), dt=0.1), TypeError, "dt: unknown"),
        (lambda s: s.run(np.zeros((4, 2, 5))), ValueError, "state"),
        (lambda s: s.reset([3]), ValueError, "rows: expected indices from 0 to 2"),
        (lambda s: s.reset([-1]), ValueError, "rows: expected indices from 0 to 2"),
        (lambda s: s.reset([0.5]), TypeError, "rows: expected indices"),
        (lambda s: s.leave([0, 1, 2]), ValueError, "rows: expected at least one row to stay"),
        (lambda s: s.join(0), ValueError, "count: expected at least 1"),
        (lambda s: setattr(s, "state", np.zeros((1, 3, 6))), TypeError, "state: expected a tuple"),
        (lambda s: setattr(s, "state", (np.zeros((1, 2, 6)),) * 2), ValueError, "state h: expected"),
        (lambda s: setattr(s, "state", (np.zeros((1, 3, 6), int),) * 2), TypeError, "state h: expected float64"),
    ],
)
def test_a_session_refuses_what_does_not_fit_and_stays_as_it_was(call, error, words):
    layer, x, *_ = make_problem("lstm", T=4, B=3)
    session, other = layer.stream(3), layer.stream(3)
    for one in (session, other):
        one.step(x[0])
    with pytest.raises(error, match=words):
        call(session)
    assert session.batch_size == 3
    assert_same_bits({"y": by_steps(session, x[1:])}, {"y": by_steps(other, x[1:])})


def test_what_needs_the_whole_sequence_refuses_to_stream():
    layer = nbrnn.LSTM(3, 4, bidirectional=True)
    with pytest.raises(ValueError, match="stream: expected a layer of one direction"):
        layer.stream()
    with pytest.raises(ValueError, match="stream: expected a layer of one direction"):
        nbrnn.Sequential(layer, nbrnn.Linear(8, 2)).stream()
    with pytest.raises(ValueError, match="batch_size: expected at least 1"):
        nbrnn.GRU(3, 4).stream(0)
    with pytest.raises(TypeError, match="batch_size: expected an integer"):
        nbrnn.GRU(3, 4).stream(1.0)
