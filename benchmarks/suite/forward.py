"""Inference of one layer."""

from .common import CELLS, DTYPES, SHAPES, THREADS, Suite, layer_and_data, use_threads


class Forward(Suite):
    params = (CELLS, SHAPES, DTYPES, THREADS)
    param_names = ("cell", "T,B,I,H", "dtype", "threads")

    def prepare(self, cell, shape, dtype, threads):
        use_threads(threads)
        self.layer, self.x, _ = layer_and_data(cell, shape, dtype)
        self.warm(self.time_forward)

    def time_forward(self, *params):
        self.layer(self.x)
