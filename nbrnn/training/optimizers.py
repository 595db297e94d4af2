"""Optimizers: one pass over the flat vectors of parameters, gradients and moments.

An optimizer is its update equation, written below for one parameter with the names of the papers and of torch.optim:
p is the parameter, g its gradient, lr the learning rate. The equations compile on vectors of parameters, and one loop,
`_update_shard`, serves them all. The scale that clips the gradients is multiplied in on the way, so that clipping costs
no pass of its own. No element depends on another: a result does not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba.np.unsafe.ndarray import to_fixed_tuple

from nbrnn.kernels.constants import Constants
from nbrnn.kernels.jit import Kernel, Prepared, Stages, jitable, stage, stamp_of
from nbrnn.kernels.simd import lanes_of, load, load_many, pointer, sqrt, store, store_many
from nbrnn.layers.module import FLOATS
from nbrnn.training.config import Configured, build, check_number

SHARD = 1 << 16  # parameters that are worth a thread


@dataclass(frozen=True)
class Update(Constants):
    """An update equation, ``equation(p, g, kept, constants) -> p, kept``.

    Parameters
    ----------
    name : str
    equation : callable
    slots : int
        Numbers that it keeps for each parameter.
    count : int
        Numbers that a pass is given: a factor on the gradients, and the equation's constants.
    """

    name: str
    equation: Callable
    slots: int
    count: int


@jitable
def _update_shard(s, shards, update, params, grads, state, numbers):
    """One thread's share of a pass.

    params: [N] and state: [slots, N] change in place; grads: [N]; numbers: [count].
    """
    N = len(params)
    W = lanes_of(pointer(params, 0))
    vectors = (N + W - 1) // W
    numbers = to_fixed_tuple(numbers, update.count)
    scale, constants = numbers[0], numbers[1:]
    for v in range(vectors * s // shards, vectors * (s + 1) // shards):
        i = v * W
        p, g = load(pointer(params, i), N - i), load(pointer(grads, i), N - i)
        kept = load_many(pointer(state, i), N, N - i, update.slots)
        p, kept_n = update.equation(p, g * scale, kept, constants)
        store(pointer(params, i), p, N - i)
        store_many(pointer(state, i), N, kept_n, N - i)


def _compile(equation: Callable, slots: int, count: int) -> Kernel:
    """The pass of one equation."""
    update = Update(equation.__name__.strip("_"), equation, slots, 1 + count)
    return Kernel(_update_shard, f"{update.name}-{stamp_of(_update_shard, equation)}", update)


class Optimizer(Configured):
    """Base of the optimizers.

    Attributes
    ----------
    lr : float
        The learning rate of the next step; schedules set it.
    steps : int
        Updates made so far.
    """

    _slots: tuple[str, ...] = ()  # names of the vectors kept, as torch calls them

    def __init__(self, lr: float):
        self.lr = check_number("lr", lr)
        self.steps = 0
        self._state: np.ndarray | None = None  # [slots, N], from the first step on
        self._numbers = np.empty(0)  # of the pass that is prepared
        self._prepared: Prepared | None = None

    def _pass(self) -> Kernel:
        """The compiled equation."""
        raise NotImplementedError

    def _constants(self) -> tuple[float, ...]:
        """What the equation needs besides p, g and what is kept, at update number `steps`, the first being 1."""
        raise NotImplementedError

    def step(self, flat_params: np.ndarray, flat_grads: np.ndarray, scale: float = 1.0) -> None:
        """Update the parameters in place.

        Parameters
        ----------
        flat_params, flat_grads : ndarray of float32 or float64, shape (N,)
            All parameters and their gradients, contiguous and of one dtype; the gradients are not changed.
        scale : float, optional
            A factor on the gradients, such as the one that clips their norm.

        Raises
        ------
        TypeError, ValueError
            The vectors are not of one dtype and size, or not of those that the optimizer began with.
        """
        key = flat_params, flat_grads, self._state
        if self._prepared is None or not self._prepared.serves(key) or not flat_params.flags.writeable:
            self._prepare(flat_params, flat_grads)
        self.steps += 1
        self._numbers[:] = scale, *self._constants()
        self._prepared.stages.run()

    def _prepare(self, flat_params: np.ndarray, flat_grads: np.ndarray) -> None:
        """The pass over these vectors, or a clear error."""
        _check_vectors(flat_params, flat_grads)
        if self._state is None:
            self._state = np.zeros((len(self._slots), flat_params.size), flat_params.dtype)
        began = self._state.shape[1], self._state.dtype
        if began != (flat_params.size, flat_params.dtype):
            got = f"{flat_params.size} of {flat_params.dtype}"
            raise ValueError(f"flat_params: expected the {began[0]} of {began[1]} of the steps before, got {got}")
        kernel, vectors = self._pass(), (flat_params, flat_grads, self._state)
        self._numbers = np.empty(kernel.constants[0].count)
        self._prepared = Prepared(vectors, Stages(stage(kernel, flat_params.size // SHARD, *vectors, self._numbers)))

    def state_dict(self) -> dict[str, Any]:
        """The learning rate, the number of steps, and copies of the vectors kept since the first step, by name."""
        vectors = {} if self._state is None else {name: row.copy() for name, row in zip(self._slots, self._state)}
        return {"lr": self.lr, "steps": self.steps} | vectors

    def load_state_dict(self, mapping: Mapping[str, Any]) -> None:
        """Continue where the optimizer that gave `mapping` was; with an error nothing changes.

        Parameters
        ----------
        mapping : mapping
            What `state_dict` of an optimizer with the same arguments returned.

        Raises
        ------
        ValueError, TypeError
            A name is missing or unknown, a vector has another size, or holds something else than finite numbers.
        """
        vectors = {name: value for name, value in mapping.items() if name not in ("lr", "steps")}
        lr, steps = check_number("lr", mapping.get("lr")), mapping.get("steps")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"steps: expected a number of steps, got {steps!r}")
        expected = set(self._slots) if steps else set()
        if set(vectors) != expected:
            raise ValueError(f"state: expected the vectors {sorted(expected)}, got {sorted(vectors)}")
        for name, vector in vectors.items():
            first = next(iter(vectors.values()))
            if not isinstance(vector, np.ndarray) or vector.dtype not in FLOATS or vector.ndim != 1:
                raise TypeError(f"{name}: expected a vector of float32 or float64")
            if vector.shape != first.shape or vector.dtype != first.dtype or not np.isfinite(vector).all():
                raise ValueError(f"{name}: expected {first.size} finite values of {first.dtype}")
        self.lr, self.steps = lr, steps
        self._state = np.stack([vectors[name] for name in self._slots]) if vectors else None


def _check_vectors(params: Any, grads: Any) -> None:
    for name, vector in (("flat_params", params), ("flat_grads", grads)):
        if not isinstance(vector, np.ndarray) or vector.dtype not in FLOATS:
            got = vector.dtype if isinstance(vector, np.ndarray) else type(vector).__name__
            raise TypeError(f"{name}: expected a vector of float32 or float64, got {got}")
        if vector.ndim != 1 or not vector.flags.c_contiguous:
            raise ValueError(f"{name}: expected a contiguous vector, got shape {vector.shape}")
    if not params.flags.writeable:
        raise ValueError("flat_params: expected a vector that can be written to, got a frozen one (thaw the model)")
    if (grads.size, grads.dtype) != (params.size, params.dtype):
        wanted = f"{params.size} values of {params.dtype}"
        raise ValueError(f"flat_grads: expected {wanted} like the parameters, got {grads.size} of {grads.dtype}")


# ------------------------------------------------------------------ stochastic gradient descent


@jitable
def _sgd(p, g, kept, constants):
    lr, weight_decay = constants
    g = g + weight_decay * p
    return p - lr * g, ()


@jitable
def _sgd_momentum(p, g, kept, constants):
    lr, weight_decay, momentum = constants
    (b,) = kept
    g = g + weight_decay * p
    b = momentum * b + g
    return p - lr * b, (b,)


@jitable
def _sgd_nesterov(p, g, kept, constants):
    lr, weight_decay, momentum = constants
    (b,) = kept
    g = g + weight_decay * p
    b = momentum * b + g
    return p - lr * (g + momentum * b), (b,)


_SGD = _compile(_sgd, 0, 2)
_SGD_MOMENTUM = _compile(_sgd_momentum, 1, 3)
_SGD_NESTEROV = _compile(_sgd_nesterov, 1, 3)


class SGD(Optimizer):
    """Stochastic gradient descent: p - lr g, or with momentum p - lr b, b = momentum b + g.

    Parameters
    ----------
    lr : float
        Learning rate, 0 or more.
    momentum : float, optional
        In [0, 1).
    nesterov : bool, optional
        Look ahead along the momentum: p - lr (g + momentum b) (Sutskever et al. 2013).
    weight_decay : float, optional
        Times p, added to g.

    Raises
    ------
    ValueError, TypeError
        An argument is out of range, or `nesterov` lacks a momentum.
    """

    arguments = ("lr", "momentum", "nesterov", "weight_decay")

    def __init__(self, lr: float, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0):
        super().__init__(lr)
        self.momentum = check_number("momentum", momentum, below=1.0)
        self.weight_decay = check_number("weight_decay", weight_decay)
        self.nesterov = bool(nesterov)
        if nesterov and not momentum:
            raise ValueError("nesterov: expected a momentum above 0 with it, got 0")
        self._slots = ("momentum_buffer",) if self.momentum else ()

    def _pass(self) -> Kernel:
        return _SGD_NESTEROV if self.nesterov else _SGD_MOMENTUM if self.momentum else _SGD

    def _constants(self) -> tuple[float, ...]:
        return (self.lr, self.weight_decay) + ((self.momentum,) if self.momentum else ())


# ------------------------------------------------------------------ Adam


@jitable
def _adam(p, g, kept, constants):
    # m_hat = m / (1 - beta1^t) and v_hat = v / (1 - beta2^t) are unbiased: the first is a part of `step`, the second
    # of `root`, the square root of 1 - beta2^t.
    step, root, beta1, beta2, eps, weight_decay, keep = constants
    m, v = kept
    g = g + weight_decay * p
    m = beta1 * m + (1.0 - beta1) * g
    v = beta2 * v + (1.0 - beta2) * (g * g)
    return keep * p - step * (m / (sqrt(v) / root + eps)), (m, v)


_ADAM = _compile(_adam, 2, 7)


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015): p - lr m_hat / (sqrt(v_hat) + eps), with running means m of g and v of g^2.

    Parameters
    ----------
    lr : float, optional
        Learning rate, 0 or more.
    betas : pair of float, optional
        Memory of the two means, in [0, 1).
    eps : float, optional
        Keeps the denominator above zero.
    weight_decay : float, optional
        Times p, added to g.

    Raises
    ------
    ValueError, TypeError
        An argument is out of range.
    """

    arguments = ("lr", "betas", "eps", "weight_decay")
    _slots = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(lr)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas: expected two numbers, got {betas!r}")
        self.betas = tuple(check_number("betas", beta, below=1.0) for beta in betas)
        self.eps = check_number("eps", eps)
        self.weight_decay = check_number("weight_decay", weight_decay)

    def _pass(self) -> Kernel:
        return _ADAM

    def _constants(self) -> tuple[float, ...]:
        beta1, beta2 = self.betas
        step = self.lr / (1.0 - beta1**self.steps)
        root = math.sqrt(1.0 - beta2**self.steps)
        return step, root, beta1, beta2, self.eps, *self._decay()

    def _decay(self) -> tuple[float, float]:
        """Weight decay as a term of the gradient, and as a factor on the parameter."""
        return self.weight_decay, 1.0


