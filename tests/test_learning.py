"""The classic tests of recurrent memory in benchmarks/learning.py: they ask what they should, and are learnt (slow)."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

import nbrnn

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "learning.py"
# Written down once more, as one expression: from the lower branch on, T* V, and around the loop by P X.
LOWER = "T*V(?:PXT*V)*(?:V|PS)"
EMBEDDED_REBER = re.compile(f"B([TP])B(?:TS*X(?:S|X{LOWER})|P{LOWER})E\\1E")


@pytest.fixture(scope="module")
def learning():
    spec = importlib.util.spec_from_file_location("learning", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------ what is asked


@pytest.mark.parametrize("name", ["adding-100", "adding-200"])
def test_adding_asks_for_the_sum_of_one_number_of_each_half(learning, name):
    task = learning.TASKS[name]
    x, target = task.batch(np.random.default_rng(0), 500)
    numbers, marks = x[:, :, 0], x[:, :, 1]
    assert x.shape == (task.length, 500, 2)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert set(np.unique(marks)) == {0, 1}
    for half in np.split(marks, 2):
        assert (half.sum(axis=0) == 1).all()
    for row in range(500):
        first, second = np.flatnonzero(marks[:, row])
        assert target[row, 0] == numbers[first, row] + numbers[second, row]
    assert np.mean((target - 1) ** 2) == pytest.approx(1 / 6, rel=0.2)


def test_order_has_two_marks_whose_order_is_the_class(learning):
    task, rng = learning.TASKS["order"], np.random.default_rng(0)
    lengths, classes = set(), set()
    for _ in range(100):
        x, target = task.batch(rng)
        lengths.add(len(x))
        classes |= set(target)
        for tokens, number in zip(x.T, target):
            text = "".join(task.symbols[token] for token in tokens)
            assert re.fullmatch("E[abcd]+[XY][abcd]+[XY][abcd]+B", text)
            first, second = (match.start() for match in re.finditer("[XY]", text))
            assert 10 <= first <= 20
            assert 50 <= second <= 60
            assert text[first] + text[second] == ["XX", "XY", "YX", "YY"][number]
    assert lengths == set(range(100, 111))
    assert classes == {0, 1, 2, 3}


def test_every_reber_string_is_of_the_grammar(learning):
    task, rng = learning.TASKS["reber"], np.random.default_rng(0)
    strings = {task.string(rng)[0] for _ in range(1000)}
    assert len(strings) > 100
    for text in strings:
        assert EMBEDDED_REBER.fullmatch(text), text
        assert text[1] == text[-2]


def test_reber_knows_what_may_follow(learning):
    """What follows somewhere after the same beginning, in very many strings, is what is said to be legal."""
    task, rng = learning.TASKS["reber"], np.random.default_rng(0)
    legal, seen = {}, {}
    for _ in range(3000):
        text, follow = task.string(rng)
        assert len(follow) == len(text)
        for end, symbols in enumerate(follow[:-1], start=1):
            assert text[end] in symbols
            assert legal.setdefault(text[:end], symbols) == symbols
            seen.setdefault(text[:end], []).append(text[end])
    for beginning, symbols in seen.items():
        if len(symbols) > 50:
            assert set(symbols) == set(legal[beginning])


def test_reber_asks_for_the_next_symbol(learning):
    task = learning.TASKS["reber"]
    x, target = task.encode(["BTBTXSETE", "BPBPVVEPE", "BTBTSXSETE"])
    assert x.shape == target.shape == (9, 3)
    assert "".join(task.symbols[token] for token in x[:8, 0]) == "BTBTXSET"
    assert "".join(task.symbols[token] for token in target[:8, 0]) == "TBTXSETE"
    assert target[8].tolist() == [learning.IGNORED, learning.IGNORED, task.symbols.index("E")]


def test_reber_counts_a_string_as_right_only_if_every_legal_symbol_is_ahead(learning):
    task = learning.TASKS["reber"]
    y = np.zeros((2, 7), "float32")
    y[0, [1, 2]], y[1, 0] = (2, 1), 1  # T and P, B
    assert task.right(y, ["TP", "B"])
    assert not task.right(y, ["TP", "T"])
    y[0, 6] = 1
    assert not task.right(y, ["TP", "B"])


@pytest.mark.parametrize("letters", ["ab", "abc"])
def test_counting_strings_and_what_may_follow(learning, letters):
    task = learning.TASKS["n".join(letters) + "n"]
    x, target = task.strings([1, 3, 10])
    for row, n in enumerate([1, 3, 10]):
        text = "S" + "".join(letter * n for letter in letters) + "T"
        size = len(text) - 1
        assert "".join(task.symbols[token] for token in x[:size, row]) == text[:-1]
        assert (target[size:, row] == learning.IGNORED).all()
        for step in range(size):
            follow = {task.symbols[k] for k in np.flatnonzero(target[step, row])}
            assert follow == ({"a", "b"} if text[step] == "a" else {text[step + 1]})
    rng = np.random.default_rng(0)
    assert {len(task.batch(rng)[0]) for _ in range(200)} == {len(letters) * n + 1 for n in range(1, 11)}


def test_counting_reports_the_first_mistake(learning):
    """A model that knows all strings up to a given n, and no other."""
    task = learning.TASKS["anbn"]

    def model(x):
        numbers = (x == 1).sum(axis=0)
        y = 2.0 * (task.strings(numbers)[1] > 0) - 1
        y[0, numbers > 33] *= -1
        return y, None

    assert task.figure(model) == 33


def test_copy_says_after_the_signal_what_it_heard(learning):
    task = learning.TASKS["copy"]
    x, target = task.batch(np.random.default_rng(0))
    assert x.shape == target.shape == (task.delay + 20, learning.ROWS)
    assert set(np.unique(x[:10])) == set(range(8))
    assert (x[-11] == task.signal).all()
    rest = np.delete(x[10:], task.delay - 1, axis=0)
    assert (rest == task.blank).all()
    assert (target[:-10] == task.blank).all()
    assert (target[-10:] == x[:10]).all()


def test_copy_baseline_is_that_of_a_model_without_memory(learning):
    task = learning.TASKS["copy"]
    x, target = task.batch(np.random.default_rng(0))
    y = np.zeros((*x.shape, 9))
    y[:-10, :, :8] = y[-10:, :, 8] = -100
    assert task.loss(y, target)[0] == pytest.approx(task.baseline)
    assert task.baseline == pytest.approx(10 * np.log(8) / 70)


def test_losses_look_only_where_something_is_asked(learning):
    rng = np.random.default_rng(0)
    y, target = rng.standard_normal((5, 3, 2)), rng.standard_normal((3, 2))
    value, dy = learning.at_the_end(nbrnn.MSE())(y, target)
    assert value == pytest.approx(np.mean((y[-1] - target) ** 2))
    assert not dy[:-1].any()
    target = np.full((5, 3, 2), learning.IGNORED, "float32")
    target[:2] = 1
    value, dy = learning.legal_or_not(y, target)
    assert value == pytest.approx(np.mean(np.log1p(np.exp(-y[:2]))))
    assert not dy[2:].any()
    assert dy[:2].all()


# ------------------------------------------------------------------ what is learnt


LEARNT = [  # task, cell, seeds, and how many of them have to solve it
    ("adding-100", "gru", 3, 3),
    ("adding-200", "indrnn", 2, 2),
    ("order", "chrono", 3, 3),
    ("reber", "lstm", 3, 3),
    ("anbn", "peephole", 3, 3),
    ("anbncn", "peephole", 3, 2),  # some runs learn the ten strings, and not to count
    ("copy", "chrono_gru", 2, 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cell", "seeds", "least"), LEARNT, ids=[name for name, *_ in LEARNT])
def test_learns(learning, name, cell, seeds, least):
    nbrnn.set_num_threads(1)
    task = learning.TASKS[name]
    figures, needed = zip(*(learning.train(task, cell, seed) for seed in range(seeds)))
    assert sum(count is not None for count in needed) >= least, f"{task.caption}: {figures}"
