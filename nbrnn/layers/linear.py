"""The linear layer: y = x W^T + b on the packed products, so that a row's result does not depend on its batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nbrnn.kernels import gemm
from nbrnn.kernels.jit import run
from nbrnn.kernels.schedule import shards_for
from nbrnn.kernels.tiles import VECTORS, outer_kernel, panel_width, product_kernel
from nbrnn.layers.initialise import Seed, check_scheme, fill, generator
from nbrnn.layers.module import Parameters, Pointwise, check_dtype, check_floats, check_size


class Linear(Pointwise):
    """y = x W^T + b.

    Parameters
    ----------
    input_size, output_size : int
    bias : bool
        Whether there is a bias.
    dtype : {"float32", "float64"}
    seed : int, numpy.random.Generator or None
    init : {"torch", "glorot", "orthogonal"}

    Attributes
    ----------
    params : Parameters
        ``weight`` (output_size, input_size) and ``bias`` (output_size,).

    Notes
    -----
    x is (..., input_size), y is (..., output_size), or both are `Ragged`. The layer has no memory: its state is None.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        *,
        dtype: Any = "float32",
        seed: Seed = None,
        init: str = "torch",
    ):
        self.input_size = check_size("input_size", input_size)
        self.output_size = check_size("output_size", output_size)
        self.bias, self.init, self.dtype = bool(bias), check_scheme(init), check_dtype(dtype)
        shapes = {"weight": (self.output_size, self.input_size)}
        if bias:
            shapes["bias"] = (self.output_size,)
        self.params = Parameters.zeros(shapes, self.dtype)
        fill(self.params, init, generator(seed), 1.0 / np.sqrt(self.input_size))
        self._order = gemm.plain_order(self.output_size, self.dtype)
        self._runs = gemm.runs_of(self.output_size, self.dtype)

    def _check(self, x: Any) -> np.ndarray:
        shape = (None,) * max(0, np.ndim(x) - 1) + (self.input_size,)
        return check_floats("x", x, self.dtype, shape, f"(..., {self.input_size})")

    def _apply(self, x: Any) -> np.ndarray:
        return self.frozen()(x)

    def frozen(self) -> Callable[[Any], np.ndarray]:
        packed = self._pack(gemm.pack_rows, self._order, self.input_size, self.output_size)
        start = np.zeros(len(self._order), self.dtype)
        if self.bias:
            start[: self.output_size] = self.params["bias"]

        def apply(x):
            x = self._check(x)
            y = self._multiply(x.reshape(-1, self.input_size), packed, start, self.output_size)
            return y.reshape(*x.shape[:-1], self.output_size)

        return apply

    def _linearise(self, x: Any) -> tuple[np.ndarray, Callable]:
        x = self._check(x)
        y = self._apply(x)

        def back(dy, grads):
            rows = check_floats("dy", dy, self.dtype, y.shape).reshape(-1, self.output_size)
            dbias = grads["bias"] if self.bias else np.empty(self.output_size, self.dtype)
            # dW = dy^T x, db = sum of dy
            right = x.reshape(-1, self.input_size), 0, self.input_size, np.empty(0, np.int64)
            how = outer_kernel(VECTORS, self.dtype), rows, *right, self._runs, 0, 0, False
            run(gemm.gradient, self._shards(len(rows)), *how, grads["weight"], dbias)
            # dx = dy W
            packed = self._pack(gemm.pack_columns, np.arange(self.output_size), self.output_size, self.input_size)
            start = np.zeros(gemm.padded(self.input_size, self.dtype), self.dtype)
            return self._multiply(rows, packed, start, self.input_size).reshape(x.shape)

        return y, back

    def _pack(self, entry: Any, order: np.ndarray, depth: int, columns: int) -> np.ndarray:
        packed = np.empty((gemm.panels(columns, self.dtype), depth, panel_width(VECTORS, self.dtype)), self.dtype)
        run(entry, self._shards(16), self.params["weight"], order, packed)
        return packed

    def _multiply(self, rows: np.ndarray, packed: np.ndarray, start: np.ndarray, columns: int) -> np.ndarray:
        y = np.empty((len(rows), columns), self.dtype)
        kernel = product_kernel(VECTORS, self.dtype)
        run(gemm.multiply, self._shards(len(rows)), kernel, rows, 0, 0, packed.shape[1], packed, start, y)
        return y

    def _shards(self, rows: int) -> int:
        return shards_for(2 * rows * self.input_size * self.output_size)

    def config(self) -> dict[str, Any]:
        names = ("input_size", "output_size", "bias", "init")
        return {name: getattr(self, name) for name in names} | {"dtype": self.dtype.name}
