"""Numbers too small for a full mantissa are zero inside kernels: the core would take a hundred times as long for them.

The mode is a thread's own and belongs to the caller, so every kernel puts it back. Where the processor is not an x86
nothing is changed.
"""

from __future__ import annotations

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

IS_X86 = llvm.get_process_triple().startswith(("x86_64", "i386", "i686", "amd64"))
FLUSH_RESULTS, FLUSH_OPERANDS = 1 << 15, 1 << 6
WORD = ir.IntType(32)


def _control(builder, name, place):
    """Store or load the control word of the vector unit."""
    byte = ir.IntType(8).as_pointer()
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), [byte]), name)
    builder.call(function, [builder.bitcast(place, byte)])


@intrinsic
def flush_denormals(typingctx):
    """Switch the mode on; what `restore_denormals` needs to put it back."""

    def codegen(context, builder, sig, args):
        place = cgutils.alloca_once(builder, WORD)
        if not IS_X86:
            return WORD(0)
        _control(builder, "llvm.x86.sse.stmxcsr", place)
        before = builder.load(place)
        builder.store(builder.or_(before, WORD(FLUSH_RESULTS | FLUSH_OPERANDS)), place)
        _control(builder, "llvm.x86.sse.ldmxcsr", place)
        return before

    return types.uint32(), codegen


@intrinsic
def restore_denormals(typingctx, before):
    """Put the mode back."""

    def codegen(context, builder, sig, args):
        if IS_X86:
            place = cgutils.alloca_once(builder, WORD)
            builder.store(args[0], place)
            _control(builder, "llvm.x86.sse.ldmxcsr", place)
        return context.get_dummy_value()

    return types.void(types.uint32), codegen
