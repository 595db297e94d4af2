"""Rewrite README.md's comparison with other engines from what `peers.py --out FOLDER` measured.

    python benchmarks/peers.py --out results && python benchmarks/readme.py results
    python benchmarks/readme.py monday tuesday --to /tmp/copy/README.md

What stands between the two comments `<!-- peers -->` and `<!-- /peers -->` is replaced: by a row for each cell and kind
of work, and by the chart, in docs/img beside the README. Of several runs of the same work, on a machine that is busy
now and then, it takes the best time of each engine, and the median of the ratios.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import textwrap
from collections import defaultdict
from pathlib import Path

from peers import ROOT, geometric_mean, ratios_of, save_chart

BEGIN, END = "<!-- peers -->", "<!-- /peers -->"
ENGINES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "jax": "JAX"}
WORK = {
    "train": "forward and backward",
    "infer": "inference",
    "step": "training step, d2l.ai model",
    "zaremba": "training step, Zaremba et al.",
}


def section(known):
    """The Markdown of what peers.json holds."""
    versions, runs = known["engines"], known["runs"]
    interleaved = f"rounds interleaved, {runs} runs" if runs > 1 else "rounds interleaved"
    engines = [f"{ENGINES[n]} {'.'.join(versions[n].split('.')[:2])}" for n in ENGINES if n in versions]
    others = " and ".join(filter(None, (", ".join(engines[:-1]), engines[-1])))
    words = f"""Against {others} on the same machine ({known["machine"]}), each engine in its own process,
        {interleaved}. How many times the fastest of them takes as long as nbrnn, by best times and, in brackets,
        round by round: the geometric mean of all shapes, and the least favourable one. On a shared machine only ratios
        mean something, and they move by a tenth from run to run. `python benchmarks/peers.py` makes the whole
        table."""
    lines = textwrap.wrap(" ".join(words.split()), 120)
    groups = defaultdict(lambda: defaultdict(list))
    for case in known["cases"]:
        groups[case["dtype"], case["threads"]][case["work"], case["cell"]].append(case)
    for (dtype, threads), rows in groups.items():
        head = f"{dtype}, {threads} thread{'s' * (threads > 1)}"
        lines += ["", f"| {head} | shapes | geometric mean | least |", "| --- | ---: | ---: | ---: |"]
        for (work, cell), cases in rows.items():
            columns = list(zip(*map(ratios_of, cases)))  # by best, by round
            mean, least = ("{:.2f} ({:.2f})".format(*map(summary, columns)) for summary in (geometric_mean, min))
            lines.append(f"| {cell}, {WORK[work]} | {len(cases)} | {mean} | {least} |")
    lines += ["", "![Times of the fastest other engine, nbrnn = 1, shape by shape](docs/img/peers.png)"]
    return "\n".join(lines)


def merged(runs):
    """Several runs as one: the best times of all, and the medians of their medians and of their ratios."""
    found, engines = defaultdict(list), {}
    for run in runs:
        engines |= run["engines"]
        for case in run["cases"]:
            found[case["work"], case["cell"], tuple(case["shape"]), case["dtype"], case["threads"]].append(case)
    cases = []
    for same in found.values():
        ms = {}
        for engine in dict.fromkeys(name for case in same for name in case["ms"]):
            best, *middle = zip(*(case["ms"][engine] for case in same if engine in case["ms"]))
            ms[engine] = min(best), *map(statistics.median, middle)
        cases.append(same[0] | {"ms": ms})
    return {"machine": runs[0]["machine"], "engines": engines, "cases": cases, "runs": len(runs)}


def rewrite(folders, path):
    """Put the section into a README, and the chart beside it."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{path}: there are no comments {BEGIN} and {END}")
    known = merged([json.loads((folder / "peers.json").read_text()) for folder in folders])
    text = section(known)
    images = path.parent / "docs" / "img"
    images.mkdir(parents=True, exist_ok=True)
    if len(folders) == 1:
        shutil.copy(folders[0] / "peers.png", images)
    else:
        save_chart(known["cases"], images / "peers.png")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--to", type=Path, default=ROOT / "README.md", metavar="README")
    args = parser.parse_args()
    rewrite(args.folders, args.to)


if __name__ == "__main__":
    main()
