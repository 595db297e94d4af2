"""Figures other than times, one number a commit. Of all of them less is better: asv calls any rise a regression."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from nbrnn.kernels import jit

from . import BENCHMARKS, PACKAGE, kernels
from .common import DTYPES, Suite, layer_and_data, use_threads
from .startup import STEP, run


def best_times(*calls, seconds=3.0):
    """The shortest time of each call, in seconds; taken in turn, so that all meet the same neighbours."""
    best, stop = [float("inf")] * len(calls), time.perf_counter() + seconds
    while time.perf_counter() < stop:
        for n, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[n] = min(best[n], time.perf_counter() - start)
    return best


class Arithmetic(Suite):
    """Forward and backward of an LSTM, T 35, B 32, I 64, H 256, on one thread, against the tile."""

    params = (DTYPES,)
    param_names = ("dtype",)

    def prepare(self, dtype):
        use_threads(1)
        self.tile = kernels.Tile()
        self.tile.prepare(dtype)
        self.layer, self.x, self.dy = layer_and_data("LSTM", "35,32,64,256", dtype)
        weights = sum(view.size for view in self.layer.params.values() if view.ndim == 2)
        self.operations = 6 * 35 * 32 * weights  # a product forward and two back, of a multiplication and an addition
        self.warm(self.train)

    def train(self):
        _, _, pullback = self.layer.vjp(self.x)
        pullback(self.dy)

    def track_time_per_operation(self, *params):
        (seconds,) = best_times(self.train)
        return 1e9 * seconds / self.operations

    def track_lost_share_of_peak(self, *params):
        """What is missing to the FMA peak, which is the tile's speed."""
        train, tile = best_times(self.train, self.tile.time_200_products)
        return 100 * (1 - (self.operations / train) / (self.tile.operations / tile))

    track_time_per_operation.unit = "ns/FLOP"
    track_lost_share_of_peak.unit = "%"


class Accuracy(Suite):
    """The worst error of an activation, in units in the last place, against NumPy in a longer type."""

    params = (kernels.ACTIVATIONS, DTYPES)
    param_names = ("function", "dtype")
    exact = {  # noqa: RUF012
        "exp": np.exp,
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
        "tanh": np.tanh,
        "softplus": lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))),
    }

    def prepare(self, name, dtype):
        longer = np.float64 if dtype == "float32" else np.longdouble
        if np.finfo(longer).nmant <= np.finfo(dtype).nmant:
            raise NotImplementedError("long double is no longer than double here")
        self.x = np.linspace(-20, 20, 200_001, dtype=dtype)
        self.want, self.kernel = self.exact[name](self.x.astype(longer)), kernels.on_arrays(name)

    def track_worst_error(self, *params):
        found = np.empty_like(self.x)
        jit.run(self.kernel, 1, self.x, found)
        unit = np.spacing(np.abs(self.want).astype(found.dtype))
        return float(np.max(np.abs(found - self.want) / unit))

    track_worst_error.unit = "ulp"


def checkout():
    """The sources of what is measured: asv's checkout of the commit, else that of the package, else ours."""
    folders = [Path(os.environ.get("ASV_ENV_DIR", PACKAGE)) / "project", PACKAGE.parent, BENCHMARKS.parent]
    return next(folder for folder in folders if (folder / "pyproject.toml").is_file())


class Sizes:
    timeout = 300

    def track_compile_cache(self):
        """After one training step of a language model."""
        with tempfile.TemporaryDirectory() as cache:
            run(STEP, cache)
            return sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file()) / 1e6

    def track_wheel(self):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, str(checkout())]
            subprocess.run(command, check=True)
            return next(Path(folder).glob("*.whl")).stat().st_size / 1e3

    track_compile_cache.unit = "MB"
    track_wheel.unit = "kB"
