"""nbrnn against other engines on the same work, interleaved in one run.

    python benchmarks/peers.py                        everything on the anchor shapes, some twelve minutes
    python benchmarks/peers.py --work step zaremba    whole training steps of language models
    python benchmarks/peers.py --set deepbench --rounds 5 --out results
    python benchmarks/peers.py --work train infer --cells LSTM --dtype float32 float64 --threads 1 2

Each engine works in a process of its own, so that no two thread pools share one, and the rounds go around the engines
in turn: on a busy machine only the ratios of one run mean something. PyTorch, ONNX Runtime, OpenVINO and JAX take part
where they are installed, in the work they can do; `nbrnn/bench/engines.py` says what a case is and how threads are set.

A row shows each engine's best and median time in milliseconds, the ratio of the fastest other engine to nbrnn, the
useful GFLOP/s of our best time, and its share of the peak. There are two ratios: that of the best times, and the median
over all rounds of the ratio of the best times of one round. The peak is what our own tile does on data in the nearest
cache, on as many threads, measured in the same process before each table. It stands above the table for one
thread too: where two reach well below twice as much, other work holds a core, the share is too high, and engines whose
threads wait for each other look slower than they are. The last lines are geometric means.

--out writes all tables to peers.md, the times as numbers to peers.json, and the ratios as bars to peers.png; of the
last two, `benchmarks/readme.py` makes a section of the README.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import sys
from collections import defaultdict
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the sources, installed or not

from nbrnn.bench.engines import ENGINES, GATES, can, operations  # noqa: E402
from nbrnn.bench.processes import Engine, Times, compare, installed, serve, times_of  # noqa: E402, F401  (for others)

WORK = ("train", "infer", "step", "zaremba")

# ------------------------------------------------------------------ shapes: T, B, I, H


def square(*sizes):
    """Shapes whose input is as wide as their state."""
    return [(T, B, H, H) for T, B, H in sizes]


ANCHORS = [
    (35, 32, 64, 256),
    (35, 20, 192, 192),
    (100, 64, 64, 128),
    (1000, 1, 64, 64),
    (100, 1, 128, 128),
    (50, 16, 512, 512),
    (50, 256, 64, 64),
]
# rnn_problems.h and the server inference of Baidu's DeepBench, in part.
DEEPBENCH = {
    "train": {
        "LSTM": square((25, 16, 512), (25, 128, 512), (25, 16, 1024), (25, 128, 1024), (150, 16, 256), (150, 64, 256),
                       (50, 8, 1536)),
        "GRU": square((1, 32, 512), (1500, 32, 1024)),
        "RNN": square((50, 16, 1760)),
    },
    "infer": {"LSTM": square((25, 1, 512), (25, 2, 512), (25, 4, 512))},
}  # fmt: skip


def onednn(framework_batches, gnmt_batch):
    """From oneDNN's tests/benchdnn/inputs/rnn: the cases named after PyTorch and PaddlePaddle, GNMT's encoder.

    The layers of 256 run in both directions there, here in one.
    """
    frameworks = square(*zip((50, 629), framework_batches, (500, 128)))
    gnmt = square(*((T, gnmt_batch, H) for H in (512, 256) for T in range(10, 71, 10)))
    return {"LSTM": frameworks + gnmt, "GRU": frameworks, "RNN": frameworks}


# set: work: cell: shapes
SETS = {
    "anchors": dict.fromkeys(("train", "infer"), dict.fromkeys(GATES, ANCHORS)),
    "deepbench": DEEPBENCH,
    "onednn": {"train": onednn((64, 128), 128), "infer": onednn((1, 1), 1)},
}
# The same in every set; I is the vocabulary.
MODELS = {
    "step": {cell: [(35, 32, 28, 256)] for cell in GATES},
    "zaremba": {"LSTM": [(20, 20, 10_000, 200), (35, 20, 10_000, 650)]},
}


# ------------------------------------------------------------------ the machine and its peak


def machine():
    """The processor in words."""
    from nbrnn.kernels.simd import instruction_set

    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    name = re.sub(r"\((R|TM)\)", "", named[1] if named else platform.processor() or platform.machine())
    return f"{name} with {instruction_set()}, {os.cpu_count()} cores"


def peak_of(engine, dtype, threads):
    """The operations per second of nbrnn's tile."""
    from nbrnn.bench.peak import peak_operations

    dtype = "float32" if dtype == "bfloat16" else dtype
    engine.ask(case=("peak", None, None, dtype, threads))
    return peak_operations(dtype, threads) / min(engine.ask(seconds=0.5))


