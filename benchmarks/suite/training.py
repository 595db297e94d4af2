"""Training: forward and backward of one layer, and a whole step of the d2l.ai language model."""

import numpy as np

import nbrnn

from .common import CELLS, SHAPES, THREADS, layer_and_data


class ForwardBackward:
    params = (CELLS, SHAPES, ["float32", "float64"], THREADS)
    param_names = ("cell", "T,B,I,H", "dtype", "threads")

    def setup(self, cell, shape, dtype, threads):
        nbrnn.set_num_threads(min(threads, nbrnn.get_num_threads()))
        self.layer, self.x, self.dy = layer_and_data(cell, shape, dtype)
        self.time_forward_backward()

    def time_forward_backward(self, *params):
        _, _, pullback = self.layer.vjp(self.x)
        pullback(self.dy)

    def peakmem_forward_backward(self, *params):
        self.time_forward_backward()


class LanguageModelStep:
    """Tokens in, loss, clipping, SGD: T 35, B 32, H 256, 28 characters."""

    params = (CELLS,)
    param_names = ("cell",)

    def setup(self, cell):
        rng = np.random.default_rng(0)
        model = nbrnn.Sequential(getattr(nbrnn, cell)(28, 256, seed=0), nbrnn.Linear(256, 28, seed=1))
        self.trainer = nbrnn.Trainer(model, nbrnn.CrossEntropy(), nbrnn.SGD(1.0), clip_norm=1.0)
        self.x, self.target = rng.integers(0, 28, (2, 35, 32))
        self.time_step(cell)

    def time_step(self, cell):
        self.trainer.step(self.x, self.target)
