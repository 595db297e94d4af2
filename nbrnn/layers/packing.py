"""From parameters as torch lays them out to the panels that the scan streams, and back for the gradients.

torch    weight_ih [G H, I], weight_hh [G H, H], biases [G H]: gate by gate
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
    """The parameters of one layer and direction; the biases may be None."""

    weight_ih: np.ndarray
    weight_hh: np.ndarray
    bias_ih: np.ndarray | None
    bias_hh: np.ndarray | None


def layout_of(cell: Cell) -> Layout:
    """The layout of a cell's pre-activations."""
    return Layout(cell.slots, len(cell.input_slots), len(cell.recurrent_slots), len(cell.states))


class Packing:
    """Where every parameter of one layer and direction goes.

    Parameters
    ----------
    cell : Cell
    hidden : int
        Hidden size H.
    dtype : numpy.dtype
    """

    def __init__(self, cell: Cell, hidden: int, dtype: np.dtype):
        self.layout = layout = layout_of(cell)
        self.hidden, self.dtype = hidden, dtype
        self.panels, self.units, self.columns = layout.panels(hidden, dtype), layout.units(dtype), layout.columns(dtype)
        blocks = [cell.gates.index(gate) for gate in cell.input_slots]
        self.input_order = self._order(blocks)
        self.input_runs = self._runs(blocks, 0)
        blocks = [cell.gates.index(gate) for gate in cell.recurrent_slots]
        self.recurrent_order = self._order(blocks)
        self.recurrent_runs = self._runs(blocks, layout.slots - layout.recurrent)

    def kernels(self) -> tuple[int, int]:
        """Addresses of the kernels for the input and for the recurrent product."""
        U, dtype = self.layout.vectors, self.dtype
        return product_kernel(self.layout.inputs * U, dtype), product_kernel(self.layout.recurrent * U, dtype)

    def _order(self, blocks: list[int]) -> np.ndarray:
        """The row of the weight matrix for every column of the panels."""
        unit = np.arange(self.panels * self.units).reshape(self.panels, 1, self.units)
        rows = np.array(blocks).reshape(1, -1, 1) * self.hidden + unit
        return np.where(unit < self.hidden, rows, -1).ravel()

    def _runs(self, blocks: list[int], first_slot: int) -> np.ndarray:
        """Where the gradient of every row of the weight matrix lies in the tape (`gemm.runs_of`)."""
        H, pieces = self.hidden, (self.units, self.columns)
        columns = [(first_slot + n) * self.units for n in range(len(blocks))]
        runs = [gemm.runs_of(H, self.dtype, block * H, at, *pieces) for block, at in zip(blocks, columns)]
        return np.concatenate(runs)

    def forward(self, weights: Weights) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(w_ih [J, I, .], bias [J S U W], w_hh [J, H, .])."""
        rows, width = gemm.pack_rows, self.units
        w_ih = self._pack(rows, weights.weight_ih, self.input_order, self.panels, self.layout.inputs * width)
        w_hh = self._pack(rows, weights.weight_hh, self.recurrent_order, self.panels, self.layout.recurrent * width)
        bias = np.zeros((self.panels, self.layout.slots, self.units), self.dtype)
        if weights.bias_ih is not None:
            bias[:, : self.layout.inputs] += self._bias(weights.bias_ih, self.input_order)
            bias[:, self.layout.slots - self.layout.recurrent :] += self._bias(weights.bias_hh, self.recurrent_order)
        return w_ih, bias.ravel(), w_hh

    def backward_hh(self, weights: Weights) -> np.ndarray:
        """The recurrent weights for ``dh = dgates @ weight_hh``: [Q, K, P]."""
        return self._pack(gemm.pack_columns, weights.weight_hh, self.recurrent_order, *self._plain(weights.weight_hh))

    def backward_ih(self, weights: Weights) -> np.ndarray:
        """The input weights for ``dx = dgates @ weight_ih``: [Q, K, P]."""
        return self._pack(gemm.pack_columns, weights.weight_ih, self.input_order, *self._plain(weights.weight_ih))

    def _plain(self, weight: np.ndarray) -> tuple[int, int]:
        """Panels and their width for a product with the columns of a weight matrix."""
        return gemm.panels(weight.shape[1], self.dtype), panel_width(VECTORS, self.dtype)

    def _pack(self, entry: Callable, weight: np.ndarray, order: np.ndarray, panels: int, width: int) -> np.ndarray:
        depth = weight.shape[1] if entry is gemm.pack_rows else len(order)
        out = np.empty((panels, depth, width), self.dtype)
        run(entry, shards_for(20 * weight.size), weight, order, out)
        return out

    def _bias(self, bias: np.ndarray, order: np.ndarray) -> np.ndarray:
        values = np.where(order >= 0, bias[order], self.dtype.type(0))
        return values.reshape(self.panels, -1, self.units)


packing_of = lru_cache(maxsize=256)(Packing)
