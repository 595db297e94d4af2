"""The kernels alone: products in tiles, weight gradients, activations, packing, and what a parallel region costs."""

import numpy as np

from nbrnn.kernels import activations, gemm, jit
from nbrnn.kernels.simd import lanes_of, load, pointer, store
from nbrnn.kernels.tiles import VECTORS, outer_kernel, panel_width, product_kernel

from .common import DTYPES, THREADS, Suite, use_threads

ACTIVATIONS = ["exp", "sigmoid", "tanh", "softplus"]
OFTEN = 200  # calls in one: a single one is over before Python has entered compiled code


class Tile(Suite):
    """`gemm.multiply` of a panel and rows that lie in the nearest cache together: as fast as the FMA units go."""

    params = (DTYPES,)
    param_names = ("dtype",)
    rows, depth = 24, 64  # whole tiles of 4, 6 and 8 rows; 28 kB in all with the widest vectors

    def prepare(self, dtype):
        rng, columns = np.random.default_rng(0), panel_width(VECTORS, dtype)
        a = rng.standard_normal((self.rows, self.depth)).astype(dtype)
        packed = rng.standard_normal((1, self.depth, columns)).astype(dtype)
        start, out = np.zeros(columns, dtype), np.empty((self.rows, columns), dtype)
        kernel = product_kernel(VECTORS, dtype)
        one = jit.stage(gemm.multiply, 1, kernel, a, 0, 0, self.depth, packed, start, out)
        self.stages, self.operations = jit.Stages(*[one] * OFTEN), 2 * OFTEN * packed.size * self.rows
        self.time_200_products()

    def time_200_products(self, *params):
        self.stages.run()


class WeightGradient(Suite):
    """dw = dy.T @ x of an LSTM: T 35, B 32, H 256."""

    params = (DTYPES, THREADS)
    param_names = ("dtype", "threads")

    def prepare(self, dtype, threads):
        use_threads(threads)
        M, K, N = 35 * 32, 4 * 256, 256
        rng = np.random.default_rng(0)
        dy, x = (rng.standard_normal((M, size)).astype(dtype) for size in (K, N))
        side = x, 0, N, np.empty(0, np.int64), np.empty((K, N), dtype), np.empty(K, dtype)
        how = gemm.runs_of(K, dtype), 0, 0, False, 0
        one = jit.stage(gemm.gradient, threads, outer_kernel(VECTORS, dtype), dy, *how, *side, *gemm.alone(dtype))
        self.stages = jit.Stages(one)
        self.time_gradient()

    def time_gradient(self, *params):
        self.stages.run()


class Packing(Suite):
    """The recurrent weight of an LSTM with 256 hidden units, for the products forward and back."""

    params = (DTYPES, THREADS)
    param_names = ("dtype", "threads")

    def prepare(self, dtype, threads):
        use_threads(threads)
        P, weight = panel_width(VECTORS, dtype), np.ones((1024, 256), dtype)
        forward, back = np.empty((1024 // P, 256, P), dtype), np.empty((256 // P, 1024, P), dtype)
        order = np.arange(1024)
        self.rows = jit.Stages(jit.stage(gemm.pack_rows, threads, weight, order, forward))
        self.columns = jit.Stages(jit.stage(gemm.pack_columns, threads, weight, order, back))
        self.time_rows()
        self.time_columns()

    def time_rows(self, *params):
        self.rows.run()

    def time_columns(self, *params):
        self.columns.run()


def on_arrays(name):
    """A function of lanes as a kernel of whole arrays."""
    function = getattr(activations, name)

    def apply(s, shards, x, y):
        for n in range(0, len(x), lanes_of(pointer(x, 0))):
            store(pointer(y, n), function(load(pointer(x, n), len(x) - n)), len(x) - n)

    return jit.Kernel(apply, f"benchmark-{name}")


class Activations(Suite):
    """2,048 numbers that lie in the nearest cache."""

    params = (ACTIVATIONS, DTYPES)
    param_names = ("function", "dtype")

    def prepare(self, name, dtype):
        x = np.linspace(-10, 10, 2048, dtype=dtype)
        self.stages = jit.Stages(*[jit.stage(on_arrays(name), 1, x, np.empty_like(x))] * OFTEN)
        self.time_200_calls()

    def time_200_calls(self, *params):
        self.stages.run()


@jit.sharded
def nothing(s, shards):
    pass


class Region(Suite):
    """What it costs to enter compiled code, with and without a parallel region, 200 times."""

    params = (THREADS,)
    param_names = ("threads",)

    def prepare(self, threads):
        use_threads(threads)
        self.threads, one = threads, jit.stage(nothing, threads)
        self.one, self.many = jit.Stages(one), jit.Stages(*[one] * OFTEN)
        self.time_200_calls()
        self.time_200_stages()
        self.time_200_runs()

    def time_200_calls(self, *params):
        """Of stages that were prepared, as layers have them."""
        for _ in range(OFTEN):
            self.one.run()

    def time_200_stages(self, *params):
        """In a single call from Python."""
        self.many.run()

    def time_200_runs(self, *params):
        """That prepare their arguments."""
        for _ in range(OFTEN):
            jit.run(nothing, self.threads)
