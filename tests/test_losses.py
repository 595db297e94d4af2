"""Losses against SciPy's log-softmax, torch and finite differences; their edges, and what they refuse."""

import json

import numpy as np
import oracle
import pytest
from scipy.special import log_softmax, softmax

from nbrnn.data.ragged import Ragged
from nbrnn.kernels.jit import get_num_threads, set_num_threads
from nbrnn.training.losses import MAE, MSE, BCEWithLogits, CrossEntropy, from_config

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
TOLERANCE = {"float32": 2e-6, "float64": 1e-13}
# Around the lengths of a vector (4, 8, 16) and of several, where edges are handled.
COLUMNS = pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 8, 15, 16, 17, 28, 31, 33, 100, 1000])


def logits(shape, dtype, seed=0, scale=3.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(dtype)


def classes(shape, columns, seed=1):
    return np.random.default_rng(seed).integers(0, columns, shape)


def expected(y, target, counts=None):
    """The mean cross entropy and its gradient, from SciPy in float64."""
    y = y.astype(np.float64).reshape(-1, y.shape[-1])
    target = target.reshape(-1)
    counts = np.ones(len(y), bool) if counts is None else counts.reshape(-1)
    rows, total = np.flatnonzero(counts), max(1, counts.sum())
    dy = np.zeros_like(y)
    dy[rows] = softmax(y[rows], axis=1)
    dy[rows, target[rows]] -= 1.0
    return -log_softmax(y, axis=1)[rows, target[rows]].sum() / total, dy / total


# ------------------------------------------------------------------ cross entropy


@DTYPES
@COLUMNS
def test_cross_entropy_is_the_mean_of_minus_log_softmax(dtype, columns):
    y, target = logits((7, 5, columns), dtype), classes((7, 5), columns)
    value, dy = CrossEntropy()(y, target)
    want, dwant = expected(y, target)
    assert isinstance(value, float)
    assert dy.shape == y.shape
    assert dy.dtype == y.dtype
    assert value == pytest.approx(want, rel=TOLERANCE[dtype], abs=TOLERANCE[dtype])
    np.testing.assert_allclose(dy.reshape(dwant.shape), dwant, atol=TOLERANCE[dtype] / target.size)


@DTYPES
def test_cross_entropy_of_a_large_vocabulary(dtype):
    y, target = logits((30, 10_000), dtype), classes(30, 10_000)
    value, dy = CrossEntropy()(y, target)
    want, dwant = expected(y, target)
    assert value == pytest.approx(want, rel=TOLERANCE[dtype])
    np.testing.assert_allclose(dy, dwant, rtol=1e-5 if dtype == "float32" else 1e-12, atol=1e-12)


@DTYPES
def test_cross_entropy_agrees_with_torch(dtype):
    torch = pytest.importorskip("torch")
    y, target = logits((35, 32, 28), dtype), classes((35, 32), 28)
    target[3:5] = -100
    leaf = torch.tensor(y, requires_grad=True)
    want = torch.nn.functional.cross_entropy(leaf.reshape(-1, 28), torch.tensor(target).reshape(-1))
    want.backward()
    value, dy = CrossEntropy()(y, target)
    assert value == pytest.approx(want.item(), rel=TOLERANCE[dtype])
    np.testing.assert_allclose(dy, leaf.grad.numpy(), rtol=0, atol=TOLERANCE[dtype] / target.size)


@DTYPES
@pytest.mark.parametrize("size", [1e4, -1e4, 1e30])
def test_cross_entropy_of_huge_logits_does_not_overflow(dtype, size):
    for columns in (3, 16, 21):
        y = np.full((2, columns), size, dtype)
        y[0, -1] = 0.0
        target = np.array([columns - 1, 0])
        value, dy = CrossEntropy()(y, target)
        want, dwant = expected(y, target)
        assert value == pytest.approx(want, rel=1e-6)
        np.testing.assert_allclose(dy, dwant, rtol=1e-6, atol=1e-30)


@DTYPES
def test_a_class_that_is_ruled_out_has_no_gradient(dtype):
    y, target = logits((4, 20), dtype), np.zeros(4, int)
    y[:, [1, 17, 19]] = -np.inf
    value, dy = CrossEntropy()(y, target)
    want, dwant = expected(y, target)
    assert value == pytest.approx(want, rel=TOLERANCE[dtype])
    np.testing.assert_allclose(dy, dwant, atol=TOLERANCE[dtype])
    assert CrossEntropy()(y, np.ones(4, int))[0] == np.inf


@pytest.mark.parametrize("ignored", [-100, 0, 3])
def test_ignored_targets_count_for_nothing(ignored):
    y, target = logits((6, 4, 9), "float64"), classes((6, 4), 9)
    target[2] = ignored
    y[2, 1] = np.nan
    counts = target != ignored
    value, dy = CrossEntropy(ignore_index=ignored)(y, target)
    want, dwant = expected(np.nan_to_num(y), target, counts)
    assert value == pytest.approx(want, rel=1e-14)
    np.testing.assert_allclose(dy.reshape(dwant.shape), dwant, atol=1e-15)
    assert (dy[2] == 0).all()
    assert CrossEntropy(ignored).items(target) == counts.sum()


def test_where_nothing_counts_the_loss_is_zero():
    value, dy = CrossEntropy()(logits((3, 5), "float32"), np.full(3, -100))
    assert value == 0.0
    assert (dy == 0).all()
    value, dy = CrossEntropy()(np.zeros((0, 5), "float32"), np.zeros(0, int))
    assert value == 0.0
    assert dy.shape == (0, 5)


@DTYPES
@pytest.mark.parametrize("columns", [1, 16, 21, 40])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_seen_wherever_it_stands_and_stays_in_its_row(dtype, columns, bad):
    for column in range(columns):
        y, target = logits((3, columns), dtype), np.zeros(3, int)
        y[1, column] = bad
        value, dy = CrossEntropy()(y, target)
        assert np.isnan(value)
        assert np.isnan(dy[1]).all()
        assert np.isfinite(dy[[0, 2]]).all()


@DTYPES
def test_the_bits_do_not_depend_on_threads_or_neighbours(dtype):
    y, target = logits((600, 1000), dtype), classes(600, 1000)
    results = []
    for threads in range(1, get_num_threads() + 1):
        set_num_threads(threads)
        results.append(CrossEntropy()(y, target))
    for value, dy in results:
        assert value == results[0][0]
        assert dy.tobytes() == results[0][1].tobytes()
    only = np.full(600, -100)
    only[77] = target[77]
    value, dy = CrossEntropy()(y, only)
    alone, dalone = CrossEntropy()(y[77], np.array(target[77]))
    assert value == alone
    assert dy[77].tobytes() == dalone.tobytes()


@pytest.mark.parametrize("ignored", [False, True])
def test_each_call_of_one_loss_is_as_the_first_of_another(ignored):
    rng, one = np.random.default_rng(5), CrossEntropy()
    for shape in [(4, 3, 5), (4, 3, 5), (2, 6, 5), (4, 3, 7), (4, 3, 5)]:
        for dtype in ("float32", "float64"):
            y, target = rng.standard_normal(shape).astype(dtype), rng.integers(0, 5, shape[:2])
            target[0, :2] = -100 if ignored else 1
            value, dy = one(y, target)
            want, dwant = CrossEntropy()(y, target)
            assert value == want
            assert (dy == dwant).all()
            assert dy.dtype == dtype
            rows, places = y.reshape(-1, shape[2]).astype("f8"), target.reshape(-1)
            terms = np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(rows)), np.maximum(places, 0)]
            assert value == pytest.approx(terms[places >= 0].mean(), rel=1e-5)


