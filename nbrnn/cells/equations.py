"""The language in which cells are written: plain Python arithmetic, and the functions below.

A cell's equations are ordinary functions. Called with numbers or NumPy arrays they compute; called with `Value`s they
leave behind the graph of what they would compute. `nbrnn.cells.program` calls them that way once, and
`compile_function` turns the graph into a function that the scan inlines on vectors of hidden units. So an option such
as clipping or zoneout is a Python function around the equations, and a cell needs no backward equations: `derive` makes
them from the graph.

What has to be kept from forward for backward follows from the graph, too (`choose_kept`): results of the costly
functions, unless they can be had again from the states; sums and products are computed again, unless the cell keeps
them itself. And so does what is the same at every step, and computed once in front of the loop (`choose_fixed`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbrnn.kernels import activations, simd
from nbrnn.kernels.jit import inlined

Number = Any  # a Value, a number or an array


# ------------------------------------------------------------------ values and functions


class Value:
    """A number that is not known yet: an operation and its arguments, Values or plain numbers."""

    __array_ufunc__ = None  # NumPy scalars leave the arithmetic to us

    def __init__(self, op: str, *args: Any):
        self.op, self.args = op, args

    def __add__(self, other):
        return self if _is_number(other, 0.0) else Value("+", self, other)

    def __radd__(self, other):
        return self if _is_number(other, 0.0) else Value("+", other, self)

    def __sub__(self, other):
        return self if _is_number(other, 0.0) else Value("-", self, other)

    def __rsub__(self, other):
        return -self if _is_number(other, 0.0) else Value("-", other, self)

    def __mul__(self, other):
        return self if _is_number(other, 1.0) else Value("*", self, other)

    def __rmul__(self, other):
        return self if _is_number(other, 1.0) else Value("*", other, self)

    def __truediv__(self, other):
        return Value("/", self, other)

    def __rtruediv__(self, other):
        return Value("/", other, self)

    def __neg__(self):
        return Value("neg", self)

    def __repr__(self):
        return f"<{self.op} of {len(self.args)}>" if self.op != "input" else "<{}[{}]>".format(*self.args)

    def __bool__(self, other: Any = None):
        raise TypeError("an equation cannot branch on a value: use where_less(a, b, x, y)")

    __lt__ = __le__ = __gt__ = __ge__ = __bool__


def _is_number(x: Number, number: float) -> bool:
    return not isinstance(x, Value) and np.ndim(x) == 0 and x == number


@dataclass(frozen=True)
class Function:
    """A function that equations may call.

    Parameters
    ----------
    name : str
    on_arrays : callable
        The same in NumPy.
    compiled : callable
        The same on lanes.
    pull : callable
        ``pull(dy, y, *args)``: the gradient with respect to each argument, 0.0 where it has none.
    costly : bool
        Whether its result is rather kept for backward than computed again.
    """

    name: str
    on_arrays: Callable
    compiled: Callable
    pull: Callable
    costly: bool = True

    def __call__(self, *args: Number) -> Number:
        if any(isinstance(arg, Value) for arg in args):
            return Value(self.name, *args)
        return self.on_arrays(*args)


FUNCTIONS: dict[str, Function] = {}


def _function(name: str, *args: Any, **options: Any) -> Function:
    FUNCTIONS[name] = Function(name, *args, **options)
    return FUNCTIONS[name]


def _pull_where(dy, y, a, b, left, right):
    return 0.0, 0.0, where_less(a, b, dy, 0.0), where_less(a, b, 0.0, dy)


def _pull_clip(dy, y, x, low, high):
    return where_less(low, x, where_less(x, high, dy, 0.0), 0.0), 0.0, 0.0


def _on_arrays_where(a, b, x, y):
    return np.where(np.less(a, b), x, y)


def _on_arrays_sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(np.less(x, 0), e, 1.0) / (1.0 + e)


exp = _function("exp", np.exp, activations.exp, lambda dy, y, x: (dy * y,))
sigmoid = _function("sigmoid", _on_arrays_sigmoid, activations.sigmoid, lambda dy, y, x: (dy * y * (1.0 - y),))
tanh = _function("tanh", np.tanh, activations.tanh, lambda dy, y, x: (dy * (1.0 - y * y),))
softplus = _function("softplus", lambda x: np.logaddexp(x, 0.0), activations.softplus,
                     lambda dy, y, x: (dy * sigmoid(x),))  # fmt: skip
sqrt = _function("sqrt", np.sqrt, simd.sqrt, lambda dy, y, x: (dy * 0.5 / y,))
clip = _function("clip", np.clip, simd.clip, _pull_clip, costly=False)
where_less = _function("where_less", _on_arrays_where, simd.where_less, _pull_where, costly=False)


def relu(x: Number) -> Number:
    """max(x, 0); NaN stays NaN."""
    return where_less(x, 0.0, 0.0, x)


# ------------------------------------------------------------------ graphs


class Graph:
    """Values in the order in which they can be computed, equal ones once."""

    def __init__(self):
        self._known: dict[tuple, Value] = {}

    def add(self, value: Number) -> Number:
        """The graph's own copy of a value; numbers pass."""
        if not isinstance(value, Value):
            return value
        order = _in_order([value])
        own: dict[int, Value] = {}
        for old in order:
            args = [own[id(arg)] if isinstance(arg, Value) else arg for arg in old.args]
            key = (old.op, *(("value", id(arg)) if isinstance(arg, Value) else arg for arg in args))
            new = old if all(a is b for a, b in zip(args, old.args)) else Value(old.op, *args)
            own[id(old)] = self._known.setdefault(key, new)
        return own[id(value)]


