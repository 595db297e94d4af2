"""How time grows with the number of steps T, of rows B and of hidden units H.

    python benchmarks/scaling.py                          LSTM and GRU, some six minutes, 3 GB
    python benchmarks/scaling.py --cells GRU --work train --threads 1 --out results

Around T 50, B 32, I = H = 128 one size is changed at a time, over two powers of ten and with numbers that fill no
vector and no tile. Ideal time is that of the useful multiply-adds: it grows as T, as B and as the square of H, and none
of them costs more than another. What is said of each sweep:

    grows as     the exponent of time, fitted to the upper half of its points
    worst step   the most by which a point's time per multiply-add exceeds that of the point before it

Rounds go around all points, on one thread and on more, of a cell and a kind of work. Before a point is timed it is
called once for nothing, since the caches hold the point before it. Among the points is the FMA peak, our own tile on
data in the nearest cache: what threads give it, is all that they can give.

--out writes what is printed to scaling.md, and the times against T, B and H to scaling.png.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
from peers import GATES, geometric_mean
from tqdm import tqdm

import nbrnn
from nbrnn.bench.engines import nbrnn_case, operations
from nbrnn.bench.peak import peak_operations

CENTRE = {"T": 50, "B": 32, "H": 128}
SWEEPS = {
    "T": (10, 15, 20, 25, 35, 50, 75, 100, 200, 400, 800, 1600),
    "B": (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 17, 24, 31, 32, 33, 48, 64, 100, 128, 200, 256, 512),
    "H": (15, 16, 17, 24, 32, 33, 48, 64, 65, 100, 127, 128, 129, 160, 200, 255, 256, 257, 300, 400, 512, 513, 768,
          1024),
}  # fmt: skip
IDEAL = {"T": 1, "B": 1, "H": 2}
PEAK = "the FMA peak"
LEAST = 1e-3  # shorter calls say more of the entry of a parallel region than of the second thread


def shape_at(name, size):
    """The shape T,B,I,H of a sweep's point."""
    T, B, H = (CENTRE | {name: size}).values()
    return T, B, H, H


# ------------------------------------------------------------------ measuring


def measure(work, cell, counts, rounds):
    """{(shape, threads): (best, median)} in seconds, of all sweeps and the peak."""
    shapes = dict.fromkeys(shape_at(name, size) for name, sizes in SWEEPS.items() for size in sizes)
    cases = [(shape, threads) for shape in (*shapes, PEAK) for threads in counts]
    # Each number of threads has a layer of its own, which keeps what it prepared for them.
    calls = [nbrnn_case("peak" if shape == PEAK else work, cell, shape, "float32", n) for shape, n in cases]
    times = [[] for _ in cases]
    with tqdm(total=rounds * len(cases), desc=f"{cell} {work}", leave=False, ncols=80, disable=None) as bar:
        for _ in range(rounds):
            for (_, threads), call, found in zip(cases, calls, times):
                nbrnn.set_num_threads(threads)
                found += visit(call)
                bar.update()
    return {case: (min(found), float(np.median(found))) for case, found in zip(cases, times)}


def visit(call, seconds=0.02):
    """Times of calls for so long, at least of one."""
    call()
    found, stop = [], time.perf_counter() + seconds
    while not found or time.perf_counter() < stop:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


# ------------------------------------------------------------------ what the times say


def exponent(sizes, times):
    """That of time as a power of the size, on the upper half of the points."""
    half = len(sizes) // 2
    return np.polyfit(np.log(sizes[half:]), np.log(times[half:]), 1)[0]


def worst_step(sizes, costs):
    """The largest ratio of a cost to the one before it, and the two sizes."""
    return max((after / before, pair) for (before, after), pair in zip(pairwise(costs), pairwise(sizes)))


def sweep_of(found, work, cell, name, threads):
    """The best times of a sweep in seconds, and per multiply-add."""
    shapes = [shape_at(name, size) for size in SWEEPS[name]]
    times = [found[shape, threads][0] for shape in shapes]
    return times, [2 * t / operations(work, cell, shape) for t, shape in zip(times, shapes)]


# ------------------------------------------------------------------ tables


def table(*head):
    """The first two lines of a Markdown table: a column of words, the others of numbers."""
    return [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]


