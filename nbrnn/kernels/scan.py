"""The time loop, forward and back, specialised on a cell.

For every step and every panel of hidden units: the recurrent product into a tile of pre-activations, then the cell's
equations on that tile while it is in the nearest cache. Backward is the mirror image: the equations turn what was kept
into the gradients of the pre-activations, and a product with the transposed weights carries them one step back.

Two kinds of cells have a second product in a step, whose left factor is `middle`. Where an `operand` is given, it comes
before the equations and fills the last slots. In a projection it comes after them: it turns their first result into the
output, which is also what is fed back.

In a cell with normalisation (`norms`) the pre-activations of a row, in groups, and the second state are shifted and
scaled to mean 0 and variance 1 before they are used, which takes whole rows: such a cell is never divided by units.

Memory, for one layer and direction (D directions share y, one beside the other); P is the size of the output, H without
a projection:

    x       [T, B, I], or [T, B] tokens, whose one-hot rows are a gather
    y       [T + 2, B, D P]   output t is y[t + 1]; y[0] and y[T + 1] are the first h of the two directions, so that
                              h of the step before is always one row of y away
    inner   [N, T + 2, B, H]  the states behind h, laid out alike; [N, 1, B, H], overwritten by every step, where
                              nothing is kept
    middle  [T, B, H]         the left factor of a second product; [1, B, H] where nothing is kept
            [T, B, norms + 2] what rows were normalised with: 1 / deviation of each group of pre-activations, and of
                              the second state its mean and 1 / deviation
    own     [., J U W]        the cell's own parameters, one number a unit
    given   [., T, B, H]      numbers that equations take beside them, such as masks; [., 1, B, H]: of all steps
    gates   [T, B, J, K U W]  the tape: J panels of U vectors of W units, K slots a unit, slot by slot, of which the
                              first S are the pre-activations. Forward leaves what it kept, backward turns it into the
                              gradients of the pre-activations.
            [B, K U W]        where nothing is kept, the scratch tile that all panels share; or [block, B, J, K U W]

Schedules: the shards divide the rows of the batch and run the whole loop without waiting for each other, or they divide
the hidden units and meet after every product that needs whole rows (`barrier`). Either way each number is computed by
the same operations in the same order.

With few rows in a step the input product of several steps, `block`, is done at once: tiles of one row are slow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba
from numba.extending import overload

from nbrnn.kernels.barrier import join, meet
from nbrnn.kernels.constants import Constants
from nbrnn.kernels.jit import compiled, jitable
from nbrnn.kernels.normalise import moments, normalise_back, normalise_slots, number_at
from nbrnn.kernels.simd import (
    accumulate_many,
    fill_behind,
    lane_sum,
    lanes_of,
    load,
    load_many,
    pointer,
    shift,
    store,
    store_many,
    store_padded,
    width,
)
from nbrnn.kernels.tiles import VECTORS, product


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
        Different for different equations.
    layout : Layout
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
    front : callable or None
        ``front(states, own, mask)``: the first states of the scan, where they are computed from the others.
    fronts : int
        How many those are.
    """

    name: str
    layout: Layout
    forward: Callable
    backward: Callable
    operand: Callable | None = None
    operand_backward: Callable | None = None
    project: Callable | None = None
    project_backward: Callable | None = None
    finish: Callable | None = None
    normal_backward: Callable | None = None
    front: Callable | None = None
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
    def step(self) -> Callable:
        if self.finish:
            return _step_normalised
        return _step_with_operand if self.operand else _step_with_projection if self.project else _step

    @property
    def step_back(self) -> Callable:
        if self.finish:
            return _step_back_normalised
        if self.operand:
            return _step_back_with_operand
        return _step_back_with_projection if self.project else _step_back


@cache
def compile_scan(cell: Equations, dtype: str) -> tuple[Callable, Callable]:
    """The entries of the forward and the backward scan of a cell; arguments as in `_forward` and `_backward`."""

    def forward_scan(shards, *args):
        if shards == 1:  # no literals here: both paths share what is compiled
            _forward(shards - 1, shards, cell, args)
        else:
            for s in numba.prange(shards):
                _forward(s, shards, cell, args)

    def backward_scan(shards, *args):
        if shards == 1:
            _backward(shards - 1, shards, cell, args)
        else:
            for s in numba.prange(shards):
                _backward(s, shards, cell, args)

    tag = f"{cell.name}-{dtype}"
    return compiled(forward_scan, tag=tag, parallel=True), compiled(backward_scan, tag=tag, parallel=True)


