"""The trainer: one update is one path from a batch to new parameters, and `fit` repeats it.

    model.vjp -> loss -> pullback -> norm of the gradients -> clip, optimizer

An epoch can be left after any batch, by Ctrl-C or by a power failure, and be taken up from a checkpoint with the same
bits: the trainer's state holds the parameters, the optimizer, the schedule, the random generators of the model, the
recurrent state between two batches and the position in the data.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np

from nbrnn.data.ragged import Ragged
from nbrnn.layers.module import Module, Parameters, check_size
from nbrnn.training import losses, optimizers, schedules
from nbrnn.training.callbacks import Callback
from nbrnn.training.checkpoint import CheckpointError, flatten, unflatten
from nbrnn.training.clipping import Norm, clip_by_value
from nbrnn.training.config import check_number
from nbrnn.training.history import History, Progress, monitored
from nbrnn.training.truncation import Window, check_reset, reset_rows

Loss = Callable[[np.ndarray, np.ndarray], tuple[float, np.ndarray]]
Batches = Iterable[tuple]

NO_BATCHES = "batches: expected at least one batch an epoch, got none (a generator can be iterated only once)"


class TrainingError(ArithmeticError):
    """The loss or a gradient is not finite."""


class Trainer:
    """Trains a model.

    Parameters
    ----------
    model : Module
        What to train.
    loss : callable
        ``loss(y, target) -> (value, dy)``: one of the losses of this package, or a function of yours.
    optimizer : Optimizer
        Its learning rate is the base of the schedule.
    clip_norm : float, optional
        The largest norm of all gradients together: they are scaled down to it.
    clip_value : float, optional
        The largest absolute value of a gradient's element; cut off before the norm is taken.
    schedule : Schedule, optional
        Sets the learning rate before every update; without one `optimizer.lr` is yours to set.
    k2 : int, optional
        Steps of history that gradients flow back through where batches continue each other (see
        `nbrnn.training.truncation`), in whole batches; at least k1, the steps of a batch. None: those of the batch.

    Attributes
    ----------
    steps, epoch : int
        Updates made and epochs completed.
    grads : Parameters
        The gradients of the last update.
    state
        The recurrent state that the next batch begins from, None at the start of an epoch.
    progress : Progress
        Where the current epoch stands.
    history : History
        Records of the epochs completed.
    stop : bool
        Set it in a callback, and `fit` returns after the current step.

    Raises
    ------
    ValueError, TypeError
        An argument is of the wrong kind, or a limit is not above 0.
    """

    def __init__(
        self,
        model: Module,
        loss: Loss,
        optimizer: optimizers.Optimizer,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        schedule: schedules.Schedule | None = None,
        k2: int | None = None,
    ):
        _check_kind("model", model, Module)
        _check_kind("optimizer", optimizer, optimizers.Optimizer)
        _check_kind("schedule", schedule, (schedules.Schedule, type(None)))
        if not callable(loss):
            raise TypeError(f"loss: expected a function of (y, target), got {loss!r}")
        self.model, self.loss, self.optimizer, self.schedule = model, loss, optimizer, schedule
        self.clip_norm, self.clip_value = _limit("clip_norm", clip_norm), _limit("clip_value", clip_value)
        self.k2 = None if k2 is None else check_size("k2", k2)
        self._window = Window(model, self.k2)
        self.grads = Parameters.zeros(model.params.shapes, model.params.flat.dtype)
        self._norm = Norm()
        self.base_lr = optimizer.lr
        self.steps, self.epoch = 0, 0
        self.state: Any = None
        self.progress, self.history, self.stop = Progress(), History(), False
        self._sources: dict[str, Any] = {}  # the batches and the validation of `fit`
        self._positions: dict[str, Any] = {}  # where they are to continue, as far as they have not been told

    # ------------------------------------------------------------------ one update

    def step(self, x: Any, target: Any, state: Any = None, lengths: Any = None, reset: Any = None) -> tuple[float, Any]:
        """Make one update.

        Parameters
        ----------
        x, target : ndarray or Ragged
            One batch, as the model and the loss want it.
        state : optional
            The recurrent state to begin from; None is zeros. No gradient flows back into it (truncated BPTT), unless
            there is a `k2`: then it flows on into the batches before, if this is the state that the last call returned.
        lengths : array_like of int, (B,), optional
            The steps of each row of a padded batch.
        reset : array_like of bool, (B,), optional
            Which rows begin something new, from a state of zeros.

        Returns
        -------
        loss : float
            The batch's loss before the update.
        state_n
            The state at the end of the batch.

        Raises
        ------
        TrainingError
            The loss or a gradient is not finite; parameters and optimizer are as they were before.
        """
        y, state_n, pullback = self._window.vjp(x, state, lengths, reset)
        value, dy = self._loss_of(y, target, lengths)
        if not math.isfinite(value):
            raise self._not_finite(f"the loss is {value}")
        pullback(dy, self.grads)
        scale = self._clip()
        if self.schedule is not None:
            self.optimizer.lr = self.schedule(self.steps, self.base_lr)
        self.optimizer.step(self.model.params.flat, self.grads.flat, scale)
        self.steps += 1
        return value, state_n

    def _clip(self) -> float:
        """Clip the gradients by value, and return the factor that clips their norm."""
        flat = self.grads.flat
        norm = self._norm(flat)  # not finite where an element is not: the check costs no pass of its own
        if not math.isfinite(norm):
            culprit = _first_not_finite(self.grads)
            raise self._not_finite(f"the gradient of {culprit}" if culprit else f"the norm of the gradients is {norm}")
        if self.clip_value is not None:
            clip_by_value(flat, self.clip_value)
            norm = self._norm(flat)
        return 1.0 if self.clip_norm is None or norm <= self.clip_norm else self.clip_norm / norm

    def _not_finite(self, what: str) -> TrainingError:
        return TrainingError(f"step {self.steps + 1}: {what}; the parameters are those before this step")

    def require_finite(self) -> None:
        """Make sure that the parameters are worth keeping.

        Raises
        ------
        TrainingError
            A parameter is not finite: the last update was too large for its dtype.
        """
        culprit = _first_not_finite(self.model.params)
        if culprit:
            raise TrainingError(f"step {self.steps}: the parameter {culprit}")

    # ------------------------------------------------------------------ many updates

    def fit(
        self,
        batches: Batches,
        epochs: int = 1,
        validation: Batches | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> History:
        """Train for some epochs.

        Ctrl-C ends the training after the current step: callbacks get `on_interrupt` (checkpoints are saved) and `fit`
        returns. A second Ctrl-C is a KeyboardInterrupt at once. An epoch left that way, or by `stop`, is completed
        by the next call, also in another process that has loaded the state.

        Parameters
        ----------
        batches : iterable of (x, target), (x, target, lengths) or (x, target, lengths, reset)
            Iterated once per epoch. With an attribute ``carries_state = True`` each batch begins from the recurrent
            state at the end of the one before; an epoch always begins from zeros. With `state_dict` and
            `load_state_dict` it keeps its own position and random state (JSON values, as of the last batch handed
            out), and an iteration after `load_state_dict` continues there; without, an epoch is resumed by skipping.
        epochs : int, optional
            How many epochs to complete; one that was left half-way counts as one.
        validation : iterable of (x, target), optional
            Evaluated at the end of every epoch; a random state of its own is kept as that of `batches` is.
        callbacks : sequence of Callback, optional
            Called in this order.

        Returns
        -------
        History
            `self.history`, with a record for every epoch.

        Raises
        ------
        TrainingError
            A loss or gradient is not finite.
        ValueError, TypeError
            An argument is out of range, or an epoch has no batches.
        """
        goal = self.epoch + check_size("epochs", epochs, least=0)
        if "batches" in self._positions and not hasattr(batches, "load_state_dict"):
            raise TypeError("batches: expected ones with load_state_dict, like those of the epoch to be resumed")
        self._sources = {"batches": batches, "validation": validation}
        if hasattr(validation, "load_state_dict"):
            self._set_position("validation")
        self.stop, self.history.interrupted = False, False
        with self._interruptible():
            try:
                _tell(callbacks, "on_train_begin", self)
                while self.epoch < goal and not self._leaving:
                    if self._train_epoch(batches, callbacks):
                        self._end_epoch(validation, callbacks)
                if self.history.interrupted:
                    _tell(callbacks, "on_interrupt", self)
            finally:
                if self.progress.batches:
                    self._positions = self._data_state()
                _tell(callbacks, "on_train_end", self)
        return self.history

    @property
    def batches_per_epoch(self) -> int | None:
        """The length of the batches of `fit`, None where they have none."""
        batches = self._sources.get("batches")
        return len(batches) if hasattr(batches, "__len__") else None

    @property
    def _leaving(self) -> bool:
        return self.stop or self.history.interrupted

    def _train_epoch(self, batches: Batches, callbacks: Sequence[Callback]) -> bool:
        """Train on the rest of the current epoch; False if it was left before its end."""
        started = time.perf_counter() - self.progress.seconds
        carries = getattr(batches, "carries_state", False)
        for x, target, *rest in self._rest_of(batches):
            value, state = self.step(x, target, self.state, *rest)
            self.state = state if carries else None
            self.progress.add(value, self._items(x, target, *rest[:1]))
            self.progress.seconds = time.perf_counter() - started
            _tell(callbacks, "on_step", self, value)
            if self._leaving:
                return False
        if not self.progress.batches:
            raise ValueError(NO_BATCHES)
        return True

    def _rest_of(self, batches: Batches) -> Batches:
        """The batches of the current epoch that have not been trained on."""
        if self._set_position("batches"):
            return batches
        return islice(batches, self.progress.batches, None)

    def _set_position(self, name: str) -> bool:
        """Let a source continue where it was; False if no position is known."""
        if name not in self._positions:
            return False
        self._sources[name].load_state_dict(self._positions.pop(name))
        return True

    def _end_epoch(self, validation: Batches | None, callbacks: Sequence[Callback]) -> None:
        """Evaluate, keep a record and make ready for the next epoch."""
        validation_loss = None if validation is None else self.evaluate(validation)
        if validation_loss is not None and not math.isfinite(validation_loss):
            raise TrainingError(f"step {self.steps}: the validation loss is {validation_loss}")
        self.epoch += 1
        record = {
            "epoch": self.epoch,
            "step": self.steps,
            "loss": self.progress.loss,
            "validation_loss": validation_loss,
            "lr": self.optimizer.lr,
            "seconds": self.progress.seconds,
            "items_per_second": self.progress.items_per_second,
        }
        self.history.records.append(record)
        self.progress, self.state = Progress(), None
        if self.schedule is not None:
            self.schedule.observe(monitored(record))
        _tell(callbacks, "on_epoch_end", self, record)

    def evaluate(self, batches: Batches) -> float:
        """The mean loss over all target items, in inference: nothing changes in the model.

        Parameters
        ----------
        batches : iterable of (x, target)
            As for `fit`.

        Returns
        -------
        float
            NaN where the model says NaN.

        Raises
        ------
        ValueError
            There are no batches.
        """
        total, state = Progress(), None
        for x, target, *rest in batches:
            lengths, reset = (*rest, None, None)[:2]
            state = reset_rows(state, check_reset(self.model, x, reset))
            y, state = self.model(x, state) if lengths is None else self.model(x, state, lengths)
            total.add(self._loss_of(y, target, lengths)[0], self._items(x, target, lengths))
            if not getattr(batches, "carries_state", False):
                state = None
        if not total.batches:
            raise ValueError(NO_BATCHES)
        return total.loss

    def _loss_of(self, y: Any, target: Any, lengths: Any) -> tuple[float, Any]:
        """The loss and its gradient; the lengths of x are those of y only where the model keeps its steps."""
        return self.loss(y, target) if lengths is None or self.model.changes_time else self.loss(y, target, lengths)

    def _items(self, x: Any, target: Any, lengths: Any = None) -> int:
        """How many things the mean of a batch's loss is taken over."""
        if not isinstance(self.loss, losses.Loss):
            return np.size(target)
        if isinstance(x, Ragged) and self.loss.per == "last":
            lengths = x.lengths
        return self.loss.items(target, None if self.model.changes_time else lengths)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let the first Ctrl-C ask for an end, and the second one be one."""
        # Only the main thread may set handlers, and a process that was told to ignore Ctrl-C goes on ignoring it.
        before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
            yield
            return

        def handle(number, frame):
            if self.history.interrupted:
                raise KeyboardInterrupt
            self.history.interrupted = True

        signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    # ------------------------------------------------------------------ state

    def config(self) -> dict[str, Any]:
        """How the trainer was built, as plain JSON values."""
        return {
            "model": self.model.config(),
            "loss": self.loss.config() if isinstance(self.loss, losses.Loss) else {"name": _name_of(self.loss)},
            "optimizer": self.optimizer.config() | {"lr": self.base_lr},
            "clip_norm": self.clip_norm,
            "clip_value": self.clip_value,
            "schedule": None if self.schedule is None else self.schedule.config(),
            "k2": self.k2,
        }

    def state_dict(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """All that a resumed training needs, for `save_checkpoint`.

        Returns
        -------
        arrays : dict of str to ndarray
            Copies: ``model.<parameter>``, ``optimizer.<vector>``, and ``state.<n>``, the recurrent state
            and the batches that `k2` looks back at.
        meta : dict
            Plain values: `config`, counters, learning rate, random generators, position in the data, history.
        """
        kept = self.optimizer.state_dict()
        skeleton, leaves = flatten((self.state, self._window.tree() if self._continues else []))
        arrays = {f"model.{name}": array for name, array in self.model.state_dict().items()}
        arrays |= {f"optimizer.{name}": value for name, value in kept.items() if isinstance(value, np.ndarray)}
        arrays |= {f"state.{n}": leaf.copy() for n, leaf in enumerate(leaves)}
        meta = {
            "config": self.config(),
            "steps": self.steps,
            "epoch": self.epoch,
            "optimizer": {name: value for name, value in kept.items() if not isinstance(value, np.ndarray)},
            "schedule": {} if self.schedule is None else self.schedule.state_dict(),
            "generators": [generator.bit_generator.state for generator in self.model.generators()],
            "state": skeleton,
            "data": self._data_state(),
            "progress": asdict(self.progress),
            "history": [dict(record) for record in self.history.records],
        }
        return arrays, meta

    @property
    def _continues(self) -> bool:
        """Whether the next batch goes on where the last one ended."""
        return self.state is not None and self.state is self._window.state

    def _data_state(self) -> dict[str, Any]:
        """The positions in the data: where they are, or will be set to."""
        now = {name: s.state_dict() for name, s in self._sources.items() if hasattr(s, "state_dict")}
        return now | self._positions

    def load_state_dict(self, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Continue where the trainer that gave this state was.

        The position in the data is handed to the batches of the next `fit`.

        Parameters
        ----------
        arrays, meta
            What `state_dict` of a trainer with the same `config()` returned.

        Raises
        ------
        CheckpointError
            The state belongs to another kind of training, or is incomplete; nothing has changed then.
        """
        before = self.state_dict()
        try:
            self._load(arrays, meta)
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            self._load(*before)
            raise _as_checkpoint_error(error) from error

    def _load(self, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        _check_config(meta["config"], self.config())
        self.model.load_state_dict(_part(arrays, "model."))
        vectors = _part(arrays, "optimizer.")
        flat = self.grads.flat
        if any((vector.size, vector.dtype) != (flat.size, flat.dtype) for vector in vectors.values()):
            raise CheckpointError("the optimizer's vectors are not of the size and dtype of the parameters")
        self.optimizer.load_state_dict({**meta["optimizer"], **vectors})
        if self.schedule is not None:
            self.schedule.load_state_dict(meta["schedule"])
        generators = self.model.generators()
        if len(generators) != len(meta["generators"]):
            raise CheckpointError(f"{len(meta['generators'])} random generators, but the model has {len(generators)}")
        for generator, state in zip(generators, meta["generators"]):
            generator.bit_generator.state = state
        self.state, window = unflatten(meta["state"], _part(arrays, "state."))
        self._window.load(window, self.state)
        self.progress = Progress.from_dict(meta["progress"])
        self.history = History.from_records(meta["history"])
        self.steps, self.epoch = (check_size(name, meta[name], least=0) for name in ("steps", "epoch"))
        self._positions = dict(meta["data"])

    @classmethod
    def resume(cls, model: Module, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Trainer:
        """The trainer that a checkpoint describes, where it was.

        Parameters
        ----------
        model : Module
            A model of the shape that ``meta["config"]["model"]`` describes; it gets the checkpoint's parameters.
        arrays, meta
            What `load_checkpoint` returned.

        Raises
        ------
        CheckpointError
            The state does not fit the model or is incomplete, or the loss, optimizer or schedule is not one of this
            package (then build a trainer yourself and call `load_state_dict`).
        """
        try:
            config = meta["config"]
            trainer = cls(
                model,
                losses.from_config(config["loss"]),
                optimizers.from_config(config["optimizer"]),
                config["clip_norm"],
                config["clip_value"],
                None if config["schedule"] is None else schedules.from_config(config["schedule"]),
                config["k2"],
            )
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise _as_checkpoint_error(error) from error
        trainer.load_state_dict(arrays, meta)
        return trainer


def _first_not_finite(parameters: Parameters) -> str | None:
    """The first element that is not finite, in words."""
    places = np.flatnonzero(~np.isfinite(parameters.flat))
    return f"{parameters.name_of(places[0])} holds {parameters.flat[places[0]]}" if places.size else None


def _tell(callbacks: Sequence[Callback], hook: str, *args: Any) -> None:
    for callback in callbacks:
        getattr(callback, hook)(*args)


def _check_kind(name: str, value: Any, kind: Any) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {getattr(kind, '__name__', 'a schedule or None')}, got {value!r}")


def _limit(name: str, value: Any) -> float | None:
    """An optional number above zero."""
    if value is not None and not check_number(name, value):
        raise ValueError(f"{name}: expected a number above 0, got {value!r}")
    return None if value is None else float(value)


def _name_of(loss: Loss) -> str:
    return getattr(loss, "__name__", type(loss).__name__)


def _part(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _check_config(theirs: Any, ours: dict[str, Any]) -> None:
    # through JSON, where tuples and lists are one
    theirs, ours = json.loads(json.dumps(theirs)), json.loads(json.dumps(ours))
    for name, value in ours.items():
        if theirs[name] != value:
            raise CheckpointError(f"{name}: the checkpoint has {theirs[name]}, this trainer {value}")


def _as_checkpoint_error(error: Exception) -> CheckpointError:
    return CheckpointError(f"checkpoint: {f'{error} is missing' if isinstance(error, KeyError) else error}")
