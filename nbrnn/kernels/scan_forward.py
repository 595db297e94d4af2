"""The scan's way forward: the kinds of steps, and the loop around them; see `scan`."""

from __future__ import annotations

from typing import Any, NamedTuple

from nbrnn.kernels import amx
from nbrnn.kernels.jit import inlined, jitable
from nbrnn.kernels.normalise import moments, normalise_slots
from nbrnn.kernels.scan_shared import (
    arguments,
    beside_of,
    count_panels,
    factors,
    floats,
    integers,
    rows_of,
    share_of,
    states_after,
    states_of,
    team_of,
    turn,
    wait,
)
from nbrnn.kernels.simd import element, lanes_of, load, load_many, shift, store, store_many
from nbrnn.kernels.tiles import VECTORS, product


class Forward(NamedTuple):
    """What a forward scan works on: numbers, and the arrays described in `scan` or, in compiled code, their addresses.

    kernel_ih, kernel_hh, kernel_mid: for the input, the recurrent and the second product; block: time steps whose input
    product is done at once; shared: whether all panels share one scratch tile; turn: 1 if the first step takes the last
    panel first; fresh: whether the states to begin with are zeros; lengths [B], starts [T + 1], slots [T + 2]: int64;
    I, P: sizes of the input and of what is fed back; ld: of a row of y, of which this direction's part begins at
    `column`; w_ih [J, I, .], bias [J S U W], w_hh [J, P, .], w_mid and bias_mid of the second product; rows: of one
    given number, of one inner state; step_given: whether given numbers differ by time step; ld_middle: of a row of
    middle; begun [., B, S U W]: for each shard, or for its rows, where a panel's recurrent products begin with what
    tokens give; empty where there are none, or nothing is kept.
    """

    integers = 22
    kernel_ih: int
    kernel_hh: int
    kernel_mid: int
    by_units: int
    block: int
    keep: int
    shared: int
    reverse: int
    turn: int
    fresh: int
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
    fixed: Any
    y: Any
    inner: Any
    middle: Any
    gates: Any
    begun: Any
    counters: Any


@jitable
def scan_forward(shard, shards, cell, numbers):
    """One shard of the forward scan."""
    p = Forward(*numbers)
    starts, slots = integers(p.starts), integers(p.slots)
    W = lanes_of(floats(cell, p.y, 0))
    J, PANEL = count_panels(p.H, cell.vectors * W), cell.kept * cell.vectors * W
    lo, hi, j0, j1, q0, q1 = 0, p.B, 0, J, 0, count_panels(p.P, VECTORS * W)
    shard, shards = team_of(p, shard, shards)
    if shards == 0:
        return
    if p.by_units:
        j0, j1 = share_of(J, shard, shards)
        q0, q1 = share_of(q1, shard, shards)
    else:
        lo, hi = rows_of(p, shard, shards)
    if cell.products.narrow:
        amx.begin()
    # Strides of the pre-activations: one row, one panel
    g_m, g_j = (PANEL, 0) if p.shared else (J * PANEL, PANEL)
    begun = floats(cell, p.begun, (shard * p.B if p.by_units else lo) * cell.slots * cell.vectors * W)
    for s0 in range(0, p.T, p.block):
        s1 = min(s0 + p.block, p.T)
        t0, t1 = (p.T - s1, p.T - s0) if p.reverse else (s0, s1)
        origin = element(starts, t0)
        if p.block > 1:
            g = floats(cell, p.gates, (origin if p.keep else 0) * g_m)
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
                states = states_of(cell, p, before, after, once, p.keep)
                tile = here if p.keep else _in_block(p, t - t0, now - origin, lo, hi) if p.block > 1 else once
                at = floats(cell, p.gates, tile * g_m), g_m, g_j, begun
                beside = beside_of(cell, p, here, once, J * cell.vectors * W)
                mid = cell.left(cell, p, here if p.keep else once, once, shard)
                part = rows, p.H, j0, j1, q0, q1
                team = shards if p.by_units else 1, step, step + p.turn
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
    starts = integers(p.starts)
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
def _fed_back(p, team):
    """Whether a step has something to multiply the recurrent weights with, and not zeros, which would add nothing."""
    _, step, _ = team
    return step > 0 or not p.fresh


@inlined
def step_plain(cell, p, row, part, at, states, beside, mid, team):
    """A step of a cell with one product."""
    (rows, _, j0, j1, _, _), fed = part, _fed_back(p, team)
    # The equations of a single row wait for themselves: those of all panels hide each other's latency
    group = j1 - j0 if rows == 1 and not p.shared else 1
    for first in range(j0, j1, group):
        stop = min(first + group, j1)
        for n in range(first, stop):
            j, way = turn(n, j0, j1, team)
            _products(cell, p, row, fed, part, at, states, j, way)
        for n in range(first, stop):
            j, _ = turn(n, j0, j1, team)
            _forward_tile(cell, p, j, part, at, states, beside)
    if cell.recurrent > 0:
        wait(p, team, 1, 1)


