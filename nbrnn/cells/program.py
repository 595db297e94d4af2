"""From a cell and its options to the equations that the scan compiles.

Everything here happens on the graph of the cell's equations (`nbrnn.cells.equations`), so that an option costs no more
than the arithmetic it asks for:

    zoneout              s' = s + m (s' - s) for each state; m is 0 or 1 in training, its mean otherwise
                         (D. Krueger et al., Zoneout: Regularizing RNNs by Randomly Preserving Hidden Activations, 2017)
    recurrent dropout    what is fed back is m h, one m for all steps
                         (Y. Gal and Z. Ghahramani, A Theoretically Grounded Application of Dropout in RNNs, 2016)
    clip                 pre-activations stay within [-clip, clip]
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from nbrnn.cells.activation import Activation
from nbrnn.cells.cell import Cell
from nbrnn.cells.equations import (
    Graph,
    Number,
    Value,
    choose_fixed,
    choose_kept,
    compile_function,
    depend,
    derive,
    inputs,
)
from nbrnn.kernels.jit import stamp_of
from nbrnn.kernels.products import products_of
from nbrnn.kernels.scan import Equations, Layout


@dataclass(frozen=True)
class Options:
    """What a layer asks of its cell.

    Parameters
    ----------
    activations : tuple of Activation
    clip : float or None
    zoneout : tuple of bool
        For each state, whether it takes part.
    recurrent_dropout : bool
    projection : Activation or None
        The activation of a projected output.
    products : str or None
        To what the factors of products are rounded; None: to nothing.
    """

    activations: tuple[Activation, ...] = ()
    clip: float | None = None
    zoneout: tuple[bool, ...] = ()
    recurrent_dropout: bool = False
    projection: Activation | None = None
    products: str | None = None


@dataclass(frozen=True)
class Program:
    """A cell with its options.

    Parameters
    ----------
    equations : Equations
        What the scan compiles.
    hidden : int
        How many states of the scan stand in front of the cell's own ones and are computed from them.
    given : tuple of str
        The names of the given numbers: the cell's, "zoneout <state>" and "recurrent dropout".
    """

    equations: Equations
    hidden: int
    given: tuple[str, ...]


def call(function: Callable, *args):
    """Call an equation with as many arguments as it takes."""
    return function(*args[: len(inspect.signature(function).parameters)])


class _Traced:
    """The graph of a cell's equations with its options, forward and back."""

    def __init__(self, cell: Cell, options: Options, dtype: np.dtype):
        self.cell, self.options = cell, options
        eps = 64.0 * float(np.finfo(dtype).eps)
        clipped = len(options.activations) - cell.inside
        self.act = tuple(
            act if options.clip is None or n >= clipped else act.clipped(options.clip, eps)
            for n, act in enumerate(options.activations)
        )
        zoned = [f"zoneout {s}" for s, on in zip(cell.states, options.zoneout) if on]
        self.names = (*cell.given, *zoned, *["recurrent dropout"] * options.recurrent_dropout)
        # In front of the cell's states: what is fed back, and the output, where they are others
        self.hidden = int(options.recurrent_dropout) + int(cell.emission is not None)
        N = self.hidden + len(cell.states)
        self.gates, self.prev = inputs("gates", cell.slots), inputs("prev", N)
        self.own, self.given = inputs("own", cell.own_rows), inputs("given", len(self.names))
        self.dnew, self.graph = inputs("dnew", N), Graph()
        for value in (*self.gates, *self.prev, *self.own, *self.given, *self.dnew):
            self.graph.add(value)
        self._forward()

    def _given(self, name: str) -> Value:
        return self.given[self.names.index(name)]

    def _cells_given(self) -> tuple[Value, ...]:
        return self.given[: len(self.cell.given)]

    def _forward(self) -> None:
        cell, prev = self.cell, self.prev[self.hidden :]
        result = call(cell.forward, self.gates, prev, self.own, self.act, self._cells_given())
        early = len(cell.states) - (cell.finish is not None)
        if cell.backward is None and isinstance(result, tuple) and not any(isinstance(x, tuple) for x in result):
            result = result, ()
        new, kept = self._check("forward", result, {"new": early, "kept": None})
        self.inner, self.kept = tuple(map(self.graph.add, new)), tuple(map(self.graph.add, kept))
        states = [self._zoned(len(cell.states) - early + n, value) for n, value in enumerate(self.inner)]
        (self.normal,), self.sums = inputs("normal", 1), inputs("sums", 3)
        if cell.finish:
            h = call(cell.finish, self.normal, self.gates, tuple(states), self.own, self.act)
            states.insert(0, self._zoned(0, h))
        self.states = tuple(map(self.graph.add, states))
        out = call(cell.emission, self.states, self.own, self.act) if cell.emission else self.states[0]
        front = [out] if cell.emission else []
        if self.options.recurrent_dropout:
            front.insert(0, self._given("recurrent dropout") * out)
        self.new = (*map(self.graph.add, front), *self.states)
        self.late = len(front) + 1 if cell.finish else 0
        self.operand = None
        if cell.operand:
            first = self.gates[: cell.slots - len(cell.second)]
            operand = call(cell.operand, first, prev, self.own, self.act, self._cells_given())
            if self.options.recurrent_dropout:
                operand = self._given("recurrent dropout") * operand
            self.operand = self.graph.add(operand)

    def _zoned(self, n: int, value: Number) -> Number:
        """State n of the cell, with zoneout if it takes part."""
        name, prev = f"zoneout {self.cell.states[n]}", self.prev[self.hidden :][n]
        return prev + self._given(name) * (value - prev) if name in self.names else value

    def normal_backward(self) -> Number:
        """The gradient of the normalised state."""
        return derive(self.new[: self.late], self.dnew, [self.normal], self.new[self.late :])[0]

    def _backward_normalised(self, wanted: tuple[Value, ...]) -> list[Number]:
        """From dnew, and from what a row's mean and deviation pass on."""
        late, early = self.new[: self.late], self.new[self.late :]
        found = derive(late, self.dnew, [*early, *wanted], early)
        dearly = [a + b for a, b in zip(self.dnew[self.late :], found)]
        mean, along, scale = self.sums
        dearly[0] = dearly[0] + (self.normal_backward() - mean - self.normal * along) * scale
        return [a + b for a, b in zip(found[len(early) :], derive(early, dearly, wanted))]

    def backward(self) -> tuple[list[Number], list[Number], list[Number]]:
        """dgates, dprev and down, from dnew."""
        cell, wanted = self.cell, (*self.gates, *self.prev, *self.own)
        S, N = len(self.gates), len(self.prev)
        if cell.finish:
            found = self._backward_normalised(wanted)
            return found[:S], found[S : S + N], found[S + N :]
        if cell.backward is None:
            found = derive(self.new, self.dnew, wanted)
            return found[:S], found[S : S + N], found[S + N :]
        # Back through the options around the cell, ...
        dinner = derive(self.new, self.dnew, [*self.inner, *self.prev, *self.own], self.inner)
        n = len(self.inner)
        prev, around = self.prev[self.hidden :], dinner[n:]
        result = call(
            cell.backward, tuple(dinner[:n]), self.kept, prev, self.inner, self.own, self.act, self._cells_given()
        )
        wanted = {"dgates": S, "dprev": n} | ({"down": len(self.own)} if self.own or len(result) == 3 else {})
        dgates, dprev, down = (*self._check("backward", result, wanted), ())[:3]
        # ... and what they add
        dprev = [a + b for a, b in zip(around, [0.0] * self.hidden + list(dprev))]
        return list(dgates), dprev, [a + b for a, b in zip(around[N:], down)]

    def fix(self, results: Iterable[Number]) -> dict[str, Callable]:
        """Let what no step changes be computed once, and stand behind the given numbers; the function that does."""
        given, fixed = self.given, choose_fixed(results, [*self.own, *self.given])
        self.given = (*given, *fixed)
        return {"fix": self.compile("fix", {"own": self.own, "given": given}, fixed)} if fixed else {}

    def known(self) -> list[Value]:
        """What backward is given without its being kept."""
        return [*self.prev, *_values(self.new), *self.own, *self.given]

    def groups(self, *names: str) -> dict[str, tuple]:
        """Arguments of a compiled function by name."""
        return {name: getattr(self, name) for name in names}

    def compile(self, name: str, groups: dict[str, Any], *results: Iterable[Number]) -> Callable:
        """One of the cell's functions."""
        results = _add(self.graph, *results)
        return compile_function(f"{self.cell.name}_{name}", groups, tuple(map(tuple, results)))

    def _check(self, name: str, result: Any, wanted: dict[str, int | None]) -> tuple:
        """What equations return: tuples of values, of these names and lengths."""
        words = ", ".join(wanted)
        if not isinstance(result, tuple) or len(result) != len(wanted):
            raise TypeError(f"{self.cell.name}: expected {name} to return ({words}), got {result!r}")
        for (key, count), values in zip(wanted.items(), result):
            if not isinstance(values, tuple) or (count is not None and len(values) != count):
                length = "a tuple" if count is None else f"a tuple of {count}"
                raise TypeError(f"{self.cell.name}: expected {name} to return {length} as {key}, got {values!r}")
            for value in values:
                if not isinstance(value, (Value, int, float, np.number)):
                    raise TypeError(f"{self.cell.name}: expected numbers in {key} of {name}, got {value!r}")
        return result


