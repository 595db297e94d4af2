"""Dropout: a random part of the values is zero in training, the rest is scaled up so that the mean stays.

N. Srivastava et al., Dropout: A Simple Way to Prevent Neural Networks from Overfitting, JMLR 15 (2014).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from nbrnn.kernels import masks
from nbrnn.kernels.jit import run
from nbrnn.kernels.schedule import shards_for
from nbrnn.layers.initialise import Seed, generator
from nbrnn.layers.module import Parameters, Pointwise, check_dtype, check_floats, check_fraction


def draw(rng: np.random.Generator, p: float, out: np.ndarray, value: float = 1.0) -> np.ndarray:
    """Fill an array with zeros, at random with probability p (to 16 bits), and with a value elsewhere."""
    seed = int(rng.integers(2**63))
    run(masks.draw, shards_for(10 * out.size), seed, round(p * 65536), float(value), out.reshape(-1))
    return out


def draw_mask(rng: np.random.Generator, shape: tuple[int, ...], p: float, dtype: np.dtype) -> np.ndarray:
    """An array that is 0 with probability p and 1 / (1 - p) otherwise."""
    return draw(rng, p, np.empty(shape, dtype), 1.0 / (1.0 - p))


class Dropout(Pointwise):
    """Zeros in training (`vjp`), nothing at inference.

    Parameters
    ----------
    p : float
        Fraction of zeros, in [0, 1).
    dtype : {"float32", "float64"}
    seed : int, numpy.random.Generator or None
        Where the masks come from.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong type or out of range.
    """

    def __init__(self, p: float = 0.5, *, dtype: Any = "float32", seed: Seed = None):
        self.p = check_fraction("p", p)
        self.dtype = check_dtype(dtype)
        self.rng = generator(seed)
        self.params = Parameters.zeros({}, self.dtype)
        self._make()

    _fresh = ("_lock",)

    def _make(self) -> None:
        self._lock = threading.Lock()

    def _check(self, name: str, x: Any) -> np.ndarray:
        return check_floats(name, x, self.dtype, (None,) * np.ndim(x), "any shape")

    def _apply(self, x: Any) -> np.ndarray:
        return self._check("x", x).copy()

    def _linearise(self, x: Any) -> tuple[np.ndarray, Callable]:
        x = self._check("x", x)
        with self._lock:
            mask = draw_mask(self.rng, x.shape, self.p, self.dtype)
        return x * mask, lambda dy, grads: check_floats("dy", dy, self.dtype, x.shape, str(x.shape)) * mask

    def config(self) -> dict[str, Any]:
        return {"p": self.p, "dtype": self.dtype.name}

    def generators(self) -> list[np.random.Generator]:
        return [self.rng]
