"""Losses: ``value, dy = loss(y, target)``, the mean over what counts and its gradient with respect to y.

    CrossEntropy     mean of log(sum_j exp(y_j)) - y_target        dy = (softmax(y) - one_hot(target)) / count
    MSE              mean of (y - target)^2                        dy = 2 (y - target) / count
    MAE              mean of |y - target|                          dy = sign(y - target) / count
    BCEWithLogits    mean of log(1 + exp(y)) - y target            dy = (sigmoid(y) - target) / count

`dy` has the shape and dtype of `y`; values are accumulated in float64, in an order that does not depend on the number
of threads. A NaN in `y` gives a NaN value. Where nothing counts (no elements, or every target ignored) the value is 0
and so is dy.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nbrnn.kernels.activations import exp
from nbrnn.kernels.jit import compiled, jitable, run, sharded
from nbrnn.kernels.simd import fill_behind, lane_max, lane_sum, lanes_of, load, pointer, shift, store, where_less
from nbrnn.layers.module import FLOATS, check_floats
from nbrnn.training.config import Configured, build

SHARD = 1 << 16  # logits that are worth a thread


class Loss(Configured):
    """Base of the losses."""

    def __call__(self, y: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
        raise NotImplementedError

    def items(self, target: np.ndarray) -> int:
        """How many elements of `target` the mean is taken over."""
        return np.size(target)


class CrossEntropy(Loss):
    """Cross entropy of logits with integer targets: the mean of -log softmax(y)[target].

    Parameters
    ----------
    ignore_index : int, optional
        Positions with this target count for nothing, whatever stands in `y` there: their dy is zero.

    Raises
    ------
    TypeError
        `ignore_index` is not an integer.

    Examples
    --------
    >>> value, dy = CrossEntropy()(np.zeros((2, 4)), np.array([3, 0]))
    >>> round(math.exp(value), 12)  # the perplexity of a guess among four
    4.0
    """

    arguments = ("ignore_index",)

    def __init__(self, ignore_index: int = -100):
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, np.integer)):
            raise TypeError(f"ignore_index: expected an integer, got {ignore_index!r}")
        self.ignore_index = int(ignore_index)

    def __call__(self, y: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
        """The loss and its gradient.

        Parameters
        ----------
        y : ndarray of float32 or float64, shape (..., V)
            Logits.
        target : ndarray of int, shape (...)
            Classes in [0, V), or `ignore_index`.

        Returns
        -------
        value : float
            The mean over the targets that are not ignored; 0.0 where all are.
        dy : ndarray
            Its gradient, like `y`.

        Raises
        ------
        TypeError
            `y` is not a floating-point array, or `target` not one of integers.
        ValueError
            `target` has another shape, or a class out of range.
        """
        y = _check_output(y)
        if y.ndim == 0:
            raise ValueError("y: expected (..., V), got a single number")
        target = _check_classes(target, y.shape[:-1])
        V = y.shape[-1]
        count, wrong = _count(target, self.ignore_index, V)
        if wrong >= 0:
            expected = f"classes in [0, {V}) or {self.ignore_index} to be ignored"
            raise ValueError(f"target: expected {expected}, got {target[wrong]}")
        dy, losses = np.empty_like(y), np.empty(target.size)
        scale = 1.0 / max(count, 1)
        rows = y.reshape(-1, V), target, self.ignore_index, scale, dy.reshape(-1, V), losses
        run(_cross_entropy, y.size // SHARD, *rows)
        return float(losses.sum()) * scale, dy

    def items(self, target: np.ndarray) -> int:
        """How many elements of `target` are not ignored."""
        return int(np.count_nonzero(np.asarray(target) != self.ignore_index))


def _check_classes(target: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The targets as a vector of int64."""
    if not isinstance(target, np.ndarray):
        raise TypeError(f"target: expected a NumPy array of integers, got {type(target).__name__}")
    if target.dtype.kind not in "iu" or not np.can_cast(target.dtype, np.int64):
        raise TypeError(f"target: expected integers (int64 or smaller), got {target.dtype}")
    if target.shape != shape:
        raise ValueError(f"target: expected shape {shape}, that of y without its last dimension, got {target.shape}")
    return np.ascontiguousarray(target, np.int64).reshape(-1)


@compiled
def _count(target, ignore_index, V):
    """How many targets count, and where the first impossible one is (-1: nowhere)."""
    count = 0
    for n in range(len(target)):
        if target[n] != ignore_index:
            if not 0 <= target[n] < V:
                return count, n
            count += 1
    return count, -1


