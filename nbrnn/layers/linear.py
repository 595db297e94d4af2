"""The linear layer: y = x W^T + b on the packed products, so that a row's result does not depend on its batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from nbrnn.kernels import gemm, half_gemm
from nbrnn.kernels.jit import Prepared, Stage, get_num_threads, prepare, stage
from nbrnn.kernels.memory import empty, in_turn, zeros
from nbrnn.kernels.products import products_of
from nbrnn.kernels.schedule import shards_for
from nbrnn.kernels.tiles import VECTORS, outer_kernel, panel_width
from nbrnn.layers.initialise import Seed, check_scheme, fill, generator
from nbrnn.layers.module import Parameters, Pointwise, check_dtype, check_floats, check_products, check_size
from nbrnn.layers.packing import rounded


@dataclass(eq=False)
class _Room:
    """Packed weights, and the stages that were last run on them."""

    packed: np.ndarray  # [., I, .]
    packed_back: np.ndarray  # [., O, .], in the same memory
    start: np.ndarray  # the bias
    zeros: np.ndarray
    frozen: object | None = None  # what said of the parameters that they were, when they were packed
    ahead: Prepared | None = None
    back: Prepared | None = None


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
    products : {"bfloat16"} or None
        To what the factors of products are rounded; see `Recurrent` and ``docs/precision.md``.

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
        products: str | None = None,
    ):
        self.input_size = check_size("input_size", input_size)
        self.output_size = check_size("output_size", output_size)
        self.bias, self.init, self.dtype = bool(bias), check_scheme(init), check_dtype(dtype)
        self.products = check_products(products, self.dtype, ("bfloat16",))
        self._kind = products_of(products, self.dtype)
        shapes = {"weight": (self.output_size, self.input_size)}
        if bias:
            shapes["bias"] = (self.output_size,)
        self.params = Parameters.zeros(shapes, self.dtype)
        fill(self.params, init, generator(seed), 1.0 / np.sqrt(self.input_size))
        self._order = gemm.plain_order(self.output_size, self.dtype)
        self._runs = gemm.runs_of(self.output_size, self.dtype)
        self._make()

    _fresh = ("_spare",)

    def _make(self) -> None:
        self._spare: list[_Room] = []

    @property
    def _gemm(self) -> ModuleType:
        return half_gemm if self.products else gemm

    def _check(self, x: Any) -> np.ndarray:
        shape = (None,) * max(0, np.ndim(x) - 1) + (self.input_size,)
        return check_floats("x", x, self.dtype, shape, f"(..., {self.input_size})")

    def _apply(self, x: Any) -> np.ndarray:
        return self._applied(self._check(x))

    def _applied(self, x: np.ndarray) -> np.ndarray:
        """y, from x that is checked."""
        room = self._take()
        y = self._forward(room, x.reshape(-1, self.input_size))
        self._spare.append(room)
        return y.reshape(*x.shape[:-1], self.output_size)

    def frozen(self) -> Callable[[Any], np.ndarray]:
        room, known = self._take(), None
        self._forward(room, np.zeros((0, self.input_size), self.dtype))

        def apply(x):
            nonlocal known
            x = self._check(x)
            rows, y = x.reshape(-1, self.input_size), empty((*x.shape[:-1], self.output_size), self.dtype)
            key, out = (len(rows), get_num_threads()), y.reshape(-1, self.output_size)
            known = prepare(known, key, [rows, out], (), lambda: self._product(rows, room.packed, room.start, out))
            known.stages.run()
            return y

        return apply

    def _linearise(self, x: Any) -> tuple[np.ndarray, Callable]:
        x = self._check(x)
        y = self._applied(x)

        def back(dy, grads):
            dy = check_floats("dy", dy, self.dtype, y.shape).reshape(-1, self.output_size)
            return self._backward(x.reshape(-1, self.input_size), dy, grads).reshape(x.shape)

        return y, back

    def _take(self) -> _Room:
        """Memory for packed weights, perhaps that of an earlier call."""
        try:
            return self._spare.pop()
        except IndexError:
            P = panel_width(VECTORS, self.dtype)
            shapes = (self.output_size, self.input_size), (self.input_size, self.output_size)
            panels = (self._kind.panels(gemm.panels(N, self.dtype), K, P) for N, K in shapes)
            panels = in_turn(*panels, dtype=self._kind.number.dtype)
            starts = (zeros((gemm.padded(N, self.dtype),), self.dtype) for N, _ in shapes)
            return _Room(*panels, *starts)

    def _forward(self, room: _Room, x: np.ndarray) -> np.ndarray:
        """y = x W^T + b, with the parameters as they are now."""
        weight, y = self.params["weight"], empty((len(x), self.output_size), self.dtype)
        pack = self.params.frozen is None or self.params.frozen is not room.frozen
        if self.bias and pack:
            room.start[: self.output_size] = self.params["bias"]

        def stages():
            packing = stage(self._gemm.pack_rows, self._shards(16), weight, self._order, room.packed)
            return [packing] * pack + self._product(x, room.packed, room.start, y)

        room.ahead = prepare(room.ahead, (len(x), self.params.flat, get_num_threads(), pack), [x, y], (), stages)
        room.ahead.stages.run()
        room.frozen = self.params.frozen
        return y

    def _backward(self, x: np.ndarray, dy: np.ndarray, grads: Parameters) -> np.ndarray:
        """dW = dy^T x and db = sum of dy into `grads`; dx = dy W."""
        room, dx = self._take(), empty((len(x), self.input_size), self.dtype)
        room.frozen = None  # nothing packed is left in it
        key = len(x), self.params.flat, grads.flat, get_num_threads()
        room.back = prepare(room.back, key, [x, dy, dx], (), lambda: self._stages_back(room, x, dy, dx, grads))
        room.back.stages.run()
        self._spare.append(room)
        return dx

    def _stages_back(
        self, room: _Room, x: np.ndarray, dy: np.ndarray, dx: np.ndarray, grads: Parameters
    ) -> list[Stage]:
        dbias = grads["bias"] if self.bias else np.empty(self.output_size, self.dtype)
        kernel = self._kind.kernel(VECTORS) if self.products else outer_kernel(VECTORS, self.dtype)
        order = np.arange(self.output_size)
        how, side = (self._runs, 0, 0, False, 0), (x, 0, self.input_size, np.empty(0, np.int64), grads["weight"], dbias)
        return [
            stage(self._gemm.gradient, self._shards(len(x)), kernel, dy, *how, *side, *gemm.alone(self.dtype)),
            stage(self._gemm.pack_columns, self._shards(16), self.params["weight"], order, room.packed_back),
            *self._product(dy, room.packed_back, room.zeros, dx),
        ]

    def _product(self, rows: np.ndarray, packed: np.ndarray, start: np.ndarray, out: np.ndarray) -> list[Stage]:
        """out = start + rows @ packed."""
        kernel, shards = self._kind.kernel(VECTORS), self._shards(len(rows))
        if self.products:
            rows, rounding = rounded(self._kind, rows, 0, rows.shape[1], 1, 0)
            return [rounding, stage(half_gemm.multiply, shards, kernel, rows, packed, start, out)]
        return [stage(gemm.multiply, shards, kernel, rows, 0, 0, packed.shape[1], packed, start, out)]

    def _shards(self, rows: int) -> int:
        return shards_for(2 * rows * self.input_size * self.output_size)

    def config(self) -> dict[str, Any]:
        names = ("input_size", "output_size", "bias", "init", "products")
        return {name: getattr(self, name) for name in names} | {"dtype": self.dtype.name}
