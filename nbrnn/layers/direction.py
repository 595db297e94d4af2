"""One layer in one direction: the scan, and the products around it.

forward     pack -> first states of the scan -> input product and scan, panel by panel
backward    scan -> weight, bias and input gradients, each one big product
finish      the gradients of the first states and of the cell's own parameters

Forward and backward are one call of compiled code each. The memory that they need and the arguments of that call, a
`Tape`, are used again by the next call with the same steps: a training loop touches no new memory.

A sequence may go through `forward` piece by piece, and through `backward` from its last piece to the first, with the
same bits: a `Carry` takes along what passes from one piece to the next.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nbrnn.cells.cell import Cell
from nbrnn.cells.program import Options, Program, compile_cell
from nbrnn.kernels import gemm, half_gemm, schedule
from nbrnn.kernels.amx import BEHIND
from nbrnn.kernels.barrier import new_counters
from nbrnn.kernels.jit import Prepared, Stage, get_num_threads, prepare, run, stage, threading_layer
from nbrnn.kernels.memory import empty, zeros
from nbrnn.kernels.products import round_matrix
from nbrnn.kernels.scan import Backward, Forward, compile_front, compile_scan
from nbrnn.kernels.schedule import Schedule, shards_for
from nbrnn.kernels.tiles import VECTORS, outer_kernel
from nbrnn.layers.module import Parameters
from nbrnn.layers.packing import Ahead, Back, Packing, Weights, packing_of
from nbrnn.layers.sequences import Steps

NO_ROWS = np.empty(0, np.int64)
SPARE = 3  # tapes that wait for the next call of their shape


class Given(NamedTuple):
    """What equations take beside x."""

    values: np.ndarray  # [., N, H], or [., B, H] where it is the same for all steps
    by_step: bool
    mask: np.ndarray | None = None  # [B, H], of what is fed back


@dataclass(eq=False)
class Panels:
    """The packed weights of one direction, and the stages that pack them from where the parameters were last."""

    ahead: Ahead
    own: np.ndarray  # [., J U W], the cell's own parameters as the equations take them
    back: Back | None = None
    pack: Prepared | None = None
    pack_back: Prepared | None = None


class Carry(NamedTuple):
    """What backward passes from one piece of a sequence to the one before, and the weights that all of them need."""

    dh: np.ndarray  # [B, .], the gradient of what was fed back, filled up to whole panels
    dinner: np.ndarray  # [., B, H], of the states behind it
    down: np.ndarray  # [., B, J U W], of the cell's own parameters
    back: Back
    tokens: bool


@dataclass(eq=False)
class Tape:
    """The memory of a scan of some `Steps`, and the stages that run on it; see `kernels.scan`."""

    steps: Steps
    threads: int
    how: Schedule
    keep: bool
    panels: Panels
    memory: tuple[np.ndarray, ...]  # of the next three, flat
    inner: np.ndarray  # [., N + 2 B, H], or [., B, H] where nothing is kept
    middle: np.ndarray  # [N, .] or [B, .]
    gates: np.ndarray  # flat
    shared: bool  # whether all panels share one tile of gates
    counters: np.ndarray
    # What the last call brought
    x: np.ndarray | None = None  # [N, I], or tokens [N]
    y: np.ndarray | None = None  # [N + 2 B, D P]
    given: Given | None = None
    front: Prepared | None = None
    ahead: Prepared | None = None
    back: Prepared | None = None
    front_back: Prepared | None = None


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
        self.layout, self.products = self.program.equations.layout, self.program.equations.products
        self.packing: Packing = packing_of(self.cell, self.layout, self.hidden, self.output, self.dtype, self.products)
        self.scans = compile_scan(self.program.equations)
        self.projected = shape.options.projection is not None
        self.kernels = self.packing.kernels(self.projected)
        self.names = list(self.shapes())
        self._fields = [name + end if name + end in self.names else None for name in Weights._fields]
        self._lock = threading.Lock()
        self._spare: tuple[list[Tape], list[Tape]] = [], []
        self._spare_panels: list[Panels] = []
        self._known: tuple[np.ndarray, Panels] | None = None

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

    @property
    def middle(self) -> int:
        """Numbers in a row of `middle`."""
        second = self.layout.second or self.projected
        return self.hidden if second else self.layout.norms and self.layout.norms + 2

    def schedules(self, steps: Steps) -> tuple[Schedule, Schedule]:
        """How forward and backward run."""
        threads, H, layout, P = get_num_threads(), self.hidden, self.layout, self.output
        T, B, layer = steps.T, steps.mean_rows, threading_layer() if threads > 1 else ""
        columns = (layout.recurrent + layout.second) * H
        projection = P * H if self.projected else 0
        work, weights = columns * P + projection, (columns * P + projection) * self.dtype.itemsize
        # A normalisation takes whole rows: nothing to divide.
        panels, plain = (1, 1) if layout.norms else (self.packing.panels, gemm.panels(min(H, P), self.dtype))
        ahead = schedule.choose(T, B, 2 * (work + layout.inputs * H * self.inputs), weights, panels, threads, layer)
        return ahead, schedule.choose(T, B, 2 * work, weights, plain, threads, layer)

    def _weights(self, params: Mapping[str, np.ndarray]) -> Weights:
        """The parameters that go into products."""
        return Weights(*[None if name is None else params[name] for name in self._fields])

    # -------------------------------------------------------------- forward

    def forward(
        self,
        params: Parameters,
        steps: Steps,
        x: np.ndarray,
        y: np.ndarray,
        states: list[np.ndarray],
        given: Given,
        keep: bool,
        panels: Panels | None = None,
    ) -> tuple[Tape, list[np.ndarray]]:
        """Fill its columns of y; what backward needs, and the last states of the scan.

        x: [N, I] or tokens [N]; y: [N + 2 B, D P]; states: [B, .], those of the cell, or what an earlier call returned;
        panels: the weights, if they are packed. The tape has to be given back (`release`) after the last use of it and
        of the states.
        """
        half = slice(self.reverse * self.output, (self.reverse + 1) * self.output)
        start, end = steps.ends[self.reverse]
        tape = self.take(steps, keep, panels or (None if keep else self.packed(params)))
        if panels is None and keep:
            self.pack(params, tape.panels)
        if len(states) < self.layout.states:
            states = [*self.front(tape, states, given), *states]
        y[start, half] = states[0]
        for out, state in zip(tape.inner, states[1:]):
            out[start if keep else slice(steps.B)] = state
        tape.x, tape.y, tape.given = x, y, given
        if steps.N:
            self._run(tape)
        return tape, [y[end, half], *(array[end if keep else slice(steps.B)] for array in tape.inner)]

    def _run(self, tape: Tape) -> None:
        """The forward scan."""
        named = {"x": tape.x, "y": tape.y, "given": tape.given.values}
        key = tape.x.ndim, tape.given.by_step
        tape.ahead = prepare(tape.ahead, key, named, lambda: self.scan(tape))
        if tape.how.by_units:
            tape.counters[:] = 0
        tape.ahead.stages.run()

    def scan(self, tape: Tape) -> list[Stage]:
        """The stages of the forward scan."""
        steps, x, y, (given, by_step, _), how = tape.steps, tape.x, tape.y, tape.given, tape.how
        tokens, stages, middle = x.ndim == 1, [], tape.middle
        if self.products.narrow:
            middle = self._scratch(how, steps, self.output)
            x, stages = (x, []) if tokens else self._round(x, 0, self.inputs, 1, 0)
        return [*stages, stage(self.scans[0], how.shards, Forward(
            *self.kernels, how.by_units, how.block, tape.keep, tape.shared, self.reverse, tokens, steps.T, steps.B,
            self.inputs, self.hidden, self.output, given.shape[1], by_step, self.reverse * self.output, y.shape[1],
            tape.inner.shape[1], middle.shape[-1], steps.lengths, steps.starts, steps.slots, x, *tape.panels.ahead,
            tape.panels.own, given, y, tape.inner, middle, tape.gates, tape.counters,
        ))]  # fmt: skip

    def _scratch(self, how: Schedule, steps: Steps, depth: int) -> np.ndarray:
        """Where a scan rounds the rows of one step, once or for each shard."""
        planes = how.shards if how.by_units else 1
        return zeros((planes, steps.B + BEHIND, self.products.row(depth)), self.products.number.dtype)

    def _round(self, x: np.ndarray, first: int, piece: int, pieces: int, step: int) -> tuple[np.ndarray, list[Stage]]:
        """A matrix of narrow factors, of some columns of x, and the stage that fills it; see `round_matrix`."""
        out = zeros((len(x) + BEHIND, self.products.row(piece * pieces)), self.products.number.dtype)
        kernel, shards = round_matrix(self.products), shards_for(20 * out.size)
        return out, [stage(kernel, shards, x, first, step, piece, pieces, out)]

    def front(self, tape: Tape, states: list[np.ndarray], given: Given) -> np.ndarray:
        """Those states of the scan [., B, P] that stand in front of the cell's and are computed from them."""
        B, H = states[0].shape
        out = np.empty((self.program.hidden, B, H), self.dtype)
        if self.program.hidden:
            states = _stack(states)
            own, mask, kernel = tape.panels.own, self._mask(given, states[0]), compile_front(self.program.equations)[0]
            named = {"states": states, "mask": mask, "out": out}
            tape.front = prepare(tape.front, (own,), named, lambda: [stage(kernel, 1, states, own, mask, out)])
            tape.front.stages.run()
        return out

    def take(self, steps: Steps, keep: bool, panels: Panels | None) -> Tape:
        """A tape: that of an earlier call with these steps, or one in its memory."""
        spare, threads, old = self._spare[keep], get_num_threads(), None
        with self._lock:
            for n, tape in enumerate(spare):
                if tape.steps is steps and tape.threads == threads and (panels is None or panels is tape.panels):
                    return spare.pop(n)
            # Lengths hardly ever come twice, while a few even shapes may take turns.
            if spare and (not steps.even or len(spare) == SPARE):
                old = spare.pop(0)
        if panels is None:
            panels = self.new_panels() if old is None else old.panels
        return self.new_tape(steps, keep, panels, old)

    def release(self, tape: Tape) -> None:
        """Let a later call have this tape."""
        tape.x = tape.y = tape.given = None
        with self._lock:
            spare = self._spare[tape.keep]
            spare.append(tape)
            del spare[:-SPARE]

    def new_tape(self, steps: Steps, keep: bool, panels: Panels, old: Tape | None = None) -> Tape:
        """A tape, in the memory of another one where that suffices."""
        N, B, packing, (how, _) = steps.N, steps.B, self.packing, self.schedules(steps)
        shared = not (keep or how.block > 1 or self.layout.second or self.layout.norms)
        columns = packing.columns * (1 if shared else packing.panels)
        shapes = (
            (self.layout.states - 1, N + 2 * B if keep else B, self.hidden),
            (N if keep else B, self.middle),
            ((N if keep else B * how.block) * columns,),
        )
        memory = tuple(
            _room(math.prod(shape), None if old is None else old.memory[n], self.dtype)
            for n, shape in enumerate(shapes)
        )
        arrays = (array[: math.prod(shape)].reshape(shape) for array, shape in zip(memory, shapes))
        return Tape(steps, get_num_threads(), how, keep, panels, memory, *arrays, shared, new_counters())

    # -------------------------------------------------------------- packed weights

    def take_panels(self) -> Panels:
        """Room for packed weights, perhaps that of an earlier call."""
        try:
            return self._spare_panels.pop()
        except IndexError:
            return self.new_panels()

    def release_panels(self, panels: Panels) -> None:
        """Let a later call have this room."""
        self._spare_panels.append(panels)

    def new_panels(self) -> Panels:
        own = zeros((self.layout.own, self.packing.panels * self.packing.units), self.dtype)
        return Panels(self.packing.forward(self.inputs, self.projected), own)

    def pack(self, params: Parameters, panels: Panels) -> Panels:
        """Bring the parameters as they are now into the panels."""
        panels.pack = prepare(
            panels.pack, (params.flat,), {}, lambda: self.packing.pack(self._weights(params), panels.ahead)
        )
        panels.pack.stages.run()
        self._pack_own(params, panels.own)
        return panels

    def _pack_own(self, params: Parameters, out: np.ndarray) -> None:
        """The cell's own parameters as the equations take them, [., J U W]."""
        row = 0
        for one in self.cell.own:
            value = params[one.name + self.end]
            here = out[row : row + one.rows, : self.hidden]
            here[...] = value if one.exponent is None else np.exp(one.exponent * value)
            row += one.rows

    def _pack_back(self, params: Parameters, panels: Panels, tokens: bool) -> Back:
        """The weights for the way back, those of the input product unless x holds tokens."""
        if panels.back is None or bool(len(panels.back.w_ih)) == tokens:
            panels.back = self.packing.backward(0 if tokens else self.inputs, self.projected)
        panels.pack_back = prepare(
            panels.pack_back, (params.flat, panels.back), {},
            lambda: self.packing.pack_back(self._weights(params), panels.back),
        )  # fmt: skip
        panels.pack_back.stages.run()
        return panels.back

    def packed(self, params: Parameters) -> Panels:
        """The packed weights: those of the last call where the parameters still are the same, by their fingerprint."""
        flat = params.span(self.names[0], self.names[-1]).view(np.uint32)
        found = np.empty(-(-flat.size // len(gemm.FACTORS)), np.uint64)
        run(gemm.fingerprint, shards_for(20 * flat.size), flat, gemm.FACTORS, found)
        known = self._known
        if known is None or not np.array_equal(known[0], found):
            known = self._known = found, self.pack(params, self.new_panels())
        return known[1]

    def _mask(self, given: Given, state: np.ndarray) -> np.ndarray:
        """The mask of what is fed back, [1, B, H]; anything where there is none."""
        return (state if given.mask is None else given.mask)[None]

    # -------------------------------------------------------------- backward

    def carry(self, params: Parameters, panels: Panels, B: int, dlast: list[np.ndarray] | None, tokens: bool) -> Carry:
        """From the gradients of the cell's last states [B, .], None for zeros."""
        dh = zeros((B, gemm.padded(self.output, self.dtype)), self.dtype)
        dinner = np.zeros((self.layout.states - 1, B, self.hidden), self.dtype)
        if dlast is not None:
            # The states that are computed from the cell's stand in front of them.
            outs = [dh[:, : self.output], *dinner][self.program.hidden :]
            for out, array in zip(outs, dlast):
                out[...] = array
        down = zeros((self.layout.own, B, self.packing.panels * self.packing.units), self.dtype)
        return Carry(dh, dinner, down, self._pack_back(params, panels, tokens), tokens)

    def backward(self, grads: Parameters, tape: Tape, dy: np.ndarray, carry: Carry, add: bool) -> np.ndarray | None:
        """The weight gradients into `grads`, or with `add` added to them; dx [N, I], None for tokens.

        Uses up the tape, and turns `carry` into that of the piece before. dy: [N, D P].
        """
        dx = empty((0 if carry.tokens else tape.steps.N, self.inputs), self.dtype)
        named = {"x": tape.x, "y": tape.y, "given": tape.given.values, "dy": dy, "dx": dx, "dh": carry.dh,
                 "dinner": carry.dinner, "down": carry.down}  # fmt: skip
        key = grads.flat, carry.back, add, tape.given.by_step
        tape.back = prepare(tape.back, key, named, lambda: self._stages_back(grads, tape, dy, dx, carry, add))
        tape.counters[:] = 0
        tape.back.stages.run()
        return None if carry.tokens else dx

    def _stages_back(
        self, grads: Parameters, tape: Tape, dy: np.ndarray, dx: np.ndarray, carry: Carry, add: bool
    ) -> list[Stage]:
        N, packing, dweights = tape.steps.N, self.packing, self._weights(grads)
        dz = empty((N if self.projected else 0, self.output), self.dtype)
        dgates = tape.gates.reshape(N, packing.panels * packing.columns)
        stages = [self._scan_back(tape, dy, dz, carry)] if N else []
        stages += self._weight_gradients(tape, dgates, dz, dweights, add)
        return stages if carry.tokens else [*stages, *self._input_gradient(dgates, carry.back.w_ih, dx)]

    def _scan_back(self, tape: Tape, dy: np.ndarray, dz: np.ndarray, carry: Carry) -> Stage:
        """From the tape to the gradients of the pre-activations."""
        steps, (given, by_step, _), (w_hh, w_mid, _), H = tape.steps, tape.given, carry.back, self.hidden
        _, how = self.schedules(steps)
        narrow = self.products.narrow
        middle = self._scratch(how, steps, len(self.packing.recurrent_order)) if narrow else tape.middle
        columns = self.packing.panels * self.packing.columns if self.layout.norms else gemm.padded(H, self.dtype)
        return stage(self.scans[1], how.shards, Backward(
            self.packing.plain_kernel(), how.by_units, self.reverse, steps.T, steps.B, H, self.output,
            given.shape[1], by_step, self.reverse * self.output, tape.y.shape[1], tape.inner.shape[1],
            middle.shape[-1], carry.dh.shape[1], columns, steps.lengths, steps.starts, steps.slots, dy, w_hh, w_mid,
            tape.panels.own, given, tape.y, tape.inner, middle, tape.gates, carry.dh, carry.dinner,
            empty((steps.B, columns), self.dtype), dz, carry.down, tape.counters,
        ))  # fmt: skip

    def _weight_gradients(
        self, tape: Tape, dgates: np.ndarray, dz: np.ndarray, dweights: Weights, add: bool
    ) -> list[Stage]:
        """Everything time-parallel: dW = dgates.T @ inputs."""
        x, y, packing, N = tape.x, tape.y, self.packing, len(dgates)
        left, gradient = (outer_kernel(VECTORS, self.dtype), dgates), gemm.gradient
        ignored = np.empty(len(dweights.weight_ih), self.dtype)
        dbias_ih, dbias_hh = (ignored if d is None else d for d in (dweights.bias_ih, dweights.bias_hh))
        dweight_hh = np.empty((0, 1), self.dtype) if dweights.weight_hh is None else dweights.weight_hh
        how = packing.units, packing.columns, add
        # h of the step before is one slot of y earlier, in the second direction one slot later.
        ld, slot = y.shape[1], tape.steps.slot(2 * self.reverse)
        first, rows = (slot.start, NO_ROWS) if isinstance(slot, slice) else (0, slot)
        offset = first * ld + self.reverse * self.output
        hidden, outputs = (y, offset, ld, rows, packing.recurrent_runs, *how), (dweight_hh, dbias_hh)
        inputs, shards, stages = (dweights.weight_ih, dbias_ih), shards_for(2 * N * dweight_hh.size), []
        if x.ndim == 1:
            tokens = x, packing.input_runs, *outputs, *inputs
            stages.append(stage(gemm.gradient_with_tokens, shards, *left, *hidden, *tokens))
        else:
            if self.products.narrow:
                gradient, left = half_gemm.gradient, (packing.plain_kernel(), dgates)
            if self.layout.recurrent:
                stages.append(stage(gradient, shards, *left, *hidden, *outputs))
            shards, all_x = shards_for(2 * N * dweights.weight_ih.size), (x, 0, self.inputs, NO_ROWS)
            stages.append(stage(gradient, shards, *left, *all_x, packing.input_runs, *how, *inputs))
        middle = tape.middle, 0, self.hidden, NO_ROWS
        if self.layout.second:
            shards = shards_for(2 * N * self.hidden**2 * self.layout.second)
            stages.append(stage(gemm.gradient, shards, *left, *middle, packing.second_runs, *how, *outputs))
        if self.projected:
            runs, shards = gemm.runs_of(self.output, self.dtype), shards_for(2 * N * dweights.weight_hr.size)
            dbias = np.empty(self.output, self.dtype) if dweights.bias_hr is None else dweights.bias_hr
            right = *middle, runs, 0, 0, add
            stages.append(stage(gemm.gradient, shards, left[0], dz, *right, dweights.weight_hr, dbias))
        return stages

    def _input_gradient(self, dgates: np.ndarray, packed: np.ndarray, dx: np.ndarray) -> list[Stage]:
        """dx = dgates @ weight_ih."""
        packing, start = self.packing, zeros((gemm.padded(self.inputs, self.dtype),), self.dtype)
        # The input's slots of all panels lie side by side, or in a piece of every panel.
        pieces = 1 if packing.layout.inputs == packing.layout.kept else packing.panels
        depth, step = len(packing.input_order) // pieces, packing.columns
        shards, kernel = shards_for(2 * len(dgates) * packed.size), packing.plain_kernel()
        if self.products.narrow:
            a, stages = self._round(dgates, 0, depth, pieces, step)
            return [*stages, stage(half_gemm.multiply, shards, kernel, a, packed, start, dx)]
        return [stage(gemm.multiply, shards, kernel, dgates, 0, step, depth, packed, start, dx)]

    def finish(self, grads: Parameters, states: list[np.ndarray], tape: Tape, carry: Carry) -> list[np.ndarray]:
        """The gradients of the cell's own parameters into `grads`, and of its first states.

        states: the first ones of the cell; tape: of the first piece. A gradient passes through those states of the
        scan that were computed from them.
        """
        dstates, hidden = [carry.dh[:, : self.output], *carry.dinner], self.program.hidden
        if hidden:
            states = _stack(states)
            d, mask, found = _stack(dstates[:hidden]), self._mask(tape.given, states[0]), np.empty_like(states)
            named = {"d": d, "states": states, "mask": mask, "found": found, "down": carry.down}
            kernel = compile_front(self.program.equations)[1]
            own = tape.panels.own
            args = d, states, own, mask, found, carry.down
            tape.front_back = prepare(tape.front_back, (own,), named, lambda: [stage(kernel, 1, *args)])
            tape.front_back.stages.run()
            dstates = [a + b for a, b in zip(dstates[hidden:], found)]
        self._own_gradients(carry.down, tape.panels.own, grads)
        return dstates

    def _own_gradients(self, down: np.ndarray, own: np.ndarray, grads: Parameters) -> None:
        if not self.cell.own:
            return
        totals, row = down.sum(axis=1)[:, : self.hidden], 0
        for one in self.cell.own:
            rows = slice(row, row + one.rows)
            total = totals[rows]
            if one.exponent is not None:  # d exp(k p) = k exp(k p) dp
                total = total * own[rows, : self.hidden] * self.dtype.type(one.exponent)
            grads[one.name + self.end][...] = total if one.rows > 1 else total[0]
            row += one.rows


def _room(size: int, old: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    """Memory for so many numbers: the old one unless it is too small or by far too large."""
    return old if old is not None and size <= old.size <= 4 * size else empty((size,), dtype)


def _stack(arrays: list[np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(arrays[0][None] if len(arrays) == 1 else np.stack(arrays))
