"""Losses: ``value, dy = loss(y, target)``, the mean over what counts and its gradient with respect to y.

    CrossEntropy     mean of log(sum_j exp(y_j)) - y_target        dy = (softmax(y) - one_hot(target)) w
    MSE              mean of (y - target)^2                        dy = 2 (y - target) w
    MAE              mean of |y - target|                          dy = sign(y - target) w
    BCEWithLogits    mean of log(1 + exp(y)) - y target            dy = (sigmoid(y) - target) w

w is a step's weight in the mean, which `per` chooses: over all steps alike, over sequences (the mean of each sequence's
own mean), or over the last step of each sequence only. Sequences are `Ragged`, or padded with `lengths`; padding does
not count.

`dy` has the form and dtype of `y`; values are accumulated in float64, in an order that does not depend on the number
of threads. A NaN in `y` gives a NaN value. Where nothing counts (no elements, or every target ignored) the value is 0
and so is dy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbrnn.data.ragged import Ragged
from nbrnn.kernels.activations import exp
from nbrnn.kernels.jit import Prepared, Stage, compiled, get_num_threads, jitable, prepare, sharded, stage
from nbrnn.kernels.memory import empty
from nbrnn.kernels.rows import add_up
from nbrnn.kernels.schedule import shards_for
from nbrnn.kernels.simd import fill_behind, lane_max, lane_sum, lanes_of, load, pointer, shift, store, where_less
from nbrnn.layers.module import check_floats
from nbrnn.training.config import Configured, build
from nbrnn.training.counted import (
    Series,
    check_per,
    elements_of_sequences,
    elements_of_steps,
    sequence_weights,
    take_counted,
)

LOGIT = 100  # operations of a product that take as long as a logit


class Loss(Configured):
    """Base of the losses.

    Parameters
    ----------
    per : {"step", "sequence", "last"}, optional
        What the mean is taken over: all steps alike; sequences, of each of which it is the mean of its steps; or the
        last steps of sequences, of which the target then has one each, (B, ...).
    batch_first : bool, optional
        Whether padded sequences are (B, T, ...) instead of (T, B, ...).
    """

    arguments = ("per", "batch_first")

    def __init__(self, per: str = "step", batch_first: bool = False):
        self.per, self.batch_first = check_per(per), bool(batch_first)

    def __call__(self, y: Series, target: Series, lengths: Any = None) -> tuple[float, Series]:
        """The loss and its gradient.

        Parameters
        ----------
        y : ndarray or Ragged of float32 or float64
            What the model says: (T, B, ...) of sequences, or of any shape where `per` is "step".
        target : ndarray or Ragged
            What it should say, see the class; of the form of `y`, or with `per` "last" (B, ...).
        lengths : array_like of int, (B,), optional
            The steps of each row of padded sequences.

        Returns
        -------
        value : float
        dy : ndarray or Ragged
            Its gradient, like `y`, zeros in the padding.

        Raises
        ------
        TypeError, ValueError
            `y`, `target` or `lengths` is of the wrong kind, or they do not fit each other.
        """
        counted = take_counted(y, target, lengths, self.per, self.batch_first)
        weights = None
        if counted.offsets is not None:
            weights = sequence_weights(self._counting(counted.target), counted.offsets)
        value, dy = self._mean(counted.y, counted.target, weights)
        return value, counted.put_back(dy)

    def _counting(self, target: Any) -> np.ndarray:
        """How many elements of each step count."""
        return np.full(len(target), target[:1].size)

    def _mean(self, y: np.ndarray, target: Any, weights: np.ndarray | None) -> tuple[float, np.ndarray]:
        """The mean over all elements and its gradient; weights: of an element in each row, None: all alike."""
        raise NotImplementedError

    def items(self, target: Series, lengths: Any = None) -> int:
        """How many things of `target` the mean is taken over.

        `lengths` (B,) are those of padded sequences; with `per` "last", of whatever sequences.
        """
        if self.per == "last":
            there = slice(None) if lengths is None else np.asarray(lengths) > 0
            return self._count(np.asarray(target)[there])
        if not isinstance(target, Ragged) and (lengths is not None or self.per == "sequence"):
            T, B = np.shape(target)[1::-1] if self.batch_first else np.shape(target)[:2]
            target = Ragged.from_padded(target, np.full(B, T) if lengths is None else lengths, self.batch_first)
        if self.per == "sequence":
            return int(np.count_nonzero(elements_of_sequences(self._counting(target.values), target.offsets)))
        return self._count(target.values if isinstance(target, Ragged) else target)

    def _count(self, target: np.ndarray) -> int:
        """How many elements of `target` count."""
        return np.size(target)


@dataclass(eq=False)
class _Room:
    """What a call of the cross entropy needs, and may find there again."""

    value: np.ndarray  # [1]
    prepared: Prepared | None = None


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

    arguments = ("ignore_index", "per", "batch_first")

    def __init__(self, ignore_index: int = -100, per: str = "step", batch_first: bool = False):
        super().__init__(per, batch_first)
        self.ignore_index = check_index(ignore_index)
        self._spare: list[_Room] = []

    def _mean(self, y, target, weights):
        target, count = check_classes(y, target, self.ignore_index)
        dy, V = empty(y.shape, y.dtype), y.shape[-1]
        weights = np.array([1.0 / max(count, 1)]) if weights is None else weights
        try:
            room = self._spare.pop()
        except IndexError:
            room = _Room(np.empty(1))
        arrays = y.reshape(-1, V), target, weights, dy.reshape(-1, V)
        key = target.size, V, len(weights), y.dtype, self.ignore_index, get_num_threads()
        room.prepared = prepare(room.prepared, key, arrays, (), self._stages, arrays, room.value)
        room.prepared.stages.run()
        value = float(room.value[0])
        self._spare.append(room)
        return value, dy

    def _stages(self, arrays: tuple[np.ndarray, ...], value: np.ndarray) -> list[Stage]:
        y, target, weights, dy = arrays
        losses = np.empty(target.size)
        rows = y, target, self.ignore_index, weights, dy, losses
        return [stage(_cross_entropy, shards_for(LOGIT * y.size), *rows), stage(add_up, 1, losses, value)]

    def _counting(self, target: np.ndarray) -> np.ndarray:
        return elements_of_steps(np.asarray(target) != self.ignore_index)

    def _count(self, target: np.ndarray) -> int:
        return int(np.count_nonzero(np.asarray(target) != self.ignore_index))


def check_index(ignore_index: Any) -> int:
    """The target of what is ignored, or a clear error."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, np.integer)):
        raise TypeError(f"ignore_index: expected an integer, got {ignore_index!r}")
    return int(ignore_index)


