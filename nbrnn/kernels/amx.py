"""The tile registers of Intel's AMX: sixteen rows of sixteen words each, multiplied by one instruction.

`begin` and `end` stand around whatever uses them in a thread. `block` multiplies a few whole tiles: C is cut into tiles
of 16 by 16 numbers, A into 16 rows by 16 words of depth, each two numbers of half width (`half`) or four small integers
(`int8`). A tile that reaches over the edge of C is computed in a scratch; A must have `BEHIND` rows of memory behind
its last one, of any content. So each row of C is the same operations, whatever rows are around it.

Linux gives a process the registers only when it asks for them.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from nbrnn.kernels.jit import jitable
from nbrnn.kernels.simd import FEATURES, lanes_of, load, shift, store

ROWS = 16  # of a tile
BEHIND = ROWS  # rows of memory behind the last one of a first factor
WORDS = 16  # in a row of a tile
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, TILE_DATA = 158, 0x1023, 18
I8, I64 = ir.IntType(8), ir.IntType(64)


@cache
def available(numbers: str = "tile") -> bool:
    """Whether the CPU has the tiles, and the instructions for some numbers ("bf16", "int8"), and the system lets this
    process use them."""
    if not {"amx-tile", f"amx-{numbers}", "avx512f"} <= FEATURES or sys.platform != "linux":
        return False
    try:
        return ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0
    except (OSError, AttributeError):
        return False


@intrinsic
def begin(typingctx):
    """Give the thread eight tiles of full size; nothing without AMX."""

    def codegen(context, builder, sig, args):
        if available():
            # A palette, and for each tile the bytes of a row (16 bits) and the rows (8 bits)
            layout = bytearray(64)
            layout[0] = 1
            for tile in range(8):
                layout[16 + 2 * tile], layout[48 + tile] = 4 * WORDS, ROWS
            constant = cgutils.create_constant_array(I8, layout)
            _emit(builder, "ldtilecfg", _bytes(builder, cgutils.global_constant(builder.module, "tiles", constant)))
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def end(typingctx):
    """Give them back: a thread that has none is switched sooner."""

    def codegen(context, builder, sig, args):
        if available():
            _emit(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic(prefer_literal=True)
def block(typingctx, name, high, vectors, a, lda, b, depth, start, ld_start, c, ldc):
    """C = start + A @ B for 16 `high` rows and a panel of `vectors` tiles, both literals.

    name: the instruction, a literal; lda, depth: in words; start: None for zeros.
    """

    def codegen(context, builder, sig, args):
        _, _, _, a, lda, b, depth, start, ld_start, c, ldc = args
        tall, wide = high.literal_value, vectors.literal_value
        a, b = (builder.bitcast(p, ir.IntType(32).as_pointer()) for p in (a, b))
        most = 4 // tall
        for first in range(0, wide, most):
            columns = range(first, min(first + most, wide))
            corners = [(n, m, v) for n, (m, v) in enumerate((m, v) for m in range(tall) for v in columns)]
            for n, m, v in corners:
                if isinstance(sig.args[7], types.NoneType):
                    _emit(builder, "tilezero", I8(n))
                else:
                    _move(builder, "tileloadd64", n, start, m, v, ld_start)
            with cgutils.for_range(builder, builder.udiv(depth, I64(WORDS))) as loop:
                k = builder.mul(loop.index, I64(WORDS))
                for m in range(tall):
                    _move(builder, "tileloadd64", 4 + m, builder.gep(a, [k]), m, 0, lda)
                for v in columns:
                    # Three or two registers for the second factor
                    right = 4 + tall + (v - first) % (4 - tall)
                    _move(
                        builder,
                        "tileloadd64",
                        right,
                        builder.gep(b, [builder.mul(k, I64(wide * WORDS))]),
                        0,
                        v,
                        I64(wide * WORDS),
                    )
                    for n, m, other in corners:
                        if other == v:
                            _emit(builder, name.literal_value, I8(n), I8(4 + m), I8(right))
            for n, m, v in corners:
                _move(builder, "tilestored64", n, c, m, v, ldc)
        return context.get_dummy_value()

    n = types.intp
    return types.void(name, high, vectors, a, n, b, n, start, n, c, n), codegen


@intrinsic(prefer_literal=True)
def room(typingctx, high, vectors):
    """A pointer to memory on the stack for `high` rows of `vectors` tiles, both literals."""
    count = high.literal_value * vectors.literal_value * ROWS * WORDS

    def codegen(context, builder, sig, args):
        at = cgutils.alloca_once(builder, ir.FloatType(), size=count)
        at.align = 64
        return at

    return types.CPointer(types.float32)(high, vectors), codegen


@jitable
def product(vectors, a, lda, b, depth, start, ld_start, c, ldc, rows, columns):
    """The kernel of `half`: C[:rows, :columns] = start + A @ B for a panel of `vectors` tiles; lda, depth: in words."""
    N, row, scratch = vectors * WORDS, 0, room(1, vectors)
    columns = min(columns, N)
    while row < rows:
        left, at = rows - row, shift(a, 2 * row * lda)
        before, after = shift(start, row * ld_start), shift(c, row * ldc)
        if columns == N and left >= 2 * ROWS:
            block("tdpbf16ps", 2, vectors, at, lda, b, depth, before, ld_start, after, ldc)
            row += ROWS
        elif columns == N and left >= ROWS:
            block("tdpbf16ps", 1, vectors, at, lda, b, depth, before, ld_start, after, ldc)
        else:
            _copy(before, ld_start, scratch, N, min(left, ROWS), columns)
            block("tdpbf16ps", 1, vectors, at, lda, b, depth, scratch, N, scratch, N)
            _copy(scratch, N, after, ldc, min(left, ROWS), columns)
        row += ROWS


@jitable
def _copy(source, ld_source, to, ld_to, rows, columns):
    for m in range(rows):
        for n in range(0, columns, lanes_of(source)):
            store(shift(to, m * ld_to + n), load(shift(source, m * ld_source + n), columns - n), columns - n)


def _move(builder, name, tile, p, row, column, stride):
    """Emit a load or a store of a tile: the one in some row and column of tiles behind p; stride: in words."""
    at = builder.gep(p, [builder.add(builder.mul(stride, I64(row * ROWS)), I64(column * WORDS))])
    _emit(builder, name, I8(tile), _bytes(builder, at), builder.mul(stride, I64(4)))


def _bytes(builder, p):
    return builder.bitcast(p, I8.as_pointer())


def _emit(builder, name, *args):
    kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), args)
