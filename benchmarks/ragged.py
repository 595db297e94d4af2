"""Training on sequences of different lengths: time against the share of steps that are there, and against PyTorch.

    python benchmarks/ragged.py
    python benchmarks/ragged.py --shapes 100,32,64,256 --threads 1

Lengths are uniform in [1, T], or heavy-tailed: most sequences short, few long. The ratio of the ragged batch's time to
the full padded batch's would be the fill ratio at best. PyTorch takes the same batch as a packed sequence and as a full
padded one, in a process of its own, in turn.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

import numpy as np
from peers import Engine, serve, shape_of

SHAPES = [(200, 64, 128, 128), (100, 32, 64, 256), (50, 256, 64, 64)]


def lengths_of(kind, T, B):
    """The lengths of a batch, in no order; one is T."""
    rng = np.random.default_rng(0)
    if kind == "full":
        return np.full(B, T)
    if kind == "uniform":
        lengths = rng.integers(1, T + 1, B)
    else:
        lengths = np.clip(np.round(T / 20 * (1 + rng.pareto(1.0, B))), 1, T).astype(int)
    lengths[rng.integers(B)] = T
    return lengths


def nbrnn_step(form, kind, shape, threads):
    import nbrnn

    nbrnn.set_num_threads(threads)
    T, B, I, H = shape
    layer, rng, lengths = nbrnn.LSTM(I, H, seed=0), np.random.default_rng(0), lengths_of(kind, T, B)
    x, dy = (rng.standard_normal((T, B, size)).astype("f4") for size in (I, H))
    grads, how = nbrnn.Parameters.zeros(layer.params.shapes, "float32"), {}
    if form == "padded":
        how = {"lengths": lengths}
    elif form == "ragged":
        x, dy = (nbrnn.Ragged.from_padded(array, lengths) for array in (x, dy))

    def step():
        layer.params.flat[0] += 1e-6  # as after an update: nothing packed may be used again
        _, _, pullback = layer.vjp(x, **how)
        pullback(dy, out=grads)

    return step


def torch_step(form, kind, shape, threads):
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    torch.set_num_threads(threads)
    T, B, I, H = shape
    layer, lengths = torch.nn.LSTM(I, H), torch.tensor(lengths_of(kind, T, B))
    x, dy = torch.randn(T, B, I, requires_grad=True), torch.randn(T, B, H)

    def step():
        for tensor in (x, *layer.parameters()):
            tensor.grad = None
        if form == "plain":
            layer(x)[0].backward(dy)
        else:
            y, _ = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
            pad_packed_sequence(y)[0].backward(dy)

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=SHAPES, metavar="T,B,I,H")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(torch_step)
        return
    other = Engine("torch", __file__) if importlib.util.find_spec("torch") else None
    print(f"LSTM training, float32, {args.threads} threads: best of {args.rounds}, ms\n")
    print("| T,B,I,H | lengths | fill r | full | padded + lengths | Ragged | time / (r full) | PyTorch packed |"
          " times slower |")  # fmt: skip
    print("| --- | --- |" + " ---: |" * 7)
    for shape in args.shapes:
        for kind in ("uniform", "heavy-tailed"):
            T, B = shape[:2]
            fill = lengths_of(kind, T, B).sum() / (T * B)
            steps = [nbrnn_step(form, kind, shape, args.threads) for form in ("plain", "padded", "ragged")]
            times, ratios = [[] for _ in steps], []
            for _ in range(args.rounds):
                for step, found in zip(steps, times):
                    step()
                    start = time.perf_counter()
                    step()
                    found.append(time.perf_counter() - start)
                ratios.append((times[1][-1] / times[0][-1] / fill, times[2][-1] / times[0][-1] / fill))
            full, padded, ragged = (1e3 * min(found) for found in times)
            middle = np.median(ratios, axis=0)
            line = f"| {','.join(map(str, shape))} | {kind} | {fill:.2f} | {full:.1f} | {padded:.1f} | {ragged:.1f} |"
            line += (
                f" {padded / full / fill:.2f} / {ragged / full / fill:.2f} (median {middle[0]:.2f} / {middle[1]:.2f}) |"
            )
            if other:
                other.ask(case=("packed", kind, shape, args.threads))
                packed = 1e3 * min(other.ask(seconds=2.0))
                line += f" {packed:.1f} | {packed / padded:.1f} |"
            print(line, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