@inlined
def step_narrow(cell, p, row, part, at, states, beside, rounded, team):
    """A step of a cell with one product, by narrow factors."""
    (rows, _, j0, j1, _, _), (gates, g_m, g_j, _), (h_prev, _, ld, _, _, _) = part, at, states
    W, U, depth, panel = lanes_of(gates), cell.vectors, cell.products.padded(p.P), cell.products.column(p.P)
    recurrent, fed = cell.recurrent * U * W, _fed_back(p, team)
    start = cell.slots * U * W - recurrent
    if recurrent > 0 and fed:
        cell.products.round_rows(h_prev, ld, rows, p.P, p.P, 1, rounded, p.ld_middle)
    for n in range(j0, j1):
        j, way = turn(n, j0, j1, team)
        g = shift(gates, j * g_j)
        if row >= 0:
            _input(cell, p, row, rows, j, g, g_m)
        if recurrent > 0 and fed:
            r, b = shift(g, start), factors(cell, p.w_hh, j * panel * recurrent)
            ahead = shift(b, way * panel * recurrent)
            product(p.kernel_hh, rounded, p.ld_middle, b, depth, r, g_m, r, g_m, rows, recurrent, ahead)
        _forward_tile(cell, p, j, part, at, states, beside)
    if recurrent > 0:
        wait(p, team, 1, 1)


@inlined
def step_with_operand(cell, p, row, part, at, states, beside, mid, team):
    """A step of a cell that has a second product before its equations."""
    (rows, H, j0, j1, _, _), (gates, g_m, g_j, _) = part, at
    W = lanes_of(gates)
    total, count, fed = cell.slots * cell.vectors, cell.second * cell.vectors, _fed_back(p, team)
    for j in range(j0, j1):
        _products(cell, p, row, fed, part, at, states, j, 1)
        _operand_tile(cell, j, part, at, states, beside, mid)
    wait(p, team, 1, 2)
    for j in range(j0, j1):
        g, b = shift(gates, j * g_j + (total - count) * W), floats(cell, p.w_mid, j * H * count * W)
        if fed:
            product(p.kernel_mid, mid, H, b, H, g, g_m, g, g_m, rows, count * W, shift(b, H * count * W))
        _forward_tile(cell, p, j, part, at, states, beside)
    wait(p, team, 2, 2)


@inlined
def step_with_projection(cell, p, row, part, at, states, beside, mid, team):
    """A step of a cell whose result is projected."""
    (rows, H, j0, j1, q0, q1), (_, h, ld, c_prev, c, plane) = part, states
    W, fed = lanes_of(h), _fed_back(p, team)
    PANEL = VECTORS * W
    for j in range(j0, j1):
        _products(cell, p, row, fed, part, at, states, j, 1)
        # h of the step before has another size: the equations cannot use it
        hidden = mid, mid, H, c_prev, c, plane
        _forward_tile(cell, p, j, part, at, hidden, beside)
    wait(p, team, 1, 2)
    for q in range(q0, q1):
        columns, out, first = min(PANEL, p.P - q * PANEL), shift(h, q * PANEL), q * PANEL
        weights, bias = floats(cell, p.w_mid, first * H), floats(cell, p.bias_mid, first)
        product(p.kernel_mid, mid, H, weights, H, bias, 0, out, ld, rows, columns, shift(weights, H * PANEL))
        for m in range(rows):
            for n in range(0, columns, W):
                place = shift(out, m * ld + n)
                (value,) = cell.project((load(place, columns - n),))
                store(place, value, columns - n)
    wait(p, team, 2, 2)