def _add(graph: Graph, *groups: Iterable[Number]) -> list[list[Number]]:
    return [[graph.add(value) for value in group] for group in groups]


def _values(numbers) -> list[Value]:
    return [x for x in numbers if isinstance(x, Value)]


@lru_cache(maxsize=256)
def compile_cell(cell: Cell, options: Options, dtype: np.dtype) -> Program:
    """Trace a cell's equations and make the functions that the scan inlines.

    Raises
    ------
    TypeError, ValueError
        The equations do not fit the cell's names, or the options do not fit the cell.
    """
    traced = _Traced(cell, options, dtype)
    dgates, dprev, down = _add(traced.graph, *traced.backward())
    if options.projection and traced.prev[0] in _inputs_of([*traced.new, *dgates, *dprev, *down]):
        raise ValueError(f"proj_size: {cell.name} uses h of the step before unit by unit, which has another size here")
    fix = traced.fix([*traced.new, *([traced.operand] if cell.operand else []), *dgates, *dprev, *down])
    how = _normalised if cell.finish else _with_operand if cell.operand else _plain
    kept, looks_back, functions = how(traced, dgates, dprev, down)
    functions |= fix
    if options.projection:
        functions |= _projection(options.projection)
    layout = Layout(
        cell.slots, max(cell.slots, kept), len(cell.input_slots), len(cell.recurrent_slots), len(cell.second),
        len(traced.prev), cell.own_rows, len(traced.names), len(traced.given) - len(traced.names),
        int(options.recurrent_dropout), cell.norms, traced.late, int(looks_back),
    )  # fmt: skip
    functions |= _front(cell, options, traced.act)
    products = products_of(options.products, dtype)
    names = [getattr(function, "__name__", repr(function)) for function in functions.values()]
    parts = [repr(layout), stamp_of(compile_function), *names]
    tag = hashlib.blake2b("".join(parts).encode(), digest_size=6).hexdigest()
    equations = Equations(f"{cell.name}-{products.name}-{tag}", dtype.type(0), layout, products, **functions)
    return Program(equations, traced.hidden, traced.names)


