"""What `nbrnn bench` says: the machine's peak, and how much of it the d2l.ai language model and its layer reach."""

from __future__ import annotations

from collections.abc import Iterator

from nbrnn.bench.engines import GATES, can, operations
from nbrnn.bench.peak import peak_operations
from nbrnn.bench.processes import Engine, compare

SHAPE = (35, 32, 28, 256)  # steps, rows, characters, hidden units
ROUNDS = 6
WORK = {"step": "training step", "infer": "inference, recurrent layer alone"}


def report(engines: list[Engine], threads: int) -> Iterator[str]:
    """The lines, each as soon as it is known; engines: nbrnn first."""
    peaks = {count: _peak(engines[0], count) for count in sorted({1, threads})}
    single = f", {peaks[1] / 1e9:.0f} on one" if threads > 1 else ""
    yield f"{'FMA peak':<22}{peaks[threads] / 1e9:.0f} GFLOP/s with threads: {threads}{single}; float32"
    (step,) = compare(engines[:1], ("stream", "LSTM", (1, 1, 128, 128), "float32", 1), ROUNDS).values()
    yield f"{'one step, LSTM 128':<22}{1e3 * step.best:.1f} us at batch 1, one thread"
    T, B, _, H = SHAPE
    for work, words in WORK.items():
        yield f"\nd2l.ai language model, {words}: T {T}, B {B}, H {H}\n"
        yield f"{'':<6}{'engine':<13}{'tokens/s':>11}{'ms':>9}{'GFLOP/s':>10}{'of the peak':>13}{'times slower':>15}"
        able = [engine for engine in engines if can(engine.name, work, "float32")]
        for cell in GATES:
            yield from _lines(able, work, cell, threads, peaks[threads])


def _lines(engines: list[Engine], work: str, cell: str, threads: int, peak: float) -> Iterator[str]:
    """A line for each engine."""
    found = compare(engines, (work, cell, SHAPE, "float32", threads), ROUNDS)
    for name, (best, _, ratio) in found.items():
        rate, tokens = operations(work, cell, SHAPE) / best * 1e3, SHAPE[0] * SHAPE[1] / best * 1e3
        slower = "" if name == "nbrnn" else f"{ratio:.2f}"
        line = f"{cell:<6}{name:<13}{tokens:>11,.0f}{best:>9.2f}{rate / 1e9:>10.0f}{rate / peak:>13.0%}{slower:>15}"
        yield line.rstrip()


def _peak(engine: Engine, threads: int) -> float:
    """Operations per second of our own tile on data in the nearest cache."""
    (times,) = compare([engine], ("peak", "", (0, 0, 0, 0), "float32", threads), ROUNDS).values()
    return peak_operations("float32", threads) / times.best * 1e3
