"""What the suites share: shapes, layers, data, and what asv should know of a suite."""

import numpy as np

import nbrnn

# T, B, I, H: the d2l.ai network, a small batch, a single long row, much memory and little arithmetic
SHAPES = ["35,32,64,256", "100,1,128,128", "1000,1,64,64", "50,16,512,512", "50,256,64,64"]
CELLS = ["LSTM", "GRU", "RNN"]
DTYPES = ["float32", "float64"]
THREADS = [1, 2]


class Suite:
    """Benchmarks of something that `prepare` makes, and compiles, once in a process.

    asv calls `setup` before every single timed call: a new layer each time would show the first calls of layers.
    """

    timeout = 300  # of a cold compile cache
    repeat = (5, 100, 1.0)  # samples at least and at most, and seconds for them
    prepared = False

    def setup(self, *params):
        if not self.prepared:
            self.prepare(*params)
            self.prepared = True

    def warm(self, *calls):
        """Compile what calls of a layer need: the second one compares the weights with those that the first packed."""
        for call in calls * 2:
            call()


def use_threads(threads):
    """Use so many threads, or let asv leave out the benchmark where there are fewer."""
    try:
        nbrnn.set_num_threads(threads)
    except ValueError as error:
        raise NotImplementedError from error


def layer_and_data(cell, shape, dtype="float32"):
    """A layer, its input and a gradient of its output."""
    T, B, I, H = map(int, shape.split(","))
    rng = np.random.default_rng(0)
    layer = getattr(nbrnn, cell)(I, H, dtype=dtype, seed=0)
    x, dy = (rng.standard_normal((T, B, size)).astype(dtype) for size in (I, H))
    return layer, x, dy
