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
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from nbrnn.cells.activation import Activation
from nbrnn.cells.cell import Cell
from nbrnn.cells.equations import Graph, Number, Value, choose_kept, compile_function, derive, evaluate, inputs
from nbrnn.kernels.jit import stamp_of
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
    """

    activations: tuple[Activation, ...] = ()
    clip: float | None = None
    zoneout: tuple[bool, ...] = ()
    recurrent_dropout: bool = False
    projection: Activation | None = None


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
    front : _Front
        Those states in front.
    """

    equations: Equations
    hidden: int
    given: tuple[str, ...]
    front: _Front


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
        new, kept = self._check("forward", result, {"new": len(cell.states), "kept": None})
        self.inner, self.kept = tuple(map(self.graph.add, new)), tuple(map(self.graph.add, kept))
        states = list(self.inner)
        for n, name in enumerate(cell.states):
            if f"zoneout {name}" in self.names:
                states[n] = prev[n] + self._given(f"zoneout {name}") * (states[n] - prev[n])
        self.states = tuple(map(self.graph.add, states))
        out = call(cell.emission, self.states, self.own, self.act) if cell.emission else self.states[0]
        front = [out] if cell.emission else []
        if self.options.recurrent_dropout:
            front.insert(0, self._given("recurrent dropout") * out)
        self.output = self.graph.add(out)
        self.new = (*map(self.graph.add, front), *self.states)
        self.operand = None
        if cell.operand:
            first = self.gates[: cell.slots - len(cell.second)]
            operand = call(cell.operand, first, prev, self.own, self.act, self._cells_given())
            if self.options.recurrent_dropout:
                operand = self._given("recurrent dropout") * operand
            self.operand = self.graph.add(operand)

    def backward(self) -> tuple[list[Number], list[Number], list[Number]]:
        """dgates, dprev and down, from dnew."""
        cell, wanted = self.cell, (*self.gates, *self.prev, *self.own)
        S, N = len(self.gates), len(self.prev)
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


def _add(graph: Graph, *groups: list[Number]) -> list[list[Number]]:
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
    graph, gates, prev, own, given, new = (
        traced.graph, traced.gates, traced.prev, traced.own, traced.given, traced.new
    )  # fmt: skip
    dgates, dprev, down = _add(graph, *traced.backward())
    S, second = cell.slots, len(cell.second)
    first = S - second
    if options.projection and prev[0] in _inputs_of([*new, *dgates, *dprev, *down]):
        raise ValueError(f"proj_size: {cell.name} uses h of the step before unit by unit, which has another size here")
    known = [*prev, *_values(new), *own, *given]
    late: list[Value] = []
    operand_results: tuple = ()
    if traced.operand is not None:
        dmiddle, carried = inputs("dmiddle", 1), inputs("carried", len(prev))
        found = derive([traced.operand], dmiddle, [*gates, *prev, *own])
        pieces = _add(graph, found[:S], found[S : S + len(prev)], found[S + len(prev) :])
        late = choose_kept([x for piece in pieces for x in piece], [*dmiddle, *carried], known)
        operand_results = (dmiddle, carried, *pieces)
    kept = choose_kept([*dgates, *dprev, *down, *late], traced.dnew, known)
    K = max(S, len(kept))
    slots = _place(dgates, late, first) if traced.operand is not None else dgates
    K = max(K, len(slots))
    name = f"{cell.name}"
    common = {"prev": prev, "own": own, "given": given}
    forward = compile_function(f"{name}_forward", {"gates": gates, **common}, (new, tuple(kept)))
    tape = [*kept, *inputs("unused", K - len(kept))]
    back = {"dnew": traced.dnew, "kept": tape, "prev": prev, "new": new, "own": own, "given": given}
    functions = [forward, compile_function(f"{name}_backward", back, (tuple(slots), tuple(dprev), tuple(down)))]
    if traced.operand is not None:
        functions.append(compile_function(f"{name}_operand", {"gates": gates, **common}, ((traced.operand,),)))
        functions.append(_operand_backward(name, operand_results, slots, late, dgates, first, K, common, new, graph))
    elif options.projection:
        functions += _projection(options.projection)
    layout = Layout(
        S, K, len(cell.input_slots), len(cell.recurrent_slots), second, len(prev), cell.own_rows, len(traced.names),
        int(options.recurrent_dropout),
    )  # fmt: skip
    parts = [repr(layout), stamp_of(compile_function), *[function.__name__ for function in functions]]
    tag = hashlib.blake2b("".join(parts).encode(), digest_size=6).hexdigest()
    pairs = {"operand": (2, 3)} if traced.operand is not None else {"project": (2, 3)} if options.projection else {}
    extra = {}
    for key, (a, b) in pairs.items():
        extra = {key: functions[a], f"{key}_backward": functions[b]}
    equations = Equations(f"{name}-{tag}", layout, functions[0], functions[1], **extra)
    return Program(equations, traced.hidden, traced.names, _Front(cell, options, traced.act))


