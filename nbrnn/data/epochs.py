"""What all batches have in common: an epoch is one iteration, and one that was left can be gone on with.

    Epochs          counts the batches of the current epoch, and begins with the one after those counted
    DrawnEpochs     keeps the random state that the epoch began with as well, and draws the same epoch from it again
    RandomEpochs    the same of a known number of batches

A subclass says what an epoch is made of, in `_epoch`. Everything random is drawn at an epoch's beginning, so that the
state is that of the beginning and a number of batches, wherever in the epoch it is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


class Epochs:
    """Batches that are iterated once per epoch and can be resumed within one."""

    carries_state = False
    _batches: int | None = None  # in an epoch, where that is known

    def __init__(self) -> None:
        self._position = 0
        self._resume_at = 0

    def __iter__(self) -> Iterator[tuple]:
        self._position, self._resume_at = self._resume_at, 0
        for position, batch in enumerate(self._epoch(self._position), self._position + 1):
            self._position = position
            yield batch
        self._position = 0

    def _epoch(self, first: int) -> Iterator[tuple]:
        """The batches of an epoch, from number `first`; it has drawn all that is random before it yields or ends."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Where the current epoch is, as plain JSON values: the batches taken."""
        return {"position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as the batches that gave `state` would: the next iteration goes on with that epoch's next batch.

        Parameters
        ----------
        state : mapping
            What `state_dict` returned for batches of the same data with the same sizes.

        Raises
        ------
        ValueError
            The state does not belong to such batches; nothing has changed then.
        """
        self._position = self._resume_at = self._position_in(state)

    def _position_in(self, state: Mapping[str, Any]) -> int:
        position, last = state.get("position"), self._batches
        if not isinstance(position, int) or position < 0 or (last is not None and position > last):
            bounds = "a position from 0" if last is None else f"a position from 0 to {last}"
            raise ValueError(f"state: expected {bounds}, got {position!r}")
        return position


class DrawnEpochs(Epochs):
    """Epochs that are drawn from a generator.

    Parameters
    ----------
    seed : int, numpy.random.Generator or None
        None draws a seed from the system.
    """

    def __init__(self, seed: int | np.random.Generator | None):
        super().__init__()
        self._generator = np.random.default_rng(seed)
        self._epoch_began = self._generator.bit_generator.state

    def __iter__(self) -> Iterator[tuple]:
        self._epoch_began = self._generator.bit_generator.state
        yield from super().__iter__()
        self._epoch_began = self._generator.bit_generator.state

    def _order(self, items: int, shuffle: bool) -> np.ndarray:
        """The numbers below `items`, shuffled or not."""
        return self._generator.permutation(items) if shuffle else np.arange(items)

    def state_dict(self) -> dict[str, Any]:
        """Where the current epoch is, as plain JSON values: the batches taken and the random state it began with."""
        return super().state_dict() | {"generator": self._epoch_began}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._position_in(state)  # before anything changes
        try:
            self._generator.bit_generator.state = state.get("generator")
        except (TypeError, ValueError, KeyError) as error:
            name = type(self._generator.bit_generator).__name__
            raise ValueError(f"state: expected the random state of a {name} generator ({error})") from None
        self._epoch_began = self._generator.bit_generator.state
        super().load_state_dict(state)


class RandomEpochs(DrawnEpochs):
    """Epochs of a known length that are drawn from a generator.

    Parameters
    ----------
    seed : int, numpy.random.Generator or None
        None draws a seed from the system.
    batches : int
        The batches of every epoch.
    """

    def __init__(self, seed: int | np.random.Generator | None, batches: int):
        super().__init__(seed)
        self._batches: int = batches

    def __len__(self) -> int:
        """Batches per epoch, the same in every epoch."""
        return self._batches
