"""Truncated BPTT, resets and lengths in training: against one pullback over the steps that gradients flow through."""

import tracemalloc
import weakref
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
from test_recurrent import everything_parallel, needs_threads

import nbrnn
from nbrnn.data import DocumentStream, Ragged, RaggedBatches, SeriesStream
from nbrnn.training import trainer as trainer_module
from nbrnn.training.callbacks import Callback
from nbrnn.training.checkpoint import load_checkpoint, save_checkpoint
from nbrnn.training.losses import MSE, CrossEntropy
from nbrnn.training.optimizers import SGD, Adam
from nbrnn.training.trainer import Trainer

K1 = 4


def network(seed=0, dropout=0.0, inputs=3, outputs=2, **options):
    layers = [nbrnn.LSTM(inputs, 5, seed=seed, dtype="float64", **options)]
    layers += [nbrnn.Dropout(dropout, seed=seed + 2, dtype="float64")] if dropout else []
    return nbrnn.Sequential(*layers, nbrnn.Linear(5, outputs, seed=seed + 1, dtype="float64"))


def series(*steps, rows=3, seed=0):
    """Batches of so many steps each, which continue each other."""
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((T, rows, 3)), rng.standard_normal((T, rows, 2))) for T in steps]


def trainer(model=None, optimizer=None, loss=None, **arguments):
    return Trainer(model or network(), loss or MSE(), optimizer or SGD(0.0), **arguments)


def gradients(model, x, dy, state=None):
    return model.vjp(x, state)[2](dy)[2].flat


def assert_close(left, right):
    assert oracle.relative_error(left, right) < 1e-12


class Batches(list):
    """A list of batches that continue each other."""

    carries_state = True


class Gather(Callback):
    """What is told after each step: the loss, and a function of the trainer."""

    def __init__(self, look=lambda trainer: None):
        self.look, self.losses, self.seen = look, [], []

    def on_step(self, trainer, loss):
        self.losses.append(loss)
        self.seen.append(self.look(trainer))


# ------------------------------------------------------------------ how far gradients flow back


@pytest.mark.parametrize("k2", [None, K1])
def test_without_history_a_batch_begins_from_a_state_that_is_a_constant(k2):
    t, model, state = trainer(k2=k2), network(), None
    for x, target in series(K1, K1, K1):
        y, after = model(x, state)
        value, dy = MSE()(y, target)
        given = t.state
        found, t.state = t.step(x, target, given)
        assert found == value
        assert t.grads.flat.tobytes() == gradients(model, x, dy, state).tobytes()
        state = after


@pytest.mark.parametrize("lr", [0.0, 0.3])
@pytest.mark.parametrize("k2", [K1, K1 + 3, 2 * K1, 2 * K1 + 1, 3 * K1, 4 * K1 - 1, 1000])
def test_gradients_flow_through_the_last_whole_batches_that_fit(k2, lr):
    data = series(K1, K1, K1, K1, 2, K1)
    t, model, states, state = trainer(k2=k2, optimizer=SGD(lr)), network(), {0: None}, None
    for n, (x, target) in enumerate(data):
        first = min(m for m in range(n + 1) if sum(len(x) for x, _ in data[m : n + 1]) <= k2)
        for m in range(first, n + 1):  # the states of now, from that before the first of them
            y, states[m + 1] = model(data[m][0], states[m])
        value, dlast = MSE()(y, target)
        xs = np.concatenate([x for x, _ in data[first : n + 1]])
        dy = np.concatenate([np.zeros((len(xs) - len(x), *dlast.shape[1:])), dlast])
        grads = gradients(model, xs, dy, states[first])
        found, state = t.step(x, target, state)
        assert found == pytest.approx(value, rel=1e-13)
        assert_close(t.grads.flat, grads)
        model.params.flat[:] -= lr * grads
    assert_close(t.model.params.flat, model.params.flat)


def test_with_all_history_it_is_full_bptt_of_the_last_loss():
    data = series(K1, K1, 3)
    t = trainer(k2=1000)
    t.fit(Batches(data))
    xs, model = np.concatenate([x for x, _ in data]), network()
    before = model.params.flat.copy()

    def loss():
        return MSE()(model(xs)[0][-3:], data[-1][1])[0]

    assert t.model.params.flat.tobytes() == before.tobytes()
    assert oracle.relative_error(t.grads.flat, oracle.numeric_gradient(loss, model.params.flat)) < 1e-8


