"""Checkpoints: one file of named arrays and JSON, in an open format.

The format is safetensors: the length of a header in 8 little-endian bytes, the header as JSON (name, dtype, shape and
offsets of every array, and a few strings), then the arrays' bytes. We chose it over NPZ because a file cannot hold
code by construction (NPZ may hold pickles), because it has no second container format inside (NPZ is a ZIP archive),
and because the whole format is checked in the page below. Tools of many languages read it.

Whatever is not an array is one JSON text among the header's strings. JSON has no large integers that every reader
keeps, and no arrays of a dtype, which states of random generators need: they are written as ``{"$int": "..."}`` and
``{"$array": [...], "dtype": "..."}``. NaN and infinity are refused.

A file is written beside its final place, flushed to the disk and renamed: at every moment there is the old file or
the new one, whole. Nothing in a file is ever executed.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FORMAT, VERSION = "nbrnn", "1"
LONGEST_HEADER = 100_000_000  # the limit that other readers of safetensors have
DTYPES = {"F16": "float16", "F32": "float32", "F64": "float64"} | {
    f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}
NAMES = {name: code for code, name in DTYPES.items()}


class CheckpointError(ValueError):
    """A file is not a checkpoint, is damaged, or does not fit what it is loaded into."""


# ------------------------------------------------------------------ writing


def save_checkpoint(path: str | os.PathLike, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Write arrays and metadata to a file, replacing it in one instant.

    Parameters
    ----------
    path : path-like
        The file. An existing one stays as it is until the new one is complete, and for good if there is an error.
    arrays : mapping of str to ndarray
        Arrays of floats or integers, of any shape.
    meta : mapping
        What JSON can hold, and besides: integers of any size, NumPy numbers, arrays, and tuples (read as lists).

    Raises
    ------
    TypeError, ValueError
        Something in `arrays` or `meta` cannot be written.
    OSError
        The file cannot be written.
    """
    path = Path(path).resolve()
    header, arrays = _header(arrays, meta)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for array in arrays:
                file.write(array.reshape(-1).view(np.uint8))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_directory(path.parent)


