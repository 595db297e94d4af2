"""Windows: every token stands where it should, streams continue, and a resumed epoch is the same epoch."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbrnn.data import RandomWindows, SequentialWindows

BOTH = pytest.mark.parametrize("kind", [RandomWindows, SequentialWindows])

# Tokens are their own positions, so that a window says where it was cut.
sizes = st.tuples(st.integers(1, 7), st.integers(1, 6)).flatmap(
    lambda tb: st.tuples(st.just(tb[0]), st.just(tb[1]), st.integers(tb[0] * tb[1] + 1, 200))
)


def epoch(windows):
    return [(x.copy(), target.copy()) for x, target in windows]


def same(left, right):
    return len(left) == len(right) and all((a == c).all() and (b == d).all() for (a, b), (c, d) in zip(left, right))


@BOTH
@given(sizes, st.integers(0, 2**32))
def test_windows_are_runs_of_the_text_without_overlap(kind, sizes, seed):
    steps, batch, length = sizes
    windows = kind(np.arange(length), steps, batch, seed=seed)
    for _ in range(2):
        batches = epoch(windows)
        assert len(batches) == len(windows) == (length - 1) // (steps * batch)
        for x, target in batches:
            assert x.shape == target.shape == (steps, batch)
            assert x.dtype == target.dtype == np.int32
            assert x.flags.c_contiguous
            assert (target == x + 1).all()
            assert (np.diff(x, axis=0) == 1).all()
        inputs = np.concatenate([x.ravel() for x, _ in batches])
        assert np.unique(inputs).size == inputs.size
        assert inputs.min() >= 0
        assert inputs.max() <= length - 2


@given(sizes, st.integers(0, 2**32))
def test_sequential_batches_continue_the_streams(sizes, seed):
    steps, batch, length = sizes
    batches = epoch(SequentialWindows(np.arange(length), steps, batch, seed=seed))
    for (_, target), (x, _) in itertools.pairwise(batches):
        assert (x[0] == target[-1]).all()
    first = batches[0][0][0]
    assert (np.diff(first) == (length - 1 - first[0]) // batch).all()  # streams of one length, as long as can be


def test_only_sequential_windows_carry_the_state():
    assert SequentialWindows.carries_state
    assert not RandomWindows.carries_state


def test_random_windows_are_shuffled_anew_and_start_anywhere():
    windows = RandomWindows(np.arange(10_000), 5, 4, seed=0)
    starts = [np.concatenate([x[0] for x, _ in windows]) for _ in range(60)]
    assert {start.min() % 5 for start in starts} == {0, 1, 2, 3, 4}
    assert not (starts[0] == starts[1]).all()
    # A shuffled order has no correlation with the order of the text: its standard deviation here is 1 / sqrt(2000).
    assert abs(np.corrcoef(starts[0], np.arange(starts[0].size))[0, 1]) < 5 / np.sqrt(starts[0].size)


def test_every_random_window_gets_its_turn():
    # 7 windows of 5 tokens in batches of 2: each epoch leaves one out, never the same one for long.
    windows = RandomWindows(np.arange(36), 5, 2, seed=1, random_offset=False)
    seen = {int(start) for _ in range(40) for x, _ in windows for start in x[0]}
    assert seen == set(range(0, 35, 5))


def test_sequential_offsets_differ_between_epochs():
    windows = SequentialWindows(np.arange(1000), 5, 4, seed=0)
    assert {int(next(iter(windows))[0][0, 0]) for _ in range(60)} == {0, 1, 2, 3, 4}


@BOTH
def test_without_random_offset_an_epoch_begins_at_the_first_token(kind):
    windows = kind(np.arange(1000), 5, 4, seed=0, random_offset=False)
    assert min(x.min() for x, _ in windows) == 0


@BOTH
def test_a_seed_fixes_all_epochs(kind):
    first, second = (kind(np.arange(500), 5, 4, seed=3) for _ in range(2))
    other = kind(np.arange(500), 5, 4, seed=4)
    first_epochs = [epoch(first) for _ in range(5)]
    assert all(same(done, epoch(second)) for done in first_epochs)
    assert not all(same(done, epoch(other)) for done in first_epochs)


@BOTH
@pytest.mark.parametrize("taken", [0, 1, 7, 24])
def test_resuming_within_an_epoch_goes_on_as_if_nothing_had_happened(kind, taken):
    windows = kind(np.arange(500), 5, 4, seed=3)
    epoch(windows)
    iteration = iter(windows)
    for _ in range(taken):
        next(iteration)
    saved = json.loads(json.dumps(windows.state_dict()))
    rest, following = epoch(iteration), epoch(windows)

    resumed = kind(np.arange(500), 5, 4, seed=99)
    resumed.load_state_dict(saved)
    assert resumed.state_dict() == saved
    assert same(epoch(resumed), rest)
    assert same(epoch(resumed), following)


@BOTH
def test_leaving_an_epoch_early_starts_a_whole_one_next(kind):
    windows = kind(np.arange(500), 5, 4, seed=3)
    next(iter(windows))
    assert len(epoch(windows)) == len(windows)


@BOTH
def test_a_text_shorter_than_a_batch_is_refused(kind):
    kind(np.arange(21), 5, 4)
    with pytest.raises(ValueError, match="4 windows of 5 steps needs 21 tokens, got 20"):
        kind(np.arange(20), 5, 4)


@BOTH
@pytest.mark.parametrize(
    ("tokens", "steps", "batch", "error", "words"),
    [
        (np.zeros((9, 9), int), 2, 2, ValueError, "tokens: expected one dimension"),
        (np.zeros(50), 2, 2, TypeError, "tokens: expected integers, got dtype float64"),
        (np.full(50, -1), 2, 2, ValueError, "tokens: expected ids"),
        (np.full(50, 2**31), 2, 2, ValueError, "tokens: expected ids"),
        (np.arange(50), 0, 2, ValueError, "num_steps: expected at least 1, got 0"),
        (np.arange(50), 2, -1, ValueError, "batch_size: expected at least 1, got -1"),
        (np.arange(50), 2.0, 2, TypeError, "num_steps: expected an integer"),
        ([], 2, 2, ValueError, "needs 5 tokens, got 0"),
    ],
)
def test_wrong_arguments(kind, tokens, steps, batch, error, words):
    with pytest.raises(error, match=words):
        kind(tokens, steps, batch)


@BOTH
def test_a_foreign_state_is_refused_and_changes_nothing(kind):
    windows = kind(np.arange(500), 5, 4, seed=3)
    before = windows.state_dict()
    for foreign in [{}, {"position": 26, "generator": before["generator"]}, {"position": 1, "generator": {"a": 1}}]:
        with pytest.raises(ValueError, match="state"):
            windows.load_state_dict(foreign)
    assert windows.state_dict() == before