class AdamW(Adam):
    """Adam whose weight decay does not pass through the means: p (1 - lr weight_decay) first (Loshchilov, Hutter 2019).

    Parameters
    ----------
    lr, betas, eps : optional
        As in `Adam`.
    weight_decay : float, optional
        Times lr p, subtracted from p.

    Raises
    ------
    ValueError, TypeError
        An argument is out of range.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        super().__init__(lr, betas, eps, weight_decay)

    def _decay(self) -> tuple[float, float]:
        return 0.0, 1.0 - self.lr * self.weight_decay


# ------------------------------------------------------------------ RMSprop and Adagrad


@jitable
def _rmsprop(p, g, kept, constants):
    lr, alpha, eps = constants
    (v,) = kept
    v = alpha * v + (1.0 - alpha) * (g * g)
    return p - lr * (g / (sqrt(v) + eps)), (v,)


@jitable
def _adagrad(p, g, kept, constants):
    lr, eps = constants
    (v,) = kept
    v = v + g * g
    return p - lr * (g / (sqrt(v) + eps)), (v,)


_RMSPROP = _compile(_rmsprop, 1, 3)
_ADAGRAD = _compile(_adagrad, 1, 2)


class RMSprop(Optimizer):
    """RMSprop (Hinton 2012): p - lr g / (sqrt(v) + eps), with a running mean v of g^2.

    Parameters
    ----------
    lr : float, optional
        Learning rate, 0 or more.
    alpha : float, optional
        Memory of the mean, in [0, 1).
    eps : float, optional
        Keeps the denominator above zero.

    Raises
    ------
    ValueError, TypeError
        An argument is out of range.
    """

    arguments = ("lr", "alpha", "eps")
    _slots = ("square_avg",)

    def __init__(self, lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-8):
        super().__init__(lr)
        self.alpha = check_number("alpha", alpha, below=1.0)
        self.eps = check_number("eps", eps)

    def _pass(self) -> Kernel:
        return _RMSPROP

    def _constants(self) -> tuple[float, ...]:
        return self.lr, self.alpha, self.eps


class Adagrad(Optimizer):
    """Adagrad (Duchi et al. 2011): p - lr g / (sqrt(v) + eps), with the sum v of all g^2.

    Parameters
    ----------
    lr : float, optional
        Learning rate, 0 or more.
    eps : float, optional
        Keeps the denominator above zero.

    Raises
    ------
    ValueError, TypeError
        An argument is out of range.
    """

    arguments = ("lr", "eps")
    _slots = ("sum",)

    def __init__(self, lr: float = 1e-2, eps: float = 1e-10):
        super().__init__(lr)
        self.eps = check_number("eps", eps)

    def _pass(self) -> Kernel:
        return _ADAGRAD

    def _constants(self) -> tuple[float, ...]:
        return self.lr, self.eps


def from_config(config: Any) -> Optimizer:
    """The optimizer whose `config()` this is, before its first step.

    Raises
    ------
    ValueError, TypeError
        It describes none of the optimizers above.
    """
    return build(config, (SGD, Adam, AdamW, RMSprop, Adagrad))
