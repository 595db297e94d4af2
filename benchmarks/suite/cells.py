"""Every cell of the registry: forward and backward of one layer."""

import numpy as np

import nbrnn
from nbrnn.cells.cell import CELLS

from .common import DTYPES, THREADS, Suite, use_threads


class Cells(Suite):
    params = (sorted(CELLS), DTYPES, THREADS)
    param_names = ("cell", "dtype", "threads")

    def prepare(self, name, dtype, threads):
        use_threads(threads)
        cell, rng = CELLS[name], np.random.default_rng(0)
        layer = nbrnn.Recurrent(cell, 64, 256, dtype=dtype, seed=0, given=dict.fromkeys(cell.given, 0.5))
        self.layer, self.x = layer, rng.standard_normal((35, 32, 64)).astype(dtype)
        self.dy = rng.standard_normal((35, 32, layer.output_size)).astype(dtype)
        self.warm(self.time_forward, self.time_forward_backward)

    def time_forward(self, *params):
        self.layer(self.x)

    def time_forward_backward(self, *params):
        _, _, pullback = self.layer.vjp(self.x)
        pullback(self.dy)
