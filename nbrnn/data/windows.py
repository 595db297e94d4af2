"""The two ways to cut a long text into batches: shuffled windows, or parallel streams.

Both yield `(x, target)`, integer arrays `(T, B)` where `target` is `x` one token later, and both are iterated once per
epoch. An epoch is a table of window starts, drawn when it begins: the classes differ in that table and in nothing else.

    RandomWindows       the windows of a batch have nothing to do with one another, nor with the next batch's:
                        every batch begins from a state of zeros
    SequentialWindows   row b of a batch continues row b of the batch before: `carries_state` tells the trainer to
                        carry the recurrent state, so that history reaches beyond the T steps of a window

Each epoch begins at a random offset below T, so that the same tokens are not always the ones without history.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


class _Windows:
    """Windows of `num_steps` tokens, `batch_size` at a time, that start where `_starts` says."""

    carries_state = False

    def __init__(
        self,
        tokens: np.ndarray,
        num_steps: int,
        batch_size: int,
        *,
        seed: int | np.random.Generator | None = None,
        random_offset: bool = True,
    ):
        self.num_steps = _at_least_one("num_steps", num_steps)
        self.batch_size = _at_least_one("batch_size", batch_size)
        self.tokens = _as_tokens(tokens)
        needed = self.num_steps * self.batch_size + 1  # the last target lies one token beyond its window
        if self.tokens.size < needed:
            raise ValueError(
                f"tokens: one batch of {self.batch_size} windows of {self.num_steps} steps needs {needed:,} tokens, "
                f"got {self.tokens.size:,}"
            )
        self._batches = (self.tokens.size - 1) // (self.num_steps * self.batch_size)
        self._random_offset = random_offset
        self._generator = np.random.default_rng(seed)
        self._epoch_began = self._generator.bit_generator.state
        self._position = 0
        self._resume_at = 0

    def __len__(self) -> int:
        """Batches per epoch, the same in every epoch."""
        return self._batches

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        self._position, self._resume_at = self._resume_at, 0
        self._epoch_began = self._generator.bit_generator.state
        starts = self._starts(self._offset())
        steps = np.arange(self.num_steps)[:, None]
        for batch in range(self._position, self._batches):
            self._position = batch + 1
            where = starts[batch] + steps
            yield self.tokens[where], self.tokens[where + 1]
        self._position = 0
        self._epoch_began = self._generator.bit_generator.state

    def _offset(self) -> int:
        if not self._random_offset:
            return 0
        spare = self.tokens.size - 1 - self._batches * self.num_steps * self.batch_size
        return int(self._generator.integers(min(self.num_steps, spare + 1)))

    def _starts(self, offset: int) -> np.ndarray:
        """Where the windows of one epoch start: integers `(batches, batch_size)`, none below `offset`."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Where the current epoch is, as plain JSON values: the batches taken and the random state it began with."""
        return {"position": self._position, "generator": self._epoch_began}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as the windows that gave `state` would: the next iteration goes on with that epoch's next batch.

        Parameters
        ----------
        state : mapping
            What `state_dict` returned for windows over the same tokens with the same sizes.

        Raises
        ------
        ValueError
            The position or the random state does not belong to such windows; nothing has changed then.
        """
        position = state.get("position")
        if not isinstance(position, int) or not 0 <= position <= self._batches:
            raise ValueError(f"state: expected a position from 0 to {self._batches}, got {position!r}")
        try:
            self._generator.bit_generator.state = state.get("generator")
        except (TypeError, ValueError, KeyError) as error:
            name = type(self._generator.bit_generator).__name__
            raise ValueError(f"state: expected the random state of a {name} generator ({error})") from None
        self._epoch_began = self._generator.bit_generator.state
        self._position = self._resume_at = position


class RandomWindows(_Windows):
    """Random sampling: an epoch is all windows of the text, in shuffled order.

    Parameters
    ----------
    tokens : array_like of int, shape (N,)
        The text, as token ids.
    num_steps : int
        T, the tokens of a window.
    batch_size : int
        B, the windows of a batch.
    seed : int, numpy.random.Generator or None, optional
        Where offsets and shuffles come from; None draws a seed from the system.
    random_offset : bool, optional
        False begins every epoch at the first token.

    Yields
    ------
    x, target : ndarray of int32, shape (T, B)
        The windows, one to a column, and the same one token later.

    Raises
    ------
    ValueError
        `tokens` is not a vector of non-negative integers below 2**31, is shorter than one batch (T * B + 1 tokens), or
        a size is below 1.
    TypeError
        A size or the tokens are not integers.
    """

    def _starts(self, offset: int) -> np.ndarray:
        windows = (self.tokens.size - 1 - offset) // self.num_steps
        order = self._generator.permutation(windows)[: self._batches * self.batch_size]
        return offset + self.num_steps * order.reshape(self._batches, self.batch_size)


class SequentialWindows(_Windows):
    """Sequential partitioning: the text is cut into B streams, and consecutive batches continue the streams.

    Parameters
    ----------
    tokens : array_like of int, shape (N,)
        The text, as token ids.
    num_steps : int
        T, the tokens of a stream in one batch.
    batch_size : int
        B, the streams.
    seed : int, numpy.random.Generator or None, optional
        Where the offsets come from; None draws a seed from the system.
    random_offset : bool, optional
        False begins every epoch at the first token, as a validation that is to be comparable wants.

    Yields
    ------
    x, target : ndarray of int32, shape (T, B)
        The streams, one to a column, and the same one token later.

    Raises
    ------
    ValueError
        `tokens` is not a vector of non-negative integers below 2**31, is shorter than one batch (T * B + 1 tokens), or
        a size is below 1.
    TypeError
        A size or the tokens are not integers.
    """

    carries_state = True

    def _starts(self, offset: int) -> np.ndarray:
        stream = (self.tokens.size - 1 - offset) // self.batch_size
        return offset + np.add.outer(self.num_steps * np.arange(self._batches), stream * np.arange(self.batch_size))


def _at_least_one(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return int(value)


def _as_tokens(tokens: Any) -> np.ndarray:
    array = np.asarray(tokens)
    if array.ndim != 1:
        raise ValueError(f"tokens: expected one dimension, got shape {array.shape}")
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"tokens: expected integers, got dtype {array.dtype}")
    if array.size and not (array.min() >= 0 and array.max() < 2**31):
        raise ValueError(f"tokens: expected ids from 0 to 2**31 - 1, got {array.min()} to {array.max()}")
    return array.astype(np.int32)