@pytest.mark.parametrize("kind", ["batch first", "single", "single tokens"])
def test_steps_are_counted_where_time_is(kind):
    options = {"batch_first": kind == "batch first"} if kind == "batch first" else {"batch_first": True}
    layer = nbrnn.LSTM(3, 5, dtype="float64", seed=0, **options)
    x = {"batch first": np.ones((2, 6, 3)), "single": np.ones((6, 3)), "single tokens": np.ones(6, int)}[kind]
    target = np.zeros((*x.shape[:-1], 5) if x.dtype == float else (6, 5))
    assert trainer(layer, k2=6).step(x, target)[0] > 0
    with pytest.raises(ValueError, match="k2: expected at least k1, the 6 steps of a batch, got 5"):
        trainer(layer, k2=5).step(x, target)


def test_a_state_from_elsewhere_begins_a_new_history():
    (x0, t0), (x, target) = series(K1, K1)
    t, plain = trainer(k2=100), trainer()
    _, state = t.step(x0, t0)
    copy = tuple(part and tuple(array.copy() for array in part) for part in state)
    t.step(x, target, copy)
    plain.step(x, target, state)
    assert t.grads.flat.tobytes() == plain.grads.flat.tobytes()


def test_an_epoch_begins_a_new_history():
    data = Batches(series(K1, K1, K1))
    once, twice = trainer(k2=100), trainer(k2=100)
    once.fit(data)
    twice.fit(data, epochs=2)
    assert once.grads.flat.tobytes() == twice.grads.flat.tobytes()


# ------------------------------------------------------------------ resets


def test_no_gradient_flows_back_over_a_reset():
    data = series(K1, K1, K1)
    reset = np.array([[True] * 3, [False, True, False], [False, False, True]])
    model, t = network(), trainer(k2=100)
    gather = Gather(lambda t: t.grads.flat.copy())
    t.fit(Batches((x, target, None, now) for (x, target), now in zip(data, reset)), callbacks=[gather])
    # by row: the batch in which it began last
    for n, begins in [(1, [0, 1, 0]), (2, [0, 1, 2])]:
        total, value = 0, 0
        for row, begin in enumerate(begins):
            x = np.concatenate([data[m][0][:, [row]] for m in range(begin, n + 1)])
            one, dy = MSE()(model(x)[0][-K1:], data[n][1][:, [row]])
            total = total + gradients(model, x, np.concatenate([np.zeros((len(x) - K1, 1, 2)), dy])) / 3
            value += one / 3
        assert gather.losses[n] == pytest.approx(value, rel=1e-13)
        assert_close(gather.seen[n], total)


def test_a_reset_in_the_first_batch_changes_nothing():
    (x, target), *_ = series(K1)
    for k2 in (None, 100):
        plain, other = trainer(k2=k2), trainer(k2=k2)
        assert plain.step(x, target)[0] == other.step(x, target, reset=[True, False, True])[0]
        assert plain.grads.flat.tobytes() == other.grads.flat.tobytes()


# ------------------------------------------------------------------ documents

LENGTHS = [9, 1, 4, 0, 13, 2, 8, 5, 3]


def documents(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 3, n) for n in LENGTHS]


def of_each_document(model):
    """The sum of the losses of all steps, its gradient and the number of steps, of each document alone."""
    total, grads, count = 0.0, 0, 0
    for one in documents():
        if len(one) > 1:
            x, target, n = one[:-1, None], one[1:, None], len(one) - 1
            y, _, pullback = model.vjp(x)
            value, dy = CrossEntropy()(y, target)
            total, grads, count = total + n * value, grads + n * pullback(dy)[2].flat, count + n
    return total, grads, count


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_documents_in_a_stream_are_as_they_are_alone(rows, steps):
    stream = DocumentStream(documents(), None, rows, steps)
    model = network(outputs=3)
    total, grads, count = of_each_document(model)
    for per in ("step", "sequence"):
        t = trainer(model, loss=CrossEntropy(per=per), k2=100)
        gather = Gather(lambda t: t.grads.flat.copy())
        history = t.fit(stream, callbacks=[gather])
        if per == "step":
            items = [lengths.sum() for *_, lengths, _ in stream]
            assert history.records[0]["loss"] == pytest.approx(total / count, rel=1e-13)
            assert_close(sum(n * g for n, g in zip(items, gather.seen)), grads)
            assert t.evaluate(stream) == pytest.approx(total / count, rel=1e-13)


