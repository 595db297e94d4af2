"""Sources of batches: each element once, nothing read that is not needed, and a resumed epoch is the same epoch.

Most data here are their own positions, so that a batch says where it was cut.
"""

import itertools
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbrnn.data import (
    DocumentStream,
    GeneratorStream,
    Ragged,
    RaggedBatches,
    SeriesStream,
    SeriesWindows,
    TextStream,
    streams,
)
from nbrnn.data.arrays import release

TEXT = "Zwölf Boxkämpfer jagen Viktor – quer über den großen Sylter Deich. 日本語のテキスト 🙂🙃 " * 40


def encode(text):
    return np.array([ord(c) for c in text], np.int64)


def pieces(total=47, rows=3, seed=0):
    """A piece of each of some lengths, of one array and of its negative: a function that yields them."""
    cuts = np.sort(np.random.default_rng(seed).integers(0, total + 1, 6))
    x = np.arange(total * rows).reshape(total, rows)
    return lambda: zip(np.split(x, cuts), np.split(-x, cuts))


def parts(item):
    """The arrays that a batch's x or target is made of."""
    return [item.values, item.offsets] if isinstance(item, Ragged) else [np.asarray(item)]


def epoch(source):
    return [[array.copy() for item in batch for array in parts(item)] for batch in source]


def same(left, right):
    return len(left) == len(right) and all(
        len(a) == len(b) and all(c.dtype == d.dtype and np.array_equal(c, d) for c, d in zip(a, b))
        for a, b in zip(left, right)
    )


