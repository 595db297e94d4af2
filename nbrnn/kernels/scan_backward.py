"""The scan's way back: the kinds of steps, and the loop around them; see `scan`."""

from __future__ import annotations

from typing import Any, NamedTuple

from numba.extending import overload

from nbrnn.kernels import amx
from nbrnn.kernels.jit import inlined, jitable
from nbrnn.kernels.normalise import normalise_back
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
from nbrnn.kernels.simd import (
    accumulate_many,
    element,
    fill_behind,
    lane_sum,
    lanes_of,
    load,
    load_many,
    shift,
    store,
    store_many,
    store_padded,
)
from nbrnn.kernels.tiles import VECTORS, prefetch, product

PART = 512  # steps of depth of a product that are taken at once


class Backward(NamedTuple):
    """What a backward scan works on; see `Forward`.

    first, stop: the steps that it goes through, in the order of the way forward; dy: [N, D P]; w_hh, w_mid: the weights
    of the recurrent and of the second product, transposed, in plain panels, their depth in the order of the tape; dh:
    [B, ld_dh] and dinner: [., B, H] hold the gradients of the last state, and of the first one afterwards; dmiddle: [B,
    ld_dmiddle], scratch; dz: [N, P], the gradient of what a projection gives; down: [., B, J U W], to which the
    gradients of own parameters are added; counters: zeros.
    """

    integers = 17
    kernel: int
    by_units: int
    reverse: int
    first: int
    stop: int
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
    fixed: Any
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


@jitable
def scan_backward(shard, shards, cell, numbers):
    """One shard of the backward scan: turns the tape into the gradients of the pre-activations."""
    p = Backward(*numbers)
    starts, slots = integers(p.starts), integers(p.slots)
    W = lanes_of(floats(cell, p.y, 0))
    units, PANEL = cell.vectors * W, VECTORS * W
    J, panels = count_panels(p.H, units), count_panels(p.H, PANEL)
    lo, hi, p0, p1, q0, q1 = 0, p.B, 0, panels, 0, count_panels(p.P, PANEL)
    shard, shards = team_of(p, shard, shards)
    if shards == 0:
        return
    if p.by_units:
        p0, p1 = share_of(panels, shard, shards)
        q0, q1 = share_of(q1, shard, shards)
    else:
        lo, hi = rows_of(p, shard, shards)
    # Panels of hidden units as the tape has them, as plain panels, and plain panels of what is fed back
    j0, j1 = p0 * PANEL // units, min(J, p1 * PANEL // units)
    g_j = cell.kept * units
    g_m, ld_down = J * g_j, J * units
    if cell.products.narrow:
        amx.begin()
    for step in range(p.stop - 1, p.first - 1, -1):
        t = p.T - 1 - step if p.reverse else step
        now, last = element(starts, t), element(starts, t + 1)
        rows = min(hi, last - now) - lo
        if rows > 0:
            here = now + lo
            before, after = element(slots, t + 2 * p.reverse) + lo, element(slots, t + 1) + lo
            at = floats(cell, p.gates, here * g_m), g_m, g_j
            states = states_of(cell, p, before, after, lo, 1)
            gradients = (
                floats(cell, p.dy, here * p.ld + p.column), floats(cell, p.dh, lo * p.ld_dh), p.ld_dh,
                floats(cell, p.dinner, lo * p.H), p.B * p.H,
                floats(cell, p.down, lo * ld_down), p.B * ld_down, ld_down,
            )  # fmt: skip
            beside = beside_of(cell, p, here, lo, ld_down)
            mid = (
                cell.left(cell, p, here, lo, shard), floats(cell, p.dmiddle, lo * p.ld_dmiddle), p.ld_dmiddle,
                floats(cell, p.dz, here * p.P),
            )  # fmt: skip
            part = rows, p.H, j0, j1, p0, p1, q0, q1
            team = shards if p.by_units else 1, p.stop - 1 - step, p.T - 1 - step
            cell.step_back(cell, p, part, at, states, gradients, beside, mid, team)
    if cell.products.narrow:
        amx.end()


@inlined
def step_back_plain(cell, p, part, at, states, gradients, beside, mid, team):
    """A step back of a cell with one product."""
    _backward_tile(cell, cell.output, part, at, states, gradients, beside)
    if cell.recurrent > 0:
        # One meeting a product is enough: dh of a unit is read and written by its own shard alone
        wait(p, team, 1, 1)
        _recurrent_back(cell, p, part, at, gradients, team)