@inlined
def step_normalised(cell, p, row, part, at, states, beside, stats, team):
    """A step of a cell with normalisation."""
    (rows, H, j0, j1, _, _), (gates, g_m, g_j, _) = part, at
    _, h, ld, _, c, plane = states
    W = lanes_of(gates)
    units, count, fed = cell.vectors * W, cell.norms + 2, _fed_back(p, team)
    for j in range(j0, j1):
        _products(cell, p, row, fed, part, at, states, j, 1)
    for m in range(rows):
        normalise_slots(cell, shift(gates, m * g_m), g_j, H, shift(stats, m * count))
        for unit in range(0, H, W):
            left, here = H - unit, shift(gates, m * g_m + unit // units * g_j + unit % units)
            prev, own, given = arguments(cell, m, unit, left, H, states, beside)
            early, _ = cell.forward(load_many(here, units, W, cell.slots), prev, own, given)
            store_many(shift(c, m * H + unit + (cell.late - 1) * plane), plane, early, left)
        mean, scale = moments(shift(c, m * H + (cell.late - 1) * plane), H)
        store(shift(stats, m * count + count - 2), mean, 1)
        store(shift(stats, m * count + count - 1), scale, 1)
        for unit in range(0, H, W):
            left, here = H - unit, shift(gates, m * g_m + unit // units * g_j + unit % units)
            prev, own, given = arguments(cell, m, unit, left, H, states, beside)
            new = states_after(cell, m, unit, left, H, states)
            normal = ((new[cell.late] - mean) * scale,)
            late = cell.finish(normal, load_many(here, units, W, cell.slots), prev, new, own, given)
            store(shift(h, m * ld + unit), late[0], left)
            store_many(shift(c, m * H + unit), plane, late[1:], left)


@inlined
def _products(cell, p, row, fed, part, at, states, j, way):
    """The pre-activations of one panel, up to those of a second product; row: of x, -1 if they hold the input's; fed:
    whether there is a recurrent product."""
    (rows, _, _, _, _, _), (gates, g_m, g_j, begun) = part, at
    g, columns = shift(gates, j * g_j), cell.slots * cell.vectors * lanes_of(gates)
    if row >= 0 and p.tokens and p.keep and fed:
        # Rows are copied faster than the tape's lines can be had, and multiplied more slowly
        _tokens(cell, p, row, rows, j, (g, g_m), (begun, columns))
        _recurrent(cell, p, rows, states, j, way, (begun, columns), (g, g_m))
        return
    if row >= 0:
        _input(cell, p, row, rows, j, g, g_m)
    if fed:
        _recurrent(cell, p, rows, states, j, way, (g, g_m), (g, g_m))


@inlined
def _recurrent(cell, p, rows, states, j, way, begin, at):
    """Set a panel's slots to what stands in `begin` plus the recurrent product."""
    (first, ld_first), (g, g_m), (h_prev, _, ld, _, _, _) = begin, at, states
    U, W = cell.vectors, lanes_of(g)
    start, recurrent = (cell.slots - cell.recurrent - cell.second) * U * W, cell.recurrent * U * W
    if recurrent > 0:
        size = p.P * recurrent
        first, g, b = shift(first, start), shift(g, start), floats(cell, p.w_hh, j * size)
        product(p.kernel_hh, h_prev, ld, b, p.P, first, ld_first, g, g_m, rows, recurrent, shift(b, way * size))


@jitable
def _input(cell, p, row, rows, j, g, g_m):
    """Set a panel's pre-activations to the bias plus the input product, for consecutive rows of x from `row` on."""
    if p.tokens:
        _tokens(cell, p, row, rows, j, (g, g_m), (g, g_m))
        return
    W = lanes_of(g)
    total, columns = cell.slots * cell.vectors * W, cell.inputs * cell.vectors * W
    bias, depth, size = floats(cell, p.bias, j * total), cell.products.padded(p.I), cell.products.row(p.I)
    panel = cell.products.column(p.I) * columns
    x, weights = factors(cell, p.x, row * size), factors(cell, p.w_ih, j * panel)
    product(p.kernel_ih, x, size, weights, depth, bias, 0, g, g_m, rows, columns, shift(weights, panel))
    for m in range(rows):
        for c in range(columns, total, W):
            store(shift(g, m * g_m + c), load(shift(bias, c), W), W)


@jitable
def _tokens(cell, p, row, rows, j, at, begin):
    """The same where x holds tokens; those slots to which a recurrent product will be added are set in `begin`."""
    W = lanes_of(at[0])
    total, columns = cell.slots * cell.vectors * W, cell.inputs * cell.vectors * W
    bias, depth, tokens = floats(cell, p.bias, j * total), cell.products.padded(p.I), integers(p.x)
    weights = factors(cell, p.w_ih, j * cell.products.column(p.I) * columns)
    first = (cell.slots - cell.recurrent - cell.second) * cell.vectors * W
    stop = first + cell.recurrent * cell.vectors * W
    for m in range(rows):
        token = element(tokens, row + m)
        for c in range(0, total, W):
            into, ld = begin if first <= c < stop else at
            value = load(shift(bias, c), W)
            if c < columns:
                value = value + cell.products.token_row(weights, depth, columns, token, c)
            store(shift(into, m * ld + c), value, W)


@inlined
def _forward_tile(cell, p, j, part, at, states, beside):
    """The cell's equations on one panel of some rows."""
    (rows, H, _, _, _, _), (gates, g_m, g_j, _), (_, h, ld, _, c, plane) = part, at, states
    W = lanes_of(gates)
    units = cell.vectors * W
    for m in range(rows):
        for unit in range(j * units, (j + 1) * units, W):
            count, here = H - unit, shift(gates, j * g_j + m * g_m + unit - j * units)
            prev, own, given = arguments(cell, m, unit, count, H, states, beside)
            new, kept = cell.forward(load_many(here, units, W, cell.slots), prev, own, given)
            store(shift(h, m * ld + unit), new[0], count)
            store_many(shift(c, m * H + unit), plane, new[1:], count)
            if p.keep:
                store_many(here, units, kept, W)


@inlined
def _operand_tile(cell, j, part, at, states, beside, mid):
    """The left factor of the second product on one panel of some rows."""
    (rows, H, _, _, _, _), (gates, g_m, g_j, _) = part, at
    W = lanes_of(gates)
    units = cell.vectors * W
    for m in range(rows):
        for unit in range(j * units, (j + 1) * units, W):
            count, here = H - unit, shift(gates, j * g_j + m * g_m + unit - j * units)
            prev, own, given = arguments(cell, m, unit, count, H, states, beside)
            (value,) = cell.operand(load_many(here, units, W, cell.slots), prev, own, given)
            store(shift(mid, m * H + unit), value, count)
