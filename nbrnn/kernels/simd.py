"""Vectors of the host: lanes as a Numba type, loads and stores.

Lanes
    `Lanes(float32, 16)` is one vector register's worth of numbers as a Numba type with the arithmetic operators, so
    that an equation written for one number compiles on a whole vector: ``c = f * c_prev + i * g``. Plain numbers
    broadcast and take the lanes' precision. `load` and `store` move the first `count` lanes, for edges.

All of it is LLVM vector code of generic types; the width alone is the host's (AVX-512, AVX2, SSE, NEON).
"""

from __future__ import annotations

import functools
import operator

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from nbrnn.kernels.denormals import IS_X86
from nbrnn.kernels.jit import FASTMATH

# ------------------------------------------------------------------ the host


def _features() -> set[str]:
    """The CPU features that Numba compiles for, under LLVM's names."""
    text = numba.config.CPU_FEATURES
    if text is None:
        text = llvm.get_host_cpu_features().flatten()
    return {word[1:] for word in text.split(",") if word.startswith("+")}


FEATURES = _features()
CPU = numba.config.CPU_NAME or llvm.get_host_cpu_name()  # as LLVM calls it
VECTOR_BYTES = 64 if "avx512f" in FEATURES else 32 if "avx2" in FEATURES else 16
REGISTERS = 32 if "avx512f" in FEATURES or not IS_X86 else 16
FLAGS = tuple(sorted(FASTMATH))


def width(dtype: object) -> int:
    """Lanes of `dtype` (float32 or float64) in a vector register."""
    return VECTOR_BYTES // np.dtype(dtype).itemsize


def instruction_set() -> str:
    """The host's vector instructions in words."""
    names = {64: "AVX-512", 32: "AVX2", 16: "SSE"}
    return names[VECTOR_BYTES] if IS_X86 else "NEON"


# ------------------------------------------------------------------ lanes as a type


class Lanes(types.Type):
    """The Numba type of one vector of `count` numbers of `dtype`."""

    def __init__(self, dtype: types.Float):
        self.dtype = dtype
        self.count = VECTOR_BYTES * 8 // dtype.bitwidth
        super().__init__(name=f"Lanes({dtype}, {self.count})")


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    def __init__(self, manager, lanes):
        super().__init__(manager, lanes, vector_type(lanes.dtype))