@inlined
def step_back_narrow(cell, p, part, at, states, gradients, beside, mid, team):
    """A step back of a cell with one product, by narrow factors."""
    (rows, _, _, _, _, _, q0, q1), (gates, g_m, g_j), (_, dh, ld, _, _, _, _, _) = part, at, gradients
    rounded, W, U = mid[0], lanes_of(dh), cell.vectors
    PANEL, piece = VECTORS * W, cell.recurrent * U * W
    count = g_m // g_j * piece
    depth, panel = cell.products.padded(count), cell.products.column(count)
    _backward_tile(cell, cell.output, part, at, states, gradients, beside)
    if piece > 0:
        wait(p, team, 1, 1)
        slots = shift(gates, cell.slots * U * W - piece)
        cell.products.round_rows(slots, g_m, rows, g_j, piece, g_m // g_j, rounded, p.ld_middle)
        for n in range(q0, q1):
            q, way = turn(n, q0, q1, team)
            into, columns = shift(dh, q * PANEL), _filled(p.P - q * PANEL, W)
            b = factors(cell, p.w_hh, q * panel * PANEL)
            ahead = shift(b, way * panel * PANEL)
            product(p.kernel, rounded, p.ld_middle, b, depth, into, ld, into, ld, rows, columns, ahead)


@inlined
def step_back_with_operand(cell, p, part, at, states, gradients, beside, mid, team):
    """A step back of a cell that has a second product before its equations."""
    (rows, _, _, _, p0, p1, _, _), (_, dm, ld, _) = part, mid
    PANEL, units = VECTORS * lanes_of(dm), cell.vectors * lanes_of(dm)
    _backward_tile(cell, cell.output, part, at, states, gradients, beside)
    wait(p, team, 1, 2)
    start, count = (cell.slots - cell.second) * units, cell.second * units
    for n in range(p0, p1):
        into = shift(dm, n * PANEL)
        _clear(into, ld, rows, PANEL)
        _product_back(cell, p, p.w_mid, at, start, count, n, 1, p.H, into, ld, rows)
    _operand_backward_tile(cell, part, at, states, gradients, beside, dm, ld)
    wait(p, team, 2, 2)
    _recurrent_back(cell, p, part, at, gradients, team)


@inlined
def step_back_with_projection(cell, p, part, at, states, gradients, beside, mid, team):
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
    wait(p, team, 1, 2)
    for n in range(p0, p1):
        into = shift(dm, n * PANEL)
        _clear(into, ld_dm, rows, PANEL)
        b = floats(cell, p.w_mid, n * p.P * PANEL)
        product(p.kernel, z, p.P, b, p.P, into, ld_dm, into, ld_dm, rows, PANEL, shift(b, p.P * PANEL))
    hidden = middle, middle, H, c_prev, c, plane
    inside = dm, dm, ld_dm, dc, dplane, down, down_plane, ld_down
    _backward_tile(cell, -1, part, at, hidden, inside, beside)
    wait(p, team, 2, 2)
    _clear(shift(dh, q0 * PANEL), ld_dh, rows, (q1 - q0) * PANEL)
    _recurrent_back(cell, p, part, at, gradients, team)


@inlined
def step_back_normalised(cell, p, part, at, states, gradients, beside, mid, team):
    """A step back of a cell with normalisation.

    With n = (a - mean) / deviation: da = (dn - mean of dn - n mean of (n dn)) / deviation.
    """
    (rows, H, _, _, _, _, _, _), (gates, g_m, g_j) = part, at
    (dout, dh, _, _, _, _, _, _), (stats, scratch, ld_scratch, _) = gradients, mid
    ld, W, units, count = states[2], lanes_of(gates), cell.vectors * lanes_of(gates), cell.norms + 2
    for m in range(rows):
        mean, scale = element(stats, m * count + count - 2), element(stats, m * count + count - 1)
        total, along = load(dh, 0), load(dh, 0)
        for unit in range(0, H, W):
            left, here = H - unit, shift(gates, m * g_m + unit // units * g_j + unit % units)
            prev, own, given = arguments(cell, m, unit, left, H, states, beside)
            new = states_after(cell, m, unit, left, H, states)
            dnew = _with_output(
                cell.output, _carried(cell, gradients, m, unit, left, H), shift(dout, m * ld + unit), left
            )
            for slot in range(cell.slots):  # of the next row
                prefetch(here, g_m + slot * units)
            normal = (fill_behind((new[cell.late] - mean) * scale, left, 0.0),)
            (one,) = cell.normal_backward(dnew, normal, load_many(here, units, W, cell.slots), prev, new, own, given)
            one = fill_behind(one, left, 0.0)
            total += one
            along += one * normal[0]
        sums = lane_sum(total) / H, lane_sum(along) / H, scale
        for unit in range(0, H, W):
            j, left = unit // units, H - unit
            here = shift(gates, m * g_m + j * g_j + unit % units)
            prev, own, given = arguments(cell, m, unit, left, H, states, beside)
            new = states_after(cell, m, unit, left, H, states)
            dnew = _with_output(
                cell.output, _carried(cell, gradients, m, unit, left, H), shift(dout, m * ld + unit), left
            )
            normal, slots = ((new[cell.late] - mean) * scale,), load_many(here, units, W, cell.slots)
            dslots, dprev, dmine = cell.backward(dnew, sums, normal, slots, prev, new, own, given)
            store_padded(shift(scratch, m * ld_scratch + j * cell.slots * units + unit % units), units, dslots, left)
            _pass_on(gradients, m, unit, left, H, dprev, dmine)
        normalise_back(cell, shift(scratch, m * ld_scratch), shift(gates, m * g_m), g_j, H, shift(stats, m * count))
    _recurrent_back(cell, p, part, at, gradients, team)


@inlined
def _recurrent_back(cell, p, part, at, gradients, team):
    """Add what the gradients of the pre-activations mean for what was fed back."""
    (rows, _, _, _, _, _, q0, q1), (_, dh, ld, _, _, _, _, _) = part, gradients
    W, U = lanes_of(dh), cell.vectors
    total, recurrent, second = cell.slots * U, cell.recurrent * U, cell.second * U
    start, count = (total - recurrent - second) * W, recurrent * W
    for n in range(q0, q1):
        q, way = turn(n, q0, q1, team)
        _product_back(cell, p, p.w_hh, at, start, count, q, way, p.P, shift(dh, q * VECTORS * W), ld, rows)


@inlined
def _product_back(cell, p, weights, at, start, count, q, way, size, into, ld, rows):
    """Add the product of some slots of the tape with panel q of transposed weights, which have `size` columns."""
    (gates, g_m, g_j), W = at, lanes_of(into)
    J, PANEL = g_m // g_j, VECTORS * W
    columns, depth = _filled(size - q * PANEL, W), J * count
    b = floats(cell, weights, q * depth * PANEL)
    # The slots are a piece of every panel of the tape (of none in a cell without a recurrent product), or all of it:
    # then they are taken in parts that the second cache holds.
    step, piece = (g_j, max(1, count)) if count < g_j else (PART, PART)
    for n in range((depth + piece - 1) // piece):
        k = n * piece
        a, here, after = shift(gates, start + n * step), min(piece, depth - k), k + piece
        ahead = shift(b, (after if after < depth else way * depth) * PANEL)
        product(p.kernel, a, g_m, shift(b, k * PANEL), here, into, ld, into, ld, rows, columns, ahead)


@jitable
def _filled(columns, W):
    """So many columns, filled up to whole vectors, of which all have room; more than a panel stands for all of it."""
    return (columns + W - 1) // W * W


@jitable
def _clear(p, ld, rows, columns):
    for m in range(rows):
        for n in range(0, columns, lanes_of(p)):
            store(shift(p, m * ld + n), 0.0, lanes_of(p))


@inlined
def _backward_tile(cell, OUT, part, at, states, gradients, beside):
    """The cell's backward equations on some panels of some rows."""
    (rows, H, j0, j1, _, _, _, _), (gates, g_m, g_j) = part, at
    dout, ld, W = gradients[0], states[2], lanes_of(gates)
    units = cell.vectors * W
    # As the tape lies, row by row; the next row is asked for in time, since a step begins far from the one after it
    for m in range(rows):
        for j in range(j0, j1):
            for unit in range(j * units, (j + 1) * units, W):
                count, here = H - unit, shift(gates, j * g_j + m * g_m + unit - j * units)
                for slot in range(cell.kept):
                    prefetch(here, g_m + slot * units)
                prev, own, given = arguments(cell, m, unit, count, H, states, beside)
                new = states_after(cell, m, unit, count, H, states)
                dnew = _carried(cell, gradients, m, unit, count, H)
                dnew = _with_output(OUT, dnew, shift(dout, m * ld + unit), count)
                dgates, dprev, dmine = cell.backward(dnew, load_many(here, units, W, cell.kept), prev, new, own, given)
                store_padded(here, units, dgates, count)
                _pass_on(gradients, m, unit, count, H, dprev, dmine)


@inlined
def _operand_backward_tile(cell, part, at, states, gradients, beside, dm, ld_dm):
    """What the gradient of the second product's left factor adds, on some panels of some rows."""
    (rows, H, j0, j1, _, _, _, _), (gates, g_m, g_j) = part, at
    W = lanes_of(gates)
    units = cell.vectors * W
    for m in range(rows):
        for j in range(j0, j1):
            for unit in range(j * units, (j + 1) * units, W):
                count, here = H - unit, shift(gates, j * g_j + m * g_m + unit - j * units)
                prev, own, given = arguments(cell, m, unit, count, H, states, beside)
                new = states_after(cell, m, unit, count, H, states)
                carried = _carried(cell, gradients, m, unit, count, H)
                dmid = (load(shift(dm, m * ld_dm + unit), count),)
                slots = load_many(here, units, W, cell.kept)
                dgates, dprev, dmine = cell.operand_backward(dmid, carried, slots, prev, new, own, given)
                store_padded(here, units, dgates, count)
                _pass_on(gradients, m, unit, count, H, dprev, dmine)


@jitable
def _carried(cell, gradients, m, unit, count, H):
    """The gradients of the states after a step, of some hidden units in row m."""
    _, dh, ld, dc, plane, _, _, _ = gradients
    return (load(shift(dh, m * ld + unit), count),) + load_many(shift(dc, m * H + unit), plane, count, cell.inner)


@jitable
def _pass_on(gradients, m, unit, count, H, dprev, dmine):
    """Store those of the states before it in their place, and add to those of own parameters."""
    _, dh, ld, dc, plane, down, down_plane, ld_down = gradients
    store(shift(dh, m * ld + unit), dprev[0], count)
    store_many(shift(dc, m * H + unit), plane, dprev[1:], count)
    accumulate_many(shift(down, m * ld_down + unit), down_plane, dmine)


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
