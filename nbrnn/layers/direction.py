"""One layer in one direction: the scan, and all that is around it.

forward     pack -> first states -> input product and scan, panel by panel -> last states
backward    pack -> gradients of the last states -> block by block, from the last steps on: scan, then weight, bias and
            input gradients, each one big product -> gradients of the first states and of the cell's own parameters

Forward and backward are one call of compiled code each. The memory that they need and the arguments of that call, a
`Tape`, are used again by the next call with the same steps: a training loop touches no new memory.

A sequence may go through `forward` piece by piece, and through `backward` from its last piece to the first, with the
same bits: what passes from one piece to the next stays in the `Carry`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from nbrnn.cells.cell import Cell
from nbrnn.cells.program import Options, Program, compile_cell
from nbrnn.kernels import gemm, half_gemm, schedule
from nbrnn.kernels.amx import BEHIND
from nbrnn.kernels.barrier import new_counters
from nbrnn.kernels.jit import Prepared, Stage, Stages, get_num_threads, prepare, run, stage, threading_layer
from nbrnn.kernels.memory import empty, zeros
from nbrnn.kernels.rows import clear, copy_rows, own_gradient, pack_own
from nbrnn.kernels.scan import compile_fix, compile_front, compile_scan
from nbrnn.kernels.scan_backward import Backward
from nbrnn.kernels.scan_forward import Forward
from nbrnn.kernels.schedule import Schedule, shards_for
from nbrnn.kernels.tiles import VECTORS, outer_kernel
from nbrnn.layers.module import Parameters
from nbrnn.layers.packing import Ahead, Back, Packing, Weights, packing_of, rounded
from nbrnn.layers.sequences import Steps, halves

NO_ROWS = np.empty(0, np.int64)
SPARE = 3  # tapes that wait for the next call of their shape


class Given(NamedTuple):
    """What equations take beside x."""

    values: np.ndarray  # [., N, H], [., B, H] where it is the same for all steps, [., 1, H] where it is for all rows
    by_step: bool
    mask: np.ndarray | None = None  # [1, B, H], of what is fed back
    steady: bool = False  # whether other calls take the same object


class Carry(NamedTuple):
    """What backward passes from one piece of a sequence to the one before, and the weights that all of them need."""

    memory: np.ndarray  # of the next three, flat
    dh: np.ndarray  # [B, .], the gradient of what was fed back, filled up to whole panels
    dinner: np.ndarray  # [., B, H], of the states behind it
    down: np.ndarray  # [., B, J U W], of the cell's own parameters
    back: Back
    tokens: bool
    half: Parameters | None  # where gradients are summed in two halves, those of the second one


@dataclass(eq=False)
class Panels:
    """The packed weights of one direction, and what the way back through them needs."""

    ahead: Ahead
    back: Back  # in the memory of those ahead, unless pieces of a sequence need both in turn
    own: np.ndarray  # [., J U W], the cell's own parameters as the equations take them
    carry: Carry | None = None
    # The stages that fill them
    pack: Prepared | None = None
    pack_back: Prepared | None = None


class Place(NamedTuple):
    """Where a state [B, .] lies: in some rows of a matrix, or the first ones, from some column on."""

    array: np.ndarray
    rows: np.ndarray
    column: int


@dataclass(eq=False)
class Tape:
    """The memory of a scan of some `Steps`, and the stages that run on it; see `kernels.scan`."""

    steps: Steps
    threads: int
    how: Schedule
    blocks: list[tuple[int, int]]  # of steps of the way back, from which to which
    keep: bool
    panels: Panels
    memory: tuple[np.ndarray, ...]  # of the next four, flat
    first: np.ndarray  # [., B, H], the first states where some are computed from others
    inner: np.ndarray  # [., N + 2 B, H], or [., B, H] where they are not kept
    middle: np.ndarray  # [N, .] or [B, .]
    gates: np.ndarray  # flat
    shared: bool  # whether all panels share one tile of gates
    counters: np.ndarray  # of each block
    # What the last call brought
    x: np.ndarray | None = None  # [N, I], or tokens [N]
    fresh: bool = False  # whether what is fed back begins with zeros
    y: np.ndarray | None = None  # [N + 2 B, D P]
    given: Given | None = None
    fixed: np.ndarray | None = None  # what follows from given and own parameters, laid out like given
    ahead: Prepared | None = None
    back: Prepared | None = None


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
    row : int
        Its row of the states of all layers and directions.
    end : str
        The end of its parameters' names, such as ``_l0_reverse``.
    reverse : int
        1 if it reads the sequence from its end and writes the second half of y, else 0.
    """

    def __init__(self, shape: Shape, inputs: int, row: int, end: str, reverse: int):
        self.shape, self.cell, self.inputs = shape, shape.cell, inputs
        self.row, self.end, self.reverse = row, end, reverse
        self.hidden, self.output, self.dtype = shape.hidden, shape.output, shape.dtype
        self.program = shape.program()
        self.layout, self.products = self.program.equations.layout, self.program.equations.products
        self.packing: Packing = packing_of(self.cell, self.layout, self.hidden, self.output, self.dtype, self.products)
        self.scans, self.fronts = compile_scan(self.program.equations), compile_front(self.program.equations)
        self.projected = shape.options.projection is not None
        self.kernels = self.packing.kernels(self.projected)
        # Of a row of the tape, and of all gradients
        numbers = self.packing.panels * self.packing.columns, sum(map(math.prod, self.shapes().values()))
        self._bytes = tuple(count * self.dtype.itemsize for count in numbers)
        self.names = list(self.shapes())
        self._fields = [name + end if name + end in self.names else None for name in Weights._fields]
        self._lock = threading.Lock()
        self._spare: tuple[list[Tape], list[Tape]] = [], []
        self._spare_panels: list[Panels] = []
        # A fingerprint, its packed weights, and what says that they were frozen then
        self._known: tuple[np.ndarray, Panels, object | None] | None = None

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
        rows, layer = (steps.T, steps.mean_rows, steps.even), threading_layer() if threads > 1 else ""
        columns, number = (layout.recurrent + layout.second) * H, self.dtype.itemsize
        projection = P * H if self.projected else 0
        work, weights = columns * P + projection, (columns * P + projection) * number
        # A normalisation takes whole rows: nothing to divide.
        panels, plain = (1, 1) if layout.norms else (self.packing.panels, gemm.panels(min(H, P), self.dtype))
        inputs = layout.inputs * H * self.inputs
        ahead = schedule.choose(*rows, 2 * work, 2 * inputs, weights, inputs * number, 0, panels, threads, layer)
        return ahead, schedule.choose(*rows, 2 * work, 0, weights, 0, columns * number, plain, threads, layer)

    def blocks(self, steps: Steps) -> list[tuple[int, int]]:
        """The blocks of steps of the way back: from which to which, the last ones first."""
        row, gradients = self._bytes
        return schedule.blocks_back(steps.T, steps.N * row, gradients)

    def in_halves(self, steps: Steps) -> bool:
        """Whether the gradients of weights are summed in two halves; steps: all of a sequence."""
        row, gradients = self._bytes
        return steps.even and not self.products.narrow and schedule.in_halves(steps.B, steps.N * row, gradients)

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
        states: Sequence[np.ndarray] | None,
        last: Sequence[np.ndarray],
        given: Given,
        keep: bool,
        panels: Panels | None = None,
    ) -> Tape:
        """Fill its columns of y and its row of the last states; what backward needs.

        x: [N, I] or tokens [N]; y: [N + 2 B, D P]; states: [B, .], those of the cell, or all that the scan has, None
        for zeros; last: newly made, [L D, B, .], as many; panels: the weights, if they are packed. The tape has to be
        given back (`release`) after the last use of it.
        """
        pack = keep and panels is None
        tape = self.take(steps, keep, panels or (None if keep else self.packed(params)))
        tape.x, tape.y, tape.given = x, y, given
        # A single step multiplies its zeros: no weight that is NaN is passed over.
        tape.fresh = states is None and self.cell.emission is None and steps.T > 1
        count, beside = -1 if states is None else len(states), given if given.steady else given.by_step
        key = params.flat if pack else None, count, len(last), x.ndim, beside
        args = tape, states, last, params if pack else None
        tape.ahead = prepare(tape.ahead, key, self._beside(tape, states or ()), last, self._stages, *args)
        if tape.how.by_units:
            tape.counters[:] = 0
        tape.ahead.stages.run()
        return tape

    def _beside(self, tape: Tape, others: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What each call brings."""
        given = tape.given
        if given.steady:
            return [tape.x, tape.y, *others]
        return [tape.x, tape.y, *others, given.values, *(() if given.mask is None else (given.mask,))]

    def _stages(
        self, tape: Tape, states: Sequence[np.ndarray] | None, last: Sequence[np.ndarray], params: Parameters | None
    ) -> list[Stage]:
        """All of the way forward; params: what is to be packed."""
        pack, last = [] if params is None else self._pack(params, tape.panels), [array[self.row] for array in last]
        scan = self.scan(tape) if tape.steps.N else []
        if states is None:
            own = last[len(last) - self.layout.states + self.program.hidden :]
            states = [zeros(array.shape, self.dtype) for array in own]
        ends = self._places(tape, 1)[self.layout.states - len(last) :]
        return [*pack, *self.begin(tape, states), *scan, *copies(ends, whole(last), last)]

    def _places(self, tape: Tape, end: int) -> list[Place]:
        """Where the states of the scan lie: the first ones, or with `end` the last ones."""
        slots = tape.steps.ends[self.reverse][end]
        inside = slots if tape.keep and self.layout.looks_back else NO_ROWS
        return [Place(tape.y, slots, self.reverse * self.output), *(Place(one, inside, 0) for one in tape.inner)]

    def begin(self, tape: Tape, states: Sequence[np.ndarray]) -> list[Stage]:
        """The stages that bring the first states to their places; those that the cell does not have are computed."""
        hidden, first, stages = self.program.hidden, tape.first, []
        if len(states) < self.layout.states:
            stages += copies(whole(states), whole(first[hidden:]), states)
            mask, kernel = first[:1] if tape.given.mask is None else tape.given.mask, self.fronts[0]
            stages.append(stage(kernel, 1, first[hidden:], tape.panels.own, mask, first[:hidden]))
            states = first
        return [*stages, *copies(whole(states), self._places(tape, 0), states)]

    def scan(self, tape: Tape, turn: int = 0) -> list[Stage]:
        """The stages of the forward scan; turn: 1 where it goes on with a sequence, after an odd number of steps."""
        steps, x, y, (given, by_step, *_), how = tape.steps, tape.x, tape.y, tape.given, tape.how
        tokens, stages, middle = x.ndim == 1, [], tape.middle
        if self.products.narrow:
            middle = self._scratch(how, steps, self.output)
            if not tokens:
                x, rounding = rounded(self.products, x, 0, self.inputs, 1, 0)
                stages = [rounding]
        tape.fixed = empty((self.layout.fixed, *given.shape[1:]), self.dtype)
        if self.layout.fixed:
            args = tape.panels.own, given, tape.fixed
            stages.append(stage(compile_fix(self.program.equations), shards_for(10 * tape.fixed.size), *args))
        # Rows of tokens are copied: there is no product of several steps at once.
        planes, block = how.shards if how.by_units else 1, 1 if tokens else how.block
        columns = self.layout.slots * self.packing.units if tokens and tape.keep else 0
        begun = empty((planes, steps.B, columns), self.dtype)
        return [*stages, stage(self.scans[0], how.shards, Forward(
            *self.kernels, how.by_units, block, tape.keep, tape.shared, self.reverse, turn, tape.fresh,
            tokens, steps.T, steps.B, self.inputs, self.hidden, self.output, given.shape[1], by_step,
            self.reverse * self.output, y.shape[1], tape.inner.shape[1], middle.shape[-1], steps.lengths, steps.starts,
            steps.slots, x, *tape.panels.ahead, tape.panels.own, given, tape.fixed, y, tape.inner, middle, tape.gates,
            begun, tape.counters,
        ))]  # fmt: skip

    def _scratch(self, how: Schedule, steps: Steps, depth: int) -> np.ndarray:
        """Where a scan rounds the rows of one step, once or for each shard."""
        planes = how.shards if how.by_units else 1
        return zeros((planes, steps.B + BEHIND, self.products.row(depth)), self.products.number.dtype)

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
        N, B, packing, layout, (how, _) = steps.N, steps.B, self.packing, self.layout, self.schedules(steps)
        shared = not (keep or how.block > 1 or B == 1 or layout.second or layout.norms)
        columns = packing.columns * (1 if shared else packing.panels)
        shapes = (
            (layout.states if self.program.hidden else 0, B, self.hidden),
            (layout.states - 1, N + 2 * B if keep and layout.looks_back else B, self.hidden),
            (N if keep else B, self.middle),
            ((N if keep else B * how.block) * columns,),
        )
        memory = tuple(
            _room(math.prod(shape), None if old is None else old.memory[n], self.dtype)
            for n, shape in enumerate(shapes)
        )
        arrays = (array[: math.prod(shape)].reshape(shape) for array, shape in zip(memory, shapes))
        blocks = self.blocks(steps)
        counters = new_counters(len(blocks))
        return Tape(steps, get_num_threads(), how, blocks, keep, panels, memory, *arrays, shared, counters)

    # -------------------------------------------------------------- packed weights

    def take_panels(self) -> Panels:
        """Room for the packed weights of several pieces of a sequence, perhaps that of an earlier call."""
        try:
            return self._spare_panels.pop()
        except IndexError:
            return self.new_panels(apart=True)

    def release_panels(self, panels: Panels) -> None:
        """Let a later call have this room."""
        self._spare_panels.append(panels)

    def new_panels(self, apart: bool = False) -> Panels:
        own = zeros((self.layout.own, self.packing.panels * self.packing.units), self.dtype)
        return Panels(*self.packing.rooms(self.inputs, self.projected, apart), own)

    def pack(self, params: Parameters, panels: Panels) -> Panels:
        """Bring the parameters as they are now into the panels."""
        Stages(*self._pack(params, panels)).run()
        return panels

    def _pack(self, params: Parameters, panels: Panels) -> list[Stage]:
        """The stages that fill them: those of an earlier call, as long as the parameters stay where they are."""
        key = params.flat, get_num_threads()
        if panels.pack is None or not panels.pack.serves(key):
            stages = self.packing.pack(self._weights(params), panels.ahead)
            for exponent, values, here in self._own(params):
                stages.append(stage(pack_own, 1, values, exponent, panels.own[here]))
            panels.pack = Prepared(key, stages)
        return panels.pack.stages

    def _pack_back(self, params: Parameters, panels: Panels) -> list[Stage]:
        """The same for the way back, and zeros where it adds up."""
        carry = panels.carry
        key = params.flat, carry, get_num_threads()
        if panels.pack_back is None or not panels.pack_back.serves(key):
            zeros = stage(clear, shards_for(10 * carry.memory.size), carry.memory)
            panels.pack_back = Prepared(key, [zeros, *self.packing.pack_back(self._weights(params), carry.back)])
        return panels.pack_back.stages

    def _own(self, params: Parameters) -> Iterator[tuple[float, np.ndarray, slice]]:
        """For each of the cell's own parameters its exponent, 0 for none, its values [., H], and its rows."""
        row = 0
        for one in self.cell.own:
            values = params[one.name + self.end].reshape(one.rows, self.hidden)
            yield one.exponent or 0.0, values, slice(row, row + one.rows)
            row += one.rows

    def packed(self, params: Parameters) -> Panels:
        """The packed weights: those of the last call where the parameters still are the same, by their fingerprint or
        because they are frozen."""
        known = self._known
        if known is not None and params.frozen is not None and known[2] is params.frozen:
            return known[1]
        flat = params.span(self.names[0], self.names[-1]).view(np.uint32)
        found = np.empty(-(-flat.size // len(gemm.FACTORS)), np.uint64)
        run(gemm.fingerprint, shards_for(20 * flat.size), flat, gemm.FACTORS, found)
        if known is None or not np.array_equal(known[0], found):
            panels = self.pack(params, self.new_panels())
        else:
            panels = known[1]
        self._known = found, panels, params.frozen
        return panels

    # -------------------------------------------------------------- backward

    def _carry(self, panels: Panels, whole: Steps, tokens: bool) -> Carry:
        """What the way back of a sequence begins with; its weights leave out those of the input for tokens."""
        carry, B, in_halves = panels.carry, whole.B, not tokens and self.in_halves(whole)
        if carry is None or len(carry.dh) != B or carry.tokens != tokens or (carry.half is not None) != in_halves:
            layout, units = self.layout, self.packing.panels * self.packing.units
            shapes = (
                (B, gemm.padded(self.output, self.dtype)), (layout.states - 1, B, self.hidden), (layout.own, B, units),
            )  # fmt: skip
            sizes = np.cumsum([math.prod(shape) for shape in shapes])
            memory = empty((int(sizes[-1]),), self.dtype)
            pieces = (piece.reshape(shape) for piece, shape in zip(np.split(memory, sizes[:-1]), shapes))
            back = panels.back._replace(w_ih=panels.back.w_ih[:0]) if tokens else panels.back
            half = Parameters.zeros(self.shapes(), self.dtype) if in_halves else None
            carry = panels.carry = Carry(memory, *pieces, back, tokens, half)
        return carry

    def backward(
        self,
        params: Parameters,
        grads: Parameters,
        tape: Tape,
        dy: np.ndarray,
        dlast: Sequence[np.ndarray] | None,
        dfirst: Sequence[np.ndarray] | None,
        whole: Steps,
        tokens: bool,
    ) -> np.ndarray | None:
        """The gradients of the parameters into `grads`; dx [N, I], None for tokens. Uses up the tape.

        dy: [N, D P]; dlast: the gradients of the cell's last states [B, .], empty for zeros; dfirst: newly made, where
        those of its first states go, [L D, B, .]. None: there is a piece behind this one, to whose gradients its own
        are added, or one in front of it, which has yet to come. whole: the steps of all pieces.
        """
        carry = self._carry(tape.panels, whole, tokens)
        dx = empty((0 if tokens else tape.steps.N, self.inputs), self.dtype)
        given = tape.given if tape.given.steady else tape.given.by_step
        key = params.flat, grads.flat, carry, given, -1 if dlast is None else len(dlast), dfirst is None, tape.fresh
        args = params, grads, tape, dy, dx, carry, dlast, dfirst
        arrays = self._beside(tape, (dy, *(dlast or ())))
        tape.back = prepare(tape.back, key, arrays, (dx, *(dfirst or ())), self._stages_back, *args)
        tape.counters[:] = 0
        tape.back.stages.run()
        return None if tokens else dx

    def _stages_back(
        self,
        params: Parameters,
        grads: Parameters,
        tape: Tape,
        dy: np.ndarray,
        dx: np.ndarray,
        carry: Carry,
        dlast: Sequence[np.ndarray] | None,
        dfirst: Sequence[np.ndarray] | None,
    ) -> list[Stage]:
        """All of the way back."""
        N, packing, stages = tape.steps.N, self.packing, []
        if dlast is not None:
            into = whole([carry.dh, *carry.dinner])[self.program.hidden :]
            stages += [*self._pack_back(params, tape.panels), *copies(whole(dlast), into, dlast)]
        dz = empty((N if self.projected else 0, self.output), self.dtype)
        dgates, scratch = tape.gates.reshape(N, packing.panels * packing.columns), self._scratch_back(tape)
        for n, (first, stop) in enumerate(tape.blocks):
            here, add = tape.steps.rows(first, stop, self.reverse), n > 0 or dlast is None
            how = first, stop, tape.counters[n]
            stages += [self._scan_back(tape, dy, dz, carry, scratch, *how)] if N else []
            stages += self._weight_gradients(tape, here, dgates[here], dz[here], grads, carry.half, add)
            stages += [] if carry.tokens else self._input_gradient(dgates[here], carry.back.w_ih, dx[here])
        return stages if dfirst is None else [*stages, *self._finish(grads, tape, carry, dfirst)]

    def _scratch_back(self, tape: Tape) -> tuple[np.ndarray, np.ndarray]:
        """The left factor of the second product, or where a scan rounds the rows of one step; and the gradient of that
        factor, or of what was normalised."""
        middle, columns = tape.middle, gemm.padded(self.hidden, self.dtype)
        if self.products.narrow:
            middle = self._scratch(self.schedules(tape.steps)[1], tape.steps, len(self.packing.recurrent_order))
        if self.layout.norms:
            columns = self.packing.panels * self.packing.columns
        return middle, empty((tape.steps.B, columns), self.dtype)

    def _scan_back(
        self,
        tape: Tape,
        dy: np.ndarray,
        dz: np.ndarray,
        carry: Carry,
        scratch: tuple[np.ndarray, np.ndarray],
        first: int,
        stop: int,
        counters: np.ndarray,
    ) -> Stage:
        """From the tape of some steps to the gradients of the pre-activations."""
        steps, (given, by_step, *_), (w_hh, w_mid, _), H = tape.steps, tape.given, carry.back, self.hidden
        (_, how), (middle, dmiddle) = self.schedules(steps), scratch
        return stage(self.scans[1], how.shards, Backward(
            self.packing.plain_kernel(), how.by_units, self.reverse, first, stop, steps.T, steps.B, H, self.output,
            given.shape[1], by_step, self.reverse * self.output, tape.y.shape[1], tape.inner.shape[1],
            middle.shape[-1], carry.dh.shape[1], dmiddle.shape[1], steps.lengths, steps.starts, steps.slots, dy, w_hh,
            w_mid, tape.panels.own, given, tape.fixed, tape.y, tape.inner, middle, tape.gates, carry.dh, carry.dinner,
            dmiddle, dz, carry.down, counters,
        ))  # fmt: skip

    def _weight_gradients(
        self, tape: Tape, here: slice, dgates: np.ndarray, dz: np.ndarray, grads: Parameters, half: Parameters | None,
        add: bool,
    ) -> list[Stage]:  # fmt: skip
        """Everything time-parallel, of some of the N: dW = dgates.T @ inputs."""
        dweights = self._weights(grads)
        x, y, packing, N, at = tape.x, tape.y, self.packing, len(dgates), here.start
        left, gradient = (outer_kernel(VECTORS, self.dtype), dgates), gemm.gradient
        outputs, inputs = self._sums(dweights)
        # The first rows of h of the step before, if they are zeros
        blank = int(tape.steps.starts[1]) if tape.fresh and here.start == 0 and not self.reverse else 0
        how, work = (packing.units, packing.columns, add, blank), 2 * N * outputs[0].size
        # h of the step before is one slot of y earlier, in the second direction one slot later.
        ld, slot = y.shape[1], tape.steps.slot(2 * self.reverse)
        first, rows = (slot.start + at, NO_ROWS) if isinstance(slot, slice) else (0, slot[here])
        offset = first * ld + self.reverse * self.output
        hidden = y, offset, ld, rows
        if x.ndim == 1:
            sides, shards = (*hidden, x, at, *outputs, *inputs), shards_for(work)
            stages = [stage(gemm.gradient_with_tokens, shards, *left, packing.runs, *how, *sides)]
        else:
            if self.products.narrow:
                gradient, left = half_gemm.gradient, (packing.plain_kernel(), dgates)
            beside = x, at * self.inputs, self.inputs, NO_ROWS
            sides, shards = (*hidden, *outputs, *beside, *inputs), shards_for(work + 2 * N * inputs[0].size)
            if half is not None:
                order, other = halves(N // tape.steps.B, tape.steps.B)
                into = order, *outputs, *inputs, other, *chain(*self._sums(self._weights(half)))
                gradient, sides = gemm.gradient_in_halves, (*hidden[:3], *beside[:3], *into)
            stages = [stage(gradient, shards, *left, packing.runs, *how, *sides)]
        middle, none = (tape.middle, at * self.hidden, self.hidden, NO_ROWS), gemm.alone(self.dtype)
        if self.layout.second:
            shards, side = shards_for(2 * N * self.hidden**2 * self.layout.second), (*middle, *outputs)
            stages.append(stage(gemm.gradient, shards, *left, packing.second_runs, *how, *side, *none))
        if self.projected:
            runs, shards = gemm.runs_of(self.output, self.dtype), shards_for(2 * N * dweights.weight_hr.size)
            dbias = np.empty(self.output, self.dtype) if dweights.bias_hr is None else dweights.bias_hr
            side = *middle, dweights.weight_hr, dbias
            stages.append(stage(gemm.gradient, shards, left[0], dz, runs, 0, 0, add, 0, *side, *none))
        return stages

    def _sums(self, dweights: Weights) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Where the gradients of the recurrent weights and biases go, and those of the input's; somewhere, if there are
        no such."""
        ignored = np.empty(len(dweights.weight_ih), self.dtype)
        dbias_ih, dbias_hh = (ignored if d is None else d for d in (dweights.bias_ih, dweights.bias_hh))
        dweight_hh = np.empty((0, 0), self.dtype) if dweights.weight_hh is None else dweights.weight_hh
        return (dweight_hh, dbias_hh), (dweights.weight_ih, dbias_ih)

    def _input_gradient(self, dgates: np.ndarray, packed: np.ndarray, dx: np.ndarray) -> list[Stage]:
        """dx = dgates @ weight_ih."""
        packing, start = self.packing, zeros((gemm.padded(self.inputs, self.dtype),), self.dtype)
        # The input's slots of all panels lie side by side, or in a piece of every panel.
        pieces = 1 if packing.layout.inputs == packing.layout.kept else packing.panels
        depth, step = len(packing.input_order) // pieces, packing.columns
        shards, kernel = shards_for(2 * len(dgates) * packed.size), packing.plain_kernel()
        if self.products.narrow:
            a, rounding = rounded(self.products, dgates, 0, depth, pieces, step)
            return [rounding, stage(half_gemm.multiply, shards, kernel, a, packed, start, dx)]
        return [stage(gemm.multiply, shards, kernel, dgates, 0, step, depth, packed, start, dx)]

    def _finish(self, grads: Parameters, tape: Tape, carry: Carry, dfirst: Sequence[np.ndarray]) -> list[Stage]:
        """The gradients of the first states and of the cell's own parameters.

        A gradient passes through those states of the scan that were computed from the cell's.
        """
        hidden, first, own, found = self.program.hidden, tape.first, tape.panels.own, whole([carry.dh, *carry.dinner])
        dfirst = [array[self.row] for array in dfirst]
        stages = copies(found[hidden:], whole(dfirst), dfirst)
        if hidden:
            d, mask = np.empty_like(first), first[:1] if tape.given.mask is None else tape.given.mask
            stages += copies(found, whole(d[:hidden]), d[:hidden])
            args = d[:hidden], first[hidden:], own, mask, d[hidden:], carry.down
            stages.append(stage(self.fronts[1], 1, *args))
            stages += copies(whole(d[hidden:]), whole(dfirst), dfirst, add=True)
        if carry.half is not None:
            total, other = grads.span(self.names[0], self.names[-1])[None], carry.half.flat[None]
            stages += copies(whole([other]), whole([total]), [total], add=True)
        for exponent, out, here in self._own(grads):
            down = carry.down[here]
            stages.append(stage(own_gradient, shards_for(10 * down.size), down, own[here], exponent, out))
        return stages


def whole(states: Iterable[np.ndarray]) -> list[Place]:
    """Where states lie that are arrays of their own."""
    return [Place(state, NO_ROWS, 0) for state in states]


def copies(
    sources: Iterable[Place], targets: Iterable[Place], shapes: Iterable[np.ndarray], add: bool = False
) -> list[Stage]:
    """The stages that bring states of some arrays' shapes to another place, or add them to what stands there."""
    found = []
    for source, target, one in zip(sources, targets, shapes):
        found.append(stage(copy_rows, shards_for(10 * one.size), *one.shape, *source, *target, add))
    return found


def _room(size: int, old: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    """Memory for so many numbers: the old one unless it is too small or by far too large."""
    return old if old is not None and size <= old.size <= 4 * size else empty((size,), dtype)