def _inputs_of(values) -> set:
    stack, seen = _values(values), set()
    while stack:
        value = stack.pop()
        if value not in seen:
            seen.add(value)
            stack += _values(value.args)
    return seen


def _place(dgates: list[Number], late: list[Value], first: int) -> list[Number]:
    """What backward leaves in the tape: gradients, and `late` values for the operand in slots that have none yet."""
    slots, waiting = list(dgates), list(late)
    for n in range(first):
        if waiting and not isinstance(slots[n], Value):
            slots[n] = waiting.pop(0)
    return slots + waiting


def _operand_backward(name, results, slots, late, dgates, first, K, common, new, graph) -> Callable:
    """The gradients that come through the operand, added to those that are there."""
    dmiddle, carried, more_gates, more_prev, more_own = results
    held = list(inputs("slot", K))
    places = {id(value): n for n, value in enumerate(slots) if any(value is one for one in late)}
    totals = []
    for n, more in enumerate(more_gates):
        here = held[n] if n not in places.values() else 0.0
        totals.append(here + more if isinstance(dgates[n], Value) else more)
    for value in late:
        held[places[id(value)]] = value
    dprev = tuple(a + b for a, b in zip(carried, more_prev))
    groups = {"dmiddle": dmiddle, "carried": carried, "slot": held, "prev": common["prev"], "new": new}
    groups |= {"own": common["own"], "given": common["given"]}
    totals, dprev, down = _add(graph, totals, dprev, more_own)
    return compile_function(f"{name}_operand_backward", groups, (tuple(totals), tuple(dprev), tuple(down)))


def _projection(act: Activation) -> list[Callable]:
    """The activation of a projected output, forward and back."""
    (a,), (dy,), (y,) = inputs("a", 1), inputs("dy", 1), inputs("y", 1)
    forward = compile_function("project", {"a": (a,)}, ((act(a),),))
    return [forward, compile_function("project_backward", {"dy": (dy,), "y": (y,)}, ((dy * act.slope(y),),))]


class _Front:
    """The states of the scan in front of the cell's own, at the beginning of a sequence: computed from those."""

    def __init__(self, cell: Cell, options: Options, act: tuple[Activation, ...]):
        states, own, (mask,) = inputs("states", len(cell.states)), inputs("own", cell.own_rows), inputs("mask", 1)
        out = call(cell.emission, states, own, act) if cell.emission else states[0]
        self.results = [mask * out] * options.recurrent_dropout + [out] * (cell.emission is not None)
        self.arguments, self.d = [*states, *own, mask], inputs("d", len(self.results))
        self.gradients = derive(self.results, self.d, self.arguments[:-1])
        self.states = len(states)

    def forward(self, states, own, mask) -> list[np.ndarray]:
        """From the cell's states [., B, H], own numbers [., H] and the mask of recurrent dropout [B, H]."""
        return evaluate(self.results, self.arguments, [*states, *own, mask])

    def backward(self, dfront, states, own, mask) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The gradients of the cell's states and of its own numbers, for each row."""
        found = evaluate(self.gradients, [*self.arguments, *self.d], [*states, *own, mask, *dfront])
        return found[: self.states], found[self.states :]