@cache
def compile_front(cell: Equations, dtype: str) -> Callable:
    """The entry that computes the first states of the scan from the others, at the beginning of a sequence.

    Its arguments: 1, states [., B, H], own [., J U W], mask [., B, H], the states to compute [., B, H].
    """

    def front(shards, states, own, mask, out):
        _front(cell, states, own, mask, out)

    return compiled(front, tag=f"{cell.name}-{dtype}")


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
def _share(count, shard, shards):
    """The part of `count` things that one shard takes."""
    return count * shard // shards, count * (shard + 1) // shards


@jitable
def _wait(team, n, meetings):
    """The n-th of a step's meetings of all shards, where they divide the hidden units."""
    counters, shards, step = team
    if shards > 1:
        meet(counters, shards * (step * meetings + n))


# ------------------------------------------------------------------ forward


@jitable
def _forward(shard, shards, cell, args):
    """One shard of the forward scan.

    kernel_ih, kernel_hh, kernel_mid: for the input, the recurrent and the second product; first: this direction's first
    column of y; w_ih: [J, I, .]; bias: [J S U W]; w_hh: [J, P, .]; w_mid, bias_mid: of the second product; gates: flat.
    """
    # A parallel region takes no tuples within its tuple of arguments.
    (kernel_ih, kernel_hh, kernel_mid, by_units, block, keep,
     reverse, first, x, w_ih, bias, w_hh, w_mid, bias_mid, own, given, y, inner, middle, gates,
     counters) = args  # fmt: skip
    kernels = kernel_ih, kernel_hh, kernel_mid
    weights = w_ih, bias, w_hh, w_mid, bias_mid
    T, B, J, H = x.shape[0], x.shape[1], weights[0].shape[0], inner.shape[3]
    W, ld = lanes_of(pointer(y, 0)), y.shape[2]
    PANEL = cell.kept * cell.vectors * W
    lo, hi, j0, j1, q0, q1 = 0, B, 0, J, 0, weights[3].shape[0]
    if by_units:
        shards = join(counters, shards)
        if shards == 0:
            return
        shard = shard if shards > 1 else 0
        j0, j1 = _share(J, shard, shards)
        q0, q1 = _share(q1, shard, shards)
    else:
        lo, hi = _share(B, shard, shards)
    part = hi - lo, H, j0, j1, q0, q1
    # Strides of the pre-activations: one time step, one row, one panel
    g_t, g_m, g_j = B * J * PANEL, J * PANEL, PANEL
    if gates.size == B * PANEL:
        g_t, g_m, g_j = 0, PANEL, 0
    elif not keep and block == 1:
        g_t = 0
    c_t, plane = B * H if keep else 0, inner.shape[1] * B * H
    for s0 in range(0, T, block):
        s1 = min(s0 + block, T)
        t0 = T - s1 if reverse else s0
        origin = 0 if keep else t0
        if block > 1:
            for j in range(j0, j1):
                g = pointer(gates, (t0 - origin) * g_t + j * g_j)
                _input(cell, kernels[0], x, t0 * B, (s1 - s0) * B, weights, j, g, g_m)
        for step in range(s0, s1):
            t = T - 1 - step if reverse else step
            before, after = t + 2 * reverse, t + 1
            row = t * B + lo if block == 1 else -1
            states = (
                pointer(y, (before * B + lo) * ld + first), pointer(y, (after * B + lo) * ld + first), ld,
                pointer(inner, before * c_t + lo * H), pointer(inner, after * c_t + lo * H), plane,
            )  # fmt: skip
            at = pointer(gates, (t - origin) * g_t + lo * g_m), g_m, g_j
            beside = own, pointer(given, (t * B + lo) * H if given.shape[1] > 1 else lo * H), given.shape[1] * B * H
            mid, team = (
                pointer(middle, (t * B * keep + lo) * middle.shape[2]),
                (counters, shards if by_units else 1, step),
            )
            cell.step(cell, kernels, x, row, weights, part, at, states, beside, mid, keep, team)


@jitable
def _step(cell, kernels, x, row, weights, part, at, states, beside, mid, keep,
          team):  # fmt: skip
    """A step of a cell with one product."""
    for j in range(part[2], part[3]):
        _products(cell, kernels, x, row, weights, part, at, states, j)
        _forward_tile(cell, j, part, at, states, beside, keep)
    if cell.recurrent > 0:
        _wait(team, 1, 1)


