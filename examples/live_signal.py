"""A signal that arrives sample by sample: predict the next one, and notice when the signal is not what it was.

    python examples/live_signal.py                      some seconds
    python examples/live_signal.py --samples 100000     a longer stream

A small LSTM learns from a recording to predict the next sample: the recording is read as 20 streams side by side, 50
steps an update, with the state carried from one update to the next (truncated backpropagation through time). Then
20,000 new samples come one at a time: `model.stream(1)` keeps the state and all memory that a step needs, and
`session.step` takes a sample and returns the prediction of the next.

The signal is a chirp that sweeps up and down, and a hum, and noise. The fault: for 100 samples the chirp goes on at
half its speed. The signal stays as large and as smooth as ever; only somebody who knows what ought to come notices.
"""

import argparse
import time

import numpy as np

import nbrnn

NOISE, FAULT = 0.05, 100  # standard deviation; samples
QUIET = 2000  # samples at the beginning of the stream, one sweep of the chirp, that set the limits
MEMORY = 20  # samples that a running average remembers


def record(samples, rng, fault=None):
    """The signal (samples, 1), with a fault from that sample on."""
    t = np.arange(samples)
    speed = 0.2 + 0.1 * np.sin(t / 300)  # radians a sample
    if fault is not None:
        speed[fault : fault + FAULT] /= 2
    signal = np.sin(np.cumsum(speed)) + 0.5 * np.sin(0.45 * t) + NOISE * rng.standard_normal(samples)
    return signal.astype("float32")[:, None]


def learn(recording, epochs):
    model = nbrnn.Sequential(nbrnn.LSTM(1, 32, seed=0), nbrnn.Linear(32, 1, seed=1))
    trainer = nbrnn.Trainer(model, nbrnn.MSE(), nbrnn.Adam(0.005), clip_norm=1.0)
    trainer.fit(nbrnn.data.SeriesStream(recording, None, batch_size=20, steps=50), epochs)
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
    """An exponential average of all values so far."""
    found = values.copy()
    for t in range(1, len(values)):
        found[t] = found[t - 1] + (values[t] - found[t - 1]) / MEMORY
    return found


def print_latency(took):
    print(f"one step: median {np.median(took):.1f} us, 99 % within {np.percentile(took, 99):.1f}, worst {took.max():.1f}\n")
    counts, edges = np.histogram(took, np.geomspace(took.min(), took.max(), 11))
    for low, high, count in zip(edges, edges[1:], counts):
        bar = "#" * int(np.ceil(45 * count / counts.max()))
        print(f"{low:8.1f} to {high:7.1f} us{count:8}  {bar}".rstrip())


def print_alarms(watched, fault):
    """Who goes above 1.2 times the greatest average of the quiet beginning, and when."""
    print(f"\nfault at {fault}{'quiet, up to':>30}{'limit':>8}{'noticed after':>16}{'false alarms':>14}")
    for name, average in watched.items():
        most = average[:QUIET].max()
        above = np.flatnonzero(average > 1.2 * most)
        true = above[(above >= fault) & (above < fault + FAULT)]
        false = np.count_nonzero((above < fault) | (above >= fault + FAULT + 5 * MEMORY))
        noticed = f"{true[0] - fault} samples" if len(true) else "never"
        print(f"{name:32}{most:12.3f}{1.2 * most:8.3f}{noticed:>16}{false:14}")


def print_rise(average, fault):
    print("\nsample     error of the network, running average")
    for t in range(fault - 40, fault + FAULT + 121, 20):
        print(f"{t:6}{average[t]:10.3f}  {'#' * round(100 * average[t])}{'  <- fault' * (fault <= t < fault + FAULT)}")


def main():
    parser = argparse.ArgumentParser(description="predict a signal live, and notice a fault")
    parser.add_argument("--samples", type=int, default=20_000, help="of the stream, from 3000 (default: 20000)")
    parser.add_argument("--epochs", type=int, default=20, help="times that the recording is read (default: 20)")
    options = parser.parse_args()
    if options.samples < 3000:
        parser.error("--samples: expected at least 3000")
    nbrnn.set_num_threads(1)  # a step of one row is too small to be divided
    rng = np.random.default_rng(0)
    model = learn(record(40_000, rng), options.epochs)

    fault = int(rng.integers(QUIET + 200, options.samples - 500))
    signal = record(options.samples, rng, fault)
    predictions, took = live(model, signal)
    same = np.array_equal(predictions, model(signal)[0])
    print(f"{options.samples} samples, one at a time; the same bits as in one call: {'yes' if same else 'no'}")
    print_latency(took[1:])  # the first step is told apart: it loads compiled code

    error, change = (np.abs(signal[1:] - guess)[:, 0] for guess in (predictions[:-1], signal[:-1]))
    print(f"\nroot mean square error before the fault: network {rms(error[100:fault]):.3f}, ", end="")
    print(f"the last sample again {rms(change[100:fault]):.3f}\n(noise of the signal {NOISE})")
    watched = {"network's error": error, "change from sample to sample": change, "size of the signal": abs(signal[1:, 0])}
    watched = {name: running(values) for name, values in watched.items()}
    print_alarms(watched, fault)
    print_rise(watched["network's error"], fault)


def rms(values):
    return np.sqrt(np.mean(values**2))


if __name__ == "__main__":
    main()
