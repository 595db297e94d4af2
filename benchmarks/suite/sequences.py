"""Sequences as people have them: ragged batches, single steps of a stream, long ones that are recomputed."""

import numpy as np

import nbrnn

from .common import CELLS, layer_and_data


class Ragged:
    """Forward and backward of a batch whose lengths are uniform in [1, T], and of the full one."""

    params = (CELLS, ["full", "padded", "ragged"])
    param_names = ("cell", "form")

    def setup(self, cell, form):
        self.layer, self.x, self.dy = layer_and_data(cell, "200,64,128,128")
        lengths, self.how = np.random.default_rng(0).integers(1, 201, 64), {}
        if form == "padded":
            self.how = {"lengths": lengths}
        elif form == "ragged":
            self.x, self.dy = (nbrnn.Ragged.from_padded(array, lengths) for array in (self.x, self.dy))
        self.time_forward_backward()

    def time_forward_backward(self, *params):
        _, _, pullback = self.layer.vjp(self.x, **self.how)
        pullback(self.dy)


class Stream:
    """One time step of a session."""

    params = (CELLS, [32, 128, 256], [1, 16])
    param_names = ("cell", "H", "B")

    def setup(self, cell, hidden, rows):
        layer = getattr(nbrnn, cell)(hidden, hidden, seed=0)
        self.session, self.x = layer.stream(rows), np.ones((rows, hidden), "float32")
        self.session.step(self.x)

    def time_step(self, *params):
        self.session.step(self.x)


class Recomputed:
    """Forward and backward of 10,000 steps."""

    params = ([False, True],)
    param_names = ("recompute",)

    def setup(self, recompute):
        self.layer, rng = nbrnn.LSTM(32, 64, seed=0, recompute=recompute), np.random.default_rng(0)
        self.x, self.dy = (rng.standard_normal((10_000, 8, size)).astype("f4") for size in (32, 64))
        self.time_forward_backward()

    def time_forward_backward(self, *params):
        _, _, pullback = self.layer.vjp(self.x)
        pullback(self.dy)

    def peakmem_forward_backward(self, *params):
        self.time_forward_backward()