def _header(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> tuple[bytes, list[np.ndarray]]:
    """The header, and the arrays in the order of their bytes."""
    text = json.dumps(_encode(meta, "meta"), allow_nan=False)
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": VERSION, "meta": text}}
    written, start = [], 0
    # The widest numbers first, so that every array begins at a multiple of its element's size.
    for name in sorted(arrays, key=lambda name: -np.asarray(arrays[name]).itemsize):
        array = np.asarray(arrays[name])
        if not isinstance(name, str) or name == "__metadata__" or array.dtype.name not in NAMES:
            raise TypeError(f"arrays: {name!r} of {array.dtype} cannot be written")
        stop = start + array.nbytes
        header[name] = {"dtype": NAMES[array.dtype.name], "shape": list(array.shape), "data_offsets": [start, stop]}
        written.append(np.ascontiguousarray(array, array.dtype.newbyteorder("<")))
        start = stop
    encoded = json.dumps(header).encode()
    if len(encoded) > LONGEST_HEADER - 8:
        raise ValueError(f"meta: expected less than {LONGEST_HEADER:,} bytes of JSON, got {len(encoded):,}")
    return encoded + b" " * (-len(encoded) % 8), written


def _encode(value: Any, where: str) -> Any:
    """`value` as plain JSON."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, np.integer)):
        return int(value) if abs(int(value)) < 2**53 else {"$int": str(int(value))}
    if isinstance(value, (float, np.floating)):
        if not math.isfinite(value):
            raise ValueError(f"{where}: expected finite numbers, got {value}")
        return float(value)
    if isinstance(value, np.ndarray) and value.dtype.name in NAMES:
        return {"$array": _encode(value.tolist(), where), "dtype": value.dtype.name}
    if isinstance(value, (list, tuple)):
        return [_encode(item, f"{where}[{n}]") for n, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) and key not in ("$int", "$array") for key in value):
        return {key: _encode(item, f"{where}.{key}") for key, item in value.items()}
    raise TypeError(f"{where}: {type(value).__name__} cannot be written as JSON")


def _flush_directory(directory: Path) -> None:
    """Make a renaming last through a power failure."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ------------------------------------------------------------------ reading


def load_checkpoint(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `save_checkpoint` wrote.

    Parameters
    ----------
    path : path-like
        The file.

    Returns
    -------
    arrays : dict of str to ndarray
        The arrays, in native byte order.
    meta : dict
        The metadata.

    Raises
    ------
    CheckpointError
        The file is not such a file, is of another version, truncated or damaged; the message says which.
    OSError
        The file cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        header, start = _read_header(data)
        meta = _read_meta(header.pop("__metadata__", None))
        return _read_arrays(header, memoryview(data)[start:]), meta
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read_header(data: bytes) -> tuple[dict[str, Any], int]:
    """The header, and where the arrays begin."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 10 or data[8:9] != b"{" or length > LONGEST_HEADER:
        raise CheckpointError("not a checkpoint (no safetensors header)" if data else "the file is empty")
    if length > len(data) - 8:
        raise CheckpointError(f"truncated: the header needs {length:,} bytes, {len(data) - 8:,} are there")
    return _parse(data[8 : 8 + length], "header"), 8 + length


def _read_meta(strings: Any) -> dict[str, Any]:
    if not isinstance(strings, dict) or strings.get("format") != FORMAT or not isinstance(strings.get("meta"), str):
        raise CheckpointError("not a checkpoint of nbrnn, but of another program")
    if strings.get("version") != VERSION:
        raise CheckpointError(f"format version {strings.get('version')!r}, but this nbrnn reads version {VERSION}")
    return _parse(strings["meta"], "metadata")


def _parse(text: bytes | str, what: str) -> dict[str, Any]:
    """A JSON object; names that occur twice, NaN and endless nesting are errors."""
    try:
        result = json.loads(text, object_pairs_hook=_decode, parse_constant=_refuse)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"damaged: the {what} is not valid JSON ({error})") from None
    if not isinstance(result, dict):
        raise CheckpointError(f"damaged: the {what} is no JSON object")
    return result


def _decode(pairs: list[tuple[str, Any]]) -> Any:
    """A JSON object, or what `_encode` wrote as one."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    if set(result) == {"$int"}:
        return int(result["$int"])
    if set(result) == {"$array", "dtype"}:
        if result["dtype"] not in NAMES:
            raise ValueError(f"unknown dtype {result['dtype']!r}")
        return np.array(result["$array"], result["dtype"])
    return result


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _read_arrays(header: Mapping[str, Any], data: memoryview) -> dict[str, np.ndarray]:
    """The arrays, which must lie in `data` one behind the other without gaps."""
    spans = {name: _span(name, entry) for name, entry in header.items()}
    end = 0
    for name in sorted(spans, key=lambda name: spans[name][2:]):
        _, _, start, stop = spans[name]
        if start != end:
            raise CheckpointError(f"damaged: {name!r} begins at byte {start}, but the array before it ends at {end}")
        end = stop
    if end != len(data):
        what = "truncated" if end > len(data) else "damaged"
        raise CheckpointError(f"{what}: the arrays need {end:,} bytes, {len(data):,} are there")
    return {
        # a copy, in native byte order
        name: np.frombuffer(data[start:stop], np.dtype(dtype).newbyteorder("<")).astype(dtype).reshape(shape)
        for name, (dtype, shape, start, stop) in spans.items()
    }


def _span(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, first and last offset of one array."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"damaged: {name!r} lacks its dtype, shape or offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{name!r}: unknown dtype {dtype!r}")
    if not _are_sizes(shape) or len(shape) > 32 or math.prod(max(n, 1) for n in shape) >= 2**48:
        raise CheckpointError(f"damaged: {name!r} has the shape {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"damaged: {name!r} has the offsets {offsets!r}")
    needed = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if offsets[1] - offsets[0] != needed:
        raise CheckpointError(f"damaged: {name!r} needs {needed:,} bytes for its shape, but has the offsets {offsets}")
    return DTYPES[dtype], tuple(shape), *offsets


def _are_sizes(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**48 for n in numbers)


# ------------------------------------------------------------------ trees of arrays


def flatten(tree: Any) -> tuple[Any, list[np.ndarray]]:
    """Divide a recurrent state, nested as it may be, into its structure and its arrays.

    Parameters
    ----------
    tree
        An array, None, or a tuple, list or dict of such.

    Returns
    -------
    structure
        The same as plain JSON values, with a number for each array.
    leaves : list of ndarray
        The arrays in the order of their numbers.

    Raises
    ------
    TypeError
        Something else is in it.
    """
    leaves: list[np.ndarray] = []

    def walk(node: Any) -> Any:
        if isinstance(node, np.ndarray):
            leaves.append(node)
            return len(leaves) - 1
        if isinstance(node, (tuple, list)):
            return {"tuple" if isinstance(node, tuple) else "list": [walk(item) for item in node]}
        if isinstance(node, dict):
            return {"dict": {key: walk(item) for key, item in node.items()}}
        if node is not None:
            raise TypeError(f"state: expected arrays, tuples, lists, dicts and None, got {type(node).__name__}")
        return None

    return walk(tree), leaves


def unflatten(structure: Any, leaves: Mapping[str, np.ndarray]) -> Any:
    """The inverse of `flatten`, with the arrays by their numbers in words.

    Raises
    ------
    ValueError, KeyError
        `structure` is not what `flatten` returned, or an array is missing.
    """
    if structure is None:
        return None
    if isinstance(structure, int):
        return leaves[str(structure)]
    kind, items = next(iter(structure.items())) if isinstance(structure, dict) and len(structure) == 1 else (None, None)
    if kind in ("tuple", "list") and isinstance(items, list):
        return {"tuple": tuple, "list": list}[kind](unflatten(item, leaves) for item in items)
    if kind == "dict" and isinstance(items, dict):
        return {key: unflatten(item, leaves) for key, item in items.items()}
    raise ValueError(f"state: expected the structure of a recurrent state, got {structure!r}")
