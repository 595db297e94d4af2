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

from collections.abc import Iterator

import numpy as np

from nbrnn.data.arrays import as_tokens, at_least_one
from nbrnn.data.epochs import RandomEpochs


class _Windows(RandomEpochs):
    """Windows of `num_steps` tokens, `batch_size` at a time, that start where `_starts` says."""

    def __init__(
        self,
        tokens: np.ndarray,
        num_steps: int,
        batch_size: int,
        *,
        seed: int | np.random.Generator | None = None,
        random_offset: bool = True,
    ):
        self.num_steps = at_least_one("num_steps", num_steps)
        self.batch_size = at_least_one("batch_size", batch_size)
        self.tokens = as_tokens("tokens", tokens)
        needed = self.num_steps * self.batch_size + 1  # the last target lies one token beyond its window
        if self.tokens.size < needed:
            raise ValueError(
                f"tokens: one batch of {self.batch_size} windows of {self.num_steps} steps needs {needed:,} tokens, "
                f"got {self.tokens.size:,}"
            )
        super().__init__(seed, (self.tokens.size - 1) // (self.num_steps * self.batch_size))
        self._random_offset = random_offset

    def _epoch(self, first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        starts = self._starts(self._offset())
        steps = np.arange(self.num_steps)[:, None]
        for row in starts[first:]:
            where = row + steps
            yield self.tokens[where], self.tokens[where + 1]

    def _offset(self) -> int:
        if not self._random_offset:
            return 0
        spare = self.tokens.size - 1 - self._batches * self.num_steps * self.batch_size
        return int(self._generator.integers(min(self.num_steps, spare + 1)))

    def _starts(self, offset: int) -> np.ndarray:
        """Where the windows of one epoch start: integers `(batches, batch_size)`, none below `offset`."""
        raise NotImplementedError


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
