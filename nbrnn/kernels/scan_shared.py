"""What the scan's ways forward and back share: where numbers lie, and how the work is divided; see `scan`."""

from __future__ import annotations

import numpy as np

from nbrnn.kernels import amx
from nbrnn.kernels.barrier import join, meet
from nbrnn.kernels.jit import jitable
from nbrnn.kernels.simd import element, lanes_of, load, load_many, pointer_to, shift

# A time step takes as long as so many rows more: tiles of few rows are slow.
STEP_ROWS = 3


@jitable
def floats(cell, address, offset):
    """A pointer to the numbers of an array, from one of them on."""
    return pointer_to(cell.number, address, offset)


@jitable
def integers(address):
    return pointer_to(np.int64(0), address, 0)


@jitable
def factors(cell, address, offset):
    """A pointer to the factors of an array, from one of them on."""
    return pointer_to(cell.products.number, address, offset)


@jitable
def left_whole(cell, p, row, once, shard):
    """The left factor of the second product, of some rows."""
    return floats(cell, p.middle, row * p.ld_middle)


@jitable
def left_rounded(cell, p, row, once, shard):
    """Scratch for the rounded rows of a step: a shard's own rows, or all of them where it has some units of each."""
    return factors(cell, p.middle, (shard * (p.B + amx.BEHIND) if p.by_units else once) * p.ld_middle)


@jitable
def share_of(count, shard, shards):
    """The part of `count` things that one shard takes."""
    return count * shard // shards, count * (shard + 1) // shards


@jitable
def rows_of(p, shard, shards):
    """The rows that one shard takes, so that all of them take about as long."""
    lengths, total = integers(p.lengths), element(integers(p.starts), p.T)
    if total == p.T * p.B:
        return share_of(p.B, shard, shards)
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
def team_of(p, shard, shards):
    """Which shard the caller is, of how many that work together, 0 where nothing is left to do; see `barrier.join`."""
    if p.by_units:
        shards = join(integers(p.counters), shards)
        shard = shard if shards > 1 else 0
    return shard, shards


@jitable
def wait(p, team, n, meetings):
    """The n-th of a step's meetings of all shards, where they divide the hidden units."""
    shards, step, _ = team
    if shards > 1:
        meet(integers(p.counters), shards * (step * meetings + n))


@jitable
def turn(n, first, stop, team):
    """The n-th panel of a step, and which way the next one lies: every second step goes from the last panel to the
    first, so that weights which are larger than a core's cache are found there in part."""
    _, _, step = team
    return (first + stop - 1 - n, -1) if step & 1 else (n, 1)


@jitable
def count_panels(count, width):
    return (count + width - 1) // width


@jitable
def beside_of(cell, p, here, once, plane):
    """The own, the given and the fixed numbers of some rows, with the strides of one kind of them, and of a row."""
    ld = p.H if p.given_rows > 1 else 0
    at = (here if p.step_given else once) * ld
    return floats(cell, p.own, 0), plane, floats(cell, p.given, at), floats(cell, p.fixed, at), p.given_rows * p.H, ld


@jitable
def states_of(cell, p, before, after, once, keep):
    """Where the states of some rows lie before and after a step, with the strides of a row of h and of one inner state;
    once: in arrays that do not hold what was kept."""
    c_before, c_after = (before, after) if keep and cell.looks_back else (once, once)
    h_before, h_after = floats(cell, p.y, before * p.ld + p.column), floats(cell, p.y, after * p.ld + p.column)
    inner = floats(cell, p.inner, c_before * p.H), floats(cell, p.inner, c_after * p.H)
    return h_before, h_after, p.ld, inner[0], inner[1], p.inner_rows * p.H


@jitable
def arguments(cell, m, unit, count, H, states, beside):
    """The states before, the own, and the given and fixed numbers of some hidden units in row m."""
    (h_prev, _, ld, c_prev, _, plane), (own, own_plane, given, fixed, given_plane, ld_given) = states, beside
    W, at = lanes_of(h_prev), m * H + unit
    prev = (load(shift(h_prev, m * ld + unit), count),) + load_many(shift(c_prev, at), plane, count, cell.inner)
    mine, here = load_many(shift(own, unit), own_plane, W, cell.own), m * ld_given + unit
    numbers = load_many(shift(given, here), given_plane, count, cell.given)
    return prev, mine, numbers + load_many(shift(fixed, here), given_plane, count, cell.fixed)


@jitable
def states_after(cell, m, unit, count, H, states):
    """The states after the step of some hidden units in row m."""
    _, h, ld, _, c, plane = states
    return (load(shift(h, m * ld + unit), count),) + load_many(shift(c, m * H + unit), plane, count, cell.inner)
