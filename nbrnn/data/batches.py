"""Batches of whole sequences of different lengths.

The sequences of a batch have similar lengths, or the batch's last steps would have few rows: an epoch shuffles all
sequences, sorts them by length within pools of some batches, and shuffles the batches. Larger pools waste less and
leave fewer companions to choose from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nbrnn.data.arrays import at_least_one
from nbrnn.data.epochs import RandomEpochs
from nbrnn.data.ragged import Ragged


class RaggedBatches(RandomEpochs):
    """Sequences of different lengths with their targets, grouped by length; an epoch has each of them once.

    Parameters
    ----------
    sequences : Ragged or sequence of array_like, (length, ...) each
        The N sequences; arrays are copied into one Ragged.
    targets : ndarray (N, ...), Ragged, or sequence
        An array, or a sequence of numbers, has a target for each sequence. A Ragged, or a sequence of arrays
        (length, ...), has one for every step.
    batch_size : int
        B, the sequences of a batch; the last batch that is cut has those that are left.
    seed : int, numpy.random.Generator or None, optional
        Where the shuffles come from; None draws a seed from the system.
    shuffle : bool, optional
        False takes the sequences in the order they are in, not grouped by length.
    group : int, optional
        The batches of a pool within which sequences are sorted by length.

    Yields
    ------
    x : Ragged
        B sequences.
    target : ndarray (B, ...) or Ragged
        A target for each of them, or a Ragged with one for each of their steps.

    Raises
    ------
    ValueError
        There are no sequences, their arrays differ in more than their length, the targets are not as many as the
        sequences or not as long, or a size is below 1.
    TypeError
        A size is not an integer.
    """

    def __init__(
        self,
        sequences: Ragged | Sequence[Any],
        targets: np.ndarray | Ragged | Sequence[Any],
        batch_size: int,
        *,
        seed: int | np.random.Generator | None = None,
        shuffle: bool = True,
        group: int = 50,
    ):
        self.batch_size = at_least_one("batch_size", batch_size)
        self.group = at_least_one("group", group)
        self.shuffle = shuffle
        self.sequences = _as_ragged("sequences", sequences)
        if not len(self.sequences):
            raise ValueError("sequences: expected at least one, got none")
        self.targets = _as_targets(targets, self.sequences)
        super().__init__(seed, -(-len(self.sequences) // self.batch_size))

    def _epoch(self, first: int) -> Iterator[tuple[Ragged, np.ndarray | Ragged]]:
        order = self._by_length(self._order(len(self.sequences), self.shuffle))
        for batch in self._order(len(self), self.shuffle)[first:]:
            which = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            whole = isinstance(self.targets, np.ndarray)
            yield self.sequences.take(which), self.targets[which] if whole else self.targets.take(which)

    def _by_length(self, order: np.ndarray) -> np.ndarray:
        """The order with each pool sorted by length; equal lengths stay shuffled."""
        if not self.shuffle:
            return order
        pools = np.arange(len(order)) // (self.group * self.batch_size)
        return order[np.lexsort((self.sequences.lengths[order], pools))]


def _as_ragged(name: str, sequences: Any) -> Ragged:
    if isinstance(sequences, Ragged):
        return sequences
    try:
        return Ragged.from_list(sequences)
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removeprefix('sequences: ')}") from None


def _as_targets(targets: Any, sequences: Ragged) -> np.ndarray | Ragged:
    if not isinstance(targets, (np.ndarray, Ragged)) and all(np.ndim(one) == 0 for one in targets):
        targets = np.asarray(targets)
    if isinstance(targets, np.ndarray) and not targets.ndim:
        raise ValueError("targets: expected one for each sequence, got a single number")
    if len(targets) != len(sequences):
        raise ValueError(f"targets: expected {len(sequences)}, one for each sequence, got {len(targets)}")
    if isinstance(targets, np.ndarray):
        return targets
    targets = _as_ragged("targets", targets)
    differ = np.flatnonzero(targets.lengths != sequences.lengths)
    if len(differ):
        n = differ[0]
        raise ValueError(
            f"targets: expected {sequences.lengths[n]} steps for sequence {n}, as many as it has, got "
            f"{targets.lengths[n]} (one target for a whole sequence is a row of an array)"
        )
    return targets
