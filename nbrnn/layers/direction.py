"""One layer in one direction: the scan, and the products around it.

forward     pack -> input product and scan, panel by panel
backward    scan -> weight, bias and input gradients, each one big product
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from nbrnn.cells.cell import Cell
from nbrnn.kernels import gemm, schedule
from nbrnn.kernels.barrier import new_counters
from nbrnn.kernels.jit import get_num_threads, run, threading_layer
from nbrnn.kernels.scan import compile_scan
from nbrnn.kernels.schedule import Schedule, shards_for
from nbrnn.kernels.tiles import VECTORS, outer_kernel, product_kernel
from nbrnn.layers.module import Parameters, read_only
from nbrnn.layers.packing import Weights, packing_of


class Tape(NamedTuple):
    """What forward keeps."""

    x: np.ndarray  # [T, B, I] or tokens [T, B]
    y: np.ndarray  # [T + 2, B, D H], see `kernels.scan`
    inner: np.ndarray  # [N, T + 2, B, H]
    gates: np.ndarray  # flat


class Direction:
    """One layer in one direction.

    Parameters
    ----------
    cell : Cell
    inputs, hidden : int
        Sizes I and H.
    dtype : numpy.dtype
    bias : bool
    end : str
        The end of its parameters' names, such as ``_l0_reverse``.
    reverse : int
        1 if it reads the sequence from its end and writes the second half of y, else 0.
    """

    def __init__(self, cell: Cell, inputs: int, hidden: int, dtype: np.dtype, bias: bool, end: str, reverse: int):
        self.cell, self.inputs, self.hidden, self.dtype, self.reverse = cell, inputs, hidden, dtype, reverse
        self.names = [f"{name}{end}" for name in Weights._fields[: 4 if bias else 2]]
        self.packing = packing_of(cell, hidden, dtype)
        self._scans = compile_scan(f"{cell.name}-{dtype}", self.packing.layout, cell.forward, cell.backward)
        self._spare: list[np.ndarray] = []
        self._known: tuple[np.ndarray, tuple] | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Its parameters' names and shapes."""
        rows = len(self.cell.gates) * self.hidden
        return dict(zip(self.names, ((rows, self.inputs), (rows, self.hidden), (rows,), (rows,))))

    def schedules(self, T: int, B: int) -> tuple[Schedule, Schedule]:
        """How forward and backward run."""
        threads, H, rows = get_num_threads(), self.hidden, len(self.cell.gates) * self.hidden
        layer = threading_layer() if threads > 1 else ""
        weights, panels = rows * H * self.dtype.itemsize, gemm.panels(H, self.dtype)
        forward = schedule.choose(T, B, 2 * rows * (H + self.inputs), weights, self.packing.panels, threads, layer)
        return forward, schedule.choose(T, B, 2 * rows * H, weights, panels, threads, layer)

    # -------------------------------------------------------------- forward

    def forward(
        self,
        params: Parameters,
        x: np.ndarray,
        y: np.ndarray,
        first: list[np.ndarray],
        last: list[np.ndarray],
        keep: bool,
    ) -> Tape:
        """Fill its half of y and the last states.

        x: [T, B, I] or tokens [T, B]; y: [T + 2, B, D H]; first, last: [B, H] for each state.
        """
        (T, B), H, packing = x.shape[:2], self.hidden, self.packing
        # The rows of y (and of inner) that hold the first and the last state.
        start, end = (T + 1, 1) if self.reverse else (0, T)
        half = slice(self.reverse * H, (self.reverse + 1) * H)
        inner = np.empty((len(first) - 1, T + 2 if keep else 1, B, H), self.dtype)
        y[start, :, half] = first[0]
        inner[:, start if keep else 0] = first[1:] if len(inner) else 0
        plan, _ = self.schedules(T, B)
        if keep:
            packed = packing.forward(self._weights(params))
            gates = self._take(T * B * packing.panels * packing.columns)
        else:
            packed = self._packed(params)
            gates = np.empty(B * packing.columns * (packing.panels * plan.block if plan.block > 1 else 1), self.dtype)
        if T and B:
            how = (*packing.kernels(), plan.by_units, plan.block, keep, self.reverse, half.start)
            run(self._scans[0], plan.shards, *how, x, *packed, y, inner, gates, new_counters())
        else:
            end = start
        last[0][...] = y[end, :, half]
        for out, array in zip(last[1:], inner):
            out[...] = array[end if keep else 0]
        return Tape(x, y, inner, gates)

    def _weights(self, params: Mapping[str, np.ndarray]) -> Weights:
        arrays = [params[name] for name in self.names]
        return Weights(*arrays, *[None] * (4 - len(arrays)))

    def _packed(self, params: Parameters) -> tuple:
        """The packed weights: those of the last call where the parameters still are the same bits."""
        flat = params.span(self.names[0], self.names[-1])
        known = self._known
        if known is not None:
            shards = shards_for(20 * flat.size)
            different = np.ones(shards, np.bool_)
            run(gemm.compare, shards, known[0], flat, different)
            if not different.any():
                return known[1]
        packed = self.packing.forward(self._weights(params))
        self._known = flat.copy(), packed
        return packed

    def _take(self, size: int) -> np.ndarray:
        """Memory for a tape: that of an earlier step if it fits, so that a training loop touches no new memory."""
        while self._spare:
            try:
                spare = self._spare.pop()
            except IndexError:  # another thread was faster
                break
            if spare.size == size:
                return spare
        return np.empty(size, self.dtype)

    # -------------------------------------------------------------- backward

    def backward(
        self,
        params: Parameters,
        grads: Parameters,
        tape: Tape,
        dy: np.ndarray,
        dlast: list[np.ndarray],
        dfirst: list[np.ndarray],
    ) -> np.ndarray | None:
        """Gradients of the parameters into `grads`, of the first states into `dfirst`; dx, None for tokens.

        Uses up the tape. dy: [T, B, D H]; dlast, dfirst: [B, H] for each state.
        """
        (T, B), H, packing = tape.x.shape[:2], self.hidden, self.packing
        weights, dweights = self._weights(params), self._weights(grads)
        dh = np.zeros((B, gemm.padded(H, self.dtype)), self.dtype)
        dh[:, :H] = dlast[0]
        dinner = np.empty((len(dlast) - 1, B, H), self.dtype)
        dinner[...] = dlast[1:] if len(dinner) else 0
        dgates = tape.gates.reshape(T * B, packing.panels * packing.columns)
        if T and B:
            _, plan = self.schedules(T, B)
            how = (product_kernel(VECTORS, self.dtype), plan.by_units, self.reverse, self.reverse * H)
            args = (dy, packing.backward_hh(weights), tape.y, tape.inner, tape.gates, dh, dinner, new_counters())
            run(self._scans[1], plan.shards, *how, *args)
        for out, array in zip(dfirst, (dh[:, :H], *dinner)):
            out[...] = array
        self._weight_gradients(dgates, tape, dweights)
        dx = None if tape.x.ndim == 2 else self._input_gradient(dgates, weights, tape.x.shape)
        self._spare.append(tape.gates)
        return dx

    def _weight_gradients(self, dgates: np.ndarray, tape: Tape, dweights: Weights) -> None:
        """Everything time-parallel: dW = dgates.T @ inputs."""
        x, y, packing, kernel = tape.x, read_only(tape.y), self.packing, outer_kernel(VECTORS, self.dtype)
        dgates = read_only(dgates)
        ignored = np.empty(len(dweights.weight_hh), self.dtype)
        dbias_ih = ignored if dweights.bias_ih is None else dweights.bias_ih
        dbias_hh = ignored if dweights.bias_hh is None else dweights.bias_hh
        pieces = (packing.units, packing.columns)
        # h of the step before is one row of y earlier, in the second direction one row later: y[2:].
        _, B, ld = y.shape
        offset = self.reverse * (2 * B * ld + self.hidden)
        shards, inputs = shards_for(2 * len(dgates) * dweights.weight_hh.size), (dweights.weight_ih, dbias_ih)
        hidden, outputs = (y, offset, ld, packing.recurrent_runs, *pieces), (dweights.weight_hh, dbias_hh)
        if x.ndim == 2:
            tokens = (x.ravel(), packing.input_runs)
            run(gemm.gradient_with_tokens, shards, kernel, dgates, *hidden, *tokens, *outputs, *inputs)
            return
        run(gemm.gradient, shards, kernel, dgates, *hidden, *outputs)
        shards = shards_for(2 * len(dgates) * dweights.weight_ih.size)
        run(gemm.gradient, shards, kernel, dgates, x, 0, self.inputs, packing.input_runs, *pieces, *inputs)

    def _input_gradient(self, dgates: np.ndarray, weights: Weights, shape: tuple[int, ...]) -> np.ndarray:
        """dx = dgates @ weight_ih."""
        packing, packed = self.packing, self.packing.backward_ih(weights)
        start = np.zeros(gemm.padded(self.inputs, self.dtype), self.dtype)
        dx = np.empty((len(dgates), self.inputs), self.dtype)
        # The input's slots of all panels lie side by side, or in a piece of every panel.
        depth = packed.shape[1] // (1 if packing.layout.inputs == packing.layout.slots else packing.panels)
        shards = shards_for(2 * len(dgates) * weights.weight_ih.size)
        kernel = product_kernel(VECTORS, self.dtype)
        run(gemm.multiply, shards, kernel, read_only(dgates), 0, packing.columns, depth, packed, start, dx)
        return dx.reshape(shape)
