"""Data too long to be unrolled, cut into B streams that are read side by side: truncated backpropagation.

Row b of a batch continues row b of the batch before, and `carries_state` tells the trainer to carry the recurrent
state. Nothing is random but the order of documents, where that is asked for, and only what a batch needs is read.

    SeriesStream       arrays and memory-mapped files; where a batch lies is computed
    DocumentStream     documents of different lengths, each from a state of zeros
    TextStream         a text file, encoded block by block; it keeps where each stream is in the file
    GeneratorStream    whatever a function of yours yields; resumed by skipping
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nbrnn.data.arrays import as_tokens, at_least_one, open_series, read_columns, release
from nbrnn.data.epochs import DrawnEpochs, Epochs
from nbrnn.data.ragged import Ragged

Chunk = tuple[np.ndarray, np.ndarray]
Place = tuple[int, int]  # a document and a step of it

HELD = 50  # batches whose pages of a mapped file stay in memory
BLOCK = 1 << 16  # bytes of a text that are encoded at once


class SeriesStream(Epochs):
    """An array or a .npy file in B contiguous streams of equal length.

    Parameters
    ----------
    x : array_like (N, ...) or path
        Floats (N, F), or (N,) for one feature, or integer tokens (N,). Anything that has a shape and a NumPy dtype
        and can be sliced is read batch by batch, such as a memory-mapped array; the path of a .npy file is opened as
        one.
    target : array_like (N, ...), path or None
        The target of each step; a vector of floats is one feature here too. None makes the next step of `x` the target
        of a step.
    batch_size : int
        B, the streams. What is left at the end of the data, fewer than B steps, is not used.
    steps : int
        T, the steps of a batch; the last batch of an epoch has those that are left.

    Yields
    ------
    x : ndarray, (T, B, F), or (T, B) for tokens
    target : ndarray, (T, B, ...)
        Both of the dtypes of the data.

    Raises
    ------
    ValueError
        The data is too short for B streams, `x` and `target` differ in length, a path is not that of a .npy file, or
        a size is below 1.
    TypeError
        The data holds no floats or integers, or a size is not an integer.
    """

    carries_state = True

    def __init__(
        self,
        x: Any | str | PathLike[str],
        target: Any | str | PathLike[str] | None,
        batch_size: int,
        steps: int,
    ):
        super().__init__()
        self.batch_size, self.steps = at_least_one("batch_size", batch_size), at_least_one("steps", steps)
        self.x = open_series("x", x)
        self.target = self.x if target is None else open_series("target", target)
        self._shift = int(target is None)
        N, given = self.x.shape[0], self.target.shape[0]
        if given != N:
            raise ValueError(f"target: expected {N:,} steps, as many as x has, got {given:,}")
        self._length = (N - self._shift) // self.batch_size
        if self._length < 1:
            needed = self.batch_size + self._shift
            raise ValueError(f"x: {self.batch_size} streams need at least {needed:,} steps, got {N:,}")
        self._batches: int = -(-self._length // self.steps)

    def __len__(self) -> int:
        """Batches per epoch, the same in every epoch."""
        return self._batches

    def _epoch(self, first: int) -> Iterator[Chunk]:
        streams = self._length * np.arange(self.batch_size)
        for n, start in enumerate(range(first * self.steps, self._length, self.steps)):
            if n % HELD == 0:
                release(self.x)
                release(self.target)
            steps = min(self.steps, self._length - start)
            x = read_columns(self.x, streams + start, steps)
            target = read_columns(self.target, streams + start + self._shift, steps)
            yield _features(x), _features(target)


def _features(rows: np.ndarray) -> np.ndarray:
    """Floats have a dimension of features, if only of one."""
    return rows[..., None] if rows.ndim == 2 and rows.dtype.kind == "f" else rows


class DocumentStream(DrawnEpochs):
    """Documents of different lengths in B rows, each of which takes one after the other.

    A row that has come to the end of its document waits for the next batch to begin another one, so that a batch has
    at most one document in a row, and all of a document's steps are in one row.

    Parameters
    ----------
    documents : sequence of array_like (length, ...), or Ragged
        Floats (length, F), or (length,) for one feature, or integer tokens (length,), of one dtype. Anything that has a
        shape and a NumPy dtype and can be sliced is read piece by piece, such as a memory-mapped array; the path of a
        .npy file is opened as one.
    targets : sequence of array_like (length, ...), Ragged or None
        The target of each step. None makes the next step of the same document the target of a step, so that a document
        of n steps gives n - 1.
    batch_size : int
        B, the rows.
    steps : int
        The most steps of a row in a batch.
    seed : int, numpy.random.Generator or None, optional
        Where the shuffles come from; None draws a seed from the system.
    shuffle : bool, optional
        Whether every epoch takes the documents in another order, which may change its number of batches.

    Yields
    ------
    x : ndarray, (T, B, F), or (T, B) for tokens
    target : ndarray, (T, B, ...)
        Both of the dtypes of the data, zeros in the padding; T is the greatest of the lengths.
    lengths : ndarray of int64, (B,)
        The steps of each row; 0 where no document is left.
    reset : ndarray of bool, (B,)
        Which rows begin a document.

    Raises
    ------
    ValueError
        There is no document with a step to learn from, documents differ in more than their length, targets are not as
        many or not as long, a path is not that of a .npy file, or a size is below 1.
    TypeError
        The data holds no floats or integers, or a size is not an integer.
    """

    carries_state = True

    def __init__(
        self,
        documents: Sequence[Any] | Ragged,
        targets: Sequence[Any] | Ragged | None,
        batch_size: int,
        steps: int,
        *,
        seed: int | np.random.Generator | None = None,
        shuffle: bool = False,
    ):
        super().__init__(seed)
        self.batch_size, self.steps = at_least_one("batch_size", batch_size), at_least_one("steps", steps)
        self.shuffle = shuffle
        self.documents = _open_each("documents", documents)
        self.targets = self.documents if targets is None else _open_each("targets", targets)
        _check_as_long(self.targets, self.documents)
        self._shift = int(targets is None)
        self._lengths = [max(one.shape[0] - self._shift, 0) for one in self.documents]
        if not any(self._lengths):
            least = "two steps, of which the second is the target of the first" if self._shift else "one step"
            raise ValueError(f"documents: expected at least one of at least {least}, got none")

    def _epoch(self, first: int) -> Iterator[tuple[np.ndarray, ...]]:
        rows = self._rows(self._order(len(self.documents), self.shuffle).tolist())
        taken = sum(1 for _ in islice(rows, first))
        if taken < first:
            raise ValueError(f"state: expected an epoch of at least {first} batches, got {taken} from the documents")
        for places in rows:
            lengths = np.array([min(self._left(place), self.steps) for place in places])
            x = self._read(self.documents, places, lengths, 0)
            target = self._read(self.targets, places, lengths, self._shift)
            yield x, target, lengths, np.array([place is not None and place[1] == 0 for place in places])

    def _rows(self, order: list[int]) -> Iterator[list[Place | None]]:
        """Where each row of each batch is: its document and the step there, None where no document is left."""
        waiting = iter([n for n in order if self._lengths[n]])
        places: list[Place | None] = [None] * self.batch_size
        while True:
            for b, place in enumerate(places):
                if not self._left(place):
                    n = next(waiting, None)
                    places[b] = None if n is None else (n, 0)
            if not any(places):
                return
            yield list(places)
            places = [place and (place[0], place[1] + self.steps) for place in places]

    def _left(self, place: Place | None) -> int:
        """The steps from a place to the end of its document."""
        return 0 if place is None else max(self._lengths[place[0]] - place[1], 0)

    def _read(self, series: list[Any], places: list[Place | None], lengths: np.ndarray, shift: int) -> np.ndarray:
        """The steps of all rows, side by side and filled up with zeros."""
        dtype = series[0].dtype.newbyteorder("=")
        columns = np.zeros((lengths.max(), len(places), *series[0].shape[1:]), dtype)
        for b, (place, length) in enumerate(zip(places, lengths.tolist())):
            if place is not None:
                start = place[1] + shift
                columns[:length, b] = series[place[0]][start : start + length]
        return _features(columns)


def _open_each(name: str, documents: Any) -> list[Any]:
    """All documents, or all of their targets, of which nothing has been read."""
    opened = [open_series(f"{name}[{n}]", one) for n, one in enumerate(documents)]
    if not opened:
        raise ValueError(f"{name}: expected at least one array, got none")
    first = opened[0]
    for n, one in enumerate(opened):
        if one.shape[1:] != first.shape[1:]:
            wanted = ", ".join(["length", *map(str, first.shape[1:])])
            raise ValueError(f"{name}[{n}]: expected ({wanted}) like the first, got {one.shape}")
        if one.dtype != first.dtype:
            raise ValueError(f"{name}[{n}]: expected {first.dtype} like the first, got {one.dtype}")
    return opened


def _check_as_long(targets: list[Any], documents: list[Any]) -> None:
    if len(targets) != len(documents):
        raise ValueError(f"targets: expected {len(documents)}, one for each document, got {len(targets)}")
    for n, (target, one) in enumerate(zip(targets, documents)):
        if target.shape[0] != one.shape[0]:
            raise ValueError(
                f"targets[{n}]: expected {one.shape[0]:,} steps, those of the document, got {target.shape[0]:,}"
            )


class GeneratorStream(Epochs):
    """Streams from a function: pieces of any number of steps, cut again into batches of `steps` steps.

    Parameters
    ----------
    make : callable
        ``make()`` is called at the start of every epoch and returns an iterable of ``(x, target)``, arrays
        (n, B, ...) with the same n and B, where each piece continues the one before. To resume an epoch it is called
        again, and what had been taken is skipped: it has to yield the same once more.
    batch_size : int
        B, the streams.
    steps : int
        T, the steps of a batch; the last batch of an epoch has those that are left.

    Yields
    ------
    x, target : ndarray, (T, B, ...)
        Copies: `make` may fill the same arrays again and again.

    Raises
    ------
    ValueError
        A size is below 1; while iterating, a piece is not of the shapes above, or an epoch to be resumed has fewer
        batches than had been taken.
    TypeError
        A size is not an integer, `make` is not a function, or a piece is not a pair.
    """

    carries_state = True

    def __init__(self, make: Callable[[], Iterable[Chunk]], batch_size: int, steps: int):
        super().__init__()
        self.batch_size, self.steps = at_least_one("batch_size", batch_size), at_least_one("steps", steps)
        if not callable(make):
            raise TypeError(f"make: expected a function that returns an iterable of (x, target), got {make!r}")
        self.make = make

    def _epoch(self, first: int) -> Iterator[Chunk]:
        batches = self._cut()
        for taken in range(first):
            if next(batches, None) is None:
                raise ValueError(f"state: expected an epoch of at least {first} batches, got {taken} from make()")
        yield from batches

    def _cut(self) -> Iterator[Chunk]:
        """Batches of `steps` steps, and what is left."""
        held: list[Chunk] = []
        missing = self.steps
        for x, target in self._pieces():
            start = 0
            while len(x) - start >= missing:
                stop = start + missing
                yield _joined([*held, (x[start:stop], target[start:stop])])
                held, missing, start = [], self.steps, stop
            if start < len(x):
                # a copy, for the next piece may come in the same arrays
                held.append((x[start:].copy(), target[start:].copy()))
                missing -= len(x) - start
        if missing < self.steps:
            yield _joined(held)

    def _pieces(self) -> Iterator[Chunk]:
        for piece in self.make():
            if not isinstance(piece, (tuple, list)) or len(piece) != 2:
                raise TypeError(f"make: expected pairs (x, target), got {type(piece).__name__}")
            x, target = map(np.asarray, piece)
            if x.ndim < 2 or x.shape[1] != self.batch_size or target.shape[:2] != x.shape[:2]:
                raise ValueError(
                    f"make: expected x and target of one (n, {self.batch_size}, ...), got {x.shape} and {target.shape}"
                )
            yield x, target


def _joined(pieces: list[Chunk]) -> Chunk:
    return np.concatenate([x for x, _ in pieces]), np.concatenate([target for _, target in pieces])


class TextStream(Epochs):
    """A text file in B streams of equal size, for texts larger than memory.

    A stream begins and ends at a character. It is read and encoded in blocks of 64 KiB, which also begin and end at a
    character: of tokens that are longer than that, such as words, one a block may be cut in two. What stands in the
    file is handed to `encode` as it is, line ends and a byte order mark included.

    Parameters
    ----------
    path : str or Path
        A file of UTF-8 text.
    encode : callable
        ``encode(text)`` returns the tokens of a text, a vector of integers; it may depend on nothing but the text.
    batch_size : int
        B, the streams.
    steps : int
        T, the steps of a batch; the last batch of an epoch has those that are left in the stream that ends first.

    Yields
    ------
    x, target : ndarray of int32, shape (T, B)
        The streams, one to a column, and the same one token later. A stream's last token is only a target.

    Raises
    ------
    ValueError
        The file cannot be read, has less than two bytes for a stream, or a size is below 1; while iterating, the
        file is not UTF-8 text or `encode` returns something else than a vector of token ids.
    TypeError
        A size is not an integer or `encode` not a function; while iterating, `encode` does not return integers.
    """

    carries_state = True

    def __init__(self, path: str | PathLike[str], encode: Callable[[str], Any], batch_size: int, steps: int):
        super().__init__()
        self.batch_size, self.steps = at_least_one("batch_size", batch_size), at_least_one("steps", steps)
        if not callable(encode):
            raise TypeError(f"encode: expected a function of a text, got {encode!r}")
        self.path, self.encode = Path(path), encode
        try:
            with open(self.path, "rb") as file:
                size = file.seek(0, 2)
        except OSError as error:
            raise ValueError(f"path: {path} cannot be read ({error.strerror})") from None
        if size < 2 * self.batch_size:
            raise ValueError(
                f"path: {self.batch_size} streams need at least {2 * self.batch_size:,} bytes, got {size:,} in {path}"
            )
        self._borders = [size * b // self.batch_size for b in range(self.batch_size + 1)]
        # Where each stream is: the byte that its block begins with, and how many tokens of the block have been taken.
        self._places = self._resume_places = self._beginnings = [[start, 0] for start in self._borders[:-1]]

    def _epoch(self, first: int) -> Iterator[Chunk]:
        places, self._resume_places = self._resume_places, self._beginnings
        self._places = places
        with open(self.path, "rb") as file:
            streams = [
                _TextReader(partial(self._tokens, file), *place, stop) for place, stop in zip(places, self._borders[1:])
            ]
            while True:
                ahead = [stream.peek(self.steps + 1) for stream in streams]
                steps = min(map(len, ahead)) - 1
                if steps < 1:
                    break
                for stream in streams:
                    stream.skip(steps)
                self._places = [stream.place for stream in streams]
                tokens = np.stack([row[: steps + 1] for row in ahead], axis=1)
                yield tokens[:-1], tokens[1:].copy()
        self._places = self._beginnings

    def _tokens(self, file: BinaryIO, start: int, stop: int) -> np.ndarray:
        """The tokens of the characters whose first byte lies in a range of the file."""
        file.seek(start)
        raw = file.read(stop - start + _LONGEST)
        begin = _next_character(raw, 0) if start else 0
        end = _next_character(raw, stop - start)
        try:
            text = raw[begin:end].decode("utf-8")
        except UnicodeDecodeError as error:
            at = start + begin + error.start
            raise ValueError(
                f"path: expected UTF-8 text, got byte 0x{raw[at - start]:02x} at {at:,} of {self.path}"
            ) from None
        return as_tokens("encode", self.encode(text))

    def state_dict(self) -> dict[str, Any]:
        """Where the current epoch is, as plain JSON values: the batches taken and where each stream is in the file."""
        return super().state_dict() | {"places": [list(place) for place in self._places]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        places = state.get("places")
        if not self._are_places(places):
            raise ValueError(f"state: expected the places of {self.batch_size} streams of {self.path}, got {places!r}")
        super().load_state_dict(state)
        self._places = self._resume_places = [list(place) for place in places]

    def _are_places(self, places: Any) -> bool:
        def inside(place: Any, start: int, stop: int) -> bool:
            pair = isinstance(place, (list, tuple)) and len(place) == 2 and all(isinstance(n, int) for n in place)
            return pair and start <= place[0] <= stop and place[1] >= 0

        return (
            isinstance(places, (list, tuple))
            and len(places) == self.batch_size
            and all(map(inside, places, self._borders[:-1], self._borders[1:]))
        )


class _TextReader:
    """The tokens of one stream: those of the blocks that have been read, from the next one to be taken on.

    Parameters
    ----------
    tokens : callable
        The tokens from one byte to another.
    start, taken : int
        The first byte of a block, and how many of its tokens have been taken.
    stop : int
        The byte behind the stream.
    """

    def __init__(self, tokens: Callable[[int, int], np.ndarray], start: int, taken: int, stop: int):
        self._tokens, self._next, self._taken, self._stop = tokens, start, taken, stop
        self._blocks: deque[tuple[int, np.ndarray]] = deque()

    @property
    def place(self) -> list[int]:
        return [self._blocks[0][0] if self._blocks else self._next, self._taken]

    def peek(self, count: int) -> np.ndarray:
        """The next tokens, `count` of them where the stream has so many."""
        held = sum(len(tokens) for _, tokens in self._blocks)
        while held - self._taken < count and self._next < self._stop:
            start, self._next = self._next, min(self._next + BLOCK, self._stop)
            self._blocks.append((start, self._tokens(start, self._next)))
            held += len(self._blocks[-1][1])
        parts, start = [np.empty(0, np.int32)], self._taken
        for _, tokens in self._blocks:
            parts.append(tokens[start : start + count])
            start = 0
        return np.concatenate(parts)[:count]

    def skip(self, count: int) -> None:
        """Take tokens that have been seen, and forget the blocks that lie behind."""
        self._taken += count
        while self._blocks and self._taken >= len(self._blocks[0][1]):
            self._taken -= len(self._blocks.popleft()[1])


_LONGEST = 3  # bytes of a character after its first one


def _next_character(raw: bytes, at: int) -> int:
    """The first byte at or behind `at` that begins a character; no farther away than one can be in UTF-8."""
    last = min(at + _LONGEST, len(raw))
    while at < last and raw[at] & 0xC0 == 0x80:
        at += 1
    return at
