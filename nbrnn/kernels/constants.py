"""Plain objects whose attributes are constants of compiled code.

The Numba type of such an object holds the object itself, so that what is compiled for it is compiled for its numbers:
integers arrive as literals, functions as functions, and NumPy's numbers as numbers. Nothing of it is left at run time.

Numba's cache knows what was compiled by a pickle of the object. So its functions have to be found in their modules by
name: one that is defined in another is pickled with its code, which is other bytes where Python has loaded byte code.
"""

from __future__ import annotations

import numpy as np
from numba import typeof
from numba.core import types
from numba.core.imputils import lower_constant
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import lower_getattr_generic, models, register_model, typeof_impl


class Constants:
    """Base of classes with integers and `jitable` functions as attributes; `name` tells the objects apart."""

    name: str


class ConstantsType(types.Dummy):
    """The Numba type of one such object."""

    def __init__(self, value: Constants):
        self.value = value
        super().__init__(f"Constants({type(value).__name__}, {value.name})")


register_model(ConstantsType)(models.OpaqueModel)


@typeof_impl.register(Constants)
def _type_of(value, context):
    return ConstantsType(value)


@lower_constant(ConstantsType)
def _lower_constant(context, builder, kind, value):
    return context.get_dummy_value()


@infer_getattr
class _Attributes(AttributeTemplate):
    key = ConstantsType

    def generic_resolve(self, kind, name):
        value = getattr(kind.value, name)
        return types.literal(value) if isinstance(value, int) else self.context.resolve_value_type(value)


@lower_getattr_generic(ConstantsType)
def _lower_attribute(context, builder, kind, value, name):
    found = getattr(kind.value, name)
    if isinstance(found, np.generic):
        return context.get_constant(typeof(found), found)
    return context.get_constant(types.intp, found) if isinstance(found, int) else context.get_dummy_value()
