"""Accuracy in every form, against a loop over all steps."""

import math

import numpy as np
import pytest

import nbrnn
from nbrnn.data.ragged import Ragged

PER = pytest.mark.parametrize("per", ["step", "sequence", "last"])
LENGTHS = np.array([4, 0, 9, 1, 7, 8, 5])


def problem(rest=(), ignored=-100, classes=3, dtype="float64"):
    """Logits and targets of sequences, some of them to be ignored: all of the fourth's."""
    rng = np.random.default_rng(0)
    y = [rng.standard_normal((n, *rest, classes)).astype(dtype) for n in LENGTHS]
    # about two of three are right
    target = [np.where(rng.random((n, *rest)) < 0.5, one.argmax(-1), 2) for n, one in zip(LENGTHS, y)]
    target[0].flat[:1] = target[2].flat[-2:] = ignored
    target[3][...] = ignored
    return y, target


def by_loop(y, target, per, ignored=-100):
    """The mean as its definition says."""
    hits = [
        [
            int(max(range(len(logits)), key=lambda k: logits[k]) == want)
            for logits, want in zip(one.reshape(-1, one.shape[-1]), np.ravel(its_target))
            if want != ignored
        ]
        for one, its_target in zip(y, target)
    ]
    if per == "sequence":
        return np.mean([np.mean(row) for row in hits if row])
    return np.mean([hit for row in hits for hit in row])


def padded(arrays, batch_first, fill, steps=10):
    rows = np.full((len(arrays), steps, *arrays[0].shape[1:]), fill, arrays[0].dtype)
    for row, one in zip(rows, arrays):
        row[: len(one)] = one
    return rows if batch_first else rows.swapaxes(0, 1)


@PER
@pytest.mark.parametrize("rest", [(), (2,)])
@pytest.mark.parametrize("ignored", [-100, 1])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_accuracy_is_the_fraction_of_right_choices(per, rest, ignored, dtype):
    y, target = problem(rest, ignored, dtype=dtype)
    options = {"per": per, "ignore_index": ignored}
    if per == "last":
        there = [n for n, steps in enumerate(LENGTHS) if steps]
        target = np.array([one[-1] if len(one) else np.zeros(rest, int) for one in target])
        want = by_loop([y[n][-1:] for n in there], target[there], per, ignored)
    else:
        want = by_loop(y, target, per, ignored)
    found = nbrnn.accuracy(Ragged.from_list(y), target if per == "last" else Ragged.from_list(target), **options)
    assert isinstance(found, float)
    assert 0 < found < 1
    assert found == pytest.approx(want, rel=1e-14)
    for batch_first in (False, True):
        with_padding = target if per == "last" else padded(target, batch_first, 77)
        options["batch_first"] = batch_first
        assert nbrnn.accuracy(padded(y, batch_first, np.nan), with_padding, LENGTHS, **options) == found


@PER
@pytest.mark.parametrize("batch_first", [False, True])
def test_without_padding_no_lengths_are_needed(per, batch_first):
    rng = np.random.default_rng(1)
    y, target = rng.standard_normal((5, 4, 3)), rng.integers(0, 3, (5, 4))
    y_of = [y[b] if batch_first else y[:, b] for b in range(5 if batch_first else 4)]
    of = [target[b] if batch_first else target[:, b] for b in range(len(y_of))]
    if per == "last":
        y_of, of = [one[-1:] for one in y_of], [one[-1:] for one in of]
        target = np.concatenate(of)
    found = nbrnn.accuracy(y, target, per=per, batch_first=batch_first)
    assert found == pytest.approx(by_loop(y_of, of, per), rel=1e-14)


def test_any_shape_will_do_for_steps():
    assert nbrnn.accuracy(np.array([1.0, 3.0, 2.0]), np.array(1)) == 1.0
    assert nbrnn.accuracy(np.eye(3)[[0, 1, 1, 2]].reshape(2, 2, 3), np.array([[0, 1], [2, 2]])) == 0.75
    assert nbrnn.accuracy(np.eye(3, dtype=">f4")[::-1], np.array([2, 1, 0], "uint8")) == 1.0


