"""Arrays that begin where a cache line does.

A vector of 64 bytes that lies in two lines takes twice as long to load or store, and a row of a matrix tile four times.
NumPy's own arrays begin 16 bytes behind a line, most of the time.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np

from nbrnn.kernels.calls import address_of
from nbrnn.kernels.jit import jitable, locate

LINE = 64  # bytes
LARGE, HUGE = 8 << 20, 64 << 20  # bytes of arrays whose memory is kept for others


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """`numpy.empty`, at the beginning of a line; large arrays in memory that others have left behind."""
    dtype = np.dtype(dtype)
    count, each = math.prod(shape), dtype.itemsize
    size = count * each + LINE
    raw = np.asarray(_Block(size)).view(dtype) if LARGE <= size <= HUGE else np.empty(size // each, dtype)
    first = -locate(raw) % LINE // each
    return raw[first : first + count].reshape(shape)


def in_turn(*shapes: tuple[int, ...], dtype: Any) -> list[np.ndarray]:
    """Arrays in the same memory, of which one is needed at a time."""
    memory = empty((max(map(math.prod, shapes)),), dtype)
    return [memory[: math.prod(shape)].reshape(shape) for shape in shapes]


class _Block:
    """Memory of an array; when the last array in it is gone, another one of its size may have it.

    The system takes so much memory back at once, and hands out new one page by page, each filled with zeros.
    """

    def __init__(self, size: int):
        self.memory = _take(size)
        self.__array_interface__ = self.memory.__array_interface__

    def __del__(self):
        _spare.append(self.memory)


_spare: deque[np.ndarray] = deque(maxlen=4)


def _take(size: int) -> np.ndarray:
    for _ in range(len(_spare)):
        try:
            memory = _spare.popleft()
        except IndexError:  # another thread was here
            break
        if memory.size == size:
            return memory
        _spare.append(memory)
    return np.empty(size, np.uint8)


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