def test_any_layout_and_integer_type_will_do():
    y, target = logits((6, 8, 9), "float64"), classes((6, 8), 9)
    want = CrossEntropy()(y, target)
    frozen = y.copy()
    frozen.flags.writeable = False
    for given in (y.swapaxes(0, 1).copy().swapaxes(0, 1), frozen, y.astype(">f8")):
        value, dy = CrossEntropy()(given, target)
        assert value == want[0]
        assert dy.tobytes() == want[1].tobytes()
    for kind in ("int8", "uint8", "int16", "int32", "uint32", ">i4"):
        assert CrossEntropy()(y, target.astype(kind))[0] == want[0]
    assert CrossEntropy()(y, np.asfortranarray(target))[0] == want[0]


@pytest.mark.parametrize(
    ("y", "target", "error", "message"),
    [
        ([[1.0]], np.array([0]), TypeError, "y: expected a NumPy array, got list"),
        (np.zeros((2, 3), int), np.array([0, 1]), TypeError, "y: expected float32 or float64 values, got int64"),
        (np.zeros((2, 3), "f2"), np.array([0, 1]), TypeError, "y: expected float32 or float64 values, got float16"),
        (np.array(1.0), np.array(0), ValueError, r"y: expected \(..., V\), got a single number"),
        (np.zeros((2, 3)), [0, 1], TypeError, "target: expected a NumPy array of integers, got list"),
        (np.zeros((2, 3)), np.array([0.0, 1.0]), TypeError, "target: expected integers .*, got float64"),
        (np.zeros((2, 3)), np.array([True, False]), TypeError, "target: expected integers .*, got bool"),
        (np.zeros((2, 3)), np.array([0, 1], "u8"), TypeError, "target: expected integers .*, got uint64"),
        (np.zeros((2, 3)), np.array([[0], [1]]), ValueError, r"target: expected shape \(2,\).*, got \(2, 1\)"),
        (np.zeros((2, 3)), np.array([0, 3]), ValueError, r"target: expected classes in \[0, 3\) .*, got 3"),
        (np.zeros((2, 3)), np.array([-1, 0]), ValueError, r"target: expected classes in \[0, 3\) .*, got -1"),
    ],
)
def test_cross_entropy_says_what_is_wrong(y, target, error, message):
    with pytest.raises(error, match=message):
        CrossEntropy()(y, target)


