"""A process for each engine, so that no two thread pools meet; what is timed goes around them in turn."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

# What has to be installed for each engine but our own
NEEDS = {
    "torch": ("torch",),
    "onnxruntime": ("onnxruntime", "onnx"),
    "openvino": ("openvino", "onnx"),
    "jax": ("jax",),
}


def installed() -> list[str]:
    """The other engines that can be measured here."""
    return [name for name, needs in NEEDS.items() if all(map(importlib.util.find_spec, needs))]


def serve(make_case: Callable[..., Callable | None]) -> None:
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
    """A process that serves one engine: this package's cases, or those of a script that takes --serve."""

    def __init__(self, name: str, script: str | None = None):
        self.name = name
        command = [sys.executable, *(["-m", "nbrnn.bench", name] if script is None else [script, "--serve", name])]
        root = str(Path(__file__).parents[2])  # the same sources, installed or not
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | paths)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: Any) -> None:
        self.process.kill()
        self.process.wait()

    def ask(self, **request: Any) -> Any:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name}: its process ended on {request}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class Times(NamedTuple):
    """What an engine took.

    Parameters
    ----------
    best, median : float
        Of all rounds, in milliseconds.
    slower : float
        Its best time of a round as a multiple of the first engine's in the same round: the median of all rounds. Where
        other work takes a core for seconds, all that ran meanwhile had the same machine.
    """

    best: float
    median: float
    slower: float


def compare(engines: list[Engine], case: tuple, rounds: int) -> dict[str, Times]:
    """The times of each engine, by its name."""
    found = {engine.name: [] for engine in engines}
    for engine in engines:
        engine.ask(case=case)
    for _ in range(rounds):
        for engine in engines:
            time.sleep(0.05)  # the last engine's threads stop spinning
            found[engine.name].append(engine.ask(seconds=0.08))
    first = found[engines[0].name]
    return {name: times_of(times, first) for name, times in found.items()}


def times_of(rounds: list[list[float]], first: list[list[float]]) -> Times:
    """Those of an engine, from the seconds of each round, its own and the first engine's."""
    every = sorted(1e3 * seconds for times in rounds for seconds in times)
    slower = median(min(times) / min(others) for times, others in zip(rounds, first))
    return Times(every[0], every[len(every) // 2], slower)
