"""The classic tests of recurrent memory: does a cell learn what its inventors say it learns, and how soon?

    python benchmarks/learning.py                                     every task with the cells it is meant for
    python benchmarks/learning.py adding-100 --cells lstm gru indrnn --seeds 3
    python benchmarks/learning.py copy --cells chrono gru --steps 9000

    adding-100, adding-200    the sum of two marked numbers among 100 or 200
    order                     which of two marks came first, among 100 distracting symbols
    reber                     the embedded Reber grammar: which symbols may come next?
    anbn, anbncn              counting: train on n up to 10, and go on
    copy                      ten symbols, fifty steps of nothing, the ten symbols again

It prints a Markdown table. A run ends when its task is solved, or after --steps updates. Everything is drawn from
seeds: a second run on the same machine prints the same figures.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
import nbrnn

ROWS = 32  # sequences of an update
IGNORED = -100  # a target that counts for nothing


# ------------------------------------------------------------------ cells, and where they start


def lstm(inputs, hidden, span, seed):
    return nbrnn.LSTM(inputs, hidden, seed=seed, unit_forget_bias=True)


def chrono(inputs, hidden, span, seed):
    """An LSTM whose units forget after 1 to `span` steps (C. Tallec and Y. Ollivier, ICLR 2018)."""
    layer = nbrnn.LSTM(inputs, hidden, seed=seed)
    times = np.random.default_rng(seed).uniform(1, span, hidden)
    layer.params["bias_ih_l0"][: 2 * hidden] = np.concatenate([-np.log(times), np.log(times)])  # gates i and f
    layer.params["bias_hh_l0"][: 2 * hidden] = 0
    return layer


def peephole(inputs, hidden, span, seed):
    return nbrnn.PeepholeLSTM(inputs, hidden, seed=seed, unit_forget_bias=True)


def gru(inputs, hidden, span, seed):
    return nbrnn.GRU(inputs, hidden, seed=seed)


def chrono_gru(inputs, hidden, span, seed):
    """The same for the gate of a GRU that keeps its state."""
    layer = nbrnn.GRU(inputs, hidden, seed=seed)
    times = np.random.default_rng(seed).uniform(1, span, hidden)
    layer.params["bias_ih_l0"][hidden : 2 * hidden] = np.log(times)  # gate z
    layer.params["bias_hh_l0"][hidden : 2 * hidden] = 0
    return layer


def mingru(inputs, hidden, span, seed):
    """Two layers: in each of them the gates see nothing but the input. A unit keeps its state for about ten steps."""
    layer = nbrnn.MinGRU(inputs, hidden, num_layers=2, seed=seed)
    for name in ("bias_ih_l0", "bias_ih_l1"):
        layer.params[name][:hidden] = -2  # gate z
    return layer


def indrnn(inputs, hidden, span, seed):
    """Two layers; weights of the recurrence from [0, 1), in the second close to 1 (S. Li et al., CVPR 2018)."""
    layer = nbrnn.IndRNN(inputs, hidden, num_layers=2, seed=seed)
    rng = np.random.default_rng(seed)
    layer.params["weight_u_l0"][...] = rng.random(hidden)
    layer.params["weight_u_l1"][...] = rng.uniform(0.5 ** (1 / span), 1, hidden)
    return layer


def irnn(inputs, hidden, span, seed):
    """relu, and the identity for a recurrent matrix (Q. V. Le, N. Jaitly and G. E. Hinton, 2015)."""
    layer = nbrnn.RNN(inputs, hidden, nonlinearity="relu", seed=seed)
    layer.params["weight_hh_l0"][...] = np.eye(hidden)
    layer.params["weight_ih_l0"][...] = 0.001 * np.random.default_rng(seed).standard_normal((hidden, inputs))
    layer.params["bias_ih_l0"][...] = layer.params["bias_hh_l0"][...] = 0
    return layer


def rnn(inputs, hidden, span, seed):
    return nbrnn.RNN(inputs, hidden, seed=seed)


CELLS = {make.__name__: make for make in (lstm, chrono, peephole, gru, chrono_gru, mingru, indrnn, irnn, rnn)}


# ------------------------------------------------------------------ losses


def at_the_end(loss):
    """`loss` of the last output alone: the others may be what they like."""

    def last(y, target):
        dy = np.zeros_like(y)
        value, dy[-1] = loss(y[-1], target)
        return value, dy

    return last


def legal_or_not(y, target):
    """For each symbol whether it may come next, 1 or 0; behind the end of a string the target is IGNORED."""
    dy, counts = np.zeros_like(y), target != IGNORED
    value, dy[counts] = nbrnn.BCEWithLogits()(y[counts], target[counts])
    return value, dy


# ------------------------------------------------------------------ tasks


class Task:
    """What there is to learn.

    `batch(rng, rows)` makes x and its target; `figure(model, rng)` is how well a model does on sequences that are new;
    a run needs as many updates as come before the figure is `solved`, and goes on until it is `enough`.
    """

    hidden, lr, steps, every = 64, 0.005, 3000, 100
    clip = 1.0

    def enough(self, figure):
        return self.solved(figure)


class Adding(Task):
    """Two of the numbers are marked, one in each half; at the end their sum is asked for.

    Hochreiter and Schmidhuber (1997), experiment 4, as in Le et al. (2015): numbers from [0, 1), always `length` steps.
    Who always says 1 has a mean squared error of 1/6.
    """

    cells, inputs, outputs = ("lstm", "chrono", "gru", "indrnn", "irnn", "rnn"), 2, 1
    caption, solved_below = "mean squared error", 0.01
    loss = staticmethod(at_the_end(nbrnn.MSE()))

    def __init__(self, length, published):
        self.length = self.span = length
        self.name, self.published = f"adding-{length}", published

    def batch(self, rng, rows=ROWS):
        """x (T, B, 2): numbers and marks; target (B, 1)."""
        x = np.zeros((self.length, rows, 2), "float32")
        x[:, :, 0] = rng.random((self.length, rows))
        row, half = np.arange(rows), self.length // 2
        x[rng.integers(half, size=rows), row, 1] = 1
        x[rng.integers(half, self.length, size=rows), row, 1] = 1
        return x, (x[:, :, 0] * x[:, :, 1]).sum(axis=0)[:, None]

    def figure(self, model, rng):
        x, target = self.batch(rng, 512)
        return float(np.mean((model(x)[0][-1] - target) ** 2))

    def solved(self, figure):
        return figure < self.solved_below


class Order(Task):
    """Two symbols are X or Y, far from each other and from the end, all others distract: XX, XY, YX or YY?

    Hochreiter and Schmidhuber (1997), experiment 6a: E, distraction from a to d, B; 100 to 110 symbols in all, the
    first mark at 10 to 20, the second at 50 to 60. The sequences of one batch are of one length.
    """

    name, cells, inputs, outputs, span = "order", ("chrono", "lstm", "gru", "indrnn"), 8, 4, 100
    symbols, caption = "abcdEBXY", "wrong of 1,000"
    published = "31,390 sequences (Hochreiter and Schmidhuber 1997)"
    loss = staticmethod(at_the_end(nbrnn.CrossEntropy()))

    def batch(self, rng, rows=ROWS):
        """Tokens (T, B); classes (B,): 0 to 3 for XX, XY, YX, YY."""
        x = rng.integers(4, size=(rng.integers(100, 111), rows))
        first, second = rng.integers(2, size=(2, rows))
        row, (E, B, X) = np.arange(rows), map(self.symbols.index, "EBX")
        x[0], x[-1] = E, B
        x[rng.integers(10, 21, size=rows), row] = X + first
        x[rng.integers(50, 61, size=rows), row] = X + second
        return x, 2 * first + second

    def figure(self, model, rng):
        wrong = 0
        for _ in range(4):
            x, target = self.batch(rng, 250)
            wrong += int(np.sum(model(x)[0][-1].argmax(axis=1) != target))
        return wrong

    def solved(self, figure):
        return figure == 0


class Reber(Task):
    """B, T or P, a string of the Reber grammar, the same T or P again, E: which symbols may come next?

    Hochreiter and Schmidhuber (1997), experiment 1. A string counts as right if at every step all symbols that may
    follow are more probable than all that may not: so the last symbol but one has to be the second one.
    """

    name, cells, inputs, outputs, span = "reber", ("lstm", "gru", "mingru", "rnn"), 7, 7, 20
    symbols, caption = "BTPSXVE", "wrong of 500 strings"
    published = "8,440 sequences (Hochreiter and Schmidhuber 1997)"
    hidden, lr, steps, every = 24, 0.01, 1500, 25
    loss = staticmethod(nbrnn.CrossEntropy(IGNORED))
    graph = (  # for each node the symbols that may follow, and where they lead
        {"T": 1, "P": 2},
        {"S": 1, "X": 3},
        {"T": 2, "V": 4},
        {"X": 2, "S": 5},
        {"P": 3, "V": 5},
    )
    final = 5

    def string(self, rng):
        """A string, and for each of its symbols those that may follow."""
        outer = rng.choice(["T", "P"])
        text, legal, node = f"B{outer}B", ["TP", "B"], 0
        while node != self.final:
            legal.append("".join(self.graph[node]))
            symbol = rng.choice(list(self.graph[node]))
            text, node = text + symbol, self.graph[node][symbol]
        return text + f"E{outer}E", [*legal, "E", outer, "E", ""]

    def batch(self, rng, rows=ROWS):
        """Tokens (T, B), filled up with E; the next tokens (T, B)."""
        return self.encode([self.string(rng)[0] for _ in range(rows)])

    def encode(self, strings):
        longest = max(map(len, strings)) - 1
        x = np.full((longest, len(strings)), self.symbols.index("E"))
        target = np.full(x.shape, IGNORED)
        for row, text in enumerate(strings):
            tokens = [self.symbols.index(symbol) for symbol in text]
            x[: len(text) - 1, row], target[: len(text) - 1, row] = tokens[:-1], tokens[1:]
        return x, target

    def figure(self, model, rng):
        strings, legal = zip(*(self.string(rng) for _ in range(500)))
        y = model(self.encode(strings)[0])[0]
        return sum(not self.right(y[:, row], follow[:-1]) for row, follow in enumerate(legal))

    def right(self, y, legal):
        """Whether at every step the legal symbols have the largest outputs."""
        for scores, follow in zip(y, legal):
            may = np.isin(list(self.symbols), list(follow))
            if not scores[may].min() > scores[~may].max():
                return False
        return True

    def solved(self, figure):
        return figure == 0


class Counting(Task):
    """S, then n times a, n times b (and n times c), then T: which symbols may come next?

    Gers and Schmidhuber (2001): the network sees n from 1 to 10, and the figure is the largest N such that it gets all
    strings with n up to N right, each symbol of them. After an a both a and b may come, whatever n is.
    """

    cells, span, caption = ("peephole", "lstm", "gru", "rnn"), 20, "largest n, median (best)"
    lr, steps, every = 0.03, 4000, 250
    trained, asked, limit = 10, 20, 1000
    loss = staticmethod(legal_or_not)

    def __init__(self, letters, hidden, published):
        self.hidden = hidden
        self.name, self.letters, self.published = "".join(f"{letter}n" for letter in letters), letters, published
        self.symbols = "S" + letters + "T"
        self.inputs = self.outputs = len(self.symbols)

    def batch(self, rng, rows=1):
        """Strings to learn from, one in an update: a batch of all ten teaches the ten, and counting rarely."""
        return self.strings(rng.integers(1, self.trained + 1, size=rows))

    def strings(self, numbers):
        """Tokens (T, B), filled up with T; target (T, B, symbols), 1 for those that may follow."""
        k, numbers = len(self.letters), list(numbers)
        x = np.full((k * max(numbers) + 1, len(numbers)), k + 1)
        target = np.full((*x.shape, k + 2), IGNORED, "float32")
        for row, n in enumerate(numbers):
            text = [0, *np.repeat(np.arange(1, k + 1), n)]
            x[: len(text), row], target[: len(text), row] = text, 0
            target[range(len(text)), row, [*text[1:], k + 1]] = 1
            target[1 : n + 1, row, 1:3] = 1
        return x, target

    def figure(self, model, rng=None):
        for first in range(1, self.limit + 1, 20):
            x, target = self.strings(range(first, first + 20))
            right = ((model(x)[0] > 0) == (target > 0)) | (target == IGNORED)
            wrong = np.flatnonzero(~right.all(axis=(0, 2)))
            if len(wrong):
                return first - 1 + int(wrong[0])
        return self.limit

    def solved(self, figure):
        return figure >= self.asked

    def enough(self, figure):
        return figure >= self.limit


class Copy(Task):
    """Ten symbols out of eight, a long nothing, a signal: say them again.

    Arjovsky, Shah and Bengio (2016). Who knows when to speak, but nothing else, has a cross entropy of
    10 log 8 / (T + 20), T the length of the nothing.
    """

    name, cells, inputs, outputs = "copy", ("chrono_gru", "chrono"), 10, 9
    delay, caption, published = 50, "cross entropy", "not found (curves only, Arjovsky et al. 2016)"
    hidden, lr, steps = 96, 0.008, 5000
    blank, signal = 8, 9
    loss = staticmethod(nbrnn.CrossEntropy())

    def __init__(self):
        self.span = self.delay + 20
        self.baseline = 10 * math.log(8) / self.span

    def batch(self, rng, rows=ROWS):
        """Tokens and what to say, both (delay + 20, B)."""
        x, target = np.full((2, self.span, rows), self.blank)
        x[:10] = target[-10:] = rng.integers(8, size=(10, rows))
        x[-11] = self.signal
        return x, target

    def figure(self, model, rng):
        x, target = self.batch(rng, 128)
        return self.loss(model(x)[0], target)[0]

    def solved(self, figure):
        return figure < self.baseline / 10


ADDING = "(Hochreiter and Schmidhuber 1997, variable length)"
KALMAN = "n > 1,000 with Kalman filters (Gers et al. 2002); by gradient descent: not found"
TASKS = {
    task.name: task
    for task in (
        Adding(100, f"74,000 sequences {ADDING}"),
        Adding(200, "not found (curves only, Le et al. 2015)"),
        Order(),
        Reber(),
        Counting("ab", 5, "not found"),
        Counting("abc", 8, KALMAN),
        Copy(),
    )
}


# ------------------------------------------------------------------ training


def train(task, cell, seed, steps=None):
    """The figure at the end, and the updates until the task was solved (None: it was not)."""
    steps, rng = steps or task.steps, np.random.default_rng(seed)
    layer = CELLS[cell](task.inputs, task.hidden, task.span, seed)
    model = nbrnn.Sequential(layer, nbrnn.Linear(layer.output_size, task.outputs, seed=seed + 1000))
    schedule = nbrnn.schedules.Cosine(steps, task.lr / 10)
    trainer = nbrnn.Trainer(model, task.loss, nbrnn.Adam(task.lr), clip_norm=task.clip, schedule=schedule)
    needed, figure = None, math.nan
    for step in range(1, steps + 1):
        trainer.step(*task.batch(rng))
        if step % task.every == 0 or step == steps:
            figure = task.figure(model, rng)
            if needed is None and task.solved(figure):
                needed = step
            if task.enough(figure):
                break
    return figure, needed


def row_of(task, cell, seeds, steps):
    """One line of the table."""
    start = time.perf_counter()
    figures, needed = zip(*(train(task, cell, seed, steps) for seed in range(seeds)))
    seconds = (time.perf_counter() - start) / seeds
    updates = [count for count in needed if count is not None]
    mean, rows = (statistics.mean(updates) if updates else math.nan), task.batch(np.random.default_rng(0))[0].shape[1]
    effort = f"{mean:,.0f} ({mean * rows:,.0f})" if updates else "-"
    if isinstance(task, Counting):
        figure = f"{statistics.median(figures):,.0f} ({max(figures):,})"
    else:
        figure = f"{statistics.mean(figures):.3g}"
    cells = [task.name, cell, f"{len(updates)} of {seeds}", effort, f"{task.caption} {figure}"]
    return "| " + " | ".join([*cells, task.published, f"{seconds:.0f}"]) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)} (default: all)")
    parser.add_argument("--cells", nargs="+", choices=CELLS, help="default: those that suit the task")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each cell (default: 3)")
    parser.add_argument("--steps", type=int, help="updates at most (default: 1,500 to 4,000)")
    options = parser.parse_args()
    unknown = set(options.tasks) - set(TASKS)
    if unknown:
        parser.error(f"no such task: {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
    if options.seeds < 1 or (options.steps is not None and options.steps < 1):
        parser.error("--seeds, --steps: expected at least 1")
    nbrnn.set_num_threads(1)  # so small a network gains little from a second one
    print("| task | cell | solved | updates needed (sequences) | figure at the end | published | seconds a run |")
    print("| --- | --- | ---: | ---: | --- | --- | ---: |")
    for name in options.tasks or TASKS:
        for cell in options.cells or TASKS[name].cells:
            print(row_of(TASKS[name], cell, options.seeds, options.steps), flush=True)


if __name__ == "__main__":
    main()
