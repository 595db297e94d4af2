"""Arrays that begin where a cache line does.

A vector of 64 bytes that lies in two lines takes twice as long to load or store, and a row of a matrix tile four times.
NumPy's own arrays begin 16 bytes behind a line, most of the time.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nbrnn.kernels.calls import address_of
from nbrnn.kernels.jit import jitable

LINE = 64  # bytes


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """`numpy.empty`, at the beginning of a line."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + LINE, np.uint8)
    first = -raw.__array_interface__["data"][0] % LINE
    return raw[first : first + size].view(dtype).reshape(shape)


def zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """`numpy.zeros`, at the beginning of a line."""
    array = empty(shape, dtype)
    array.fill(0)
    return array


@jitable
def aligned(size, kind):
    """The same in compiled code: a vector of the kind of an array."""
    flat = np.empty(size + LINE, kind.dtype)
    first = -address_of(flat) % LINE // flat.itemsize
    return flat[first : first + size]
