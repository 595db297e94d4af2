"""Sequences of different lengths: a row's bits are those that it has alone, and padding is as if it were not there."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_promises import STACKED, change_states
from test_recurrent import (
    BOUND,
    CASE,
    CELL,
    SCHEDULES,
    assert_agree,
    assert_same_bits,
    by_finite_differences,
    by_layer,
    by_oracle,
    everything_parallel,
    force,
    make_problem,
    needs_threads,
    unpack,
    without_row,
)

import nbrnn
from nbrnn.cells.cell import CELLS
from nbrnn.data.ragged import Ragged
from nbrnn.kernels.schedule import Schedule
from nbrnn.layers import sequences
from nbrnn.layers.direction import Direction
from nbrnn.layers.sequences import Sequences, Steps

# ------------------------------------------------------------------ the container

FORMS = st.tuples(
    st.lists(st.integers(0, 5), min_size=1, max_size=6),
    st.sampled_from([(), (3,), (2, 3)]),
    st.sampled_from(["float32", "float64", "int64", "uint8"]),
)


def make_list(lengths, rest=(), dtype="float64"):
    """Sequences of these lengths whose numbers are all different, and none of them 0."""
    numbers = iter(range(1, 10**6))
    arrays = [np.zeros((length, *rest), dtype) for length in lengths]
    for array in arrays:
        array.flat[:] = [next(numbers) for _ in range(array.size)]
    return arrays


def assert_same(left, right):
    """Two Ragged hold the same steps of the same sequences, in the same dtype."""
    assert left.offsets.tolist() == right.offsets.tolist()
    assert left.dtype == right.dtype
    assert_same_bits({"values": left.values}, {"values": right.values})


@given(FORMS)
def test_a_list_comes_back_as_it_was(form):
    arrays = make_list(*form)
    batch = Ragged.from_list(arrays)
    assert batch.lengths.tolist() == [len(one) for one in arrays] == form[0]
    assert batch.offsets.dtype == batch.lengths.dtype == np.int64
    assert len(batch) == len(batch.to_list()) == len(list(batch)) == len(arrays)
    for n, want in enumerate(arrays):
        for got in (batch[n], batch[n - len(arrays)], batch.to_list()[n], list(batch)[n]):
            assert got.dtype == want.dtype
            assert_same_bits({"sequence": got}, {"sequence": want})
    assert batch.size == sum(one.size for one in arrays)


@given(FORMS, st.booleans())
def test_padding_comes_and_goes(form, batch_first):
    batch = Ragged.from_list(make_list(*form))
    padded, lengths = batch.to_padded(batch_first=batch_first, fill=7)
    by_row = padded if batch_first else padded.swapaxes(0, 1)
    assert by_row.shape == (len(batch), max(form[0]), *form[1])
    assert padded.dtype == batch.dtype
    for row, one in zip(by_row, batch):
        assert (row[: len(one)] == one).all()
        assert (row[len(one) :] == 7).all()
    assert_same(Ragged.from_padded(padded, lengths, batch_first=batch_first), batch)
    assert (batch.to_padded()[0] == 0).sum() == (max(form[0]) * len(batch) - sum(form[0])) * np.prod(form[1])


@given(FORMS, st.booleans(), st.integers(0, 3))
def test_a_mask_says_where_steps_are(form, batch_first, more):
    batch = Ragged.from_list(make_list(*form))
    mask, padded = batch.mask(batch_first), batch.to_padded(batch_first)[0]
    assert mask.dtype == bool
    assert mask.shape == padded.shape[:2]
    assert mask.sum(axis=int(batch_first)).tolist() == form[0]
    width = [(0, 0)] * padded.ndim
    width[int(batch_first)] = (0, more)
    padded, mask = np.pad(padded, width), np.pad(mask, width[:2])
    assert_same(Ragged.from_mask(padded, mask, batch_first=batch_first), batch)


@given(FORMS, st.data())
def test_take_chooses_sequences_in_any_order(form, data):
    arrays = make_list(*form)
    which = data.draw(st.lists(st.integers(-len(arrays), len(arrays) - 1), min_size=1, max_size=9))
    batch = Ragged.from_list(arrays)
    assert_same(batch.take(which), Ragged.from_list([arrays[n] for n in which]))
    keep = np.arange(len(arrays)) % 2 == 0
    assert_same(batch.take(keep), Ragged.from_list(arrays[::2]))


def test_other_values_may_stand_for_the_same_steps():
    batch = Ragged.from_list(make_list([3, 0, 2], (4,)))
    other = batch.with_values(np.arange(5))
    assert other.offsets.tolist() == batch.offsets.tolist()
    assert [one.tolist() for one in other] == [[0, 1, 2], [], [3, 4]]
    with pytest.raises(ValueError, match="offsets: expected 4, the number of values, at the end, got 5"):
        batch.with_values(np.arange(4))


def test_sequences_are_views():
    batch = Ragged.from_list(make_list([3, 2]))
    batch[1][0] = 99
    assert batch.values[3] == 99
    assert all(np.shares_memory(one, batch.values) for one in batch.to_list())


def test_a_batch_may_have_sequences_without_steps_only_or_no_sequences():
    nothing = Ragged.from_list(make_list([0, 0, 0], (4,)))
    assert nothing.to_padded()[0].shape == (0, 3, 4)
    assert nothing.mask().shape == (0, 3)
    assert_same(Ragged.from_padded(np.ones((5, 3, 4)), [0, 0, 0]), nothing)
    assert_same(Ragged.from_mask(np.ones((5, 3, 4)), np.zeros((5, 3), bool)), nothing)
    none = Ragged(np.ones((0, 4)), [0])
    assert len(none) == 0
    assert list(none) == none.to_list() == []
    assert none.to_padded(batch_first=True)[0].shape == (0, 0, 4)
    assert_same(Ragged.from_padded(np.ones((5, 0, 4)), np.zeros(0, int)), none)


@pytest.mark.parametrize(
    ("batch", "want"),
    [
        (Ragged.from_list(make_list([3, 0, 5], (2,))), "Ragged(3 sequences, 0 to 5 steps of 2, float64)"),
        (Ragged.from_list(make_list([4], (2, 3), "uint8")), "Ragged(1 sequences, 4 to 4 steps of 2, 3, uint8)"),
        (Ragged(np.arange(3), [0, 1, 3]), "Ragged(2 sequences, 1 to 2 steps, int64)"),
        (Ragged(np.ones((0, 2)), [0]), "Ragged(0 sequences, no steps of 2, float64)"),
    ],
)
def test_its_repr_counts(batch, want):
    assert repr(batch) == want


X = np.ones((4, 2, 3))
GAPS = np.array([[1, 1, 0, 0], [1, 0, 1, 0]], bool).T
LATE = np.array([[0, 1, 1, 1], [1, 1, 1, 1]], bool).T
WRONG = {
    "float offsets": (lambda: Ragged(X, [0.0, 4.0]), TypeError, "offsets: expected integers, got float64"),
    "no offsets": (lambda: Ragged(X, np.zeros(0, int)), ValueError, r"offsets: expected \(B \+ 1,\), got \(0,\)"),
    "flat offsets": (lambda: Ragged(X, [[0, 4]]), ValueError, r"offsets: expected \(B \+ 1,\), got \(1, 2\)"),
    "late offsets": (lambda: Ragged(X, [1, 4]), ValueError, "offsets: expected numbers from 0 that never decrease"),
    "falling offsets": (lambda: Ragged(X, [0, 3, 2, 4]), ValueError, r"never decrease, got \[0 3 2 4\]"),
    "falling unsigned": (lambda: Ragged(X, np.array([0, 3, 2, 4], "uint8")), ValueError, "never decrease"),
    "early end": (
        lambda: Ragged(X, [0, 3]),
        ValueError,
        "offsets: expected 4, the number of values, at the end, got 3",
    ),
    "late end": (lambda: Ragged(X, [0, 5]), ValueError, "offsets: expected 4, the number of values, at the end, got 5"),
    "a number": (lambda: Ragged(1.0, [0, 1]), ValueError, "values: expected"),
    "no list": (lambda: Ragged.from_list([]), ValueError, "sequences: expected at least one array, got none"),
    "shapes": (lambda: Ragged.from_list([X, X[:, :, :2]]), ValueError, r"sequences: .*one shape.*\(4, 2, 2\)"),
    "numbers": (lambda: Ragged.from_list([1.0, 2.0]), ValueError, "sequences: .*one shape"),
    "dtypes": (
        lambda: Ragged.from_list([X, X.astype("float32")]),
        ValueError,
        r"sequences: expected one dtype, got \['float32', 'float64'\]",
    ),
    "flat x": (lambda: Ragged.from_padded(X[:, 0, 0], [4]), ValueError, r"x: expected \(T, B, \.\.\.\), got \(4,\)"),
    "long": (lambda: Ragged.from_padded(X, [5, 2]), ValueError, "lengths: expected numbers from 0 to 4, got 2 to 5"),
    "negative": (lambda: Ragged.from_padded(X, [-1, 2]), ValueError, "lengths: expected numbers from 0 to 4, got -1"),
    "floats": (lambda: Ragged.from_padded(X, [1.0, 2.0]), TypeError, "lengths: expected integers, got float64"),
    "booleans": (lambda: Ragged.from_padded(X, [True, False]), TypeError, "lengths: expected integers, got bool"),
    "many": (lambda: Ragged.from_padded(X, [1, 2, 3]), ValueError, r"lengths: expected \(2,\), one .*, got \(3,\)"),
    "one": (lambda: Ragged.from_padded(X, 3), ValueError, r"lengths: expected \(2,\), one for each row, got \(\)"),
    "batch first": (lambda: Ragged.from_padded(X, [1, 2], True), ValueError, r"lengths: expected \(4,\)"),
    "number mask": (lambda: Ragged.from_mask(X, GAPS * 1.0), TypeError, "mask: expected booleans, got float64"),
    "mask shape": (lambda: Ragged.from_mask(X, GAPS.T), ValueError, r"mask: expected \(4, 2\), got \(2, 4\)"),
    "mask first": (lambda: Ragged.from_mask(X, GAPS.T, True), ValueError, r"mask: expected \(4, 2\), got \(2, 4\)"),
    "gaps": (lambda: Ragged.from_mask(X, GAPS), ValueError, "mask: expected every sequence to begin .* no gaps"),
    "late": (lambda: Ragged.from_mask(X, LATE), ValueError, "mask: expected every sequence to begin .* no gaps"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_form_is_refused(what):
    call, error, message = WRONG[what]
    with pytest.raises(error, match=message):
        call()


# ------------------------------------------------------------------ rows alone

# In no order, with ties, rows without steps, and more rows than a tile has
LENGTHS = (3, 0, 7, 1, 7, 4, 0, 5, 2, 7, 6, 3, 1, 7)
SIZES = {"T": 7, "B": len(LENGTHS), "H": 9}


def alone(problem, row, n):
    """The problem of the first n steps of one row."""
    layer, x, state, dy, dstate_n, _ = problem

    def cut(array):
        return array[row : row + 1, :n] if layer.batch_first else array[:n, row : row + 1]

    def one(state):
        return None if state is None else change_states(state, lambda array: array[:, row : row + 1])

    return problem._replace(x=cut(x), state=one(state), dy=cut(dy), dstate_n=one(dstate_n))


def by_rows(problem, lengths, run=lambda part, row, n: by_layer(part)):
    """All results of a ragged batch from those of its rows alone: zeros in the padding, sums for the parameters."""
    layer, parts = problem.layer, [run(alone(problem, row, n), row, n) for row, n in enumerate(lengths)]
    time, results = int(layer.batch_first), {}

    def pad(array):
        width = [(0, 0)] * 3
        width[time] = 0, problem.x.shape[time] - array.shape[time]
        return np.pad(array, width)

    for name in parts[0]:
        arrays = [part[name] for part in parts]
        if name in layer.params:
            results[name] = sum(arrays)
        elif name in ("y", "dx"):
            results[name] = np.concatenate([pad(array) for array in arrays], axis=1 - time)
        else:
            results[name] = np.concatenate(arrays, axis=1)
    return results


def split(problem, results):
    """What belongs to rows, and what to parameters."""
    params = {name: array for name, array in results.items() if name in problem.layer.params}
    return {name: array for name, array in results.items() if name not in params}, params


def assert_every_row_is_as_it_is_alone(problem, lengths, bound=BOUND["float64"]):
    rows, params = split(problem, by_layer(problem, lengths=lengths))
    rows_alone, sums = split(problem, by_rows(problem, lengths))
    assert_same_bits(rows, rows_alone)
    assert_agree(params, sums, bound)


@CASE
@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch first"])
def test_every_row_is_as_it_is_alone(cell, dtype, tokens, batch_first):
    problem = make_problem(cell, **SIZES, dtype=dtype, tokens=tokens, batch_first=batch_first, **STACKED)
    assert_every_row_is_as_it_is_alone(problem, LENGTHS, BOUND[dtype])


@CASE
def test_inference_has_the_bits_of_training(cell, dtype, tokens):
    problem = make_problem(cell, **SIZES, dtype=dtype, tokens=tokens, **STACKED)
    want = by_layer(problem, lengths=LENGTHS)
    y, state_n = problem.layer(problem.x, problem.state, LENGTHS)
    got = {"y": y, **{f"state_n {n}": array for n, array in enumerate(unpack(state_n))}}
    assert_same_bits(got, {name: want[name] for name in got})


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=20),
    H=st.integers(1, 70),
    seed=st.integers(0, 99),
    layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    tokens=st.booleans(),
)
def test_any_lengths_will_do(cell, lengths, H, seed, layers, bidirectional, tokens):
    how = {"num_layers": layers, "bidirectional": bidirectional, "tokens": tokens, "seed": seed}
    assert_every_row_is_as_it_is_alone(make_problem(cell, T=6, B=len(lengths), H=H, **how), lengths)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_large_layer_will_do(cell):
    lengths = np.random.default_rng(0).integers(0, 13, 40)
    assert_every_row_is_as_it_is_alone(make_problem(cell, T=12, B=40, I=33, H=150, **STACKED), lengths)


@pytest.mark.parametrize("kind", ["int8", "uint8", "int32", "uint64", list])
def test_lengths_are_integers_of_any_kind(kind):
    problem = make_problem("lstm", **SIZES)
    lengths = list(LENGTHS) if kind is list else np.array(LENGTHS, kind)
    assert_same_bits(by_layer(problem, lengths=lengths), by_layer(problem, lengths=np.array(LENGTHS)))


def shift_last(self, ends=Steps.ends.func):
    """The slot before that of the last state, if rows differ."""
    (first, last), back = ends(self)
    return (first, last if self.even else self._slot_of(np.maximum(self.lengths - 1, 0))), back


def shift_slot(self, after, slot=Steps.slot):
    """The slot of a neighbour, if rows differ."""
    return slot(self, after) if self.even else np.roll(slot(self, after), 1)


MUTATIONS = {
    "the last state is one step early": (Steps, "ends", property(shift_last)),
    "outputs are those of a neighbour": (Steps, "slot", shift_slot),
    "padding is not zero": (sequences, "take", lambda array, rows: array[rows]),
    "first states are not sorted": (Sequences, "sort", lambda self, state: state),
    "last states stay sorted": (Sequences, "unsort", lambda self, state: state),
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_the_comparison_with_rows_alone_notices(what, monkeypatch):
    problem = make_problem("lstm", **SIZES, **STACKED)
    assert_every_row_is_as_it_is_alone(problem, LENGTHS)
    monkeypatch.setattr(*MUTATIONS[what])
    with pytest.raises(AssertionError, match="differs"):
        assert_every_row_is_as_it_is_alone(problem, LENGTHS)


@CELL
def test_rows_agree_with_the_oracle(cell):
    problem = make_problem(cell, **SIZES, **STACKED)
    got = by_layer(problem, lengths=LENGTHS)
    want = by_rows(problem, LENGTHS, lambda part, row, n: by_oracle(part))
    assert got.keys() == want.keys()
    assert_agree(got, want, BOUND["float64"])


@pytest.mark.parametrize("cell", ["lstm", "ctrnn"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch first"])
def test_gradients_agree_with_finite_differences(cell, batch_first):
    problem = make_problem(cell, T=3, B=4, I=3, H=3, batch_first=batch_first, **STACKED)
    lengths = [1, 3, 0, 2]
    assert_agree(by_layer(problem, lengths=lengths), by_finite_differences(problem, lengths=lengths), 1e-7)


def test_one_sequence_has_a_length_too():
    problem = make_problem("lstm", T=7, single=True, **STACKED)
    part = problem._replace(x=problem.x[:4], dy=problem.dy[:4])
    want = by_layer(part)
    for name in ("y", "dx"):
        want[name] = np.pad(want[name], [(0, 3), (0, 0)])
    for lengths in ([4], np.array([4])):
        assert_same_bits(by_layer(problem, lengths=lengths), want)


@CELL
def test_states_that_are_learnt_learn_from_every_row(cell):
    problem = make_problem(cell, **SIZES, learn_state=True, stateless=True, **STACKED)
    assert f"{CELLS[cell].states[0]}_0_l1_reverse" in problem.layer.params
    assert_every_row_is_as_it_is_alone(problem, LENGTHS)
    given = make_problem(cell, **SIZES, learn_state=True, **STACKED)
    grads = by_layer(given, lengths=LENGTHS)
    assert not any(grads[name].any() for name in given.layer.params if "_0_l" in name)


# ------------------------------------------------------------------ padding


def pad_with(problem, fill, more=0):
    """The same problem with other numbers in the padding, or tokens that do not exist, and more of it."""

    def change(array):
        array = np.concatenate([array, np.zeros((more, *array.shape[1:]), array.dtype)])
        array[np.arange(len(array))[:, None] >= np.array(LENGTHS)] = fill if array.dtype.kind == "f" else 10**6
        return array

    return problem._replace(x=change(problem.x), dy=change(problem.dy))


@CASE
def test_nan_in_the_padding_changes_no_bit(cell, dtype, tokens):
    problem = make_problem(cell, **SIZES, dtype=dtype, tokens=tokens, **STACKED)
    want = by_layer(problem, lengths=LENGTHS)
    dirty = pad_with(problem, np.nan)
    assert_same_bits(by_layer(dirty, lengths=LENGTHS), want)
    assert_same_bits({"y": dirty.layer(dirty.x, dirty.state, LENGTHS)[0]}, {"y": want["y"]})


@CASE
def test_more_padding_changes_no_bit(cell, dtype, tokens):
    problem = make_problem(cell, **SIZES, dtype=dtype, tokens=tokens, **STACKED)
    want, got = by_layer(problem, lengths=LENGTHS), by_layer(pad_with(problem, 0, more=5), lengths=LENGTHS)
    for name in {"y", "dx"} & got.keys():
        assert not got[name][7:].any()
        got[name] = got[name][:7]
    assert_same_bits(got, want)


@CASE
@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch first"])
def test_full_lengths_are_no_lengths(cell, dtype, tokens, batch_first):
    problem = make_problem(cell, **SIZES, dtype=dtype, tokens=tokens, batch_first=batch_first, **STACKED)
    assert_same_bits(by_layer(problem, lengths=[7] * 14), by_layer(problem))


# ------------------------------------------------------------------ Ragged in, Ragged out


def as_ragged(problem, lengths):
    first = problem.layer.batch_first
    x, dy = (Ragged.from_padded(array, lengths, first) for array in (problem.x, problem.dy))
    return problem._replace(x=x, dy=dy)


def ragged_results(problem, results, lengths):
    """The results of a padded call without the padding."""
    first = problem.layer.batch_first
    return {
        name: Ragged.from_padded(array, lengths, first).values if name in ("y", "dx") else array
        for name, array in results.items()
    }


@CASE
@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch first"])
def test_a_ragged_batch_has_the_bits_of_a_padded_one(cell, dtype, tokens, batch_first):
    problem = make_problem(cell, **SIZES, dtype=dtype, tokens=tokens, batch_first=batch_first, **STACKED)
    ragged, want = as_ragged(problem, LENGTHS), by_layer(problem, lengths=LENGTHS)
    got = by_layer(ragged)
    for name in {"y", "dx"} & got.keys():
        assert isinstance(got[name], Ragged)
        assert got[name].lengths.tolist() == list(LENGTHS)
        got[name] = got[name].values
    want = ragged_results(problem, want, LENGTHS)
    assert_same_bits(got, want)
    y, _ = ragged.layer(ragged.x, ragged.state)
    assert isinstance(y, Ragged)
    assert_same_bits({"y": y.values}, {"y": want["y"]})


# ------------------------------------------------------------------ what a cell takes beside x

TIMED = pytest.mark.parametrize("cell", ["ctrnn", "ctrnn_exponential"])


@TIMED
def test_every_row_has_its_given_numbers(cell):
    problem = make_problem(cell, **SIZES, **STACKED)
    dt = np.random.default_rng(1).uniform(0.1, 1, (7, 14))
    dt[np.arange(7)[:, None] >= np.array(LENGTHS)] = np.nan
    rows, params = split(problem, by_layer(problem, lengths=LENGTHS, dt=dt))
    apart = by_rows(problem, LENGTHS, lambda part, row, n: by_layer(part, dt=dt[:n, row : row + 1] if n else 1.0))
    rows_alone, sums = split(problem, apart)
    assert_same_bits(rows, rows_alone)
    assert_agree(params, sums, BOUND["float64"])
    by_hand = by_rows(problem, LENGTHS, lambda part, row, n: by_oracle(part, dt=dt[:n, row : row + 1, None]))
    assert_agree(rows | params, by_hand, BOUND["float64"])


@TIMED
def test_given_numbers_may_be_ragged_or_the_same_for_all_rows(cell):
    problem = make_problem(cell, **SIZES, **STACKED)
    dt = np.random.default_rng(1).uniform(0.1, 1, (7, 14))
    ragged, flat = as_ragged(problem, LENGTHS), Ragged.from_padded(dt, LENGTHS)
    want = ragged_results(problem, by_layer(problem, lengths=LENGTHS, dt=dt), LENGTHS)
    for given_dt in (flat, flat.values):
        got = by_layer(ragged, dt=given_dt)
        assert_same_bits(got | {name: got[name].values for name in ("y", "dx")}, want)
    first = make_problem(cell, **SIZES, batch_first=True, **STACKED)
    got = ragged_results(first, by_layer(first, lengths=LENGTHS, dt=dt.T), LENGTHS)
    assert_same_bits(got, want)
    same = np.repeat(dt[:, :1], 14, axis=1)
    assert_same_bits(by_layer(problem, lengths=LENGTHS, dt=dt[:, 0]), by_layer(problem, lengths=LENGTHS, dt=same))


def test_gradients_with_given_numbers_agree_with_finite_differences():
    problem, lengths = make_problem("ctrnn", T=3, B=4, I=3, H=3, **STACKED), [1, 3, 0, 2]
    beside = {"lengths": lengths, "dt": np.random.default_rng(1).uniform(0.1, 1, (3, 4))}
    assert_agree(by_layer(problem, **beside), by_finite_differences(problem, **beside), 1e-7)


@TIMED
def test_given_numbers_may_be_none_at_all(cell):
    problem = make_problem(cell, T=3, B=3)
    for beside in ({"dt": np.ones((3, 3))}, {"dt": np.ones(3)}):
        assert not by_layer(problem, lengths=[0, 0, 0], **beside)["y"].any()
    by_layer(make_problem(cell, T=0), dt=np.ones((0, 3)))


def test_ragged_given_numbers_need_the_offsets_of_x():
    problem = as_ragged(make_problem("ctrnn", T=5, B=2), [2, 3])
    with pytest.raises(ValueError, match="dt: expected"):
        problem.layer(problem.x, dt=Ragged(np.ones(5), [0, 3, 5]))
    problem = make_problem("ctrnn", T=5, B=2)
    with pytest.raises((ValueError, TypeError), match="dt: expected"):
        problem.layer(problem.x, None, [2, 3], dt=Ragged(np.ones(5), [0, 2, 5]))


# ------------------------------------------------------------------ nothing


def into_nan(problem, lengths):
    """All results, with the parameters' gradients written over NaN."""
    out = nbrnn.Parameters.zeros(problem.layer.params.shapes, problem.layer.dtype)
    out.flat[:] = np.nan
    y, state_n, pullback = problem.layer.vjp(problem.x, problem.state, lengths)
    return y, state_n, *pullback(problem.dy, problem.dstate_n, out=out)


