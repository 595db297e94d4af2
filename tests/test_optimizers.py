"""Optimizers against the papers' equations and torch; clipping; state and errors."""

import numpy as np
import pytest

from nbrnn.kernels.jit import get_num_threads, set_num_threads
from nbrnn.training.clipping import clip_by_value, global_norm
from nbrnn.training.optimizers import SGD, Adagrad, Adam, AdamW, RMSprop, from_config

# ------------------------------------------------------------------ the equations, in plain NumPy


def sgd(p, gradients, lr, momentum=0.0, nesterov=False, weight_decay=0.0):
    """Polyak's momentum, and Nesterov's in the form of Sutskever et al. (2013), rewritten as in torch's manual."""
    b = np.zeros_like(p)
    for g in gradients:
        g = g + weight_decay * p
        b = momentum * b + g
        p = p - lr * (g + momentum * b if nesterov else b)
    return p


def adam(p, gradients, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=False):
    """Kingma and Ba (2015), algorithm 1; Loshchilov and Hutter (2019), algorithm 2."""
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(gradients, start=1):
        if decoupled:
            p = p - lr * weight_decay * p
        else:
            g = g + weight_decay * p
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        p = p - lr * m_hat / (np.sqrt(v_hat) + eps)
    return p


def adamw(p, gradients, weight_decay=0.01, **arguments):
    return adam(p, gradients, weight_decay=weight_decay, decoupled=True, **arguments)


def rmsprop(p, gradients, lr=1e-2, alpha=0.99, eps=1e-8):
    """Hinton (2012), lecture 6e."""
    v = np.zeros_like(p)
    for g in gradients:
        v = alpha * v + (1 - alpha) * g**2
        p = p - lr * g / (np.sqrt(v) + eps)
    return p


def adagrad(p, gradients, lr=1e-2, eps=1e-10):
    """Duchi, Hazan and Singer (2011)."""
    v = np.zeros_like(p)
    for g in gradients:
        v = v + g**2
        p = p - lr * g / (np.sqrt(v) + eps)
    return p