class Counted:
    """A series that can only be sliced, and knows what was read of it."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.read, self.largest = [], 0

    def __getitem__(self, rows):
        assert isinstance(rows, slice)
        found = self.array[rows]
        self.read.append((rows.start, rows.stop))
        self.largest = max(self.largest, len(found))
        return found


@pytest.fixture
def text_file(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "BLOCK", 29)  # many blocks, and many that would cut a character
    path = tmp_path / "text.txt"
    path.write_text(TEXT, "utf-8")
    return path


# ------------------------------------------------------------------ sequences of different lengths


def sequences(count, seed=0, longest=30):
    lengths = np.random.default_rng(seed).integers(0, longest + 1, count)
    return [np.stack([np.full(n, b), np.arange(n)], axis=1) for b, n in enumerate(lengths)]


@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 4), st.booleans(), st.integers(0, 2**32))
def test_every_sequence_comes_once_with_its_target(count, size, group, shuffle, seed):
    data = sequences(count, seed)
    steps = [10 * one.sum(axis=1) for one in data]
    for targets in (np.arange(count) * 7, steps, Ragged.from_list(steps)):
        batches = RaggedBatches(data, targets, size, seed=seed, shuffle=shuffle, group=group)
        for _ in range(2):
            found = list(batches)
            assert len(found) == len(batches) == -(-count // size)
            assert sorted(len(x) for x, _ in found)[1:] == [size] * (len(found) - 1)
            seen = []
            for x, target in found:
                assert isinstance(target, np.ndarray if isinstance(targets, np.ndarray) else Ragged)
                assert len(x) == len(target)
                for one, its_target in zip(x, target):
                    # which sequence it is, an empty one only by its length
                    n = one[0, 0] if len(one) else next(n for n, d in enumerate(data) if not len(d) and n not in seen)
                    np.testing.assert_array_equal(one, data[n])
                    if len(one) or not isinstance(target, np.ndarray):
                        np.testing.assert_array_equal(its_target, targets[n])
                    seen.append(n)
            assert sorted(seen) == list(range(count))
            assert shuffle or [n for n in seen if len(data[n])] == [n for n in range(count) if len(data[n])]


def test_a_pool_is_sorted_by_length_and_its_batches_shuffled():
    lengths = np.random.default_rng(1).integers(1, 1000, 60)
    data = [np.full(n, b) for b, n in enumerate(lengths)]
    batches = RaggedBatches(data, np.arange(60), 4, seed=3, group=5)
    found = [target for _, target in batches]
    # The pools again, by hand, from the same generator
    generator = np.random.default_rng(3)
    order, expected = generator.permutation(60).tolist(), []
    for start in range(0, 60, 20):
        pool = sorted(order[start : start + 20], key=lambda n: lengths[n])
        expected += [pool[n : n + 4] for n in range(0, 20, 4)]
    expected = [expected[n] for n in generator.permutation(15)]
    assert [target.tolist() for target in found] == expected


def test_a_list_of_numbers_is_a_target_for_each_sequence():
    (x, target), *_ = RaggedBatches(sequences(3), [5, 6, 7], 2, shuffle=False)
    assert target.tolist() == [5, 6]
    assert len(x) == 2


@pytest.mark.parametrize(
    ("data", "targets", "size", "options", "error", "words"),
    [
        ([], [], 2, {}, ValueError, "sequences: expected at least one array, got none"),
        (Ragged(np.empty(0), [0]), [], 2, {}, ValueError, "sequences: expected at least one, got none"),
        (sequences(3), [1, 2], 2, {}, ValueError, "targets: expected 3, one for each sequence, got 2"),
        (sequences(3), np.float64(1)[...], 2, {}, ValueError, "targets: expected one for each sequence, got a single"),
        ([np.ones(3), np.ones(4)], [np.ones(3), np.ones(5)], 2, {}, ValueError, "targets: .* 4 steps for sequence 1"),
        ([np.ones(3)] * 2, [np.ones(3), np.ones((3, 2))], 2, {}, ValueError, "^targets: expected .length, "),
        ([np.ones(3), np.ones((3, 2))], [1, 2], 2, {}, ValueError, "^sequences: expected .length, "),
        (sequences(3), [1, 2, 3], 0, {}, ValueError, "batch_size: expected at least 1, got 0"),
        (sequences(3), [1, 2, 3], 2, {"group": 1.5}, TypeError, "group: expected an integer, got 1.5"),
    ],
)
def test_wrong_sequences(data, targets, size, options, error, words):
    with pytest.raises(error, match=words):
        RaggedBatches(data, targets, size, **options)


# ------------------------------------------------------------------ windows of a series


@given(
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 7),
    st.sampled_from([None, [0], [2, 0]]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 60),
)
def test_every_window_comes_once_with_what_follows(T, stride, horizon, B, targets, each_step, shuffle, spare):
    series = np.random.default_rng(0).standard_normal((T + horizon + spare, 3))
    columns = [0, 1, 2] if targets is None else targets
    expected = []
    for start in range(0, len(series) - T - horizon + 1, stride):
        last = [start + t + horizon for t in range(T)] if each_step else start + T - 1 + horizon
        expected.append((series[start : start + T], series[last][..., columns]))
    options = {"stride": stride, "horizon": horizon, "targets": targets, "each_step": each_step, "shuffle": shuffle}
    windows = SeriesWindows(series, T, batch_size=B, seed=5, **options)
    batches = list(windows)
    assert len(batches) == len(windows) == -(-len(expected) // B)
    assert [x.shape[1] for x, _ in batches[:-1]] == [B] * (len(batches) - 1)
    found = []
    for x, target in batches:
        assert x.shape[::2] == (T, 3)
        assert x.flags.c_contiguous
        found += zip(x.swapaxes(0, 1), target.swapaxes(0, 1) if each_step else target)
    assert len(found) == len(expected)
    if shuffle:  # no two numbers of the series are the same
        expected, found = (sorted(windows, key=lambda window: window[0][0, 0]) for windows in (expected, found))
    for (x, target), (their_x, their_target) in zip(found, expected):
        np.testing.assert_array_equal(x, their_x)
        np.testing.assert_array_equal(target, their_target)


def test_a_vector_is_one_feature():
    x, target = next(iter(SeriesWindows(np.arange(20.0), 4, batch_size=3, shuffle=False)))
    assert x[..., 0].T.tolist() == [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]]
    assert target.tolist() == [[4], [5], [6]]


def test_windows_are_shuffled_anew():
    windows = SeriesWindows(np.arange(2001.0), 1, batch_size=10, seed=0)
    starts = [np.concatenate([x[0, :, 0] for x, _ in windows]) for _ in range(2)]
    assert not (starts[0] == starts[1]).all()
    assert abs(np.corrcoef(starts[0], np.arange(2000))[0, 1]) < 5 / np.sqrt(2000)


def test_x_and_target_are_arrays_of_their_own(text_file):
    series = np.arange(30.0)
    for source in (
        SeriesWindows(series, 4, batch_size=3, each_step=True, shuffle=False),
        SeriesStream(series, None, 3, 4),
        TextStream(text_file, encode, 3, 4),
    ):
        (x, target), *_ = source
        wanted = target.copy()
        x[...] = -1
        np.testing.assert_array_equal(target, wanted)
    assert (series == np.arange(30)).all()


@pytest.mark.parametrize(
    ("series", "options", "error", "words"),
    [
        (np.ones((2, 3, 4)), {}, ValueError, r"series: expected \(N, F\) or \(N,\), got \(2, 3, 4\)"),
        (1.0, {}, ValueError, "series: expected .* got a single number"),
        (np.ones(9, complex), {}, TypeError, "series: expected floats or integers, got dtype complex128"),
        (np.ones(5), {"horizon": 3}, ValueError, "window of 3 steps and a horizon of 3 need 6 steps, got 5"),
        (np.ones(9), {"stride": 0}, ValueError, "stride: expected at least 1, got 0"),
        (np.ones(9), {"horizon": 1.0}, TypeError, "horizon: expected an integer, got 1.0"),
        (np.ones((9, 2)), {"targets": [2]}, ValueError, r"targets: expected columns from 0 to 1, got \[2\]"),
        (np.ones((9, 2)), {"targets": [-1]}, ValueError, "targets: expected columns from 0 to 1"),
        (np.ones((9, 2)), {"targets": [0.5]}, TypeError, "targets: expected integers"),
        (np.ones((9, 2)), {"targets": 1}, ValueError, "targets: expected a sequence of columns, got 1"),
        ("series.csv", {}, ValueError, "series: expected an array or the path of a .npy file, got 'series.csv'"),
        ("no such.npy", {}, ValueError, "series: expected a .npy file that can be mapped .* got no such.npy"),
    ],
)
def test_wrong_series(series, options, error, words):
    with pytest.raises(error, match=words):
        SeriesWindows(series, 3, batch_size=2, **options)


# ------------------------------------------------------------------ streams of a series


def continued(batches):
    """The whole streams: x and target of all batches, one behind the other."""
    return tuple(np.concatenate(items) for items in zip(*batches))


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 100), st.booleans())
def test_series_streams_are_the_data_cut_in_equal_parts(B, steps, spare, shifted):
    data = np.arange(B + 1 + spare, dtype=np.int32)
    target = None if shifted else np.stack([data * 2, data * 3], axis=1)
    stream = SeriesStream(data, target, B, steps)
    batches = list(stream)
    assert len(batches) == len(stream)
    assert [len(x) for x, _ in batches[:-1]] == [steps] * (len(batches) - 1)
    x, found = continued(batches)
    assert x.dtype == np.int32
    length = (len(data) - shifted) // B
    for b in range(B):
        own = slice(b * length, (b + 1) * length)
        np.testing.assert_array_equal(x[:, b], data[own])
        np.testing.assert_array_equal(found[:, b], data[own] + 1 if shifted else target[own])


def test_floats_have_features_and_tokens_have_none():
    floats, tokens = np.arange(31.0), np.arange(31, dtype=np.uint16)
    for x, target, x_shape, target_shape in [
        (floats, None, (4, 3, 1), (4, 3, 1)),
        (tokens, None, (4, 3), (4, 3)),
        (floats, tokens, (4, 3, 1), (4, 3)),
        (np.ones((31, 5)), floats, (4, 3, 5), (4, 3, 1)),
        (np.ones((31, 5)), np.ones((31, 2, 2)), (4, 3, 5), (4, 3, 2, 2)),
    ]:
        batch = next(iter(SeriesStream(x, target, 3, 4)))
        assert [item.shape for item in batch] == [x_shape, target_shape]
        assert batch[0].dtype == x.dtype


@pytest.mark.parametrize("convert", [str, lambda path: path])
def test_npy_files_are_mapped_into_memory(tmp_path, convert):
    data = np.random.default_rng(0).standard_normal((50, 3))
    np.save(tmp_path / "x.npy", data.astype(">f4"))
    path = convert(tmp_path / "x.npy")
    for source in (SeriesStream(path, None, 4, 5).x, SeriesWindows(path, 5, batch_size=2).series):
        assert isinstance(source, np.memmap)
    assert next(iter(SeriesStream(path, path, 2, 7)))[0].dtype.isnative
    x, _ = continued(SeriesStream(path, path, 2, 7))
    np.testing.assert_array_equal(x.swapaxes(0, 1).reshape(50, 3), data.astype(np.float32))


@pytest.mark.parametrize(
    ("x", "target", "sizes", "error", "words"),
    [
        (np.ones((9, 2)), np.ones(8), (2, 3), ValueError, "target: expected 9 steps, as many as x has, got 8"),
        (np.ones(4), None, (4, 3), ValueError, "x: 4 streams need at least 5 steps, got 4"),
        (np.ones(3), np.ones(3), (4, 3), ValueError, "x: 4 streams need at least 4 steps, got 3"),
        (np.ones(9, "U1"), None, (2, 3), TypeError, "x: expected floats or integers, got dtype <U1"),
        (np.ones(9), np.ones(9, bool), (2, 3), TypeError, "target: expected floats or integers, got dtype bool"),
        (np.ones(9), "y.bin", (2, 3), ValueError, "target: expected an array or the path of a .npy file"),
        (np.ones(9), None, (0, 3), ValueError, "batch_size: expected at least 1"),
        (np.ones(9), None, (2, "3"), TypeError, "steps: expected an integer, got '3'"),
    ],
)
def test_wrong_series_streams(x, target, sizes, error, words):
    with pytest.raises(error, match=words):
        SeriesStream(x, target, *sizes)


# ------------------------------------------------------------------ streams of documents


def by_document(batches, rows):
    """The pieces of x and target that each row gives from one reset to the next."""
    found, begun = [], [False] * rows
    for x, target, lengths, reset in batches:
        assert lengths.dtype == np.int64
        assert reset.dtype == bool
        assert lengths.shape == reset.shape == (rows,)
        assert len(x) == len(target) == lengths.max() > 0
        assert x.shape[1] == target.shape[1] == rows
        for b, (n, begins) in enumerate(zip(lengths, reset)):
            assert not x[n:, b].any()
            assert not target[n:, b].any()
            if begins:
                begun[b] = []
                found.append(begun[b])
            assert n > 0 or not begins
            if n:
                begun[b].append((x[:n, b], target[:n, b]))
    return found


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(lambda lengths: max(lengths) > 1),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from(["next", "targets", "ragged"]),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_every_step_of_every_document_comes_once(lengths, B, steps, form, shuffle, seed):
    documents = [np.stack([np.full(n, d), np.arange(n)], axis=1) + 1.0 for d, n in enumerate(lengths)]
    shift = int(form == "next")
    wanted = [one[1:] if shift else -one for one in documents]
    targets = None if shift else wanted
    if form == "ragged":
        documents, targets = Ragged.from_list(documents), Ragged.from_list(targets)
    stream = DocumentStream(documents, targets, B, steps, seed=seed, shuffle=shuffle)
    for _ in range(2):
        batches = list(stream)
        found = by_document(batches, B)
        # one after the other, and no row waits for a batch while there are documents
        order = [int(pieces[0][0][0, 0]) - 1 for pieces in found]
        assert sorted(order) == [d for d, n in enumerate(lengths) if n > shift]
        assert shuffle or order == sorted(order)
        waiting = len(order)
        for *_, its_lengths, reset in batches:
            waiting -= reset.sum()
            assert its_lengths.all() or not waiting
        for d, pieces in zip(order, found):
            assert [len(x) for x, _ in pieces[:-1]] == [steps] * (len(pieces) - 1)
            np.testing.assert_array_equal(np.concatenate([x for x, _ in pieces]), documents[d][: lengths[d] - shift])
            np.testing.assert_array_equal(np.concatenate([target for _, target in pieces]), wanted[d])


def test_a_row_begins_its_next_document_in_the_next_batch():
    documents = [np.arange(n) + 10 * d for d, n in enumerate([5, 2, 4, 1], 1)]
    found = [
        ([row[:n].tolist() for row, n in zip(x.T, lengths)], lengths.tolist(), reset.tolist())
        for x, _, lengths, reset in DocumentStream(documents, documents, 2, 3)
    ]
    assert found == [
        ([[10, 11, 12], [20, 21]], [3, 2], [True, True]),
        ([[13, 14], [30, 31, 32]], [2, 3], [False, True]),
        ([[40], [33]], [1, 1], [True, False]),
    ]


def test_documents_have_the_shapes_of_series():
    vectors, tokens = [np.arange(4.0, dtype="f4"), np.ones(2, "f4")], [np.arange(4, dtype=">i2"), np.ones(2, ">i2")]
    for documents, targets, x_shape, target_shape in [
        (vectors, None, (3, 2, 1), (3, 2, 1)),
        (tokens, None, (3, 2), (3, 2)),
        (vectors, tokens, (4, 2, 1), (4, 2)),
        ([np.ones((4, 5)), np.ones((2, 5))], vectors, (4, 2, 5), (4, 2, 1)),
        (np.ones((2, 4, 5)), np.ones((2, 4, 3)), (4, 2, 5), (4, 2, 3)),
        ([[1, 2, 3, 4], [5, 6]], None, (3, 2), (3, 2)),
    ]:
        x, target, *_ = next(iter(DocumentStream(documents, targets, 2, 9)))
        assert (x.shape, target.shape) == (x_shape, target_shape)
        assert x.dtype == np.asarray(documents[0]).dtype.newbyteorder("=")
        assert x.dtype.isnative
        assert target.dtype.isnative


def test_documents_are_shuffled_anew():
    documents = [np.full(2, n) for n in range(200)]
    stream = DocumentStream(documents, documents, 4, 2, seed=0, shuffle=True)
    orders = [np.concatenate([x[0] for x, *_ in stream]) for _ in range(2)]
    assert not (orders[0] == orders[1]).all()
    assert sorted(orders[0]) == list(range(200))


def test_documents_are_read_piece_by_piece(tmp_path):
    x, target = (Counted(np.arange(1000.0)) for _ in range(2))
    stream = DocumentStream([x], [target], 2, 7)
    iteration = iter(stream)
    assert x.read == target.read == []
    next(iteration)
    assert x.read == target.read == [(0, 7)]
    stream.load_state_dict(stream.state_dict() | {"position": 100})
    next(iter(stream))
    assert x.read == target.read == [(0, 7), (700, 707)]
    np.save(tmp_path / "x.npy", np.arange(5))
    assert isinstance(DocumentStream([tmp_path / "x.npy"], None, 1, 2).documents[0], np.memmap)


def test_an_epoch_of_fewer_documents_cannot_be_resumed():
    stream = DocumentStream([np.arange(9)], None, 1, 4)
    stream.load_state_dict(stream.state_dict() | {"position": 3})
    with pytest.raises(ValueError, match="state: expected an epoch of at least 3 batches, got 2 from the documents"):
        list(stream)


@pytest.mark.parametrize(
    ("documents", "targets", "sizes", "error", "words"),
    [
        ([], None, (2, 3), ValueError, "documents: expected at least one array, got none"),
        ([np.ones(3)], [], (2, 3), ValueError, "targets: expected at least one array, got none"),
        ([np.ones(1), np.ones(0)], None, (2, 3), ValueError, "documents: expected at least one of at least two steps"),
        ([np.ones(0)], [np.ones(0)], (2, 3), ValueError, "documents: .* at least one step, got none"),
        (np.ones(3), None, (2, 3), ValueError, r"documents\[0\]: expected \(N, ...\), got a single number"),
        ([np.ones(3), np.ones(2, "U1")], None, (2, 3), TypeError, r"documents\[1\]: expected floats or integers"),
        ([np.ones(3), np.ones((2, 2))], None, (2, 3), ValueError, r"documents\[1\]: expected \(length\) .* got \(2, 2"),
        ([np.ones((3, 2)), np.ones(2)], None, (2, 3), ValueError, r"documents\[1\]: expected \(length, 2\) like the"),
        ([np.ones(3), np.ones(3, int)], None, (2, 3), ValueError, r"documents\[1\]: expected float64 .* got int64"),
        ([np.ones(3)] * 2, [np.ones(3)], (2, 3), ValueError, "targets: expected 2, one for each document, got 1"),
        ([np.ones(3)] * 2, [np.ones(3), np.ones(4)], (2, 3), ValueError, r"targets\[1\]: expected 3 steps.* got 4"),
        ([np.ones(3)], None, (0, 3), ValueError, "batch_size: expected at least 1, got 0"),
        ([np.ones(3)], None, (2, 1.5), TypeError, "steps: expected an integer, got 1.5"),
    ],
)
def test_wrong_documents(documents, targets, sizes, error, words):
    with pytest.raises(error, match=words):
        DocumentStream(documents, targets, *sizes)


# ------------------------------------------------------------------ only what is needed is read


def test_windows_are_read_one_by_one():
    series = Counted(np.arange(10_000.0).reshape(-1, 2))
    windows = SeriesWindows(series, 6, horizon=3, batch_size=4, seed=0)
    assert series.read == []
    x, _ = next(iter(windows))
    starts = (x[0, :, 0] / 2).astype(int)
    assert sorted(series.read) == sorted([(s, s + 6) for s in starts] + [(s + 8, s + 9) for s in starts])


def test_streams_are_read_batch_by_batch():
    x, target = (Counted(np.arange(10_001.0)) for _ in range(2))
    iteration = iter(SeriesStream(x, target, 4, 5))
    assert x.read == target.read == []
    next(iteration)
    assert x.read == target.read == [(start, start + 5) for start in (0, 2500, 5000, 7500)]
    assert sum(1 for _ in iteration) == 499
    assert x.largest == 5


def test_resuming_a_stream_reads_nothing_again():
    x = Counted(np.arange(10_000.0))
    stream = SeriesStream(x, None, 2, 5)
    stream.load_state_dict({"position": 900})
    next(iter(stream))
    assert min(x.read)[0] == 4500


def traced_peak(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_file_much_larger_than_a_batch_stays_on_disk(tmp_path):
    N, F = 2_000_000, 64  # 512 MB of zeros in a file with holes: nothing of it is written
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (N, F)).flush()

    def take_some():
        batches = itertools.chain(
            itertools.islice(SeriesStream(tmp_path / "x.npy", None, 16, 50), 20),
            itertools.islice(SeriesWindows(tmp_path / "x.npy", 50, stride=100, batch_size=16), 20),
        )
        assert sum(x.size for x, _ in batches) == 40 * 16 * 50 * F

    assert traced_peak(take_some) < 4e6


def test_a_text_is_read_in_blocks(tmp_path):
    path, sizes = tmp_path / "text.txt", []
    path.write_bytes(b"0123456789\n" * 1_000_000)

    def tokens(text):
        sizes.append(len(text))
        return np.frombuffer(text.encode(), np.uint8)

    stream = TextStream(path, tokens, 4, 100)
    assert sizes == []
    assert traced_peak(lambda: list(itertools.islice(stream, 50))) < 4e6
    assert sizes == [streams.BLOCK] * 4
    state = stream.state_dict()
    stream.load_state_dict(state | {"places": [[start + 2_000_000, 7] for start, _ in state["places"]]})
    next(iter(stream))
    assert sizes == [streams.BLOCK] * 8  # no block before that


# ------------------------------------------------------------------ streams from a function


@given(st.integers(0, 60), st.integers(1, 70), st.integers(0, 2**32))
def test_pieces_are_cut_again(total, steps, seed):
    batches = list(GeneratorStream(pieces(total, seed=seed), 3, steps))
    assert [len(x) for x, _ in batches] == [steps] * (total // steps) + [total % steps] * (total % steps > 0)
    if total:
        x, target = continued(batches)
        np.testing.assert_array_equal(x, np.arange(total * 3).reshape(total, 3))
        np.testing.assert_array_equal(target, -x)


def test_pieces_may_come_in_the_same_arrays():
    def make():
        x = np.empty((5, 2))
        for n in range(4):
            x[...] = np.arange(5 * n, 5 * n + 5)[:, None]
            yield x, x

    x, target = continued(list(GeneratorStream(make, 2, 3)))
    assert x[:, 1].tolist() == target[:, 0].tolist() == list(range(20))


def test_endless_pieces_are_taken_one_by_one():
    counter = itertools.count()
    stream = GeneratorStream(lambda: ((np.full((2, 1), next(counter)),) * 2 for _ in itertools.count()), 1, 3)
    assert [x.ravel().tolist() for x, _ in itertools.islice(stream, 2)] == [[0, 0, 1], [1, 2, 2]]
    assert next(counter) == 3


@pytest.mark.parametrize(
    ("piece", "error", "words"),
    [
        (np.ones((4, 2)), TypeError, r"make: expected pairs \(x, target\), got ndarray"),
        ((np.ones((4, 3)), np.ones((4, 3))), ValueError, r"make: .* \(n, 2, ...\), got \(4, 3\) and \(4, 3\)"),
        ((np.ones((4, 2)), np.ones((5, 2))), ValueError, r"make: .* got \(4, 2\) and \(5, 2\)"),
        ((np.ones(4), np.ones(4)), ValueError, r"make: .* got \(4,\) and \(4,\)"),
    ],
)
def test_wrong_pieces(piece, error, words):
    with pytest.raises(error, match=words):
        list(GeneratorStream(lambda: [piece], 2, 3))


def test_a_generator_is_not_a_function_that_makes_one():
    with pytest.raises(TypeError, match="make: expected a function that returns an iterable"):
        GeneratorStream(pieces()(), 3, 5)


def test_an_epoch_that_became_shorter_cannot_be_resumed():
    stream = GeneratorStream(pieces(10), 3, 5)
    stream.load_state_dict({"position": 3})
    with pytest.raises(ValueError, match=r"state: expected an epoch of at least 3 batches, got 2 from make\(\)"):
        list(stream)


# ------------------------------------------------------------------ streams of a text


def text_streams(text, B):
    """The text in B pieces of equal size, where a character belongs to the piece that its first byte lies in."""
    size, found = len(text.encode()), [""] * B
    borders, at = [size * b // B for b in range(B + 1)], 0
    for character in text:
        found[sum(border <= at for border in borders[1:])] += character
        at += len(character.encode())
    return found


@given(
    st.text(st.sampled_from("ab\r\n\ufeffß–日🙂"), min_size=12, max_size=150),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 40),
)
def test_text_streams_are_the_text_cut_at_characters(tmp_path_factory, text, B, steps, block):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(text.encode())
    expected = [encode(one) for one in text_streams(text, B)]
    assert sum(map(len, expected)) == len(text)
    length = min(map(len, expected)) - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "BLOCK", block)
        batches = list(TextStream(path, encode, B, steps))
    assert [len(x) for x, _ in batches] == [steps] * (length // steps) + [length % steps] * (length % steps > 0)
    if batches:
        x, target = continued(batches)
        assert x.dtype == target.dtype == np.int32
        for b in range(B):
            np.testing.assert_array_equal(x[:, b], expected[b][:length])
            np.testing.assert_array_equal(target[:, b], expected[b][1 : length + 1])


def test_a_block_may_have_no_tokens(text_file):
    # a code that knows only spaces, which many blocks do not have
    batches = list(TextStream(text_file, lambda text: np.full(text.count(" "), 3), 2, 5))
    spaces = [one.count(" ") for one in text_streams(TEXT, 2)]
    assert sum(len(x) for x, _ in batches) == min(spaces) - 1


@pytest.mark.parametrize(
    ("raw", "at"),
    [
        (b"a" * 40 + b"\xff" + b"a" * 40, 40),
        (b"\x80" + b"a" * 80, 0),
        (b"a" * 80 + "ß".encode()[:1], 80),
        (b"a" * 28 + b"\x80" * 9 + b"a" * 44, 28),
        (b"a" * 28 + "ß".encode() + b"aa\xff" + b"a" * 40, 32),
        (b"a" * 20 + b"\x80" * 60, 20),
    ],
)
def test_a_file_that_is_no_text(tmp_path, monkeypatch, raw, at):
    monkeypatch.setattr(streams, "BLOCK", 29)
    path = tmp_path / "noise"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=f"path: expected UTF-8 text, got byte 0x{raw[at]:02x} at {at} of .*noise"):
        list(TextStream(path, encode, 1, 7))


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        (lambda text: text, ValueError, "encode: expected one dimension"),
        (lambda text: np.ones(3), TypeError, "encode: expected integers, got dtype float64"),
        (lambda text: [-1], ValueError, "encode: expected ids"),
    ],
)
def test_wrong_codes(text_file, code, error, words):
    with pytest.raises(error, match=words):
        list(TextStream(text_file, code, 2, 7))


def test_wrong_text_streams(text_file, tmp_path):
    with pytest.raises(TypeError, match="encode: expected a function of a text, got 'utf-8'"):
        TextStream(text_file, "utf-8", 2, 7)
    with pytest.raises(ValueError, match=r"path: .*nowhere cannot be read"):
        TextStream(tmp_path / "nowhere", encode, 2, 7)
    with pytest.raises(ValueError, match=r"path: .* cannot be read"):
        TextStream(tmp_path, encode, 2, 7)
    with pytest.raises(ValueError, match="path: 9999 streams need at least 19,998 bytes, got"):
        TextStream(text_file, encode, 9999, 7)
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        TextStream(text_file, encode, 2, 0)


# ------------------------------------------------------------------ resumed, in every source


def make_ragged(seed, text_file):
    data = sequences(50)
    return RaggedBatches(data, [one[:, 1] for one in data], 4, seed=seed, group=3)


def make_documents(seed, shuffle):
    return DocumentStream(sequences(40), None, 3, 5, seed=seed, shuffle=shuffle)


MAKERS = {
    "RaggedBatches": make_ragged,
    "SeriesWindows": lambda seed, _: SeriesWindows(np.arange(120.0).reshape(-1, 2), 5, batch_size=4, seed=seed),
    "in order": lambda seed, _: SeriesWindows(np.arange(59.0), 5, batch_size=4, seed=seed, shuffle=False),
    "DocumentStream": lambda seed, _: make_documents(seed, True),
    "documents in order": lambda seed, _: make_documents(seed, False),
    "SeriesStream": lambda seed, _: SeriesStream(np.arange(200), None, 3, 5),
    "GeneratorStream": lambda seed, _: GeneratorStream(pieces(70), 3, 5),
    "TextStream": lambda seed, text_file: TextStream(text_file, encode, 3, 50),
}
EACH = pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
STREAMS = {"SeriesStream", "GeneratorStream", "TextStream", "documents in order"}


@EACH
@pytest.mark.parametrize("taken", [0, 1, 7, 12, "all"])
def test_resuming_within_an_epoch_goes_on_as_if_nothing_had_happened(maker, taken, text_file):
    source, twin = maker(3, text_file), maker(3, text_file)
    epoch(source)
    count = [len(epoch(twin)) for _ in range(2)][1]
    assert count > 12
    iteration = iter(source)
    for _ in range(count if taken == "all" else taken):
        next(iteration)
    saved = json.loads(json.dumps(source.state_dict()))
    rest, following = epoch(iteration), epoch(source)
    assert len(rest) == (0 if taken == "all" else count - taken)

    resumed = maker(99, text_file)
    resumed.load_state_dict(saved)
    assert resumed.state_dict() == saved
    assert same(epoch(resumed), rest)
    assert same(epoch(resumed), following)


@EACH
def test_a_source_can_be_set_back_itself(maker, text_file):
    source = maker(3, text_file)
    iteration = iter(source)
    next(iteration)
    saved = source.state_dict()
    rest = epoch(iteration)
    source.load_state_dict(saved)
    assert same(epoch(source), rest)


@EACH
def test_leaving_an_epoch_early_starts_a_whole_one_next(maker, text_file):
    source, twin = maker(3, text_file), maker(3, text_file)
    wanted = [epoch(twin) for _ in range(3)]
    assert same(epoch(source), wanted[0])
    next(iter(source))
    assert same(epoch(source), wanted[2])


@EACH
def test_an_epoch_after_one_that_was_left_can_be_resumed(maker, text_file):
    source = maker(3, text_file)
    next(iter(source))
    iteration = iter(source)
    next(iteration)
    saved = source.state_dict()
    resumed = maker(99, text_file)
    resumed.load_state_dict(saved)
    assert same(epoch(resumed), epoch(iteration))


@EACH
def test_a_seed_fixes_all_epochs(maker, text_file, request):
    first, second, other = maker(3, text_file), maker(3, text_file), maker(4, text_file)
    done = [epoch(first) for _ in range(3)]
    assert all(same(one, epoch(second)) for one in done)
    fixed = request.node.callspec.id in {*STREAMS, "in order"}
    assert all(same(one, epoch(other)) for one in done) == fixed
    assert same(done[0], done[1]) == fixed


@EACH
def test_a_foreign_state_is_refused_and_changes_nothing(maker, text_file):
    source = maker(3, text_file)
    next(iter(source))
    before = source.state_dict()
    other = maker(4, text_file).state_dict()
    foreign = [
        {},
        other | {"position": -1},
        before | {"position": -1},
        before | {"position": 1.0},
        *(before | {name: 5.0} for name in before),
    ]
    for state in foreign:
        with pytest.raises(ValueError, match="state"):
            source.load_state_dict(state)
        assert source.state_dict() == before
    if hasattr(source, "__len__"):
        with pytest.raises(ValueError, match=f"state: expected a position from 0 to {len(source)}, got"):
            source.load_state_dict(before | {"position": len(source) + 1})


@pytest.mark.parametrize("places", [[], [[0, 0]] * 3, [[0, 0], [2000, -1], [4000, 0]], [[0], [1], [2]], [[0, 0.5]] * 3])
def test_places_in_another_text_are_refused(text_file, places):
    with pytest.raises(ValueError, match=r"state: expected the places of 3 streams of .*text.txt, got"):
        TextStream(text_file, encode, 3, 50).load_state_dict({"position": 1, "places": places})


@EACH
def test_streams_carry_the_state_and_know_their_length_where_it_is_known(maker, text_file, request):
    source, name = maker(3, text_file), request.node.callspec.id
    assert source.carries_state == (name in {*STREAMS, "DocumentStream"})
    unknown = {"GeneratorStream", "TextStream", "DocumentStream", "documents in order"}
    assert hasattr(source, "__len__") == (name not in unknown)


def test_a_mapped_file_is_given_back_while_it_is_read_and_changes_of_a_private_map_stay(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.arange(4000, dtype="float32"))
    want = list(SeriesStream(np.arange(4000, dtype="float32"), None, 4, 10))
    given_back = []
    monkeypatch.setattr(streams, "HELD", 5)
    monkeypatch.setattr(streams, "release", lambda series: given_back.append(series) or release(series))
    stream = SeriesStream(tmp_path / "x.npy", None, 4, 10)
    for (x, target), (other, last) in zip(stream, want):
        np.testing.assert_array_equal(x, other)
        np.testing.assert_array_equal(target, last)
    assert len(given_back) == 2 * len(want) / 5
    private = np.load(tmp_path / "x.npy", mmap_mode="c")
    private[:] = -1
    release(private)
    assert (private == -1).all()
