"""What a mean is taken over: the steps of sequences without their padding, alike or sequence by sequence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from nbrnn.data.ragged import Ragged
from nbrnn.layers.module import FLOATS

PER = ("step", "sequence", "last")
Series = np.ndarray | Ragged


class Counted(NamedTuple):
    """What counts of outputs and targets.

    Attributes
    ----------
    y, target : ndarray, (N, ...)
        Without padding.
    offsets : ndarray of int64, (B + 1,), or None
        Where each sequence begins, if the mean is one over sequences.
    put_back : callable
        From a gradient of `y` here to that of the outputs as they were given, zeros where nothing counts.
    """

    y: np.ndarray
    target: Any
    offsets: np.ndarray | None
    put_back: Callable[[np.ndarray], Series]


def take_counted(y: Any, target: Any, lengths: Any, per: str, batch_first: bool) -> Counted:
    """What counts of outputs and targets that are Ragged, padded with `lengths`, or arrays without padding.

    Raises
    ------
    TypeError, ValueError
        They are of the wrong kind, or do not fit each other.
    """
    if not isinstance(y, Ragged):
        y = _check_output(y)
        if lengths is None and per == "step":
            return Counted(y, target, None, lambda dy: dy)
        return _of_padded(y, target, lengths, per, batch_first)
    if lengths is not None:
        raise ValueError("lengths: expected None beside a Ragged, which has its own")
    values = _check_output(y.values)
    if per != "last":
        offsets = y.offsets if per == "sequence" else None
        return Counted(values, y.values_of("target", target), offsets, y.with_values)
    there = y.lengths > 0
    rows = y.offsets[1:][there] - 1

    def put_back(dy: np.ndarray) -> Ragged:
        found = np.zeros_like(values)
        found[rows] = dy
        return y.with_values(found)

    return Counted(values[rows], _of_sequences(target, there), None, put_back)


def _of_padded(y: np.ndarray, target: Any, lengths: Any, per: str, batch_first: bool) -> Counted:
    if y.ndim < 2:
        raise ValueError(f"y: expected {'(B, T, ...)' if batch_first else '(T, B, ...)'}, got {y.shape}")
    T, B = y.shape[1::-1] if batch_first else y.shape[:2]
    lengths = np.full(B, T) if lengths is None else lengths
    ragged = Ragged.from_padded(y, lengths, batch_first)
    if per != "last":
        if isinstance(target, Ragged):
            raise TypeError(f"target: expected an array {y.shape[:2]}, like y, got a Ragged")
        if np.shape(target)[:2] != y.shape[:2]:
            raise ValueError(f"target: expected {y.shape[:2]} at the beginning, got {np.shape(target)}")
        target = Ragged.from_padded(target, lengths, batch_first)
    counted = take_counted(ragged, target, None, per, batch_first)

    def put_back(dy: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(counted.put_back(dy).to_padded(batch_first, steps=T)[0])

    return counted._replace(put_back=put_back)


def _check_output(y: Any) -> np.ndarray:
    """`y` C-contiguous in native byte order, or a clear error."""
    if not isinstance(y, np.ndarray):
        raise TypeError(f"y: expected a NumPy array, got {type(y).__name__}")
    if y.dtype in FLOATS:  # the name of a dtype takes longer than all the rest
        return np.asarray(y, order="C")
    if y.dtype.name not in FLOATS:
        raise TypeError(f"y: expected float32 or float64 values, got {y.dtype}")
    return np.asarray(y, y.dtype.name, order="C")


def _of_sequences(target: Any, there: np.ndarray) -> np.ndarray:
    """The targets of those sequences that have a step."""
    if not isinstance(target, np.ndarray) or target.shape[:1] != there.shape:
        got = target.shape if isinstance(target, np.ndarray) else type(target).__name__
        raise ValueError(f"target: expected an array ({len(there)}, ...), one for each sequence, got {got}")
    return target[there]


def sequence_weights(counts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The weight of an element in each step, for a mean over sequences of the means of their elements.

    Parameters
    ----------
    counts : ndarray of int, (N,)
        The elements of each step that count.
    offsets : ndarray of int64, (B + 1,)
        Where each sequence begins.
    """
    each = elements_of_sequences(counts, offsets)
    return np.repeat(1.0 / (np.maximum(each, 1) * max(np.count_nonzero(each), 1)), np.diff(offsets))


def elements_of_sequences(counts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """How many elements of each sequence count."""
    return np.diff(np.append(0, np.cumsum(counts))[offsets])


def elements_of_steps(counting: np.ndarray) -> np.ndarray:
    """From which elements count (N, ...) to how many of each step do."""
    return np.count_nonzero(counting.reshape(len(counting), math.prod(counting.shape[1:])), axis=1)


def check_per(per: Any) -> str:
    """What a mean is taken over, or a clear error."""
    if per not in PER:
        raise ValueError(f"per: expected one of {', '.join(PER)}, got {per!r}")
    return per
