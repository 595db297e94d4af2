"""Recurrent networks on CPUs: every cell, forward and backward, at the speed of the FMA units."""

__version__ = "0.1.0"

from nbrnn import data
from nbrnn.cells.cell import Cell
from nbrnn.data.ragged import Ragged
from nbrnn.kernels.jit import get_num_threads, set_num_threads
from nbrnn.layers.check import check_cell
from nbrnn.layers.dropout import Dropout
from nbrnn.layers.embedding import Embedding
from nbrnn.layers.linear import Linear
from nbrnn.layers.module import Module, Parameters
from nbrnn.layers.named import (
    CTRNN,
    GRU,
    LSTM,
    RNN,
    SRU,
    CoupledLSTM,
    IndRNN,
    JordanRNN,
    LayerNormLSTM,
    LiGRU,
    MinGRU,
    PeepholeLSTM,
)
from nbrnn.layers.pooling import AttentionPooling, LastStep, MaxPooling, MeanPooling, RepeatSteps
from nbrnn.layers.recurrent import Recurrent
from nbrnn.layers.sequential import Sequential
from nbrnn.training import callbacks, schedules
from nbrnn.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from nbrnn.training.losses import MAE, MSE, BCEWithLogits, CrossEntropy
from nbrnn.training.metrics import accuracy
from nbrnn.training.optimizers import SGD, Adagrad, Adam, AdamW, RMSprop
from nbrnn.training.trainer import Trainer, TrainingError

__all__ = [
    "CTRNN",
    "GRU",
    "LSTM",
    "MAE",
    "MSE",
    "RNN",
    "SGD",
    "SRU",
    "Adagrad",
    "Adam",
    "AdamW",
    "AttentionPooling",
    "BCEWithLogits",
    "Cell",
    "CheckpointError",
    "CoupledLSTM",
    "CrossEntropy",
    "Dropout",
    "Embedding",
    "IndRNN",
    "JordanRNN",
    "LanguageModel",
    "LastStep",
    "LayerNormLSTM",
    "LiGRU",
    "Linear",
    "MaxPooling",
    "MeanPooling",
    "MinGRU",
    "Module",
    "Parameters",
    "PeepholeLSTM",
    "RMSprop",
    "Ragged",
    "Recurrent",
    "RepeatSteps",
    "Sequential",
    "Trainer",
    "TrainingError",
    "accuracy",
    "callbacks",
    "check_cell",
    "data",
    "get_num_threads",
    "load_checkpoint",
    "save_checkpoint",
    "schedules",
    "set_num_threads",
]


def __getattr__(name: str):
    # The language model brings SciPy and text handling, which an embedded layer does not need.
    if name == "LanguageModel":
        from nbrnn.text.language_model import LanguageModel

        return LanguageModel
    raise AttributeError(f"module 'nbrnn' has no attribute {name!r}")
