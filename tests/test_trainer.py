"""The trainer: its updates, its epochs, its ends; callbacks and history."""

import io
import json
import math
import os
import signal
import threading
import time

import numpy as np
import pytest

import nbrnn
from nbrnn.layers.module import Module, Parameters
from nbrnn.training.callbacks import Callback, Checkpointing, EarlyStopping, ProgressBar
from nbrnn.training.losses import MSE, CrossEntropy
from nbrnn.training.optimizers import SGD, Adam
from nbrnn.training.schedules import OnPlateau, Step
from nbrnn.training.trainer import Trainer, TrainingError


class Tiny(Module):
    """A small Elman network with dropout, in NumPy: h' = tanh(W x + U h), y = V (mask h')."""

    def __init__(self, inputs=3, hidden=4, outputs=5, dropout=0.0, seed=0, dtype="float64"):
        self.dtype, self.dropout = np.dtype(dtype), dropout
        self.sizes, self.rng = (inputs, hidden, outputs), np.random.default_rng(seed)
        shapes = {"W": (hidden, inputs), "U": (hidden, hidden), "V": (outputs, hidden)}
        self.params = Parameters.zeros(shapes, self.dtype)
        self.params.flat[:] = np.random.default_rng(seed).standard_normal(self.params.flat.size) * 0.5

    def config(self):
        return {"sizes": self.sizes, "dropout": self.dropout}  # a tuple on purpose: JSON makes a list of it

    def generators(self):
        return [self.rng]

    def _forward(self, x, state):
        W, U, _ = self.params.values()
        hs = [np.zeros((x.shape[1], len(U)), self.dtype) if state is None else state["h"][0]]
        for x_t in x:
            hs.append(np.tanh(x_t @ W.T + hs[-1] @ U.T))
        return hs, {"h": (hs[-1], None)}

    def __call__(self, x, state=None):
        hs, state_n = self._forward(x, state)
        return np.stack(hs[1:]) @ self.params["V"].T, state_n

    def vjp(self, x, state=None):
        hs, state_n = self._forward(x, state)
        h = np.stack(hs[1:])
        mask = ((self.rng.random(h.shape) >= self.dropout) / (1 - self.dropout)).astype(self.dtype)

        def pullback(dy, dstate_n=None, *, out=None):
            _, U, V = self.params.values()
            out["V"][...] = np.einsum("tbo,tbh->oh", dy, mask * h)
            out["W"][...], out["U"][...] = 0, 0
            dh = (dy @ V) * mask
            for t in range(len(x) - 1, -1, -1):
                da = dh[t] * (1 - h[t] ** 2)
                out["W"][...] += da.T @ x[t]
                out["U"][...] += da.T @ hs[t]
                if t:
                    dh[t - 1] += da @ U
            return None, None, out

        return (mask * h) @ self.params["V"].T, state_n, pullback


class Batches(list):
    """A list of batches that asks for the state to be carried."""

    carries_state = True


def batch(seed=0, steps=6, rows=2, outputs=5):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((steps, rows, 3)), rng.integers(0, outputs, (steps, rows))


def trainer(model=None, optimizer=None, loss=None, **arguments):
    return Trainer(model or Tiny(), loss or CrossEntropy(), optimizer or SGD(0.5), **arguments)


# ------------------------------------------------------------------ one update


def loss_of(model, x, target, state=None):
    return CrossEntropy()(model(x, state)[0], target)[0]