def vector_type(dtype: types.Float) -> ir.VectorType:
    scalar = ir.FloatType() if dtype == types.float32 else ir.DoubleType()
    return ir.VectorType(scalar, VECTOR_BYTES * 8 // dtype.bitwidth)


def _integers(vector: ir.VectorType) -> ir.VectorType:
    """The vector of integers of the same width."""
    return ir.VectorType(ir.IntType(32 if isinstance(vector.element, ir.FloatType) else 64), vector.count)


def emit_splat(builder, value, vector):
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    undefined = ir.Constant(vector, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(undefined, value, ir.IntType(32)(0)), undefined, zeros)


def as_lanes(context, builder, value, kind, lanes):
    if isinstance(kind, Lanes):
        return value
    return emit_splat(builder, context.cast(builder, value, kind, lanes.dtype), vector_type(lanes.dtype))


def _binary(operators, instruction):
    """Lower Python operators on two lanes, or lanes and a number, to one vector instruction."""

    class Template(AbstractTemplate):
        def generic(self, args, kws):
            lanes = next((a for a in args if isinstance(a, Lanes)), None)
            if len(args) == 2 and lanes and all(a == lanes or isinstance(a, types.Number) for a in args):
                return signature(lanes, *args)

    def lower(context, builder, sig, args):
        left, right = (as_lanes(context, builder, v, kind, sig.return_type) for v, kind in zip(args, sig.args))
        return getattr(builder, instruction)(left, right, flags=FLAGS)

    for name in operators:
        infer_global(name)(Template)
        for pair in ((Lanes, Lanes), (Lanes, types.Number), (types.Number, Lanes)):
            lower_builtin(name, *pair)(lower)


_binary((operator.add, operator.iadd), "fadd")
_binary((operator.sub, operator.isub), "fsub")
_binary((operator.mul, operator.imul), "fmul")
_binary((operator.truediv, operator.itruediv), "fdiv")


@infer_global(operator.neg)
class _Negative(AbstractTemplate):
    def generic(self, args, kws):
        if isinstance(args[0], Lanes):
            return signature(args[0], args[0])


@lower_builtin(operator.neg, Lanes)
def _negative(context, builder, sig, args):
    return builder.fneg(args[0])


@intrinsic
def where_less(typingctx, a, b, x, y):
    """x where a < b, else y (also where a is NaN); numbers broadcast."""
    lanes = next((kind for kind in (a, b, x, y) if isinstance(kind, Lanes)), None)
    if lanes is None:
        return None

    def codegen(context, builder, sig, args):
        a, b, x, y = (as_lanes(context, builder, v, kind, lanes) for v, kind in zip(args, sig.args))
        return builder.select(builder.fcmp_ordered("<", a, b), x, y)

    return lanes(a, b, x, y), codegen


@intrinsic
def clip(typingctx, x, low, high):
    """`x` within [low, high]; NaN passes."""
    if not isinstance(x, Lanes):
        return None

    def codegen(context, builder, sig, args):
        x, low, high = (as_lanes(context, builder, v, kind, sig.return_type) for v, kind in zip(args, sig.args))
        x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
        return builder.select(builder.fcmp_ordered(">", x, high), high, x)

    return x(x, low, high), codegen


@intrinsic
def by_precision(typingctx, x, single, double):
    """The number `single` where the lanes `x` are float32, else `double`."""
    if not isinstance(x, Lanes):
        return None
    place = 1 if x.dtype == types.float32 else 2

    def codegen(context, builder, sig, args):
        return context.cast(builder, args[place], sig.args[place], types.float64)

    return types.float64(x, single, double), codegen


@intrinsic
def power_of_two(typingctx, shifted):
    """2**n for lanes that hold n + `ROUND[dtype]`: n stands in the lowest bits, from where it goes to the exponent."""

    def codegen(context, builder, sig, args):
        vector = args[0].type
        whole = _integers(vector)
        bias, bits = (127, 23) if whole.element.width == 32 else (1023, 52)
        places = ir.Constant(whole, [bits] * vector.count)
        exponent = builder.add(builder.bitcast(args[0], whole), ir.Constant(whole, [bias] * vector.count))
        return builder.bitcast(builder.shl(exponent, places), vector)

    return shifted(shifted), codegen


@intrinsic
def lane_sum(typingctx, x):
    """The sum of all lanes, added in pairs: one fixed order."""

    def codegen(context, builder, sig, args):
        return _fold(builder, args[0], lambda a, b: builder.fadd(a, b))

    return x.dtype(x), codegen


@intrinsic
def lane_max(typingctx, x):
    """The largest lane; a NaN in any lane gives NaN."""

    def codegen(context, builder, sig, args):
        def larger(a, b):
            keep = builder.or_(builder.fcmp_ordered(">", a, b), builder.fcmp_unordered("uno", a, a))
            return builder.select(keep, a, b)

        return _fold(builder, args[0], larger)

    return x.dtype(x), codegen


def _fold(builder, value, combine):
    """Halve a vector with `combine` until one number is left."""
    count = value.type.count
    while count > 1:
        count //= 2
        low, high = (
            builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(ir.IntType(32), count), list(lanes)))
            for lanes in (range(count), range(count, 2 * count))
        )
        value = combine(low, high)
    return builder.extract_element(value, ir.IntType(32)(0))


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


def emit_call(builder, name, vector, *args):
    suffix = f"v{vector.count}f{32 if isinstance(vector.element, ir.FloatType) else 64}"
    kind = ir.FunctionType(vector, [vector] * len(args))
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"{name}.{suffix}"), args)


# ------------------------------------------------------------------ memory


