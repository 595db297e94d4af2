"""Gradient clipping: a limit on the norm of all gradients together, or on each element."""

from __future__ import annotations

import math

import numpy as np

from nbrnn.kernels.jit import Stages, sharded, stage
from nbrnn.kernels.rows import add_up
from nbrnn.kernels.simd import lane_sum, lanes_of, load, pointer, squares

BLOCK = 1 << 14  # elements that are summed in one chain, whatever the number of threads


class Norm:
    """The Euclidean norm of a vector, as often as one likes: in float64 and in one pass, prepared once.

    Parameters
    ----------
    flat : ndarray of float32 or float64, shape (N,)
        All gradients together, contiguous.
    """

    def __init__(self, flat: np.ndarray):
        sums = np.empty(-(-flat.size // BLOCK))
        self.flat, self._total = flat, np.empty(1)
        self._stages = Stages(
            stage(_sum_blocks, flat.size // (4 * BLOCK), flat, sums), stage(add_up, 1, sums, self._total)
        )

    def __call__(self) -> float:
        """The same bits on any number of threads. NaN or infinite where an element is; else finite, unless the norm
        itself is beyond float64."""
        self._stages.run()
        norm = math.sqrt(self._total[0])
        if math.isfinite(norm) or not np.isfinite(self.flat).all():
            return norm
        # The squares of huge doubles overflow where their norm need not.
        largest = float(np.abs(self.flat).max())
        return largest * global_norm(self.flat / largest)


def global_norm(flat: np.ndarray) -> float:
    """The norm of a vector, once; see `Norm`."""
    return Norm(flat)()


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
