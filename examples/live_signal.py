"""A signal that arrives sample by sample: predict the next one, and notice when the signal is not what it was.

    python examples/live_signal.py                      some seconds
    python examples/live_signal.py --samples 100000     a longer stream

A small LSTM learns to predict the next sample from a recording, which is read as 20 streams side by side, 50 steps an
update, with the state carried from one update to the next (truncated backpropagation through time). Then new samples
come one at a time: `model.stream(1)` keeps the state and all memory that a step needs, and `session.step` takes a
sample and returns the prediction of the next. The slowest steps are those in which another process had the core.

The signal is a chirp that sweeps up and down, and a hum, and noise. The fault: for 100 samples the converter hands out
every second sample twice. The signal is as large as ever, and changes as much from sample to sample on average; who
has an idea of what ought to come notices. Each average has to exceed its own quiet beginning by a fifth.
"""

import argparse
import time

import numpy as np
from scipy.signal import lfilter

import nbrnn

NOISE, FAULT = 0.05, 100  # standard deviation; samples
QUIET = slice(100, 2000)  # samples of the stream that set the limits: a sweep of the chirp
MEMORY = 20  # samples that a running average remembers


def record(samples, rng, fault=None):
    """The signal (samples, 1), with a fault from that sample on."""
    t = np.arange(samples)
    speed = 0.2 + 0.1 * np.sin(t / 300)  # radians a sample
    signal = np.sin(np.cumsum(speed)) + 0.5 * np.sin(0.45 * t) + NOISE * rng.standard_normal(samples)
    if fault is not None:
        signal[fault + 1 : fault + FAULT : 2] = signal[fault : fault + FAULT : 2]
    return signal.astype("float32")[:, None]


def learn(recording):
    """A trained network."""
    model = nbrnn.Sequential(nbrnn.LSTM(1, 32, seed=0), nbrnn.Linear(32, 1, seed=1))
    trainer = nbrnn.Trainer(model, nbrnn.MSE(), nbrnn.Adam(0.005), clip_norm=1.0)
    trainer.fit(nbrnn.data.SeriesStream(recording, None, batch_size=20, steps=50), epochs=20)
    return model


def live(model, signal):
    """The prediction of each next sample (samples, 1), and how long each step took, in microseconds."""
    session, predictions, took = model.stream(1), np.empty_like(signal), np.empty(len(signal))
    for t in range(len(signal)):
        began = time.perf_counter_ns()
        predictions[t] = session.step(signal[t : t + 1])[0]
        took[t] = time.perf_counter_ns() - began
    return predictions, took / 1000


def running(values):
    """An exponential average of the values so far."""
    return lfilter([1 / MEMORY], [1, 1 / MEMORY - 1], values)


def print_latency(took):
    least, median, most, rare, worst = np.percentile(took, [0, 50, 99, 99.9, 100])
    print(f"one step: median {median:.1f} us, 99 % within {most:.1f}, worst {worst:.1f}\n")
    counts, edges = np.histogram(took, [*np.geomspace(least, rare, 9), worst])
    for low, high, count in zip(edges, edges[1:], counts):
        print(f"{low:8.1f} to {high:7.1f} us{count:8}  {'#' * int(np.ceil(45 * count / counts.max()))}".rstrip())


def print_alarms(watched, fault):
    """Who rises above 1.2 times the greatest average of the quiet beginning, and when."""
    print(f"\nfault at {fault:<18}{'quiet, up to':>16}{'limit':>8}{'noticed after':>15}{'false alarms':>14}")
    for name, average in watched.items():
        limit = 1.2 * average[QUIET].max()
        above = QUIET.stop + np.flatnonzero(average[QUIET.stop :] > limit)
        after = [f"{t - fault} samples" for t in above if fault <= t < fault + FAULT] or ["never"]
        false = np.count_nonzero((above < fault) | (above >= fault + FAULT + 5 * MEMORY))
        print(f"{name:29}{limit / 1.2:14.3f}{limit:8.3f}{after[0]:>15}{false:14}")


def print_rise(average, fault):
    print("\nsample     average error of the network")
    for t in range(fault - 40, fault + FAULT + 61, 20):
        mark = "  <- fault" if fault <= t < fault + FAULT else ""
        print(f"{t:6}{average[t]:10.3f}  {'#' * round(200 * average[t])}{mark}")


def main():
    parser = argparse.ArgumentParser(description="predict a signal live, and notice a fault")
    parser.add_argument("--samples", type=int, default=20_000, help="of the stream, from 3000 (default: 20000)")
    options = parser.parse_args()
    if options.samples < 3000:
        parser.error("--samples: expected at least 3000")
    nbrnn.set_num_threads(1)  # a step of one row is too small to be divided
    rng = np.random.default_rng(0)
    model = learn(record(40_000, rng))

    fault = int(rng.integers(2200, options.samples - 500))
    signal = record(options.samples, rng, fault)
    predictions, took = live(model, signal)
    same = "yes" if np.array_equal(predictions, model(signal)[0]) else "no"
    print(f"{options.samples} samples, one at a time; the same bits as in one call: {same}")
    print_latency(took[1:])  # without the first one, which loads compiled code

    x, guess = signal[:, 0], np.append(0, predictions[:-1, 0])
    error, change = np.abs(x - guess), np.abs(np.diff(x, prepend=x[0]))
    usual = [np.sqrt(np.mean(values[100:fault] ** 2)) for values in (error, change)]
    print(f"\nroot mean square before the fault: error {usual[0]:.3f}, change {usual[1]:.3f}, noise {NOISE}")
    watched = {"error of the network": error, "change from sample to sample": change, "size of the signal": np.abs(x)}
    print_alarms({name: running(values) for name, values in watched.items()}, fault)
    print_rise(running(error), fault)


if __name__ == "__main__":
    main()
