"""The most FMAs that nbrnn's own tile does on this machine: the ceiling for the shares that are reported.

Every shard repeats one small product on its own rows, with all data in its core's nearest cache, inside a single
parallel region: no memory, no packing, no waiting.
"""

from __future__ import annotations

import numpy as np

from nbrnn.kernels.gemm import multiply
from nbrnn.kernels.jit import run, sharded
from nbrnn.kernels.tiles import VECTORS, panel_width, product_kernel

ROWS, DEPTH = 24, 64  # with a panel's 64 columns of float32: 28 KiB, which the smallest of nearest caches holds
TIMES = 500  # half a millisecond: long beside the entry of a parallel region, short beside what else a machine does


@sharded
def repeat(s, shards, times, kernel, a, packed, start, out):
    """The same product over and over."""
    depth = a.shape[1]
    for _ in range(times):
        multiply(s, shards, kernel, a, 0, 0, depth, packed, start, out)


def peak_call(dtype, threads):
    """A call that does `peak_operations` operations."""
    P, kernel = panel_width(VECTORS, dtype), product_kernel(VECTORS, dtype)
    a, packed, start = aligned((ROWS * threads, DEPTH), dtype), aligned((1, DEPTH, P), dtype), aligned((P,), dtype)
    out = aligned((ROWS * threads, P), dtype)
    return lambda: run(repeat, threads, TIMES, kernel, a, packed, start, out)


def peak_operations(dtype, threads):
    """Floating-point operations of a `peak_call`."""
    return 2 * TIMES * ROWS * threads * DEPTH * panel_width(VECTORS, dtype)


def aligned(shape, dtype):
    """Zeros whose first element begins a line of the cache: no load crosses two, and no two shards share one."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.zeros(size + 64, np.uint8)
    first = -room.ctypes.data % 64
    return room[first : first + size].view(dtype).reshape(shape)
