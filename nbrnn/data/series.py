"""Windows of a series of numbers, and the values that come after them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any

import numpy as np

from nbrnn.data.arrays import at_least_one, open_series, read_columns
from nbrnn.data.epochs import RandomEpochs


class SeriesWindows(RandomEpochs):
    """All windows of a series, each with the values to be forecast from it; an epoch has each of them once.

    Parameters
    ----------
    series : array_like (N, F) or (N,), or path
        The values, N steps of F features, (N,) being one feature. Anything that has a shape and a NumPy dtype and
        can be sliced is read window by window, such as a memory-mapped array; the path of a .npy file is opened as
        one. The order of an epoch takes 8 bytes for each window.
    window : int
        T, the steps of a window.
    stride : int, optional
        The steps from the start of a window to the start of the next.
    horizon : int, optional
        How many steps after a window's last one its target lies.
    batch_size : int
        B, the windows of a batch; the last batch has those that are left.
    targets : sequence of int, optional
        Which F' of the features are to be forecast; all without it.
    each_step : bool, optional
        True has a target for every step of a window, `horizon` steps after it.
    seed : int, numpy.random.Generator or None, optional
        Where the shuffles come from; None draws a seed from the system.
    shuffle : bool, optional
        False takes the windows in the order of the series.

    Yields
    ------
    x : ndarray, (T, B, F)
        The windows, of the dtype of the series.
    target : ndarray, (B, F'), or (T, B, F') with `each_step`

    Raises
    ------
    ValueError
        The series has not one or two dimensions or is shorter than a window and its horizon, a path is not that of a
        .npy file, a size is below 1, or a column is not there.
    TypeError
        The series holds no floats or integers, or a size or column is not an integer.
    """

    def __init__(
        self,
        series: Any | str | PathLike[str],
        window: int,
        *,
        stride: int = 1,
        horizon: int = 1,
        batch_size: int,
        targets: Sequence[int] | None = None,
        each_step: bool = False,
        seed: int | np.random.Generator | None = None,
        shuffle: bool = True,
    ):
        self.window, self.stride = at_least_one("window", window), at_least_one("stride", stride)
        self.horizon, self.batch_size = at_least_one("horizon", horizon), at_least_one("batch_size", batch_size)
        self.each_step, self.shuffle = each_step, shuffle
        self.series = open_series("series", series)
        if len(self.series.shape) > 2:
            raise ValueError(f"series: expected (N, F) or (N,), got {self.series.shape}")
        self.targets = _as_columns(targets, self.series.shape[1] if len(self.series.shape) == 2 else 1)
        spare = self.series.shape[0] - self.window - self.horizon
        if spare < 0:
            raise ValueError(
                f"series: a window of {self.window} steps and a horizon of {self.horizon} need "
                f"{self.window + self.horizon:,} steps, got {self.series.shape[0]:,}"
            )
        self._windows = spare // self.stride + 1
        super().__init__(seed, -(-self._windows // self.batch_size))

    def _epoch(self, first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        order = self._order(self._windows, self.shuffle)
        for start in range(first * self.batch_size, len(order), self.batch_size):
            yield self._batch(self.stride * order[start : start + self.batch_size])

    def _batch(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = self._read(starts, self.window)
        if self.each_step:
            return x, self._read(starts + self.horizon, self.window).take(self.targets, axis=-1)
        return x, self._read(starts + self.window - 1 + self.horizon, 1)[0].take(self.targets, axis=-1)

    def _read(self, starts: np.ndarray, steps: int) -> np.ndarray:
        return read_columns(self.series, starts, steps).reshape(steps, len(starts), -1)


def _as_columns(targets: Any, F: int) -> np.ndarray:
    if targets is None:
        return np.arange(F)
    columns = np.asarray(targets)
    if columns.ndim != 1 or not len(columns):
        raise ValueError(f"targets: expected a sequence of columns, got {targets!r}")
    if columns.dtype.kind not in "iu":
        raise TypeError(f"targets: expected integers, got {targets!r}")
    if columns.min() < 0 or columns.max() >= F:
        raise ValueError(f"targets: expected columns from 0 to {F - 1}, got {targets!r}")
    return columns