def check_classes(y: np.ndarray, target: Any, ignore_index: int) -> tuple[np.ndarray, int]:
    """The targets of logits as a vector of int64, and how many of them are not ignored; or a clear error."""
    if y.ndim == 0:
        raise ValueError("y: expected (..., V), got a single number")
    shape, V = y.shape[:-1], y.shape[-1]
    if not isinstance(target, np.ndarray):
        raise TypeError(f"target: expected a NumPy array of integers, got {type(target).__name__}")
    if target.dtype.kind not in "iu" or not np.can_cast(target.dtype, np.int64):
        raise TypeError(f"target: expected integers (int64 or smaller), got {target.dtype}")
    if target.shape != shape:
        raise ValueError(f"target: expected shape {shape}, that of y without its last dimension, got {target.shape}")
    target = np.ascontiguousarray(target, np.int64).reshape(-1)
    count, wrong = _count(target, ignore_index, V)
    if wrong >= 0:
        expected = f"classes in [0, {V}) or {ignore_index} to be ignored"
        raise ValueError(f"target: expected {expected}, got {target[wrong]}")
    return target, count


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
def _cross_entropy(s, shards, y, target, ignore_index, weights, dy, losses):
    """The weighted loss of each row, and dy = weight (softmax(y) - one_hot(target)); zeros where target is ignored.

    y, dy: [N, V]; target, losses: [N]; weights: float64 of as many rows each as there are for one.
    """
    (N, V), each = y.shape, len(y) // max(len(weights), 1)
    for n in range(N * s // shards, N * (s + 1) // shards):
        row, drow = pointer(y, n * V), pointer(dy, n * V)
        if target[n] == ignore_index:
            losses[n] = 0.0
            dy[n] = 0.0
        else:
            top = _largest(row, V)
            total = _exponentials(row, V, top, drow)
            weight = weights[n // each]
            losses[n] = weight * (math.log(total) - (np.float64(y[n, target[n]]) - top))
            _multiply(drow, V, weight / total)
            dy[n, target[n]] -= weight


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
    """A mean over all elements of y, with a target of y's shape, which is converted to the dtype of y."""

    def _mean(self, y, target, weights):
        target = check_floats("target", target, y.dtype, y.shape).reshape(y.shape)
        terms, slopes = self._terms(y, target)
        if weights is None:
            count = max(y.size, 1)
            return float(terms.sum(dtype=np.float64)) / count, slopes / count
        weights = weights.reshape(-1, *(1,) * (y.ndim - 1))
        return float((terms * weights).sum(dtype=np.float64)), slopes * weights.astype(y.dtype)

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


def from_config(config: Any) -> Loss:
    """The loss whose `config()` this is.

    Raises
    ------
    ValueError, TypeError
        It describes none of the losses above.
    """
    return build(config, (CrossEntropy, MSE, MAE, BCEWithLogits))
