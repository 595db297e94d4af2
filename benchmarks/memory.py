"""Memory and time of long sequences: with everything kept, and with recomputation.

    python benchmarks/memory.py
    python benchmarks/memory.py --lengths 1000 10000 100000 --hidden 64

Peak is the most that arrays hold at once in a forward and backward pass, apart from x, y and their gradients, which
grow with T whatever is done. Times of the two ways are taken in turn; the best counts. `--denormal` compares the time
of inputs and gradients too small for a full mantissa with that of usual ones.
"""

from __future__ import annotations

import argparse
import os
import time
import tracemalloc

import numpy as np

import nbrnn


def layer_of(recompute, args):
    return nbrnn.LSTM(args.input, args.hidden, num_layers=args.layers, seed=0, recompute=recompute)


def step_of(layer, x, dy):
    grads = nbrnn.Parameters.zeros(layer.params.shapes, "float32")

    def step():
        y, _, pullback = layer.vjp(x)
        pullback(dy, out=grads)
        return y  # held until here, as by a loss

    return step


def data(T, args, scale=1.0):
    rng = np.random.default_rng(0)
    shapes = (T, args.batch, args.input), (T, args.batch, args.hidden)
    return [(scale * rng.standard_normal(shape)).astype("f4") for shape in shapes]


def peak_of(step):
    tracemalloc.start()
    step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def best_of(steps, rounds):
    times = [[] for _ in steps]
    for step in steps:
        step()
    for _ in range(rounds):
        for step, found in zip(steps, times):
            start = time.perf_counter()
            step()
            found.append(time.perf_counter() - start)
    return [min(found) for found in times], [np.median(found) for found in times]


def recomputation(args):
    sizes = f"B {args.batch}, I {args.input}, H {args.hidden}, {args.layers} layer(s)"
    print(f"LSTM, {sizes}, float32, {args.threads} threads\n")
    print("| T | kept, MB | recomputed, MB | kept, ms | recomputed, ms | time, kept = 1 (median) |")
    print("| ---: |" + " ---: |" * 5)
    for T in args.lengths:
        x, dy = data(T, args)
        passing = x.nbytes + dy.nbytes  # dx and y
        peaks = [(peak_of(step_of(layer_of(way, args), x, dy)) - passing) / 1e6 for way in (False, True)]
        steps = [step_of(layer_of(way, args), x, dy) for way in (False, True)]
        best, median = best_of(steps, max(3, min(30, 300_000 // T)))
        print(f"| {T} | {peaks[0]:.1f} | {peaks[1]:.1f} | {1e3 * best[0]:.1f} | {1e3 * best[1]:.1f} |"
              f" {best[1] / best[0]:.2f} ({median[1] / median[0]:.2f}) |", flush=True)  # fmt: skip


def denormals(args):
    layer = layer_of(False, args)
    usual, tiny = (step_of(layer, *data(200, args, scale)) for scale in (1.0, 1e-39))
    best, median = best_of([usual, tiny], 100)
    print(f"usual {1e3 * best[0]:.2f} ms, denormal {1e3 * best[1]:.2f} ms: {best[1] / best[0]:.2f} times"
          f" (median {median[1] / median[0]:.2f})")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[100, 300, 1000, 3000, 10_000, 30_000])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--input", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--denormal", action="store_true")
    args = parser.parse_args()
    nbrnn.set_num_threads(args.threads)
    denormals(args) if args.denormal else recomputation(args)


if __name__ == "__main__":
    main()