def _in_order(values: Iterable[Number], stop: Any = ()) -> list[Value]:
    """All Values on which some depend, themselves among them, arguments first; those in `stop` are not looked into."""
    order, seen = [], set()
    stack = [(value, False) for value in values if isinstance(value, Value)][::-1]
    while stack:
        value, done = stack.pop()
        if done:
            order.append(value)
        elif id(value) not in seen:
            seen.add(id(value))
            stack.append((value, True))
            if id(value) not in stop:
                stack += [(arg, False) for arg in value.args if isinstance(arg, Value)]
    return order


def inputs(group: str, count: int) -> tuple[Value, ...]:
    """Values that are given: a tuple argument of a compiled function."""
    return tuple(Value("input", group, n) for n in range(count))


def derive(
    outputs: Iterable[Number], gradients: Iterable[Number], wanted: Iterable[Number], stop: Iterable[Number] = ()
) -> list[Number]:
    """The gradients with respect to the `wanted` values, from those with respect to the outputs: the chain rule.

    What the values in `stop` depend on is left alone.
    """
    outputs, ends = list(outputs), {id(value) for value in stop}
    total: dict[int, Number] = {}

    def give(value: Number, gradient: Number) -> None:
        if isinstance(value, Value) and not _is_number(gradient, 0.0):
            total[id(value)] = total[id(value)] + gradient if id(value) in total else gradient

    for output, gradient in zip(outputs, gradients):
        give(output, gradient)
    for value in reversed(_in_order(outputs, ends)):
        gradient = total.get(id(value))
        if gradient is not None and value.op != "input" and id(value) not in ends:
            for arg, share in zip(value.args, _pull(gradient, value)):
                give(arg, share)
    return [total.get(id(value), 0.0) for value in wanted]


def _pull(dy: Value, y: Value) -> tuple[Number, ...]:
    """The gradient of each of a value's arguments."""
    if y.op in FUNCTIONS:
        return FUNCTIONS[y.op].pull(dy, y, *y.args)
    if y.op == "neg":
        return (-dy,)
    a, b = y.args
    if y.op == "/":
        return dy / b, -dy * y / b
    return {"+": (dy, dy), "-": (dy, -dy), "*": (dy * b, dy * a)}[y.op]


# ------------------------------------------------------------------ what is kept


