"""First values of parameters.

torch        every parameter of a recurrent layer uniform in +-1/sqrt(H), of a linear layer in +-1/sqrt(I)
glorot       weights uniform in +-sqrt(6 / (fan in + fan out)), biases zero (X. Glorot and Y. Bengio, 2010)
orthogonal   recurrent weights orthogonal for each gate (A. Saxe, J. McClelland and S. Ganguli, 2014), the rest as
             with glorot
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nbrnn.layers.module import Parameters

SCHEMES = ("torch", "glorot", "orthogonal")
Seed = Any  # None, an integer or a numpy.random.Generator


def generator(seed: Seed) -> np.random.Generator:
    """The random generator that a seed stands for; a Generator stands for itself."""
    if isinstance(seed, np.random.Generator):
        return seed
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0):
        raise TypeError(f"seed: expected None, an integer from 0 on or a numpy.random.Generator, got {seed!r}")
    return np.random.default_rng(seed)


def check_scheme(init: str) -> str:
    if init not in SCHEMES:
        raise ValueError(f"init: expected one of {', '.join(SCHEMES)}, got {init!r}")
    return init


def fill(params: Parameters, scheme: str, rng: np.random.Generator, bound: float) -> None:
    """Set all parameters, in their order; `bound` is the bound of the torch scheme."""
    for name, view in params.items():
        if scheme == "torch":
            view[...] = rng.uniform(-bound, bound, view.shape)
        elif view.ndim == 1:
            view[...] = 0.0
        elif scheme == "orthogonal" and name.startswith("weight_hh"):
            view[...] = _orthogonal(rng, view.shape)
        else:
            limit = np.sqrt(6.0 / sum(view.shape))
            view[...] = rng.uniform(-limit, limit, view.shape)


def _orthogonal(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """An orthogonal [H, H] block for each gate of [G H, H]."""
    rows, H = shape
    blocks = []
    for _ in range(rows // H):
        q, r = np.linalg.qr(rng.standard_normal((H, H)))
        # The signs make the distribution uniform over all orthogonal matrices.
        blocks.append(q * np.sign(np.diag(r)))
    return np.concatenate(blocks)
