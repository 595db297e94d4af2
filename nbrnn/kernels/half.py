"""Products whose factors have half width: bfloat16, the upper half of a float32, with sums of float32.

Numbers of half width are kept as uint16. A product walks through the depth in pairs, so that

    rows      [rows, K']             K' is the depth filled up with zeros to a whole number of `LOT`
    panels    [J, K' / 2, P, 2]      numbers 2 k and 2 k + 1 of a column side by side

Everything that is rounded to half width is rounded to the nearest, ties to even. `KIND` says what multiplies: the tiles
of AMX, AVX-512's product of pairs, or float32 of which the lower half is zero, which still halves the memory of the
weights. Each has an order of its own in which it adds; with each of them a row's result does not depend on the rows
around it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from nbrnn.kernels import amx
from nbrnn.kernels.jit import jitable
from nbrnn.kernels.simd import (
    FEATURES,
    VECTOR_BYTES,
    Lanes,
    emit_either,
    emit_load,
    emit_splat,
    emit_transposed,
    vector_type,
)
from nbrnn.kernels.tiles import Tile, compile_kernel, emit_panel

LOT = 32  # the depth of a product is filled up to a whole number of these
NATIVE = "avx512bf16" in FEATURES and VECTOR_BYTES == 64
KIND = "amx" if amx.available("bf16") else "pairs" if NATIVE else "wide"
LANES, WORDS = Lanes(types.float32), ir.VectorType(ir.IntType(32), Lanes(types.float32).count)


class _BFloat(ir.Type):
    """LLVM's type of such a number, which llvmlite does not know."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat)

    def __hash__(self):
        return hash("bfloat")


@jitable
def padded(depth):
    """The depth with its filling."""
    return (depth + LOT - 1) // LOT * LOT


# ------------------------------------------------------------------ kernels, compiled once and called by address


def product_kernel(vectors: int) -> int:
    """The address of the kernel for panels of `vectors` vectors, which `tiles.product` calls."""
    return _kernel(vectors).address


@cache
def _kernel(vectors: int) -> Any:
    if KIND == "amx":

        def kernel(a, lda, b, depth, start, ld_start, c, ldc, rows, columns, ahead):
            amx.product(vectors, a, lda // 2, b, depth // 2, start, ld_start, c, ldc, rows, columns)

    else:

        def kernel(a, lda, b, depth, start, ld_start, c, ldc, rows, columns, ahead):
            _panel(vectors, a, lda // 2, b, depth // 2, start, ld_start, c, ldc, rows, columns, ahead)

    return compile_kernel(kernel, types.uint16, types.float32, f"half-{KIND}-{vectors}")


@intrinsic(prefer_literal=True)
def _panel(typingctx, vectors, a, lda, b, depth, start, ld_start, c, ldc, rows, columns, ahead):
    """Emit a kernel without AMX; lda and depth: in pairs."""

    def codegen(context, builder, sig, args):
        _, a, lda, b, *rest, ahead = args
        a, b, ahead = (builder.bitcast(p, ir.IntType(32).as_pointer()) for p in (a, b, ahead))
        emit_panel(builder, _HalfTile, 0, vectors.literal_value, vector_type(types.float32), a, lda, b, *rest, ahead)
        return context.get_dummy_value()

    n = types.intp
    return types.void(vectors, a, n, b, n, start, n, c, n, n, n, b), codegen


class _HalfTile(Tile):
    """A tile whose factors are pairs: one instruction adds both products, or one after the other does."""

    parts = 1 if KIND == "pairs" else 2

    def _column(self, p, part):
        words = self.builder.load(self.builder.bitcast(p, WORDS.as_pointer()), align=4)
        return words if self.parts == 1 else _emit_side(self.builder, words, part)

    def _factor(self, value, part):
        words = emit_splat(self.builder, value, WORDS)
        return words if self.parts == 1 else _emit_side(self.builder, words, part)

    def _add(self, total, factor, column):
        if self.parts == 2:
            return super()._add(total, factor, column)
        pairs = ir.VectorType(_BFloat(), 2 * WORDS.count)
        kind = ir.FunctionType(total.type, [total.type, pairs, pairs])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
        return self.builder.call(function, [total, *(self.builder.bitcast(x, pairs) for x in (factor, column))])


def _emit_side(builder, words, side):
    """The lower or the upper halves of words, as numbers."""
    sixteen = ir.Constant(WORDS, [16] * WORDS.count)
    upper = builder.shl(builder.lshr(words, sixteen) if side else words, sixteen)
    return builder.bitcast(upper, vector_type(types.float32))


# ------------------------------------------------------------------ rounding, on lanes


def _emit_rounded(builder, value):
    """The lanes rounded, each in the lower half of a word."""
    if NATIVE:
        rounded = builder.fptrunc(value, ir.VectorType(_BFloat(), WORDS.count))
        return builder.zext(builder.bitcast(rounded, ir.VectorType(ir.IntType(16), WORDS.count)), WORDS)

    def all_(number):
        return ir.Constant(WORDS, [number] * WORDS.count)

    bits, sixteen = builder.bitcast(value, WORDS), all_(16)
    odd = builder.and_(builder.lshr(bits, sixteen), all_(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, all_(0x7FFF))), sixteen)
    quiet = builder.or_(builder.lshr(bits, sixteen), all_(0x40))
    return builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)