def points_table(found, work, cell, threads):
    yield f"\n{cell}, {work}, float32, threads: {threads}\n"
    yield from table("", "ms, best (median)", "ps per multiply-add", "GFLOP/s")
    for name, sizes in SWEEPS.items():
        for size, cost in zip(sizes, sweep_of(found, work, cell, name, threads)[1]):
            best, median = (1e3 * t for t in found[shape_at(name, size), threads])
            yield f"| {name} {size} | {best:.3f} ({median:.3f}) | {1e12 * cost:.1f} | {2e-9 / cost:.1f} |"


def growth_table(results, counts):
    yield "\nHow time grows\n"
    yield from table("", "threads", "size", "grows as", "worst step", "from", "to")
    for (work, cell), found in results.items():
        for threads in counts:
            for name, sizes in SWEEPS.items():
                times, costs = sweep_of(found, work, cell, name, threads)
                step, (before, after) = worst_step(sizes, costs)
                power = f"{name}^{exponent(sizes, times):.2f}"
                yield f"| {cell} {work} | {threads} | {name} | {power} | {step:.2f} | {before} | {after} |"


def threads_table(results, threads):
    yield f"\nThreads, {threads} against 1: how many times faster, where one takes more than {1e3 * LEAST:.0f} ms\n"
    yield from table("", "best (median)")
    for (work, cell), found in results.items():
        most = peak_operations("float32", threads) / peak_operations("float32", 1)
        best, median = (most * one / more for one, more in zip(found[PEAK, 1], found[PEAK, threads]))
        yield f"| {cell} {work}, {PEAK} | {best:.2f} ({median:.2f}) |"
        ratios = []
        for name, sizes in SWEEPS.items():
            for size in sizes:
                shape = shape_at(name, size)
                one, more = found[shape, 1], found[shape, threads]
                if one[0] > LEAST:
                    ratios.append((one[0] / more[0], one[1] / more[1]))
                    yield f"| {cell} {work}, {name} {size} | {ratios[-1][0]:.2f} ({ratios[-1][1]:.2f}) |"
        for words, summary in ("geometric mean", geometric_mean), ("least", min):
            best, median = map(summary, zip(*ratios))
            yield f"| **{cell} {work}, {words}** | {best:.2f} ({median:.2f}) |"


# ------------------------------------------------------------------ chart


def save_chart(results, counts, path):
    """A panel for each size, with a line of the ideal slope."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, panels = pyplot.subplots(1, len(SWEEPS), figsize=(12, 4.5), sharey=True, layout="constrained")
    for panel, (name, sizes) in zip(panels, SWEEPS.items()):
        highest = 0.0
        for n, ((work, cell), found) in enumerate(results.items()):
            for threads, look in zip(counts, ("o-", "o:", "o--", "o-.")):
                times = 1e3 * np.array(sweep_of(found, work, cell, name, threads)[0])
                label = f"{cell} {work}, threads: {threads}"
                panel.loglog(sizes, times, look, color=f"C{n}", markersize=2.5, linewidth=1, label=label)
                highest = max(highest, times[-1])
        power, upper = IDEAL[name], np.array(sizes[len(sizes) // 2 :])
        ideal = 1.6 * highest * (upper / sizes[-1]) ** power  # beside the points
        panel.loglog(upper, ideal, color="black", linewidth=1)
        panel.annotate(f"slope {power}", (upper[0], ideal[0]), ha="right", fontsize=8)
        rest = ", ".join(f"{other} {size}" for other, size in CENTRE.items() if other != name)
        panel.set_title(f"{rest}{', I = H' if name == 'H' else ', I 128'}", fontsize=9)
        panel.set_xlabel(name)
        panel.xaxis.set_major_formatter(ticker.FormatStrFormatter("%d"))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ms, best")
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------ command line


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=GATES, default=["LSTM", "GRU"])
    parser.add_argument("--work", nargs="+", choices=("train", "infer"), default=["train", "infer"])
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, min(2, os.cpu_count() or 1)}))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write scaling.md and scaling.png")
    return parser.parse_args()


def main():
    args, lines, results = arguments(), [], {}

    def say(some):
        for line in some:
            print(line, flush=True)
            lines.append(line)

    for work in args.work:
        for cell in args.cells:
            results[work, cell] = found = measure(work, cell, args.threads, args.rounds)
            for threads in args.threads:
                say(points_table(found, work, cell, threads))
    if 1 in args.threads and max(args.threads) > 1:
        say(threads_table(results, max(args.threads)))
    say(growth_table(results, args.threads))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "scaling.md").write_text("\n".join(lines).strip() + "\n")
        save_chart(results, args.threads, args.out / "scaling.png")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