@PER
def test_where_all_are_right_it_is_exactly_one(per):
    y, _ = problem(classes=9)
    target = Ragged.from_list([one.argmax(-1) for one in y])
    assert (
        nbrnn.accuracy(Ragged.from_list(y), target.values[target.offsets[1:] - 1] if per == "last" else target, per=per)
        == 1.0
    )


def test_among_equals_the_first_is_chosen():
    assert nbrnn.accuracy(np.zeros((3, 4)), np.array([0, 0, 3])) == pytest.approx(2 / 3)
    assert nbrnn.accuracy(np.array([[-np.inf, -np.inf]]), np.array([0])) == 1.0


@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_is_never_right(place):
    y = np.eye(3)
    y[1, place] = np.nan
    for target in range(3):
        assert nbrnn.accuracy(y, np.array([0, target, 2])) == pytest.approx(2 / 3)


@PER
def test_where_nothing_counts_it_is_nan(per):
    ignored = np.full(3, -100) if per == "last" else np.full((4, 3), -100)
    target = np.zeros(3, int) if per == "last" else np.zeros((4, 3), int)
    of_nothing = np.zeros(2, int) if per == "last" else Ragged(np.zeros(0, int), [0, 0, 0])
    assert math.isnan(nbrnn.accuracy(np.ones((4, 3, 2)), ignored, per=per))
    assert math.isnan(nbrnn.accuracy(np.ones((4, 3, 2)), target, [0, 0, 0], per=per))
    assert math.isnan(nbrnn.accuracy(Ragged(np.ones((0, 2)), [0, 0, 0]), of_nothing, per=per))
    assert math.isnan(nbrnn.accuracy(np.ones((0, 2, 0)), np.zeros((0, 2), int)))


Y, T = np.ones((4, 3, 2)), np.zeros((4, 3), int)
RAGGED, OTHER = Ragged(np.ones((4, 2)), [0, 1, 4]), Ragged(np.zeros(4, int), [0, 2, 4])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Y.tolist(), T), {}, TypeError, "y: expected a NumPy array, got list"),
        ((Y.astype(int), T), {}, TypeError, "y: expected float32 or float64 values, got int64"),
        ((np.array(1.0), T), {}, ValueError, "y: expected .*, got a single number"),
        ((Y, T.tolist()), {}, TypeError, "target: expected a NumPy array of integers, got list"),
        ((Y, T * 1.0), {}, TypeError, "target: expected integers .*, got float64"),
        ((Y, T[:2]), {}, ValueError, r"target: expected shape \(4, 3\).*, got \(2, 3\)"),
        ((Y, T + 2), {}, ValueError, r"target: expected classes in \[0, 2\) or -100 to be ignored, got 2"),
        ((Y, T, [1, 2]), {}, ValueError, r"lengths: expected \(3,\), one for each row, got \(2,\)"),
        ((Y, T, [1, 2, 5]), {}, ValueError, "lengths: expected numbers from 0 to 4, got 1 to 5"),
        ((Y, T), {"per": "word"}, ValueError, "per: expected one of step, sequence, last, got 'word'"),
        ((Y, T), {"per": "last"}, ValueError, r"target: expected an array \(3, ...\), one for each sequence, got \(4"),
        ((Y, T), {"ignore_index": 1.0}, TypeError, r"ignore_index: expected an integer, got 1\.0"),
        ((RAGGED, OTHER), {}, ValueError, r"target: expected the lengths \[1 3\], got \[2 2\]"),
        ((RAGGED, OTHER.values), {}, TypeError, "target: expected a Ragged, got ndarray"),
        ((RAGGED, OTHER, [1, 3]), {}, ValueError, "lengths: expected None beside a Ragged"),
        ((Y, OTHER, [1, 3, 0]), {}, TypeError, r"target: expected an array \(4, 3\), like y, got a Ragged"),
    ],
)
def test_accuracy_says_what_is_wrong(arguments, options, error, message):
    with pytest.raises(error, match=message):
        nbrnn.accuracy(*arguments, **options)