@pytest.mark.parametrize("index", [1.0, "0", True, None])
def test_ignore_index_is_an_integer(index):
    with pytest.raises(TypeError, match="ignore_index: expected an integer"):
        CrossEntropy(index)


# ------------------------------------------------------------------ losses of elements

FORMULAS = {
    MSE: lambda y, t: ((y - t) ** 2, 2 * (y - t)),
    MAE: lambda y, t: (abs(y - t), np.sign(y - t)),
    BCEWithLogits: lambda y, t: (
        -t * np.log(1 / (1 + np.exp(-y))) - (1 - t) * np.log(1 - 1 / (1 + np.exp(-y))),
        1 / (1 + np.exp(-y)) - t,
    ),
}
BY_ELEMENT = pytest.mark.parametrize("kind", FORMULAS)


def pair(shape, dtype="float64"):
    rng = np.random.default_rng(5)
    return (rng.standard_normal(shape) * 2).astype(dtype), rng.random(shape).astype(dtype)


@BY_ELEMENT
@DTYPES
def test_losses_of_elements_follow_their_formulas(kind, dtype):
    y, target = pair((4, 3, 5), dtype)
    value, dy = kind()(y, target)
    terms, slopes = FORMULAS[kind](y.astype(np.float64), target.astype(np.float64))
    assert isinstance(value, float)
    assert dy.shape == y.shape
    assert dy.dtype == y.dtype
    assert value == pytest.approx(terms.mean(), rel=TOLERANCE[dtype])
    np.testing.assert_allclose(dy, slopes / y.size, atol=TOLERANCE[dtype])


@BY_ELEMENT
def test_losses_of_elements_agree_with_torch(kind):
    torch = pytest.importorskip("torch")
    theirs = {MSE: torch.nn.MSELoss, MAE: torch.nn.L1Loss, BCEWithLogits: torch.nn.BCEWithLogitsLoss}[kind]()
    y, target = pair((4, 3))
    leaf = torch.tensor(y, requires_grad=True)
    want = theirs(leaf, torch.tensor(target))
    want.backward()
    value, dy = kind()(y, target)
    assert value == pytest.approx(want.item(), rel=1e-14)
    np.testing.assert_allclose(dy, leaf.grad.numpy(), atol=1e-15)