@CELL
@pytest.mark.parametrize("shape", [{}, {"T": 0}, {"B": 0}, {"T": 0, "B": 0}], ids=str)
@pytest.mark.parametrize("options", [STACKED, {"num_layers": 2, "recompute": 2}], ids=["", "recompute"])
@pytest.mark.parametrize("ragged", [False, True], ids=["", "ragged"])
def test_rows_without_steps_keep_their_states(cell, shape, options, ragged):
    problem = make_problem(cell, **shape, **options)
    lengths = np.zeros(shape.get("B", 3), int)
    if ragged:
        problem = as_ragged(problem, lengths)
    y, state_n, dx, dstate0, grads = into_nan(problem, None if ragged else lengths)
    for got, like in ((y, problem.dy), (dx, problem.x)):
        got, like = (got.values, like.values) if ragged else (got, like)
        assert_same_bits({"": got}, {"": np.zeros_like(like)})
    for got, want in ((state_n, problem.state), (dstate0, problem.dstate_n)):
        for one, other in zip(unpack(got), unpack(want)):
            assert_same_bits({"state": one}, {"state": other})
    assert not grads.flat.any()


@pytest.mark.parametrize("options", [STACKED, {"num_layers": 2, "recompute": 2}], ids=["", "recompute"])
def test_old_gradients_leave_no_trace(options):
    problem = make_problem("lstm", **SIZES, **options)
    assert_same_bits(dict(into_nan(problem, LENGTHS)[-1]), split(problem, by_layer(problem, lengths=LENGTHS))[1])