def _plain(traced: _Traced, dgates, dprev, down) -> tuple[int, bool, dict[str, Callable]]:
    """How much is kept, whether backward reads the states behind h, and the functions of a cell with one product."""
    results, known, states = [*dgates, *dprev, *down], traced.known(), [*traced.prev[1:], *traced.new[1:]]
    kept = choose_kept(results, traced.dnew, known, traced.kept)
    # With recurrent dropout the output is such a state.
    looks_back = traced.options.recurrent_dropout or depend(results, states, [*known, *kept])
    tape = [*kept, *inputs("unused", max(0, traced.cell.slots - len(kept)))]
    around, back = traced.groups("prev", "own", "given"), traced.groups("prev", "new", "own", "given")
    forward = traced.compile("forward", {"gates": traced.gates, **around}, traced.new, kept)
    backward = traced.compile("backward", {"dnew": traced.dnew, "kept": tape, **back}, dgates, dprev, down)
    return len(kept), looks_back, {"forward": forward, "backward": backward}


def _with_operand(traced: _Traced, dgates, dprev, down) -> tuple[int, bool, dict[str, Callable]]:
    """The same for a cell with a second product in front of its equations."""
    gates, prev, own = traced.gates, traced.prev, traced.own
    S, N, first = len(gates), len(prev), len(gates) - len(traced.cell.second)
    dmiddle, carried = inputs("dmiddle", 1), inputs("carried", N)
    found = derive([traced.operand], dmiddle, [*gates, *prev, *own])
    more = _add(traced.graph, found[:S], found[S : S + N], found[S + N :])
    # What the operand's gradient will need, backward leaves in slots that hold no gradient yet.
    late = choose_kept([x for piece in more for x in piece], [*dmiddle, *carried], traced.known())
    kept = choose_kept([*dgates, *dprev, *down, *late], traced.dnew, traced.known(), traced.kept)
    slots, waiting, places = list(dgates), list(late), {}
    for n in range(first):
        if waiting and not isinstance(slots[n], Value):
            places[n] = slots[n] = waiting.pop(0)
    slots += waiting
    places |= {S + n: value for n, value in enumerate(waiting)}
    K = max(S, len(kept), len(slots))
    held = [places.get(n, value) for n, value in enumerate(inputs("slot", K))]
    totals = [more[0][n] + (held[n] if isinstance(dgates[n], Value) else 0.0) for n in range(S)]
    sums = [a + b for a, b in zip(carried, more[1])]
    around, back = traced.groups("prev", "own", "given"), traced.groups("prev", "new", "own", "given")
    tape = [*kept, *inputs("unused", K - len(kept))]
    functions = {
        "forward": traced.compile("forward", {"gates": gates, **around}, traced.new, kept),
        "backward": traced.compile("backward", {"dnew": traced.dnew, "kept": tape, **back}, slots, dprev, down),
        "operand": traced.compile("operand", {"gates": gates, **around}, [traced.operand]),
        "operand_backward": traced.compile(
            "operand_backward", {"dmiddle": dmiddle, "carried": carried, "slot": held, **back}, totals, sums, more[2]
        ),
    }
    return K, True, functions


