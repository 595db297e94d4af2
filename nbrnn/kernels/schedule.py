"""How a scan is divided among threads: chosen by the size of the work, reported on request, never visible in a result.

serial   one thread: little work, or nothing to divide
batch    each thread takes some rows of the batch through all time steps, without waiting for the others
units    each thread takes some hidden units of every step, and all meet after each step: few rows, many units
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from nbrnn.kernels.jit import get_num_threads, threading_layer

# Floating-point operations below which a parallel region costs more than it saves. A region of OpenMP or TBB is
# entered in 1 to 3 us, one of workqueue in 70 to 100 us.
REGION_WORK = {"omp": 300_000, "tbb": 500_000, "workqueue": 10_000_000}
# Operations of the recurrent product of one time step below which a meeting of the threads costs more than it saves.
STEP_WORK = 32_000
# Rows that a thread needs for its register tiles to run at speed, and the fewest that are worth a division by rows.
ROWS, FEWEST_ROWS = 4, 3
# Where Linux tells of the caches, and the bytes of a second one where nobody does.
CACHES, SECOND = Path("/sys/devices/system/cpu/cpu0/cache"), 2 << 20
# Of a core's second cache, the part that weights can have; rows that are worth fetching weights from farther.
SHARE, CACHE_ROWS = 0.75, 24
# Bytes of weights that are worth handing one byte from thread to thread in each step.
HANDED = 64
# Rows of several time steps that the input product takes at once where a step has few, and how many are few for a
# thread that has a part of the rows, and weights that fill its cache.
BLOCK_ROWS, FEW_ROWS = 128, 8
# Time steps whose input product is done at once where all weights are far larger than a core's cache: its weights need
# not be fetched for each step.
BLOCK = 4
# Second caches that the tape of a block of steps fills on the way back, and how many blocks are worth their products'
# beginnings: a tape that is not much larger stays in the third cache.
BLOCK_CACHES, FEWEST_BLOCKS = 2, 3
# Bytes of gradients that are worth being summed in two halves, and how many times as much tape and how many rows then
# have to be there.
HALF_GRADIENTS, HALF_TAPE, HALF_ROWS = 512 << 10, 4, 16


@dataclass(frozen=True)
class Schedule:
    """How one scan runs.

    Parameters
    ----------
    kind : str
        "serial", "batch" or "units".
    shards : int
        Threads among which the work is divided.
    block : int
        Time steps whose input product is done at once.
    reason : str
        Why, in words.
    """

    kind: str
    shards: int
    block: int
    reason: str

    @property
    def by_units(self) -> bool:
        return self.kind == "units"


@lru_cache(maxsize=1)
def second_cache(folder: Path = CACHES) -> int:
    """Bytes of a core's second cache."""
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if level == "2" and kind != "Instruction" and size.endswith("K"):
            return int(size[:-1]) << 10
    return SECOND


@lru_cache(maxsize=1024)
def choose(
    T: int,
    B: int,
    even: bool,
    step_work: int,
    input_work: int,
    weights: int,
    inputs: int,
    handed: int,
    panels: int,
    threads: int,
    layer: str,
) -> Schedule:
    """The schedule of a scan.

    Parameters
    ----------
    T, B : int
        Time steps and rows.
    even : bool
        Whether all rows have all steps; others are divided so that each thread has about as many steps.
    step_work, input_work : int
        Floating-point operations of one step of one row, and those of its input product, which need not wait for it.
    weights, inputs : int
        Bytes of the recurrent weights, and of those of the input product.
    handed : int
        Bytes of a row that threads which divide the hidden units hand to each other in a step, where that is much: the
        gradients of all gates on the way back, as opposed to the one state on the way forward.
    panels : int
        Pieces into which the hidden units can be divided.
    threads : int
    layer : str
        Numba's threading layer.
    """
    block = max(1, min(T, -(-BLOCK_ROWS // max(B, 1)))) if B < CACHE_ROWS else 1
    serial = block if B < 12 else 1
    work = T * B * (step_work + input_work)
    if threads == 1:
        return Schedule("serial", 1, serial, "one thread")
    if work < REGION_WORK[layer]:
        return Schedule("serial", 1, serial, f"{work:,} operations are not worth a parallel region")
    cache = SHARE * second_cache()
    heavy = weights > cache and B < CACHE_ROWS * threads and weights >= HANDED * B * handed
    if handed:
        by_rows = B >= (ROWS if weights > cache else FEWEST_ROWS) * threads
    else:
        by_rows = B >= FEWEST_ROWS * threads and not (even and _uneven(B, step_work, panels, threads))
    if by_rows and not (heavy and panels >= threads):
        if B > FEW_ROWS * threads or weights + inputs <= cache:
            block = min(T, BLOCK) if weights + inputs > 2 * cache else 1
        return Schedule("batch", threads, block, f"{B} rows are at least {B // threads} for each thread")
    if panels >= threads and B * step_work >= STEP_WORK:
        words = f"{weights:,} bytes of weights for {B} rows" if heavy else f"{B} rows are few"
        return Schedule("units", threads, max(2, block), f"{words}, {panels} panels of hidden units can be divided")
    if B >= 2 * threads:
        return Schedule("batch", threads, 1, f"{B} rows can be divided, {panels} panels of hidden units can not")
    return Schedule("serial", 1, serial, "too few rows and too small a step to divide")


def _uneven(B: int, step_work: int, panels: int, threads: int) -> bool:
    """Whether the thread with most of the rows would take longer than the one with most of the hidden units, meetings
    included: for a few rows only, so that many never depend on how soon threads meet."""
    rows, units = -(-B // threads), -(-panels // threads)
    work = B * units * step_work // max(panels, 1) + STEP_WORK
    return panels >= threads and rows <= FEW_ROWS and work < max(rows, ROWS) * step_work


def blocks_back(T: int, tape: int, gradients: int) -> list[tuple[int, int]]:
    """From which time step to which the way back goes, block by block from the last step on, before it adds to the
    gradients of the weights: while it still has the tape of the block in its caches.

    tape, gradients: their bytes. How many blocks there are does not depend on threads, since results must not.
    """
    count = tape // max(BLOCK_CACHES * second_cache(), gradients)
    length = max(1, -(-T // count)) if count >= FEWEST_BLOCKS else max(1, T)
    return [(max(0, stop - length), stop) for stop in range(T, 0, -length)] or [(0, 0)]


def in_halves(B: int, tape: int, gradients: int) -> bool:
    """Whether the gradients of weights are summed apart for two halves of the rows: then each half of the threads
    gathers what it has written itself in the scan. That, too, does not depend on how many threads there are.

    tape, gradients: their bytes, of a whole sequence.
    """
    return B >= HALF_ROWS and gradients <= min(HALF_GRADIENTS, tape // HALF_TAPE)


def shards_for(work: int) -> int:
    """Threads for a product of so many floating-point operations, divided without meetings."""
    threads = get_num_threads()
    return threads if threads > 1 and work > REGION_WORK[threading_layer()] else 1