def test_bce_of_huge_logits_does_not_overflow():
    y, target = np.array([1e4, -1e4, 1e4, -1e4]), np.array([1.0, 0.0, 0.0, 1.0])
    value, dy = BCEWithLogits()(y, target)
    assert value == 5e3
    assert dy.tolist() == [0.0, 0.0, 0.25, -0.25]


@BY_ELEMENT
def test_nan_is_seen_in_losses_of_elements(kind):
    y, target = pair((4, 3))
    y[1, 2] = np.nan
    value, dy = kind()(y, target)
    assert np.isnan(value)
    assert np.isnan(dy[1, 2])
    assert np.isfinite(np.delete(dy.ravel(), 5)).all()


def test_the_square_of_a_large_float32_is_not_infinite():
    value, _ = MSE()(np.full(3, 1e20, "float32"), np.zeros(3, "float32"))
    assert value == pytest.approx(1e40, rel=1e-6)


@BY_ELEMENT
def test_losses_of_elements_say_what_is_wrong(kind):
    y, target = pair((4, 3))
    with pytest.raises(ValueError, match=r"target: expected \(4, 3\), got \(4,\)"):
        kind()(y, target[:, 0])
    with pytest.raises(ValueError, match=r"target: expected \(4, 3\), got \(4, 1\)"):
        kind()(y, target[:, :1])
    with pytest.raises(TypeError, match="target: expected float64 values, got int64"):
        kind()(y, np.zeros((4, 3), int))
    with pytest.raises(TypeError, match="y: expected float32 or float64 values"):
        kind()(y.astype("f2"), target)
    assert kind()(np.zeros((0, 3)), np.zeros((0, 3)))[0] == 0.0
    assert kind()(np.array(1.0), np.array(0.5))[1].shape == ()


def test_bce_wants_probabilities():
    with pytest.raises(ValueError, match=r"target: expected probabilities in \[0, 1\], got -0.5 to 0.0"):
        BCEWithLogits()(np.zeros(2), np.array([0.0, -0.5]))


# ------------------------------------------------------------------ sequences

PER = pytest.mark.parametrize("per", ["step", "sequence", "last"])
KINDS = pytest.mark.parametrize("kind", [CrossEntropy, MSE, MAE, BCEWithLogits])
LENGTHS = np.array([4, 0, 6, 1, 3])
FORMS = pytest.mark.parametrize("form", ["ragged", "padded", "padded, batch first", "plain", "plain, batch first"])


def of_step(kind, y, target, ignored=-100):
    """The losses of the elements of one step that count, and their derivatives, in float64."""
    if kind is not CrossEntropy:
        return tuple(FORMULAS[kind](y.astype(np.float64), target.astype(np.float64)))
    y, target = y.astype(np.float64).reshape(-1, y.shape[-1]), np.ravel(target)
    rows = np.flatnonzero(target != ignored)
    slopes = np.zeros_like(y)
    slopes[rows] = softmax(y[rows], axis=1)
    slopes[rows, target[rows]] -= 1
    return -log_softmax(y[rows], axis=1)[range(len(rows)), target[rows]], slopes


def of_sequences(kind, y, target, per, ignored=-100):
    """The mean over lists of sequences and its gradients, as the definition says; `target` has one for each step."""
    slopes = [np.zeros(one.shape) for one in y]
    places = [(b, t) for b, one in enumerate(y) for t in range(len(one)) if per != "last" or t == len(one) - 1]
    found = {place: of_step(kind, y[place[0]][place[1]], target[place[0]][place[1]], ignored) for place in places}
    each = [sum(found[p][0].size for p in places if p[0] == b) for b in range(len(y))]
    total = 0.0
    for (b, t), (terms, its_slopes) in found.items():
        share = each[b] * sum(n > 0 for n in each) if per == "sequence" else sum(each)
        total += terms.sum() / max(share, 1)
        slopes[b][t] = its_slopes.reshape(y[b][t].shape) / max(share, 1)
    return total, slopes


