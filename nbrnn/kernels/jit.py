"""Compiler flags, the source stamp, threads and the fork guard: the one place for each.

`@jitable` marks a function that compiled code calls, `compiled` makes an entry that Python calls, and `native` a
function that compiled code calls by its address; both are cached on disk.

Kernels
    `@sharded` marks a function that divides its work among threads. It becomes a `Kernel`: compiled once for each
    combination of argument types, and called by its address. A `stage` is a kernel with its arguments, and `Stages` are
    several that run one after another, each in a parallel region of its own, in one call from Python. There is a
    single function with parallel regions, since Numba takes longer to compile those than all that is in them.

Caching
    Numba looks at the file of the decorated function only, so that an edit of a helper would run the old code. Each
    cache file is therefore named by a hash of the sources in `kernels`, `STAMP`, where all helpers live that other
    files use, and by a tag that tells apart the entries made by one factory. Two processes that compile different
    entries never write to the same file.

Threads
    A stage is run by the calling thread alone if it is small work, if there is one thread, in a forked child (OpenMP
    kills a child that enters a region), and where the threading layer cannot be entered twice (workqueue) and is in
    use by another Python thread. A result never depends on that.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.core import types
from numba.extending import overload

from nbrnn.kernels.calls import address_of, call_kernel, unpack
from nbrnn.kernels.denormals import flush_denormals, restore_denormals

# Contraction, signed zeros and reciprocals only: NaN and infinity keep their meaning, sums keep their order.
FASTMATH = {"contract", "nsz", "arcp"}
OPTIONS = {"fastmath": FASTMATH, "error_model": "numpy"}


def _stamp() -> str:
    """A hash of the sources of everything that compiled code calls across files."""
    package = Path(__file__).parents[1]
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(package.glob("kernels/*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


STAMP = _stamp()
# Rounds of a waiting OpenMP thread: longer than Python takes from one parallel region to the next.
SPINS = "5000"


def stamp_of(*functions: Callable) -> str:
    """A hash of some functions and of the files that define them."""
    digest = hashlib.blake2b(digest_size=6)
    for file in sorted({function.__code__.co_filename for function in functions}):
        digest.update(Path(file).read_bytes() if Path(file).is_file() else file.encode())
    for function in functions:
        digest.update(function.__qualname__.encode() + function.__code__.co_code)
    return digest.hexdigest()


def jitable(function: Callable, **options: Any) -> Callable:
    """Let compiled code call `function`, which stays plain Python; a literal argument reaches it as a literal."""

    @overload(function, jit_options=options, strict=False, prefer_literal=True)
    def implementation(*args):
        return function

    return function


def inlined(function: Callable) -> Callable:
    """The same for a function that becomes a part of its caller, however long it is: a call hands over all numbers of a
    scan, some sixty."""
    return jitable(function, forceinline=True)


def compiled(function: Callable, *, tag: str = "", parallel: bool = False) -> Callable:
    """An entry that Python calls, compiled at its first call for each signature and cached on disk."""
    function.__qualname__ = "-".join(filter(None, [function.__qualname__, tag, STAMP]))
    return _cached(lambda options: numba.njit(function, parallel=parallel, nogil=True, **options))


def native(function: Callable, signature: Any, tag: str) -> Any:
    """A function that compiled code calls by its address (`.address`), compiled once for all its callers and cached."""
    function.__qualname__ = f"{function.__qualname__}-{tag}-{STAMP}"
    return _cached(lambda options: numba.cfunc(signature, **options)(function))


def _cached(compile: Callable) -> Any:
    """Compile with the cache on disk, or without one where no folder can be written to."""
    try:
        return compile(OPTIONS | {"cache": True})
    except RuntimeError:
        return compile(OPTIONS)


# ------------------------------------------------------------------ kernels

KERNEL = types.void(types.intp, types.intp, types.CPointer(types.int64))
FLOAT, INTEGER = struct.Struct("=d"), struct.Struct("=q")  # of the same bits


class Kernel:
    """A function ``function(shard, shards, *constants, *args)`` that is called by its address.

    Parameters
    ----------
    function : callable
        Its arguments are contiguous arrays, integers and floats. It has to be found in its module by its name: others
        are cached by all that they refer to, and in each process an intrinsic is something else.
    tag : str
        Tells it apart from others of the same source.
    *constants : Constants
        What it is compiled for.
    """

    def __init__(self, function: Callable, tag: str, *constants: Any):
        self.function, self.tag, self.constants = jitable(function), tag, constants
        self._compiled: dict[tuple, Any] = {}

    def address(self, kinds: tuple) -> int:
        """Where it begins, compiled for arguments of some kinds: for each a type, or a dtype and its dimensions."""
        found = self._compiled.get(kinds)
        if found is None:
            found = self._compiled[kinds] = self._compile(kinds)
        return found.address

    def _compile(self, kinds: tuple) -> Any:
        function, constants, words = self.function, self.constants, ",".join(map(_word, kinds))

        def kernel(shard, shards, numbers):
            function(shard, shards, *(constants + unpack(numbers, words)))

        digest = hashlib.blake2b(words.encode(), digest_size=6).hexdigest()
        return native(kernel, KERNEL, f"{self.tag}-{digest}")

    def __call__(self, shards: int, *args: Any) -> None:
        """Run all shards on the threads that Numba has."""
        _enter(shards, Stages(stage(self, shards, *args)).table)


def sharded(function: Callable) -> Callable:
    """Let `stage` and `run` call ``function(shard, shards, *args)`` for every shard.

    The function itself stays plain Python, since its kernel is cached by its name.
    """
    function.entry = Kernel(function, f"{function.__name__}-{stamp_of(function)}")
    return function


class Stage(NamedTuple):
    """A kernel and its arguments."""

    kernel: int
    shards: int
    numbers: list[int]  # integers, the bits of floats, addresses and shapes
    arrays: list[tuple[int, np.ndarray]]  # and in which of the numbers the address stands


def stage(function: Any, shards: int, *args: Any) -> Stage:
    """A stage of a sharded function, or of a `Kernel`.

    args: arrays, numbers, and tuples of integers, then arrays, of which the kernel is given the addresses alone; their
    attribute `integers` is how many of the former they have.
    """
    kinds, numbers, arrays = [], [], []
    for arg in args:
        if isinstance(arg, int):
            kind = int
            numbers.append(arg)
        elif isinstance(arg, np.ndarray):
            kind = arg.dtype, arg.ndim
            arrays.append((len(numbers), arg))
            numbers += locate(arg), *arg.shape
        elif isinstance(arg, float):
            kind = float
            numbers += INTEGER.unpack(FLOAT.pack(arg))
        elif isinstance(arg, tuple):
            kind = len(arg)
            numbers += arg[: arg.integers]
            arrays += enumerate(arg[arg.integers :], len(numbers))
            numbers += map(locate, arg[arg.integers :])
        else:
            kind = int
            numbers.append(int(arg))
        kinds.append(kind)
    return Stage(getattr(function, "entry", function).address(tuple(kinds)), shards, numbers, arrays)


def _word(kind: Any) -> str:
    """A kind of argument as `calls.unpack` calls it."""
    if isinstance(kind, int):
        return f"integers {kind}"
    return kind.__name__ if isinstance(kind, type) else f"{kind[0].name} {kind[1]}"


class Stages:
    """Stages that run one after another, as often as one likes.

    Parameters
    ----------
    *stages : Stage
    arrays : sequence of ndarray
        Those of their arrays that `put` replaces by others of the same shapes. They are not kept alive; all others are.
    rooms : sequence of ndarray
        New arrays in whose memory some of theirs are views, which `put` replaces as well.

    Attributes
    ----------
    table : ndarray of int64
        How many stages, for each of them its kernel, shards and where its arguments begin, and the arguments.
    """

    def __init__(self, *stages: Stage, arrays: Sequence[np.ndarray] = (), rooms: Sequence[np.ndarray] = ()):
        numbers, at = [len(stages)], 1 + 3 * len(stages)
        self._addresses = [locate(array) for array in (*arrays, *rooms)]
        known, begins = {id(array): n for n, array in enumerate(arrays)}, self._addresses[len(arrays) :]
        self._kept, self._places = [], [[] for _ in self._addresses]  # and how far behind an array's beginning
        for one in stages:
            numbers += one.kernel, one.shards, at
            for place, array in one.arrays:
                n, behind, address = known.get(id(array)), 0, one.numbers[place]
                for room, begin in enumerate(begins):
                    if begin <= address < begin + rooms[room].nbytes:
                        n, behind = len(arrays) + room, address - begin
                if n is None:
                    self._kept.append(array)
                else:
                    self._places[n].append((at + place, behind))
            at += len(one.numbers)
        for one in stages:
            numbers += one.numbers
        self.shards = max((one.shards for one in stages), default=1)
        self.table = np.array(numbers, np.int64)
        self._numbers = memoryview(self.table)

    def put(self, arrays: Sequence[np.ndarray]) -> None:
        """Exchange the arrays and then the rooms, in their order."""
        numbers, addresses = self._numbers, self._addresses
        for n, array in enumerate(arrays):
            address = locate(array)
            if address != addresses[n]:  # new ones are often where those of the last call were
                addresses[n] = address
                for place, behind in self._places[n]:
                    numbers[place] = address + behind

    def run(self) -> None:
        """Run them, each on at most as many threads as it asks for."""
        _launch(self.shards, self.table)


class Prepared(NamedTuple):
    """Stages, and what has to be the same for a call that uses them again: the same objects, or equal integers."""

    key: tuple
    stages: Stages | list[Stage]

    def serves(self, key: tuple) -> bool:
        """Whether they may be used again."""
        return not [1 for a, b in zip(self.key, key) if a is not b and not (type(a) is int and a == b)]

    def __reduce__(self) -> tuple:
        """A copy, or what is loaded in another process, has arrays elsewhere: for it nothing is prepared."""
        return type(None), ()


def prepare(
    known: Prepared | None,
    key: tuple,
    arrays: Sequence[np.ndarray],
    rooms: Sequence[np.ndarray],
    make: Callable[..., list[Stage]],
    *args: Any,
) -> Prepared:
    """Those of an earlier call with this call's arrays, each another object, or new ones: ``make(*args)``."""
    if known is not None and known.serves(key):
        known.stages.put((*arrays, *rooms))
        return known
    return Prepared(key, Stages(*make(*args), arrays=arrays, rooms=rooms))