# ------------------------------------------------------------------ tables and chart


class Report:
    """What is printed, and kept for files.

    Attributes
    ----------
    lines : list of str
    cases : list of dict
        What was measured: work, cell, shape, dtype, threads, and ms: `Times` of each engine.
    peaks : dict
        For each dtype and number of threads, the most operations per second measured so far.
    """

    def __init__(self):
        self.lines, self.cases, self.peaks = [], [], defaultdict(float)

    def say(self, line=""):
        print(line, flush=True)
        self.lines.append(line)

    def row(self, *cells):
        self.say(f"| {' | '.join(cells)} |")

    def peak(self, engine, dtype, threads):
        """Measure the peak again; the best so far, and a note."""
        notes = []
        for count in sorted({1, threads}):
            self.peaks[dtype, count] = max(self.peaks[dtype, count], peak_of(engine, dtype, count))
            notes.append(f"{self.peaks[dtype, count] / 1e9:.0f} (threads: {count})")
        return self.peaks[dtype, threads], f"FMA peak in GFLOP/s: {', '.join(notes)}"

    def save(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "peers.md").write_text("\n".join(self.lines).strip() + "\n")
        engines = dict.fromkeys(name for case in self.cases for name in case["ms"] if name != "nbrnn")
        versions = {name: metadata.version(name) for name in engines}
        known = {"machine": machine(), "engines": versions, "cases": self.cases}
        (folder / "peers.json").write_text(json.dumps(known, indent=1) + "\n")
        save_chart(self.cases, folder / "peers.png")


def ratios_of(case):
    """The fastest other engine's time to ours: by best times, and round by round."""
    others = [Times(*times) for name, times in case["ms"].items() if name != "nbrnn"]
    best = Times(*case["ms"]["nbrnn"]).best
    return min(other.best for other in others) / best, min(other.slower for other in others)


def label_of(case):
    return f"{case['cell']} {','.join(map(str, case['shape']))}"


def add_table(report, work, shapes, engines, dtype, threads, rounds):
    """One Markdown table; shapes: for each cell."""
    peak, note = report.peak(engines[0], dtype, threads)
    report.say(f"\n{work}, {dtype}, threads: {threads}, best (median) in ms; {note}\n")
    names = [engine.name for engine in engines]
    report.row("case", *names, "ratio, best", "by round", "GFLOP/s", "of peak")
    report.row("---", *["---:"] * (len(names) + 4))
    for cell in shapes:
        ratios = []
        for shape in shapes[cell]:
            found = compare(engines, (work, cell, shape, dtype, threads), rounds)
            case = {"work": work, "cell": cell, "shape": shape, "dtype": dtype, "threads": threads, "ms": found}
            report.cases.append(case)
            columns = [f"{times.best:.2f} ({times.median:.2f})" for times in found.values()]
            ratios.append(ratios_of(case))
            best, by_round = ratios[-1]
            speed = operations(work, cell, shape) / found["nbrnn"].best * 1e3
            rates = f"{speed / 1e9:.1f}", f"{speed / peak:.0%}"
            report.row(label_of(case), *columns, f"{best:.2f}", f"{by_round:.2f}", *rates)
            if work in MODELS:
                tokens = 1e3 * shape[0] * shape[1]
                report.row("tokens/s", *(f"{tokens / times.best:,.0f}" for times in found.values()), *[""] * 4)
        means = [f"{geometric_mean(column):.2f}" for column in zip(*ratios)]
        report.row(f"{cell}, geometric mean", *[""] * len(names), *means, "", "")


