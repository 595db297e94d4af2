"""Inference of one layer."""

import nbrnn

from .common import CELLS, SHAPES, THREADS, layer_and_data


class Forward:
    params = (CELLS, SHAPES, ["float32", "float64"], THREADS)
    param_names = ("cell", "T,B,I,H", "dtype", "threads")

    def setup(self, cell, shape, dtype, threads):
        nbrnn.set_num_threads(min(threads, nbrnn.get_num_threads()))
        self.layer, self.x, _ = layer_and_data(cell, shape, dtype)
        self.layer(self.x)

    def time_forward(self, cell, shape, dtype, threads):
        self.layer(self.x)