def problem(kind, rest=(), lengths=LENGTHS, dtype="float64", ignored=-100):
    """Outputs and targets of sequences, as lists; of classes some are to be ignored, all of the fourth's."""
    rng = np.random.default_rng(3)
    y = [(rng.standard_normal((n, *rest, 5)) * 2).astype(dtype) for n in lengths]
    if kind is not CrossEntropy:
        return y, [rng.random(one.shape).astype(dtype) for one in y]
    target = [rng.integers(0, 5, one.shape[:-1]) for one in y]
    target[0].flat[:1] = target[2].flat[:2] = ignored
    target[3][...] = ignored
    return y, target


def last_of(target):
    """The target of each sequence; that of one without steps is nobody's."""
    return np.array([one[-1] if len(one) else np.full(one.shape[1:], 99) for one in target])


def padded(arrays, batch_first, fill):
    rows = np.full((len(arrays), 8, *arrays[0].shape[1:]), fill, arrays[0].dtype)
    for row, one in zip(rows, arrays):
        row[: len(one)] = one
    return rows if batch_first else np.ascontiguousarray(rows.swapaxes(0, 1))


def given_as(form, y, target, per):
    """y, target and lengths in some form; the padding holds what would be seen."""
    rows_first = "batch first" in form
    if form == "ragged":
        return Ragged.from_list(y), last_of(target) if per == "last" else Ragged.from_list(target)
    if form.startswith("plain"):
        stacked = [np.stack(arrays, axis=int(not rows_first)) for arrays in (y, target)]
        return stacked[0], last_of(target) if per == "last" else stacked[1]
    wrong = np.nan if target[0].dtype.kind == "f" else 77
    with_padding = last_of(target) if per == "last" else padded(target, rows_first, wrong)
    return padded(y, rows_first, np.nan), with_padding, [len(one) for one in y]


@KINDS
@PER
@FORMS
@DTYPES
@pytest.mark.parametrize("rest", [(), (2,)])
def test_means_over_sequences_are_as_defined(kind, per, form, dtype, rest):
    lengths = [6] * 5 if form.startswith("plain") else LENGTHS
    y, target = problem(kind, rest, lengths, dtype)
    want, slopes = of_sequences(kind, y, target, per)
    given = given_as(form, y, target, per)
    value, dy = kind(per=per, batch_first="batch first" in form)(*given)
    assert isinstance(value, float)
    assert value == pytest.approx(want, rel=TOLERANCE[dtype])
    assert type(dy) is type(given[0])
    assert dy.dtype == dtype
    if form == "ragged":
        np.testing.assert_array_equal(dy.offsets, given[0].offsets)
        dy, slopes = dy.values, np.concatenate(slopes)
    else:
        assert dy.flags.c_contiguous
        slopes = given_as(form, slopes, slopes, "step")[0]
        slopes = np.nan_to_num(slopes, nan=0.0)  # padding
        assert dy.shape == slopes.shape
    np.testing.assert_allclose(dy, slopes, rtol=0, atol=TOLERANCE[dtype])
    assert (dy[slopes == 0] == 0).all()


@KINDS
@PER
@FORMS
def test_gradients_of_means_over_sequences_agree_with_finite_differences(kind, per, form):
    y, target = problem(kind, (), [3] * 4 if form.startswith("plain") else LENGTHS)
    given, loss = given_as(form, y, target, per), kind(per=per, batch_first="batch first" in form)
    values = [np.asarray(x.values if isinstance(x, Ragged) else x) for x in (given[0], loss(*given)[1])]
    numeric = oracle.numeric_gradient(lambda: loss(*given)[0], values[0])
    np.testing.assert_allclose(values[1], numeric, rtol=0, atol=1e-11)


@PER
@pytest.mark.parametrize("ignored", [-100, 2])
def test_ignored_steps_count_for_no_sequence(per, ignored):
    y, target = problem(CrossEntropy, (2,), ignored=ignored)
    loss = CrossEntropy(ignored, per)
    value, dy = loss(*given_as("ragged", y, target, per))
    want, slopes = of_sequences(CrossEntropy, y, target, per, ignored)
    assert value == pytest.approx(want, rel=1e-13)
    np.testing.assert_allclose(dy.values, np.concatenate(slopes), rtol=0, atol=1e-15)
    assert (dy[3] == 0).all()
    y[3][...] = np.nan
    if per != "last":
        assert loss(*given_as("ragged", y, target, per))[0] == value


