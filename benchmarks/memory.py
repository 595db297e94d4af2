"""The memory of training: of long sequences, and of one step beside PyTorch.

    python benchmarks/memory.py                                         recomputation against T
    python benchmarks/memory.py --lengths 1000 10000 100000 --hidden 64
    python benchmarks/memory.py --peers                                 one step, some three minutes (Linux)
    python benchmarks/memory.py --denormal

Recomputation: the most that arrays hold at once in a forward and backward pass, apart from x, y and their gradients,
which grow with T whatever is done. Times of the two ways, everything kept and recomputed, are taken in turn; the best
counts.

`--peers`: what a training step needs of the machine, on the anchor shapes of peers.py and the d2l.ai language model.
Each engine has a process of its own for each case. It does the step with a layer that it throws away, so that
libraries, threads and compiled code are there; gives back all free memory; makes a new layer, which has nothing kept
from an earlier step; and does one step. What counts is the resident memory at its peak during that step, above what the
process held before it had the layer, less the parameters, x and the gradient of y (of the language model, less
parameters and tokens): these are the same for all. So y, all gradients, what is kept for the way back, packed weights
and work arrays are in it. The kernel counts pages in batches, so a quarter of a MB is uncertain.

`--denormal` compares the time of inputs and gradients too small for a full mantissa with that of usual ones.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import re
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
from peers import ANCHORS, ENGINES, GATES, MODELS, Engine, geometric_mean, serve

import nbrnn
from nbrnn.kernels import memory

# ------------------------------------------------------------------ long sequences


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


# ------------------------------------------------------------------ beside PyTorch


def resident(name):
    """VmRSS, or its peak VmHWM, in bytes."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def give_back():
    """Free memory goes to the system, as far as the C library can tell it to, also what is kept for later arrays."""
    gc.collect()
    memory._spare.clear()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim:
        trim(0)


def begin_peak():
    """Whether VmHWM begins again at what is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def fresh_step(engine, case):
    """A call that makes a layer and does one step: its peak in bytes, and whether it is that of the step alone."""

    def peak():
        give_back()
        before = resident("VmRSS")
        step = ENGINES[engine](*case)
        give_back()
        alone = begin_peak()
        step()
        return resident("VmHWM") - before - given(*case), alone

    return peak


def given(work, cell, shape, dtype, threads):
    """Bytes of the parameters and data of a step."""
    T, B, I, H = shape
    item, layer = np.dtype(dtype).itemsize, GATES[cell] * H * (I + H + 2)
    if work == "step":
        return item * (layer + I * (H + 1)) + 2 * T * B * np.dtype(int).itemsize
    return item * (layer + T * B * (I + H))


def peers(args):
    found = {}
    print(f"One training step, float32, {args.threads} threads: peak of resident memory\n")
    print("| | nbrnn, MB | PyTorch, MB | PyTorch / nbrnn |\n| --- | ---: | ---: | ---: |")
    for cell in args.cells:
        cases = [("train", shape) for shape in ANCHORS] + [("step", shape) for shape in MODELS["step"][cell]]
        ratios = []
        for work, shape in cases:
            for name in ("nbrnn", "torch"):
                with Engine(name, __file__) as engine:
                    engine.ask(case=(work, cell, shape, "float32", args.threads))
                    found[name], alone = engine.ask(results=True)
            ratios.append(found["torch"] / found["nbrnn"])
            sizes = " | ".join(f"{size / 1e6:.1f}" for size in found.values())
            label = f"{cell} {','.join(map(str, shape))}{', d2l' if work == 'step' else ''}"
            print(f"| {label} | {sizes} | {ratios[-1]:.2f} |", flush=True)
        print(f"| **{cell}, geometric mean** | | | {geometric_mean(ratios):.2f} |")
    print("\nVmHWM, begun again before the step" if alone else "\nVmHWM since the process began: the step's or more")


# ------------------------------------------------------------------ command line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--peers", action="store_true", help="one training step beside PyTorch's")
    kind.add_argument("--denormal", action="store_true")
    kind.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--cells", nargs="+", choices=GATES, default=list(GATES), help="of --peers")
    parser.add_argument("--lengths", nargs="+", type=int, default=[100, 300, 1000, 3000, 10_000, 30_000])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--input", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    if args.serve:
        serve(lambda *case: fresh_step(args.serve, case))
    elif args.peers:
        peers(args)
    else:
        nbrnn.set_num_threads(args.threads)
        denormals(args) if args.denormal else recomputation(args)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
