"""Which parts of an LSTM matter? "LSTM: A Search Space Odyssey" in small.

    python examples/odyssey.py                                  about a minute
    python examples/odyssey.py --seeds 10 --plot odyssey.png    needs matplotlib

Variants of the LSTM and a few other cells learn the adding problem with the same number of updates: of a sequence of
random numbers two are marked, and at the end their sum is asked for (S. Hochreiter and J. Schmidhuber, Long Short-Term
Memory, 1997). Who only knows the mean of all sums has a mean squared error of 1/6.

The first five are, under the names of K. Greff et al., LSTM: A Search Space Odyssey, IEEE TNNLS 28 (2017): NP, V, CIFG,
NIAF and NOAF.
"""

import argparse
import math
import statistics

import numpy as np

import nbrnn

STEPS, ROWS, HIDDEN = 30, 32, 24
GUESS = 1 / 6  # the variance of the sum of two numbers from [0, 1)
SOLVED = 0.01

VARIANTS = {
    "LSTM": (nbrnn.LSTM, {}),
    "peepholes": (nbrnn.PeepholeLSTM, {}),
    "coupled gates (CIFG)": (nbrnn.CoupledLSTM, {}),
    "no input activation": (nbrnn.LSTM, {"activations": ("sigmoid", "linear", "tanh")}),
    "no output activation": (nbrnn.LSTM, {"activations": ("sigmoid", "tanh", "linear")}),
    "GRU": (nbrnn.GRU, {}),
    "minGRU": (nbrnn.MinGRU, {}),
    "RNN": (nbrnn.RNN, {}),
}


def adding_problem(rng):
    """x (T, B, 2): numbers and marks, one in each half of the sequence; target (1, B, 1): the sum of those marked."""
    x = np.zeros((STEPS, ROWS, 2), "float32")
    x[:, :, 0] = rng.random((STEPS, ROWS))
    rows, half = np.arange(ROWS), STEPS // 2
    x[rng.integers(half, size=ROWS), rows, 1] = 1
    x[rng.integers(half, STEPS, size=ROWS), rows, 1] = 1
    return x, (x[:, :, :1] * x[:, :, 1:]).sum(axis=0, keepdims=True)


def last_step_mse(y, target):
    """The mean squared error of the last output; the others may be what they like."""
    dy = np.zeros_like(y)
    loss, dy[-1:] = nbrnn.MSE()(y[-1:], target)
    return loss, dy


def train(kind, options, steps, seed):
    """The error on unseen sequences after `steps` updates."""
    model = nbrnn.Sequential(kind(2, HIDDEN, seed=seed, **options), nbrnn.Linear(HIDDEN, 1, seed=seed + 1))
    trainer = nbrnn.Trainer(model, last_step_mse, nbrnn.Adam(0.005), clip_norm=1.0)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        trainer.step(*adding_problem(rng))
    return trainer.evaluate([adding_problem(rng) for _ in range(20)])


def standard_error(values):
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def new_figure():
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    return Figure(figsize=(8, 4), layout="constrained")


def plot(figure, errors):
    axes = figure.subplots()
    for place, values in enumerate(errors.values()):
        axes.errorbar(statistics.mean(values), place, xerr=standard_error(values), fmt="o", color="C0", capsize=4)
        axes.plot(values, [place] * len(values), "|", color="C0", alpha=0.5)
    axes.axvline(GUESS, color="grey", linestyle=":", label="always guessing 1")
    axes.set(xscale="log", xlabel="mean squared error: mean, standard error and each seed", title="the adding problem")
    axes.set_yticks(range(len(errors)), errors)
    axes.invert_yaxis()
    axes.legend()


def main():
    parser = argparse.ArgumentParser(description="variants of the LSTM learn the adding problem")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each variant (default: 5)")
    parser.add_argument("--steps", type=int, default=800, help="updates of each run (default: 800)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw a picture")
    options = parser.parse_args()
    figure = new_figure() if options.plot else None
    nbrnn.set_num_threads(1)  # so small a network gains little from a second one, and may have to wait for it
    print(f"adding problem: {STEPS} steps, {HIDDEN} hidden units, {options.steps} updates, {options.seeds} seeds\n")
    print(f"{'':22}{'parameters':>11}{'mean squared error':>25}{f'below {SOLVED}':>14}")
    errors = {}
    for name, (kind, settings) in VARIANTS.items():
        values = [train(kind, settings, options.steps, seed) for seed in range(options.seeds)]
        size = kind(2, HIDDEN, **settings).params.flat.size
        solved = f"{sum(value < SOLVED for value in values)} of {len(values)}"
        error = f"{statistics.mean(values):.4f} ± {standard_error(values):.4f}"
        print(f"{name:22}{size:11}{error:>25}{solved:>14}", flush=True)
        errors[name] = values
    print(f"{'always guessing 1':22}{0:11}{GUESS:16.4f}")
    if options.plot:
        plot(figure, errors)
        figure.savefig(options.plot)


if __name__ == "__main__":
    main()
