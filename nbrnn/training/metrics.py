"""Measures of a model that say more than its loss, and have no gradient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nbrnn.training.counted import Series, check_per, elements_of_sequences, elements_of_steps, take_counted
from nbrnn.training.losses import check_classes, check_index


def accuracy(
    y: Series,
    target: Series,
    lengths: Any = None,
    *,
    per: str = "step",
    ignore_index: int = -100,
    batch_first: bool = False,
) -> float:
    """The fraction of targets to which the model gives the largest number.

    Parameters
    ----------
    y : ndarray or Ragged of float32 or float64, (..., V)
        What the model says, such as logits: (T, B, ..., V) of sequences, or of any shape where `per` is "step".
    target : ndarray or Ragged of int
        The right classes, of the shape of `y` without its last dimension; with `per` "last" (B, ...).
    lengths : array_like of int, (B,), optional
        The steps of each row of padded sequences.
    per : {"step", "sequence", "last"}, optional
        What the mean is taken over, as for the losses: all steps alike; sequences, of each of which it is the mean of
        its steps; or the last steps of sequences.
    ignore_index : int, optional
        Positions with this target count for nothing.
    batch_first : bool, optional
        Whether padded sequences are (B, T, ...) instead of (T, B, ...).

    Returns
    -------
    float
        From 0 to 1, NaN where nothing counts. Among equal numbers the first one is the model's choice; where one of
        them is NaN, it has none and is wrong.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind, or they do not fit each other.

    Examples
    --------
    >>> accuracy(np.eye(4), np.array([0, 1, 2, 0]))
    0.75
    """
    index = check_index(ignore_index)
    counted = take_counted(y, target, lengths, check_per(per), bool(batch_first))
    classes, count = check_classes(counted.y, counted.target, index)
    if not count:
        return math.nan
    rows = counted.y.reshape(len(classes), -1)
    choice = rows.argmax(axis=1)  # the first NaN where there is one
    counts = classes != index
    right = counts & (choice == classes) & ~np.isnan(rows[np.arange(len(rows)), choice])
    if counted.offsets is None:
        return float(np.count_nonzero(right) / count)
    hits, counting = (
        elements_of_sequences(elements_of_steps(each.reshape(counted.target.shape)), counted.offsets)
        for each in (right, counts)
    )
    there = counting > 0
    return float(np.mean(hits[there] / counting[there]))
