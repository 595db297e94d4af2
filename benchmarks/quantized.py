"""Inference with rounded products: time and error of bfloat16 and int8, beside other engines' dynamic quantization.

    python benchmarks/quantized.py
    python benchmarks/quantized.py --shapes 25,1,512,512 --threads 1

PyTorch quantizes a layer with `torch.ao.quantization.quantize_dynamic`, ONNX Runtime a model with
`onnxruntime.quantization.quantize_dynamic`, which knows the LSTM but not the GRU. Each engine works in a process of its
own, in turn. The error is that of all outputs, relative to the engine's own in float32: the norm of the difference
divided by the norm.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
from peers import Engine, compare, installed, serve, shape_of

SHAPES = [(25, 1, 512, 512), (25, 4, 512, 512), (50, 16, 512, 512), (35, 32, 256, 256)]
OWN = ["nbrnn float32", "nbrnn bfloat16", "nbrnn int8"]
OTHERS = ["torch int8", "onnxruntime int8"]


def nbrnn_layers(precision, cell, shape, threads):
    """Calls for the outputs of a layer: rounded, and in float32."""
    import nbrnn

    nbrnn.set_num_threads(threads)
    T, B, I, H = shape
    kind, x = getattr(nbrnn, cell), np.random.default_rng(0).standard_normal((T, B, I)).astype("f4")
    whole = kind(I, H, seed=0)
    layer = kind(I, H, seed=0, products=None if precision == "float32" else precision).freeze()
    return lambda: layer(x)[0], lambda: whole(x)[0]


def torch_layers(precision, cell, shape, threads):
    import torch

    warnings.simplefilter("ignore")  # of what will once replace this
    torch.set_num_threads(threads)
    T, B, I, H = shape
    kind = getattr(torch.nn, cell)
    whole, x = kind(I, H), torch.randn(T, B, I)
    layer = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(whole), {kind}, dtype=torch.qint8)

    def call(module):
        with torch.inference_mode():
            return module(x)[0].numpy()

    return lambda: call(layer), lambda: call(whole)


def onnxruntime_layers(precision, cell, shape, threads):
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from nbrnn.bench.engines import onnx_layer

    if cell != "LSTM":
        return None
    model, data = onnx_layer(cell, shape)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        before.write_bytes(model)
        quantize_dynamic(before, after, per_channel=True, weight_type=QuantType.QInt8)
        whole, layer = (
            onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
            for path in (before, after)
        )
    return lambda: layer.run(None, data)[0], lambda: whole.run(None, data)[0]


LAYERS = {"nbrnn": nbrnn_layers, "torch": torch_layers, "onnxruntime": onnxruntime_layers}


def case_of(name):
    """What a process serves: the call to be timed, or one that returns the error."""
    engine, precision = name.split()

    def make(what, *case):
        layers = LAYERS[engine](precision, *case)
        if layers is None or what == "time":
            return layers and layers[0]
        got, want = (np.asarray(call(), np.float64) for call in layers)
        return lambda: float(np.linalg.norm(got - want) / np.linalg.norm(want))

    return make


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=SHAPES, metavar="T,B,I,H")
    parser.add_argument("--cells", nargs="+", default=["LSTM", "GRU"])
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(case_of(args.serve))
        return
    there = installed()
    engines = [Engine(name, __file__) for name in OWN + [name for name in OTHERS if name.split()[0] in there]]
    print(f"Inference, {args.threads} thread(s): best of {args.rounds} rounds in ms, and the relative error\n")
    print("| cell | T,B,I,H |" + "".join(f" {engine.name} |" for engine in engines))
    print("| --- | --- |" + " ---: |" * len(engines))
    for cell in args.cells:
        for shape in args.shapes:
            case, errors = (cell, shape, args.threads), {}
            for engine in engines:
                if engine.ask(case=("error", *case)):
                    errors[engine.name] = engine.ask(results=True)
            able = [engine for engine in engines if engine.name in errors]
            times = compare(able, ("time", *case), args.rounds)
            cells = [f"{times[e.name].best:.2f}, {errors[e.name]:.1e}" if e in able else "" for e in engines]
            print(f"| {cell} | {','.join(map(str, shape))} | {' | '.join(cells)} |", flush=True)
    for engine in engines:
        engine.close()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
