"""Gradient clipping: a limit on the norm of all gradients together, or on each element."""

from __future__ import annotations

import math

import numpy as np

from nbrnn.kernels.jit import Prepared, Stage, prepare, sharded, stage
from nbrnn.kernels.rows import add_up
from nbrnn.kernels.simd import lane_sum, lanes_of, load, pointer, squares

BLOCK = 1 << 14  # elements that are summed in one chain, whatever the number of threads


class Norm:
    """The Euclidean norm of a vector, prepared for the next call with the same one; see `global_norm`."""

    def __init__(self) -> None:
        self._total = np.empty(1)
        self._prepared: Prepared | None = None

    def __call__(self, flat: np.ndarray) -> float:
        self._prepared = prepare(self._prepared, (flat,), (), (), self._stages, flat)
        self._prepared.stages.run()
        norm = math.sqrt(self._total[0])
        if math.isfinite(norm) or not np.isfinite(flat).all():
            return norm
        # The squares of huge doubles overflow where their norm need not.
        largest = float(np.abs(flat).max())
        return largest * global_norm(flat / largest)

    def _stages(self, flat: np.ndarray) -> list[Stage]:
        sums = np.empty(-(-flat.size // BLOCK))
        summing = stage(_sum_blocks, flat.size // (4 * BLOCK), flat, sums)
        return [summing, stage(add_up, 1, sums, self._total)]


def global_norm(flat: np.ndarray) -> float:
    """The Euclidean norm of a vector, computed in float64 in one pass.

    Parameters
    ----------
    flat : ndarray of float32 or float64, shape (N,)
        All gradients together, contiguous.

    Returns
    -------
    float
        The same bits on any number of threads. NaN or infinite where an element is; else finite, unless the norm
        itself is beyond float64.
    """
    return Norm()(flat)


@sharded
def _sum_blocks(s, shards, flat, sums):
    """sums[b] = the sum of the squares of block b of flat."""
    N, blocks = len(flat), len(sums)
    W = lanes_of(pointer(flat, 0))
    for b in range(blocks * s // shards, blocks * (s + 1) // shards):
        start, stop = b * BLOCK, min(N, (b + 1) * BLOCK)
        total = squares(load(pointer(flat, start), stop - start))
        for i in range(start + W, stop, W):
            total += squares(load(pointer(flat, i), stop - i))
        sums[b] = lane_sum(total)


def clip_by_value(flat: np.ndarray, limit: float) -> None:
    """Limit every element of a vector to [-limit, limit], in place; NaN stays NaN."""
    np.clip(flat, -limit, limit, out=flat)
