"""nbrnn against other engines on the same work, interleaved in one run.

    python benchmarks/peers.py                        everything, about ten minutes
    python benchmarks/peers.py --work step            the whole training step of the d2l.ai language model
    python benchmarks/peers.py --work train infer --cells LSTM --dtype float64

Each engine works in a process of its own, so that no two thread pools share one, and the rounds go around the engines
in turn: on a busy machine only the ratios of one run mean something. A row shows each engine's best and median time
in milliseconds, and the ratio of the fastest other engine to nbrnn, by best and by median. The last lines are
geometric means.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

SHAPES = [
    (35, 32, 64, 256),
    (35, 20, 192, 192),
    (100, 64, 64, 128),
    (1000, 1, 64, 64),
    (100, 1, 128, 128),
    (50, 16, 512, 512),
    (50, 256, 64, 64),
]
D2L = (35, 32, 28, 256)  # T, B, vocabulary, H
WORK = ("train", "infer", "step")
CELLS = ("LSTM", "GRU", "RNN")


# ------------------------------------------------------------------ engines: a function for every case


def nbrnn_case(work, cell, shape, dtype, threads):
    import numpy as np

    import nbrnn

    nbrnn.set_num_threads(threads)
    T, B, I, H = shape
    rng = np.random.default_rng(0)
    if work == "step":
        model = nbrnn.Sequential(getattr(nbrnn, cell)(I, H, dtype=dtype), nbrnn.Linear(H, I, dtype=dtype))
        trainer = nbrnn.Trainer(model, nbrnn.CrossEntropy(), nbrnn.SGD(1.0), clip_norm=1.0)
        x, target = rng.integers(0, I, (2, T, B))
        return lambda: trainer.step(x, target)
    layer = getattr(nbrnn, cell)(I, H, dtype=dtype)
    x, dy = (rng.standard_normal((T, B, size)).astype(dtype) for size in (I, H))
    if work == "infer":
        return lambda: layer(x)
    grads = nbrnn.Parameters.zeros(layer.params.shapes, layer.dtype)

    def train():
        layer.params.flat[0] += 1e-6  # as after an update: nothing packed may be used again
        _, _, pullback = layer.vjp(x)
        pullback(dy, out=grads)

    return train


def torch_case(work, cell, shape, dtype, threads):
    import torch
    from torch.nn import functional as F

    torch.set_num_threads(threads)
    T, B, I, H = shape
    kind = getattr(torch, dtype)
    layer = getattr(torch.nn, cell)(I, H, dtype=kind)
    if work == "step":
        head = torch.nn.Linear(H, I, dtype=kind)
        params = [*layer.parameters(), *head.parameters()]
        optimizer = torch.optim.SGD(params, 1.0)
        tokens, target = torch.randint(0, I, (2, T, B))

        def step():
            optimizer.zero_grad()
            logits = head(layer(F.one_hot(tokens, I).to(kind))[0])
            F.cross_entropy(logits.reshape(-1, I), target.reshape(-1)).backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()

        return step
    x = torch.randn(T, B, I, dtype=kind, requires_grad=work == "train")
    dy = torch.randn(T, B, H, dtype=kind)

    def infer():
        with torch.inference_mode():
            layer(x)

    def train():
        layer.zero_grad(set_to_none=False)
        x.grad = None
        layer(x)[0].backward(dy)

    return train if work == "train" else infer


def onnxruntime_case(work, cell, shape, dtype, threads):
    """Inference in float32 only: that is what it has."""
    if work != "infer" or dtype != "float32":
        return None
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    T, B, I, H = shape
    G = {"LSTM": 4, "GRU": 3, "RNN": 1}[cell]
    rng = np.random.default_rng(0)
    weights = {"W": (1, G * H, I), "R": (1, G * H, H), "b": (1, 2 * G * H)}
    tensors = [
        onnx.numpy_helper.from_array((rng.standard_normal(size) * 0.05).astype("f4"), name)
        for name, size in weights.items()
    ]
    options = {"linear_before_reset": 1} if cell == "GRU" else {}
    node = helper.make_node(cell, ["X", *weights], ["Y"], hidden_size=H, **options)
    x = helper.make_tensor_value_info("X", TensorProto.FLOAT, (T, B, I))
    y = helper.make_tensor_value_info("Y", TensorProto.FLOAT, (T, 1, B, H))
    graph = helper.make_graph([node], "layer", [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    data = {"X": rng.standard_normal((T, B, I)).astype("f4")}
    return lambda: session.run(None, data)


ENGINES = {"nbrnn": nbrnn_case, "torch": torch_case, "onnxruntime": onnxruntime_case}


# ------------------------------------------------------------------ a process for each engine


def serve(make_case):
    """Answer requests on standard input: set up a case, time it for a while, or call it for its own results."""
    answers, sys.stdout = sys.stdout, io.StringIO()
    call = None
    for line in sys.stdin:
        request = json.loads(line)
        if "case" in request:
            call = make_case(*request["case"])
            for _ in range(3 if call else 0):
                call()
            answer = call is not None
        elif "results" in request:
            answer = call()
        else:
            answer, stop = [], time.perf_counter() + request["seconds"]
            while not answer or time.perf_counter() < stop:
                start = time.perf_counter()
                call()
                answer.append(time.perf_counter() - start)
        print(json.dumps(answer), file=answers, flush=True)


class Engine:
    """A process that serves one engine, by a script that takes --serve."""

    def __init__(self, name, script=__file__):
        self.name = name
        command = [sys.executable, script, "--serve", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def compare(engines, case, rounds):
    """{engine: (best, median)} in milliseconds."""
    able = [engine for engine in engines if engine.ask(case=case)]
    times = {engine.name: [] for engine in able}
    for _ in range(rounds):
        for engine in able:
            time.sleep(0.05)  # the last engine's threads stop spinning
            times[engine.name] += engine.ask(seconds=0.08)
    return {name: (1e3 * min(t), 1e3 * sorted(t)[len(t) // 2]) for name, t in times.items()}


# ------------------------------------------------------------------ the table


def print_table(work, cells, shapes, engines, dtype, threads, rounds):
    """One Markdown table; the ratios of the fastest other engine to nbrnn, by best and median."""
    names = [engine.name for engine in engines]
    print(f"\n{work}, {dtype}, {threads} threads: best (median) in ms\n")
    print("| case | " + " | ".join(names) + " | ratio, best | ratio, median |")
    print("| --- |" + " ---: |" * (len(names) + 2))
    for cell in cells:
        ratios = []
        for shape in shapes:
            found = compare(engines, (work, cell, shape, dtype, threads), rounds)
            columns = ["{:.2f} ({:.2f})".format(*found[name]) if name in found else "-" for name in names]
            ours = found.pop("nbrnn")
            ratios.append([min(other[n] for other in found.values()) / ours[n] for n in (0, 1)])
            label = f"{cell} " + ",".join(map(str, shape))
            print(f"| {label} | {' | '.join(columns)} | {ratios[-1][0]:.2f} | {ratios[-1][1]:.2f} |", flush=True)
            if work == "step":
                T, B = shape[:2]
                print(f"| tokens/s | {T * B / ours[0] * 1e3:,.0f} | " + " | ".join(
                    f"{T * B / best * 1e3:,.0f}" for best, _ in found.values()) + " | | |")  # fmt: skip
        best, median = (geometric_mean(column) for column in zip(*ratios))
        print(f"| {cell}, geometric mean |{' |' * len(names)} {best:.2f} | {median:.2f} |", flush=True)


def geometric_mean(values):
    product = 1.0
    for value in values:
        product *= value
    return product ** (1.0 / len(values))


def shape_of(text):
    """The numbers of T,B,I,H."""
    T, B, I, H = (int(part) for part in text.split(","))
    return T, B, I, H


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=WORK, default=WORK)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS)
    parser.add_argument("--shapes", nargs="+", type=shape_of, metavar="T,B,I,H")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES)[1:], help="default: those installed")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--serve", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(ENGINES[args.serve])
        return
    others = args.engines or [name for name in list(ENGINES)[1:] if importlib.util.find_spec(name)]
    if not others:
        parser.error("no other engine is installed: pip install '.[bench]'")
    engines = [Engine(name) for name in ("nbrnn", *others)]
    for work in args.work:
        able = [e for e in engines if work == "infer" or e.name != "onnxruntime"]
        shapes = args.shapes or ([D2L] if work == "step" else SHAPES)
        print_table(work, args.cells, shapes, able, args.dtype, args.threads, args.rounds)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
