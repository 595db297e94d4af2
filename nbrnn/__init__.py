"""Recurrent networks on CPUs: every cell, forward and backward, at the speed of the FMA units."""

__version__ = "0.1.0"

from nbrnn.cells.cell import Cell
from nbrnn.kernels.jit import get_num_threads, set_num_threads
from nbrnn.layers.dropout import Dropout
from nbrnn.layers.embedding import Embedding
from nbrnn.layers.linear import Linear
from nbrnn.layers.module import Module, Parameters
from nbrnn.layers.recurrent import GRU, LSTM, RNN, Recurrent
from nbrnn.layers.sequential import Sequential

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Cell",
    "Dropout",
    "Embedding",
    "Linear",
    "Module",
    "Parameters",
    "Recurrent",
    "Sequential",
    "get_num_threads",
    "set_num_threads",
]
