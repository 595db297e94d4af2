"""Training: forward and backward of one layer, backward alone, and a whole step of the d2l.ai language model."""

import numpy as np

import nbrnn

from .common import CELLS, DTYPES, SHAPES, THREADS, Suite, layer_and_data, use_threads


class ForwardBackward(Suite):
    params = (CELLS, SHAPES, DTYPES, THREADS)
    param_names = ("cell", "T,B,I,H", "dtype", "threads")

    def prepare(self, cell, shape, dtype, threads):
        use_threads(threads)
        self.layer, self.x, self.dy = layer_and_data(cell, shape, dtype)
        self.warm(self.time_forward_backward)

    def time_forward_backward(self, *params):
        _, _, pullback = self.layer.vjp(self.x)
        pullback(self.dy)

    def peakmem_forward_backward(self, *params):
        self.time_forward_backward()


class Backward(Suite):
    """The pullback alone, which can be called once: forward runs before every call, outside of the time."""

    params = (CELLS, SHAPES, DTYPES, THREADS)
    param_names = ("cell", "T,B,I,H", "dtype", "threads")
    number, warmup_time = 1, 0

    def prepare(self, cell, shape, dtype, threads):
        use_threads(threads)
        self.layer, self.x, self.dy = layer_and_data(cell, shape, dtype)
        self.layer.vjp(self.x)[2](self.dy)

    def setup(self, *params):
        super().setup(*params)
        _, _, self.pullback = self.layer.vjp(self.x)

    def time_backward(self, *params):
        self.pullback(self.dy)


class LanguageModelStep(Suite):
    """Tokens in, loss, clipping, SGD: T 35, B 32, H 256, 28 characters."""

    params = (CELLS, DTYPES, THREADS)
    param_names = ("cell", "dtype", "threads")

    def prepare(self, cell, dtype, threads):
        use_threads(threads)
        layer = getattr(nbrnn, cell)(28, 256, dtype=dtype, seed=0)
        model = nbrnn.Sequential(layer, nbrnn.Linear(256, 28, dtype=dtype, seed=1))
        self.trainer = nbrnn.Trainer(model, nbrnn.CrossEntropy(), nbrnn.SGD(1.0), clip_norm=1.0)
        self.x, self.target = np.random.default_rng(0).integers(0, 28, (2, 35, 32))
        self.warm(self.time_step)

    def time_step(self, *params):
        self.trainer.step(self.x, self.target)

    def peakmem_step(self, *params):
        self.time_step()
