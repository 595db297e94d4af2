"""How compiled code calls a kernel by its address, and how a kernel finds its arguments.

The arguments lie side by side as 64-bit integers: integers, the bits of floats, addresses of contiguous arrays and the
shapes of those.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array
from numba.np.numpy_support import from_dtype

INT = ir.IntType(64)


@intrinsic
def address_of(typingctx, array):
    """Where a C-contiguous array begins; others are refused when the caller is compiled."""
    if not isinstance(array, types.Array) or array.layout != "C":
        return None

    def codegen(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, context.get_value_type(types.int64))

    return types.int64(array), codegen


@intrinsic
def call_kernel(typingctx, kernel, shard, shards, numbers, at):
    """Call the function at the address `kernel` with a shard, and a pointer to element `at` of an array."""

    def codegen(context, builder, sig, args):
        kernel, shard, shards, array, at = args
        data = context.make_array(sig.args[3])(context, builder, array).data
        kind = ir.FunctionType(ir.VoidType(), [INT, INT, INT.as_pointer()])
        builder.call(builder.inttoptr(kernel, kind.as_pointer()), [shard, shards, builder.gep(data, [at])])
        return context.get_dummy_value()

    n = types.int64
    return types.void(n, n, n, numbers, n), codegen


@intrinsic(prefer_literal=True)
def unpack(typingctx, numbers, words):
    """The arguments behind a pointer, as a tuple.

    words: their kinds, as a literal with commas between them: "int", "float", "integers" and how many (a tuple), or a
    dtype's name and the number of dimensions.
    """
    kinds = [_kind(word) for word in words.literal_value.split(",")] if words.literal_value else []

    def codegen(context, builder, sig, args):
        values, place = [], 0
        for kind in kinds:
            size = kind.count if isinstance(kind, types.UniTuple) else 1 + getattr(kind, "ndim", 0)
            found = [builder.load(builder.gep(args[0], [INT(place + n)])) for n in range(size)]
            place += size
            values.append(_argument(context, builder, kind, found))
        return context.make_tuple(builder, sig.return_type, values)

    return types.Tuple(kinds)(numbers, words), codegen


def _kind(word: str) -> types.Type:
    if word in ("int", "float"):
        return types.int64 if word == "int" else types.float64
    name, count = word.split()
    if name == "integers":
        return types.UniTuple(types.int64, int(count))
    return types.Array(from_dtype(np.dtype(name)), int(count), "C")


def _argument(context, builder, kind, found):
    if kind is types.int64:
        return found[0]
    if kind is types.float64:
        return builder.bitcast(found[0], ir.DoubleType())
    if isinstance(kind, types.UniTuple):
        return context.make_tuple(builder, kind, found)
    array, shape = context.make_array(kind)(context, builder), found[1:]
    size = context.get_abi_sizeof(context.get_data_type(kind.dtype))
    strides = [INT(size)]
    for extent in reversed(shape[1:]):
        strides.insert(0, builder.mul(strides[0], extent))
    data = builder.inttoptr(found[0], context.get_data_type(kind.dtype).as_pointer())
    populate_array(array, data, shape, strides, INT(size), meminfo=None)
    return array._getvalue()
