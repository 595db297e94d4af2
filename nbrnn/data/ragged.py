"""Sequences of different lengths, one behind the other in one array.

    values   [N, ...]   all steps of the first sequence, then all of the second, and so on
    offsets  [B + 1]    sequence b is values[offsets[b] : offsets[b + 1]]

Nothing is stored, and nothing is computed, for steps that are not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


class Ragged:
    """A batch of sequences of different lengths.

    Parameters
    ----------
    values : array_like, (N, ...)
        The steps of all sequences.
    offsets : array_like of int, (B + 1,)
        Where each sequence begins, and N behind the last: from 0, never decreasing.

    Attributes
    ----------
    values : ndarray
    offsets : ndarray of int64
    lengths : ndarray of int64, (B,)

    Raises
    ------
    TypeError
        The offsets are not integers.
    ValueError
        They do not begin with 0, decrease, or do not end with the number of values.

    Examples
    --------
    >>> batch = Ragged.from_list([np.ones((3, 2)), np.ones((0, 2)), np.ones((5, 2))])
    >>> batch.lengths
    array([3, 0, 5])
    """

    def __init__(self, values: Any, offsets: Any):
        self.values = np.asarray(values)
        if self.values.ndim == 0:
            raise ValueError("values: expected (N, ...), got a single number")
        offsets = np.asarray(offsets)
        if offsets.dtype.kind not in "iu":
            raise TypeError(f"offsets: expected integers, got {offsets.dtype}")
        if offsets.ndim != 1 or not len(offsets):
            raise ValueError(f"offsets: expected (B + 1,), got {offsets.shape}")
        self.offsets = offsets.astype(np.int64)
        if self.offsets[0] != 0 or (np.diff(self.offsets) < 0).any():
            raise ValueError(f"offsets: expected numbers from 0 that never decrease, got {offsets}")
        if self.offsets[-1] != len(self.values):
            raise ValueError(
                f"offsets: expected {len(self.values)}, the number of values, at the end, got {offsets[-1]}"
            )

    # -------------------------------------------------------------- from other forms

    @classmethod
    def from_list(cls, sequences: Sequence[Any]) -> Ragged:
        """From an array for each sequence, (length, ...).

        Raises
        ------
        ValueError
            There is none, or they differ in more than their length.
        """
        arrays = [np.asarray(one) for one in sequences]
        if not arrays:
            raise ValueError("sequences: expected at least one array, got none")
        shapes = {one.shape[1:] if one.ndim else None for one in arrays}
        if len(shapes) != 1 or None in shapes:
            raise ValueError(
                f"sequences: expected (length, ...) of one shape behind it, got {[a.shape for a in arrays]}"
            )
        if len({one.dtype for one in arrays}) != 1:
            raise ValueError(f"sequences: expected one dtype, got {sorted({str(a.dtype) for a in arrays})}")
        return cls(np.concatenate(arrays), np.cumsum([0] + [len(one) for one in arrays]))

    @classmethod
    def from_padded(cls, x: Any, lengths: Any, batch_first: bool = False) -> Ragged:
        """From (T, B, ...) and the lengths (B,); with `batch_first` from (B, T, ...).

        Raises
        ------
        TypeError, ValueError
            The lengths are not B integers from 0 to T.
        """
        x = _rows_first(x, batch_first)
        lengths = check_lengths(lengths, x.shape[1], x.shape[0])
        return cls(x[np.arange(x.shape[1]) < lengths[:, None]], np.append(0, np.cumsum(lengths)))

    @classmethod
    def from_mask(cls, x: Any, mask: Any, batch_first: bool = False) -> Ragged:
        """From (T, B, ...) and booleans (T, B) that are true where a step is; with `batch_first` (B, T).

        Raises
        ------
        TypeError, ValueError
            The mask is not boolean, of another shape, or a step is missing before the last of its sequence.
        """
        x, mask = _rows_first(x, batch_first), np.asarray(mask)
        if mask.dtype != bool:
            raise TypeError(f"mask: expected booleans, got {mask.dtype}")
        shape = x.shape[:2] if batch_first else x.shape[1::-1]
        if mask.shape != shape:
            raise ValueError(f"mask: expected {shape}, got {mask.shape}")
        mask = mask if batch_first else mask.T
        lengths = mask.sum(axis=1)
        if not (mask == (np.arange(mask.shape[1]) < lengths[:, None])).all():
            raise ValueError("mask: expected every sequence to begin at the first step and to have no gaps")
        return cls(x[mask], np.append(0, np.cumsum(lengths)))

    # -------------------------------------------------------------- into other forms

    def to_list(self) -> list[np.ndarray]:
        """A view of each sequence."""
        return list(self)

    def to_padded(
        self, batch_first: bool = False, fill: Any = 0, steps: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(T, B, ...), filled up with `fill`, and the lengths (B,); T is `steps` or the greatest length."""
        most = int(self.lengths.max(initial=0))
        if steps is not None and steps < most:
            raise ValueError(f"steps: expected at least {most}, the greatest length, got {steps}")
        shape = (len(self), most if steps is None else steps, *self.values.shape[1:])
        padded = np.full(shape, fill, self.values.dtype)
        padded[np.arange(shape[1]) < self.lengths[:, None]] = self.values
        return (padded if batch_first else padded.swapaxes(0, 1)), self.lengths

    def mask(self, batch_first: bool = False) -> np.ndarray:
        """Booleans (T, B), true where a step is."""
        mask = np.arange(self.lengths.max(initial=0)) < self.lengths[:, None]
        return mask if batch_first else mask.T

    # -------------------------------------------------------------- as a container

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    @property
    def size(self) -> int:
        return self.values.size

    def with_values(self, values: Any) -> Ragged:
        """Other values for the same steps, (N, ...)."""
        values = np.asarray(values)
        if values.ndim == 0 or len(values) != len(self.values):
            return Ragged(values, self.offsets)  # which says what is wrong
        other = object.__new__(Ragged)
        other.values, other.offsets = values, self.offsets
        return other

    def values_of(self, name: str, other: Any) -> np.ndarray:
        """The values of another Ragged of the same steps, or a clear error."""
        if not isinstance(other, Ragged):
            raise TypeError(f"{name}: expected a Ragged, got {type(other).__name__}")
        if not np.array_equal(other.offsets, self.offsets):
            raise ValueError(f"{name}: expected the lengths {self.lengths}, got {other.lengths}")
        return other.values

    def take(self, which: Any) -> Ragged:
        """Some of the sequences, in the order of the indices `which`."""
        which = np.asarray(which)
        which = np.arange(len(self))[which if which.size else which.astype(np.int64)]
        lengths = self.lengths[which]
        starts = np.cumsum(lengths) - lengths
        steps = np.arange(lengths.sum()) + np.repeat(self.offsets[:-1][which] - starts, lengths)
        return Ragged(self.values[steps], np.append(0, np.cumsum(lengths)))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, n: int | slice) -> np.ndarray | Ragged:
        """Sequence n as a view; or some sequences as another Ragged."""
        if isinstance(n, slice):
            return self.take(np.arange(len(self))[n])
        n = range(len(self))[n]
        return self.values[self.offsets[n] : self.offsets[n + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[n] for n in range(len(self)))

    def __repr__(self) -> str:
        L, shape = self.lengths, self.values.shape[1:]
        each = f" of {', '.join(map(str, shape))}" if shape else ""
        steps = f"{L.min()} to {L.max()} steps" if len(self) else "no steps"
        return f"Ragged({len(self)} sequences, {steps}{each}, {self.dtype})"


def check_lengths(lengths: Any, T: int, B: int) -> np.ndarray:
    """Lengths as int64, or a clear error."""
    lengths = np.asarray(lengths)
    lengths = lengths if lengths.size else lengths.astype(np.int64)
    if lengths.dtype.kind not in "iu":
        raise TypeError(f"lengths: expected integers, got {lengths.dtype}")
    if lengths.shape != (B,):
        raise ValueError(f"lengths: expected ({B},), one for each row, got {lengths.shape}")
    if B and (lengths.min() < 0 or lengths.max() > T):
        raise ValueError(f"lengths: expected numbers from 0 to {T}, got {lengths.min()} to {lengths.max()}")
    return lengths.astype(np.int64)


def _rows_first(x: Any, batch_first: bool) -> np.ndarray:
    x = np.asarray(x)
    if x.ndim < 2:
        raise ValueError(f"x: expected {'(B, T, ...)' if batch_first else '(T, B, ...)'}, got {x.shape}")
    return x if batch_first else x.swapaxes(0, 1)
