"""Products whose factors are integers from -127 to 127, times a scale for each row of either factor.

    number = scale * integer        scale = the row's largest magnitude / 127

A row of a first factor is one of x or h; a row of a weight matrix is a column of a panel. Integers are rounded to the
nearest, ties to even; their sums are exact, so that all kinds of kernels give the same bits:

    C = start + (row's scale * column's scale) * sum of integers, each operation rounded to float32

The depth is filled up with zeros to a whole number of `LOT`. What belongs to a row lies behind it:

    rows      [rows, K' + TAIL]          the row's scale, a float32, behind its integers
    panels    [J, K' / 4 + 2, P, 4]      numbers 4 k to 4 k + 3 of a column side by side; behind the depth the columns'
                                         scales, and what AVX-512's sums of a column begin with, as 32-bit integers

A row with a NaN or an infinity has the scale NaN, and so have its results; one without a number that counts, 0.

`KIND` says what multiplies: the tiles of AMX, AVX-512's sum of four products, or two 16-bit products added up.
AVX-512's first factor has no sign: its rows hold the integers plus `ZERO`, which the panels' last row undoes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from nbrnn.kernels import amx
from nbrnn.kernels.denormals import IS_X86
from nbrnn.kernels.jit import jitable
from nbrnn.kernels.simd import (
    FEATURES,
    VECTOR_BYTES,
    Lanes,
    as_lanes,
    element,
    emit_load,
    emit_splat,
    lane_max,
    lanes_of,
    load,
    load_transposed,
    pointer,
    shift,
    store,
    vector_type,
)
from nbrnn.kernels.tiles import Tile, compile_kernel, emit_panel

LOT = 64  # the depth of a product is filled up to a whole number of these
TAIL = 64  # bytes behind the integers of a row, which begins at a cache line
MOST = 127  # the largest integer
DEEPEST = (2**31 - 1) // MOST**2  # the depth for which no sum can overflow
KIND = "amx" if amx.available("int8") else "vnni" if "avx512vnni" in FEATURES and VECTOR_BYTES == 64 else "wide"
ZERO = 128 if KIND == "vnni" else 0
# Below this a row counts as zeros: its scale and the inverse of that would not both be numbers of full precision.
LEAST, LARGEST = np.float32(2.0**-118), np.finfo(np.float32).max
ROUND = 1.5 * 2**23  # a small number plus this has its nearest integer in the lowest bits
FLOATS = vector_type(types.float32)
WORDS = ir.VectorType(ir.IntType(32), FLOATS.count)
# Adds products of pairs of 16 bits
PAIRS = {16: "sse2.pmadd.wd", 32: "avx2.pmadd.wd", 64: "avx512.pmaddw.d.512"}
HAS_PAIRS = IS_X86 and (VECTOR_BYTES < 64 or "avx512bw" in FEATURES)


@jitable
def padded(depth):
    """The depth with its filling."""
    return (depth + LOT - 1) // LOT * LOT


@jitable
def row(depth):
    """Bytes in a row of a first factor."""
    return padded(depth) + TAIL


@jitable
def column(depth):
    """Bytes in a column of a panel."""
    return padded(depth) + 8


# ------------------------------------------------------------------ kernels, compiled once and called by address


def product_kernel(vectors: int) -> int:
    """The address of the kernel for panels of `vectors` vectors, which `tiles.product` calls."""
    return _kernel(vectors).address


@cache
def _kernel(vectors: int) -> Any:
    if KIND == "amx":

        def kernel(a, lda, b, depth, start, ld_start, c, ldc, rows, columns, ahead):
            _product(vectors, a, lda, b, depth, start, ld_start, c, ldc, rows, columns)

    else:

        def kernel(a, lda, b, depth, start, ld_start, c, ldc, rows, columns, ahead):
            _panel(vectors, a, lda // 4, b, depth // 4, start, ld_start, c, ldc, rows, columns, ahead)

    return compile_kernel(kernel, types.int8, types.float32, f"int8-{KIND}-{vectors}")


@jitable
def _product(vectors, a, lda, b, depth, start, ld_start, c, ldc, rows, columns):
    """The kernel with AMX: sums of up to two tiles of rows, then what their scales make of them."""
    N, sums, scales = vectors * amx.WORDS, amx.room(2, vectors), as_floats(shift(b, depth * vectors * amx.WORDS))
    columns = min(columns, N)
    for first in range(0, rows, 2 * amx.ROWS):
        at, count = shift(a, first * lda), min(rows - first, 2 * amx.ROWS)
        if count > amx.ROWS:
            amx.block("tdpbssd", 2, vectors, at, lda // 4, b, depth // 4, None, 0, sums, N)
        else:
            amx.block("tdpbssd", 1, vectors, at, lda // 4, b, depth // 4, None, 0, sums, N)
        for m in range(count):
            scale = element(as_floats(shift(at, m * lda + depth)), 0)
            for n in range(0, columns, amx.WORDS):
                before = load(shift(start, (first + m) * ld_start + n), columns - n)
                value = load_scaled(shift(sums, m * N + n), scale, shift(scales, n), before)
                store(shift(c, (first + m) * ldc + n), value, columns - n)


@intrinsic(prefer_literal=True)
def _panel(typingctx, vectors, a, lda, b, depth, start, ld_start, c, ldc, rows, columns, ahead):
    """Emit a kernel without AMX; lda and depth: in words of four numbers."""

    def codegen(context, builder, sig, args):
        _, a, lda, b, *rest, ahead = args
        a, b, ahead = (builder.bitcast(p, ir.IntType(32).as_pointer()) for p in (a, b, ahead))
        emit_panel(builder, _IntegerTile, 0, vectors.literal_value, FLOATS, a, lda, b, *rest, ahead)
        return context.get_dummy_value()

    n = types.intp
    return types.void(vectors, a, n, b, n, start, n, c, n, n, n, b), codegen


class _IntegerTile(Tile):
    """A tile of 32-bit sums: one instruction adds four products, or two add two each, of bytes 0 and 2, and 1 and 3."""

    parts = 1 if KIND == "vnni" else 2

    def _begin(self, rows, row, b, start, whole):
        if not ZERO:
            return [ir.Constant(WORDS, None)] * (rows * self.vectors)
        return [self._words(p) for p in self._behind(b, 1)] * rows

    def _end(self, sums, rows, row, a, b, start, whole):
        builder, V = self.builder, self.vectors
        before = super()._begin(rows, row, b, start, whole)
        scales, result = [builder.bitcast(self._words(p), FLOATS) for p in self._behind(b, 0)], []
        for r in range(rows):
            at = builder.gep(a, [builder.add(builder.mul(self.lda.type(r), self.lda), self.depth)])
            scale = builder.bitcast(builder.load(at), ir.FloatType())
            result += [_emit_scaled(builder, sums[r * V + v], scale, scales[v], before[r * V + v]) for v in range(V)]
        return result

    def _behind(self, b, n):
        """Where the vectors of the n-th row behind the depth of a panel begin."""
        line = self.builder.mul(self.builder.add(self.depth, self.depth.type(n)), self.ldb)
        places = [self.builder.add(line, line.type(v * WORDS.count)) for v in range(self.vectors)]
        return [self.builder.gep(b, [place]) for place in places]

    def _words(self, p):
        return self.builder.load(self.builder.bitcast(p, WORDS.as_pointer()), align=4)

    def _column(self, p, part):
        return self._side(self._words(p), part)

    def _factor(self, value, part):
        return self._side(emit_splat(self.builder, value, WORDS), part)

    def _side(self, words, part):
        return words if self.parts == 1 else _emit_side(self.builder, words, part)

    def _add(self, total, factor, column):
        if self.parts == 2:
            return self.builder.add(total, _emit_pairs(self.builder, factor, column))
        kind = ir.FunctionType(WORDS, [WORDS] * 3)
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
        return self.builder.call(function, [total, factor, column])


def _emit_side(builder, words, side):
    """Bytes 0 and 2 of words or, for the side 1, bytes 1 and 3, as vectors of 16-bit integers."""
    halves = ir.VectorType(ir.IntType(16), 2 * WORDS.count)
    eight, value = ir.Constant(halves, [8] * halves.count), builder.bitcast(words, halves)
    return builder.ashr(value if side else builder.shl(value, eight), eight)


def _emit_pairs(builder, a, b):
    """For each word the sum of the products of its two 16-bit integers."""
    if HAS_PAIRS:
        kind = ir.FunctionType(WORDS, [a.type] * 2)
        name = f"llvm.x86.{PAIRS[VECTOR_BYTES]}"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b])
    sixteen, a, b = ir.Constant(WORDS, [16] * WORDS.count), builder.bitcast(a, WORDS), builder.bitcast(b, WORDS)
    low = [builder.ashr(builder.shl(x, sixteen), sixteen) for x in (a, b)]
    return builder.add(builder.mul(*low), builder.mul(builder.ashr(a, sixteen), builder.ashr(b, sixteen)))


def _emit_scaled(builder, sums, scale, scales, start):
    """start + (scale scales) sums."""
    factor = builder.fmul(emit_splat(builder, scale, FLOATS), scales)
    return builder.fadd(start, _emit_fence(builder, builder.fmul(factor, builder.sitofp(sums, FLOATS))))


def _emit_fence(builder, value):
    """The value, whose operation is not fused with the next one: not every CPU could do that."""
    bits = "f32" if value.type == FLOATS else "f64"
    count = f"v{value.type.count}" if isinstance(value.type, ir.VectorType) else ""
    kind = ir.FunctionType(value.type, [value.type])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.arithmetic.fence.{count}{bits}")
    return builder.call(function, [value])


@intrinsic
def load_scaled(typingctx, p, scale, scales, start):
    """start + (scale * scales) * sums for a vector of sums at p, which are 32-bit integers, and of scales."""

    def codegen(context, builder, sig, args):
        p, scale, scales, start = args
        sums = builder.load(builder.bitcast(p, WORDS.as_pointer()), align=4)
        return _emit_scaled(builder, sums, scale, emit_load(builder, scales, FLOATS), start)

    return start(p, types.float32, scales, start), codegen


# ------------------------------------------------------------------ rounding


@jitable
def round_rows(source, stride, rows, step, piece, pieces, out, ld):
    """Round the pieces of some rows, `piece` numbers long and `step` apart, and put them side by side."""
    W, behind = lanes_of(source), padded(piece * pieces)
    for m in range(rows):
        line, to = shift(source, m * stride), shift(out, m * ld)
        scale = _scale_of(line, step, piece, pieces)
        inverse = inverse_of(scale)
        for n in range(pieces):
            for c in range(0, piece, W):
                store_bytes(shift(to, n * piece + c), load(shift(line, n * step + c), piece - c), inverse)
        store(as_floats(shift(to, behind)), scale, 1)


@jitable
def _scale_of(line, step, piece, pieces):
    """The scale of a row."""
    W, most = lanes_of(line), load(line, 0)
    for n in range(pieces):
        for c in range(0, piece, W):
            most = larger_magnitude(most, load(shift(line, n * step + c), piece - c))
    largest = lane_max(most)
    if largest < LEAST:
        return np.float32(0)
    return largest * np.float32(1 / MOST) if largest <= LARGEST else np.float32(np.nan)


@jitable
def pack_rows(s, shards, weight, order, out):
    """The rows order[j P + c] of a weight as panels for ``x @ weight.T``; -1: zeros."""
    J, quads, P, _ = out.shape
    K, W, depth = weight.shape[1], lanes_of(pointer(weight, 0)), 4 * (quads - 2)
    for j in range(J * s // shards, J * (s + 1) // shards):
        panel = pointer(out, j * quads * P * 4)
        scales = as_floats(shift(panel, depth * P))
        for c in range(P):
            number = order[j * P + c]
            scale = _scale_of(pointer(weight, max(number, 0) * K), 0, K, 1 if number >= 0 else 0)
            store(shift(scales, c), scale, 1)
        for c in range(0, P, W):
            inverse = inverse_of(load(shift(scales, c), W))
            for k in range(0, depth, W):
                block = load_transposed(pointer(weight, min(k, K)), pointer(order, j * P + c), K, K - k)
                store_quads_of(shift(panel, k * P + 4 * c), 4 * P, block, inverse)
            store_beginning(shift(panel, 4 * c), 4 * P, depth // 4)


@jitable
def token_row(panel, depth, columns, token, c):
    """One vector of a row of a panel, from column c on."""
    scales = as_floats(shift(panel, depth * columns + 4 * c))
    return load_part(shift(panel, token // 4 * 4 * columns + 4 * c), token % 4) * load(scales, lanes_of(scales))


@intrinsic
def as_floats(typingctx, p):
    """A pointer to float32 at the same place."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(p), codegen


