"""The embedding layer: a row of a table for every token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nbrnn.kernels import gemm
from nbrnn.kernels.jit import run
from nbrnn.kernels.schedule import shards_for
from nbrnn.layers.initialise import Seed, generator
from nbrnn.layers.module import Parameters, Pointwise, check_dtype, check_floats, check_size, check_tokens


class Embedding(Pointwise):
    """y = weight[x].

    Parameters
    ----------
    num_embeddings : int
        Number of tokens.
    embedding_dim : int
        Size of a token's vector.
    dtype : {"float32", "float64"}
    seed : int, numpy.random.Generator or None

    Attributes
    ----------
    params : Parameters
        ``weight`` (num_embeddings, embedding_dim), at first standard normal.

    Notes
    -----
    x holds integers in [0, num_embeddings), of any shape, or a `Ragged` of them; y is (*x.shape,
    embedding_dim). The state is None, and so is
    the gradient with respect to x.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, dtype: Any = "float32", seed: Seed = None):
        self.num_embeddings = check_size("num_embeddings", num_embeddings)
        self.embedding_dim = check_size("embedding_dim", embedding_dim)
        self.dtype = check_dtype(dtype)
        shape = (self.num_embeddings, self.embedding_dim)
        self.params = Parameters.zeros({"weight": shape}, self.dtype)
        self.params["weight"][...] = generator(seed).standard_normal(shape)

    def _check(self, x: Any) -> np.ndarray:
        return check_tokens("x", x, (None,) * np.ndim(x), "any shape", self.num_embeddings)

    def _apply(self, x: Any) -> np.ndarray:
        return self.params["weight"][self._check(x)]

    def _linearise(self, x: Any) -> tuple[np.ndarray, Callable]:
        x = self._check(x)
        y = self.params["weight"][x]

        def back(dy, grads):
            dy = check_floats("dy", dy, self.dtype, y.shape).reshape(-1, self.embedding_dim)
            run(gemm.sum_rows, shards_for(grads["weight"].size), dy, x.reshape(-1), grads["weight"])

        return y, back

    def config(self) -> dict[str, Any]:
        names = ("num_embeddings", "embedding_dim")
        return {name: getattr(self, name) for name in names} | {"dtype": self.dtype.name}
