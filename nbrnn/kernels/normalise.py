"""Rows of the tape shifted and scaled to mean 0 and variance 1, forward and back.

With n = (a - mean) / deviation, and a mean over all units of the row and some slots:

    da = (dn - mean of dn - n mean of (n dn)) / deviation

Sums run over vectors of hidden units in their order, so that a row's bits do not depend on the rows around it.
"""

from __future__ import annotations

import numpy as np

from nbrnn.kernels.jit import jitable
from nbrnn.kernels.simd import element, fill_behind, lane_sum, lanes_of, load, shift, store

EPSILON = 1e-5  # added to the variance


@jitable
def normalise_slots(cell, gates, g_j, H, stats):
    """Normalise the pre-activations of one row, group by group, in place."""
    W = lanes_of(gates)
    units, size = cell.vectors * W, cell.slots // cell.norms
    for group in range(cell.norms):
        first = group * size * units
        total, square = load(gates, 0), load(gates, 0)
        for unit in range(0, H, W):
            here = shift(gates, first + unit // units * g_j + unit % units)
            for slot in range(size):
                total += load(shift(here, slot * units), H - unit)
        mean = lane_sum(total) / (size * H)
        for unit in range(0, H, W):
            here = shift(gates, first + unit // units * g_j + unit % units)
            for slot in range(size):
                one = fill_behind(load(shift(here, slot * units), W) - mean, H - unit, 0.0)
                square += one * one
        scale = 1.0 / np.sqrt(lane_sum(square) / (size * H) + EPSILON)
        for unit in range(0, H, W):
            here = shift(gates, first + unit // units * g_j + unit % units)
            for slot in range(size):
                place = shift(here, slot * units)
                store(place, fill_behind((load(place, W) - mean) * scale, H - unit, 0.0), W)
        store(shift(stats, group), scale, 1)


@jitable
def moments(p, H):
    """The mean of H numbers, and 1 / deviation."""
    W, total, square = lanes_of(p), load(p, 0), load(p, 0)
    for unit in range(0, H, W):
        total += load(shift(p, unit), H - unit)
    mean = lane_sum(total) / H
    for unit in range(0, H, W):
        one = fill_behind(load(shift(p, unit), H - unit) - mean, H - unit, 0.0)
        square += one * one
    return mean, 1.0 / np.sqrt(lane_sum(square) / H + EPSILON)


@jitable
def normalise_back(cell, d, gates, g_j, H, stats):
    """From normalised pre-activations in the tape and their gradients `d` to those of the pre-activations."""
    W = lanes_of(gates)
    units, size = cell.vectors * W, cell.slots // cell.norms
    for group in range(cell.norms):
        first = group * size * units
        total, along = load(gates, 0), load(gates, 0)
        for unit in range(0, H, W):
            j = unit // units
            here, there = first + j * g_j + unit % units, first + j * cell.slots * units + unit % units
            for slot in range(size):
                one = load(shift(d, there + slot * units), W)
                total += one
                along += one * load(shift(gates, here + slot * units), W)
        mean, slope, scale = lane_sum(total) / (size * H), lane_sum(along) / (size * H), element(stats, group)
        for unit in range(0, H, W):
            j = unit // units
            here, there = first + j * g_j + unit % units, first + j * cell.slots * units + unit % units
            for slot in range(size):
                place = shift(gates, here + slot * units)
                one = load(shift(d, there + slot * units), W) - mean - load(place, W) * slope
                store(place, fill_behind(one * scale, H - unit, 0.0), W)
