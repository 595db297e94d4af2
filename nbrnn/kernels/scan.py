"""The time loop, forward and back, specialised on a cell.

For every step and every panel of hidden units: the recurrent product into a tile of pre-activations, then the cell's
equations on that tile while it is in the nearest cache. Backward is the mirror image: the equations turn what was kept
into the gradients of the pre-activations, and a product with the transposed weights carries them one step back.

Two kinds of cells have a second product in a step, whose left factor is `middle`. Where an `operand` is given, it comes
before the equations and fills the last slots. In a projection it comes after them: it turns their first result into the
output, which is also what is fed back.

In a cell with normalisation (`norms`) the pre-activations of a row, in groups, and the second state are shifted and
scaled to mean 0 and variance 1 before they are used, which takes whole rows: such a cell is never divided by units.

Memory, for one layer and direction (D directions share y, one beside the other). H is the hidden size, P that of the
output, H without a projection. The rows of a batch are sorted, the longest sequence first, so that those which take
part in time step t, n(t) of them, are the first ones. N is the sum of all n(t): nothing is stored for steps that are
not there. `starts[t]` is the sum of n before t, the row where step t begins in

    x       [N, I], or [N] tokens, whose one-hot rows are a gather
    middle  [N, H]            the left factor of a second product; [B, H] where nothing is kept
            [N, norms + 2]    what rows were normalised with: 1 / deviation of each group of pre-activations, and of
                              the second state its mean and 1 / deviation
    given   [., N, H]         numbers that equations take beside them, such as masks; [., B, H]: of all steps
    gates   [N, J, K U W]     the tape: J panels of U vectors of W units, K slots a unit, slot by slot, of which the
                              first S are the pre-activations. Forward leaves what it kept, backward turns it into the
                              gradients of the pre-activations.
            [B, K U W]        where nothing is kept, the scratch tile that all panels share; or [rows of a block, J,
                              K U W]

The states of a row are one more than its steps, and two directions need two more. `slots[t]` is where the rows of slot
t begin, from slot 0 to T + 1, of which those with t - 1 steps or more have one:

    y       [N + 2 B, D P]    output t is in slot t + 1; slot 0, and for the second direction the slot behind a row's
                              last output, hold the first h, so that h of the step before is always one slot away
    inner   [., N + 2 B, H]   the states behind h, laid out alike; [., B, H], overwritten by every step, where nothing
                              is kept or backward does not read them
    own     [., J U W]        the cell's own parameters, one number a unit

Schedules: the shards divide the rows of the batch and run the whole loop without waiting for each other, or they divide
the hidden units and meet after every product that needs whole rows (`barrier`). Either way each number is computed by
the same operations in the same order.

Where factors are narrow (`products`), x and the weights are given as such, and a step begins with rounding what it
multiplies with: the rows of h forward, of the gradients of the pre-activations back. `middle` is the scratch for that,
of one shard or of each that needs all rows.

With few rows in a step the input product of several steps, `block`, is done at once: tiles of one row are slow.

A scan is called with integers alone, `Forward` or `Backward`: numbers, and the addresses of the arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba.extending import overload

from nbrnn.kernels import amx
from nbrnn.kernels.barrier import join, meet
from nbrnn.kernels.constants import Constants
from nbrnn.kernels.jit import Kernel, jitable
from nbrnn.kernels.normalise import moments, normalise_back, normalise_slots
from nbrnn.kernels.products import Products
from nbrnn.kernels.simd import (
    accumulate_many,
    element,
    fill_behind,
    lane_sum,
    lanes_of,
    load,
    load_many,
    pointer,
    pointer_to,
    shift,
    store,
    store_many,
    store_padded,
    width,
)
from nbrnn.kernels.tiles import VECTORS, product

# A time step takes as long as so many rows more: tiles of few rows are slow.
STEP_ROWS = 3


@dataclass(frozen=True)
class Layout:
    """How the pre-activations of a cell lie in a panel.

    Parameters
    ----------
    slots : int
        Pre-activations of one hidden unit (S).
    kept : int
        Slots in the tape, at least as many (K).
    inputs, recurrent, second : int
        The input product fills so many of the first slots, the second product so many of the last, and the recurrent
        product so many in front of those.
    states : int
        Number of states, h among them.
    own, given : int
        Numbers a unit that equations take from parameters and from arrays beside x.
    output : int
        Which state the gradient of the output belongs to: 0, or 1 where h is not what is fed back.
    norms : int
        Groups of slots that are normalised over a row.
    late : int
        The states that `finish` computes, the first ones; 0 without one.
    looks_back : int
        1 if backward reads the states behind h, else 0.
    """

    slots: int
    kept: int
    inputs: int
    recurrent: int
    second: int
    states: int
    own: int
    given: int
    output: int
    norms: int
    late: int
    looks_back: int

    @property
    def inner(self) -> int:
        """States behind h (N)."""
        return self.states - 1

    @property
    def vectors(self) -> int:
        """Vectors of hidden units in a panel (U): a panel of one gate would leave registers unused."""
        return max(1, VECTORS // self.slots)

    def units(self, dtype: Any) -> int:
        """Hidden units in a panel (U W)."""
        return self.vectors * width(dtype)

    def panels(self, hidden: int, dtype: Any) -> int:
        """Panels for so many hidden units (J)."""
        return -(-hidden // self.units(dtype))

    def columns(self, dtype: Any) -> int:
        """Numbers in a panel of the tape (K U W)."""
        return self.kept * self.units(dtype)


@dataclass(frozen=True)
class Equations(Constants):
    """A cell as the scan knows it: `jitable` functions of tuples of lanes, and where their arguments lie.

    Parameters
    ----------
    name : str
        Different for different equations and precisions.
    number : numpy.float32 or numpy.float64
        Any number of the precision.
    layout : Layout
    products : Products
        Of what factors; narrow ones only for a cell with one product in a step.
    forward : callable
        ``forward(gates, prev, own, given) -> new, kept``
    backward : callable
        ``backward(dnew, kept, prev, new, own, given) -> dgates, dprev, down``; before an operand's gradient, dgates
        may still hold what `operand_backward` needs.
    operand, operand_backward : callable or None
        ``operand(gates, prev, own, given) -> (middle,)`` and ``operand_backward(dmiddle, carried, dgates, prev, new,
        own, given) -> dgates, dprev, down``, where dprev is `carried` and what is added to it.
    project, project_backward : callable or None
        After a projection: ``project((a,)) -> (y,)`` and ``project_backward((dy,), (y,)) -> (da,)``.
    finish, normal_backward : callable or None
        With normalisation `forward` gives the other states, and ``finish((normal,), gates, prev, new, own, given)`` the
        first ones; ``normal_backward(dnew, (normal,), gates, prev, new, own, given) -> (dnormal,)``. `backward` then
        takes (dnormal's mean, mean of dnormal times normal, 1 / deviation) and (normal,) behind dnew.
    front, front_backward : callable or None
        ``front(states, own, mask)``: the first states of the scan, where they are computed from the others; and
        ``front_backward(d, states, own, mask) -> dstates, down``.
    fronts : int
        How many those are.
    """

    name: str
    number: np.floating
    layout: Layout
    products: Products
    forward: Callable
    backward: Callable
    operand: Callable | None = None
    operand_backward: Callable | None = None
    project: Callable | None = None
    project_backward: Callable | None = None
    finish: Callable | None = None
    normal_backward: Callable | None = None
    front: Callable | None = None
    front_backward: Callable | None = None
    fronts: int = 0

    def __getattr__(self, name: str) -> int:
        """The numbers of the layout, and what follows from them."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.layout, name)

    @property
    def plain(self) -> int:
        """States that are not computed from others."""
        return self.layout.states - self.fronts

    @property
    def left(self) -> Callable:
        """Finds what a step hands to its second product, or the scratch for rounded rows."""
        return _rounded if self.products.narrow else _middle

    @property
    def step(self) -> Callable:
        if self.finish:
            return _step_normalised
        if self.products.narrow:
            return _step_narrow
        return _step_with_operand if self.operand else _step_with_projection if self.project else _step

    @property
    def step_back(self) -> Callable:
        if self.finish:
            return _step_back_normalised
        if self.products.narrow:
            return _step_back_narrow
        if self.operand:
            return _step_back_with_operand
        return _step_back_with_projection if self.project else _step_back


class Forward(NamedTuple):
    """What a forward scan works on: numbers, and the arrays described above or, in compiled code, their addresses.

    kernel_ih, kernel_hh, kernel_mid: for the input, the recurrent and the second product; block: time steps whose input
    product is done at once; shared: whether all panels share one scratch tile; lengths [B], starts [T + 1], slots [T +
    2]: int64; I, P: sizes of the input and of what is fed back; ld: of a row of y, of which this direction's part
    begins at `column`; w_ih [J, I, .], bias [J S U W], w_hh [J, P, .], w_mid and bias_mid of the second product; rows:
    of one given number, of one inner state; step_given: whether given numbers differ by time step; ld_middle: of a row
    of middle.
    """

    integers = 20
    kernel_ih: int
    kernel_hh: int
    kernel_mid: int
    by_units: int
    block: int
    keep: int
    shared: int
    reverse: int
    tokens: int
    T: int
    B: int
    I: int
    H: int
    P: int
    given_rows: int
    step_given: int
    column: int
    ld: int
    inner_rows: int
    ld_middle: int
    # arrays
    lengths: Any
    starts: Any
    slots: Any
    x: Any
    w_ih: Any
    bias: Any
    w_hh: Any
    w_mid: Any
    bias_mid: Any
    own: Any
    given: Any
    y: Any
    inner: Any
    middle: Any
    gates: Any
    counters: Any


class Backward(NamedTuple):
    """What a backward scan works on; see `Forward`.

    dy: [N, D P]; w_hh, w_mid: the weights of the recurrent and of the second
    product, transposed, in plain panels, their depth in the order of the tape; dh: [B, ld_dh] and dinner: [., B, H]
    hold the gradients of the last state, and of the first one afterwards; dmiddle: [B, ld_dmiddle], scratch; dz: [N,
    P], the gradient of what a projection gives; down: [., B, J U W], to which the gradients of own parameters are
    added.
    """

    integers = 15
    kernel: int
    by_units: int
    reverse: int
    T: int
    B: int
    H: int
    P: int
    given_rows: int
    step_given: int
    column: int
    ld: int
    inner_rows: int
    ld_middle: int
    ld_dh: int
    ld_dmiddle: int
    # arrays
    lengths: Any
    starts: Any
    slots: Any
    dy: Any
    w_hh: Any
    w_mid: Any
    own: Any
    given: Any
    y: Any
    inner: Any
    middle: Any
    gates: Any
    dh: Any
    dinner: Any
    dmiddle: Any
    dz: Any
    down: Any
    counters: Any


@cache
def compile_scan(cell: Equations) -> tuple[Kernel, Kernel]:
    """The kernels of the forward and the backward scan of a cell; their argument is a `Forward` or a `Backward`."""

    def forward(shard, shards, numbers):
        _forward(shard, shards, cell, numbers)

    def backward(shard, shards, numbers):
        _backward(shard, shards, cell, numbers)

    return Kernel(forward, f"forward_scan-{cell.name}"), Kernel(backward, f"backward_scan-{cell.name}")


@cache
def compile_front(cell: Equations) -> tuple[Kernel, Kernel]:
    """The kernels that compute the first states of the scan from the others, at the beginning of a sequence, and back.

    Their arguments: states [., B, H], own [., J U W], mask [., B, H], the states to compute [., B, H]; and the
    gradients of those, states, own, mask, the gradients to compute [., B, H], and to add to, down [., B, J U W].
    """

    def front(shard, shards, states, own, mask, out):
        _front(cell, states, own, mask, out)

    def front_back(shard, shards, d, states, own, mask, dstates, down):
        _front_back(cell, d, states, own, mask, dstates, down)

    return Kernel(front, f"front-{cell.name}"), Kernel(front_back, f"front_back-{cell.name}")


@jitable
def _front(cell, states, own, mask, out):
    _, B, H = out.shape
    W, plane = lanes_of(pointer(out, 0)), B * H
    for m in range(B):
        for unit in range(0, H, W):
            at, count = m * H + unit, H - unit
            given = load_many(pointer(states, at), plane, count, cell.plain)
            mine = load_many(pointer(own, unit), own.shape[1], W, cell.own)
            values = cell.front(given, mine, (load(pointer(mask, at), count),))
            store_many(pointer(out, at), plane, values, count)


@jitable
def _front_back(cell, d, states, own, mask, dstates, down):
    _, B, H = d.shape
    W, plane, ld = lanes_of(pointer(d, 0)), B * H, down.shape[2]
    for m in range(B):
        for unit in range(0, H, W):
            at, count = m * H + unit, H - unit
            dfront = load_many(pointer(d, at), plane, count, cell.fronts)
            given = load_many(pointer(states, at), plane, count, cell.plain)
            mine = load_many(pointer(own, unit), own.shape[1], W, cell.own)
            found, mine = cell.front_backward(dfront, given, mine, (load(pointer(mask, at), count),))
            store_many(pointer(dstates, at), plane, found, count)
            accumulate_many(pointer(down, m * ld + unit), B * ld, mine)


@jitable
def _at(cell, address, offset):
    """A pointer to the numbers of an array, from one of them on."""
    return pointer_to(cell.number, address, offset)


@jitable
def _integers(address):
    return pointer_to(np.int64(0), address, 0)


@jitable
def _factors(cell, address, offset):
    """A pointer to the factors of an array, from one of them on."""
    return pointer_to(cell.products.number, address, offset)


@jitable
def _middle(cell, p, row, once, shard):
    """The left factor of the second product, of some rows."""
    return _at(cell, p.middle, row * p.ld_middle)


@jitable
def _rounded(cell, p, row, once, shard):
    """Scratch for the rounded rows of a step: a shard's own rows, or all of them where it has some units of each."""
    return _factors(cell, p.middle, (shard * (p.B + amx.BEHIND) if p.by_units else once) * p.ld_middle)


@jitable
def _share(count, shard, shards):
    """The part of `count` things that one shard takes."""
    return count * shard // shards, count * (shard + 1) // shards


@jitable
def _rows(p, shard, shards):
    """The rows that one shard takes, so that all of them take about as long."""
    lengths, total = _integers(p.lengths), element(_integers(p.starts), p.T)
    if total == p.T * p.B:
        return _share(p.B, shard, shards)
    least, most = total // shards, total + STEP_ROWS * p.T
    while least < most:
        cost = (least + most) // 2
        _, hi = _fill(lengths, p.B, cost, shards - 1)
        least, most = (least, cost) if hi == p.B else (cost + 1, most)
    return _fill(lengths, p.B, most, shard)


@jitable
def _fill(lengths, B, cost, shard):
    """The rows of one shard where each takes as many as `cost` allows; a time step costs as much as some rows."""
    lo, hi = 0, 0
    for _ in range(shard + 1):
        lo, left = hi, cost - STEP_ROWS * element(lengths, min(hi, B - 1))
        while hi < B and left >= element(lengths, hi):
            left -= element(lengths, hi)
            hi += 1
    return lo, hi


@jitable
def _wait(p, team, n, meetings):
    """The n-th of a step's meetings of all shards, where they divide the hidden units."""
    shards, step = team
    if shards > 1:
        meet(_integers(p.counters), shards * (step * meetings + n))


# ------------------------------------------------------------------ forward


@jitable
def _forward(shard, shards, cell, numbers):
    """One shard of the forward scan."""
    p = Forward(*numbers)
    starts, slots = _integers(p.starts), _integers(p.slots)
    W = lanes_of(_at(cell, p.y, 0))
    J, PANEL = _panels(p.H, cell.vectors * W), cell.kept * cell.vectors * W
    lo, hi, j0, j1, q0, q1 = 0, p.B, 0, J, 0, _panels(p.P, VECTORS * W)
    if p.by_units:
        shards = join(_integers(p.counters), shards)
        if shards == 0:
            return
        shard = shard if shards > 1 else 0
        j0, j1 = _share(J, shard, shards)
        q0, q1 = _share(q1, shard, shards)
    else:
        lo, hi = _rows(p, shard, shards)
    if cell.products.narrow:
        amx.begin()
    # Strides of the pre-activations: one row, one panel
    g_m, g_j = (PANEL, 0) if p.shared else (J * PANEL, PANEL)
    for s0 in range(0, p.T, p.block):
        s1 = min(s0 + p.block, p.T)
        t0, t1 = (p.T - s1, p.T - s0) if p.reverse else (s0, s1)
        origin = element(starts, t0)
        if p.block > 1:
            g = _at(cell, p.gates, (origin if p.keep else 0) * g_m)
            for j in range(j0, j1):
                _input_block(cell, p, t0, t1, lo, hi, j, shift(g, j * g_j), g_m)
        for step in range(s0, s1):
            t = p.T - 1 - step if p.reverse else step
            now, last = element(starts, t), element(starts, t + 1)
            rows = min(hi, last - now) - lo
            if rows > 0:
                # Where this step's rows begin in arrays that hold what was kept, and in those that do not
                here, once = now + lo, lo
                before, after = element(slots, t + 2 * p.reverse) + lo, element(slots, t + 1) + lo
                c_before, c_after = (before, after) if p.keep and cell.looks_back else (once, once)
                states = (
                    _at(cell, p.y, before * p.ld + p.column), _at(cell, p.y, after * p.ld + p.column), p.ld,
                    _at(cell, p.inner, c_before * p.H), _at(cell, p.inner, c_after * p.H), p.inner_rows * p.H,
                )  # fmt: skip
                tile = here if p.keep else _in_block(p, t - t0, now - origin, lo, hi) if p.block > 1 else once
                at = _at(cell, p.gates, tile * g_m), g_m, g_j
                beside = _beside(cell, p, here, once, J * cell.vectors * W)
                mid = cell.left(cell, p, here if p.keep else once, once, shard)
                part = rows, p.H, j0, j1, q0, q1
                team = shards if p.by_units else 1, step
                cell.step(cell, p, here if p.block == 1 else -1, part, at, states, beside, mid, team)
    if cell.products.narrow:
        amx.end()


@jitable
def _in_block(p, step, rows, lo, hi):
    """Where the rows of a step begin in the scratch of a block, `rows` of which belong to the steps before.

    Shards do not wait for each other: what one writes in a block must not be where another one reads in the next.
    """
    return rows if lo == 0 and hi == p.B else step * p.B + lo


@jitable
def _input_block(cell, p, t0, t1, lo, hi, j, g, g_m):
    """`_input` of some rows of several time steps; g: where the first of these steps begins."""
    starts = _integers(p.starts)
    origin = element(starts, t0)
    if lo == 0 and hi == p.B:
        _input(cell, p, origin, element(starts, t1) - origin, j, g, g_m)
        return
    for t in range(t0, t1):
        now = element(starts, t)
        rows = min(hi, element(starts, t + 1) - now) - lo
        if rows > 0:
            row = now + lo - origin if p.keep else _in_block(p, t - t0, now - origin, lo, hi)
            _input(cell, p, now + lo, rows, j, shift(g, row * g_m), g_m)


@jitable
def _turn(n, first, stop, team):
    """The n-th panel of a step: every second step goes from the last one to the first, so that weights which are larger
    than a core's cache are found there in part."""
    _, step = team
    return first + stop - 1 - n if step & 1 else n


@jitable
def _panels(count, width):
    return (count + width - 1) // width


@jitable
def _beside(cell, p, here, once, plane):
    """The own and the given numbers of some rows, with the strides of one kind of them."""
    given = _at(cell, p.given, (here if p.step_given else once) * p.H)
    return _at(cell, p.own, 0), plane, given, p.given_rows * p.H


@jitable
def _step(cell, p, row, part, at, states, beside, mid, team):
    """A step of a cell with one product."""
    for n in range(part[2], part[3]):
        j = _turn(n, part[2], part[3], team)
        _products(cell, p, row, part, at, states, j)
        _forward_tile(cell, p, j, part, at, states, beside)
    if cell.recurrent > 0:
        _wait(p, team, 1, 1)


@jitable
def _step_narrow(cell, p, row, part, at, states, beside, rounded, team):
    """A step of a cell with one product, by narrow factors."""
    (rows, _, j0, j1, _, _), (gates, g_m, g_j), (h_prev, _, ld, _, _, _) = part, at, states
    W, U, depth, panel = lanes_of(gates), cell.vectors, cell.products.padded(p.P), cell.products.column(p.P)
    recurrent = cell.recurrent * U * W
    start = cell.slots * U * W - recurrent
    if recurrent > 0:
        cell.products.round_rows(h_prev, ld, rows, p.P, p.P, 1, rounded, p.ld_middle)
    for n in range(j0, j1):
        j = _turn(n, j0, j1, team)
        g = shift(gates, j * g_j)
        if row >= 0:
            _input(cell, p, row, rows, j, g, g_m)
        if recurrent > 0:
            r, b = shift(g, start), _factors(cell, p.w_hh, j * panel * recurrent)
            product(p.kernel_hh, rounded, p.ld_middle, b, depth, r, g_m, r, g_m, rows, recurrent)
        _forward_tile(cell, p, j, part, at, states, beside)
    if recurrent > 0:
        _wait(p, team, 1, 1)


@jitable
def _step_with_operand(cell, p, row, part, at, states, beside, mid, team):
    """A step of a cell that has a second product before its equations."""
    (rows, H, j0, j1, _, _), (gates, g_m, g_j) = part, at
    W = lanes_of(gates)
    total, count = cell.slots * cell.vectors, cell.second * cell.vectors
    for j in range(j0, j1):
        _products(cell, p, row, part, at, states, j)
        _operand_tile(cell, j, part, at, states, beside, mid)
    _wait(p, team, 1, 2)
    for j in range(j0, j1):
        g, b = shift(gates, j * g_j + (total - count) * W), _at(cell, p.w_mid, j * H * count * W)
        product(p.kernel_mid, mid, H, b, H, g, g_m, g, g_m, rows, count * W)
        _forward_tile(cell, p, j, part, at, states, beside)
    _wait(p, team, 2, 2)


@jitable
def _step_with_projection(cell, p, row, part, at, states, beside, mid, team):
    """A step of a cell whose result is projected."""
    (rows, H, j0, j1, q0, q1), (_, h, ld, c_prev, c, plane) = part, states
    W = lanes_of(h)
    PANEL = VECTORS * W
    for j in range(j0, j1):
        _products(cell, p, row, part, at, states, j)
        # h of the step before has another size: the equations cannot use it
        hidden = mid, mid, H, c_prev, c, plane
        _forward_tile(cell, p, j, part, at, hidden, beside)
    _wait(p, team, 1, 2)
    for q in range(q0, q1):
        columns, out, first = min(PANEL, p.P - q * PANEL), shift(h, q * PANEL), q * PANEL
        weights, bias = _at(cell, p.w_mid, first * H), _at(cell, p.bias_mid, first)
        product(p.kernel_mid, mid, H, weights, H, bias, 0, out, ld, rows, columns)
        for m in range(rows):
            for n in range(0, columns, W):
                place = shift(out, m * ld + n)
                (value,) = cell.project((load(place, columns - n),))
                store(place, value, columns - n)
    _wait(p, team, 2, 2)


@jitable
def _step_normalised(cell, p, row, part, at, states, beside, stats, team):
    """A step of a cell with normalisation."""
    (rows, H, j0, j1, _, _), (gates, g_m, g_j) = part, at
    _, h, ld, _, c, plane = states
    W = lanes_of(gates)
    units, count = cell.vectors * W, cell.norms + 2
    for j in range(j0, j1):
        _products(cell, p, row, part, at, states, j)
    for m in range(rows):
        normalise_slots(cell, shift(gates, m * g_m), g_j, H, shift(stats, m * count))
        for unit in range(0, H, W):
            left, here = H - unit, shift(gates, m * g_m + unit // units * g_j + unit % units)
            prev, own, given = _arguments(cell, m, unit, left, H, states, beside)
            early, _ = cell.forward(load_many(here, units, W, cell.slots), prev, own, given)
            store_many(shift(c, m * H + unit + (cell.late - 1) * plane), plane, early, left)
        mean, scale = moments(shift(c, m * H + (cell.late - 1) * plane), H)
        store(shift(stats, m * count + count - 2), mean, 1)
        store(shift(stats, m * count + count - 1), scale, 1)
        for unit in range(0, H, W):
            left, here = H - unit, shift(gates, m * g_m + unit // units * g_j + unit % units)
            prev, own, given = _arguments(cell, m, unit, left, H, states, beside)
            new = _states_after(cell, m, unit, left, H, states)
            normal = ((new[cell.late] - mean) * scale,)
            late = cell.finish(normal, load_many(here, units, W, cell.slots), prev, new, own, given)
            store(shift(h, m * ld + unit), late[0], left)
            store_many(shift(c, m * H + unit), plane, late[1:], left)


@jitable
def _products(cell, p, row, part, at, states, j):
    """The pre-activations of one panel, up to those of a second product; row: of x, -1 if they hold the input's."""
    (rows, _, _, _, _, _), (gates, g_m, g_j), (h_prev, _, ld, _, _, _) = part, at, states
    U = cell.vectors
    total, recurrent, second = cell.slots * U, cell.recurrent * U, cell.second * U
    g = shift(gates, j * g_j)
    W = lanes_of(g)
    if row >= 0:
        _input(cell, p, row, rows, j, g, g_m)
    if recurrent > 0:
        r, b = shift(g, (total - recurrent - second) * W), _at(cell, p.w_hh, j * p.P * recurrent * W)
        product(p.kernel_hh, h_prev, ld, b, p.P, r, g_m, r, g_m, rows, recurrent * W)


@jitable
def _input(cell, p, row, rows, j, g, g_m):
    """Set a panel's pre-activations to the bias plus the input product, for consecutive rows of x from `row` on."""
    W = lanes_of(g)
    total, columns = cell.slots * cell.vectors * W, cell.inputs * cell.vectors * W
    bias, depth, size = _at(cell, p.bias, j * total), cell.products.padded(p.I), cell.products.row(p.I)
    weights = _factors(cell, p.w_ih, j * cell.products.column(p.I) * columns)
    if p.tokens:
        tokens = _integers(p.x)
        for m in range(rows):
            token = element(tokens, row + m)
            for c in range(0, columns, W):
                one = cell.products.token_row(weights, depth, columns, token, c)
                store(shift(g, m * g_m + c), load(shift(bias, c), W) + one, W)
    else:
        x = _factors(cell, p.x, row * size)
        product(p.kernel_ih, x, size, weights, depth, bias, 0, g, g_m, rows, columns)
    for m in range(rows):
        for c in range(columns, total, W):
            store(shift(g, m * g_m + c), load(shift(bias, c), W), W)


@jitable
def _forward_tile(cell, p, j, part, at, states, beside):
    """The cell's equations on one panel of some rows."""
    (rows, H, _, _, _, _), (gates, g_m, g_j), (_, h, ld, _, c, plane) = part, at, states
    W = lanes_of(gates)
    units = cell.vectors * W
    for m in range(rows):
        for unit in range(j * units, (j + 1) * units, W):
            count, here = H - unit, shift(gates, j * g_j + m * g_m + unit - j * units)
            prev, own, given = _arguments(cell, m, unit, count, H, states, beside)
            new, kept = cell.forward(load_many(here, units, W, cell.slots), prev, own, given)
            store(shift(h, m * ld + unit), new[0], count)
            store_many(shift(c, m * H + unit), plane, new[1:], count)
            if p.keep:
                store_many(here, units, kept, W)


@jitable
def _operand_tile(cell, j, part, at, states, beside, mid):
    """The left factor of the second product on one panel of some rows."""
    (rows, H, _, _, _, _), (gates, g_m, g_j) = part, at
    W = lanes_of(gates)
    units = cell.vectors * W
    for m in range(rows):
        for unit in range(j * units, (j + 1) * units, W):
            count, here = H - unit, shift(gates, j * g_j + m * g_m + unit - j * units)
            prev, own, given = _arguments(cell, m, unit, count, H, states, beside)
            (value,) = cell.operand(load_many(here, units, W, cell.slots), prev, own, given)
            store(shift(mid, m * H + unit), value, count)


@jitable
def _arguments(cell, m, unit, count, H, states, beside):
    """The states before, own and given numbers of some hidden units in row m."""
    (h_prev, _, ld, c_prev, _, plane), (own, own_plane, given, given_plane) = states, beside
    W, at = lanes_of(h_prev), m * H + unit
    prev = (load(shift(h_prev, m * ld + unit), count),) + load_many(shift(c_prev, at), plane, count, cell.inner)
    mine = load_many(shift(own, unit), own_plane, W, cell.own)
    return prev, mine, load_many(shift(given, at), given_plane, count, cell.given)


# ------------------------------------------------------------------ backward


@jitable
def _backward(shard, shards, cell, numbers):
    """One shard of the backward scan: turns the tape into the gradients of the pre-activations."""
    p = Backward(*numbers)
    starts, slots = _integers(p.starts), _integers(p.slots)
    W = lanes_of(_at(cell, p.y, 0))
    units, PANEL = cell.vectors * W, VECTORS * W
    J, panels = _panels(p.H, units), _panels(p.H, PANEL)
    lo, hi, p0, p1, q0, q1 = 0, p.B, 0, panels, 0, _panels(p.P, PANEL)
    if p.by_units:
        shards = join(_integers(p.counters), shards)
        if shards == 0:
            return
        shard = shard if shards > 1 else 0
        p0, p1 = _share(panels, shard, shards)
        q0, q1 = _share(q1, shard, shards)
    else:
        lo, hi = _rows(p, shard, shards)
    # Panels of hidden units as the tape has them, as plain panels, and plain panels of what is fed back
    j0, j1 = p0 * PANEL // units, min(J, p1 * PANEL // units)
    g_j = cell.kept * units
    g_m, ld_down = J * g_j, J * units
    if cell.products.narrow:
        amx.begin()
    for step in range(p.T - 1, -1, -1):
        t = p.T - 1 - step if p.reverse else step
        now, last = element(starts, t), element(starts, t + 1)
        rows = min(hi, last - now) - lo
        if rows > 0:
            here = now + lo
            before, after = element(slots, t + 2 * p.reverse) + lo, element(slots, t + 1) + lo
            c_before, c_after = (before, after) if cell.looks_back else (lo, lo)
            at = _at(cell, p.gates, here * g_m), g_m, g_j
            states = (
                _at(cell, p.y, before * p.ld + p.column), _at(cell, p.y, after * p.ld + p.column), p.ld,
                _at(cell, p.inner, c_before * p.H), _at(cell, p.inner, c_after * p.H), p.inner_rows * p.H,
            )  # fmt: skip
            gradients = (
                _at(cell, p.dy, here * p.ld + p.column), _at(cell, p.dh, lo * p.ld_dh), p.ld_dh,
                _at(cell, p.dinner, lo * p.H), p.B * p.H,
                _at(cell, p.down, lo * ld_down), p.B * ld_down, ld_down,
            )  # fmt: skip
            beside = _beside(cell, p, here, lo, ld_down)
            mid = (
                cell.left(cell, p, here, lo, shard), _at(cell, p.dmiddle, lo * p.ld_dmiddle), p.ld_dmiddle,
                _at(cell, p.dz, here * p.P),
            )  # fmt: skip
            part = rows, p.H, j0, j1, p0, p1, q0, q1
            team = shards if p.by_units else 1, p.T - 1 - step
            cell.step_back(cell, p, part, at, states, gradients, beside, mid, team)
    if cell.products.narrow:
        amx.end()


@jitable
def _step_back(cell, p, part, at, states, gradients, beside, mid, team):
    """A step back of a cell with one product."""
    _backward_tile(cell, cell.output, part, at, states, gradients, beside)
    if cell.recurrent > 0:
        # One meeting a product is enough: dh of a unit is read and written by its own shard alone
        _wait(p, team, 1, 1)
        _recurrent_back(cell, p, part, at, gradients, team)


@jitable
def _step_back_narrow(cell, p, part, at, states, gradients, beside, mid, team):
    """A step back of a cell with one product, by narrow factors."""
    (rows, _, _, _, _, _, q0, q1), (gates, g_m, g_j), (_, dh, ld, _, _, _, _, _) = part, at, gradients
    rounded, W, U = mid[0], lanes_of(dh), cell.vectors
    PANEL, piece = VECTORS * W, cell.recurrent * U * W
    count = g_m // g_j * piece
    depth, panel = cell.products.padded(count), cell.products.column(count)
    _backward_tile(cell, cell.output, part, at, states, gradients, beside)
    if piece > 0:
        _wait(p, team, 1, 1)
        slots = shift(gates, cell.slots * U * W - piece)
        cell.products.round_rows(slots, g_m, rows, g_j, piece, g_m // g_j, rounded, p.ld_middle)
        for n in range(q0, q1):
            q = _turn(n, q0, q1, team)
            into = shift(dh, q * PANEL)
            b = _factors(cell, p.w_hh, q * panel * PANEL)
            product(p.kernel, rounded, p.ld_middle, b, depth, into, ld, into, ld, rows, _filled(p.P - q * PANEL, W))


@jitable
def _step_back_with_operand(cell, p, part, at, states, gradients, beside, mid, team):
    """A step back of a cell that has a second product before its equations."""
    (rows, _, _, _, p0, p1, _, _), (_, dm, ld, _) = part, mid
    PANEL, units = VECTORS * lanes_of(dm), cell.vectors * lanes_of(dm)
    _backward_tile(cell, cell.output, part, at, states, gradients, beside)
    _wait(p, team, 1, 2)
    start, count = (cell.slots - cell.second) * units, cell.second * units
    for n in range(p0, p1):
        into = shift(dm, n * PANEL)
        _clear(into, ld, rows, PANEL)
        _product_back(cell, p, p.w_mid, at, start, count, n, p.H, into, ld, rows)
    _operand_backward_tile(cell, part, at, states, gradients, beside, dm, ld)
    _wait(p, team, 2, 2)
    _recurrent_back(cell, p, part, at, gradients, team)


@jitable
def _step_back_with_projection(cell, p, part, at, states, gradients, beside, mid, team):
    """A step back of a cell whose result is projected."""
    (rows, H, _, _, p0, p1, q0, q1), (_, h, ld, c_prev, c, plane) = part, states
    dout, dh, ld_dh, dc, dplane, down, down_plane, ld_down = gradients
    middle, dm, ld_dm, z = mid
    W, PANEL = lanes_of(h), VECTORS * lanes_of(h)
    for m in range(rows):
        for n in range(q0 * PANEL, min(p.P, q1 * PANEL), W):
            count = p.P - n
            dy = load(shift(dh, m * ld_dh + n), count) + load(shift(dout, m * ld + n), count)
            (value,) = cell.project_backward((dy,), (load(shift(h, m * ld + n), count),))
            store(shift(z, m * p.P + n), value, count)
    _wait(p, team, 1, 2)
    for n in range(p0, p1):
        into = shift(dm, n * PANEL)
        _clear(into, ld_dm, rows, PANEL)
        product(p.kernel, z, p.P, _at(cell, p.w_mid, n * p.P * PANEL), p.P, into, ld_dm, into, ld_dm, rows, PANEL)
    hidden = middle, middle, H, c_prev, c, plane
    inside = dm, dm, ld_dm, dc, dplane, down, down_plane, ld_down
    _backward_tile(cell, -1, part, at, hidden, inside, beside)
    _wait(p, team, 2, 2)
    _clear(shift(dh, q0 * PANEL), ld_dh, rows, (q1 - q0) * PANEL)
    _recurrent_back(cell, p, part, at, gradients, team)


@jitable
def _step_back_normalised(cell, p, part, at, states, gradients, beside, mid, team):
    """A step back of a cell with normalisation.

    With n = (a - mean) / deviation: da = (dn - mean of dn - n mean of (n dn)) / deviation.
    """
    (rows, H, _, _, _, _, _, _), (gates, g_m, g_j) = part, at
    dout, dh, ld_dh, dc, dplane, down, down_plane, ld_down = gradients
    stats, scratch, ld_scratch, _ = mid
    ld, W, units, count = states[2], lanes_of(gates), cell.vectors * lanes_of(gates), cell.norms + 2
    for m in range(rows):
        mean, scale = element(stats, m * count + count - 2), element(stats, m * count + count - 1)
        total, along = load(dh, 0), load(dh, 0)
        for unit in range(0, H, W):
            left, here = H - unit, shift(gates, m * g_m + unit // units * g_j + unit % units)
            prev, own, given = _arguments(cell, m, unit, left, H, states, beside)
            new = _states_after(cell, m, unit, left, H, states)
            dnew = (load(shift(dh, m * ld_dh + unit), left),) + load_many(
                shift(dc, m * H + unit), dplane, left, cell.inner
            )
            dnew = _with_output(cell.output, dnew, shift(dout, m * ld + unit), left)
            normal = (fill_behind((new[cell.late] - mean) * scale, left, 0.0),)
            (one,) = cell.normal_backward(dnew, normal, load_many(here, units, W, cell.slots), prev, new, own, given)
            one = fill_behind(one, left, 0.0)
            total += one
            along += one * normal[0]
        sums = lane_sum(total) / H, lane_sum(along) / H, scale
        for unit in range(0, H, W):
            j, left = unit // units, H - unit
            here = shift(gates, m * g_m + j * g_j + unit % units)
            dh_at, dc_at = m * ld_dh + unit, m * H + unit
            prev, own, given = _arguments(cell, m, unit, left, H, states, beside)
            new = _states_after(cell, m, unit, left, H, states)
            dnew = (load(shift(dh, dh_at), left),) + load_many(shift(dc, dc_at), dplane, left, cell.inner)
            dnew = _with_output(cell.output, dnew, shift(dout, m * ld + unit), left)
            normal, slots = ((new[cell.late] - mean) * scale,), load_many(here, units, W, cell.slots)
            dslots, dprev, dmine = cell.backward(dnew, sums, normal, slots, prev, new, own, given)
            store_padded(shift(scratch, m * ld_scratch + j * cell.slots * units + unit % units), units, dslots, left)
            store(shift(dh, dh_at), dprev[0], left)
            store_many(shift(dc, dc_at), dplane, dprev[1:], left)
            accumulate_many(shift(down, m * ld_down + unit), down_plane, dmine)
        normalise_back(cell, shift(scratch, m * ld_scratch), shift(gates, m * g_m), g_j, H, shift(stats, m * count))
    _recurrent_back(cell, p, part, at, gradients, team)


@jitable
def _recurrent_back(cell, p, part, at, gradients, team):
    """Add what the gradients of the pre-activations mean for what was fed back."""
    (rows, _, _, _, _, _, q0, q1), (_, dh, ld, _, _, _, _, _) = part, gradients
    W, U = lanes_of(dh), cell.vectors
    total, recurrent, second = cell.slots * U, cell.recurrent * U, cell.second * U
    start, count = (total - recurrent - second) * W, recurrent * W
    for n in range(q0, q1):
        q = _turn(n, q0, q1, team)
        _product_back(cell, p, p.w_hh, at, start, count, q, p.P, shift(dh, q * VECTORS * W), ld, rows)


@jitable
def _product_back(cell, p, weights, at, start, count, q, size, into, ld, rows):
    """Add the product of some slots of the tape with panel q of transposed weights, which have `size` columns."""
    (gates, g_m, g_j), W = at, lanes_of(into)
    J, PANEL = g_m // g_j, VECTORS * W
    columns = _filled(size - q * PANEL, W)
    b = _at(cell, weights, q * J * count * PANEL)
    if count == g_j:
        product(p.kernel, gates, g_m, b, J * count, into, ld, into, ld, rows, columns)
    else:
        # These slots are a piece of every panel.
        for n in range(J):
            a, piece = shift(gates, n * g_j + start), shift(b, n * count * PANEL)
            product(p.kernel, a, g_m, piece, count, into, ld, into, ld, rows, columns)


@jitable
def _filled(columns, W):
    """So many columns, filled up to whole vectors, of which all have room; more than a panel stands for all of it."""
    return (columns + W - 1) // W * W


@jitable
def _clear(p, ld, rows, columns):
    for m in range(rows):
        for n in range(0, columns, lanes_of(p)):
            store(shift(p, m * ld + n), 0.0, lanes_of(p))


@jitable
def _backward_tile(cell, OUT, part, at, states, gradients, beside):
    """The cell's backward equations on some panels of some rows."""
    (rows, H, j0, j1, _, _, _, _), (gates, g_m, g_j) = part, at
    dout, dh, ld_dh, dc, dplane, down, down_plane, ld_down = gradients
    ld, W = states[2], lanes_of(gates)
    units = cell.vectors * W
    for j in range(j0, j1):
        for m in range(rows):
            for unit in range(j * units, (j + 1) * units, W):
                count, here = H - unit, shift(gates, j * g_j + m * g_m + unit - j * units)
                dh_at, dc_at, down_at = m * ld_dh + unit, m * H + unit, m * ld_down + unit
                prev, own, given = _arguments(cell, m, unit, count, H, states, beside)
                new = _states_after(cell, m, unit, count, H, states)
                dnew = (load(shift(dh, dh_at), count),) + load_many(shift(dc, dc_at), dplane, count, cell.inner)
                dnew = _with_output(OUT, dnew, shift(dout, m * ld + unit), count)
                dgates, dprev, dmine = cell.backward(dnew, load_many(here, units, W, cell.kept), prev, new, own, given)
                store_padded(here, units, dgates, count)
                store(shift(dh, dh_at), dprev[0], count)
                store_many(shift(dc, dc_at), dplane, dprev[1:], count)
                accumulate_many(shift(down, down_at), down_plane, dmine)


@jitable
def _operand_backward_tile(cell, part, at, states, gradients, beside, dm, ld_dm):
    """What the gradient of the second product's left factor adds, on some panels of some rows."""
    (rows, H, j0, j1, _, _, _, _), (gates, g_m, g_j) = part, at
    _, dh, ld_dh, dc, dplane, down, down_plane, ld_down = gradients
    W = lanes_of(gates)
    units = cell.vectors * W
    for j in range(j0, j1):
        for m in range(rows):
            for unit in range(j * units, (j + 1) * units, W):
                count, here = H - unit, shift(gates, j * g_j + m * g_m + unit - j * units)
                dh_at, dc_at, down_at = m * ld_dh + unit, m * H + unit, m * ld_down + unit
                prev, own, given = _arguments(cell, m, unit, count, H, states, beside)
                new = _states_after(cell, m, unit, count, H, states)
                carried = (load(shift(dh, dh_at), count),) + load_many(shift(dc, dc_at), dplane, count, cell.inner)
                dmid = (load(shift(dm, m * ld_dm + unit), count),)
                slots = load_many(here, units, W, cell.kept)
                dgates, dprev, dmine = cell.operand_backward(dmid, carried, slots, prev, new, own, given)
                store_padded(here, units, dgates, count)
                store(shift(dh, dh_at), dprev[0], count)
                store_many(shift(dc, dc_at), dplane, dprev[1:], count)
                accumulate_many(shift(down, down_at), down_plane, dmine)


@jitable
def _states_after(cell, m, unit, count, H, states):
    """The states after the step of some hidden units in row m."""
    _, h, ld, _, c, plane = states
    return (load(shift(h, m * ld + unit), count),) + load_many(shift(c, m * H + unit), plane, count, cell.inner)


def _with_output(OUT, dnew, dout, count):
    """Add the gradient of the output to that of the state it is."""
    raise TypeError("callable from compiled code only")


@overload(_with_output, prefer_literal=True)
def _add_output(OUT, dnew, dout, count):
    place = OUT.literal_value
    if place == 0:
        return lambda OUT, dnew, dout, count: (dnew[0] + load(dout, count),) + dnew[1:]
    if place == 1:
        return lambda OUT, dnew, dout, count: (dnew[0], dnew[1] + load(dout, count)) + dnew[2:]
    return lambda OUT, dnew, dout, count: dnew
