"""From parameters as torch lays them out to the panels that the scan streams, and back for the gradients.

    torch    weight_ih [G H, I], weight_hh [G H, H], biases [G H]: gate by gate
    panels   [J, K, S' U W]: J blocks of U W hidden units; within a block gate by gate, so that a register tile holds
             whole cells; a hidden size that does not fill the last block is filled up with zeros
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from nbrnn.cells.cell import Cell
from nbrnn.kernels import gemm
from nbrnn.kernels.jit import get_num_threads, run
from nbrnn.kernels.scan import Layout
from nbrnn.kernels.tiles import VECTORS, panel_width

# Numbers in a weight matrix below which packing it is not worth a parallel region.
SMALL = 50_000


class Weights(NamedTuple):
    """The parameters of one layer and direction; the biases may be None."""

    ih: np.ndarray
    hh: np.ndarray
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

    def _order(self, blocks: list[int]) -> np.ndarray:
        """The row of the weight matrix for every column of the panels."""
        unit = np.arange(self.panels * self.units).reshape(self.panels, 1, self.units)
        rows = np.array(blocks).reshape(1, -1, 1) * self.hidden + unit
        return np.where(unit < self.hidden, rows, -1).ravel()

    def _runs(self, blocks: list[int], first_slot: int) -> np.ndarray:
        """Where the gradient of every row of the weight matrix lies in the tape (`gemm.runs_of`)."""
        return np.concatenate(
            [
                gemm.runs_of(
                    self.hidden, self.dtype, block * self.hidden, (first_slot + n) * self.units, self.units, self.columns
                )
                for n, block in enumerate(blocks)
            ]
        )

    def forward(self, weights: Weights) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(w_ih [J, I, .], bias [J S U W], w_hh [J, H, .])."""
        w_ih = self._pack(gemm.pack_rows, weights.ih, self.input_order, self.panels, weights.ih.shape[1])
        w_hh = self._pack(gemm.pack_rows, weights.hh, self.recurrent_order, self.panels, self.hidden)
        bias = np.zeros((self.panels, self.layout.slots, self.units), self.dtype)
        if weights.bias_ih is not None:
            bias[:, : self.layout.inputs] += self._bias(weights.bias_ih, self.input_order)
            bias[:, self.layout.slots - self.layout.recurrent :] += self._bias(weights.bias_hh, self.recurrent_order)
        return w_ih, bias.ravel(), w_hh

    def backward_hh(self, weights: Weights) -> np.ndarray:
        """The recurrent weights for ``dh = dgates @ weight_hh``: [Q, K, P]."""
        order = self.recurrent_order
        return self._pack(gemm.pack_columns, weights.hh, order, gemm.panels(self.hidden, self.dtype), len(order))

    def backward_ih(self, weights: Weights) -> np.ndarray:
        """The input weights for ``dx = dgates @ weight_ih``: [Q, K, P]."""
        order = self.input_order
        return self._pack(gemm.pack_columns, weights.ih, order, gemm.panels(weights.ih.shape[1], self.dtype), len(order))

    def _pack(self, entry, weight: np.ndarray, order: np.ndarray, panels: int, depth: int) -> np.ndarray:
        columns = len(order) // panels if entry is gemm.pack_rows else panel_width(VECTORS, self.dtype)
        out = np.empty((panels, depth, columns), self.dtype)
        run(entry, get_num_threads() if weight.size > SMALL else 1, weight, order, out)
        return out

    def _bias(self, bias: np.ndarray, order: np.ndarray) -> np.ndarray:
        values = np.where(order >= 0, bias[order], self.dtype.type(0))
        return values.reshape(self.panels, -1, self.units)


packing_of = lru_cache(maxsize=256)(Packing)