def _emit_pairs(builder, low, high):
    """Words of two vectors' lanes, rounded, one beside the other."""
    shifted = builder.shl(_emit_rounded(builder, high), ir.Constant(WORDS, [16] * WORDS.count))
    return builder.or_(_emit_rounded(builder, low), shifted)


@intrinsic
def store_half(typingctx, p, value):
    """Store all lanes of `value`, rounded."""

    def codegen(context, builder, sig, args):
        halves = ir.VectorType(ir.IntType(16), WORDS.count)
        at = builder.bitcast(args[0], halves.as_pointer())
        builder.store(builder.trunc(_emit_rounded(builder, args[1]), halves), at, align=2)
        return context.get_dummy_value()

    return types.void(p, value), codegen


@intrinsic
def store_pairs(typingctx, p, low, high):
    """Store all lanes of two vectors, rounded, in turn."""

    def codegen(context, builder, sig, args):
        builder.store(_emit_pairs(builder, *args[1:]), builder.bitcast(args[0], WORDS.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(p, low, high), codegen


@intrinsic
def store_pairs_of(typingctx, p, stride, values):
    """`store_pairs` of vectors 0 and 1 of a tuple at p, of 2 and 3 `stride` numbers further on, and so forth."""

    def codegen(context, builder, sig, args):
        values = cgutils.unpack_tuple(builder, args[2])
        for n in range(0, len(values), 2):
            at = builder.gep(args[0], [builder.mul(args[1], args[1].type(n // 2))])
            pairs = _emit_pairs(builder, *values[n : n + 2])
            builder.store(pairs, builder.bitcast(at, WORDS.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(p, types.intp, values), codegen


@intrinsic
def load_side(typingctx, p, side):
    """Every second number, from number `side` on, 0 or 1, as lanes of float32."""

    def codegen(context, builder, sig, args):
        words = builder.load(builder.bitcast(args[0], WORDS.as_pointer()), align=2)
        odd = builder.icmp_signed("!=", args[1], args[1].type(0))
        return builder.select(odd, _emit_side(builder, words, 1), _emit_side(builder, words, 0))

    return LANES(p, types.intp), codegen


@intrinsic
def store_columns(typingctx, p, ld, source, stride, rows, columns, total):
    """p[c ld + k] = source[k stride + c], rounded, for a vector of c and two of k; zeros from `rows`, `columns` on.

    `total` plus those numbers as they were, one k after another.
    """
    W = LANES.count

    def codegen(context, builder, sig, args):
        p, ld, source, stride, rows, columns, total = args
        vector = vector_type(types.float32)
        whole = builder.and_(
            builder.icmp_signed(">=", rows, rows.type(2 * W)), builder.icmp_signed(">=", columns, rows.type(W))
        )

        def emit(part):
            found = []
            for k in range(2 * W):
                there = builder.icmp_signed("<", rows.type(k), rows)
                at = builder.mul(builder.select(there, stride.type(k), stride.type(0)), stride)
                count = builder.select(there, columns, rows.type(0)) if part else None
                found.append(emit_load(builder, builder.gep(source, [at]), vector, count))
            return found

        lines = emit_either(builder, whole, emit)
        for line in lines:
            total = builder.fadd(total, line)
        words = [_emit_pairs(builder, *lines[k : k + 2]) for k in range(0, 2 * W, 2)]
        for c, column in enumerate(emit_transposed(builder, words)):
            at = builder.gep(p, [builder.mul(ld, ld.type(c))])
            builder.store(column, builder.bitcast(at, WORDS.as_pointer()), align=2)
        return total

    n = types.intp
    return LANES(p, n, source, n, n, n, total), codegen
