"""The sequences of one call: how they look outside, and how they lie inside.

Outside they are one of

    (T, .)       one sequence
    (T, B, .)    a batch, or (B, T, .), perhaps with the lengths of its rows
    Ragged       all steps one behind the other

and inside always [N, .], step by step, the rows of a step sorted by their lengths (`nbrnn.kernels.scan`). A batch
without lengths already lies so.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from nbrnn.data.ragged import Ragged, check_lengths
from nbrnn.kernels import gemm
from nbrnn.kernels.jit import run
from nbrnn.kernels.schedule import shards_for

Rows = slice | np.ndarray


class Steps:
    """Which rows take part in every time step, and where they lie.

    Parameters
    ----------
    lengths : ndarray of int64, (B,)
        Steps of each row, in falling order.

    Attributes
    ----------
    T, B, N : int
        Time steps, rows, and all steps of all rows.
    starts, slots : ndarray of int64, (T + 1,) and (T + 3,)
        See `nbrnn.kernels.scan`.
    """

    def __init__(self, lengths: np.ndarray):
        self.lengths, self.B = lengths, len(lengths)
        self.T = int(lengths[0]) if self.B else 0
        self.even = not self.B or lengths[-1] == self.T
        self.starts, self.slots = _starts(lengths), _starts(lengths + 2)
        self.N = int(self.starts[-1])

    @cached_property
    def time(self) -> np.ndarray:
        """The time step of each of the N."""
        return np.repeat(np.arange(self.T), np.diff(self.starts))

    @cached_property
    def row(self) -> np.ndarray:
        """The row of each of the N."""
        return np.arange(self.N) - self.starts[self.time]

    def rows(self, first: int, stop: int, reverse: int) -> slice:
        """Which of the N are those of some steps of a scan, which may read from the end."""
        t0, t1 = (self.T - stop, self.T - first) if reverse else (first, stop)
        return slice(int(self.starts[t0]), int(self.starts[t1]))

    def slot(self, after: int) -> Rows:
        """Where each of the N finds the slot so many after its own time."""
        if self.even:
            return slice(after * self.B, after * self.B + self.N)
        return self.slots[self.time + after] + self.row

    def outputs(self, y: np.ndarray) -> np.ndarray:
        """The outputs [N, .] that lie in the slots of y."""
        slot = self.slot(1)
        return y[slot] if isinstance(slot, slice) else take(y, slot)

    @cached_property
    def ends(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """The slots of the first and of the last states, row by row, of either direction."""
        none = np.zeros_like(self.lengths)
        ahead, back = (none, self.lengths), (self.lengths + 1, none + 1)
        return tuple(map(self._slot_of, ahead)), tuple(map(self._slot_of, back))

    def _slot_of(self, time: np.ndarray) -> np.ndarray:
        return self.slots[time] + np.arange(self.B)

    def piece(self, t0: int, t1: int) -> Steps:
        """The steps from t0 to t1 alone."""
        return even_steps(t1 - t0, self.B) if self.even else Steps(np.clip(self.lengths - t0, 0, t1 - t0))

    @property
    def mean_rows(self) -> int:
        """Rows of a step on average."""
        return max(1, round(self.N / self.T)) if self.T else self.B


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Where each step begins, for rows of these lengths in falling order."""
    T = int(lengths[0]) if len(lengths) else 0
    if not len(lengths) or lengths[-1] == T:
        return np.arange(T + 1, dtype=np.int64) * len(lengths)
    ends = np.bincount(lengths, minlength=T + 1)
    rows = len(lengths) - np.cumsum(ends)[:-1]  # longer than t
    return np.append(0, np.cumsum(rows)).astype(np.int64)


@lru_cache(maxsize=256)
def even_steps(T: int, B: int) -> Steps:
    """B rows of T steps."""
    steps = Steps(np.full(B, T, np.int64))
    if not B:
        steps.T, steps.starts, steps.slots = T, np.zeros(T + 1, np.int64), np.zeros(T + 3, np.int64)
    return steps


