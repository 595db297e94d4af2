"""Copies and pickles: they do the same, and share nothing with what they were made of."""

import copy
import pickle

import numpy as np
import pytest

import nbrnn
from nbrnn.training.losses import CrossEntropy
from nbrnn.training.optimizers import SGD, Adam


def copied(module):
    return copy.deepcopy(module)


def pickled(module):
    return pickle.loads(pickle.dumps(module))


HOW = pytest.mark.parametrize("how", [copied, pickled])


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("f4")


def inner():
    return nbrnn.Sequential(nbrnn.LSTM(4, 6, seed=2, zoneout=0.2), nbrnn.Linear(6, 4, seed=3))


COPIED = {
    "LSTM": lambda: nbrnn.LSTM(4, 6, 2, bidirectional=True, dropout=0.3, seed=1),
    "CTRNN": lambda: nbrnn.CTRNN(4, 6, seed=1, dt=0.3),
    "GRU with all that is drawn": lambda: nbrnn.GRU(4, 6, seed=1, recurrent_dropout=0.2, learn_state=True),
    "Linear": lambda: nbrnn.Linear(4, 6, seed=1),
    "nested": lambda: nbrnn.Sequential(
        inner(), nbrnn.Dropout(0.3, seed=4), nbrnn.LastStep(), nbrnn.Linear(4, 2, seed=5)
    ),
}


@HOW
@pytest.mark.parametrize("make", COPIED.values(), ids=COPIED)
def test_a_copy_does_the_same_and_has_all_of_its_own(make, how):
    module, x = make(), normal(5, 3, 4)
    y, _, pullback = module.vjp(x)  # the copy is made while there is prepared memory
    pullback(np.ones_like(y))
    before = module.params.flat.copy()
    other = how(module)
    assert other.config() == module.config()
    for one in (module, other):
        assert all(np.shares_memory(view, one.params.flat) for view in one.params.values())
    assert not np.shares_memory(other.params.flat, module.params.flat)
    # The same masks are drawn, and the same gradients found
    results = []
    for one in (module, other):
        y, _, pullback = one.vjp(x)
        dx, _, grads = pullback(np.ones_like(y))
        results.append((y.tobytes(), dx.tobytes(), grads.flat.tobytes(), one(x)[0].tobytes()))
    assert results[0] == results[1]
    # What changes the one leaves the other alone
    other.params.flat[:] *= 2.0
    assert (module.params.flat == before).all()
    assert module(x)[0].tobytes() == results[0][3]
    assert other(x)[0].tobytes() != results[0][3]


@HOW
def test_a_copy_of_a_frozen_module_is_frozen(how):
    module, x = inner().freeze(), normal(5, 3, 4)
    want = module(x)[0]
    other = how(module)
    for one in (other, *other.leaves()):
        with pytest.raises(ValueError, match="read-only"):
            next(iter(one.params.values()))[...] = 0.0
    assert (other(x)[0] == want).all()
    other.thaw()
    other.params.flat[:] = 0.0
    assert not other(x)[0].any()
    assert (module(x)[0] == want).all()


def test_a_pickle_holds_each_parameter_once():
    module = nbrnn.Sequential(nbrnn.Sequential(nbrnn.LSTM(20, 50, seed=1)), nbrnn.Linear(50, 20, seed=2))
    assert len(pickle.dumps(module)) < 1.2 * module.params.flat.nbytes


@HOW
def test_a_copied_trainer_goes_on_alike_and_alone(how):
    def batch():
        return rng.integers(0, 7, (2, 5, 3))

    rng = np.random.default_rng(1)
    model = nbrnn.Sequential(nbrnn.LSTM(7, 6, seed=2), nbrnn.Dropout(0.2, seed=4), nbrnn.Linear(6, 7, seed=3))
    trainer = nbrnn.Trainer(model, CrossEntropy(), Adam(0.1), clip_norm=0.5)
    trainer.step(*batch())
    other, x = how(trainer), batch()
    assert trainer.step(*x)[0] == other.step(*x)[0]
    assert (trainer.model.params.flat == other.model.params.flat).all()
    before = trainer.model.params.flat.copy()
    other.step(*batch())
    assert (trainer.model.params.flat == before).all()
    assert (other.model.params.flat != before).any()


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_a_copied_optimizer_leaves_the_vectors_of_the_first_alone(kind):
    optimizer, p, g = kind(0.1), np.ones(9), np.ones(9)
    optimizer.step(p, g)
    other, before, q = copy.deepcopy(optimizer), p.copy(), np.ones(9)
    other.step(q, g)
    assert (p == before).all()
    assert (q != 1.0).all()
    optimizer.step(p, g)
    assert (p != before).all()
    assert other.steps == 2
