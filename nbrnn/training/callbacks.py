"""Callbacks: what happens around the updates of `Trainer.fit`."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nbrnn.layers.module import check_size
from nbrnn.training.checkpoint import save_checkpoint
from nbrnn.training.config import check_number
from nbrnn.training.history import monitored
from nbrnn.training.losses import CrossEntropy

if TYPE_CHECKING:
    from nbrnn.training.trainer import Trainer

Record = Mapping[str, Any]


class Callback:
    """Base of the callbacks: hooks that do nothing."""

    def on_train_begin(self, trainer: Trainer) -> None:
        """`fit` begins."""

    def on_step(self, trainer: Trainer, loss: float) -> None:
        """An update has been made; `loss` is its batch's."""

    def on_epoch_end(self, trainer: Trainer, record: Record) -> None:
        """An epoch is complete and evaluated; `record` is the last of the trainer's history."""

    def on_interrupt(self, trainer: Trainer) -> None:
        """Ctrl-C has ended the training after a step."""

    def on_train_end(self, trainer: Trainer) -> None:
        """`fit` ends, with an error or without."""


class EarlyStopping(Callback):
    """Stop when the loss no longer falls: the validation's where there is one.

    Parameters
    ----------
    patience : int
        Epochs in a row without a lower loss after which training stops, at least 1.
    min_delta : float, optional
        By how much a loss must be below the lowest so far to count as lower.

    Raises
    ------
    ValueError, TypeError
        An argument is out of range.
    """

    def __init__(self, patience: int, min_delta: float = 0.0):
        self.patience = check_size("patience", patience)
        self.min_delta = check_number("min_delta", min_delta)

    def on_epoch_end(self, trainer: Trainer, record: Record) -> None:
        # From the whole history, so that a resumed training stops where an uninterrupted one would.
        lowest, waited = math.inf, 0
        for loss in map(monitored, trainer.history.records):
            waited += 1
            if loss < lowest - self.min_delta:
                lowest, waited = loss, 0
        if waited >= self.patience:
            trainer.stop = True


class Checkpointing(Callback):
    """Save the training, so that it can be resumed: at the end of epochs, between steps, and at Ctrl-C.

    Parameters
    ----------
    path : path-like
        The file, replaced every time.
    every_epochs : int, optional
        Save after so many epochs.
    every_steps : int, optional
        Save also after so many updates.
    best_path : path-like, optional
        A second file, which keeps the epoch with the lowest loss (the validation's where there is one).
    extra : mapping, optional
        What else the file should tell, such as a vocabulary: JSON values, found again as ``meta["extra"]``.

    Raises
    ------
    ValueError, TypeError
        An argument is out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        every_epochs: int = 1,
        every_steps: int | None = None,
        best_path: str | os.PathLike | None = None,
        extra: Mapping[str, Any] | None = None,
    ):
        self.path, self.best_path = path, best_path
        self.every_epochs = check_size("every_epochs", every_epochs)
        self.every_steps = None if every_steps is None else check_size("every_steps", every_steps)
        self.extra = {} if extra is None else dict(extra)

    def save(self, trainer: Trainer, path: str | os.PathLike | None = None) -> None:
        """Save now, to `path` or the usual place; parameters that are not finite are a TrainingError instead."""
        trainer.require_finite()
        arrays, meta = trainer.state_dict()
        save_checkpoint(self.path if path is None else path, arrays, meta | {"extra": self.extra})

    def on_step(self, trainer: Trainer, loss: float) -> None:
        if self.every_steps is not None and trainer.steps % self.every_steps == 0:
            self.save(trainer)

    def on_epoch_end(self, trainer: Trainer, record: Record) -> None:
        if trainer.epoch % self.every_epochs == 0:
            self.save(trainer)
        if self.best_path is not None and monitored(record) <= min(map(monitored, trainer.history.records)):
            self.save(trainer, self.best_path)

    def on_interrupt(self, trainer: Trainer) -> None:
        self.save(trainer)


class ProgressBar(Callback):
    """Show how the training is doing: a bar on a terminal, else one line an epoch.

    Parameters
    ----------
    file : text stream, optional
        Where to, by default ``sys.stderr``.
    """

    def __init__(self, file: Any = None):
        self.file = sys.stderr if file is None else file
        self._bar: Any = None

    def on_step(self, trainer: Trainer, loss: float) -> None:
        if not self.file.isatty():
            return
        if self._bar is None:
            self._bar = self._new_bar(trainer)
        self._bar.set_postfix_str(_summary(trainer, trainer.progress.loss, trainer.progress.items_per_second), False)
        self._bar.update(trainer.progress.batches - self._bar.n)

    def _new_bar(self, trainer: Trainer) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=trainer.batches_per_epoch,
            desc=f"epoch {trainer.epoch + 1}",
            file=self.file,
            leave=False,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {remaining}{postfix}",
        )

    def on_epoch_end(self, trainer: Trainer, record: Record) -> None:
        self._close()
        line = _summary(trainer, record["loss"], record["items_per_second"], record["validation_loss"])
        print(f"epoch {record['epoch']}: {line}", file=self.file, flush=True)

    def on_train_end(self, trainer: Trainer) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _summary(trainer: Trainer, loss: float, rate: float, validation: float | None = None) -> str:
    """At most 70 columns: the loss, with its perplexity where it is a cross entropy, and the speed."""
    if not isinstance(trainer.loss, CrossEntropy):
        held_out = "" if validation is None else f" (validation {validation:.4g})"
        return f"loss {loss:.4g}{held_out}, {rate:,.0f} items/s"
    held_out = "" if validation is None else f" (validation {_perplexity(validation):.4g})"
    return f"loss {loss:.4f}, perplexity {_perplexity(loss):.4g}{held_out}, {rate:,.0f} tokens/s"


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # which does not overflow
