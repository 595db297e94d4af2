"""Products in register tiles: the micro-kernels that everything fast is made of.

`product`   C[rows, N] = start + A[rows, depth] @ B     B is a packed panel [depth, N]
`outer`     C[rows, N] = start + A[depth, rows].T @ B   the same of A's columns, for weight gradients

N is the panel's width, `panel_width(vectors, dtype)`: some vectors of the host. A tile of C, a few rows by a few
vectors, stays in registers over the whole depth. Each element of C is one chain of fused multiply-adds in the order
of the depth, whatever tile it falls in: a row's result does not depend on the rows around it.

Each kernel is compiled once and called by its address, which its callers are handed as a number: their own code stays
small and compiles soon. On the 16 registers of AVX2 and SSE a panel is run
in column groups of two or three vectors, since a wider tile would spill.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from nbrnn.kernels.jit import native
from nbrnn.kernels.simd import (
    CPU,
    REGISTERS,
    VECTOR_BYTES,
    emit_call,
    emit_either,
    emit_load,
    emit_splat,
    emit_store,
    vector_type,
    width,
)

INT = ir.IntType(64)
PREFETCH = 8  # steps of depth ahead
# Whether tiles ask for the panel that is wanted next. AMD's Zen has it in time; asking only takes of its loads.
ASKS = not CPU.startswith("znver")
LINE = 64  # bytes of a line of the caches
NEAREST, SECOND = 3, 2  # caches, as LLVM names them
VECTORS = 4  # vectors in a panel of a plain matrix


def panel_width(vectors: int, dtype: object) -> int:
    """Columns in a panel of `vectors` vectors."""
    return vectors * width(dtype)


def column_groups(vectors: int) -> list[int]:
    """How a panel's vectors are divided among tiles, from the number of registers."""
    if REGISTERS == 32:
        return [vectors]
    if vectors % 3 == 0:
        return [3] * (vectors // 3)
    return [2] * (vectors // 2) + [1] * (vectors % 2)


def rows_per_tile(vectors: int) -> int:
    """The most rows of a tile that is `vectors` wide: accumulators fill three quarters of the registers."""
    return min(8, REGISTERS * 3 // 4 // vectors)


# ------------------------------------------------------------------ what compiled code calls


@intrinsic
def product(typingctx, kernel, a, lda, b, depth, start, ld_start, c, ldc, rows, columns, ahead):
    """C[:rows, :columns] = start + A @ B for one packed panel B, with the kernel of `product_kernel`.

    `start` has the row stride `ld_start`: C itself to add to it, or a row of biases with the stride 0. `columns`
    below the panel's width leaves the rest of C untouched. `ahead` is the panel that is wanted next, perhaps from far
    memory: where `ASKS` says so the tiles ask for it, a line at every step of their depth.
    """

    def codegen(context, builder, sig, args):
        _call_kernel(builder, *args)
        return context.get_dummy_value()

    n = types.intp
    return types.void(types.uintp, a, n, b, n, start, n, c, n, n, n, b), codegen


@intrinsic
def outer(typingctx, kernel, a, lda, b, depth, start, ld_start, c, ldc, rows, columns):
    """C[:rows, :columns] = start + A.T @ B for a packed panel B, A[depth, rows], with the kernel of `outer_kernel`."""

    def codegen(context, builder, sig, args):
        _call_kernel(builder, *args, args[3])
        return context.get_dummy_value()

    n = types.intp
    return types.void(types.uintp, a, n, b, n, start, n, c, n, n, n), codegen


def _call_kernel(builder, kernel, *args):
    signature = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    builder.call(builder.inttoptr(kernel, signature.as_pointer()), args)


@intrinsic
def prefetch(typingctx, p, offset):
    """Ask for the memory `offset` elements behind p, which need not exist."""

    def codegen(context, builder, sig, args):
        _prefetch(builder, builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(p, types.intp), codegen


# ------------------------------------------------------------------ kernels, compiled once and called by address


def product_kernel(vectors: int, dtype: object) -> int:
    """The address of the kernel for panels of `vectors` vectors."""
    return _kernel("product", vectors, dtype).address


def outer_kernel(vectors: int, dtype: object) -> int:
    """The address of the kernel for weight gradients, on panels of `vectors` vectors."""
    return _kernel("outer", vectors, dtype).address


@cache
def _kernel(kind: str, vectors: int, dtype: object) -> Any:
    """A kernel, compiled or from the cache; whoever calls it by its address keeps it alive here."""
    name, transposed = np.dtype(dtype).name, int(kind == "outer")

    def kernel(a, lda, b, depth, start, ld_start, c, ldc, rows, columns, ahead):
        _panel(transposed, vectors, a, lda, b, depth, start, ld_start, c, ldc, rows, columns, ahead)

    return compile_kernel(kernel, getattr(types, name), getattr(types, name), f"{kind}-{name}-{vectors}")


def compile_kernel(kernel: Callable, factor: Any, number: Any, tag: str) -> Any:
    """``kernel(a, lda, b, depth, start, ld_start, c, ldc, rows, columns, ahead)``; the types of factors and of sums."""
    f, p, n = types.CPointer(factor), types.CPointer(number), types.intp
    return native(kernel, types.void(f, n, f, n, p, n, p, n, n, n, f), tag)


@intrinsic(prefer_literal=True)
def _panel(typingctx, transposed, vectors, a, lda, b, depth, start, ld_start, c, ldc, rows, columns, ahead):
    """Emit a kernel; `transposed` and `vectors` are literals."""

    def codegen(context, builder, sig, args):
        emit_panel(builder, Tile, *(kind.literal_value for kind in sig.args[:2]), vector_type(a.dtype), *args[2:])
        return context.get_dummy_value()

    n = types.intp
    return types.void(transposed, vectors, a, n, b, n, start, n, c, n, n, n, b), codegen


def emit_panel(
    builder, kind, transposed, vectors, vector, a, lda, b, depth, start, ld_start, c, ldc, rows, columns, ahead
):
    """Emit a kernel of some kind of tiles, for each number of vectors that `columns` may fill."""
    function, strides = builder.function, (lda, INT(vectors * vector.count), ld_start, ldc)
    done = function.append_basic_block("whole")
    full = builder.sdiv(builder.add(columns, INT(vector.count - 1)), INT(vector.count))
    some = function.append_basic_block(f"vectors{vectors}")
    choice = builder.switch(full, some)
    for count in range(vectors, 0, -1):
        if count < vectors:
            some = function.append_basic_block(f"vectors{count}")
            choice.add_case(INT(count), some)
        builder.position_at_end(some)
        first = 0
        for group in column_groups(count):
            at = INT(first * vector.count)
            pointers = [a, *(builder.gep(x, [at]) for x in (b, start, c))]
            tile = kind(builder, vector, group, transposed, strides, depth, builder.sub(columns, at))
            _row_loop(builder, rows, rows_per_tile(group), tile, pointers, ahead)
            first += group
        builder.branch(done)
    builder.position_at_end(done)


# ------------------------------------------------------------------ code generation


def _row_loop(builder, rows, most, tile, pointers, ahead):
    """Emit tiles over all rows: as few as possible, as equal as possible. Each asks for its part of what is ahead."""
    function = builder.function
    head, split, even, done = (function.append_basic_block(name) for name in ("head", "split", "even", "done"))
    entry = builder.block
    builder.branch(head)
    builder.position_at_end(head)
    row = builder.phi(INT)
    row.add_incoming(INT(0), entry)
    part = builder.phi(ahead.type)
    part.add_incoming(ahead, entry)
    left = builder.sub(rows, row)
    more = function.append_basic_block("more")
    builder.cbranch(builder.icmp_signed(">", left, INT(0)), more, done)
    builder.position_at_end(more)
    builder.cbranch(builder.icmp_signed(">", left, INT(most)), even, split)
    builder.position_at_end(even)
    tiles = builder.udiv(builder.add(left, INT(most - 1)), INT(most))
    share = builder.udiv(builder.sub(builder.add(left, tiles), INT(1)), tiles)
    builder.branch(split)
    builder.position_at_end(split)
    count = builder.phi(INT)
    count.add_incoming(left, more)
    count.add_incoming(share, even)
    switch = builder.switch(count, done)
    for m in range(1, most + 1):
        block = function.append_basic_block(f"rows{m}")
        switch.add_case(INT(m), block)
        builder.position_at_end(block)
        tile.emit(m, row, *pointers, part)
        row.add_incoming(builder.add(row, INT(m)), builder.block)
        part.add_incoming(builder.gep(part, [builder.mul(tile.depth, tile.line)]), builder.block)
        builder.branch(head)
    builder.position_at_end(done)


class Tile:
    """Emits C[rows, vectors] = start + A @ B with the tile of C in registers over the whole depth."""

    def __init__(self, builder, vector, vectors, transposed, strides, depth, columns):
        self.builder, self.vector, self.vectors, self.transposed = builder, vector, vectors, transposed
        self.lda, self.ldb, self.ld_start, self.ldc = strides
        self.depth, self.columns = depth, columns
        self.line = INT(LINE * vector.count // VECTOR_BYTES)

    def emit(self, rows, row, a, b, start, c, ahead):
        """One tile of `rows` rows, the first of them `row`, which asks for the lines from `ahead` on."""
        builder, vector = self.builder, self.vector
        a = builder.gep(a, [row if self.transposed else builder.mul(row, self.lda)])
        whole = builder.icmp_signed(">=", self.columns, INT(self.vectors * vector.count))

        def store(part):
            for value, (p, count) in zip(result, self._cells(rows, c, self.ldc, row)):
                emit_store(builder, value, p, count if part else None)
            return []

        if self.transposed:
            # C is large, its rows far from each other: ask for the next tile's in time.
            for p, _ in self._cells(rows, c, self.ldc, builder.add(row, INT(rows))):
                _prefetch(builder, p)
        tile = self._begin(rows, row, b, start, whole)
        entry = builder.block
        loop, done = (builder.function.append_basic_block(name) for name in ("depth", "tile"))
        builder.cbranch(builder.icmp_signed(">", self.depth, INT(0)), loop, done)
        builder.position_at_end(loop)
        k = builder.phi(INT)
        k.add_incoming(INT(0), entry)
        sums = [builder.phi(value.type) for value in tile]
        new = self._step(rows, a, b, k, sums)
        if ASKS and not self.transposed:
            _prefetch(builder, builder.gep(ahead, [builder.mul(k, self.line)]), SECOND)
        for phi, value, added in zip(sums, tile, new):
            phi.add_incoming(value, entry)
            phi.add_incoming(added, loop)
        following = builder.add(k, INT(1))
        k.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, self.depth), loop, done)
        builder.position_at_end(done)
        result = []
        for value, added in zip(tile, new):
            phi = builder.phi(value.type)
            phi.add_incoming(value, entry)
            phi.add_incoming(added, loop)
            result.append(phi)
        result = self._end(result, rows, row, a, b, start, whole)
        emit_either(builder, whole, store)

    def _cells(self, rows, base, stride, row):
        """Pointer and count of lanes of every vector of the tile."""
        builder = self.builder
        for r in range(rows):
            line = builder.gep(base, [builder.mul(builder.add(row, INT(r)), stride)])
            for v in range(self.vectors):
                at = INT(v * self.vector.count)
                yield builder.gep(line, [at]), builder.sub(self.columns, at)

    def _step(self, rows, a, b, k, sums):
        """One step of depth: sums + A[:, k] B[k, :]."""
        builder, vector = self.builder, self.vector
        line = builder.gep(b, [builder.mul(k, self.ldb)])
        at = [builder.gep(line, [INT(v * vector.count)]) for v in range(self.vectors)]
        if not self.transposed:  # whose panel has just been packed
            # The panel is read once, from the second cache or farther: ask for it in time.
            for p in at:
                _prefetch(builder, builder.gep(p, [builder.mul(self.ldb, INT(PREFETCH))]))
        for part in range(self.parts):
            columns, new = [self._column(p, part) for p in at], []
            for r in range(rows):
                if self.transposed:
                    place = builder.add(builder.mul(k, self.lda), INT(r))
                else:
                    place = builder.add(builder.mul(INT(r), self.lda), k)
                factor = self._factor(builder.load(builder.gep(a, [place])), part)
                new += [self._add(sums[r * self.vectors + v], factor, columns[v]) for v in range(self.vectors)]
            sums = new
        return sums

    # What sums begin with and become, and what a step does with the numbers that it loads; `half` and `int8` have other
    # kinds of numbers.
    parts = 1

    def _begin(self, rows, row, b, start, whole):
        def load(part):
            cells = self._cells(rows, start, self.ld_start, row)
            return [emit_load(self.builder, p, self.vector, count if part else None) for p, count in cells]

        return emit_either(self.builder, whole, load)

    def _end(self, sums, rows, row, a, b, start, whole):
        return sums

    def _column(self, p, part):
        return emit_load(self.builder, p, self.vector)

    def _factor(self, value, part):
        return emit_splat(self.builder, value, self.vector)

    def _add(self, total, factor, column):
        return emit_call(self.builder, "llvm.fmuladd", self.vector, factor, column, total)


def _prefetch(builder, p, cache=NEAREST):
    byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    # to read (0), data (1)
    builder.call(function, [builder.bitcast(p, byte), i32(0), i32(cache), i32(1)])
