"""The activation functions that a cell may be given: the set of ONNX, with its alpha and beta.

The slope is a function of the result, so that backward needs no more than what forward gave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nbrnn.cells.equations import Number, clip, exp, relu, sigmoid, softplus, tanh, where_less


def _abs(x: Number) -> Number:
    return where_less(x, 0.0, -x, x)


# name: (function, slope from the result, alpha, beta), the last two by default
_KINDS: dict[str, tuple[Callable, Callable, float, float]] = {
    "sigmoid": (lambda x, a, b: sigmoid(x), lambda y, a, b: y * (1.0 - y), 0.0, 0.0),
    "tanh": (lambda x, a, b: tanh(x), lambda y, a, b: 1.0 - y * y, 0.0, 0.0),
    "linear": (lambda x, a, b: x, lambda y, a, b: 1.0, 0.0, 0.0),
    "affine": (lambda x, a, b: x * a + b, lambda y, a, b: a, 1.0, 0.0),
    # 0 times y, so that a NaN is not hidden
    "relu": (lambda x, a, b: relu(x), lambda y, a, b: where_less(0.0, y, 1.0, y * 0.0), 0.0, 0.0),
    "leaky_relu": (
        lambda x, a, b: where_less(x, 0.0, x * a, x), lambda y, a, b: where_less(y, 0.0, a, 1.0), 0.01, 0.0
    ),
    "thresholded_relu": (
        lambda x, a, b: where_less(a, x, x, x * 0.0), lambda y, a, b: where_less(0.0, y * y, 1.0, y * 0.0), 1.0, 0.0
    ),
    "scaled_tanh": (lambda x, a, b: tanh(x * b) * a, lambda y, a, b: (a - y * y * (1.0 / a)) * b, 1.0, 1.0),
    "hard_sigmoid": (
        lambda x, a, b: clip(x * a + b, 0.0, 1.0),
        lambda y, a, b: where_less(0.0, y, where_less(y, 1.0, a, 0.0), y * 0.0), 0.2, 0.5
    ),
    "elu": (
        lambda x, a, b: where_less(x, 0.0, (exp(x) - 1.0) * a, x), lambda y, a, b: where_less(y, 0.0, y + a, 1.0), 1.0,
        0.0
    ),
    "softsign": (lambda x, a, b: x / (_abs(x) + 1.0), lambda y, a, b: (1.0 - _abs(y)) * (1.0 - _abs(y)), 0.0, 0.0),
    "softplus": (lambda x, a, b: softplus(x), lambda y, a, b: 1.0 - exp(-y), 0.0, 0.0),
}  # fmt: skip
ACTIVATIONS = tuple(_KINDS)
# Of these alpha has to be positive: their slope could not be told from the result.
_POSITIVE = ("leaky_relu", "hard_sigmoid", "elu", "thresholded_relu")


@dataclass(frozen=True)
class Activation:
    """An activation function.

    Parameters
    ----------
    name : str
        One of `ACTIVATIONS`.
    alpha, beta : float or None
        Its parameters; None is ONNX's default.
    limit : float or None
        Clip the argument to [-limit, limit].
    eps : float
        How far below its value at the limit a result counts as clipped.
    """

    name: str
    alpha: float | None = None
    beta: float | None = None
    limit: float | None = None
    eps: float = 0.0

    def __post_init__(self):
        if self.name not in _KINDS:
            raise ValueError(f"expected one of {', '.join(ACTIVATIONS)}, got {self.name!r}")
        for letter, default in zip(("alpha", "beta"), _KINDS[self.name][2:]):
            value = getattr(self, letter)
            if value is None:
                value = default
            if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
                raise TypeError(f"expected a number as {letter} of {self.name}, got {value!r}")
            if not np.isfinite(value):
                raise ValueError(f"expected a finite {letter} of {self.name}, got {value}")
            object.__setattr__(self, letter, float(value))
        if (self.name in _POSITIVE and not self.alpha > 0) or (self.name == "scaled_tanh" and self.alpha == 0):
            raise ValueError(f"expected a positive alpha of {self.name}, got {self.alpha}")

    def __call__(self, x: Number) -> Number:
        if self.limit is not None:
            x = clip(x, -self.limit, self.limit)
        return _KINDS[self.name][0](x, self.alpha, self.beta)

    def slope(self, y: Number) -> Number:
        """The derivative where the result is `y`."""
        slope = _KINDS[self.name][1](y, self.alpha, self.beta)
        if self.limit is None:
            return slope
        ends = [float(_KINDS[self.name][0](np.float64(x), self.alpha, self.beta)) for x in (-self.limit, self.limit)]
        low, high = min(ends), max(ends)
        inside = where_less(y, high - self.eps * abs(high), slope, 0.0)
        return where_less(low + self.eps * abs(low), y, inside, 0.0)

    def clipped(self, limit: float, eps: float) -> Activation:
        """The same of a clipped argument."""
        return replace(self, limit=limit, eps=eps)


def check_activation(name: str, value: Any, default: str) -> Activation:
    """What an argument means that is one activation: None, a name or (name, alpha, beta)."""
    if value is None:
        return Activation(default)
    if isinstance(value, Activation):
        return value
    parts = (value,) if isinstance(value, str) else value
    if not isinstance(parts, (tuple, list)) or not 1 <= len(parts) <= 3 or not isinstance(parts[0], str):
        raise TypeError(f"{name}: expected a name or (name, alpha, beta), got {value!r}")
    try:
        return Activation(*parts)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def check_activations(value: Any, defaults: tuple[str, ...]) -> tuple[Activation, ...]:
    """What the argument `activations` means: None, or for each of a cell's a name or (name, alpha, beta)."""
    if value is None:
        value = defaults
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, (tuple, list)) or len(value) != len(defaults):
        raise ValueError(f"activations: expected {len(defaults)} ({', '.join(defaults)} by default), got {value!r}")
    return tuple(check_activation("activations", *pair) for pair in zip(value, defaults))
