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
from nbrnn.kernels import gemm, half_gemm, products
from nbrnn.kernels.amx import BEHIND
from nbrnn.kernels.jit import Stage, stage
from nbrnn.kernels.memory import empty, in_turn, zeros
from nbrnn.kernels.products import Products, round_matrix
from nbrnn.kernels.scan import Layout
from nbrnn.kernels.schedule import shards_for
from nbrnn.kernels.tiles import VECTORS, panel_width


class Weights(NamedTuple):
    """The parameters of one layer and direction that go into products; None: there is none."""

    weight_ih: np.ndarray
    weight_hh: np.ndarray | None = None
    bias_ih: np.ndarray | None = None
    bias_hh: np.ndarray | None = None
    weight_hr: np.ndarray | None = None
    bias_hr: np.ndarray | None = None


class Ahead(NamedTuple):
    """Weights as a scan streams them; narrow ones have one dimension more (`Products.panels`)."""

    w_ih: np.ndarray  # [J, I, .]
    bias: np.ndarray  # [J, S U W]
    w_hh: np.ndarray  # [J, P, .]
    w_mid: np.ndarray  # of a second product
    bias_mid: np.ndarray


class Back(NamedTuple):
    """The same transposed, in plain panels [Q, K, P], as the way back streams them."""

    w_hh: np.ndarray
    w_mid: np.ndarray
    w_ih: np.ndarray  # empty where x holds tokens


