"""The latency of one time step at batch 1, against other engines, and against the time of reading the weights.

    python benchmarks/streaming.py                        LSTM 128 and 256, 100,000 steps
    python benchmarks/streaming.py --cells GRU --sizes 32 512 --steps 20000

Each engine runs in its own process, and in turn with the others: a thousand steps at a time. "reading" is a loop that
does nothing but load all weights of the step, packed, from where they are.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import numpy as np
from peers import Engine, serve

CHUNK = 1000


def nbrnn_step(cell, H, threads):
    import nbrnn

    nbrnn.set_num_threads(threads)
    session = getattr(nbrnn, cell)(H, H, seed=0).stream(1)
    x = np.ones((1, H), np.float32)
    return lambda: session.step(x)


def reading_step(cell, H, threads):
    """Load every byte of the weights once."""
    from nbrnn.kernels.jit import compiled
    from nbrnn.kernels.simd import lane_sum, lanes_of, load, pointer

    def read(weights):
        p, W = pointer(weights, 0), lanes_of(pointer(weights, 0))
        a, b, c, d = load(p, W), load(p, W), load(p, W), load(p, W)
        for n in range(0, weights.size, 4 * W):
            a += load(pointer(weights, n), W)
            b += load(pointer(weights, n + W), W)
            c += load(pointer(weights, n + 2 * W), W)
            d += load(pointer(weights, n + 3 * W), W)
        return lane_sum(a + b + c + d)

    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[cell]
    entry, weights = compiled(read), np.ones(gates * H * 2 * H, np.float32)
    return lambda: entry(weights)


def numpy_step(cell, H, threads):
    if cell != "LSTM":
        return None
    rng = np.random.default_rng(0)
    w, b = rng.standard_normal((2 * H, 4 * H), np.float32) / H, np.zeros(4 * H, np.float32)
    x, state = np.ones(H, np.float32), [np.zeros(H, np.float32)] * 2

    def step():
        h, c = state
        i, f, g, o = np.split(np.concatenate([x, h]) @ w + b, 4)
        c = c / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-i))
        state[:] = np.tanh(c) / (1 + np.exp(-o)), c

    return step


def torch_step(cell, H, threads):
    import torch

    torch.set_num_threads(threads)
    layer, x, state = getattr(torch.nn, cell)(H, H), torch.ones(1, 1, H), [None]

    def step():
        with torch.inference_mode():
            _, state[0] = layer(x, state[0])

    return step


def onnxruntime_step(cell, H, threads):
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[cell]
    rng = np.random.default_rng(0)
    shapes = {"W": (1, gates * H, H), "R": (1, gates * H, H), "B": (1, 2 * gates * H)}
    weights = {name: (rng.standard_normal(shape) / H).astype("f4") for name, shape in shapes.items()}
    inner = ["h", "c"][: 1 + (cell == "LSTM")]
    node = helper.make_node(cell, ["x", "W", "R", "B", "", *inner], ["y", *(f"{s}n" for s in inner)], hidden_size=H)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1, H]) for n in ["x", *inner]]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1, H]) for n in [f"{s}n" for s in inner]]
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph([node], "step", values, outputs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"x": np.ones((1, 1, H), "f4"), **{s: np.zeros((1, 1, H), "f4") for s in inner}}

    def step():
        for s, state in zip(inner, session.run(None, feed)):
            feed[s] = state

    return step


ENGINES = {"nbrnn": nbrnn_step, "reading": reading_step, "torch": torch_step, "onnxruntime": onnxruntime_step,
           "numpy": numpy_step}  # fmt: skip


def chunks(step):
    """A call that answers with the nanoseconds of many steps."""
    if step is None:
        return None

    def call():
        clock, found = time.perf_counter_ns, []
        for _ in range(CHUNK):
            start = clock()
            step()
            found.append(clock() - start)
        return found

    return call


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=["LSTM"], choices=["LSTM", "GRU", "RNN"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 256])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(lambda *case: chunks(ENGINES[args.serve](*case)))
        return
    engines = [
        Engine(n, __file__) for n in args.engines if n not in ("torch", "onnxruntime") or importlib.util.find_spec(n)
    ]
    for cell in args.cells:
        for H in args.sizes:
            able = [engine for engine in engines if engine.ask(case=(cell, H, args.threads))]
            times = {engine.name: [] for engine in able}
            for _ in range(args.steps // CHUNK):
                for engine in able:
                    times[engine.name] += engine.ask(results=True)
            print(f"\n{cell} {H}, float32, {args.threads} thread(s), {args.steps:,} steps: microseconds\n")
            print("| engine | least | median | 99 % | median, nbrnn = 1 |\n| --- | ---: | ---: | ---: | ---: |")
            ours = np.median(times["nbrnn"])
            for name, found in times.items():
                least, median, most = np.percentile(found, [0, 50, 99]) / 1e3
                print(f"| {name} | {least:.1f} | {median:.1f} | {most:.1f} | {median * 1e3 / ours:.2f} |", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