@intrinsic
def larger_magnitude(typingctx, a, b):
    """For each lane the larger magnitude of two; of NaN, infinity and numbers, the first there is."""

    def codegen(context, builder, sig, args):
        # The bits of magnitudes are in the order of the numbers.
        magnitude = ir.Constant(WORDS, [0x7FFFFFFF] * WORDS.count)
        a, b = (builder.and_(builder.bitcast(x, WORDS), magnitude) for x in args)
        return builder.bitcast(builder.select(builder.icmp_signed(">", a, b), a, b), FLOATS)

    return a(a, b), codegen


@intrinsic
def inverse_of(typingctx, scale):
    """1 / scale in all lanes, 0 where it is 0 or NaN; scale: lanes or a number."""
    lanes = Lanes(types.float32)

    def codegen(context, builder, sig, args):
        narrow, wide, one = args[0].type, ir.DoubleType(), 1.0
        if isinstance(narrow, ir.VectorType):
            wide, one = ir.VectorType(wide, narrow.count), [1.0] * narrow.count
        # In float64: quotients of float32 may be estimates, which differ between CPUs.
        divisor = _emit_fence(builder, builder.fpext(args[0], wide))
        inverse = builder.fptrunc(builder.fdiv(ir.Constant(wide, one), divisor), narrow)
        zero = ir.Constant(narrow, None if isinstance(narrow, ir.VectorType) else 0.0)
        inverse = builder.select(builder.fcmp_ordered(">", args[0], zero), inverse, zero)
        return as_lanes(context, builder, inverse, sig.args[0], lanes)

    return lanes(scale), codegen