# ------------------------------------------------------------------ threads and schedules


@CASE
@pytest.mark.parametrize("shape", [(9, 3, 100), (5, 24, 33)], ids=str)
def test_one_and_two_threads_give_the_same_bits(cell, dtype, tokens, shape, monkeypatch):
    needs_threads(2)
    everything_parallel(monkeypatch)
    T, B, H = shape
    problem = make_problem(cell, T=T, B=B, H=H, dtype=dtype, tokens=tokens, **STACKED)
    lengths = np.random.default_rng(0).integers(0, T + 1, B)
    nbrnn.set_num_threads(1)
    serial = by_layer(problem, lengths=lengths)
    nbrnn.set_num_threads(2)
    assert_same_bits(by_layer(problem, lengths=lengths), serial)


@CELL
@pytest.mark.parametrize("options", [STACKED, {"num_layers": 2, "recompute": 3}], ids=["", "recompute"])
def test_every_schedule_gives_the_same_bits(cell, options, monkeypatch):
    needs_threads(2)
    everything_parallel(monkeypatch)
    problem = make_problem(cell, T=7, B=5, H=70, **options)
    lengths, results = [4, 0, 7, 1, 7], []
    for kind, shards, block in SCHEDULES:
        if kind == "units" and CELLS[cell].norms:
            continue
        force(problem.layer, Schedule(kind, shards, block, "forced"), monkeypatch)
        y = problem.layer(problem.x, problem.state, lengths)[0]
        results.append(by_layer(problem, lengths=lengths) | {"y of inference": y})
    for result in results:
        assert_same_bits(result, results[0])
    assert_same_bits({"y": results[0]["y"]}, {"y": results[0]["y of inference"]})


