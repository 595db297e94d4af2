"""From parameters as torch lays them out to the panels that the scan streams, and back for the gradients.

torch    weight_ih [G H, I], weight_hh [G H, P], biases [G H]: gate by gate; weight_hr [P, H]
panels   [J, K, S' U W]: J blocks of U W hidden units; within a block gate by gate, so that a register tile holds
         whole cells; a hidden size that does not fill the last block is filled up with zeros
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from nbrnn.cells.cell import Cell
from nbrnn.kernels import gemm
from nbrnn.kernels.jit import run
from nbrnn.kernels.scan import Layout
from nbrnn.kernels.schedule import shards_for
from nbrnn.kernels.tiles import VECTORS, panel_width, product_kernel


class Weights(NamedTuple):
    """The parameters of one layer and direction that go into products; None: there is none."""

    weight_ih: np.ndarray
    weight_hh: np.ndarray | None = None
    bias_ih: np.ndarray | None = None
    bias_hh: np.ndarray | None = None
    weight_hr: np.ndarray | None = None
    bias_hr: np.ndarray | None = None


class Packing:
    """Where every parameter of one layer and direction goes.

    Parameters
    ----------
    cell : Cell
    layout : Layout
    hidden, output : int
        Hidden size H, and the size P of what is fed back.
    dtype : numpy.dtype
    """

    def __init__(self, cell: Cell, layout: Layout, hidden: int, output: int, dtype: np.dtype):
        self.layout, self.hidden, self.output, self.dtype = layout, hidden, output, dtype
        self.panels, self.units, self.columns = layout.panels(hidden, dtype), layout.units(dtype), layout.columns(dtype)
        first = layout.slots - layout.second - layout.recurrent
        self.input_order, self.input_runs = self._places(cell, cell.input_slots, 0)
        self.recurrent_order, self.recurrent_runs = self._places(cell, cell.recurrent_slots, first)
        self.second_order, self.second_runs = self._places(cell, cell.second, layout.slots - layout.second)

    def kernels(self, projected: bool) -> tuple[int, int, int]:
        """Addresses of the kernels for the input, the recurrent and the second product."""
        U, dtype = self.layout.vectors, self.dtype
        counts = self.layout.inputs * U, self.layout.recurrent * U, VECTORS if projected else self.layout.second * U
        return tuple(product_kernel(count, dtype) if count else 0 for count in counts)

    def _places(self, cell: Cell, slots: tuple[str, ...], first: int) -> tuple[np.ndarray, np.ndarray]:
        """The row of the weight matrix for every column of the panels, and where the gradient of every row lies in
        the tape (`gemm.runs_of`), for gates from slot `first` on."""
        H, pieces = self.hidden, (self.units, self.columns)
        blocks = [cell.gates.index(gate) for gate in slots]
        unit = np.arange(self.panels * self.units).reshape(self.panels, 1, self.units)
        rows = np.array(blocks, np.int64).reshape(1, -1, 1) * H + unit
        runs = [gemm.runs_of(H, self.dtype, b * H, (first + n) * self.units, *pieces) for n, b in enumerate(blocks)]
        return np.where(unit < H, rows, -1).ravel(), np.concatenate(runs) if runs else np.empty((0, 3), np.int64)

    def forward(self, weights: Weights) -> tuple[np.ndarray, ...]:
        """(w_ih [J, I, .], bias [J S U W], w_hh [J, P, .], w_mid, bias_mid), as the scan wants them."""
        layout, units = self.layout, self.units
        w_ih = self._pack_rows(weights.weight_ih, self.input_order, layout.inputs * units)
        bias = np.zeros((self.panels, layout.slots, units), self.dtype)
        if weights.bias_ih is not None:
            bias[:, : layout.inputs] += self._bias(weights.bias_ih, self.input_order)
        if weights.bias_hh is not None:
            first, stop = layout.slots - layout.second - layout.recurrent, layout.slots - layout.second
            bias[:, first:stop] += self._bias(weights.bias_hh, self.recurrent_order)
            if layout.second:
                bias[:, stop:] += self._bias(weights.bias_hh, self.second_order)
        w_hh = np.empty((self.panels, self.output, 0), self.dtype)
        w_mid, bias_mid = np.empty((0, self.hidden, 0), self.dtype), np.empty(0, self.dtype)
        if layout.recurrent:
            w_hh = self._pack_rows(weights.weight_hh, self.recurrent_order, layout.recurrent * units)
        if layout.second:
            w_mid = self._pack_rows(weights.weight_hh, self.second_order, layout.second * units)
        if weights.weight_hr is not None:
            order = gemm.plain_order(self.output, self.dtype)
            w_mid = self._pack_rows(weights.weight_hr, order, panel_width(VECTORS, self.dtype))
            bias_mid = np.zeros(len(order), self.dtype)
            if weights.bias_hr is not None:
                bias_mid[: self.output] = weights.bias_hr
        return w_ih, bias.ravel(), w_hh, w_mid, bias_mid

    def backward(self, weights: Weights) -> tuple[np.ndarray, np.ndarray]:
        """The transposed weights of the recurrent and of the second product, in panels."""
        P = panel_width(VECTORS, self.dtype)
        none = np.empty((0, 0, P), self.dtype)
        hh = self._pack_columns(weights.weight_hh, self.recurrent_order) if self.layout.recurrent else none
        if self.layout.second:
            return hh, self._pack_columns(weights.weight_hh, self.second_order)
        if weights.weight_hr is not None:
            return hh, self._pack_columns(weights.weight_hr, np.arange(self.output))
        return hh, none

    def backward_ih(self, weights: Weights) -> np.ndarray:
        """The input weights for ``dx = dgates @ weight_ih``: [Q, K, P]."""
        return self._pack_columns(weights.weight_ih, self.input_order)

    def _pack_rows(self, weight: np.ndarray, order: np.ndarray, width: int) -> np.ndarray:
        return self._pack(gemm.pack_rows, weight, order, (len(order) // width, weight.shape[1], width))

    def _pack_columns(self, weight: np.ndarray, order: np.ndarray) -> np.ndarray:
        shape = gemm.panels(weight.shape[1], self.dtype), len(order), panel_width(VECTORS, self.dtype)
        return self._pack(gemm.pack_columns, weight, order, shape)

    def _pack(self, entry: Callable, weight: np.ndarray, order: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        out = np.empty(shape, self.dtype)
        run(entry, shards_for(20 * weight.size), weight, order, out)
        return out

    def _bias(self, bias: np.ndarray, order: np.ndarray) -> np.ndarray:
        values = bias[order]
        if self.panels * self.units != self.hidden:
            values[order < 0] = 0
        return values.reshape(self.panels, -1, self.units)


packing_of = lru_cache(maxsize=256)(Packing)