def run(function: Any, shards: int, *args: Any) -> None:
    """Run a single stage."""
    one = stage(function, min(shards, get_num_threads()), *args)
    _launch(one.shards, np.array([1, one.kernel, one.shards, 4, *one.numbers], np.int64))


def _launch(shards: int, table: np.ndarray) -> None:
    shards = min(shards, get_num_threads()) if shards > 1 else shards
    if shards <= 1 or threading_layer() != "workqueue":
        _enter(shards, table)
    elif not _entered.acquire(blocking=False):
        _enter(1, table)
    else:
        try:
            _enter(shards, table)
        finally:
            _entered.release()


@compiled
def locate(array):
    """The address of an array, which must be contiguous."""
    return address_of(array)


# `numba.get_num_threads` and `numba.set_num_threads` themselves are nothing that can be cached.
_get_limit = types.ExternalFunction("get_num_threads", types.intp())
_set_limit = types.ExternalFunction("set_num_threads", types.void(types.intp))


def _run_table(limit, table):
    # Numba's own limit belongs to the user: lend it and give it back.
    before = _get_limit() if limit > 1 else limit
    if limit != before:
        _set_limit(limit)
    for n in range(table[0]):
        kernel, shards, at = table[1 + 3 * n], min(table[2 + 3 * n], limit), table[3 + 3 * n]
        if shards <= 1:
            mode = flush_denormals()
            call_kernel(kernel, 0, 1, table, at)
            restore_denormals(mode)
        else:
            for s in numba.prange(shards):
                mode = flush_denormals()
                call_kernel(kernel, s, shards, table, at)
                restore_denormals(mode)
    if limit != before:
        _set_limit(before)