# ------------------------------------------------------------------ NaN


@CELL
@pytest.mark.parametrize("where", ["x", "state", "dy"])
@pytest.mark.parametrize("row", [4, 5, 12])
def test_nan_stays_in_its_row(cell, where, row):
    problem = make_problem(cell, **SIZES, **STACKED)
    clean, n = by_layer(problem, lengths=LENGTHS), LENGTHS[row]
    dirty = {"x": problem.x, "state": unpack(problem.state)[-1], "dy": problem.dy}[where]
    dirty[n - 1 if where != "state" else 0, row, 1] = np.nan
    results = by_layer(problem, lengths=LENGTHS)
    assert_same_bits(without_row(results, row), without_row(clean, row))
    assert np.isnan(results["dx" if where == "dy" else "y"][:n, row]).any()
    assert not results["y"][n:, row].any()
    assert not results["dx"][n:, row].any()


# ------------------------------------------------------------------ what training draws

# Several kinds at once, and each that has its own arrays
DRAWN = {
    "all": {"dropout": 0.4, "input_dropout": 0.3, "recurrent_dropout": 0.3, "zoneout": [0.2, 0.3]},
    "dropout": {"dropout": 0.4, "input_dropout": 0.3},
    "zoneout": {"zoneout": [0.2, 0.3]},
    "recurrent dropout": {"recurrent_dropout": 0.3},
}


