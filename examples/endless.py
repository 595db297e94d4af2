"""Training on a stream from disk that is never in memory as a whole.

    python examples/endless.py                       2,000,000 steps, about ten seconds
    python examples/endless.py --steps 10000000      five times as many, in the same memory

The signal is a swing that is pushed at random, seen through a noise as large as half its movement. It is written to a
.npy file in pieces; `SeriesStream` maps the file and reads 32 places of it side by side, 50 steps an update, each of
which begins from the state at the end of the one before. As there is one epoch only, every loss below is of steps that
the network had not seen yet. The swing is linear and its noise Gaussian, so that we know the best possible prediction:
that of the Kalman filter of its equations, of which the network is told nothing.

Needs a Unix, which says what a process's memory has been at most.
"""

import argparse
import math
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy.linalg import solve_discrete_are
from scipy.signal import lfilter

import nbrnn

ROWS, STEPS, HIDDEN = 32, 50, 32
REPORTS, WARM = 10, 50  # rows of the table; updates until everything is compiled and loaded
PIECE = 1 << 16  # steps that are made and written at once
SWING = 2 * 0.98 * math.cos(0.3), -(0.98**2)  # s_t = a s_{t-1} + b s_{t-2} + push
PUSH, NOISE = 0.08, 0.5  # standard deviations


def write(path, steps, rng):
    """A file of float32 (steps, 1); the mean squares of its values and of its changes from step to step."""
    state, last, squares, changes = np.zeros(2), 0.0, 0.0, 0.0
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (steps, 1)})
        for start in range(0, steps, PIECE):
            push, noise = rng.standard_normal((2, min(PIECE, steps - start)))
            swing, state = lfilter([PUSH], [1, -SWING[0], -SWING[1]], push, zi=state)
            seen = (swing + NOISE * noise).astype("<f4")
            squares, changes = squares + (seen**2).sum(), changes + (np.diff(seen, prepend=last) ** 2).sum()
            last = seen[-1]
            seen.tofile(file)
    return squares / steps, changes / steps


def best_possible():
    """The mean squared error of the Kalman filter's prediction of the next step."""
    equations, sees = np.array([SWING, (1, 0)]), np.array([[1.0], [0.0]])
    unsure = solve_discrete_are(equations.T, sees, np.diag([PUSH**2, 0]), [[NOISE**2]])
    return unsure[0, 0] + NOISE**2


def peak_memory():
    """The most that this process has had in memory so far, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


class Report(nbrnn.callbacks.Callback):
    """A line now and then: the mean loss and the speed since the one before, and the peak of memory so far."""

    def __init__(self):
        self.before, self.memory = (0, 0.0, time.perf_counter()), []

    def on_step(self, trainer, loss):
        updates, progress = trainer.steps, trainer.progress
        every = trainer.batches_per_epoch / REPORTS
        if updates == WARM or updates // every > (updates - 1) // every:
            self.memory.append(peak_memory())
            now = progress.items, progress.loss_sum, time.perf_counter()
            items, losses, seconds = np.subtract(now, self.before)
            self.before = now
            print(f"{now[0]:14,}{losses / items:11.4f}{items / seconds:14,.0f}{self.memory[-1]:13.1f} MB", flush=True)


def main():
    parser = argparse.ArgumentParser(description="train on a stream that is never in memory as a whole")
    parser.add_argument("--steps", type=int, default=2_000_000, help="of the stream (default: 2000000)")
    options = parser.parse_args()
    if options.steps < 10 * WARM * ROWS * STEPS:
        parser.error(f"--steps: expected at least {10 * WARM * ROWS * STEPS}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "swing.npy")
        variance, change = write(path, options.steps, np.random.default_rng(0))
        print(
            f"{options.steps:,} steps, {path.stat().st_size / 1e6:.1f} MB, of which an update reads {ROWS * STEPS:,}\n"
        )
        print(f"{'mean squared error':>25}{'steps/s':>14}{'peak memory':>16}")
        for name, error in {"variance": variance, "last value": change, "Kalman filter": best_possible()}.items():
            print(f"{name:>14}{error:11.4f}")
        print(f"{'network, after':>14}")

        stream = nbrnn.data.SeriesStream(path, None, ROWS, STEPS)
        model = nbrnn.Sequential(nbrnn.LSTM(1, HIDDEN, seed=0), nbrnn.Linear(HIDDEN, 1, seed=1))
        trainer = nbrnn.Trainer(model, nbrnn.MSE(), nbrnn.Adam(0.002), clip_norm=1.0)
        report = Report()
        trainer.fit(stream, callbacks=[report])
    print(f"\npeak memory after {WARM} updates {report.memory[0]:.1f} MB, at the end {report.memory[-1]:.1f} MB")


if __name__ == "__main__":
    main()
