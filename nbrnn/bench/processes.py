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
from typing import Any

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


def compare(engines: list[Engine], case: tuple, rounds: int) -> dict[str, tuple[float, float]]:
    """{engine: (best, median)} in milliseconds."""
    times = {engine.name: [] for engine in engines}
    for engine in engines:
        engine.ask(case=case)
    for _ in range(rounds):
        for engine in engines:
            time.sleep(0.05)  # the last engine's threads stop spinning
            times[engine.name] += engine.ask(seconds=0.08)
    return {name: (1e3 * min(t), 1e3 * sorted(t)[len(t) // 2]) for name, t in times.items()}
