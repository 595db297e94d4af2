"""One layer in one direction: the scan, and the products around it.

forward     pack -> input product and scan, panel by panel
backward    scan -> weight, bias and input gradients, each one big product
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nbrnn.cells.cell import Cell
from nbrnn.cells.program import Options, Program, compile_cell
from nbrnn.kernels import gemm, schedule
from nbrnn.kernels.barrier import new_counters
from nbrnn.kernels.jit import get_num_threads, run, threading_layer
from nbrnn.kernels.scan import compile_front, compile_scan
from nbrnn.kernels.schedule import Schedule, shards_for
from nbrnn.kernels.tiles import VECTORS, outer_kernel, product_kernel
from nbrnn.layers.module import Parameters, read_only
from nbrnn.layers.packing import Packing, Weights, packing_of


class Tape(NamedTuple):
    """What forward keeps."""

    x: np.ndarray  # [T, B, I] or tokens [T, B]
    y: np.ndarray  # [T + 2, B, D P], see `kernels.scan`
    inner: np.ndarray  # [N, T + 2, B, H]
    middle: np.ndarray  # [T, B, H] where there is a second product
    gates: np.ndarray  # flat
    own: np.ndarray  # [., J U W]
    given: np.ndarray  # [., T or 1, B, H]


@dataclass(frozen=True)
class Shape:
    """What all directions of all layers of a module share.

    Parameters
    ----------
    cell : Cell
    hidden, output : int
        Hidden size H, and the size P of the output.
    dtype : numpy.dtype
    bias : bool
    options : Options
    """

    cell: Cell
    hidden: int
    output: int
    dtype: np.dtype
    bias: bool
    options: Options

    def program(self) -> Program:
        return compile_cell(self.cell, self.options, self.dtype)


class Direction:
    """One layer in one direction.

    Parameters
    ----------
    shape : Shape
    inputs : int
        Size I.
    end : str
        The end of its parameters' names, such as ``_l0_reverse``.
    reverse : int
        1 if it reads the sequence from its end and writes the second half of y, else 0.
    """

    def __init__(self, shape: Shape, inputs: int, end: str, reverse: int):
        self.shape, self.cell, self.inputs, self.reverse, self.end = shape, shape.cell, inputs, reverse, end
        self.hidden, self.output, self.dtype = shape.hidden, shape.output, shape.dtype
        self.program = shape.program()
        self.layout = self.program.equations.layout
        self.packing: Packing = packing_of(self.cell, self.layout, self.hidden, self.output, self.dtype)
        self._scans = compile_scan(self.program.equations, self.dtype.name)
        self.names = list(self.shapes())
        self._fields = [name + end if name + end in self.names else None for name in Weights._fields]
        self._spare: list[np.ndarray] = []
        self._known: tuple[np.ndarray, tuple] | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Its parameters' names and shapes."""
        cell, rows = self.cell, len(self.cell.gates) * self.hidden
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, self.inputs)}
        if cell.feedback:
            shapes["weight_hh"] = (rows, self.output)
        if self.shape.bias and cell.biased:
            shapes |= dict.fromkeys(("bias_ih", "bias_hh")[: 1 + cell.feedback], (rows,))
        projection = self.shape.options.projection
        if projection:
            shapes["weight_hr"] = (self.output, self.hidden)
        if projection and projection.name != "linear" and self.shape.bias:
            shapes["bias_hr"] = (self.output,)
        for own in cell.own:
            shapes[own.name] = (own.rows, self.hidden) if own.rows > 1 else (self.hidden,)
        return {name + self.end: shape for name, shape in shapes.items()}

    def schedules(self, T: int, B: int) -> tuple[Schedule, Schedule]:
        """How forward and backward run."""
        threads, H, layout, P = get_num_threads(), self.hidden, self.layout, self.output
        layer = threading_layer() if threads > 1 else ""
        columns = (layout.recurrent + layout.second) * H
        projection = P * H if self.shape.options.projection else 0
        work, weights = columns * P + projection, (columns * P + projection) * self.dtype.itemsize
        # A normalisation takes whole rows: nothing to divide.
        panels, plain = (1, 1) if layout.norms else (self.packing.panels, gemm.panels(min(H, P), self.dtype))
        ahead = schedule.choose(T, B, 2 * (work + layout.inputs * H * self.inputs), weights, panels, threads, layer)
        return ahead, schedule.choose(T, B, 2 * work, weights, plain, threads, layer)

    # -------------------------------------------------------------- forward

    def forward(
        self,
        params: Parameters,
        x: np.ndarray,
        y: np.ndarray,
        first: list[np.ndarray],
        last: list[np.ndarray],
        given: np.ndarray,
        keep: bool,
    ) -> Tape:
        """Fill its half of y and the last states.

        x: [T, B, I] or tokens [T, B]; y: [T + 2, B, D P]; first, last: [B, .] for each state; given: [., T or 1, B, H].
        """
        (T, B), H, packing, layout = x.shape[:2], self.hidden, self.packing, self.layout
        own = self._own(params)
        # The rows of y (and of inner) that hold the first and the last state.
        start, end = (T + 1, 1) if self.reverse else (0, T)
        states = [*self._emit(first, own, given), *first]
        column = self.reverse * self.output
        half = slice(column, column + self.output)
        inner = np.empty((len(states) - 1, T + 2 if keep else 1, B, H), self.dtype)
        y[start, :, half] = states[0]
        for n, array in enumerate(states[1:]):
            inner[n, start if keep else 0] = array
        plan, _ = self.schedules(T, B)
        second = layout.second or self.shape.options.projection
        middle = np.empty((T if keep else 1, B, H if second else layout.norms and layout.norms + 2), self.dtype)
        if keep:
            packed = packing.forward(self._weights(params))
            gates = self._take(T * B * packing.panels * packing.columns)
        else:
            packed = self._packed(params)
            panels = packing.panels if plan.block > 1 or layout.second or layout.norms else 1
            gates = np.empty(B * packing.columns * panels * plan.block, self.dtype)
        tape = Tape(x, y, inner, middle, gates, own, given)
        if T and B:
            kernels = packing.kernels(self.shape.options.projection is not None)
            how = (*kernels, plan.by_units, plan.block, keep, self.reverse, column)
            args = (*how, x, *packed, own, given, y, inner, middle, gates, new_counters())
            run(self._scans[0], plan.shards, *args)
        else:
            end = start
        states = [y[end, :, half], *(array[end if keep else 0] for array in inner)]
        for out, array in zip(last, states[self.program.hidden :]):
            out[...] = array
        return tape

    def _weights(self, params: Mapping[str, np.ndarray]) -> Weights:
        return Weights(*[None if name is None else params[name] for name in self._fields])

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

    def _own(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """The cell's own parameters as the equations take them, [., J U W]."""
        own, row = np.zeros((self.layout.own, self.packing.panels * self.packing.units), self.dtype), 0
        for one in self.cell.own:
            value = params[one.name + self.end]
            own[row : row + one.rows, : self.hidden] = value if one.exponent is None else np.exp(one.exponent * value)
            row += one.rows
        return own

    def _emit(self, states: list[np.ndarray], own: np.ndarray, given: np.ndarray) -> list[np.ndarray]:
        """The states of the scan that stand in front of the cell's own, computed from the first ones."""
        if not self.program.hidden:
            return []
        states = np.ascontiguousarray(np.stack(states))  # a stack may have any order
        out = np.empty((self.program.hidden, *states.shape[1:]), self.dtype)
        run(compile_front(self.program.equations, self.dtype.name), 1, states, own, self._mask(given, states[0]), out)
        return list(out)

    def _mask(self, given: np.ndarray, state: np.ndarray) -> np.ndarray:
        """The mask of what is fed back, [1, B, H]; anything where there is none."""
        return given[-1, :1].copy() if self.shape.options.recurrent_dropout else state[None]

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

        Uses up the tape. dy: [T, B, D P]; dlast, dfirst: [B, .] for each state.
        """
        (T, B), H, P, packing = tape.x.shape[:2], self.hidden, self.output, self.packing
        weights, hidden = self._weights(params), self.program.hidden
        projection, zeros = self.shape.options.projection, [np.zeros((B, H), self.dtype)] * hidden
        dlast = [*zeros, *dlast]
        dh = np.zeros((B, gemm.padded(P, self.dtype)), self.dtype)
        dh[:, :P] = dlast[0]
        dinner = np.empty((len(dlast) - 1, B, H), self.dtype)
        for out, array in zip(dinner, dlast[1:]):
            out[...] = array
        dgates = tape.gates.reshape(T * B, packing.panels * packing.columns)
        dz = np.empty((T if projection else 0, B, P), self.dtype)
        down = np.zeros((self.layout.own, B, packing.panels * packing.units), self.dtype)
        if T and B:
            _, plan = self.schedules(T, B)
            columns = packing.panels * packing.columns if self.layout.norms else gemm.padded(H, self.dtype)
            dmiddle = np.empty((B, columns), self.dtype)
            how = (product_kernel(VECTORS, self.dtype), plan.by_units, self.reverse, self.reverse * P)
            kept = (tape.own, tape.given, tape.y, tape.inner, tape.middle, tape.gates)
            args = (dy, *packing.backward(weights), *kept, dh, dinner, dmiddle, dz, down, new_counters())
            run(self._scans[1], plan.shards, *how, *args)
        self._first_gradients([dh[:, :P], *dinner], tape, dfirst, down)
        self._weight_gradients(dgates, dz, tape, self._weights(grads))
        self._own_gradients(down, tape.own, grads)
        dx = None if tape.x.ndim == 2 else self._input_gradient(dgates, weights, tape.x.shape)
        self._spare.append(tape.gates)
        return dx

    def _first_gradients(
        self, dstates: list[np.ndarray], tape: Tape, dfirst: list[np.ndarray], down: np.ndarray
    ) -> None:
        """Into `dfirst`, through the states in front of the cell's own, which were computed from the first ones."""
        dstates, hidden = list(dstates), self.program.hidden
        if hidden:
            start = tape.y.shape[0] - 1 if self.reverse else 0
            states = tape.inner[hidden - 1 :, start]
            own, mask = tape.own[:, : self.hidden], self._mask(tape.given, states[0])[0]
            dinner, downs = self.program.front.backward(dstates[:hidden], states, own, mask)
            dstates = [a + b for a, b in zip(dstates[hidden:], dinner)]
            for total, one in zip(down, downs):
                total[:, : self.hidden] += one
        for out, array in zip(dfirst, dstates):
            out[...] = array

    def _weight_gradients(self, dgates: np.ndarray, dz: np.ndarray, tape: Tape, dweights: Weights) -> None:
        """Everything time-parallel: dW = dgates.T @ inputs."""
        x, y, packing, kernel = tape.x, read_only(tape.y), self.packing, outer_kernel(VECTORS, self.dtype)
        dgates, H = read_only(dgates), self.hidden
        ignored = np.empty(len(dweights.weight_ih), self.dtype)
        dbias_ih, dbias_hh = (ignored if d is None else d for d in (dweights.bias_ih, dweights.bias_hh))
        dweight_hh = np.empty((0, 1), self.dtype) if dweights.weight_hh is None else dweights.weight_hh
        pieces = (packing.units, packing.columns)
        # h of the step before is one row of y earlier, in the second direction one row later: y[2:].
        _, B, ld = y.shape
        offset = self.reverse * (2 * B * ld + self.output)
        hidden, outputs = (y, offset, ld, packing.recurrent_runs, *pieces), (dweight_hh, dbias_hh)
        inputs, shards = (dweights.weight_ih, dbias_ih), shards_for(2 * len(dgates) * dweight_hh.size)
        if x.ndim == 2:
            tokens = (x.ravel(), packing.input_runs)
            run(gemm.gradient_with_tokens, shards, kernel, dgates, *hidden, *tokens, *outputs, *inputs)
        else:
            if self.layout.recurrent:
                run(gemm.gradient, shards, kernel, dgates, *hidden, *outputs)
            shards = shards_for(2 * len(dgates) * dweights.weight_ih.size)
            run(gemm.gradient, shards, kernel, dgates, x, 0, self.inputs, packing.input_runs, *pieces, *inputs)
        middle = read_only(tape.middle)
        if self.layout.second:
            shards = shards_for(2 * len(dgates) * H * H * self.layout.second)
            run(gemm.gradient, shards, kernel, dgates, middle, 0, H, packing.second_runs, *pieces, *outputs)
        if dweights.weight_hr is not None:
            dz, runs = read_only(dz.reshape(-1, self.output)), gemm.runs_of(self.output, self.dtype)
            dbias = np.empty(self.output, self.dtype) if dweights.bias_hr is None else dweights.bias_hr
            shards = shards_for(2 * len(dz) * dweights.weight_hr.size)
            run(gemm.gradient, shards, kernel, dz, middle, 0, H, runs, 0, 0, dweights.weight_hr, dbias)

    def _own_gradients(self, down: np.ndarray, own: np.ndarray, grads: Parameters) -> None:
        totals, row = down.sum(axis=1)[:, : self.hidden], 0
        for one in self.cell.own:
            rows = slice(row, row + one.rows)
            total = totals[rows]
            if one.exponent is not None:  # d exp(k p) = k exp(k p) dp
                total = total * own[rows, : self.hidden] * self.dtype.type(one.exponent)
            grads[one.name + self.end][...] = total if one.rows > 1 else total[0]
            row += one.rows

    def _input_gradient(self, dgates: np.ndarray, weights: Weights, shape: tuple[int, ...]) -> np.ndarray:
        """dx = dgates @ weight_ih."""
        packing, packed = self.packing, self.packing.backward_ih(weights)
        start = np.zeros(gemm.padded(self.inputs, self.dtype), self.dtype)
        dx = np.empty((len(dgates), self.inputs), self.dtype)
        # The input's slots of all panels lie side by side, or in a piece of every panel.
        depth = packed.shape[1] // (1 if packing.layout.inputs == packing.layout.kept else packing.panels)
        shards = shards_for(2 * len(dgates) * weights.weight_ih.size)
        kernel = product_kernel(VECTORS, self.dtype)
        run(gemm.multiply, shards, kernel, read_only(dgates), 0, packing.columns, depth, packed, start, dx)
        return dx.reshape(shape)