def _normalised(traced: _Traced, dgates, dprev, down) -> tuple[int, bool, dict[str, Callable]]:
    """The same for a cell with normalisation, whose normalised pre-activations stay in the tape."""
    late, early = traced.new[: traced.late], traced.new[traced.late :]
    gates, normal, around = {"gates": traced.gates}, {"normal": [traced.normal]}, traced.groups("prev", "own", "given")
    back = {**gates, **around, "new": [*inputs("unused", traced.late), *early]}
    back = {name: back[name] for name in ("gates", "prev", "new", "own", "given")}
    dnew = {"dnew": traced.dnew}
    functions = {
        "forward": traced.compile("forward", {**gates, **around}, early, []),
        "finish": traced.compile("finish", {**normal, **back}, late),
        "normal_backward": traced.compile("normal", {**dnew, **normal, **back}, [traced.normal_backward()]),
        "backward": traced.compile("backward", {**dnew, "sums": traced.sums, **normal, **back}, dgates, dprev, down),
    }
    return 0, True, functions


def _inputs_of(values) -> set:
    stack, seen = _values(values), set()
    while stack:
        value = stack.pop()
        if value not in seen:
            seen.add(value)
            stack += _values(value.args)
    return seen


def _projection(act: Activation) -> dict[str, Callable]:
    """The activation of a projected output, forward and back."""
    (a,), (dy,), (y,) = inputs("a", 1), inputs("dy", 1), inputs("y", 1)
    forward = compile_function("project", {"a": (a,)}, ((act(a),),))
    backward = compile_function("project_backward", {"dy": (dy,), "y": (y,)}, ((dy * act.slope(y),),))
    return {"project": forward, "project_backward": backward}


def _front(cell: Cell, options: Options, act: tuple[Activation, ...]) -> dict[str, Any]:
    """The states of the scan in front of the cell's own, at the beginning of a sequence: computed from those."""
    states, own, mask = inputs("states", len(cell.states)), inputs("own", cell.own_rows), inputs("mask", 1)
    out = call(cell.emission, states, own, act) if cell.emission else states[0]
    results = [mask[0] * out] * options.recurrent_dropout + [out] * (cell.emission is not None)
    if not results:
        return {}
    d, groups = inputs("d", len(results)), {"states": states, "own": own, "mask": mask}
    gradients = derive(results, d, [*states, *own])
    dstates, down = tuple(gradients[: len(states)]), tuple(gradients[len(states) :])
    return {
        "front": compile_function(f"{cell.name}_front", groups, (tuple(results),)),
        "front_backward": compile_function(f"{cell.name}_front_back", {"d": d, **groups}, (dstates, down)),
        "fronts": len(results),
    }