def choose_kept(
    needed: Iterable[Number], gradients: Iterable[Value], given: Iterable[Value], named: Iterable[Number] = ()
) -> list[Value]:
    """The values of forward that backward needs and cannot cheaply compute from what is given anyway.

    Parameters
    ----------
    needed : iterable of Value
        All results of backward.
    gradients : iterable of Value
        Those that backward is given; what depends on them is no value of forward.
    given : iterable of Value
        What else backward has without keeping it: states before and after, own parameters.
    named : iterable of Value
        What the cell itself keeps: taken as it is, even if its arguments could be had.
    """
    named = {id(value) for value in named}
    late = {id(value) for value in gradients}
    stop = late | {id(value) for value in given}
    order = _in_order(needed, stop)
    # Does a value depend on the pre-activations, which are gone?
    lost: dict[int, bool] = {}
    for value in order:
        args = [arg for arg in value.args if isinstance(arg, Value)]
        if id(value) in stop:
            lost[id(value)] = False
            continue
        lost[id(value)] = value.op == "input" or any(lost[id(arg)] for arg in args)
        if any(id(arg) in late for arg in args):
            late.add(id(value))
    kept: dict[int, Value] = {}
    seen: set[int] = set()
    stack = [value for value in needed if isinstance(value, Value)]
    while stack:
        value = stack.pop()
        if id(value) in seen or not lost[id(value)]:
            continue
        seen.add(id(value))
        if (value.op == "input" or _is_costly(value) or id(value) in named) and id(value) not in late:
            kept[id(value)] = value
        else:
            stack += [arg for arg in value.args if isinstance(arg, Value)]
    return [value for value in order if id(value) in kept]


def choose_fixed(needed: Iterable[Number], given: Iterable[Value]) -> list[Value]:
    """The costly values that follow from what is given alone: nothing that a step would have to compute again."""
    order, given = _in_order(needed), {id(value) for value in given}
    alone: dict[int, bool] = {}
    for value in order:
        args = [arg for arg in value.args if isinstance(arg, Value)]
        alone[id(value)] = id(value) in given or (bool(args) and all(alone[id(arg)] for arg in args))
    ends = {id(value) for value in order if alone[id(value)] and _is_costly(value)}
    return [value for value in _in_order(needed, ends) if id(value) in ends]


def _is_costly(value: Value) -> bool:
    """Whether it is rather kept than computed again."""
    return value.op == "/" or (value.op in FUNCTIONS and FUNCTIONS[value.op].costly)


def depend(results: Iterable[Number], some: Iterable[Value], given: Iterable[Value]) -> bool:
    """Whether results depend on some values, other than through what is given."""
    some = {id(value) for value in some}
    return any(id(value) in some for value in _in_order(results, {id(value) for value in given}))


# ------------------------------------------------------------------ compiled functions


def compile_function(
    name: str, groups: dict[str, Iterable[Value]], results: tuple[tuple[Number, ...], ...]
) -> Callable:
    """A function of tuples of lanes, one for each group of inputs, that returns tuples of results.

    It stands in this module under a name that holds a hash of its text, so that a cached kernel never runs another.
    """
    text = _text(groups, results)
    full = re.sub(r"\W", "_", name) + f"_{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"
    known = globals().get(full)
    if known is None:
        scope = {key: function.compiled for key, function in FUNCTIONS.items()}
        exec(compile(f"def {full}{text}", f"<equations {full}>", "exec"), scope)  # the text is made from a graph
        known = scope[full]
        known.__module__ = __name__
        globals()[full] = inlined(known)
    return known


def _text(groups: dict[str, Iterable[Value]], results: tuple[tuple[Number, ...], ...]) -> str:
    names: dict[int, str] = {}
    lines = []
    for group, values in groups.items():
        here = [f"{group}_{n}" for n, _ in enumerate(values)]
        names |= {id(value): name for value, name in zip(values, here)}
        if here:
            lines.append(f"    ({', '.join(here)},) = {group}")

    def word(x):
        return names[id(x)] if isinstance(x, Value) else repr(float(x))

    for value in _in_order([x for result in results for x in result], set(names)):
        if id(value) in names:
            continue
        args = [word(arg) for arg in value.args]
        if value.op in FUNCTIONS:
            right = f"{value.op}({', '.join(args)})"
        elif value.op == "neg":
            right = f"-{args[0]}"
        else:
            right = f" {value.op} ".join(args)
        names[id(value)] = f"v{len(names)}"
        lines.append(f"    {names[id(value)]} = {right}")
    tuples = ["(" + "".join(f"{word(x)}, " for x in result).rstrip(" ") + ")" for result in results]
    return f"({', '.join(groups)}):\n" + "\n".join([*lines, f"    return {', '.join(tuples)}"]) + "\n"