def test_rows_without_documents_weigh_nothing():
    t = trainer(network(outputs=3), loss=CrossEntropy(per="sequence"))
    wanted, count = 0.0, 0
    for x, target, lengths, _ in DocumentStream(documents(), None, 5, 50):
        for b in np.flatnonzero(lengths):
            n = lengths[b]
            wanted += CrossEntropy()(t.model(x[:n, [b]])[0], target[:n, [b]])[0]
            count += 1
    assert count == 7
    stream = DocumentStream(documents(), None, 5, 50)
    assert t.fit(stream).records[0]["loss"] == pytest.approx(wanted / count, rel=1e-13)
    assert t.evaluate(stream) == pytest.approx(wanted / count, rel=1e-13)


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize("k2", [None, K1, 2 * K1, 3 * K1 + 1])
def test_batches_are_forgotten_when_gradients_no_longer_reach_them(k2):
    alive = []

    class Watched:
        carries_state = True

        def __iter__(self):
            for seed in range(20):
                ((x, target),) = series(K1, seed=seed)
                alive.append(weakref.ref(x))
                yield x, target

    # beside those that are kept, the batch that the loop holds
    counting = Gather(lambda t: sum(ref() is not None for ref in alive))
    trainer(k2=k2).fit(Watched(), callbacks=[counting])
    kept = 1 if k2 is None else k2 // K1
    assert max(counting.seen) <= kept + 1
    assert counting.seen[-1] >= kept


def peak(batches, k2):
    data = [np.random.default_rng(0).standard_normal((20, 16, 3)) for _ in range(2)]
    t, state = trainer(k2=k2), None
    tracemalloc.start()
    try:
        for n in range(batches):
            _, state = t.step(data[n % 2], np.zeros((20, 16, 2)), state)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_grows_with_the_history_and_not_with_the_stream():
    peak(2, 40)  # compiles
    short, long, longer = peak(8, 40), peak(16, 160), peak(40, 160)
    assert longer < 1.05 * long
    assert 2.5 * short < long < 5 * short


# ------------------------------------------------------------------ left and resumed


def ragged_batches():
    rng = np.random.default_rng(0)
    found = Batches()
    for _ in range(7):
        lengths = rng.integers(0, K1 + 1, 3)
        lengths[0] = K1
        both = (Ragged(rng.standard_normal((sum(lengths), n)), np.append(0, np.cumsum(lengths))) for n in (3, 2))
        found.append(tuple(both))
    return found


def stream_of_documents():
    rng = np.random.default_rng(0)
    data = [rng.standard_normal((n, 3)) for n in LENGTHS]
    return DocumentStream(data, [one[:, :2].copy() for one in data], 2, K1, seed=1, shuffle=True)


def stream_of_a_series():
    x = np.random.default_rng(0).standard_normal((90, 3))
    return SeriesStream(x, x[:, :2].copy(), 3, K1)


FORMS = pytest.mark.parametrize("source", [stream_of_a_series, stream_of_documents, ragged_batches])


@FORMS
@pytest.mark.parametrize("k2", [None, 3 * K1 + 1])
@pytest.mark.parametrize("left", [1, 3, 5])
def test_a_training_with_history_is_resumed_with_the_same_bits(source, k2, left, tmp_path):
    def stop(t):
        t.stop = t.steps == left

    whole, parted = (trainer(network(dropout=0.3), Adam(0.02), k2=k2, clip_norm=1.0) for _ in range(2))
    whole.fit(source(), epochs=2)
    parted.fit(source(), epochs=2, callbacks=[Gather(stop)])
    assert parted.steps == left < whole.steps
    save_checkpoint(tmp_path / "left", *parted.state_dict())
    resumed = Trainer.resume(network(7, dropout=0.3), *load_checkpoint(tmp_path / "left"))
    assert all(
        (a.tobytes(), a.dtype, a.shape) == (b.tobytes(), b.dtype, b.shape)
        for a, b in zip(resumed.state_dict()[0].values(), parted.state_dict()[0].values())
    )
    resumed.fit(source(), epochs=2)
    assert resumed.steps == whole.steps
    assert resumed.grads.flat.tobytes() == whole.grads.flat.tobytes()
    for ours, theirs in zip(resumed.state_dict()[0].values(), whole.state_dict()[0].values(), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert resumed.state_dict()[1]["generators"] == whole.state_dict()[1]["generators"]
    assert [r["loss"] for r in resumed.history.records] == [r["loss"] for r in whole.history.records]


def test_a_checkpoint_of_another_history_is_refused():
    arrays, meta = trainer(k2=8).state_dict()
    with pytest.raises(nbrnn.CheckpointError, match="k2: the checkpoint has 8, this trainer 12"):
        trainer(k2=12).load_state_dict(arrays, meta)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("k2", "error", "message"),
    [
        (0, ValueError, "k2: expected at least 1, got 0"),
        (-4, ValueError, "k2: expected at least 1, got -4"),
        (8.0, TypeError, r"k2: expected an integer, got 8\.0"),
        ("8", TypeError, "k2: expected an integer, got '8'"),
        (True, TypeError, "k2: expected an integer, got True"),
    ],
)
def test_k2_is_a_number_of_steps(k2, error, message):
    with pytest.raises(error, match=message):
        trainer(k2=k2)


