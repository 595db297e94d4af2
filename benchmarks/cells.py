"""What a cell costs: training time per useful operation against the plain LSTM, and against PyTorch.

    python benchmarks/cells.py                       every cell of the registry and some options
    python benchmarks/cells.py --shapes 50,16,512,512 --cases "peephole_lstm" "lstm zoneout"
    python benchmarks/cells.py --torch eager compiled

A case is a cell and perhaps an option. All of ours run in one process and in turn, those in PyTorch in another, some
rounds of each at a time. The cells in PyTorch are the same equations, evaluated step by step by its autograd; compiled,
a step is one function that went through torch.compile (which needs a C++ compiler, and a minute for each case).

"Of the peak" is the share of what our own tile does on data in the nearest cache, measured between the rounds. How
many times PyTorch is slower, divided by that share, is the most that anyone could reach. "Time per operation" is that
of best times and, in brackets, the median over parts of the rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from peers import Engine, serve, shape_of, times_of

SHAPES = [(35, 32, 64, 256), (35, 20, 192, 192), (100, 64, 64, 128)]
PARTS = 5  # in which the rounds are taken
OPTIONS = {
    "": {},
    "projected": {"proj_size": 0.5},
    "zoneout": {"zoneout": 0.1},
    "recurrent dropout": {"recurrent_dropout": 0.2},
    "clip": {"clip": 3.0},
    "hard sigmoid, softsign": {"activations": ("hard_sigmoid", "softsign", "softsign")},
    "derived": {},
}


def layer_of(case, I, H, dtype="float32"):
    """The layer of a case: a cell's name, and an option's."""
    import nbrnn
    from nbrnn.cells.cell import CELLS

    name, _, option = case.partition(" ")
    cell, options = CELLS[name], dict(OPTIONS[option])
    if "proj_size" in options:
        options["proj_size"] = int(H * options["proj_size"])
    if option == "derived":
        cell = replace(cell, name=f"{name}_derived", backward=None)
    if cell.given:
        options["given"] = dict.fromkeys(cell.given, 0.5)
    return nbrnn.Recurrent(cell, I, H, dtype=dtype, **options)


def operations(layer, T, B):
    """Useful floating-point operations of a training step: three products for each matrix."""
    matrices = sum(view.size for name, view in layer.params.items() if view.ndim == 2 and name[:9] != "weight_c")
    return 6 * T * B * matrices


def training_step(case, shape):
    import numpy as np

    import nbrnn

    T, B, I, H = shape
    layer = layer_of(case, I, H)
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((T, B, size)).astype("f4") for size in (I, layer.output_size))
    grads = nbrnn.Parameters.zeros(layer.params.shapes, layer.dtype)

    def step():
        layer.params.flat[0] += 1e-6  # as after an update: nothing packed may be used again
        _, _, pullback = layer.vjp(x)
        pullback(dy, out=grads)

    return step, operations(layer, T, B)


# ------------------------------------------------------------------ the same in PyTorch


def torch_step(case, shape, threads, compiled):
    """A training step of a cell in PyTorch; its equations are those of the cell, on tensors."""
    import torch

    from nbrnn.cells.cell import Cell
    from nbrnn.cells.program import call

    torch.set_num_threads(threads)
    patch_functions(torch)
    T, B, I, H = shape
    layer = layer_of(case, I, H)
    cell: Cell = layer.cell
    p = {name: torch.tensor(view, requires_grad=True) for name, view in layer.params.items()}
    x, dy = torch.randn(T, B, I), torch.randn(T, B, layer.output_size)
    given = tuple(torch.tensor(0.5) for _ in cell.given)
    act, G = layer.activations, len(cell.gates)

    def products(h, states, own, ahead):
        """The pre-activations in the order of the equations."""
        if not cell.feedback:
            return ahead.chunk(G, 1)
        if cell.second:
            w, b = p["weight_hh_l0"], p["bias_hh_l0"]
            first = (ahead[:, : 2 * H] + torch.addmm(b[: 2 * H], h, w[: 2 * H].T)).chunk(2, 1)
            middle = call(cell.operand, first, states, own, act, given)
            return (*first, ahead[:, 2 * H :] + torch.addmm(b[2 * H :], middle, w[2 * H :].T))
        if cell.norms:
            both = ahead, h @ p["weight_hh_l0"].T
            return [gate for a in both for gate in torch.nn.functional.layer_norm(a, a.shape[1:]).chunk(G, 1)]
        back = torch.addmm(p["bias_hh_l0"], h, p["weight_hh_l0"].T)
        if cell.separate:
            (i_r, i_z, i_n), (h_r, h_z, h_n) = ahead.chunk(G, 1), back.chunk(G, 1)
            return i_n, i_r + h_r, i_z + h_z, h_n
        return (ahead + back).chunk(G, 1)

    def one(h, states, own, ahead):
        """One time step."""
        gates = products(h, states, own, ahead)
        new = call(cell.forward, gates, states, own, act, given)
        states = list(new if cell.finish else new[0])
        if cell.finish:
            normal = torch.nn.functional.layer_norm(states[0], states[0].shape[1:])
            states.insert(0, cell.finish(normal, gates, states, own, act))
        h = call(cell.emission, states, own, act) if cell.emission else states[0]
        if layer.proj_size:
            h = layer.projection(torch.nn.functional.linear(h, p["weight_hr_l0"], p.get("bias_hr_l0")))
        return h, states

    if compiled:
        one = torch.compile(one, dynamic=False)

    def step():
        for tensor in p.values():
            tensor.grad = None
        own = [row for kind in cell.own for row in own_rows(p[f"{kind.name}_l0"], kind, torch)]
        ahead = torch.nn.functional.linear(x, p["weight_ih_l0"], p.get("bias_ih_l0"))
        h, states, outputs = torch.zeros(B, layer.out_size), [torch.zeros(B, H) for _ in cell.states], []
        for t in range(T):
            h, states = one(h, states, own, ahead[t])
            outputs.append(h)
        torch.stack(outputs).backward(dy)

    return step


def own_rows(parameter, one, torch):
    parameter = parameter if one.exponent is None else torch.exp(one.exponent * parameter)
    return list(parameter) if one.rows > 1 else [parameter]


def patch_functions(torch):
    """Let the functions of equations work on tensors."""
    from nbrnn.cells import equations

    ours = {"where_less": lambda a, b, x, y: torch.where(a < b, x, y), "clip": torch.clamp}
    for name, function in equations.FUNCTIONS.items():
        found = ours.get(name) or getattr(torch, name, None) or getattr(torch.nn.functional, name)
        object.__setattr__(function, "on_arrays", found)


# ------------------------------------------------------------------ the table


def measure(calls, rounds):
    """The times of calls that take turns, in seconds."""
    times = [[] for _ in calls]
    for _ in range(rounds):
        for call, found in zip(calls, times):
            call()
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    return times


def add_row(case, shape, plain, others, threads, rounds):
    """Measure one case; plain: the step of the plain LSTM, and its operations."""
    import numpy as np

    from nbrnn.bench.peak import peak_call, peak_operations

    step, work = training_step(case, shape)
    peak = peak_call(np.float32, threads)
    others = others if " " not in case or case.endswith("projected") else []
    for other in others:
        other.ask(case=(case, shape, threads))
    ours, lstm, peaks, theirs = [], [], [], [[] for _ in others]
    for _ in range(PARTS):
        for found, times in zip((ours, lstm, peaks), measure([step, plain[0], peak], -(-rounds // PARTS))):
            found.append(times)
        for other, found in zip(others, theirs):
            found.append(other.ask(seconds=0.3))
    fewer = plain[1] / work  # operations, so that times are for the same work
    ms, relative = times_of(ours, ours), times_of(ours, lstm)
    best, middle = ms.best / times_of(lstm, lstm).best * fewer, relative.slower * fewer
    rate = work / ms.best * 1e3
    share = rate / (peak_operations(np.float32, threads) / times_of(peaks, peaks).best * 1e3)
    slower = "".join(f" {times_of(found, ours).slower:.1f} |" for found in theirs)
    print(f"| {case} | {ms.best:.2f} ({ms.median:.2f}) | {rate / 1e9:.0f} | {share:.0%} | {best:.2f} ({middle:.2f}) |"
          f"{slower}", flush=True)  # fmt: skip


def main():
    from nbrnn.cells.cell import CELLS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = [f"lstm {option}" for option in OPTIONS if option]
    parser.add_argument("--cases", nargs="+", default=[*CELLS, *options], metavar="CASE")
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=SHAPES, metavar="T,B,I,H")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--torch", nargs="*", choices=("eager", "compiled"), default=["eager"])
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(lambda case, shape, threads: torch_step(case, shape, threads, args.serve == "compiled"))
        return
    import nbrnn

    for case in args.cases:
        name, _, option = case.partition(" ")
        if name not in CELLS or option not in OPTIONS:
            known = f"cells: {', '.join(CELLS)}; options: {', '.join(filter(None, OPTIONS))}"
            parser.error(f"--cases: there is no {case!r}; {known}")
    nbrnn.set_num_threads(args.threads)
    others = [Engine(name, __file__) for name in args.torch if importlib.util.find_spec("torch")]
    for shape in args.shapes:
        print(f"\ntraining, T,B,I,H = {shape}, float32, {args.threads} threads: best (median) of {args.rounds}\n")
        print("| case | ms | GFLOP/s | of the peak | time per operation, LSTM = 1 |" + "".join(
            f" PyTorch {other.name}, times slower |" for other in others))  # fmt: skip
        print("| --- |" + " ---: |" * (4 + len(others)))
        plain = training_step("lstm", shape)
        for case in args.cases:
            add_row(case, shape, plain, others, args.threads, args.rounds)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
