"""Every cell of the registry: forward and backward of one layer."""

import numpy as np

import nbrnn
from nbrnn.cells.cell import CELLS


class Cells:
    params = (sorted(CELLS), ["float32", "float64"])
    param_names = ("cell", "dtype")

    def setup(self, name, dtype):
        cell, rng = CELLS[name], np.random.default_rng(0)
        layer = nbrnn.Recurrent(cell, 64, 256, dtype=dtype, seed=0, given=dict.fromkeys(cell.given, 0.5))
        self.layer, self.x = layer, rng.standard_normal((35, 32, 64)).astype(dtype)
        self.dy = rng.standard_normal((35, 32, layer.output_size)).astype(dtype)
        self.time_forward(name, dtype)
        self.time_forward_backward(name, dtype)

    def time_forward(self, name, dtype):
        self.layer(self.x)

    def time_forward_backward(self, name, dtype):
        _, _, pullback = self.layer.vjp(self.x)
        pullback(self.dy)