WRONG = [
    ({"reset": [1, 0, 1]}, TypeError, "reset: expected booleans, got int64"),
    ({"reset": [0.0, 1.0, 0.0]}, TypeError, "reset: expected booleans, got float64"),
    ({"reset": [True, False]}, ValueError, r"reset: expected \(3,\), one for each row, got \(2,\)"),
    ({"reset": True}, ValueError, r"reset: expected \(3,\), one for each row, got \(\)"),
    ({"reset": [[True], [True], [True]]}, ValueError, r"reset: expected \(3,\), one for each row, got \(3, 1\)"),
    ({"lengths": [1, 2, 9]}, ValueError, "lengths: expected numbers from 0 to 4, got 1 to 9"),
    ({"lengths": [1.0, 2.0, 3.0]}, TypeError, "lengths: expected integers, got float64"),
    ({"x": np.ones((9, 3, 3))}, ValueError, "k2: expected at least k1, the 9 steps of a batch, got 8"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG)
@pytest.mark.parametrize("first", [True, False])
def test_a_wrong_batch_is_named_and_changes_nothing(wrong, error, message, first):
    (x0, t0), (x, target) = series(K1, K1)
    t, other = (trainer(optimizer=Adam(0.1), k2=2 * K1) for _ in range(2))
    state = their_state = None
    if not first:
        _, state = t.step(x0, t0)
        _, their_state = other.step(x0, t0)
    params, moments = t.model.params.flat.copy(), t.optimizer.state_dict()
    with pytest.raises(error, match=message):
        t.step(**{"x": x, "target": target, "state": state} | wrong)
    assert t.model.params.flat.tobytes() == params.tobytes()
    assert t.steps == other.steps
    for name, value in t.optimizer.state_dict().items():
        assert np.array_equal(value, moments[name])
    # and the history is there still
    t.step(x, target, state)
    other.step(x, target, their_state)
    assert t.grads.flat.tobytes() == other.grads.flat.tobytes()


@pytest.mark.parametrize(("wrong", "error", "message"), [w for w in WRONG if "x" not in w[0]])
def test_evaluation_says_what_is_wrong(wrong, error, message):
    (x, target), *_ = series(K1)
    with pytest.raises(error, match=message):
        trainer().evaluate([(x, target, wrong.get("lengths"), wrong.get("reset"))])


# ------------------------------------------------------------------ epochs with lengths and resets


def padded(batches=3):
    """Batches with lengths and resets, NaN in the padding."""
    rng, found = np.random.default_rng(3), Batches()
    for x, target in series(*[K1] * batches, seed=5):
        lengths = rng.integers(0, K1 + 1, 3)
        there = np.arange(K1)[:, None] < lengths
        for array in (x, target):
            array[~there] = np.nan
        found.append((x, target, lengths, rng.random(3) < 0.4))
    return found


def test_evaluation_is_of_rows_with_their_lengths_and_resets():
    data, t = padded(), trainer(network(dropout=0.5))
    total = count = 0
    for row in range(3):
        state = None
        for x, target, lengths, reset in data:
            n = lengths[row]
            state = None if reset[row] else state
            if n:
                y, state = t.model(x[:n, [row]], state)
                total += ((y - target[:n, [row]]) ** 2).sum()
                count += 2 * n
    assert any(reset.any() for *_, reset in data[1:])
    assert t.evaluate(data) == pytest.approx(total / count, rel=1e-13)
    assert t.evaluate(data) == trainer(network()).fit(data).records[0]["loss"]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("kind", [list, Batches])
def test_fit_is_steps_on_batches_of_two_to_four(size, kind):
    data = padded() if size > 2 else series(K1, K1, K1)
    data = kind(batch[:size] for batch in data)
    for k2 in (None, 2 * K1):
        fitted, stepped, state = trainer(optimizer=Adam(0.1), k2=k2), trainer(optimizer=Adam(0.1), k2=k2), None
        fitted.fit(data)
        for x, target, *rest in data:
            _, state = stepped.step(x, target, state, *rest)
            state = state if kind is Batches else None
        assert fitted.model.params.flat.tobytes() == stepped.model.params.flat.tobytes()


def test_padding_and_ragged_train_alike():
    lengths = np.array([2, 0, 4])
    (x, target), *_ = series(K1)
    one, other = trainer(), trainer()
    one.fit([(x, target, lengths)])
    other.fit([(Ragged.from_padded(x, lengths), Ragged.from_padded(target, lengths))])
    assert one.history.records[0]["loss"] == other.history.records[0]["loss"]
    assert_close(one.grads.flat, other.grads.flat)


# ------------------------------------------------------------------ many to one


def classifier(dropout=0.0, dtype="float64"):
    return nbrnn.Sequential(
        nbrnn.Embedding(4, 5, seed=0, dtype=dtype),
        nbrnn.LSTM(5, 8, seed=1, dtype=dtype),
        nbrnn.MeanPooling(dtype=dtype),
        nbrnn.Dropout(dropout, seed=2, dtype=dtype),
        nbrnn.Linear(8, 2, seed=3, dtype=dtype),
    )


def marked_words(count=120):
    """Sequences of tokens, and whether a 3 is in them."""
    rng = np.random.default_rng(0)
    words = [rng.integers(0, 3, n) for n in rng.integers(1, 10, count)]
    marked = rng.random(count) < 0.5
    for word, mark in zip(words, marked):
        word[rng.integers(len(word))] = 3 if mark else 0
    return words, marked.astype(int)


def test_whole_sequences_are_learnt():
    words, marked = marked_words()
    t = Trainer(classifier(), CrossEntropy(), Adam(0.03))
    assert t.model.changes_time
    records = t.fit(RaggedBatches(words, marked, 16, seed=0), epochs=12).records
    assert records[0]["loss"] > 0.4
    assert records[-1]["loss"] < 0.1
    y, _ = t.model(Ragged.from_list(words))
    assert nbrnn.accuracy(y, marked) > 0.95


def test_one_target_a_sequence_goes_with_padding_too():
    words, marked = marked_words(12)
    batch = Ragged.from_list(words)
    x, lengths = batch.to_padded()
    of_ragged, of_padded = (Trainer(classifier(), CrossEntropy(), SGD(0.0)) for _ in range(2))
    of_ragged.fit([(batch, marked)])
    of_padded.fit([(x, marked, lengths)])
    assert of_ragged.history.records[0]["loss"] == of_padded.history.records[0]["loss"]
    assert of_ragged.grads.flat.tobytes() == of_padded.grads.flat.tobytes()
    assert of_padded.evaluate([(x, marked, lengths)]) == of_ragged.evaluate([(batch, marked)])


def test_last_steps_are_weighed_by_the_sequences_that_have_one():
    rng = np.random.default_rng(0)
    data = [[rng.standard_normal((n, 3)) for n in lengths] for lengths in ([3, 0, 0, 1], [2, 4])]
    targets = [rng.standard_normal((len(one), 2)) for one in data]
    t = trainer(loss=MSE(per="last"))
    errors = [
        (t.model(x[:, None])[0][-1, 0] - target) ** 2
        for batch, given in zip(data, targets)
        for x, target in zip(batch, given)
        if len(x)
    ]
    ragged = [(Ragged.from_list(batch), target) for batch, target in zip(data, targets)]
    for batches in (ragged, [(*x.to_padded()[:1], target, x.lengths) for x, target in ragged]):
        assert t.evaluate(batches) == pytest.approx(np.mean(errors), rel=1e-13)


# ------------------------------------------------------------------ the same bytes


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_seed_gives_the_same_file_whatever_the_threads(dtype, tmp_path, monkeypatch):
    needs_threads(2)
    everything_parallel(monkeypatch)
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=lambda: 0.0))  # a record has its seconds
    words, marked = marked_words()
    files = []
    for threads in (1, 2, 2):
        nbrnn.set_num_threads(threads)
        t = Trainer(classifier(0.3, dtype), CrossEntropy(), Adam(0.01), clip_norm=0.1)
        t.fit(RaggedBatches(words, marked, 16, seed=5), epochs=2)
        files.append(tmp_path / f"{len(files)}")
        save_checkpoint(files[-1], *t.state_dict())
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()