class Packing:
    """Where every parameter of one layer and direction goes.

    Parameters
    ----------
    cell : Cell
    layout : Layout
    hidden, output : int
        Hidden size H, and the size P of what is fed back.
    dtype : numpy.dtype
    products : Products
        What weights are in products.
    """

    def __init__(self, cell: Cell, layout: Layout, hidden: int, output: int, dtype: np.dtype, products: Products):
        self.layout, self.hidden, self.output, self.dtype, self.products = layout, hidden, output, dtype, products
        self.panels, self.units, self.columns = layout.panels(hidden, dtype), layout.units(dtype), layout.columns(dtype)
        first = layout.slots - layout.second - layout.recurrent
        last = layout.slots - layout.second
        inputs, recurrent, second = (
            [cell.gates.index(gate) * hidden for gate in slots]
            for slots in (cell.input_slots, cell.recurrent_slots, cell.second)
        )
        self.input_order, self.recurrent_order, self.second_order = map(self._order, (inputs, recurrent, second))
        self.runs, self.second_runs = self._runs({first: recurrent}, {0: inputs}), self._runs({last: second})
        self._none = np.empty(0, dtype), np.empty((0, 0), dtype)

    def kernels(self, projected: bool) -> tuple[int, int, int]:
        """Addresses of the kernels for the input, the recurrent and the second product."""
        U = self.layout.vectors
        counts = self.layout.inputs * U, self.layout.recurrent * U, VECTORS if projected else self.layout.second * U
        return tuple(self.products.kernel(count) if count else 0 for count in counts)

    def plain_kernel(self) -> int:
        """The address of the kernel for plain panels."""
        return self.products.kernel(VECTORS)

    def _order(self, rows: list[int]) -> np.ndarray:
        """The row of a weight matrix for every column of its panels; rows: of each slot, where its gate begins."""
        unit = np.arange(self.panels * self.units).reshape(self.panels, 1, self.units)
        return np.where(unit < self.hidden, np.array(rows, np.int64).reshape(1, -1, 1) + unit, -1).ravel()

    def _runs(self, one: dict[int, list[int]], other: dict[int, list[int]] | None = None) -> np.ndarray:
        """Where the gradients of one or two weight matrices lie in the tape (`gemm.runs_of`); for each of them its
        first slot, and as in `_order`."""
        places = [
            {first + n: row for first, rows in side.items() for n, row in enumerate(rows)}
            for side in (one, other or {})
        ]
        runs = [
            gemm.runs_of(
                self.hidden, self.dtype, tuple(side.get(slot, -1) for side in places), slot * self.units,
                self.units, self.columns,
            )
            for slot in sorted(set().union(*places))
        ]  # fmt: skip
        return np.concatenate(runs) if runs else np.empty((0, 4), np.int64)

    def rooms(self, inputs: int, projected: bool, apart: bool) -> tuple[Ahead, Back]:
        """Room for what a scan streams, and for what it streams on its way back: the same memory, unless `apart`."""
        layout, units, J, dtype, narrow = self.layout, self.units, self.panels, self.dtype, self.products.number.dtype
        panels, second, P = self.products.panels, bool(layout.second), panel_width(VECTORS, self.dtype)
        I, Q = gemm.panels(inputs, dtype), gemm.panels(self.output, dtype)
        ih = panels(J, inputs, layout.inputs * units), panels(I, len(self.input_order), P)
        hh = (
            panels(J, self.output, layout.recurrent * units),
            panels(Q if layout.recurrent else 0, len(self.recurrent_order), P),
        )
        mid = (J * second, self.hidden, layout.second * units), (Q * second, len(self.second_order), P)
        if projected:
            mid = (Q, self.hidden, P), (gemm.panels(self.hidden, dtype), self.output, P)
        (w_ih, back_ih), (w_hh, back_hh), (w_mid, back_mid) = (
            [empty(shape, kind) for shape in shapes] if apart else in_turn(*shapes, dtype=kind)
            for shapes, kind in ((ih, narrow), (hh, narrow), (mid, dtype))
        )
        biases = empty((J, layout.slots * units), dtype), empty((Q * projected, 1, P), dtype)
        return Ahead(w_ih, biases[0], w_hh, w_mid, biases[1]), Back(back_hh, back_mid, back_ih)

    def pack(self, weights: Weights, into: Ahead) -> list[Stage]:
        """The stages that pack weights for a scan."""
        hh, (w_ih, bias, w_hh, w_mid, bias_mid) = self._recurrent(weights), into
        biases = (self._none[0] if b is None else b for b in (weights.bias_ih, weights.bias_hh))
        slots, projected = self.layout, weights.weight_hr is not None
        first, stop = slots.slots - slots.second - slots.recurrent, slots.slots - slots.second
        shards = shards_for(20 * (weights.weight_ih.size + hh.size))
        if self.products.narrow:
            args = weights.weight_ih, self.input_order, w_ih, hh, self.recurrent_order, w_hh
            return [stage(products.pack_layer(self.products), shards, *args, *biases, first * self.units, bias)]
        mid = np.empty((0, self.hidden, 0), self.dtype) if projected else w_mid
        args = weights.weight_ih, self.input_order, w_ih, hh, self.recurrent_order, w_hh, self.second_order, mid
        places = first * self.units, stop * self.units
        stages = [stage(gemm.pack_layer, shards, *args, *biases, *places, bias)]
        if projected:
            order, shards = gemm.plain_order(self.output, self.dtype), shards_for(20 * weights.weight_hr.size)
            if weights.bias_hr is None:
                bias_mid[...] = 0
            else:
                stages.append(stage(gemm.pack_rows, 1, weights.bias_hr.reshape(-1, 1), order, bias_mid))
            stages.append(stage(gemm.pack_rows, shards, weights.weight_hr, order, w_mid))
        return stages

    def pack_back(self, weights: Weights, into: Back) -> list[Stage]:
        """The stages that pack weights, transposed, for a scan's way back."""
        hh, (w_hh, w_mid, w_ih), projected = self._recurrent(weights), into, weights.weight_hr is not None
        mid = np.empty((0, 0, w_mid.shape[2]), self.dtype) if projected else w_mid
        shards = shards_for(20 * (hh.size + (weights.weight_ih.size if len(w_ih) else 0)))
        if self.products.narrow:
            args = hh, self.recurrent_order, w_hh, weights.weight_ih, self.input_order, w_ih
            return [stage(half_gemm.pack_layer_back, shards, *args)]
        args = hh, self.recurrent_order, w_hh, self.second_order, mid, weights.weight_ih, self.input_order, w_ih
        stages = [stage(gemm.pack_layer_back, shards, *args)]
        if projected:
            shards = shards_for(20 * weights.weight_hr.size)
            stages.append(stage(gemm.pack_columns, shards, weights.weight_hr, np.arange(self.output), w_mid))
        return stages

    def _recurrent(self, weights: Weights) -> np.ndarray:
        return self._none[1] if weights.weight_hh is None else weights.weight_hh


def rounded(
    products: Products, x: np.ndarray, first: int, piece: int, pieces: int, step: int
) -> tuple[np.ndarray, Stage]:
    """A matrix of narrow factors, of some columns of x, and the stage that fills it; see `products.round_matrix`."""
    out = zeros((len(x) + BEHIND, products.row(piece * pieces)), products.number.dtype)
    return out, stage(round_matrix(products), shards_for(20 * out.size), x, first, step, piece, pieces, out)


packing_of = lru_cache(maxsize=256)(Packing)