def geometric_mean(values):
    return math.prod(values) ** (1 / len(values))


def save_chart(cases, path):
    """Bars of the ratios by best, a dot for those round by round; a panel for each dtype and number of threads."""
    import matplotlib

    ratios = defaultdict(list)
    for case in cases:
        ratios[case["dtype"], case["threads"]].append((f"{case['work']} {label_of(case)}", *ratios_of(case)))

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    size = 6 * len(ratios), 1.5 + 0.22 * max(map(len, ratios.values()))
    figure, panels = pyplot.subplots(1, len(ratios), figsize=size, squeeze=False, layout="constrained")
    for panel, ((dtype, threads), cases) in zip(panels[0], ratios.items()):
        labels, best, by_round = zip(*cases)
        places = range(len(cases))
        colors = ["tab:blue" if ratio >= 1 else "tab:red" for ratio in best]
        panel.set_xscale("log")  # half and twice the time are as far from 1
        panel.barh(places, [ratio - 1 for ratio in best], left=1.0, color=colors)
        panel.plot(by_round, places, "k.", markersize=4)
        panel.axvline(1.0, color="black", linewidth=1)
        panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(ticker.NullFormatter())
        panel.set_yticks(places, [f"{label}: {ratio:.2f}" for label, ratio in zip(labels, best)], fontsize=7)
        panel.set_ylim(len(cases) - 0.4, -0.6)
        panel.set_xlabel("time of the fastest other engine / time of nbrnn: best (bar), by round (dot)", fontsize=8)
        panel.set_title(f"{dtype}, threads: {threads}", fontsize=10)
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------ command line


def shape_of(text):
    """The numbers of T,B,I,H."""
    T, B, I, H = (int(part) for part in text.split(","))
    return T, B, I, H


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    others = [name for name in ENGINES if name != "nbrnn"]
    parser.add_argument("--work", nargs="+", choices=WORK, default=WORK)
    parser.add_argument("--cells", nargs="+", choices=GATES, default=list(GATES))
    parser.add_argument("--set", choices=SETS, default="anchors", help="shapes of train and infer")
    parser.add_argument("--shapes", nargs="+", type=shape_of, metavar="T,B,I,H", help="these instead, in all work")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "float64", "bfloat16"), default=["float32"])
    parser.add_argument("--threads", nargs="+", type=int, default=[min(2, os.cpu_count() or 1)])
    parser.add_argument("--engines", nargs="+", choices=others, default=installed(), help="default: those installed")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write peers.md, peers.json and peers.png")
    args = parser.parse_args()
    if not args.engines:
        parser.error("no other engine is installed: pip install '.[bench]'")
    return args


def shapes_for(args, work):
    """{cell: shapes} of the chosen cells that have some."""
    chosen = (SETS[args.set] | MODELS)[work]
    return {cell: args.shapes or chosen[cell] for cell in args.cells if cell in chosen}


def main():
    args = arguments()
    report = Report()
    for threads in args.threads:
        engines = [Engine(name) for name in ("nbrnn", *args.engines)]
        for dtype in args.dtype:
            for work in args.work:
                able = [engine for engine in engines if can(engine.name, work, dtype)]
                shapes = shapes_for(args, work)
                if len(able) > 1 and shapes:
                    add_table(report, work, shapes, able, dtype, threads, args.rounds)
        for engine in engines:
            engine.close()
    if not report.lines:
        sys.exit("nothing to compare: no other engine does this work in this dtype, or the set has no such cell")
    if args.out:
        report.save(args.out)


if __name__ == "__main__":
    main()