@sharded
def _cross_entropy(s, shards, y, target, ignore_index, scale, dy, losses):
    """dy = scale (softmax(y) - one_hot(target)) and the loss of each row; zeros where the target is ignored.

    y, dy: [N, V]; target: [N]; losses: [N] of float64.
    """
    N, V = y.shape
    for n in range(N * s // shards, N * (s + 1) // shards):
        row, drow = pointer(y, n * V), pointer(dy, n * V)
        if target[n] == ignore_index:
            losses[n] = 0.0
            dy[n] = 0.0
        else:
            top = _largest(row, V)
            total = _exponentials(row, V, top, drow)
            losses[n] = math.log(total) - (np.float64(y[n, target[n]]) - top)
            _multiply(drow, V, scale / total)
            dy[n, target[n]] -= scale


@jitable
def _largest(row, V):
    """The largest of `V` numbers; NaN where one is."""
    W = lanes_of(row)
    top = fill_behind(load(row, V), V, -np.inf)
    for j in range(W, V, W):
        x = fill_behind(load(shift(row, j), V - j), V - j, -np.inf)
        top = where_less(top, x, x, top)
    return np.float64(lane_max(top))


@jitable
def _exponentials(row, V, top, out):
    """out = exp(row - top), and the sum of it."""
    W = lanes_of(row)
    sums = load(row, 0)
    for j in range(0, V, W):
        e = exp(load(shift(row, j), V - j) - top)
        store(shift(out, j), e, V - j)
        sums += fill_behind(e, V - j, 0.0)
    return np.float64(lane_sum(sums))


@jitable
def _multiply(row, V, factor):
    """row = factor * row"""
    for j in range(0, V, lanes_of(row)):
        store(shift(row, j), load(shift(row, j), V - j) * factor, V - j)


class _ByElement(Loss):
    """A mean over all elements of y, with a target of y's shape."""

    def __call__(self, y: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
        """The loss and its gradient.

        Parameters
        ----------
        y, target : ndarray of float32 or float64, of one shape
            What the model says, and what it should say; the target is converted to the dtype of `y`.

        Returns
        -------
        value : float
            The mean over all elements; 0.0 where there are none.
        dy : ndarray
            Its gradient, like `y`.

        Raises
        ------
        TypeError
            `y` or `target` is not a floating-point array.
        ValueError
            `target` has another shape, or values that make no sense.
        """
        y = _check_output(y)
        target = check_floats("target", target, y.dtype, y.shape, str(y.shape)).reshape(y.shape)
        terms, slopes = self._terms(y, target)
        count = max(y.size, 1)
        return float(terms.sum(dtype=np.float64)) / count, slopes / count

    def _terms(self, y: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The loss of each element and its derivative."""
        raise NotImplementedError


class MSE(_ByElement):
    """Mean squared error: the mean of (y - target)^2."""

    def _terms(self, y, target):
        d = y - target
        return np.square(d, dtype=np.float64), 2 * d


class MAE(_ByElement):
    """Mean absolute error: the mean of |y - target|; its derivative at zero is zero."""

    def _terms(self, y, target):
        d = y - target
        return np.abs(d), np.sign(d)


class BCEWithLogits(_ByElement):
    """Binary cross entropy of logits with probabilities: -target log p - (1 - target) log(1 - p), p = sigmoid(y)."""

    def _terms(self, y, target):
        if target.size and (target.min() < 0 or target.max() > 1):
            raise ValueError(f"target: expected probabilities in [0, 1], got {target.min()} to {target.max()}")
        from scipy.special import expit  # here, since the import takes as long as that of Numba

        # log(1 + exp(y)) = max(y, 0) + log(1 + exp(-|y|)), which does not overflow
        return np.maximum(y, 0) - y * target + np.log1p(np.exp(-np.abs(y))), expit(y) - target


def _check_output(y: Any) -> np.ndarray:
    """`y` C-contiguous in native byte order, or a clear error."""
    if not isinstance(y, np.ndarray):
        raise TypeError(f"y: expected a NumPy array, got {type(y).__name__}")
    if y.dtype.name not in FLOATS:
        raise TypeError(f"y: expected float32 or float64 values, got {y.dtype}")
    return np.asarray(y, y.dtype.name, order="C")


def from_config(config: Any) -> Loss:
    """The loss whose `config()` this is.

    Raises
    ------
    ValueError, TypeError
        It describes none of the losses above.
    """
    return build(config, (CrossEntropy, MSE, MAE, BCEWithLogits))
