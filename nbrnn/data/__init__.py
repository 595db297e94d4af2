"""Batches for training, cut from texts, series and sequences of any length."""

from nbrnn.data.batches import RaggedBatches
from nbrnn.data.ragged import Ragged
from nbrnn.data.series import SeriesWindows
from nbrnn.data.streams import DocumentStream, GeneratorStream, SeriesStream, TextStream
from nbrnn.data.windows import RandomWindows, SequentialWindows

__all__ = [
    "DocumentStream",
    "GeneratorStream",
    "Ragged",
    "RaggedBatches",
    "RandomWindows",
    "SequentialWindows",
    "SeriesStream",
    "SeriesWindows",
    "TextStream",
]