def test_a_step_goes_down_the_gradient_of_finite_differences():
    model, (x, target) = Tiny(), batch()
    before, numeric = model.params.flat.copy(), np.zeros(model.params.flat.size)
    for n in range(numeric.size):
        for sign in (-1, 1):
            model.params.flat[:] = before
            model.params.flat[n] += sign * 1e-5
            numeric[n] += sign * loss_of(model, x, target) / 2e-5
    model.params.flat[:] = before
    t = trainer(model)
    value, state = t.step(x, target)
    assert value == pytest.approx(CrossEntropy()(Tiny()(x)[0], target)[0], rel=1e-15)
    np.testing.assert_allclose(t.grads.flat, numeric, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(model.params.flat, before - 0.5 * numeric, rtol=1e-7, atol=1e-9)
    np.testing.assert_array_equal(state["h"][0], Tiny()(x)[1]["h"][0])
    assert t.steps == 1


def test_a_step_begins_from_the_state_it_is_given():
    x, target = batch()
    state = {"h": (np.full((2, 4), 0.7), None)}
    assert trainer().step(x, target, state)[0] == pytest.approx(loss_of(Tiny(), x, target, state), rel=1e-15)


def test_the_norm_is_clipped_only_above_the_limit():
    x, target = batch()
    plain = trainer()
    plain.step(x, target)
    norm = np.linalg.norm(plain.grads.flat)
    for limit, factor in [(norm * 2, 1.0), (norm / 2, 0.5)]:
        clipped = trainer(clip_norm=limit)
        clipped.step(x, target)
        want = Tiny().params.flat - 0.5 * factor * plain.grads.flat
        np.testing.assert_allclose(clipped.model.params.flat, want, rtol=1e-13)


def test_values_are_clipped_before_the_norm():
    x, target = batch()
    plain = trainer()
    plain.step(x, target)
    cut = np.clip(plain.grads.flat, -0.01, 0.01)
    assert (cut != plain.grads.flat).any()
    for limits, factor in [({}, 1.0), ({"clip_norm": np.linalg.norm(cut) / 4}, 0.25)]:
        clipped = trainer(clip_value=0.01, **limits)
        clipped.step(x, target)
        np.testing.assert_allclose(clipped.model.params.flat, Tiny().params.flat - 0.5 * factor * cut, rtol=1e-13)


def test_the_schedule_sets_the_rate_before_each_update():
    t, rates = trainer(schedule=Step(2, 0.1)), []
    for n in range(5):
        t.step(*batch(n))
        rates.append(t.optimizer.lr)
    assert rates == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005])


def test_without_a_schedule_the_rate_is_left_alone():
    t = trainer()
    t.optimizer.lr = 0.0
    t.step(*batch())
    assert (t.model.params.flat == Tiny().params.flat).all()


def test_a_function_can_be_the_loss():
    def halves(y, target):
        return float(((y - target) ** 2).sum() / 2), y - target

    x, target = batch()[0], np.zeros((6, 2, 5))
    t = trainer(loss=halves)
    history = t.fit([(x, target)])
    assert history.records[0]["loss"] == pytest.approx(30 * MSE()(Tiny()(x)[0], target)[0], rel=1e-13)
    assert t.config()["loss"] == {"name": "halves"}


# ------------------------------------------------------------------ NaN and infinity


def test_a_loss_that_is_not_finite_stops_before_anything_changes():
    t, (x, target) = trainer(optimizer=Adam()), batch()
    t.step(x, target)
    before, moments = t.model.params.flat.copy(), t.optimizer.state_dict()
    x[3, 1, 0] = np.nan
    with pytest.raises(TrainingError, match="step 2: the loss is nan; the parameters are those before this step"):
        t.step(x, target)
    assert isinstance(TrainingError("x"), ArithmeticError)
    assert (t.model.params.flat == before).all()
    assert all(np.array_equal(value, moments[name]) for name, value in t.optimizer.state_dict().items())
    assert t.steps == 1