_enter = compiled(_run_table, parallel=True)


# ------------------------------------------------------------------ threads

_limit: int | None = None
_forked = False
_entered = threading.Lock()


def _after_fork() -> None:
    global _forked, _entered
    _forked, _entered = True, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def set_num_threads(n: int) -> None:
    """Use at most `n` threads from now on, in the whole process.

    Parameters
    ----------
    n : int
        From 1 to the number of cores this process may use (or ``NUMBA_NUM_THREADS``).

    Raises
    ------
    TypeError, ValueError
        `n` is not an integer, or out of range.
    """
    global _limit
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n: expected an integer, got {n!r}")
    if not 1 <= n <= numba.config.NUMBA_NUM_THREADS:
        raise ValueError(f"n: expected 1 to {numba.config.NUMBA_NUM_THREADS} threads, got {n}")
    _limit = n


def get_num_threads() -> int:
    """The number of threads a call may use."""
    if _forked:
        return 1
    return _limit or numba.config.NUMBA_NUM_THREADS


@lru_cache(maxsize=1)
def threading_layer() -> str:
    """The name of Numba's threading layer: omp, tbb or workqueue."""
    # GNU OpenMP reads its settings when it is loaded. A thread that has waited for a while shall sleep: where another
    # process has taken a core, the default lets the waiting one hold on to the other for ever longer.
    ours = not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    if ours:
        os.environ["GOMP_SPINCOUNT"] = SPINS
    try:
        numba.get_num_threads()  # starts the layer, which stays the same from then on
        return numba.threading_layer()
    finally:
        if ours:
            del os.environ["GOMP_SPINCOUNT"]
