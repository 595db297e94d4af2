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
    given   [., N, H]         numbers that equations take beside them, such as masks; [., B, H]: of all steps;
                              [., 1, H]: of all rows, too
    fixed   [., N, H]         what equations compute from own and given numbers alone, laid out like given
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

A scan is called with integers alone, a `Forward` or a `Backward`: numbers, and the addresses of the arrays. The steps
are in `scan_forward` and `scan_backward`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from nbrnn.kernels.constants import Constants
from nbrnn.kernels.jit import Kernel, jitable
from nbrnn.kernels.products import Products
from nbrnn.kernels.scan_backward import (
    scan_backward,
    step_back_narrow,
    step_back_normalised,
    step_back_plain,
    step_back_with_operand,
    step_back_with_projection,
)
from nbrnn.kernels.scan_forward import (
    scan_forward,
    step_narrow,
    step_normalised,
    step_plain,
    step_with_operand,
    step_with_projection,
)
from nbrnn.kernels.scan_shared import left_rounded, left_whole
from nbrnn.kernels.simd import accumulate_many, lanes_of, load, load_many, pointer, store_many, width
from nbrnn.kernels.tiles import VECTORS


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
    own, given, fixed : int
        Numbers a unit that equations take from parameters, from arrays beside x, and computed once from those.
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
    fixed: int
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
    fix : callable or None
        ``fix(own, given)``: the numbers that the other equations find behind the given ones.
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
    fix: Callable | None = None

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
        return left_rounded if self.products.narrow else left_whole

    @property
    def step(self) -> Callable:
        if self.finish:
            return step_normalised
        if self.products.narrow:
            return step_narrow
        return step_with_operand if self.operand else step_with_projection if self.project else step_plain

    @property
    def step_back(self) -> Callable:
        if self.finish:
            return step_back_normalised
        if self.products.narrow:
            return step_back_narrow
        if self.operand:
            return step_back_with_operand
        return step_back_with_projection if self.project else step_back_plain


@cache
def compile_scan(cell: Equations) -> tuple[Kernel, Kernel]:
    """The kernels of the forward and the backward scan of a cell; their argument is a `Forward` or a `Backward`."""
    ahead = Kernel(scan_forward, f"forward_scan-{cell.name}", cell)
    return ahead, Kernel(scan_backward, f"backward_scan-{cell.name}", cell)


@cache
def compile_front(cell: Equations) -> tuple[Kernel, Kernel]:
    """The kernels that compute the first states of the scan from the others, at the beginning of a sequence, and back.

    Their arguments: states [., B, H], own [., J U W], mask [., B, H], the states to compute [., B, H]; and the
    gradients of those, states, own, mask, the gradients to compute [., B, H], and to add to, down [., B, J U W].
    """
    return Kernel(_front, f"front-{cell.name}", cell), Kernel(_front_back, f"front_back-{cell.name}", cell)


@cache
def compile_fix(cell: Equations) -> Kernel:
    """The kernel that computes the fixed numbers [., R, H] from own [., J U W] and given ones [., R, H]."""
    return Kernel(_fix, f"fix-{cell.name}", cell)


@jitable
def _fix(shard, shards, cell, own, given, out):
    _, R, H = out.shape
    W, plane = lanes_of(pointer(out, 0)), R * H
    for m in range(R * shard // shards, R * (shard + 1) // shards):
        for unit in range(0, H, W):
            at, count = m * H + unit, H - unit
            mine = load_many(pointer(own, unit), own.shape[1], W, cell.own)
            beside = load_many(pointer(given, at), plane, count, cell.given)
            store_many(pointer(out, at), plane, cell.fix(mine, beside), count)


@jitable
def _front(shard, shards, cell, states, own, mask, out):
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
def _front_back(shard, shards, cell, d, states, own, mask, dstates, down):
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
