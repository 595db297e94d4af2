"""A barrier inside a parallel region, for work that is divided by hidden units and must meet after every time step.

OpenMP, TBB and workqueue promise no more than that every chunk of a parallel loop runs some time, perhaps one after the
other on one thread, where a barrier would never open. So the chunks first `join`: either all of them are running at
the same time and go on as a team, or the first to lose patience does the whole work alone and the others leave.
"""

from __future__ import annotations

import sys

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from nbrnn.kernels.jit import jitable
from nbrnn.kernels.memory import zeros
from nbrnn.kernels.simd import IS_X86

# One cache line for each of the counters: arrivals, decision, steps.
LINE = 8
TOGETHER, ALONE = 1, 2
SPINS, YIELDS = 2000, 200

_yield = types.ExternalFunction("SwitchToThread" if sys.platform == "win32" else "sched_yield", types.int32())


def new_counters(regions: int) -> np.ndarray:
    """The counters of some regions, one row for each: int64 zeros."""
    return zeros((regions, 3 * LINE), np.int64)


@intrinsic
def _add(typingctx, p, index, value):
    """Atomically add and return the sum."""

    def codegen(context, builder, sig, args):
        at = builder.gep(args[0], [args[1]])
        return builder.add(builder.atomic_rmw("add", at, args[2], "acq_rel"), args[2])

    return types.int64(p, types.intp, types.int64), codegen


@intrinsic
def _read(typingctx, p, index):
    def codegen(context, builder, sig, args):
        return builder.load_atomic(builder.gep(args[0], [args[1]]), "acquire", 8)

    return types.int64(p, types.intp), codegen


@intrinsic
def _decide(typingctx, p, index, value):
    """Atomically set an element that is 0; whether this call did it."""

    def codegen(context, builder, sig, args):
        at = builder.gep(args[0], [args[1]])
        result = builder.cmpxchg(at, ir.IntType(64)(0), args[2], "acq_rel", "acquire")
        return builder.zext(builder.extract_value(result, 1), ir.IntType(64))

    return types.int64(p, types.intp, types.int64), codegen


@intrinsic
def _pause(typingctx):
    """Tell the core that this is a spin loop."""

    def codegen(context, builder, sig, args):
        if IS_X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@jitable
def join(counters, shards):
    """How large the caller's team is: `shards` (all are here), 1 (do everything alone) or 0 (nothing left to do)."""
    if _add(counters, 0, 1) == shards:
        _decide(counters, LINE, TOGETHER)
    spins = 0
    while _read(counters, LINE) == 0:
        _pause()
        spins += 1
        if spins > SPINS:
            _yield()
        if spins > SPINS + YIELDS and _decide(counters, LINE, ALONE):
            return 1
    if _read(counters, LINE) == TOGETHER:
        return shards
    return 0


@jitable
def meet(counters, goal):
    """Wait until `goal` arrivals have been counted in all, this one among them."""
    _add(counters, 2 * LINE, 1)
    spins = 0
    while _read(counters, 2 * LINE) < goal:
        _pause()
        spins += 1
        if spins > SPINS:
            _yield()
