"""Losses against SciPy's log-softmax, torch and finite differences; their edges, and what they refuse."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

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


@pytest.mark.parametrize("loss", [CrossEntropy(7), MSE(), MAE(), BCEWithLogits()], ids=repr)
def test_a_loss_is_built_again_from_its_config(loss):
    again = from_config(loss.config())
    assert type(again) is type(loss)
    assert again.config() == loss.config()


@pytest.mark.parametrize("config", [None, {}, {"name": "os.system"}, {"name": "MSE", "x": 1}, {"name": "CrossEntropy"}])
def test_a_config_of_something_else_is_refused(config):
    with pytest.raises(ValueError, match="config: "):
        from_config(config)