@jitable
def _step_with_operand(cell, kernels, x, row, weights, part, at, states, beside,
                       mid, keep, team):  # fmt: skip
    """A step of a cell that has a second product before its equations."""
    (rows, H, j0, j1, _, _), (gates, g_m, g_j) = part, at
    W = lanes_of(gates)
    total, count = cell.slots * cell.vectors, cell.second * cell.vectors
    for j in range(j0, j1):
        _products(cell, kernels, x, row, weights, part, at, states, j)
        _operand_tile(cell, j, part, at, states, beside, mid)
    _wait(team, 1, 2)
    for j in range(j0, j1):
        g, b = shift(gates, j * g_j + (total - count) * W), pointer(weights[3], j * H * count * W)
        product(kernels[2], mid, H, b, H, g, g_m, g, g_m, rows, count * W)
        _forward_tile(cell, j, part, at, states, beside, keep)
    _wait(team, 2, 2)


@jitable
def _step_with_projection(cell, kernels, x, row, weights, part, at, states,
                          beside, mid, keep, team):  # fmt: skip
    """A step of a cell whose result is projected."""
    (rows, H, j0, j1, q0, q1), (_, h, ld, c_prev, c, plane) = part, states
    _, _, w_hh, w_mid, bias = weights
    size, P = w_hh.shape[1], w_mid.shape[2]
    W = lanes_of(h)
    for j in range(j0, j1):
        _products(cell, kernels, x, row, weights, part, at, states, j)
        # h of the step before has another size: the equations cannot use it
        hidden = mid, mid, H, c_prev, c, plane
        _forward_tile(cell, j, part, at, hidden, beside, keep)
    _wait(team, 1, 2)
    for q in range(q0, q1):
        columns, out = min(P, size - q * P), shift(h, q * P)
        product(kernels[2], mid, H, pointer(w_mid, q * H * P), H, pointer(bias, q * P), 0, out, ld, rows, columns)
        for m in range(rows):
            for n in range(0, columns, W):
                place = shift(out, m * ld + n)
                (value,) = cell.project((load(place, columns - n),))
                store(place, value, columns - n)
    _wait(team, 2, 2)


@jitable
def _step_normalised(cell, kernels, x, row, weights, part, at, states, beside, stats, keep, team):
    """A step of a cell with normalisation."""
    (rows, H, j0, j1, _, _), (gates, g_m, g_j) = part, at
    _, h, ld, _, c, plane = states
    W = lanes_of(gates)
    units, count = cell.vectors * W, cell.norms + 2
    for j in range(j0, j1):
        _products(cell, kernels, x, row, weights, part, at, states, j)
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
def _products(cell, kernels, x, row, weights, part, at, states, j):
    """The pre-activations of one panel, up to those of a second product; row: of x, -1 if they hold the input's."""
    (rows, _, _, _, _, _), (gates, g_m, g_j), (h_prev, _, ld, _, _, _) = part, at, states
    U = cell.vectors
    total, recurrent, second = cell.slots * U, cell.recurrent * U, cell.second * U
    g, w_hh = shift(gates, j * g_j), weights[2]
    W, fed = lanes_of(g), w_hh.shape[1]
    if row >= 0:
        _input(cell, kernels[0], x, row, rows, weights, j, g, g_m)
    if recurrent > 0:
        r, b = shift(g, (total - recurrent - second) * W), pointer(w_hh, j * fed * recurrent * W)
        product(kernels[1], h_prev, ld, b, fed, r, g_m, r, g_m, rows, recurrent * W)


