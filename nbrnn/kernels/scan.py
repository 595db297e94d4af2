"""The time loop, forward and back, specialised on a cell.

For every step and every panel of hidden units: the recurrent product into a tile of pre-activations, then the cell's
equations on that tile while it is in the nearest cache. Backward is the mirror image: the equations turn what was kept
into the gradients of the pre-activations, and a product with the transposed weights carries them one step back.

Memory, for one layer and direction (D directions share y, one beside the other):

    x       [T, B, I], or [T, B] tokens, whose one-hot rows are a gather
    y       [T + 2, B, D H]   output t is y[t + 1]; y[0] and y[T + 1] are the first h of the two directions, so that
                              h of the step before is always one row of y away
    inner   [N, T + 2, B, H]  the states behind h, laid out alike; [N, 1, B, H], overwritten by every step, where
                              nothing is kept
    gates   [T, B, J, S U W]  the tape: J panels of U vectors of W units, S slots a unit, slot by slot. Forward leaves
                              what it kept, backward turns it into the gradients of the pre-activations.
            [B, S U W]        where nothing is kept, the scratch tile that all panels share; or [block, B, J, S U W]

Schedules: the shards divide the rows of the batch and run the whole loop without waiting for each other, or they divide
the hidden units and meet after every step (`barrier`). Either way each number is computed by the same operations in the
same order.

With few rows in a step the input product of several steps, `block`, is done at once: tiles of one row are slow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba

from nbrnn.kernels.barrier import join, meet
from nbrnn.kernels.jit import compiled, jitable, stamp_of
from nbrnn.kernels.simd import lanes_of, load, load_many, pointer, shift, store, store_many, store_padded, width
from nbrnn.kernels.tiles import VECTORS, product


@dataclass(frozen=True)
class Layout:
    """How the pre-activations of a cell lie in a panel.

    Parameters
    ----------
    slots : int
        Pre-activations of one hidden unit (S).
    inputs, recurrent : int
        The input product fills so many of the first slots, the recurrent product so many of the last.
    states : int
        Number of states, h among them.
    """

    slots: int
    inputs: int
    recurrent: int
    states: int

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
        """Pre-activations in a panel (S U W)."""
        return self.slots * self.units(dtype)


@cache
def compile_scan(name: str, layout: Layout, forward: Callable, backward: Callable) -> tuple[Callable, Callable]:
    """The entries of the forward and the backward scan of a cell; arguments as in `_forward` and `_backward`."""
    S, U, N = layout.slots, layout.vectors, layout.states - 1
    IN, REC = layout.inputs * U, layout.recurrent * U

    def forward_scan(shards, *args):
        if shards == 1:
            _forward(0, 1, forward, S, U, IN, REC, N, args)
        else:
            for s in numba.prange(shards):
                _forward(s, shards, forward, S, U, IN, REC, N, args)

    def backward_scan(shards, *args):
        if shards == 1:
            _backward(0, 1, backward, S, U, REC, N, args)
        else:
            for s in numba.prange(shards):
                _backward(s, shards, backward, S, U, REC, N, args)

    tag = f"{name}-{stamp_of(forward, backward)}"
    return compiled(forward_scan, tag=tag, parallel=True), compiled(backward_scan, tag=tag, parallel=True)


# ------------------------------------------------------------------ forward


@jitable
def _forward(shard, shards, equations, S, U, IN, REC, N, args):
    """One shard of the forward scan.

    S, U: see `Layout`; IN, REC: vectors of the input and of the recurrent product; N: states behind h; first: this
    direction's first column of y; w_ih: [J, I, IN W]; bias: [J S U W]; w_hh: [J, H, REC W]; gates: flat.
    """
    kernel_ih, kernel_hh, by_units, block, keep, reverse, first, x, w_ih, bias, w_hh, y, inner, gates, counters = args
    T, B = x.shape[0], x.shape[1]
    J, H = w_hh.shape[0], w_hh.shape[1]
    W, ld = lanes_of(pointer(y, 0)), y.shape[2]
    PANEL = S * U * W
    lo, hi, j0, j1 = 0, B, 0, J
    if by_units:
        shards = join(counters, shards)
        if shards == 0:
            return
        shard = shard if shards > 1 else 0
        j0, j1 = J * shard // shards, J * (shard + 1) // shards
    else:
        lo, hi = B * shard // shards, B * (shard + 1) // shards
    # Strides of the pre-activations: one time step, one row, one panel
    g_t, g_m, g_j = B * J * PANEL, J * PANEL, PANEL
    if not keep and block == 1:
        g_t, g_m, g_j = 0, PANEL, 0
    c_t, plane = B * H if keep else 0, inner.shape[1] * B * H
    for s0 in range(0, T, block):
        s1 = min(s0 + block, T)
        t0 = T - s1 if reverse else s0
        origin = 0 if keep else t0
        if block > 1:
            for j in range(j0, j1):
                g = pointer(gates, (t0 - origin) * g_t + j * g_j)
                _input(kernel_ih, S, U, IN, x, t0 * B, (s1 - s0) * B, w_ih, bias, j, g, g_m)
        for step in range(s0, s1):
            t = T - 1 - step if reverse else step
            before, after = t + 2 * reverse, t + 1
            h_prev, h = pointer(y, (before * B + lo) * ld + first), pointer(y, (after * B + lo) * ld + first)
            for j in range(j0, j1):
                g = pointer(gates, (t - origin) * g_t + lo * g_m + j * g_j)
                if block == 1:
                    _input(kernel_ih, S, U, IN, x, t * B + lo, hi - lo, w_ih, bias, j, g, g_m)
                r = shift(g, PANEL - REC * W)
                product(kernel_hh, h_prev, ld, pointer(w_hh, j * H * REC * W), H, r, g_m, r, g_m, hi - lo, REC * W)
                c_prev, c = pointer(inner, before * c_t + lo * H), pointer(inner, after * c_t + lo * H)
                _forward_tile(equations, S, U, N, j, hi - lo, H, g, g_m, h_prev, h, ld, c_prev, c, plane, keep)
            if by_units and shards > 1:
                meet(counters, shards * (step + 1))


@jitable
def _input(kernel, S, U, IN, x, row, rows, w_ih, bias, j, g, g_m):
    """Set a panel's pre-activations to the bias plus the input product, for consecutive rows of x from `row` on."""
    I, W = w_ih.shape[1], lanes_of(g)
    PANEL = S * U * W
    if x.ndim == 2:
        for m in range(rows):
            token = x[(row + m) // x.shape[1], (row + m) % x.shape[1]]
            for c in range(0, IN * W, W):
                w = load(pointer(w_ih, (j * I + token) * IN * W + c), W)
                store(shift(g, m * g_m + c), load(pointer(bias, j * PANEL + c), W) + w, W)
    else:
        a, b = pointer(x, row * I), pointer(w_ih, j * I * IN * W)
        product(kernel, a, I, b, I, pointer(bias, j * PANEL), 0, g, g_m, rows, IN * W)
    for m in range(rows):
        for c in range(IN * W, PANEL, W):
            store(shift(g, m * g_m + c), load(pointer(bias, j * PANEL + c), W), W)


@jitable
def _forward_tile(equations, S, U, N, j, rows, H, g, g_m, h_prev, h, ld, c_prev, c, plane, keep):
    """The cell's equations on one panel of some rows."""
    W = lanes_of(g)
    for m in range(rows):
        for unit in range(j * U * W, (j + 1) * U * W, W):
            count, at = H - unit, shift(g, m * g_m + unit - j * U * W)
            y_at, c_at = m * ld + unit, m * H + unit
            prev = (load(shift(h_prev, y_at), count),) + load_many(shift(c_prev, c_at), plane, count, N)
            new, kept = equations(load_many(at, U * W, W, S), prev)
            store(shift(h, y_at), new[0], count)
            store_many(shift(c, c_at), plane, new[1:], count)
            if keep:
                store_many(at, U * W, kept, W)


# ------------------------------------------------------------------ backward


@jitable
def _backward(shard, shards, equations, S, U, REC, N, args):
    """One shard of the backward scan: turns the tape into the gradients of the pre-activations.

    dy: [T, B, D H]; w_hh_t: [Q, K, P], the transposed recurrent weights in panels of P hidden units, K in the order of
    the tape; dh: [B, Q P] and dinner: [N, B, H] hold the gradients of the last state, and of the first one afterwards.
    """
    kernel, by_units, reverse, first, dy, w_hh_t, y, inner, gates, dh, dinner, counters = args
    T, B, ld = dy.shape
    H = inner.shape[3]
    Q, K, P = w_hh_t.shape
    W = lanes_of(pointer(y, 0))
    PANEL = S * U * W
    g_m = gates.size // (T * B)
    J = g_m // PANEL
    # The recurrent slots of all panels lie side by side, or in a piece of every panel
    pieces = 1 if REC == S * U else J
    lo, hi, q0, q1 = 0, B, 0, Q
    if by_units:
        shards = join(counters, shards)
        if shards == 0:
            return
        shard = shard if shards > 1 else 0
        q0, q1 = Q * shard // shards, Q * (shard + 1) // shards
    else:
        lo, hi = B * shard // shards, B * (shard + 1) // shards
    for step in range(T - 1, -1, -1):
        t = T - 1 - step if reverse else step
        before, after = (t + 2 * reverse) * B + lo, (t + 1) * B + lo
        for j in range(q0 * P // (U * W), min(J, q1 * P // (U * W))):
            g = pointer(gates, (t * B + lo) * g_m + j * PANEL)
            h_prev, h = pointer(y, before * ld + first), pointer(y, after * ld + first)
            c_prev, c, plane = pointer(inner, before * H), pointer(inner, after * H), (T + 2) * B * H
            dout = pointer(dy, (t * B + lo) * ld + first)
            _backward_tile(equations, S, U, N, j, hi - lo, H, g, g_m, h_prev, h, dout, ld, c_prev, c, plane,
                           pointer(dh, lo * Q * P), Q * P, pointer(dinner, lo * H), B * H)  # fmt: skip
        if by_units and shards > 1:
            # One meeting a step is enough: dh of a unit is read and written by its own shard alone
            meet(counters, shards * (T - step))
        for q in range(q0, q1):
            d = pointer(dh, lo * Q * P + q * P)
            for n in range(pieces):
                a = pointer(gates, (t * B + lo) * g_m + n * PANEL + PANEL - REC * W)
                b = pointer(w_hh_t, (q * K + n * (K // pieces)) * P)
                product(kernel, a, g_m, b, K // pieces, d, Q * P, d, Q * P, hi - lo, P)


@jitable
def _backward_tile(equations, S, U, N, j, rows, H, g, g_m, h_prev, h, dout, ld, c_prev, c, plane, dh, ld_dh, dc,
                   dplane):  # fmt: skip
    """The cell's backward equations on one panel of some rows."""
    W = lanes_of(g)
    for m in range(rows):
        for unit in range(j * U * W, (j + 1) * U * W, W):
            count, at = H - unit, shift(g, m * g_m + unit - j * U * W)
            y_at, c_at, dh_at, dc_at = m * ld + unit, m * H + unit, shift(dh, m * ld_dh + unit), shift(dc, m * H + unit)
            prev = (load(shift(h_prev, y_at), count),) + load_many(shift(c_prev, c_at), plane, count, N)
            new = (load(shift(h, y_at), count),) + load_many(shift(c, c_at), plane, count, N)
            dnew = (load(dh_at, count) + load(shift(dout, y_at), count),) + load_many(dc_at, dplane, count, N)
            dgates, dprev = equations(dnew, load_many(at, U * W, W, S), prev, new)
            store_padded(at, U * W, dgates, count)
            store(dh_at, dprev[0], count)
            store_many(dc_at, dplane, dprev[1:], count)