def _emit_rounded(builder, value, inverse, zero):
    """The nearest integers to value / scale, plus `zero`, in the lowest bytes of words."""
    shifted = builder.fadd(
        _emit_fence(builder, builder.fmul(value, inverse)), ir.Constant(FLOATS, [ROUND + zero] * FLOATS.count)
    )
    return builder.bitcast(shifted, WORDS)


@intrinsic
def store_bytes(typingctx, p, value, inverse):
    """Store all lanes of `value`, rounded, as a first factor has them."""

    def codegen(context, builder, sig, args):
        p, value, inverse = args
        bytes_ = ir.VectorType(ir.IntType(8), WORDS.count)
        rounded = builder.trunc(_emit_rounded(builder, value, inverse, ZERO), bytes_)
        builder.store(rounded, builder.bitcast(p, bytes_.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(p, value, inverse), codegen


@intrinsic
def store_quads_of(typingctx, p, stride, values, inverse):
    """Store the lanes of vectors 0 to 3 of a tuple at p, rounded, in turn; of 4 to 7 `stride` bytes further on, ..."""

    def codegen(context, builder, sig, args):
        p, stride, values, inverse = args
        rounded = [_emit_rounded(builder, value, inverse, 0) for value in cgutils.unpack_tuple(builder, values)]
        low = ir.Constant(WORDS, [255] * WORDS.count)
        for n in range(0, len(rounded), 4):
            word = builder.and_(rounded[n], low)
            for part in range(1, 4):
                places = ir.Constant(WORDS, [8 * part] * WORDS.count)
                word = builder.or_(word, builder.shl(builder.and_(rounded[n + part], low), places))
            at = builder.gep(p, [builder.mul(stride, stride.type(n // 4))])
            builder.store(word, builder.bitcast(at, WORDS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(p, types.intp, values, inverse), codegen


def _emit_part(builder, words, part):
    """One byte of each word; part: an integer vector."""
    top = ir.Constant(WORDS, [24] * WORDS.count)
    places = builder.sub(top, builder.shl(part, ir.Constant(WORDS, [3] * WORDS.count)))
    return builder.ashr(builder.shl(words, places), top)


@intrinsic
def load_part(typingctx, p, part):
    """One of each four numbers, as lanes of float32."""

    def codegen(context, builder, sig, args):
        words = builder.load(builder.bitcast(args[0], WORDS.as_pointer()), align=4)
        part = emit_splat(builder, builder.trunc(args[1], ir.IntType(32)), WORDS)
        return builder.sitofp(_emit_part(builder, words, part), FLOATS)

    return Lanes(types.float32)(p, types.intp), codegen


@intrinsic
def store_beginning(typingctx, p, stride, count):
    """Behind `count` words of each column, `stride` bytes apart, and the scales: -128 times the sum of the column."""

    def codegen(context, builder, sig, args):
        p, stride, count = args

        def at(n):
            return builder.bitcast(builder.gep(p, [builder.mul(stride, n)]), WORDS.as_pointer())

        total = cgutils.alloca_once_value(builder, ir.Constant(WORDS, None))
        builder.store(ir.Constant(WORDS, None), total)
        with cgutils.for_range(builder, count) as loop:
            words, value = builder.load(at(loop.index), align=4), builder.load(total)
            for part in range(4):
                value = builder.add(value, _emit_part(builder, words, ir.Constant(WORDS, [part] * WORDS.count)))
            builder.store(value, total)
        factor = ir.Constant(WORDS, [-128] * WORDS.count)
        builder.store(builder.mul(builder.load(total), factor), at(builder.add(count, count.type(1))), align=4)
        return context.get_dummy_value()

    return types.void(p, types.intp, types.intp), codegen