@intrinsic
def pointer(typingctx, array, offset):
    """A pointer to element `offset` of a C-contiguous array; others are refused when the caller is compiled."""
    if not isinstance(array, types.Array) or array.layout != "C":
        return None

    def codegen(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.gep(data, [args[1]])

    return types.CPointer(array.dtype)(array, types.intp), codegen


@intrinsic
def pointer_to(typingctx, number, address, offset):
    """A pointer to numbers of the kind of `number`, `offset` of them behind an address."""
    if not isinstance(number, types.Number):
        return None
    kind = types.CPointer(number)

    def codegen(context, builder, sig, args):
        data = builder.inttoptr(args[1], context.get_data_type(number).as_pointer())
        return builder.gep(data, [args[2]])

    return kind(number, types.intp, types.intp), codegen


@intrinsic
def element(typingctx, p, n):
    """Number n behind a pointer."""

    def codegen(context, builder, sig, args):
        return builder.load(builder.gep(args[0], [args[1]]))

    return p.dtype(p, types.intp), codegen


@intrinsic
def shift(typingctx, p, offset):
    """The pointer `offset` elements further on."""

    def codegen(context, builder, sig, args):
        return builder.gep(args[0], [args[1]])

    return p(p, types.intp), codegen


@intrinsic
def load(typingctx, p, count):
    """One vector from `p`: its first `count` lanes, zeros behind them; all of it where `count` is large enough."""
    lanes = Lanes(p.dtype)

    def codegen(context, builder, sig, args):
        p, count = args
        vector = vector_type(lanes.dtype)
        whole = _is_whole(builder, count, vector)
        return emit_either(builder, whole, lambda part: [emit_load(builder, p, vector, count if part else None)])[0]

    return lanes(p, types.intp), codegen


@intrinsic
def store(typingctx, p, value, count):
    """Store the first `count` lanes of `value` at `p`; a plain number fills them."""
    if not isinstance(value, (Lanes, types.Number)):
        return None
    lanes = Lanes(p.dtype)

    def codegen(context, builder, sig, args):
        value = as_lanes(context, builder, args[1], sig.args[1], lanes)
        _store_either(builder, [(args[0], value)], args[2])
        return context.get_dummy_value()

    return types.void(p, value, types.intp), codegen


def _store_either(builder, cells, count):
    """Store vectors, given as pairs (pointer, vector), whole or in part."""

    def emit(part):
        for p, value in cells:
            emit_store(builder, value, p, count if part else None)
        return []

    if cells:
        emit_either(builder, _is_whole(builder, count, cells[0][1].type), emit)


@intrinsic
def lanes_of(typingctx, p):
    """The lanes of a vector of the kind that `p` points to."""
    count = Lanes(p.dtype).count

    def codegen(context, builder, sig, args):
        return context.get_constant(types.intp, count)

    return types.intp(p), codegen


@intrinsic(prefer_literal=True)
def load_many(typingctx, p, stride, count, number):
    """A tuple of `number` vectors, `stride` elements apart."""
    if not isinstance(number, types.IntegerLiteral):
        return None
    lanes = Lanes(p.dtype)

    def codegen(context, builder, sig, args):
        p, stride, count, _ = args
        vector = vector_type(lanes.dtype)
        at = [builder.gep(p, [builder.mul(stride, stride.type(n))]) for n in range(number.literal_value)]

        def emit(part):
            return [emit_load(builder, q, vector, count if part else None) for q in at]

        return context.make_tuple(
            builder, sig.return_type, emit_either(builder, _is_whole(builder, count, vector), emit)
        )

    return types.UniTuple(lanes, number.literal_value)(p, types.intp, types.intp, number), codegen


@intrinsic
def store_many(typingctx, p, stride, values, count):
    """Store a tuple of vectors or numbers, `stride` elements apart."""
    if not isinstance(values, types.BaseTuple):
        return None
    lanes = Lanes(p.dtype)

    def codegen(context, builder, sig, args):
        p, stride, values, count = args
        cells = list(_tuple_cells(context, builder, p, stride, values, sig.args[2], lanes))
        _store_either(builder, cells, count)
        return context.get_dummy_value()

    return types.void(p, types.intp, values, types.intp), codegen


@intrinsic
def accumulate_many(typingctx, p, stride, values):
    """Add a tuple of vectors to those `stride` elements apart."""
    if not isinstance(values, types.BaseTuple):
        return None
    lanes = Lanes(p.dtype)

    def codegen(context, builder, sig, args):
        for at, value in _tuple_cells(context, builder, *args, sig.args[2], lanes):
            emit_store(builder, builder.fadd(emit_load(builder, at, value.type), value), at)
        return context.get_dummy_value()

    return types.void(p, types.intp, values), codegen


def _tuple_cells(context, builder, p, stride, values, kind, lanes):
    """Pointer and vector of every element of a tuple of vectors and numbers."""
    for n, value in enumerate(cgutils.unpack_tuple(builder, values)):
        yield builder.gep(p, [builder.mul(stride, stride.type(n))]), as_lanes(context, builder, value, kind[n], lanes)


@intrinsic
def store_padded(typingctx, p, stride, values, count):
    """Store a tuple of whole vectors or numbers, `stride` elements apart, with zeros behind the first `count` lanes."""
    if not isinstance(values, types.BaseTuple):
        return None
    lanes = Lanes(p.dtype)

    def codegen(context, builder, sig, args):
        p, stride, values, count = args
        mask = _mask(builder, count, vector_type(lanes.dtype))
        for at, value in _tuple_cells(context, builder, p, stride, values, sig.args[2], lanes):
            emit_store(builder, builder.select(mask, value, ir.Constant(value.type, None)), at)
        return context.get_dummy_value()

    return types.void(p, types.intp, values, types.intp), codegen


@intrinsic
def load_transposed(typingctx, p, rows, stride, count):
    """A square block of a matrix, its columns as a tuple of vectors: lane n of vector i is p[rows[n] stride + i].

    Zeros where rows[n] is negative, or i not below `count`.
    """
    lanes = Lanes(p.dtype)
    W = vector_type(lanes.dtype).count

    def codegen(context, builder, sig, args):
        p, rows, stride, count = args
        vector, zero = vector_type(lanes.dtype), stride.type(0)
        numbers = [builder.load(builder.gep(rows, [stride.type(n)])) for n in range(W)]
        signs = functools.reduce(builder.or_, numbers)
        whole = builder.and_(_is_whole(builder, count, vector), builder.icmp_signed(">=", signs, zero))

        def emit(part):
            found = []
            for row in numbers:
                there = builder.icmp_signed(">=", row, zero)
                at = builder.gep(p, [builder.mul(builder.select(there, row, zero), stride)])
                found.append(emit_load(builder, at, vector, builder.select(there, count, zero) if part else None))
            return found

        return context.make_tuple(builder, sig.return_type, emit_transposed(builder, emit_either(builder, whole, emit)))

    return types.UniTuple(lanes, W)(p, rows, types.intp, types.intp), codegen


def emit_transposed(builder, block):
    """Columns from rows: interleave the first half of the vectors with the second, log2(W) times."""
    W, i32 = len(block), ir.IntType(32)
    order = [lane for pair in zip(range(W), range(W, 2 * W)) for lane in pair]
    halves = [ir.Constant(ir.VectorType(i32, W), part) for part in (order[:W], order[W:])]
    for _ in range(W.bit_length() - 1):
        pairs = zip(block[: W // 2], block[W // 2 :])
        block = [builder.shuffle_vector(a, b, half) for a, b in pairs for half in halves]
    return block


@intrinsic
def store_first(typingctx, p, stride, values, number, count):
    """Store `count` lanes of the first `number` vectors of a tuple, `stride` elements apart."""
    lanes = Lanes(p.dtype)

    def codegen(context, builder, sig, args):
        p, stride, values, number, count = args
        for n, (at, value) in enumerate(_tuple_cells(context, builder, p, stride, values, sig.args[2], lanes)):
            with builder.if_then(builder.icmp_signed("<", number.type(n), number), likely=True):
                _store_either(builder, [(at, value)], count)
        return context.get_dummy_value()

    return types.void(p, types.intp, values, types.intp, types.intp), codegen


def _mask(builder, count, vector):
    """Which lanes come before `count`."""
    i32 = ir.VectorType(ir.IntType(32), vector.count)
    limit = emit_splat(builder, builder.trunc(count, ir.IntType(32)), i32)
    return builder.icmp_signed("<", ir.Constant(i32, list(range(vector.count))), limit)


def _masked(builder, kind, vector):
    """The LLVM intrinsic of a masked load or store."""
    p, mask = vector.as_pointer(), ir.VectorType(ir.IntType(1), vector.count)
    bits = 32 if isinstance(vector.element, ir.FloatType) else 64
    name = f"llvm.masked.{kind}.v{vector.count}f{bits}.p0"
    if kind == "load":
        signature = ir.FunctionType(vector, [p, ir.IntType(32), mask, vector])
    else:
        signature = ir.FunctionType(ir.VoidType(), [vector, p, ir.IntType(32), mask])
    return cgutils.get_or_insert_function(builder.module, signature, name)


def _alignment(vector):
    # Never more than an element's: an aligned access to an array that is not aligned is a crash, and gains nothing.
    return 4 if isinstance(vector.element, ir.FloatType) else 8


def emit_load(builder, p, vector, count=None):
    """A vector from `p`: all of it, or its first `count` lanes and zeros behind them."""
    at, align = builder.bitcast(p, vector.as_pointer()), _alignment(vector)
    if count is None:
        return builder.load(at, align=align)
    mask, zeros = _mask(builder, count, vector), ir.Constant(vector, None)
    return builder.call(_masked(builder, "load", vector), [at, ir.IntType(32)(align), mask, zeros])


def emit_store(builder, value, p, count=None):
    """Store a vector at `p`: all of it, or its first `count` lanes."""
    at, align = builder.bitcast(p, value.type.as_pointer()), _alignment(value.type)
    if count is None:
        builder.store(value, at, align=align)
    else:
        mask = _mask(builder, count, value.type)
        builder.call(_masked(builder, "store", value.type), [value, at, ir.IntType(32)(align), mask])


def emit_either(builder, whole, emit):
    """Emit a fast and a masked version of an access: ``emit(False)`` where `whole` holds, else ``emit(True)``.

    `emit` returns a list of vectors, from whichever version ran.
    """
    with builder.if_else(whole, likely=True) as (fast, masked):
        with fast:
            fast_values = emit(False)
            fast_block = builder.block
        with masked:
            masked_values = emit(True)
            masked_block = builder.block
    values = []
    for one, other in zip(fast_values, masked_values):
        value = builder.phi(one.type)
        value.add_incoming(one, fast_block)
        value.add_incoming(other, masked_block)
        values.append(value)
    return values


def _is_whole(builder, count, vector):
    return builder.icmp_signed(">=", count, count.type(vector.count))
