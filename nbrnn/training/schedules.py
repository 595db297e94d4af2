"""Learning-rate schedules: ``schedule(step, base) -> lr``.

`step` counts the updates made before, and `base` is the learning rate that the optimizer was given. A trainer asks
before every update, and calls `observe` with the loss at the end of every epoch.

    Constant                      base
    Step(every, factor)           base factor^floor(step / every)
    Cosine(total, final)          from base to final along half a cosine in `total` steps, final from then on
    WarmUp(steps, then)           base (step + 1) / steps, then another schedule, which counts from 0
    OnPlateau(factor, patience)   base, times factor whenever the loss has not fallen for longer than `patience` epochs
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nbrnn.layers.module import check_size
from nbrnn.training.config import Configured, build, check_number


class Schedule(Configured):
    """Base of the schedules."""

    def __call__(self, step: int, base: float) -> float:
        """The learning rate of the update that `step` others came before."""
        raise NotImplementedError

    def observe(self, loss: float) -> None:
        """Take note of an epoch's loss: the validation's where there is one."""

    def state_dict(self) -> dict[str, Any]:
        """What `observe` has noted, as plain JSON values."""
        return {}

    def load_state_dict(self, mapping: Mapping[str, Any]) -> None:
        """Continue where the schedule that gave `mapping` was.

        Raises
        ------
        ValueError, TypeError
            `mapping` is not the state of such a schedule; nothing has changed then.
        """
        if mapping:
            raise ValueError(f"state: expected nothing for {self!r}, got {mapping!r}")


class Constant(Schedule):
    """The base learning rate at every step."""

    def __call__(self, step: int, base: float) -> float:
        return base


class Step(Schedule):
    """The base learning rate, multiplied by `factor` after every `every` steps.

    Parameters
    ----------
    every : int
        Steps, at least 1.
    factor : float
        0 or more.

    Raises
    ------
    ValueError, TypeError
        An argument is out of range.
    """

    arguments = ("every", "factor")

    def __init__(self, every: int, factor: float):
        self.every = check_size("every", every)
        self.factor = check_number("factor", factor)

    def __call__(self, step: int, base: float) -> float:
        return base * self.factor ** (step // self.every)


class Cosine(Schedule):
    """From the base learning rate to `final` along half a cosine (Loshchilov and Hutter 2017, without restarts).

    Parameters
    ----------
    total : int
        Steps, at least 1, after which the learning rate is `final`.
    final : float, optional
        A learning rate, 0 or more.

    Raises
    ------
    ValueError, TypeError
        An argument is out of range.
    """

    arguments = ("total", "final")

    def __init__(self, total: int, final: float = 0.0):
        self.total = check_size("total", total)
        self.final = check_number("final", final)

    def __call__(self, step: int, base: float) -> float:
        done = min(step / self.total, 1.0)
        return self.final + (base - self.final) * (1.0 + math.cos(math.pi * done)) / 2.0


class WarmUp(Schedule):
    """A rise in `steps` equal steps to the base learning rate, then another schedule.

    Parameters
    ----------
    steps : int
        At least 1.
    then : Schedule, optional
        What follows, its steps counted from the end of the rise; constant by default.

    Raises
    ------
    ValueError, TypeError
        An argument is out of range or not a schedule.
    """

    arguments = ("steps", "then")

    def __init__(self, steps: int, then: Schedule | Mapping[str, Any] | None = None):
        self.steps = check_size("steps", steps)
        then = from_config(then) if isinstance(then, Mapping) else then
        self.then = Constant() if then is None else then
        if not isinstance(self.then, Schedule):
            raise TypeError(f"then: expected a schedule, got {then!r}")

    def __call__(self, step: int, base: float) -> float:
        if step < self.steps:
            return base * (step + 1) / self.steps
        return self.then(step - self.steps, base)

    def observe(self, loss: float) -> None:
        self.then.observe(loss)

    def state_dict(self) -> dict[str, Any]:
        return self.then.state_dict()

    def load_state_dict(self, mapping: Mapping[str, Any]) -> None:
        self.then.load_state_dict(mapping)


class OnPlateau(Schedule):
    """The base learning rate, multiplied by `factor` whenever the loss stops falling.

    Parameters
    ----------
    factor : float, optional
        In [0, 1).
    patience : int, optional
        Epochs without a lower loss that are put up with; the one after them reduces the learning rate.
    threshold : float, optional
        The part of the lowest loss so far by which a loss must be below it to count as lower.

    Raises
    ------
    ValueError, TypeError
        An argument is out of range.
    """

    arguments = ("factor", "patience", "threshold")

    def __init__(self, factor: float = 0.1, patience: int = 10, threshold: float = 1e-4):
        self.factor = check_number("factor", factor, below=1.0)
        self.patience = check_size("patience", patience, least=0)
        self.threshold = check_number("threshold", threshold, below=1.0)
        self._best: float | None = None
        self._waited = 0
        self._reductions = 0

    def __call__(self, step: int, base: float) -> float:
        return base * self.factor**self._reductions

    def observe(self, loss: float) -> None:
        if self._best is None or loss < self._best * (1.0 - self.threshold):
            self._best, self._waited = loss, 0
            return
        self._waited += 1
        if self._waited > self.patience:
            self._waited, self._reductions = 0, self._reductions + 1

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "waited": self._waited, "reductions": self._reductions}

    def load_state_dict(self, mapping: Mapping[str, Any]) -> None:
        if set(mapping) != set(self.state_dict()):
            raise ValueError(f"state: expected {', '.join(self.state_dict())}, got {mapping!r}")
        best = mapping["best"] if mapping["best"] is None else check_number("best", mapping["best"], least=-math.inf)
        waited, reductions = (check_size(name, mapping[name], least=0) for name in ("waited", "reductions"))
        self._best, self._waited, self._reductions = best, waited, reductions


def from_config(config: Any) -> Schedule:
    """The schedule whose `config()` this is, before its first step.

    Raises
    ------
    ValueError, TypeError
        It describes none of the schedules above.
    """
    return build(config, (Constant, Step, Cosine, WarmUp, OnPlateau))