CASES = [
    (SGD, sgd, {"lr": 0.1}),
    (SGD, sgd, {"lr": 0.1, "weight_decay": 0.05}),
    (SGD, sgd, {"lr": 0.1, "momentum": 0.9}),
    (SGD, sgd, {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.05}),
    (SGD, sgd, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
    (Adam, adam, {}),
    (Adam, adam, {"lr": 0.02, "betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    (AdamW, adamw, {}),
    (AdamW, adamw, {"lr": 0.02, "betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.5}),
    (RMSprop, rmsprop, {}),
    (RMSprop, rmsprop, {"lr": 0.1, "alpha": 0.8, "eps": 1e-3}),
    (Adagrad, adagrad, {}),
    (Adagrad, adagrad, {"lr": 0.1, "eps": 1e-2}),
]
EACH = pytest.mark.parametrize(("kind", "equations", "arguments"), CASES, ids=lambda x: getattr(x, "__name__", None))
STEPS = 7


def problem(size=37, dtype="float64"):
    rng = np.random.default_rng(3)
    return rng.standard_normal(size).astype(dtype), rng.standard_normal((STEPS, size)).astype(dtype)


@EACH
@pytest.mark.parametrize("size", [1, 7, 8, 37])
def test_updates_follow_the_papers(kind, equations, arguments, size):
    start, gradients = problem(size)
    p, optimizer = start.copy(), kind(**arguments)
    for g in gradients:
        given = g.copy()
        optimizer.step(p, given)
        assert (given == g).all()
    assert optimizer.steps == STEPS
    np.testing.assert_allclose(p, equations(start, gradients, **arguments), rtol=1e-12, atol=1e-13)


@EACH
def test_updates_agree_with_torch(kind, equations, arguments):
    torch = pytest.importorskip("torch")
    p, gradients = problem()
    leaf = torch.tensor(p.copy(), requires_grad=True)
    ours, theirs = kind(**arguments), getattr(torch.optim, kind.__name__)([leaf], **arguments)
    for g in gradients:
        ours.step(p, g)
        leaf.grad = torch.tensor(g)
        theirs.step()
        np.testing.assert_allclose(p, leaf.detach().numpy(), rtol=1e-12, atol=1e-13)


@EACH
def test_float32_is_as_good_as_float32_can_be(kind, equations, arguments):
    start, gradients = problem(dtype="float32")
    p, optimizer = start.copy(), kind(**arguments)
    for g in gradients:
        optimizer.step(p, g)
    want = equations(start.astype("f8"), gradients.astype("f8"), **arguments)
    assert p.dtype == np.float32
    np.testing.assert_allclose(p, want, rtol=1e-5, atol=1e-6)


@EACH
def test_the_scale_multiplies_the_gradients(kind, equations, arguments):
    start, gradients = problem()
    p, optimizer = start.copy(), kind(**arguments)
    for g in gradients:
        optimizer.step(p, g * 8.0, scale=0.125)
    np.testing.assert_allclose(p, equations(start, gradients, **arguments), rtol=1e-12, atol=1e-13)


@EACH
def test_the_learning_rate_is_set_between_steps(kind, equations, arguments):
    start, gradients = problem()
    arguments = arguments | {"lr": 0.05}
    p, optimizer = start.copy(), kind(**arguments | {"lr": 123.0})
    optimizer.lr = 0.05
    optimizer.step(p, gradients[0])
    np.testing.assert_allclose(p, equations(start, gradients[:1], **arguments), rtol=1e-12, atol=1e-13)


@EACH
def test_each_call_takes_its_own_vectors(kind, equations, arguments):
    start, gradients = problem()
    p, q, kept = start.copy(), start.copy(), gradients[0].copy()
    optimizer = kind(**arguments)
    optimizer.step(p, kept)
    kept[...] = gradients[1]  # the same vector with other numbers,
    optimizer.step(p, kept)
    optimizer.step(p, gradients[2])  # another one,
    q[...] = p
    optimizer.step(q, gradients[3])  # and parameters elsewhere
    np.testing.assert_allclose(p, equations(start, gradients[:3], **arguments), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(q, equations(start, gradients[:4], **arguments), rtol=1e-12, atol=1e-13)


@EACH
def test_a_loaded_state_continues_with_the_same_bits(kind, equations, arguments):
    p, gradients = problem()
    optimizer, again = kind(**arguments), kind(**arguments | {"lr": 9.0})
    for g in gradients[:3]:
        optimizer.step(p, g)
    q = p.copy()
    again.load_state_dict(optimizer.state_dict())
    for g in gradients[3:]:
        optimizer.step(p, g)
        again.step(q, g)
    assert p.tobytes() == q.tobytes()
    assert again.steps == STEPS


@EACH
def test_an_optimizer_is_built_again_from_its_config(kind, equations, arguments):
    optimizer = kind(**arguments)
    again = from_config(optimizer.config())
    assert type(again) is kind
    assert again.config() == optimizer.config()
    assert repr(again) == repr(optimizer)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("optimizer", [SGD(0.1), SGD(0.1, 0.9), Adam(0.1)], ids=repr)
def test_the_bits_do_not_depend_on_threads(optimizer, dtype):
    size = 3 * (1 << 16) + 5
    start, gradient = (np.random.default_rng(n).standard_normal(size).astype(dtype) for n in (1, 2))
    results = []
    for threads in range(1, get_num_threads() + 1):
        set_num_threads(threads)
        p, fresh = start.copy(), from_config(optimizer.config())
        for _ in range(2):
            fresh.step(p, gradient, 0.3)
        results.append((p.tobytes(), global_norm(p)))
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SGD(-0.1), "lr: expected a finite number from 0 on, got -0.1"),
        (lambda: SGD(np.nan), "lr: expected a finite number"),
        (lambda: SGD(np.inf), "lr: expected a finite number"),
        (lambda: SGD(0.1, momentum=1.0), r"momentum: expected a number in \[0, 1\), got 1.0"),
        (lambda: SGD(0.1, nesterov=True), "nesterov: expected a momentum above 0"),
        (lambda: Adam(betas=(0.9, 1.0)), r"betas: expected a number in \[0, 1\), got 1.0"),
        (lambda: Adam(betas=0.9), "betas: expected two numbers, got 0.9"),
        (lambda: Adam(eps=-1e-8), "eps: expected a finite number"),
        (lambda: AdamW(weight_decay=-1), "weight_decay: expected"),
        (lambda: RMSprop(alpha=2), "alpha: expected"),
        (lambda: Adagrad(eps=np.nan), "eps: expected"),
    ],
)
def test_arguments_out_of_range_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("lr", ["0.1", None, [0.1]])
def test_a_learning_rate_is_a_number(lr):
    with pytest.raises((TypeError, ValueError), match="lr: expected"):
        SGD(lr)


def test_vectors_that_do_not_fit_are_named():
    p, optimizer = np.zeros(4), Adam()
    for params, grads, error, message in [
        (p.tolist(), p, TypeError, "flat_params: expected a vector of float32 or float64, got list"),
        (p.astype(int), p, TypeError, "flat_params: .* got int64"),
        (p.reshape(2, 2), p, ValueError, r"flat_params: expected a contiguous vector, got shape \(2, 2\)"),
        (np.zeros(8)[::2], p, ValueError, "flat_params: expected a contiguous vector"),
        (p, np.zeros(5), ValueError, "flat_grads: expected 4 values of float64 like the parameters, got 5"),
        (p, np.zeros(4, "f4"), ValueError, "flat_grads: expected 4 values of float64 .*, got 4 of float32"),
    ]:
        with pytest.raises(error, match=message):
            optimizer.step(params, grads)
    optimizer.step(p, np.ones(4))
    with pytest.raises(ValueError, match="expected the 4 of float64 of the steps before, got 5 of float64"):
        optimizer.step(np.zeros(5), np.zeros(5))
    assert optimizer.steps == 1


@pytest.mark.parametrize(
    "change",
    [
        {"steps": -1},
        {"steps": 1.5},
        {"steps": 0},
        {"lr": "fast"},
        {"extra": np.zeros(4)},
        {"exp_avg": None},
        {"exp_avg": np.zeros(5)},
        {"exp_avg": np.zeros(4, "f4")},
        {"exp_avg": np.zeros((2, 2))},
        {"exp_avg": np.array([0, np.nan, 0, 0])},
        {"exp_avg": np.zeros(4, int)},
    ],
    ids=str,
)
def test_a_state_that_does_not_fit_changes_nothing(change):
    optimizer = Adam()
    optimizer.step(np.ones(4), np.ones(4))
    before = optimizer.state_dict()
    with pytest.raises((ValueError, TypeError)):
        optimizer.load_state_dict(before | change)
    after = optimizer.state_dict()
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_a_state_is_a_copy():
    optimizer = Adam()
    optimizer.step(np.ones(4), np.ones(4))
    state = optimizer.state_dict()
    state["exp_avg"][:] = 7.0
    assert (optimizer.state_dict()["exp_avg"] != 7.0).all()


# ------------------------------------------------------------------ clipping


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [0, 1, 3, 8, 16, 37, 16384, 16385, 100_003])
def test_the_norm_is_euclidean(size, dtype):
    flat = np.random.default_rng(size).standard_normal(size).astype(dtype)
    want = float(np.sqrt(np.sum(flat.astype(np.longdouble) ** 2)))
    assert global_norm(flat) == pytest.approx(want, rel=1e-14)


def test_the_norm_of_huge_numbers_does_not_overflow():
    assert global_norm(np.full(4, 3e38, "f4")) == pytest.approx(2 * float(np.float32(3e38)), rel=1e-15)
    assert global_norm(np.array([3e300, 4e300])) == pytest.approx(5e300, rel=1e-15)
    assert global_norm(np.full(16, 1.7e308)) == np.inf


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_norm_shows_what_is_not_finite(dtype, bad):
    for index in (0, 5, 36):
        flat = np.ones(37, dtype)
        flat[index] = bad
        assert not np.isfinite(global_norm(flat))


def test_clipping_by_value_leaves_nan():
    flat = np.array([-3.0, -1.0, 0.5, 2.0, np.nan])
    clip_by_value(flat, 1.0)
    np.testing.assert_array_equal(flat, [-1.0, -1.0, 0.5, 1.0, np.nan])
