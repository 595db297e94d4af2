"""What the suites share: shapes, layers and data."""

import numpy as np

import nbrnn

# T, B, I, H: the d2l.ai network, a small batch, a single long row, much memory and little arithmetic
SHAPES = ["35,32,64,256", "100,1,128,128", "1000,1,64,64", "50,16,512,512", "50,256,64,64"]
CELLS = ["LSTM", "GRU", "RNN"]
THREADS = [1, 2]


def layer_and_data(cell, shape, dtype="float32"):
    """A layer, its input and a gradient of its output."""
    T, B, I, H = map(int, shape.split(","))
    rng = np.random.default_rng(0)
    layer = getattr(nbrnn, cell)(I, H, dtype=dtype, seed=0)
    x, dy = (rng.standard_normal((T, B, size)).astype(dtype) for size in (I, H))
    return layer, x, dy