def make_drawn(what, **options):
    return make_problem("lstm", T=3, B=4, I=2, H=2, **DRAWN[what], **options)


@pytest.mark.parametrize("what", DRAWN)
@pytest.mark.parametrize("lengths", [[1, 3, 0, 2], [2, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("options", [STACKED, {"num_layers": 2, "recompute": 1}], ids=["", "recompute"])
def test_drawn_gradients_agree_with_finite_differences(what, lengths, options):
    problem = make_drawn(what, **options)
    assert_agree(by_layer(problem, lengths=lengths), by_finite_differences(problem, lengths=lengths), 1e-7)


@pytest.mark.parametrize("what", DRAWN)
def test_inference_draws_nothing(what):
    layer, x, state, *_ = problem = make_problem("lstm", **SIZES, **DRAWN[what], **STACKED)
    before = layer.rng.bit_generator.state
    y, _ = layer(x, state, LENGTHS)
    parts = [alone(problem, row, n) for row, n in enumerate(LENGTHS)]
    for row, part in enumerate(parts):
        assert_same_bits({"y": layer(part.x, part.state)[0]}, {"y": y[: LENGTHS[row], row : row + 1].copy()})
    assert layer.rng.bit_generator.state == before


# ------------------------------------------------------------------ computing once more

RECOMPUTE = pytest.mark.parametrize("recompute", [True, 1, 7, 1000])


@pytest.mark.parametrize(("cell", "tokens"), [*((cell, False) for cell in CELLS), ("lstm", True)])
@RECOMPUTE
def test_to_recompute_changes_no_bit(cell, tokens, recompute):
    sizes = {"T": 10, "B": 6, "H": 9, "num_layers": 2, "tokens": tokens}
    plain, frugal = make_problem(cell, **sizes), make_problem(cell, **sizes, recompute=recompute)
    for lengths in (None, [3, 10, 0, 7, 8, 1], [3, 2, 0, 3, 1, 1]):
        assert_same_bits(by_layer(frugal, lengths=lengths), by_layer(plain, lengths=lengths))
    assert_same_bits({"y": frugal.layer(frugal.x)[0]}, {"y": plain.layer(plain.x)[0]})


@RECOMPUTE
def test_nor_with_other_forms_and_options(recompute):
    for how in (
        {"single": True},
        {"batch_first": True, "bias": False},
        {"learn_state": True, "stateless": True},
        {"proj_size": 4},
        {"dtype": "float32"},
    ):
        how = {"T": 10, "num_layers": 2} | how
        assert_same_bits(
            by_layer(make_problem("lstm", **how, recompute=recompute)), by_layer(make_problem("lstm", **how))
        )
    dt = np.random.default_rng(1).uniform(0.1, 1, (10, 6))
    plain = make_problem("ctrnn", T=10, B=6, num_layers=2)
    frugal, beside = (
        make_problem("ctrnn", T=10, B=6, num_layers=2, recompute=recompute),
        {"lengths": [3, 10, 0, 7, 8, 1]},
    )
    for given_dt in (dt, dt[:, 0], 0.5):
        assert_same_bits(by_layer(frugal, **beside, dt=given_dt), by_layer(plain, **beside, dt=given_dt))


@RECOMPUTE
def test_a_ragged_batch_may_be_recomputed(recompute):
    plain = make_problem("lstm", **SIZES, num_layers=2)
    frugal = as_ragged(make_problem("lstm", **SIZES, num_layers=2, recompute=recompute), LENGTHS)
    got = by_layer(frugal)
    want = ragged_results(plain, by_layer(plain, lengths=LENGTHS), LENGTHS)
    assert_same_bits(got | {name: got[name].values for name in ("y", "dx")}, want)


def test_the_comparison_with_recomputing_notices(monkeypatch):
    """Pieces whose gradients are not added would be lost."""
    plain, frugal = (make_problem("lstm", T=10, recompute=recompute) for recompute in (False, 4))
    gradients = Direction._weight_gradients
    monkeypatch.setattr(Direction, "_weight_gradients", lambda *args: gradients(*args[:-1], False))
    with pytest.raises(AssertionError, match="weight_ih_l0 differs"):
        assert_same_bits(by_layer(frugal), by_layer(plain))


@pytest.mark.parametrize("what", DRAWN)
@pytest.mark.parametrize("recompute", [1, 2])
def test_what_is_recomputed_draws_the_same_again(what, recompute):
    problem = make_drawn(what, num_layers=2, recompute=recompute)
    assert_agree(by_layer(problem), by_finite_differences(problem), 1e-7)


def test_the_second_direction_cannot_be_recomputed():
    for recompute in (True, 3):
        with pytest.raises(ValueError, match="recompute: expected False for two directions"):
            nbrnn.LSTM(3, 4, bidirectional=True, recompute=recompute)
    assert nbrnn.LSTM(3, 4, bidirectional=True, recompute=False).recompute is False


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (2.5, TypeError), (None, TypeError)])
def test_recompute_is_a_number_of_steps_or_a_boolean(value, error):
    with pytest.raises(error, match="recompute: expected"):
        nbrnn.LSTM(3, 4, recompute=value)


@pytest.mark.parametrize("kind", [nbrnn.LSTM, nbrnn.GRU, nbrnn.CTRNN])
@pytest.mark.parametrize("recompute", [False, True, 7, np.int64(7)])
def test_the_configuration_contains_it(kind, recompute):
    config = kind(3, 4, recompute=recompute).config()
    assert config["recompute"] is recompute or type(config["recompute"]) is int
    assert kind(**config).recompute == recompute
    assert kind(**config).config() == config


# ------------------------------------------------------------------ errors

REFUSED = {
    "long": ([1, 6], ValueError, "lengths: expected numbers from 0 to 5, got 1 to 6"),
    "negative": ([-1, 2], ValueError, "lengths: expected numbers from 0 to 5, got -1 to 2"),
    "floats": ([1.0, 2.0], TypeError, "lengths: expected integers, got float64"),
    "booleans": ([True, False], TypeError, "lengths: expected integers, got bool"),
    "many": ([1, 2, 3], ValueError, r"lengths: expected \(2,\), one for each row, got \(3,\)"),
    "a number": (3, ValueError, r"lengths: expected \(2,\), one for each row, got \(\)"),
}


def assert_refused(problem, call, error, message):
    """A call raises and leaves the layer as it was."""
    layer, before, state = problem.layer, problem.layer.params.flat.copy(), problem.layer.rng.bit_generator.state
    with pytest.raises(error, match=message):
        call()
    assert_same_bits({"params": layer.params.flat}, {"params": before})
    assert layer.rng.bit_generator.state == state


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"recompute": 2}, {"zoneout": 0.3}], ids=str)
def test_wrong_lengths_are_refused(what, options):
    problem = make_problem("lstm", T=5, B=2, **options)
    lengths, error, message = REFUSED[what]
    for call in (problem.layer, problem.layer.vjp):
        assert_refused(problem, lambda call=call: call(problem.x, problem.state, lengths), error, message)


