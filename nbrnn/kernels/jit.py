"""Compiler flags, the source stamp, threads and the fork guard: the one place for each.

`@jitable` marks a function that compiled code calls. `compiled` makes an entry that Python calls, cached on disk, and
`native` one that other entries call by its address. `@sharded` marks a function that divides its work among threads:
Python calls it through `run`, with the number of shards as the first argument.

Caching
    Numba looks at the file of the decorated function only, so that an edit of a helper would run the old code. Each
    entry's cache file is therefore named by a hash of the sources in `kernels`, `STAMP`, where all helpers live that
    other files use, and by a tag that tells apart the entries made by one factory. Two processes that compile
    different entries never write to the same file.

Threads
    An entry holds a serial and a parallel path. The serial one is taken for small work, for one thread, in a forked
    child (OpenMP kills a child that enters a region), and where the threading layer cannot be entered twice
    (workqueue) and is in use by another Python thread. A result never depends on the path.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba
from numba.extending import overload
from numba.np.ufunc import parallel

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


def jitable(function: Callable) -> Callable:
    """Let compiled code call `function`, which stays plain Python; a literal argument reaches it as a literal."""

    @overload(function, strict=False, prefer_literal=True)
    def implementation(*args):
        return function

    return function


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


def sharded(function: Callable) -> Callable:
    """Let `run` call ``function(shard, shards, *args)`` for every shard, in a parallel region if there are several.

    The function itself stays plain Python, since its entry is cached by its name.
    """
    function.entry = divided(function, f"{function.__name__}-{stamp_of(function)}")
    return function


def divided(function: Callable, tag: str) -> Callable:
    """The entry ``entry(shards, *args)`` that calls ``function(shard, shards, *args)`` for every shard."""
    shard = jitable(function)

    def entry(shards, *args):
        if shards == 1:  # no literals here: both paths share what is compiled
            mode = flush_denormals()
            shard(shards - 1, shards, *args)
            restore_denormals(mode)
        else:
            for s in numba.prange(shards):
                mode = flush_denormals()
                shard(s, shards, *args)
                restore_denormals(mode)

    return compiled(entry, tag=tag, parallel=True)


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


def run(function: Callable, shards: int, *args: Any) -> Any:
    """Call a sharded function on at most `shards` threads, in the calling thread alone where only that is safe.

    `function` may also be an entry of its own making (`compiled`) with the number of shards as its first argument.
    """
    entry = getattr(function, "entry", function)
    shards = min(shards, get_num_threads())
    if shards <= 1:
        return entry(1, *args)
    if threading_layer() != "workqueue":
        return _run_on(entry, shards, args)
    if not _entered.acquire(blocking=False):
        return entry(1, *args)
    try:
        return _run_on(entry, shards, args)
    finally:
        _entered.release()


@lru_cache(maxsize=1)
def _numbas_threads() -> Callable[[], int]:
    """`numba.get_num_threads` without the locks that it takes in every call."""
    threading_layer()
    return getattr(parallel, "_get_num_threads", numba.get_num_threads)


def _run_on(entry: Callable, shards: int, args: tuple) -> Any:
    before = _numbas_threads()()
    if before == shards:
        return entry(shards, *args)
    # Numba's own limit belongs to the user: lend it and give it back.
    numba.set_num_threads(shards)
    try:
        return entry(shards, *args)
    finally:
        numba.set_num_threads(before)