@pytest.mark.parametrize("name", ["W", "U", "V"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_is_named(name, bad):
    class Broken(Tiny):
        def vjp(self, x, state=None):
            y, state_n, pullback = super().vjp(x, state)

            def broken(dy, out):
                found = pullback(dy, out=out)
                out[name].flat[-1] = bad
                return found

            return y, state_n, broken

    for limits in ({}, {"clip_value": 1.0}, {"clip_norm": 1.0}):
        t = trainer(Broken(), **limits)
        with pytest.raises(TrainingError, match=f"step 1: the gradient of {name} holds {bad}"):
            t.step(*batch())
        assert (t.model.params.flat == Tiny().params.flat).all()


def test_huge_finite_gradients_are_clipped():
    def steep(y, target):
        return 1.0, np.full_like(y, 1e30)

    t = trainer(Tiny(dtype="float32"), SGD(1.0), steep, clip_norm=1.0)
    t.step(batch()[0].astype("float32"), batch()[1])
    moved = t.model.params.flat.astype(float) - Tiny(dtype="float32").params.flat
    assert np.linalg.norm(moved) == pytest.approx(1.0, rel=1e-5)


def test_a_validation_loss_that_is_not_finite_stops_the_training():
    x, target = batch()
    with pytest.raises(TrainingError, match="step 1: the validation loss is nan"):
        trainer().fit([batch()], validation=[(x * np.nan, target)])


# ------------------------------------------------------------------ epochs


def test_fit_is_steps_in_order_with_or_without_the_state_carried():
    data = [batch(n) for n in range(3)]
    for batches in (data, Batches(data)):
        fitted, stepped = trainer(), trainer()
        fitted.fit(batches, epochs=2)
        for _ in range(2):
            state = None
            for x, target in data:
                _, state = stepped.step(x, target, state)
                state = state if isinstance(batches, Batches) else None
        assert fitted.model.params.flat.tobytes() == stepped.model.params.flat.tobytes()
        assert (fitted.steps, fitted.epoch) == (6, 2)


def test_records_weigh_batches_by_their_items():
    first, second = batch(0), batch(1, steps=3)
    second[1][0] = -100
    t = trainer(optimizer=SGD(0.0))
    history = t.fit([first, second], epochs=2, validation=[second, first])
    losses = [loss_of(Tiny(), *b) for b in (first, second)]
    mean = (12 * losses[0] + 4 * losses[1]) / 16
    for n, record in enumerate(history.records):
        assert record["loss"] == pytest.approx(mean, rel=1e-14)
        assert record["validation_loss"] == pytest.approx(mean, rel=1e-14)
        assert (record["epoch"], record["step"], record["lr"]) == (n + 1, 2 * n + 2, 0.0)
        assert record["items_per_second"] == pytest.approx(16 / record["seconds"])
    assert history.to_dict()["epoch"] == [1, 2]
    assert json.loads(json.dumps(history.records)) == history.records


def test_evaluation_is_inference_and_carries_the_state():
    t = trainer(Tiny(dropout=0.5))
    before = t.model.params.flat.copy(), t.model.rng.bit_generator.state
    data = [batch(n) for n in range(3)]
    state, losses = None, []
    for x, target in data:
        y, state = t.model(x, state)
        losses.append(CrossEntropy()(y, target)[0])
    assert t.evaluate(Batches(data)) == pytest.approx(np.mean(losses), rel=1e-14)
    assert t.evaluate(data) == pytest.approx(np.mean([loss_of(t.model, *b) for b in data]), rel=1e-14)
    assert (t.model.params.flat == before[0]).all()
    assert t.model.rng.bit_generator.state == before[1]
    assert t.steps == 0
    assert math.isnan(t.evaluate([(data[0][0] * np.nan, data[0][1])]))


def test_two_trainings_with_the_same_seed_are_the_same():
    runs = [trainer(Tiny(dropout=0.3), Adam()) for _ in range(2)]
    for t in runs:
        t.fit([batch(n) for n in range(4)], epochs=2)
    assert runs[0].model.params.flat.tobytes() == runs[1].model.params.flat.tobytes()


def test_fit_says_what_is_wrong():
    for batches in ([], iter([])):
        with pytest.raises(ValueError, match="batches: expected at least one batch an epoch"):
            trainer().fit(batches)
    with pytest.raises(ValueError, match="iterated only once"):
        trainer().fit(iter([batch()]), epochs=2)
    with pytest.raises(ValueError, match="batches: expected at least one"):
        trainer().evaluate([])
    with pytest.raises(ValueError, match="epochs: expected at least 0, got -1"):
        trainer().fit([batch()], epochs=-1)
    with pytest.raises(TypeError, match=r"epochs: expected an integer, got 1\.5"):
        trainer().fit([batch()], epochs=1.5)
    assert trainer().fit([batch()], epochs=0).records == []


def test_a_trainer_says_what_is_wrong():
    model, loss, optimizer = Tiny(), MSE(), SGD(0.1)
    for arguments, error, message in [
        ((None, loss, optimizer), TypeError, "model: expected Module, got None"),
        ((model, "mse", optimizer), TypeError, "loss: expected a function"),
        ((model, loss, 0.1), TypeError, "optimizer: expected Optimizer, got 0.1"),
        ((model, loss, optimizer, 0), ValueError, "clip_norm: expected a number above 0, got 0"),
        ((model, loss, optimizer, None, -1), ValueError, "clip_value: expected"),
        ((model, loss, optimizer, None, None, 0.5), TypeError, "schedule: expected a schedule or None, got 0.5"),
    ]:
        with pytest.raises(error, match=message):
            Trainer(*arguments)


# ------------------------------------------------------------------ ends


class Do(Callback):
    """Do something after a certain step, and write down what happens."""

    def __init__(self, step=None, action=None):
        self.step, self.action, self.seen = step, action, []

    def on_train_begin(self, trainer):
        self.seen.append("begin")

    def on_step(self, trainer, loss):
        self.seen.append(trainer.steps)
        if trainer.steps == self.step:
            self.action(trainer)

    def on_epoch_end(self, trainer, record):
        self.seen.append(f"epoch {record['epoch']}")

    def on_interrupt(self, trainer):
        self.seen.append("interrupt")

    def on_train_end(self, trainer):
        self.seen.append("end")


def press_ctrl_c(trainer):
    os.kill(os.getpid(), signal.SIGINT)


def stop(trainer):
    trainer.stop = True


def test_callbacks_hear_everything_in_order():
    listener = Do()
    trainer().fit([batch(0), batch(1)], epochs=2, callbacks=[listener])
    assert listener.seen == ["begin", 1, 2, "epoch 1", 3, 4, "epoch 2", "end"]


def test_ctrl_c_ends_after_the_step():
    before, listener = signal.getsignal(signal.SIGINT), Do(3, press_ctrl_c)
    t = trainer()
    history = t.fit([batch(n) for n in range(4)], epochs=5, callbacks=[listener])
    assert history.interrupted
    assert listener.seen == ["begin", 1, 2, 3, "interrupt", "end"]
    assert signal.getsignal(signal.SIGINT) is before
    assert not t.fit([batch(n) for n in range(4)], epochs=1).interrupted
    assert (t.steps, t.epoch) == (4, 1)


def test_a_second_ctrl_c_ends_at_once():
    def twice(trainer):
        press_ctrl_c(trainer)
        press_ctrl_c(trainer)

    before, listener = signal.getsignal(signal.SIGINT), Do(2, twice)
    with pytest.raises(KeyboardInterrupt):
        trainer().fit([batch()], epochs=5, callbacks=[listener])
    assert listener.seen[-2:] == [2, "end"]
    assert signal.getsignal(signal.SIGINT) is before


def test_the_handler_is_given_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingError):
        trainer().fit([(batch()[0] * np.nan, batch()[1])])
    assert signal.getsignal(signal.SIGINT) is before


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        history = trainer().fit([batch()], epochs=3, callbacks=[Do(2, press_ctrl_c)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert not history.interrupted
    assert len(history.records) == 3


def test_fit_works_in_another_thread():
    t = trainer()
    thread = threading.Thread(target=t.fit, args=([batch()],))
    thread.start()
    thread.join()
    assert t.epoch == 1


@pytest.mark.parametrize("action", [press_ctrl_c, stop])
@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_an_epoch_that_was_left_is_completed_by_the_next_fit(action, step):
    whole, parted = (trainer(Tiny(dropout=0.4), Adam(), schedule=OnPlateau(0.5, 0)) for _ in range(2))
    data = Batches(batch(n) for n in range(3))
    whole.fit(data, epochs=3)
    parted.fit(data, epochs=3, callbacks=[Do(step, action)])
    assert parted.steps == step
    parted.fit(data, epochs=3 - parted.epoch)
    assert parted.model.params.flat.tobytes() == whole.model.params.flat.tobytes()
    for ours, theirs in zip(parted.history.records, whole.history.records):
        assert {**ours, "seconds": 0, "items_per_second": 0} == {**theirs, "seconds": 0, "items_per_second": 0}


# ------------------------------------------------------------------ callbacks


class Scripted(Trainer):
    """A trainer whose validation losses are known beforehand."""

    def evaluate(self, batches):
        return batches[self.epoch]


@pytest.mark.parametrize(
    ("losses", "arguments", "epochs"),
    [
        ([5, 4, 3, 3, 3, 3], {"patience": 2}, 5),
        ([5, 4, 3, 3.5, 2, 3, 3, 1], {"patience": 2}, 7),
        ([5, 4.9, 4.8, 4.7, 4.6], {"patience": 2, "min_delta": 0.5}, 3),
        ([5, 4, 3, 2, 1], {"patience": 1}, 5),
        ([5, 5], {"patience": 1}, 2),
    ],
)
def test_early_stopping(losses, arguments, epochs):
    t = Scripted(Tiny(), CrossEntropy(), SGD(0.1))
    t.fit([batch()], epochs=len(losses), validation=losses, callbacks=[EarlyStopping(**arguments)])
    assert t.epoch == epochs


def test_early_stopping_goes_by_the_training_loss_where_there_is_no_other():
    t = trainer(optimizer=SGD(0.0))
    t.fit([batch()], epochs=9, callbacks=[EarlyStopping(3)])
    assert t.epoch == 4


def test_the_plateau_sees_the_validation_loss():
    t = Scripted(Tiny(), CrossEntropy(), SGD(0.8), schedule=OnPlateau(0.5, 1))
    t.fit([batch()], epochs=6, validation=[3, 2, 2, 2, 2, 2])
    assert [record["lr"] for record in t.history.records] == [0.8, 0.8, 0.8, 0.8, 0.4, 0.4]


def test_callback_arguments_are_checked(tmp_path):
    for build in (
        lambda: EarlyStopping(0),
        lambda: EarlyStopping(1, -0.1),
        lambda: Checkpointing(tmp_path / "x", every_epochs=0),
        lambda: Checkpointing(tmp_path / "x", every_steps=0),
    ):
        with pytest.raises(ValueError, match=": expected"):
            build()


def test_without_a_terminal_there_is_one_line_an_epoch():
    stream = io.StringIO()
    data = [batch(n) for n in range(3)]
    t = trainer()
    t.fit(data, epochs=2, validation=data, callbacks=[ProgressBar(stream)])
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert all(len(line) <= 80 for line in lines)
    perplexity = math.exp(t.history.records[0]["loss"])
    assert lines[0].startswith(f"epoch 1: loss {t.history.records[0]['loss']:.4f}, perplexity {perplexity:.4g} (valid")
    assert lines[0].endswith("tokens/s")
    stream = io.StringIO()
    trainer(loss=MSE()).fit([(data[0][0], np.zeros((6, 2, 5)))], callbacks=[ProgressBar(stream)])
    assert "perplexity" not in stream.getvalue()
    assert stream.getvalue().endswith("items/s\n")


def test_on_a_terminal_there_is_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    pause = Do(3, lambda trainer: time.sleep(0.15))  # tqdm draws ten times a second
    trainer().fit([batch(n) for n in range(4)], epochs=2, callbacks=[pause, ProgressBar(stream)])
    drawn = next(line for line in stream.getvalue().split("\r") if line.startswith("epoch 1  75%|"))
    assert "perplexity" in drawn
    assert drawn.rstrip().endswith("tokens/s")
    assert len(drawn) <= 80
    stream = Terminal()
    trainer().fit((batch(n) for n in range(3)), callbacks=[ProgressBar(stream)])  # of unknown length
    assert "epoch 1: loss" in stream.getvalue()


def test_tqdm_is_imported_only_for_a_bar(python):
    python("import sys, nbrnn.training.trainer; assert 'tqdm' not in sys.modules")


# ------------------------------------------------------------------ with real layers


def test_a_network_learns_to_count():
    # Each token is the one before plus one, modulo 7: a task of pure memory for one step.
    model = nbrnn.Sequential(nbrnn.Embedding(7, 8, seed=1), nbrnn.LSTM(8, 16, seed=2), nbrnn.Linear(16, 7, seed=3))
    starts = np.random.default_rng(4).integers(0, 7, (20, 8))
    tokens = (starts[:, None] + np.arange(11)[:, None]) % 7
    data = [(t[:-1], t[1:]) for t in tokens]
    t = Trainer(model, CrossEntropy(), Adam(0.02), clip_norm=1.0)
    history = t.fit(data, epochs=6)
    assert history.records[0]["loss"] > 0.5
    assert history.records[-1]["loss"] < 0.05
    assert t.evaluate(data) < 0.05