@pytest.mark.parametrize("lengths", [[1, 2], [], [6], [-1], [1.5]], ids=str)
def test_wrong_lengths_of_one_sequence_are_refused(lengths):
    problem = make_problem("lstm", T=5, single=True)
    for call in (problem.layer, problem.layer.vjp):
        refused = (ValueError, TypeError), "lengths: expected"
        assert_refused(problem, lambda call=call: call(problem.x, problem.state, lengths), *refused)


def test_a_ragged_batch_has_its_own_lengths():
    problem = as_ragged(make_problem("lstm", T=5, B=2), [2, 3])
    for call in (problem.layer, problem.layer.vjp):
        message = "lengths: expected None beside a Ragged"
        assert_refused(problem, lambda call=call: call(problem.x, None, [2, 3]), ValueError, message)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (Ragged(np.ones((5, 4)), [0, 2, 5]), r"x: expected \(N, 5\), got \(5, 4\)"),
        (Ragged(np.ones(5), [0, 2, 5]), r"x: expected \(N, 5\), got \(5,\)"),
        (Ragged(np.ones((5, 1, 5)), [0, 2, 5]), r"x: expected \(N, 5\), got \(5, 1, 5\)"),
        (Ragged(np.ones((5, 5), int), [0, 2, 5]), r"x: expected \(N,\), got \(5, 5\)"),
        (Ragged(np.arange(5) + 1, [0, 2, 5]), r"x: expected tokens in \[0, 5\), got 1 to 5"),
        (Ragged(np.ones((5, 5), "float16"), [0, 2, 5]), "x: expected float64 values, got float16"),
    ],
)
def test_a_ragged_batch_of_wrong_values_is_refused(x, message):
    problem = make_problem("lstm", T=5, B=2)
    for call in (problem.layer, problem.layer.vjp):
        assert_refused(problem, lambda call=call: call(x), (ValueError, TypeError), message)