def halves(T: int, B: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the T B are those of the first rows, up to the middle, and which those of the others."""
    places = np.arange(T * B).reshape(T, B)
    return places[:, : B // 2].ravel(), places[:, B // 2 :].ravel()


@lru_cache(maxsize=256)
def even_sequences(shape: tuple[int, ...], batch_first: bool, tokens: bool) -> Sequences:
    """The form of a call with an array of some shape, without lengths."""
    return Sequences(np.broadcast_to(0, shape), None, batch_first, tokens)


class Sequences:
    """The form of one call.

    Parameters
    ----------
    x : ndarray or Ragged
        What the layer was given, (T, .), (T, B, .), (B, T, .) or values [N, .], where `.` is there for floats only.
    lengths : array_like or None
    batch_first : bool
    tokens : bool
        Whether x holds tokens.

    Raises
    ------
    TypeError, ValueError
        Of lengths that do not fit.
    """

    def __init__(self, x: np.ndarray | Ragged, lengths: Any, batch_first: bool, tokens: bool):
        self.ragged = x if isinstance(x, Ragged) else None
        self.order: np.ndarray | None = None
        self.places: np.ndarray | None = None  # of each of the N in the caller's flat array
        self.single = self.ragged is None and x.ndim == (1 if tokens else 2)
        self.tokens = tokens
        self.batch_first = batch_first and not self.single and self.ragged is None
        if self.ragged is not None:
            if lengths is not None:
                raise ValueError("lengths: expected None beside a Ragged, which has its own")
            self.outer, lengths = (len(x.values),), x.lengths
        else:
            self.outer = x.shape[:1] if self.single else x.shape[:2]
            B, T = self.outer if self.batch_first else (1 if self.single else x.shape[1], x.shape[0])
            if lengths is not None and self.single:
                lengths = np.asarray(lengths)
                lengths = lengths.reshape(1) if lengths.ndim == 0 else lengths
            if lengths is None:
                self.steps = even_steps(T, B)
                return
            lengths = check_lengths(lengths, T, B)
        self.order = np.argsort(-lengths, kind="stable")
        self.steps = Steps(lengths[self.order])
        row = self.order[self.steps.row]
        if self.ragged is not None:
            self.places = x.offsets[row] + self.steps.time
        elif self.batch_first:
            self.places = row * self.outer[1] + self.steps.time
        else:
            self.places = self.steps.time * (1 if self.single else self.outer[1]) + row

    @cached_property
    def _back(self) -> np.ndarray:
        """For each place of the caller's flat array which of the N it is, -1 for padding."""
        back = np.full(int(np.prod(self.outer)), -1)
        back[self.places] = np.arange(self.steps.N)
        return back

    def into(self, array: np.ndarray) -> np.ndarray:
        """An array of the caller's, with or without a last dimension, as [N, .] or [N]."""
        rest = array.shape[len(self.outer) :]
        if self.places is None:
            array = array.swapaxes(0, 1) if self.batch_first else array
            return array.reshape(self.steps.N, *rest)
        return take(array.reshape(-1, *rest), self.places)

    def out(self, values: np.ndarray) -> np.ndarray | Ragged:
        """[N, .] as the caller knows it, zeros in the padding."""
        if self.places is not None:
            return self._outer(take(values, self._back))
        if self.single:
            return values
        values = values.reshape(self.steps.T, self.steps.B, values.shape[1])
        return values.swapaxes(0, 1) if self.batch_first else values

    def outputs(self, y: np.ndarray) -> np.ndarray | Ragged:
        """The outputs that lie in the slots of y as the caller knows them."""
        slot = self.steps.slot(1)
        if self.places is None:
            return self.out(y[slot])
        if isinstance(slot, slice):
            return self._outer(take(y[slot], self._back))
        return self._outer(take(y, np.where(self._back < 0, -1, slot[self._back]) if self.steps.N else self._back))

    def _outer(self, values: np.ndarray) -> np.ndarray | Ragged:
        if self.ragged is not None:
            return self.ragged.with_values(values)
        return values.reshape(*self.outer, values.shape[1])

    def sort(self, state: np.ndarray) -> np.ndarray:
        """A state [., B, H] of the caller's in the order of the rows inside."""
        return state if self.order is None else np.ascontiguousarray(state[:, self.order])

    def unsort(self, state: np.ndarray) -> np.ndarray:
        """A state [., B, H] in the caller's order, without B for one sequence."""
        if self.order is not None:
            state, inside = np.empty_like(state), state
            state[:, self.order] = inside
        return state[:, 0] if self.single else state


def take(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """``array[rows]``, zeros where that is negative."""
    if array.dtype.kind != "f" or array.ndim != 2:
        return array[rows]
    out = np.empty((len(rows), array.shape[1]), array.dtype)
    run(gemm.take_rows, shards_for(10 * out.size), np.ascontiguousarray(array), rows, out)
    return out
