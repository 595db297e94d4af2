"""What the batches are cut from: checked, and read only where a batch lies."""

from __future__ import annotations

import mmap
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np


def at_least_one(name: str, value: Any) -> int:
    """A size, or a clear error."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return int(value)


def as_tokens(name: str, tokens: Any) -> np.ndarray:
    """Token ids as int32, or a clear error."""
    array = np.asarray(tokens)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {array.shape}")
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got dtype {array.dtype}")
    if array.size and not (array.min() >= 0 and array.max() < 2**31):
        raise ValueError(f"{name}: expected ids from 0 to 2**31 - 1, got {array.min()} to {array.max()}")
    return array.astype(np.int32)


def open_series(name: str, series: Any) -> Any:
    """A series (N, ...) of numbers of which nothing has been read.

    An array, or anything that has a shape and a NumPy dtype and can be sliced, stays what it is; a path is opened as a
    memory-mapped .npy file.
    """
    if isinstance(series, (str, PathLike)):
        series = _open_npy(name, Path(series))
    elif not (hasattr(series, "shape") and isinstance(getattr(series, "dtype", None), np.dtype)):
        series = np.asarray(series)
    if not len(series.shape):
        raise ValueError(f"{name}: expected (N, ...), got a single number")
    if series.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected floats or integers, got dtype {series.dtype}")
    return series


def _open_npy(name: str, path: Path) -> np.ndarray:
    if path.suffix != ".npy":
        raise ValueError(f"{name}: expected an array or the path of a .npy file, got {str(path)!r}")
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: expected a .npy file that can be mapped into memory, got {path} ({error})") from None


def read_columns(series: Any, starts: np.ndarray, steps: int) -> np.ndarray:
    """`steps` rows from each of the `starts` on, side by side: a new array (steps, B, ...)."""
    # The kernels know only the byte order of the host, which a file may not have.
    dtype = series.dtype.newbyteorder("=")
    columns = np.empty((steps, len(starts), *series.shape[1:]), dtype)
    for b, start in enumerate(starts.tolist()):
        columns[:, b] = series[start : start + steps]
    return columns


def release(series: Any) -> None:
    """Give back the memory of what has been read of a memory-mapped file: else all of it would be held in the end."""
    # Only of a mapping for reading: a private one may hold changes.
    if getattr(series, "mode", None) != "r":
        return
    while isinstance(series, np.memmap):
        series = series.base
    if isinstance(series, mmap.mmap) and hasattr(series, "madvise"):
        series.madvise(mmap.MADV_DONTNEED)
