"""Batches for training, cut from long sequences."""

from nbrnn.data.windows import RandomWindows, SequentialWindows

__all__ = ["RandomWindows", "SequentialWindows"]
