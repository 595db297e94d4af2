"""Sequences as people have them: ragged batches, single steps of a stream, long ones that are recomputed."""

import numpy as np

import nbrnn

from .common import CELLS, DTYPES, THREADS, Suite, layer_and_data, use_threads


class Ragged(Suite):
    """Forward and backward of a batch whose lengths are uniform in [1, T], and of the full one."""

    params = (CELLS, ["full", "padded", "ragged"], DTYPES, THREADS)
    param_names = ("cell", "form", "dtype", "threads")

    def prepare(self, cell, form, dtype, threads):
        use_threads(threads)
        self.layer, self.x, self.dy = layer_and_data(cell, "200,64,128,128", dtype)
        lengths, self.how = np.random.default_rng(0).integers(1, 201, 64), {}
        if form == "padded":
            self.how = {"lengths": lengths}
        elif form == "ragged":
            self.x, self.dy = (nbrnn.Ragged.from_padded(array, lengths) for array in (self.x, self.dy))
        self.warm(self.time_forward_backward)

    def time_forward_backward(self, *params):
        _, _, pullback = self.layer.vjp(self.x, **self.how)
        pullback(self.dy)


class Stream(Suite):
    """Time steps of a session: a hundred, since asv times single calls and one step is short for its clock."""

    params = (CELLS, [32, 128, 256], [1, 16], DTYPES, THREADS)
    param_names = ("cell", "H", "B", "dtype", "threads")

    def prepare(self, cell, hidden, rows, dtype, threads):
        use_threads(threads)
        layer = getattr(nbrnn, cell)(hidden, hidden, dtype=dtype, seed=0)
        self.session, self.x = layer.stream(rows), np.ones((rows, hidden), dtype)
        self.time_100_steps()

    def time_100_steps(self, *params):
        for _ in range(100):
            self.session.step(self.x)


class Recomputed(Suite):
    """Forward and backward of 10,000 steps."""

    params = ([False, True],)
    param_names = ("recompute",)

    def prepare(self, recompute):
        self.layer, rng = nbrnn.LSTM(32, 64, seed=0, recompute=recompute), np.random.default_rng(0)
        self.x, self.dy = (rng.standard_normal((10_000, 8, size)).astype("f4") for size in (32, 64))
        self.warm(self.time_forward_backward)

    def time_forward_backward(self, *params):
        _, _, pullback = self.layer.vjp(self.x)
        pullback(self.dy)

    def peakmem_forward_backward(self, *params):
        self.time_forward_backward()
