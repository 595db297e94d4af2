"""One layer in one direction: the scan, and the products around it.

first       the states of the scan from those of the cell
forward     pack -> input product and scan, panel by panel
backward    scan -> weight, bias and input gradients, each one big product
finish      the gradients of the first states and of the cell's own parameters

A sequence may go through `forward` piece by piece, and through `backward` from its last piece to the first, with the
same bits: a `Carry` takes along what passes from one piece to the next.
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
from nbrnn.kernels.scan import Backward, Forward, compile_front, compile_scan, make_plan
from nbrnn.kernels.schedule import Schedule, shards_for
from nbrnn.kernels.tiles import VECTORS, outer_kernel, product_kernel
from nbrnn.layers.module import Parameters, read_only
from nbrnn.layers.packing import Packing, Weights, packing_of
from nbrnn.layers.sequences import Steps

NO_ROWS = np.empty(0, np.int64)


class Given(NamedTuple):
    """What equations take beside x."""

    values: np.ndarray  # [., N, H], or [., B, H] where it is the same for all steps
    by_step: bool
    mask: np.ndarray | None = None  # [B, H], of what is fed back


class Tape(NamedTuple):
    """What forward keeps; see `kernels.scan`."""

    steps: Steps
    x: np.ndarray  # [N, I] or tokens [N]
    y: np.ndarray  # [N + 2 B, D P]
    inner: np.ndarray  # [., N + 2 B, H]
    middle: np.ndarray  # [N, .] where there is a second product
    gates: np.ndarray  # flat
    own: np.ndarray  # [., J U W]
    given: Given


class Carry(NamedTuple):
    """What backward passes from one piece of a sequence to the one before, and the weights that all of them need."""

    dh: np.ndarray  # [B, .], the gradient of what was fed back, filled up to whole panels
    dinner: np.ndarray  # [., B, H], of the states behind it
    down: np.ndarray  # [., B, J U W], of the cell's own parameters
    weights: tuple[np.ndarray, np.ndarray]  # of the recurrent and of the second product, transposed, in panels
    w_ih: np.ndarray | None  # of the input product, None where x holds tokens


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
        self.scans = compile_scan(self.program.equations)
        self._kernels = self.packing.kernels(shape.options.projection is not None)
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

    def first(self, params: Parameters, states: list[np.ndarray], given: Given) -> list[np.ndarray]:
        """The states of the scan [B, .]: the cell's own, and in front of them those that are computed from them."""
        if not self.program.hidden:
            return states
        stack = np.ascontiguousarray(np.stack(states))  # a stack may have any order
        out = np.empty((self.program.hidden, *stack.shape[1:]), self.dtype)
        mask = self._mask(given, stack[0])
        run(compile_front(self.program.equations)[0], 1, stack, self.own(params), mask, out)
        return [*out, *states]

    def forward(
        self,
        params: Parameters,
        steps: Steps,
        x: np.ndarray,
        y: np.ndarray,
        states: list[np.ndarray],
        given: Given,
        keep: bool,
        packed: tuple[np.ndarray, ...] | None = None,
    ) -> tuple[Tape, list[np.ndarray]]:
        """Fill its columns of y; what backward needs, and the last states of the scan.

        x: [N, I] or tokens [N]; y: [N + 2 B, D P]; states: [B, .], those of the scan; packed: the weights, if they are.
        """
        B, H, packing = steps.B, self.hidden, self.packing
        half = slice(self.reverse * self.output, (self.reverse + 1) * self.output)
        start, end = steps.first(self.reverse), steps.last(self.reverse)
        inner = np.empty((len(states) - 1, len(y) if keep else B, H), self.dtype)
        y[start, half] = states[0]
        for out, state in zip(inner, states[1:]):
            out[start if keep else slice(B)] = state
        plan, _ = self.schedules(steps.T, steps.mean_rows)
        if keep:
            packed, shared = packed or packing.forward(self._weights(params)), False
            gates = self._take(steps.N * packing.panels * packing.columns)
            middle = np.empty((steps.N, self.middle), self.dtype)
        else:
            packed = packed or self.packed(params)
            middle, gates, shared = self.scratch(plan, B)
        tape = Tape(steps, x, y, inner, middle, gates, self.own(params), given)
        if steps.N:
            counters = new_counters()
            run(self.scans[0], plan.shards, self.plan(tape, packed, plan, keep, shared, counters))
        return tape, [y[end, half], *(array[end if keep else slice(B)] for array in inner)]

    @property
    def middle(self) -> int:
        """Numbers in a row of `middle`."""
        second = self.layout.second or self.shape.options.projection
        return self.hidden if second else self.layout.norms and self.layout.norms + 2

    def scratch(self, plan: Schedule, B: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """`middle` and gates of a scan that keeps nothing, and whether all panels share one tile."""
        shared = not (plan.block > 1 or self.layout.second or self.layout.norms)
        columns = self.packing.columns * (1 if shared else self.packing.panels)
        return np.empty((B, self.middle), self.dtype), np.empty(B * plan.block * columns, self.dtype), shared

    def plan(
        self, tape: Tape, packed: tuple, plan: Schedule, keep: bool, shared: bool, counters: np.ndarray
    ) -> np.ndarray:
        """The forward scan's argument."""
        steps, x, y, inner, middle, gates, own, given = tape
        numbers = Forward(
            *self._kernels, plan.by_units, plan.block, keep, shared, self.reverse, x.ndim == 1, steps.T, steps.B,
            self.inputs, self.hidden, self.output, given.values.shape[1], given.by_step, self.reverse * self.output,
            y.shape[1], inner.shape[1], middle.shape[1],
        )  # fmt: skip
        return make_plan(
            numbers, steps.lengths, steps.starts, steps.slots, x, *packed, own, given.values, y, inner, middle, gates,
            counters,
        )  # fmt: skip

    def _weights(self, params: Mapping[str, np.ndarray]) -> Weights:
        return Weights(*[None if name is None else params[name] for name in self._fields])

    def packed(self, params: Parameters) -> tuple:
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

    def own(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """The cell's own parameters as the equations take them, [., J U W]."""
        own, row = np.zeros((self.layout.own, self.packing.panels * self.packing.units), self.dtype), 0
        for one in self.cell.own:
            value = params[one.name + self.end]
            own[row : row + one.rows, : self.hidden] = value if one.exponent is None else np.exp(one.exponent * value)
            row += one.rows
        return own

    def _mask(self, given: Given, state: np.ndarray) -> np.ndarray:
        """The mask of what is fed back, [1, B, H]; anything where there is none."""
        return (state if given.mask is None else given.mask)[None]

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

    def carry(self, params: Parameters, dlast: list[np.ndarray], tokens: bool) -> Carry:
        """From the gradients of the cell's last states [B, .]."""
        B, H, hidden = len(dlast[0]), self.hidden, self.program.hidden
        dlast = [np.zeros((B, H), self.dtype)] * hidden + dlast
        dh = np.zeros((B, gemm.padded(self.output, self.dtype)), self.dtype)
        dh[:, : self.output] = dlast[0]
        dinner = np.empty((len(dlast) - 1, B, H), self.dtype)
        for out, array in zip(dinner, dlast[1:]):
            out[...] = array
        down = np.zeros((self.layout.own, B, self.packing.panels * self.packing.units), self.dtype)
        *weights, w_ih = self.packing.backward(self._weights(params), not tokens)
        return Carry(dh, dinner, down, tuple(weights), None if tokens else w_ih)

    def backward(self, grads: Parameters, tape: Tape, dy: np.ndarray, carry: Carry, add: bool) -> np.ndarray | None:
        """The weight gradients into `grads`, or with `add` added to them; dx [N, I], None for tokens.

        Uses up the tape, and turns `carry` into that of the piece before. dy: [N, D P].
        """
        steps, packing, H = tape.steps, self.packing, self.hidden
        projection = self.shape.options.projection
        dgates = tape.gates.reshape(steps.N, packing.panels * packing.columns)
        dz = np.empty((steps.N if projection else 0, self.output), self.dtype)
        if steps.N:
            _, plan = self.schedules(steps.T, steps.mean_rows)
            columns = packing.panels * packing.columns if self.layout.norms else gemm.padded(H, self.dtype)
            dmiddle, counters = np.empty((steps.B, columns), self.dtype), new_counters()
            y, inner, middle, given = tape.y, tape.inner, tape.middle, tape.given
            numbers = Backward(
                product_kernel(VECTORS, self.dtype), plan.by_units, self.reverse, steps.T, steps.B, H, self.output,
                given.values.shape[1], given.by_step, self.reverse * self.output, y.shape[1], inner.shape[1],
                middle.shape[1], carry.dh.shape[1], columns,
            )  # fmt: skip
            run(self.scans[1], plan.shards, make_plan(
                numbers, steps.lengths, steps.starts, steps.slots, dy, *carry.weights, tape.own, given.values, y, inner,
                middle, tape.gates, carry.dh, carry.dinner, dmiddle, dz, carry.down, counters,
            ))  # fmt: skip
        self._weight_gradients(dgates, dz, tape, self._weights(grads), add)
        dx = None if carry.w_ih is None else self._input_gradient(dgates, carry.w_ih)
        self._spare.append(tape.gates)
        return dx

    def finish(self, grads: Parameters, states: list[np.ndarray], tape: Tape, carry: Carry) -> list[np.ndarray]:
        """The gradients of the cell's own parameters into `grads`, and of its first states.

        states: the first ones of the scan; tape: of the first piece. A gradient passes through those states that were
        computed from the cell's.
        """
        dstates, hidden, own = [carry.dh[:, : self.output], *carry.dinner], self.program.hidden, tape.own
        if hidden:
            mask, first = self._mask(tape.given, states[0]), np.ascontiguousarray(np.stack(states[hidden:]))
            found = np.empty_like(first)
            entry, d = compile_front(self.program.equations)[1], np.ascontiguousarray(np.stack(dstates[:hidden]))
            run(entry, 1, d, first, own, mask, found, carry.down)
            dstates = [a + b for a, b in zip(dstates[hidden:], found)]
        self._own_gradients(carry.down, own, grads)
        return dstates

    def _weight_gradients(self, dgates: np.ndarray, dz: np.ndarray, tape: Tape, dweights: Weights, add: bool) -> None:
        """Everything time-parallel: dW = dgates.T @ inputs."""
        x, y, packing, kernel = tape.x, read_only(tape.y), self.packing, outer_kernel(VECTORS, self.dtype)
        dgates, H = read_only(dgates), self.hidden
        ignored = np.empty(len(dweights.weight_ih), self.dtype)
        dbias_ih, dbias_hh = (ignored if d is None else d for d in (dweights.bias_ih, dweights.bias_hh))
        dweight_hh = np.empty((0, 1), self.dtype) if dweights.weight_hh is None else dweights.weight_hh
        pieces = (packing.units, packing.columns)
        # h of the step before is one slot of y earlier, in the second direction one slot later.
        ld, slot = y.shape[1], tape.steps.slot(2 * self.reverse)
        first, rows = (slot.start, NO_ROWS) if isinstance(slot, slice) else (0, slot)
        offset = first * ld + self.reverse * self.output
        hidden, outputs = (y, offset, ld, rows, packing.recurrent_runs, *pieces, add), (dweight_hh, dbias_hh)
        inputs, shards = (dweights.weight_ih, dbias_ih), shards_for(2 * len(dgates) * dweight_hh.size)
        if x.ndim == 1:
            run(gemm.gradient_with_tokens, shards, kernel, dgates, *hidden, x, packing.input_runs, *outputs, *inputs)
        else:
            if self.layout.recurrent:
                run(gemm.gradient, shards, kernel, dgates, *hidden, *outputs)
            shards, all_x = shards_for(2 * len(dgates) * dweights.weight_ih.size), (x, 0, self.inputs, NO_ROWS)
            run(gemm.gradient, shards, kernel, dgates, *all_x, packing.input_runs, *pieces, add, *inputs)
        middle = read_only(tape.middle), 0, H, NO_ROWS
        if self.layout.second:
            shards = shards_for(2 * len(dgates) * H * H * self.layout.second)
            run(gemm.gradient, shards, kernel, dgates, *middle, packing.second_runs, *pieces, add, *outputs)
        if dweights.weight_hr is not None:
            dz, runs = read_only(dz), gemm.runs_of(self.output, self.dtype)
            dbias = np.empty(self.output, self.dtype) if dweights.bias_hr is None else dweights.bias_hr
            shards = shards_for(2 * len(dz) * dweights.weight_hr.size)
            run(gemm.gradient, shards, kernel, dz, *middle, runs, 0, 0, add, dweights.weight_hr, dbias)

    def _own_gradients(self, down: np.ndarray, own: np.ndarray, grads: Parameters) -> None:
        totals, row = down.sum(axis=1)[:, : self.hidden], 0
        for one in self.cell.own:
            rows = slice(row, row + one.rows)
            total = totals[rows]
            if one.exponent is not None:  # d exp(k p) = k exp(k p) dp
                total = total * own[rows, : self.hidden] * self.dtype.type(one.exponent)
            grads[one.name + self.end][...] = total if one.rows > 1 else total[0]
            row += one.rows

    def _input_gradient(self, dgates: np.ndarray, packed: np.ndarray) -> np.ndarray:
        """dx = dgates @ weight_ih."""
        packing = self.packing
        start = np.zeros(gemm.padded(self.inputs, self.dtype), self.dtype)
        dx = np.empty((len(dgates), self.inputs), self.dtype)
        # The input's slots of all panels lie side by side, or in a piece of every panel.
        depth = packed.shape[1] // (1 if packing.layout.inputs == packing.layout.kept else packing.panels)
        shards = shards_for(2 * len(dgates) * packed.size)
        kernel = product_kernel(VECTORS, self.dtype)
        run(gemm.multiply, shards, kernel, read_only(dgates), 0, packing.columns, depth, packed, start, dx)
        return dx
