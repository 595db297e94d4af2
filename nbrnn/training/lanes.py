"""What training needs of lanes beyond `kernels.simd`: a square root, sums in double precision, and filled-up edges."""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from nbrnn.kernels.simd import FLAGS, Lanes, emit_call, emit_splat, vector_type


@intrinsic
def sqrt(typingctx, x):
    """The square root of every lane, correctly rounded; NaN below zero."""
    if not isinstance(x, Lanes):
        return None

    def codegen(context, builder, sig, args):
        return emit_call(builder, "llvm.sqrt", args[0].type, args[0])

    return x(x), codegen


@intrinsic
def fill_behind(typingctx, x, count, number):
    """`x` with `number` behind its first `count` lanes."""
    if not isinstance(x, Lanes):
        return None

    def codegen(context, builder, sig, args):
        x_, count_, number_ = args
        places = ir.VectorType(count_.type, x_.type.count)
        before = builder.icmp_signed(
            "<", ir.Constant(places, list(range(places.count))), emit_splat(builder, count_, places)
        )
        rest = emit_splat(builder, context.cast(builder, number_, number, x.dtype), x_.type)
        return builder.select(before, x_, rest)

    return x(x, types.intp, number), codegen


@intrinsic
def squares(typingctx, x):
    """The squares of x's lanes as lanes of float64; two by two added up where x has twice as many lanes."""
    if not isinstance(x, Lanes):
        return None
    double = Lanes(types.float64)

    def codegen(context, builder, sig, args):
        vector = vector_type(types.float64)
        pieces = [args[0]]
        if x != double:
            numbers = range(x.count)
            pieces = [
                builder.fpext(_pick(builder, args[0], part), vector)
                for part in (numbers[: vector.count], numbers[vector.count :])
            ]
        products = [builder.fmul(piece, piece, flags=FLAGS) for piece in pieces]
        return products[0] if len(products) == 1 else builder.fadd(*products, flags=FLAGS)

    return double(x), codegen


def _pick(builder, value, lanes):
    """A vector of some of the lanes of another."""
    return builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes)))