@pytest.mark.parametrize(
    "dy",
    [
        np.ones((5, 6)),
        np.ones((3, 2, 6)),
        Ragged(np.ones((5, 6)), [0, 3, 5]),
        Ragged(np.ones((5, 6)), [0, 2, 5, 5]),
        Ragged(np.ones((4, 6)), [0, 2, 4]),
        Ragged(np.ones((5, 7)), [0, 2, 5]),
        Ragged(np.ones((5, 6), int), [0, 2, 5]),
    ],
    ids=["flat", "padded", "other offsets", "more rows", "fewer steps", "width", "integers"],
)
def test_a_wrong_gradient_of_a_ragged_batch_is_refused(dy):
    problem = as_ragged(make_problem("lstm", T=5, B=2), [2, 3])
    pullback = problem.layer.vjp(problem.x, problem.state)[2]
    assert_refused(problem, lambda: pullback(dy), (ValueError, TypeError), "dy: expected")


def test_a_ragged_gradient_of_a_padded_batch_is_refused():
    problem = make_problem("lstm", T=5, B=2)
    pullback = problem.layer.vjp(problem.x, problem.state, [2, 3])[2]
    dy = Ragged.from_padded(problem.dy, [2, 3])
    assert_refused(problem, lambda: pullback(dy), (ValueError, TypeError), "dy: expected")


@pytest.mark.parametrize("ragged", [False, True])
def test_a_state_of_another_shape_is_refused(ragged):
    problem, lengths = make_problem("lstm", T=5, B=2), [2, 3]
    if ragged:
        problem, lengths = as_ragged(problem, lengths), None
    good, bad = np.ones((1, 2, 6)), np.ones((1, 3, 6))
    for state, name in (((bad, good), "state h"), ((good, bad), "state c")):
        for call in (problem.layer, problem.layer.vjp):
            message = rf"{name}: expected \(1, 2, 6\), got \(1, 3, 6\)"
            assert_refused(problem, lambda call=call, s=state: call(problem.x, s, lengths), ValueError, message)
        pullback = problem.layer.vjp(problem.x, problem.state, lengths)[2]
        message = rf"d{name.replace(' ', '_n ')}: expected \(1, 2, 6\), got \(1, 3, 6\)"
        assert_refused(problem, lambda s=state, pull=pullback: pull(problem.dy, s), ValueError, message)
