"""Random masks: what dropout and zoneout multiply with.

Number n of a mask is 16 bits of a number of splitmix64 (G. L. Steele, D. Lea and C. H. Flood, OOPSLA 2014), a hash of
its place in the sequence: any part can be drawn by itself, so that threads divide the work and the mask stays the same.
"""

from __future__ import annotations

import numpy as np

from nbrnn.kernels.jit import jitable, sharded

GOLDEN, FIRST, SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
BITS, BLOCK = 16, 512


@sharded
def draw(s, shards, seed, least, value, out):
    """out = `value` where a random number of 16 bits is at least `least`, else 0; out: flat.

    Each number of splitmix64 serves one element of every quarter of `out`.
    """
    quarter = (len(out) + 3) // 4
    numbers, bound, one = np.empty(BLOCK, np.uint64), np.uint64(least), out.dtype.type(value)
    zero, stop = out.dtype.type(0), quarter * (s + 1) // shards
    for lo in range(quarter * s // shards, stop, BLOCK):
        count = min(BLOCK, stop - lo)
        for n in range(count):
            numbers[n] = _mix(np.uint64(seed) + (np.uint64(lo + 1) + np.uint64(n)) * GOLDEN)
        for part in range(4):
            first, bits = part * quarter + lo, np.uint64(BITS * part)
            here = out[first : first + count]
            for n in range(len(here)):
                here[n] = one if (numbers[n] >> bits) & np.uint64(0xFFFF) >= bound else zero


@jitable
def _mix(z):
    z = (z ^ (z >> np.uint64(30))) * FIRST
    z = (z ^ (z >> np.uint64(27))) * SECOND
    return z ^ (z >> np.uint64(31))