@KINDS
@PER
def test_a_nan_among_the_steps_is_seen(kind, per):
    y, target = problem(kind)
    y[2][-1, 3] = np.nan
    for form in ("ragged", "padded"):
        value, dy = kind(per=per)(*given_as(form, y, target, per))
        assert np.isnan(value)
        dy = dy.values if isinstance(dy, Ragged) else dy
        assert np.isnan(dy).any()
        assert np.isfinite(dy).mean() > 0.7


@KINDS
@PER
@DTYPES
def test_where_no_step_is_there_the_loss_is_zero(kind, per, dtype):
    for rest in ((), (2,)):
        nothing, target = problem(kind, rest, [0, 0, 0, 0], dtype)
        loss = kind(per=per)
        for form in ("ragged", "padded"):
            given = given_as(form, nothing, target, per)
            if per == "last" and kind is not CrossEntropy:
                given = (given[0], given[1].astype(dtype), *given[2:])
            value, dy = loss(*given)
            assert value == 0.0
            assert dy.dtype == dtype
            values = [x.values if isinstance(x, Ragged) else x for x in (dy, given[0])]
            assert values[0].shape == values[1].shape
            assert not values[0].any()
            assert loss.items(given[1], *([0] * 4,) if per == "last" else given[2:]) == 0


@PER
def test_items_are_what_the_mean_is_taken_over(per):
    for rest in ((), (2,)):
        for kind in (CrossEntropy, MSE):
            y, target = problem(kind, rest)
            loss = kind(per=per)
            elements = [sum(of_step(kind, *pair)[0].size for pair in zip(*both)) for both in zip(y, target)]
            want = {
                "step": sum(elements),
                "sequence": sum(n > 0 for n in elements),
                "last": sum(of_step(kind, a[-1], b[-1])[0].size for a, b in zip(y, target) if len(a)),
            }[per]
            for form in ("ragged", "padded", "padded, batch first"):
                _, target_of_form, *_ = given_as(form, y, target, per)
                lengths = None if form == "ragged" and per != "last" else LENGTHS
                items = kind(per=per, batch_first="batch first" in form).items(target_of_form, lengths)
                assert items == want
                assert isinstance(items, int)
            plain = [target[2][:3], target[2][3:]]
            counts = [
                sum(of_step(kind, a, b)[0].size for a, b in zip(y[2][t : t + 3], one)) for t, one in zip((0, 3), plain)
            ]
            for batch_first in (False, True):
                loss = kind(per=per, batch_first=batch_first)
                stacked = np.stack(plain, axis=int(not batch_first))
                if per == "last":
                    assert loss.items(last_of(plain)) == sum(
                        of_step(kind, y[2][t], target[2][t])[0].size for t in (2, 5)
                    )
                else:
                    assert loss.items(stacked) == (sum(counts) if per == "step" else 2)


def test_the_weights_of_batches_make_the_mean_of_all_sequences():
    for kind in (CrossEntropy, MSE, MAE, BCEWithLogits):
        for per in ("step", "sequence", "last"):
            y, target = problem(kind)
            loss = kind(per=per)
            parts = [given_as("ragged", y[some], target[some], per) for some in (slice(0, 2), slice(2, 5))]
            found = [
                (loss(*part)[0], loss.items(part[1], part[0].lengths if per == "last" else None)) for part in parts
            ]
            whole = loss(*given_as("ragged", y, target, per))[0]
            assert sum(v * n for v, n in found) / sum(n for _, n in found) == pytest.approx(whole, rel=1e-14)


