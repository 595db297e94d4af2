"""Bit for bit: a row does not depend on its batch, a sequence not on its cuts, and nothing on the number of threads."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_recurrent import (
    CASE,
    CELL_AND_DTYPE,
    PAIRS,
    assert_same_bits,
    by_layer,
    everything_parallel,
    make_problem,
    name_all,
    needs_threads,
    pack,
    unpack,
)

import nbrnn
from nbrnn.kernels import gemm
from nbrnn.kernels.gemm import WHOLE, gradient_by
from nbrnn.kernels.jit import sharded

STACKED = {"num_layers": 2, "bidirectional": True}
ROWS = st.integers(1, 40)


def forward(layer, x, state=None):
    y, state_n = layer(x, state)
    return {"y": y, **{f"state_n {n}": array for n, array in enumerate(unpack(state_n))}}


def take_rows(results, rows):
    """The same rows of the batch from all results."""
    return {name: np.ascontiguousarray(array[:, rows]) for name, array in results.items()}


def change_states(state, change):
    return pack([change(array) for array in unpack(state)])


# ------------------------------------------------------------------ rows


@CASE
@pytest.mark.parametrize("H", [7, 100])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(cell, dtype, tokens, H):
    layer, x, state, *_ = make_problem(cell, T=5, B=37, H=H, dtype=dtype, tokens=tokens, **STACKED)
    whole = forward(layer, x, state)
    # Batches of all sizes of a tile and beyond, and each row alone
    parts = [slice(row, row + 1) for row in range(37)] + [slice(3, 3 + size) for size in range(2, 34)]
    for rows in [*parts, slice(None, None, -1), slice(0, None, 3)]:
        part = forward(layer, x[:, rows], change_states(state, lambda array, rows=rows: array[:, rows]))
        assert_same_bits(part, take_rows(whole, rows))


@CELL_AND_DTYPE
def test_so_have_its_gradients(cell, dtype):
    problem = make_problem(cell, T=5, B=19, H=33, dtype=dtype, **STACKED)
    layer, x, state, dy, dstate_n, _ = problem
    per_row = {name: array for name, array in by_layer(problem).items() if name not in layer.params}
    for rows in [slice(0, 1), slice(7, 8), slice(18, 19), slice(2, 9), slice(5, 17)]:
        states = [change_states(given, lambda array, rows=rows: array[:, rows]) for given in (state, dstate_n)]
        part = by_layer(problem._replace(x=x[:, rows], state=states[0], dy=dy[:, rows], dstate_n=states[1]))
        part = {name: array for name, array in part.items() if name in per_row}
        assert_same_bits(part, take_rows(per_row, rows))


@CELL_AND_DTYPE
def test_one_unbatched_sequence_is_a_batch_of_one(cell, dtype):
    layer, x, state, dy, dstate_n, _ = make_problem(cell, T=9, B=1, dtype=dtype, **STACKED)
    want = by_layer(make_problem(cell, T=9, B=1, dtype=dtype, **STACKED))
    states = [change_states(given, lambda array: array[:, 0]) for given in (state, dstate_n)]
    y, state_n, pullback = layer.vjp(x[:, 0], states[0])
    got = name_all(y, state_n, *pullback(dy[:, 0], states[1]))
    assert {name: array.tobytes() for name, array in got.items()} == {name: a.tobytes() for name, a in want.items()}


@given(B=ROWS, other=ROWS, T=st.integers(1, 5), H=st.integers(1, 80), seed=st.integers(0, 99))
@pytest.mark.parametrize(("cell", "dtype"), [("gru", "float64"), ("lstm", "float32")])
def test_neighbours_do_not_matter(cell, dtype, B, other, T, H, seed):
    layer, x, state, *_ = make_problem(cell, T=T, B=B + other, H=H, dtype=dtype, seed=seed)
    alone = forward(layer, x[:, :B], change_states(state, lambda array: array[:, :B]))
    assert_same_bits(alone, take_rows(forward(layer, x, state), slice(0, B)))


# ------------------------------------------------------------------ chunks


@CASE
@pytest.mark.parametrize("B", [1, 3, 30])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_sequence_has_the_same_bits_in_one_piece_and_in_chunks(cell, dtype, tokens, B, training):
    T = 60
    layer, x, state, *_ = make_problem(cell, T=T, B=B, H=33, dtype=dtype, tokens=tokens, num_layers=2)
    call = (lambda x, state: layer.vjp(x, state)[:2]) if training else layer
    whole, last = call(x, state)
    for cuts in ([1], [59], [7, 8, 31], [20, 20, 40], range(T)):
        carried, pieces = state, []
        for start, stop in zip([0, *cuts], [*cuts, T]):
            y, carried = call(x[start:stop], carried)
            pieces.append(y)
        assert_same_bits({"y": np.concatenate(pieces)}, {"y": whole})
        for got, want in zip(unpack(carried), unpack(last)):
            assert_same_bits({"state_n": got}, {"state_n": want})


@CELL_AND_DTYPE
def test_the_second_direction_is_the_first_one_on_the_reversed_sequence(cell, dtype):
    layer, x, state, *_ = make_problem(cell, T=9, B=5, H=33, dtype=dtype, bidirectional=True)
    y, state_n = layer(x, state)
    one = make_problem(cell, H=33, dtype=dtype).layer
    values = layer.state_dict()
    one.load_state_dict({name: values[name + "_reverse"] for name in one.params})
    backwards, last = one(x[::-1], change_states(state, lambda array: array[1:]))
    assert_same_bits({"y": backwards[::-1].copy()}, {"y": y[:, :, 33:].copy()})
    for got, want in zip(unpack(last), unpack(state_n)):
        assert_same_bits({"state_n": got[0]}, {"state_n": want[1]})


# ------------------------------------------------------------------ inference and training


@CASE
@pytest.mark.parametrize("shape", [(1, 1, 7), (50, 1, 100), (6, 7, 33), (3, 40, 100)], ids=str)
def test_training_sees_the_outputs_of_inference(cell, dtype, tokens, shape):
    T, B, H = shape
    problem = make_problem(cell, T=T, B=B, H=H, dtype=dtype, tokens=tokens, **STACKED)
    both = by_layer(problem)
    inference = forward(problem.layer, problem.x, problem.state)
    assert_same_bits(inference, {name: both[name] for name in inference})


@CELL_AND_DTYPE
def test_two_calls_give_the_same_bits(cell, dtype):
    problem = make_problem(cell, T=6, B=7, H=33, dtype=dtype, **STACKED)
    assert_same_bits(by_layer(problem), by_layer(problem))


# ------------------------------------------------------------------ threads

# Few rows and many units, many rows and few units, many of both
SHAPES = ((9, 1, 100), (9, 3, 100), (5, 40, 33), (4, 24, 150))


def everything(cell, dtype, tokens, shape):
    """All results of training and inference."""
    T, B, H = shape
    problem = make_problem(cell, T=T, B=B, I=17, H=H, dtype=dtype, tokens=tokens, **STACKED)
    inference = forward(problem.layer, problem.x, problem.state)
    linear = nbrnn.Linear(2 * H, 19, dtype=dtype, seed=0)
    y, _, pullback = linear.vjp(inference["y"])
    dx, _, grads = pullback(y)
    results = {"linear y": y, "linear dx": dx, **{f"linear {name}": array for name, array in grads.items()}}
    results |= {f"inference {name}": array for name, array in inference.items()}
    return by_layer(problem) | results


@CASE
@pytest.mark.parametrize("small_too", [False, True])
def test_one_and_two_threads_give_the_same_bits(cell, dtype, tokens, small_too, monkeypatch):
    needs_threads(2)
    if small_too:
        everything_parallel(monkeypatch)
    for shape in SHAPES:
        nbrnn.set_num_threads(1)
        serial = everything(cell, dtype, tokens, shape)
        nbrnn.set_num_threads(2)
        assert_same_bits(everything(cell, dtype, tokens, shape), serial)


def digest(threads):
    """One hash of everything."""
    nbrnn.set_num_threads(threads)
    hashes = hashlib.sha256()
    with pytest.MonkeyPatch.context() as monkeypatch:
        everything_parallel(monkeypatch)
        for cell, dtype in PAIRS:
            for shape in SHAPES[1:]:
                for array in everything(cell, dtype, False, shape).values():
                    hashes.update(array.tobytes())
    return hashes.hexdigest()


def test_five_threads_give_the_same_bits(python):
    """On fewer cores, too."""
    printed = python("import test_promises; print(test_promises.digest(5))", NUMBA_NUM_THREADS="5")
    assert printed.strip() == digest(1)


@sharded
def sums_by_thread(
    s, shards, kernel, dy, runs, piece, step, add, blank, x, offset, ldx, rows, dw, db, x2, offset2, ldx2, rows2, dw2,
    db2,
):  # fmt: skip
    """A kernel with a bug: as many sums as there are threads, so that their order depends on that number."""
    if s == 0:
        for n in range(shards):
            lo, hi = len(dy) * n // shards, len(dy) * (n + 1) // shards
            here, here2 = offset + lo * ldx, offset2 + lo * ldx2
            one, two = (x, here, ldx, rows, dw, db), (x2, here2, ldx2, rows2, dw2, db2)
            gradient_by(0, 1, WHOLE, kernel, dy[lo:hi], runs, piece, step, add + n, 0, *one, *two)


def test_a_kernel_whose_sums_depend_on_the_threads_is_noticed(monkeypatch):
    needs_threads(2)
    everything_parallel(monkeypatch)
    monkeypatch.setattr(gemm, "gradient", sums_by_thread)
    results = []
    for threads in (1, 2):
        nbrnn.set_num_threads(threads)
        results.append(everything("lstm", "float64", False, (9, 24, 33)))
    with pytest.raises(AssertionError, match="differs"):
        assert_same_bits(*results)