@jitable
def _input(cell, kernel, x, row, rows, weights, j, g, g_m):
    """Set a panel's pre-activations to the bias plus the input product, for consecutive rows of x from `row` on."""
    w_ih, bias, _, _, _ = weights
    I, W = w_ih.shape[1], lanes_of(g)
    total, columns = cell.slots * cell.vectors * W, cell.inputs * cell.vectors * W
    if x.ndim == 2:
        for m in range(rows):
            token = x[(row + m) // x.shape[1], (row + m) % x.shape[1]]
            for c in range(0, columns, W):
                w = load(pointer(w_ih, (j * I + token) * columns + c), W)
                store(shift(g, m * g_m + c), load(pointer(bias, j * total + c), W) + w, W)
    else:
        a, b = pointer(x, row * I), pointer(w_ih, j * I * columns)
        product(kernel, a, I, b, I, pointer(bias, j * total), 0, g, g_m, rows, columns)
    for m in range(rows):
        for c in range(columns, total, W):
            store(shift(g, m * g_m + c), load(pointer(bias, j * total + c), W), W)


@jitable
def _forward_tile(cell, j, part, at, states, beside, keep):
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
            if keep:
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
    (h_prev, _, ld, c_prev, _, plane), (own, given, given_plane) = states, beside
    W, at = lanes_of(h_prev), m * H + unit
    prev = (load(shift(h_prev, m * ld + unit), count),) + load_many(shift(c_prev, at), plane, count, cell.inner)
    mine = load_many(pointer(own, unit), own.shape[1], W, cell.own)
    return prev, mine, load_many(shift(given, at), given_plane, count, cell.given)


# ------------------------------------------------------------------ backward


@jitable
def _backward(shard, shards, cell, args):
    """One shard of the backward scan: turns the tape into the gradients of the pre-activations.

    dy: [T, B, D P]; w_hh, w_mid: the weights of the recurrent and of the second product, transposed, in panels, their
    depth in the order of the tape; dh: [B, .] and dinner: [N, B, H] hold the gradients of the last state, and of the
    first one afterwards; dmid: [B, .], scratch; dz: [T, B, P], the gradient of what a projection gives; down: [., B, J
    U W], zeros, to which the gradients of own parameters are added.
    """
    (kernel, by_units, reverse, first, dy, w_hh, w_mid, own,
     given, y, inner, middle, gates, dh, dinner, dmid, dz, down, counters) = args  # fmt: skip
    weights = w_hh, w_mid
    T, B, ld = dy.shape
    H, W, P = inner.shape[3], lanes_of(pointer(y, 0)), weights[0].shape[2]
    g_m, units = gates.size // (T * B), cell.vectors * W
    J, panels = g_m // (cell.kept * units), -(-H // P)
    lo, hi, p0, p1, q0, q1 = 0, B, 0, panels, 0, weights[0].shape[0]
    if by_units:
        shards = join(counters, shards)
        if shards == 0:
            return
        shard = shard if shards > 1 else 0
        p0, p1 = _share(panels, shard, shards)
        q0, q1 = _share(q1, shard, shards)
    else:
        lo, hi = _share(B, shard, shards)
    # Panels of hidden units as the tape has them, as plain panels, and plain panels of what is fed back
    part = hi - lo, H, p0 * P // units, min(J, p1 * P // units), p0, p1, q0, q1
    plane = (T + 2) * B * H
    for step in range(T - 1, -1, -1):
        t = T - 1 - step if reverse else step
        before, after, now = (t + 2 * reverse) * B + lo, (t + 1) * B + lo, t * B + lo
        at = pointer(gates, now * g_m), g_m, cell.kept * units
        states = (
            pointer(y, before * ld + first), pointer(y, after * ld + first), ld, pointer(inner, before * H),
            pointer(inner, after * H), plane,
        )  # fmt: skip
        gradients = (
            pointer(dy, now * ld + first), pointer(dh, lo * dh.shape[1]), dh.shape[1], pointer(dinner, lo * H), B * H,
            pointer(down, lo * down.shape[2]), B * down.shape[2], down.shape[2],
        )  # fmt: skip
        beside = own, pointer(given, now * H if given.shape[1] > 1 else lo * H), given.shape[1] * B * H
        mid = (
            pointer(middle, now * middle.shape[2]),
            pointer(dmid, lo * dmid.shape[1]),
            dmid.shape[1],
            pointer(dz, now * dz.shape[2]),
        )
        team = counters, shards if by_units else 1, T - 1 - step
        cell.step_back(cell, kernel, weights, part, at, states, gradients, beside, mid, team)


@jitable
def _step_back(cell, kernel, weights, part, at, states, gradients, beside,
               mid, team):  # fmt: skip
    """A step back of a cell with one product."""
    _backward_tile(cell, cell.output, part, at, states, gradients, beside)
    if cell.recurrent > 0:
        # One meeting a product is enough: dh of a unit is read and written by its own shard alone
        _wait(team, 1, 1)
        _recurrent_back(cell, kernel, weights, part, at, gradients)


@jitable
def _step_back_with_operand(cell, kernel, weights, part, at, states,
                            gradients, beside, mid, team):  # fmt: skip
    """A step back of a cell that has a second product before its equations."""
    (rows, _, _, _, p0, p1, _, _), (_, dm, ld, _), w = part, mid, weights[1]
    W, P = lanes_of(dm), w.shape[2]
    _backward_tile(cell, cell.output, part, at, states, gradients, beside)
    _wait(team, 1, 2)
    units = cell.vectors * W
    start, count = (cell.slots - cell.second) * units, cell.second * units
    for p in range(p0, p1):
        _clear(shift(dm, p * P), ld, rows, P)
        _product_back(kernel, at, start, count, w, p, shift(dm, p * P), ld, rows)
    _operand_backward_tile(cell, part, at, states, gradients, beside, dm, ld)
    _wait(team, 2, 2)
    _recurrent_back(cell, kernel, weights, part, at, gradients)


@jitable
def _step_back_with_projection(cell, kernel, weights, part, at,
                               states, gradients, beside, mid, team):  # fmt: skip
    """A step back of a cell whose result is projected."""
    (rows, H, _, _, p0, p1, q0, q1), (_, h, ld, c_prev, c, plane) = part, states
    dout, dh, ld_dh, dc, dplane, down, down_plane, ld_down = gradients
    middle, dm, ld_dm, z = mid
    w = weights[1]
    size, P, W = w.shape[1], w.shape[2], lanes_of(h)
    for m in range(rows):
        for n in range(q0 * P, min(size, q1 * P), W):
            count = size - n
            dy = load(shift(dh, m * ld_dh + n), count) + load(shift(dout, m * ld + n), count)
            (value,) = cell.project_backward((dy,), (load(shift(h, m * ld + n), count),))
            store(shift(z, m * size + n), value, count)
    _wait(team, 1, 2)
    for p in range(p0, p1):
        into = shift(dm, p * P)
        _clear(into, ld_dm, rows, P)
        product(kernel, z, size, pointer(w, p * size * P), size, into, ld_dm, into, ld_dm, rows, P)
    hidden = middle, middle, H, c_prev, c, plane
    inside = dm, dm, ld_dm, dc, dplane, down, down_plane, ld_down
    _backward_tile(cell, -1, part, at, hidden, inside, beside)
    _wait(team, 2, 2)
    _clear(shift(dh, q0 * P), ld_dh, rows, (q1 - q0) * P)
    _recurrent_back(cell, kernel, weights, part, at, gradients)


@jitable
def _step_back_normalised(cell, kernel, weights, part, at, states, gradients, beside, mid, team):
    """A step back of a cell with normalisation.

    With n = (a - mean) / deviation: da = (dn - mean of dn - n mean of (n dn)) / deviation.
    """
    (rows, H, _, _, _, _, _, _), (gates, g_m, g_j) = part, at
    dout, dh, ld_dh, dc, dplane, down, down_plane, ld_down = gradients
    stats, scratch, ld_scratch, _ = mid
    ld, W, units, count = states[2], lanes_of(gates), cell.vectors * lanes_of(gates), cell.norms + 2
    for m in range(rows):
        mean, scale = number_at(stats, m * count + count - 2), number_at(stats, m * count + count - 1)
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
    _recurrent_back(cell, kernel, weights, part, at, gradients)


@jitable
def _recurrent_back(cell, kernel, weights, part, at, gradients):
    """Add what the gradients of the pre-activations mean for what was fed back."""
    (rows, _, _, _, _, _, q0, q1), (_, dh, ld, _, _, _, _, _), w = part, gradients, weights[0]
    U = cell.vectors
    total, recurrent, second = cell.slots * U, cell.recurrent * U, cell.second * U
    W, P = lanes_of(dh), w.shape[2]
    for q in range(q0, q1):
        start, count = (total - recurrent - second) * W, recurrent * W
        _product_back(kernel, at, start, count, w, q, shift(dh, q * P), ld, rows)


@jitable
def _product_back(kernel, at, start, count, w, q, into, ld, rows):
    """Add the product of some slots of the tape with one panel of transposed weights."""
    gates, g_m, g_j = at
    K, P = w.shape[1], w.shape[2]
    if count == g_j:
        product(kernel, gates, g_m, pointer(w, q * K * P), K, into, ld, into, ld, rows, P)
    else:
        # These slots are a piece of every panel.
        for n in range(K // count):
            a, b = shift(gates, n * g_j + start), pointer(w, (q * K + n * count) * P)
            product(kernel, a, g_m, b, count, into, ld, into, ld, rows, P)


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