Y = np.ones((4, 3, 2))
RAGGED, OTHER = Ragged(np.ones((4, 2)), [0, 1, 4]), Ragged(np.ones((4, 2)), [0, 2, 4])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Y, Y, [1, 2]), {}, ValueError, r"lengths: expected \(3,\), one for each row, got \(2,\)"),
        ((Y, Y, [1, 2]), {"batch_first": True}, ValueError, r"lengths: expected \(4,\), one for each row, got \(2,\)"),
        ((Y, Y, [1, 2, 5]), {}, ValueError, "lengths: expected numbers from 0 to 4, got 1 to 5"),
        ((Y, Y, [1.0, 2.0, 3.0]), {}, TypeError, "lengths: expected integers, got float64"),
        ((Y[0, 0], Y[0, 0], [1]), {}, ValueError, r"y: expected \(T, B, ...\), got \(2,\)"),
        ((Y[0, 0], Y[0, 0]), {"per": "sequence", "batch_first": True}, ValueError, r"y: expected \(B, T, ...\), got"),
        ((Y, Y[:3], [1, 2, 3]), {}, ValueError, r"target: expected \(4, 3\) at the beginning, got \(3, 3, 2\)"),
        ((Y, Y[..., :1], [1, 2, 3]), {}, ValueError, r"target: expected \(6, 2\), got \(6, 1\)"),
        ((Y, RAGGED, [1, 2, 3]), {}, TypeError, r"target: expected an array \(4, 3\), like y, got a Ragged"),
        ((Y, RAGGED), {}, TypeError, "target: expected an array .*, got a Ragged"),
        (
            (Y, Y),
            {"per": "last"},
            ValueError,
            r"target: expected an array \(3, ...\), one for each .*, got \(4, 3, 2\)",
        ),
        ((Y, np.array(1.0)), {"per": "last"}, ValueError, r"target: expected an array \(3, ...\), .*, got \(\)"),
        ((RAGGED, RAGGED), {"per": "last"}, ValueError, r"target: expected an array \(2, ...\), .*, got Ragged"),
        ((RAGGED, OTHER), {}, ValueError, r"target: expected the lengths \[1 3\], got \[2 2\]"),
        ((RAGGED, RAGGED.values), {}, TypeError, "target: expected a Ragged, got ndarray"),
        ((RAGGED, RAGGED, [1, 3]), {}, ValueError, "lengths: expected None beside a Ragged, which has its own"),
        ((Ragged(np.ones(4, int), [0, 4]), RAGGED), {}, TypeError, "y: expected float32 or float64 values, got int64"),
    ],
)
def test_losses_of_sequences_say_what_is_wrong(arguments, options, error, message):
    with pytest.raises(error, match=message):
        MSE(**options)(*arguments)


@KINDS
def test_per_is_one_of_three(kind):
    for per in ("batch", None, 1):
        with pytest.raises(ValueError, match=f"per: expected one of step, sequence, last, got {per!r}"):
            kind(per=per)


# ------------------------------------------------------------------ all losses


def difference(loss, y, target, direction, step=1e-5):
    """The slope of the loss along a direction, to fourth order in the step."""
    f = [loss(y + n * step * direction, target)[0] for n in (-2, -1, 1, 2)]
    return (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * step)


@pytest.mark.parametrize("loss", [CrossEntropy(), CrossEntropy(2), MSE(), MAE(), BCEWithLogits()], ids=repr)
def test_gradients_agree_with_finite_differences(loss):
    y, target = pair((4, 3, 5))
    if isinstance(loss, CrossEntropy):
        target = classes((4, 3), 5)
    _, dy = loss(y, target)
    for index in np.ndindex(y.shape):
        direction = np.zeros_like(y)
        direction[index] = 1.0
        assert dy[index] == pytest.approx(difference(loss, y, target, direction), rel=1e-7, abs=1e-10)


@pytest.mark.parametrize(
    "loss",
    [
        *(CrossEntropy(7), MSE(), MAE(), BCEWithLogits()),
        *(CrossEntropy(7, "sequence", True), MSE("last"), MAE("sequence", True), BCEWithLogits("last", True)),
    ],
    ids=repr,
)
def test_a_loss_is_built_again_from_its_config(loss):
    again = from_config(json.loads(json.dumps(loss.config())))
    assert (again.per, again.batch_first) == (loss.per, loss.batch_first)
    assert type(again) is type(loss)
    assert again.config() == loss.config()


@pytest.mark.parametrize("config", [None, {}, {"name": "os.system"}, {"name": "MSE", "x": 1}, {"name": "CrossEntropy"}])
def test_a_config_of_something_else_is_refused(config):
    with pytest.raises(ValueError, match="config: "):
        from_config(config)
