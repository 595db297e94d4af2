"""From parameters as torch lays them out to the panels that the scan streams, and back for the gradients.

torch    weight_ih [G H, I], weight_hh [G H, P], biases [G H]: gate by gate; weight_hr [P, H]
panels   [J, K, S' U W]: J blocks of U W hidden units; within a block gate by gate, so that a register tile holds
         whole cells; a hidden size that does not fill the last block is filled up with zeros
"""

from __future__ import annotations

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
        self._none = np.empty(0, dtype), np.empty((0, 0), dtype)
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
        layout, units, J = self.layout, self.units, self.panels
        inputs, hh = weights.weight_ih.shape[1], self._recurrent(weights)
        w_ih = np.empty((J, inputs, layout.inputs * units), self.dtype)
        w_hh = np.empty((J, self.output, layout.recurrent * units), self.dtype)
        w_mid = np.empty((J if layout.second else 0, self.hidden, layout.second * units), self.dtype)
        bias = np.zeros((J, layout.slots * units), self.dtype)
        biases = (self._none[0] if b is None else b for b in (weights.bias_ih, weights.bias_hh))
        first, stop = layout.slots - layout.second - layout.recurrent, layout.slots - layout.second
        orders = self.input_order, self.recurrent_order, self.second_order
        args = weights.weight_ih, orders[0], w_ih, hh, orders[1], w_hh, orders[2], w_mid
        shards = shards_for(20 * (weights.weight_ih.size + hh.size))
        run(gemm.pack_layer, shards, *args, *biases, first * units, stop * units, bias)
        bias_mid = self._none[0]
        if weights.weight_hr is not None:
            order, width = gemm.plain_order(self.output, self.dtype), panel_width(VECTORS, self.dtype)
            w_mid = np.empty((len(order) // width, self.hidden, width), self.dtype)
            run(gemm.pack_rows, shards_for(20 * weights.weight_hr.size), weights.weight_hr, order, w_mid)
            bias_mid = np.zeros(len(order), self.dtype)
            if weights.bias_hr is not None:
                bias_mid[: self.output] = weights.bias_hr
        return w_ih, bias, w_hh, w_mid, bias_mid

    def backward(self, weights: Weights, inputs: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The weights of the recurrent, of the second and of the input product, transposed, in panels [Q, K, P].

        Those of the input only if `inputs` says so.
        """
        P, layout, hh = panel_width(VECTORS, self.dtype), self.layout, self._recurrent(weights)
        Q = gemm.panels(self.output, self.dtype)
        w_hh = np.empty((Q if layout.recurrent else 0, len(self.recurrent_order), P), self.dtype)
        w_mid = np.empty((Q if layout.second else 0, len(self.second_order), P), self.dtype)
        panels = gemm.panels(weights.weight_ih.shape[1], self.dtype) if inputs else 0
        w_ih = np.empty((panels, len(self.input_order), P), self.dtype)
        orders = self.recurrent_order, self.second_order, self.input_order
        shards = shards_for(20 * (hh.size + (weights.weight_ih.size if inputs else 0)))
        args = hh, orders[0], w_hh, orders[1], w_mid, weights.weight_ih, orders[2], w_ih
        run(gemm.pack_layer_back, shards, *args)
        if weights.weight_hr is not None:
            w_mid = np.empty((gemm.panels(self.hidden, self.dtype), self.output, P), self.dtype)
            shards = shards_for(20 * weights.weight_hr.size)
            run(gemm.pack_columns, shards, weights.weight_hr, np.arange(self.output), w_mid)
        return w_hh, w_mid, w_ih

    def _recurrent(self, weights: Weights) -> np.ndarray:
        return self._none[1] if weights.weight_hh is None else weights.weight_hh


packing_of = lru_cache(maxsize=256)(Packing)
