"""Recurrent layers of any cell: stacked, in one or two directions, forward and back.

`Recurrent` checks everything at its edge, where `Sequences` undoes the caller's form, and hands arrays without padding
to its `Direction`s, one for each layer and direction. The layers in `named` give it their cell.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np

from nbrnn.cells.activation import check_activation, check_activations
from nbrnn.cells.cell import Cell
from nbrnn.cells.program import Options
from nbrnn.data.ragged import Ragged
from nbrnn.kernels import simd
from nbrnn.kernels.int8 import DEEPEST
from nbrnn.kernels.memory import empty
from nbrnn.kernels.products import NARROW
from nbrnn.layers.direction import Direction, Given, Panels, Shape, Tape
from nbrnn.layers.dropout import draw, draw_mask
from nbrnn.layers.initialise import Seed, check_scheme, fill, generator
from nbrnn.layers.module import (
    Module,
    Parameters,
    Pullback,
    check_dtype,
    check_floats,
    check_fraction,
    check_number,
    check_positive,
    check_products,
    check_size,
    check_tokens,
    read_only,
)
from nbrnn.layers.sequences import Sequences, Steps, even_sequences, even_steps
from nbrnn.layers.streaming import RecurrentSession

# Steps of a piece that is recomputed, unless a number is asked for: shorter ones cost more than they save.
SHORTEST = 64

State = Any  # h, or the tuple of all states where the cell has several
Arrays = Sequence[np.ndarray]  # the states of one layer and direction [B, .]


class Recurrent(Module):
    """A recurrent layer of any cell.

    Parameters
    ----------
    cell : Cell
        The equations: one of `nbrnn.cells` or a user's own.
    input_size : int
        Size of the input, or the number of tokens.
    hidden_size : int
        Size of the hidden state.
    num_layers : int
        Layers on top of each other.
    bias : bool
        Whether there are biases.
    batch_first : bool
        Whether arrays are (B, T, .) instead of (T, B, .). States never are.
    dropout : float
        Fraction of each layer's outputs but the last's that is set to zero in training.
    bidirectional : bool
        Whether a second set of parameters reads the sequence from its end.
    proj_size : int
        Size P of the output, to which h is projected inside the loop; 0: none, P is H.
    dtype : {"float32", "float64"}
    seed : int, numpy.random.Generator or None
        Where first values and dropout masks come from; None is different every time.
    init : {"torch", "glorot", "orthogonal"}
        First values, see `nbrnn.layers.initialise`.
    unit_forget_bias : bool
        Start with a forget gate's bias of 1 (R. Jozefowicz, W. Zaremba and I. Sutskever, 2015).
    activations : sequence or None
        For each of the cell's activation functions a name of `nbrnn.cells.activation`, or a tuple (name, alpha, beta);
        None takes the cell's own.
    projection : str, tuple or None
        The activation of a projected output; None takes the cell's own, or is linear.
    clip : float or None
        Keep pre-activations within [-clip, clip].
    zoneout : float or sequence of float
        Probability that a state stays what it was, for all states or for each (D. Krueger et al., 2017).
    input_dropout, recurrent_dropout : float
        Fraction of a layer's inputs, and of what it feeds back, that is zero in training, the same at every time step
        (Y. Gal and Z. Ghahramani, 2016).
    learn_state : bool
        Whether the states to begin with are parameters, such as ``h_0_l0``, for calls that give no state.
    recompute : int or bool
        Steps after which training keeps the states, to compute what lies between once more in the backward pass: memory
        grows with recompute + T / recompute instead of T, for a third more time. True takes the square root of T, but
        at least 64. The gradients are the same bits, unless dropout or zoneout draw (other) masks; of weights, with
        rounded `products`, up to rounding. Not for two directions.
    products : {"bfloat16", "int8"} or None
        To what the factors of products are rounded; None: to nothing less than `dtype`. Parameters, sums, states and
        gradients stay float32, and only what is multiplied is rounded: with "bfloat16" to 8 bits of mantissa; with
        "int8", which is for inference alone, to integers from -127 to 127 times a scale for each row of a weight
        matrix, and for each row of x and of h at each step. For cells with one product in a step, and float32; see
        ``docs/precision.md``.
    given : mapping of str to float or None
        Numbers that the cell takes in every call where the call does not give them.

    Attributes
    ----------
    params : Parameters
        ``weight_ih_l0`` (G H, I), ``weight_hh_l0`` (G H, P), ``bias_ih_l0``, ``bias_hh_l0`` (G H), ``weight_hr_l0``
        (P, H) and the cell's own, with ``_reverse`` for the second direction, ``_l1`` and so on for the layers above.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong type or out of range, or does not go with the cell.

    Notes
    -----
    ``y, state_n = layer(x, state=None, lengths=None)`` and ``y, state_n, pullback = layer.vjp(x, state=None,
    lengths=None)``. x is (T, B, I) or (T, I), of float32 or float64, or integer tokens (T, B) or (T,) in [0, I), which
    stand for one-hot rows. y is (T, B, D P); what `vjp` returns is read-only, since the pullback needs it. A state is
    (num_layers D, B, H), h of a projection (num_layers D, B, P), or a tuple of such arrays for cells with several; None
    is zeros, with which the recurrent weights need not be multiplied in the first of several steps. What the cell takes
    beside x is given by name: a number, or an array (T,) or (T, B).

    `lengths` (B,) are the steps of each row, in any order, from 0 to T: outputs behind a row's end are zero, its last
    state is that of its last step, the second direction begins there, and padding is not even read. x may also be a
    `Ragged`; then y is one, and so are dy and dx. Either way only real steps are computed, and a row's results are the
    bits that it has alone.
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        dtype: Any = "float32",
        seed: Seed = None,
        init: str = "torch",
        unit_forget_bias: bool = False,
        activations: Any = None,
        projection: Any = None,
        clip: float | None = None,
        zoneout: Any = 0.0,
        input_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        learn_state: bool = False,
        recompute: int | bool = False,
        products: str | None = None,
        given: Mapping[str, float] | None = None,
    ):
        self.cell = cell
        self.input_size = check_size("input_size", input_size)
        self.hidden_size = check_size("hidden_size", hidden_size)
        self.num_layers = check_size("num_layers", num_layers)
        self.proj_size = check_size("proj_size", proj_size, 0) or (self.hidden_size if cell.projection else 0)
        self.bias, self.batch_first, self.bidirectional = bool(bias), bool(batch_first), bool(bidirectional)
        self.dropout = check_fraction("dropout", dropout)
        self.dtype = check_dtype(dtype)
        self.init = check_scheme(init)
        self.unit_forget_bias, self.learn_state = bool(unit_forget_bias), bool(learn_state)
        if self.unit_forget_bias and not (self.bias and cell.biased and "f" in cell.gates):
            raise ValueError(f"unit_forget_bias: expected a cell with a forget gate and biases, got {cell.name}")
        self.activations = check_activations(activations, cell.activations)
        self.projection = check_activation("projection", projection, cell.projection or "linear")
        self.clip = check_positive("clip", clip)
        self.zoneout = self._check_zoneout(zoneout)
        self.input_dropout = check_fraction("input_dropout", input_dropout)
        self.recurrent_dropout = check_fraction("recurrent_dropout", recurrent_dropout)
        self.recompute = recompute if isinstance(recompute, bool) else check_size("recompute", recompute)
        self.products = self._check_products(products)
        self.given = {name: check_number(name, value) for name, value in (given or {}).items()}
        self._check_options()
        self.rng = generator(seed)
        self._make()
        self.params = Parameters.zeros(self._shapes(), self.dtype)
        self._initialise()

    _fresh = ("_defaults", "_steady", "_lock", "_parts", "_plain_parts")

    def _make(self) -> None:
        self._defaults = {name: np.array([value]) for name, value in self.given.items()}
        self._steady: dict[tuple, Given] = {}  # by names
        self._lock = threading.Lock()
        self._parts = self._directions(self.recurrent_dropout > 0)
        # Recurrent dropout has other equations, which only training takes.
        self._plain_parts = self._directions(False) if self.recurrent_dropout else self._parts

    @cached_property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @cached_property
    def out_size(self) -> int:
        """Size of one direction's output."""
        return self.proj_size or self.hidden_size

    @cached_property
    def output_size(self) -> int:
        return self.directions * self.out_size

    def _check_zoneout(self, zoneout: Any) -> tuple[float, ...]:
        states = self.cell.states
        values = zoneout if isinstance(zoneout, (tuple, list)) else [zoneout] * len(states)
        if len(values) != len(states):
            raise ValueError(f"zoneout: expected a number or {len(states)} ({', '.join(states)}), got {zoneout!r}")
        return tuple(check_fraction("zoneout", value) for value in values)

    def _check_products(self, products: str | None) -> str | None:
        cell = self.cell
        products = check_products(products, self.dtype, tuple(NARROW))
        if products and (self.proj_size or cell.second or cell.finish):
            what = "a projection" if self.proj_size else cell.name
            raise ValueError(f"products: expected None for {what}, got {products!r}: it takes one product in a step")
        if products == "int8" and max(self.input_size, self.output_size) > DEEPEST:
            raise ValueError(f"products: expected None for sizes above {DEEPEST}, got 'int8', whose sums may overflow")
        return products

    def _check_options(self) -> None:
        cell = self.cell
        if self.proj_size and (cell.emission or cell.second or cell.finish or not cell.feedback):
            raise ValueError(f"proj_size: expected 0 for {cell.name}, got {self.proj_size}")
        if self.proj_size and (self.recurrent_dropout or self.zoneout[0]):
            raise ValueError("proj_size: expected 0 beside recurrent_dropout or a zoneout of h")
        if not self.proj_size and self.projection.name != "linear":
            raise ValueError(f"projection: expected a proj_size for {self.projection.name!r}")
        if self.clip is not None and (cell.norms or cell.inside == len(cell.activations)):
            raise ValueError(f"clip: expected None for {cell.name}, whose pre-activations go into no activation")
        if self.recurrent_dropout and not cell.feedback:
            raise ValueError(f"recurrent_dropout: {cell.name} has no recurrent product")
        if self.recompute and self.bidirectional:
            raise ValueError("recompute: expected False for two directions, which cannot be cut at one time step")
        if set(self.given) != set(cell.given):
            words = ", ".join(cell.given) or "nothing"
            raise ValueError(f"given: expected {words} for {cell.name}, got {', '.join(self.given) or 'nothing'}")

    # -------------------------------------------------------------- parameters

    def _directions(self, recurrent_dropout: bool) -> list[Direction]:
        """For each layer and direction what runs it."""
        projection = self.projection if self.proj_size else None
        zoneout = tuple(p > 0 for p in self.zoneout)
        options = Options(self.activations, self.clip, zoneout, recurrent_dropout, projection, self.products)
        shape = Shape(self.cell, self.hidden_size, self.out_size, self.dtype, self.bias, options)
        return [
            Direction(shape, self._inputs(row // self.directions), row, end, reverse)
            for row, (end, reverse) in enumerate(self._ends())
        ]

    def _ends(self) -> list[tuple[str, int]]:
        """For every row of the states: the end of its parameters' names, and its place among the directions."""
        ways = [("", 0), ("_reverse", 1)][: self.directions]
        return [(f"_l{layer}{way}", place) for layer in range(self.num_layers) for way, place in ways]

    def _inputs(self, layer: int) -> int:
        return self.input_size if layer == 0 else self.output_size

    def _rows(self, layer: int) -> range:
        """A layer's rows of the states."""
        return range(layer * self.directions, (layer + 1) * self.directions)

    @cached_property
    def _sizes(self) -> list[int]:
        """The size of each state."""
        return [self.out_size, *[self.hidden_size] * (len(self.cell.states) - 1)]

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {name: shape for part in self._parts for name, shape in part.shapes().items()}
        if self.learn_state:
            for end, _ in self._ends():
                shapes |= {f"{state}_0{end}": (size,) for state, size in zip(self.cell.states, self._sizes)}
        return shapes

    def _initialise(self) -> None:
        fill(self.params, self.init, self.rng, 1.0 / np.sqrt(self.hidden_size))
        for end, _ in self._ends():
            for own in self.cell.own:
                if own.first is not None:
                    self.params[own.name + end][...] = own.first
            if self.learn_state:
                for state in self.cell.states:
                    self.params[f"{state}_0{end}"][...] = 0.0
        if self.unit_forget_bias:
            at = self.cell.gates.index("f") * self.hidden_size
            for name, view in self.params.items():
                if name.startswith(("bias_ih", "bias_hh")):
                    view[at : at + self.hidden_size] = 1.0 if name.startswith("bias_ih") else 0.0

    def config(self) -> dict[str, Any]:
        names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "init")
        names += (
            "proj_size",
            "unit_forget_bias",
            "clip",
            "input_dropout",
            "recurrent_dropout",
            "learn_state",
            "recompute",
            "products",
        )
        config = {name: getattr(self, name) for name in names} | {"zoneout": list(self.zoneout)}
        acts = [[act.name, act.alpha, act.beta] for act in (*self.activations, self.projection)]
        return config | {"activations": acts[:-1], "projection": acts[-1], "dtype": self.dtype.name}

    def generators(self) -> list[np.random.Generator]:
        return [self.rng]

    # -------------------------------------------------------------- the edge

    def _check(
        self, x: Any, state: State, lengths: Any, given: Mapping[str, Any]
    ) -> tuple[Sequences, np.ndarray, list[Arrays] | None, dict[str, np.ndarray]]:
        """Everything that a call is given, in the form that it has inside: its form, x [N, .], the states of each row
        of them, None for zeros, and what the cell takes beside x."""
        ragged = isinstance(x, Ragged)
        values = x.values if ragged else np.asarray(x)
        tokens = values.dtype.kind in "iu"
        single = values.ndim == (1 if tokens else 2)
        names = "N" if ragged else "T" if single else "B, T" if self.batch_first else "T, B"
        shape, words = _expected(names, None if tokens else self.input_size)
        padded = lengths is not None
        if tokens:
            values = check_tokens("x", values, shape, words, None if padded else self.input_size)
        else:
            values = check_floats("x", values, self.dtype, shape, words)
        if ragged or padded:
            form = Sequences(x.with_values(values) if ragged else values, lengths, self.batch_first, tokens)
        else:
            form = even_sequences(values.shape, self.batch_first, tokens)
        values = form.into(values)
        if tokens and padded:  # whatever stands in the padding
            values = check_tokens("x", values, (None,), "(N,)", self.input_size)
        if state is not None:
            states = _by_row(self._check_states("state", state, form))
        else:
            states = _by_row(self._learnt_states(form.steps.B)) if self.learn_state else None
        return form, values, states, self._check_given(given, form)

    def _learnt_states(self, B: int) -> list[np.ndarray]:
        arrays = []
        for state, size in zip(self.cell.states, self._sizes):
            rows = [np.broadcast_to(self.params[f"{state}_0{end}"], (B, size)) for end, _ in self._ends()]
            arrays.append(np.ascontiguousarray(np.stack(rows)))
        return arrays

    def _check_states(self, name: str, state: State, form: Sequences) -> list[np.ndarray]:
        """All states as arrays (L D, B, .) in the order of the rows inside."""
        rows, B, states, sizes = self.num_layers * self.directions, form.steps.B, self.cell.states, self._sizes
        if len(states) == 1:
            state = (state,)
        elif not isinstance(state, (tuple, list)) or len(state) != len(states):
            raise TypeError(f"{name}: expected a tuple ({', '.join(states)}), got {type(state).__name__}")
        arrays = []
        for array, letter, size in zip(state, states, sizes):
            shape = (rows, size) if form.single else (rows, B, size)
            words = f"{name} {letter}" if len(states) > 1 else name
            array = check_floats(words, array, self.dtype, shape)
            arrays.append(form.sort(array.reshape(rows, B, size)))
        return arrays

    def _check_given(self, given: Mapping[str, Any], form: Sequences) -> dict[str, np.ndarray]:
        """What the cell takes beside x: an array [N] or [1] by name."""
        if not given:
            return self._defaults
        for name in given:
            if name not in self.cell.given:
                words = ", ".join(self.cell.given) or "nothing beside x and state"
                raise TypeError(f"{name}: unknown; {self.cell.name} takes {words}")
        found = {}
        for name in self.cell.given:
            value = given.get(name, self.given[name])
            if isinstance(value, Ragged):
                if form.ragged is None:
                    raise TypeError(f"{name}: expected a number or an array, got a Ragged")
                value = form.ragged.values_of(name, value)
            array = np.asarray(value)
            if array.dtype.kind not in "fiu":
                raise TypeError(f"{name}: expected finite numbers, got {array.dtype} {array!r}")
            if array.ndim == 0:
                array = array.reshape(1)
            elif array.shape == form.outer:
                array = form.into(array)
            elif array.ndim == 1 and form.ragged is None and len(array) == form.outer[int(form.batch_first)]:
                array = array[form.steps.time]
            else:
                one = form.outer[int(form.batch_first) if form.ragged is None else 0]
                names = "N," if form.ragged is not None else "B, T" if self.batch_first else "T, B"
                raise ValueError(f"{name}: expected a number, ({one},) or ({names}), got shape {np.shape(array)}")
            if not np.isfinite(array).all():
                raise TypeError(f"{name}: expected finite numbers, got {array!r}")
            found[name] = array
        return found

    def _outer_state(self, states: list[np.ndarray], form: Sequences) -> State:
        """States as the caller knows them."""
        if form.order is not None or form.single:
            states = [form.unsort(array) for array in states]
        return states[0] if len(states) == 1 else tuple(states)

    # -------------------------------------------------------------- the three calls

    def __call__(
        self, x: np.ndarray | Ragged, state: State = None, lengths: Any = None, **given: Any
    ) -> tuple[np.ndarray | Ragged, State]:
        """Outputs and last state; keeps nothing. See the notes of the class."""
        form, x, first, beside = self._check(x, state, lengths, given)
        last = self._empty_states(form.steps.B)
        run = _Run(form.steps, beside, self.rng, train=False, keep=False)
        y, tapes, _ = self._forward(x, first, last, run)
        self._release(tapes, self._plain_parts)
        return form.outputs(y), self._outer_state(last, form)

    def vjp(
        self, x: np.ndarray | Ragged, state: State = None, lengths: Any = None, **given: Any
    ) -> tuple[np.ndarray | Ragged, State, Pullback]:
        """Outputs, last state, and the function that takes gradients back. See the notes of the class."""
        if self.products == "int8":
            words = "which is for inference: train with one of those and give its parameters to a layer with 'int8'"
            raise ValueError(f"products: expected None or 'bfloat16' for gradients, got 'int8', {words}")
        learnt = state is None and self.learn_state
        form, x, first, beside = self._check(x, state, lengths, given)
        last = self._empty_states(form.steps.B)
        run = _Run(form.steps, beside, self.rng, train=True, keep=not self.recompute)
        if self.recompute:
            y, pieces = self._forward_pieces(x, first, last, run)
            y = form.out(y)
        else:
            y, *kept = self._forward(x, first, last, run)
            pieces = [lambda: kept]
            y = form.outputs(y)
        y = read_only(y) if form.ragged is None else y.with_values(read_only(y.values))
        return y, self._outer_state(last, form), partial(self._pullback, form, [pieces], learnt)

    def _pullback(
        self,
        form: Sequences,
        waiting: list[list[Callable]],
        learnt: bool,
        dy: np.ndarray | Ragged,
        dstate_n: State = None,
        *,
        out: Parameters | None = None,
    ) -> tuple[np.ndarray | Ragged | None, State, Parameters]:
        """See `nbrnn.layers.module.Pullback`. waiting: for each piece of time what gives its tapes and masks, taken out
        of the list, so that nobody else uses them."""
        dy = self._check_dy(dy, form)
        rows = [()] * len(self._parts)
        dlast = rows if dstate_n is None else _by_row(self._check_states("dstate_n", dstate_n, form))
        try:
            pieces = waiting.pop()
        except IndexError:
            words = "called twice; its tape is used up by the first call, call vjp again"
            raise RuntimeError(f"pullback: {words}") from None
        grads = Parameters.zeros(self.params.shapes, self.dtype) if out is None else out
        dfirst, dx, stop = self._empty_states(form.steps.B), None, form.steps.N
        for n in range(len(pieces) - 1, -1, -1):
            tapes, masks = pieces[n]()
            start = stop - tapes[0].steps.N
            ends = dlast if n == len(pieces) - 1 else None, None if n else dfirst
            share = self._backward(tapes, masks, dy[start:stop], *ends, grads, form)
            if len(pieces) == 1:
                dx = share
            elif share is not None:
                dx = np.empty((form.steps.N, share.shape[1]), self.dtype) if dx is None else dx
                dx[start:stop] = share
            stop = start
            self._release(tapes, self._parts)
        if self.recompute:
            for part, tape in zip(self._parts, tapes):
                part.release_panels(tape.panels)
        if self.learn_state:
            for row, (end, _) in enumerate(self._ends()):
                for state, array in zip(self.cell.states, dfirst):
                    grads[f"{state}_0{end}"][...] = array[row].sum(axis=0) if learnt else 0.0
        dx = None if dx is None else form.out(dx)
        return dx, self._outer_state(dfirst, form), grads

    def _empty_states(self, B: int, hidden: int = 0) -> list[np.ndarray]:
        """Room for all states (L D, B, .); hidden: how many that a scan has in front of the cell's."""
        sizes = self._sizes + [self.hidden_size] * hidden
        return [np.empty((len(self._parts), B, size), self.dtype) for size in sizes]

    def _check_dy(self, dy: Any, form: Sequences) -> np.ndarray:
        if form.ragged is not None:
            dy = form.ragged.values_of("dy", dy)
        return form.into(check_floats("dy", dy, self.dtype, (*form.outer, self.output_size)))

    def stream(self, batch_size: int = 1) -> RecurrentSession:
        """A session that takes one time step at a time, of so many rows; see `nbrnn.layers.streaming`.

        Raises
        ------
        ValueError
            The layer has two directions, of which one begins at the end.
        """
        if self.bidirectional:
            raise ValueError("stream: expected a layer of one direction, got bidirectional=True, which needs the end")
        return RecurrentSession(self, batch_size)

    def _form(self, B: int) -> Sequences:
        """The form of one time step of B rows."""
        return Sequences(np.empty((1, B)), None, False, True)

    def _given_at_inference(self, B: int) -> list[Given]:
        """What the equations of each layer take beside x in one time step of B rows."""
        form = self._form(B)
        return self._given_of(_Run(form.steps, self._check_given({}, form), self.rng, train=False, keep=False))

    def explain(self, T: int, B: int) -> str:
        """Which kernels and schedules a call with T steps of B rows would take, and why."""
        lines = [f"{self.cell.name}, {self.dtype}: {simd.instruction_set()}, vectors of {simd.width(self.dtype)}"]
        if self.products:
            lines[0] += f", products of {self._parts[0].products.name}"
        steps = even_steps(T, B)
        for (end, _), part in zip(self._ends(), self._parts):
            plans, (first, stop) = part.schedules(steps), part.blocks(steps)[0]
            words = (
                f", input product of {plans[0].block} steps at once unless x is tokens" if plans[0].block > 1 else "",
                (f", gradients of weights after every {stop - first} steps" if first > 0 else "")
                + (", those of two halves of the rows apart unless x is tokens" if part.in_halves(steps) else ""),
            )
            for way, plan, block in zip(("forward", "backward"), plans, words):
                lines.append(f"{end[1:]} {way}: {plan.kind}, {plan.shards} thread(s){block}: {plan.reason}")
        return "\n".join(lines)

    # -------------------------------------------------------------- all layers

    def _parts_of(self, run: _Run) -> list[Direction]:
        return self._parts if run.train else self._plain_parts

    def _given_of(self, run: _Run) -> list[Given]:
        """For every layer and direction what its equations take beside x, drawn when it is first asked for."""
        if run.given is None:
            run.given = [self._draw_given(row, part, run) for row, part in enumerate(self._parts_of(run))]
        return run.given

    def _forward(
        self, x: np.ndarray, states: list[Arrays] | None, last: list[np.ndarray], run: _Run
    ) -> tuple[np.ndarray, list[Tape], list[np.ndarray | None]]:
        """The slots of the last layer's output, and what backward needs; from the first `states`, row by row or None
        for zeros, into the `last`, newly made."""
        tapes, masks, steps = [], [], run.steps
        self._given_of(run)
        for layer in range(self.num_layers):
            mask = self._draw_mask(layer, x, run) if run.train else None
            masks.append(mask)
            if mask is not None:
                x = x * mask
            y = self._forward_layer(layer, x, states, last, run, tapes)
            if layer < self.num_layers - 1:
                x = steps.outputs(y)
        return y, tapes, masks

    def _forward_layer(
        self,
        layer: int,
        x: np.ndarray,
        states: list[Arrays] | None,
        last: list[np.ndarray],
        run: _Run,
        tapes: list[Tape],
    ) -> np.ndarray:
        """The slots of one layer's output."""
        y = empty((run.steps.N + 2 * run.steps.B, self.output_size), self.dtype)
        parts, rows = self._parts_of(run), self._rows(layer)
        for row in rows:
            how = run.given[row], run.keep, run.panels and run.panels[row]
            tapes.append(parts[row].forward(self.params, run.steps, x, y, states and states[row], last, *how))
        if self.recurrent_dropout and run.train:
            # y is what was fed back; the output is the first state behind it
            return np.concatenate([tapes[row].inner[0] for row in rows], axis=1)
        return y

    def _forward_pieces(
        self, x: np.ndarray, first: list[Arrays] | None, last: list[np.ndarray], run: _Run
    ) -> tuple[np.ndarray, list[Callable]]:
        """Outputs [N, .], and for each piece of time a function that runs it again and keeps what backward needs."""
        steps, pieces, seed = run.steps, [], None
        run.panels = [part.pack(self.params, part.take_panels()) for part in self._parts]
        if self.dropout or self.input_dropout or any(self.zoneout):
            with self._lock:
                seed = int(run.rng.integers(2**63))
        length = max(SHORTEST, math.isqrt(steps.T)) if self.recompute is True else self.recompute
        out, begin, hidden = np.empty((steps.N, self.output_size), self.dtype), first, self._parts[0].program.hidden
        for n, t0 in enumerate(range(0, max(1, steps.T), length)):
            t1 = min(t0 + length, steps.T)
            here, piece = slice(int(steps.starts[t0]), int(steps.starts[t1])), run.piece(n, t0, t1, seed)
            piece.keep = self.recurrent_dropout > 0  # whose output is not what is fed back, but kept behind it
            end = self._empty_states(steps.B, hidden) if t1 < steps.T else last
            y, tapes, _ = self._forward(x[here], begin, end, piece)
            out[here] = piece.steps.outputs(y)
            self._release(tapes, self._parts)

            def again(n=n, t0=t0, t1=t1, here=here, begin=begin, end=end):
                piece = run.piece(n, t0, t1, seed)
                piece.keep = True
                return self._forward(x[here], begin, end, piece)[1:]

            pieces.append(again)
            begin = _by_row(end)
        return out, pieces

    def _backward(
        self,
        tapes: list[Tape],
        masks: list,
        dy: np.ndarray,
        dlast: list[Arrays] | None,
        dfirst: list[np.ndarray] | None,
        grads: Parameters,
        form: Sequences,
    ) -> np.ndarray | None:
        """Through all layers, from the last to the first: dx [N, .], None for tokens. See `Direction.backward`."""
        for layer in range(self.num_layers - 1, -1, -1):
            dx = None
            for row in self._rows(layer):
                how = dlast and dlast[row], dfirst, form.steps, form.tokens and not layer
                share = self._parts[row].backward(self.params, grads, tapes[row], dy, *how)
                dx = share if dx is None else dx + share
            if dx is not None and masks[layer] is not None:
                dx = dx * masks[layer]
            dy = dx
        return dx

    def _release(self, tapes: list[Tape], parts: list[Direction]) -> None:
        for part, tape in zip(parts, tapes):
            part.release(tape)

    # -------------------------------------------------------------- what training draws

    def _draw_mask(self, layer: int, x: np.ndarray, run: _Run) -> np.ndarray | None:
        """What a layer's input is multiplied with in training: dropout between layers, variational dropout, or both."""
        if not (self.input_dropout or (self.dropout and layer)):
            return None
        mask = None
        if self.input_dropout and x.ndim == 1:
            raise ValueError("input_dropout: expected floats as x, got tokens; put an Embedding and a Dropout in front")
        with self._lock:
            if self.dropout and layer:
                mask = draw_mask(run.rng, x.shape, self.dropout, self.dtype)
            if self.input_dropout:
                if layer not in run.same:
                    shape = run.steps.B, x.shape[1]
                    run.same[layer] = draw_mask(run.steady, shape, self.input_dropout, self.dtype)
                same = run.same[layer][run.steps.row]
                mask = same if mask is None else mask * same
        return mask

    def _draw_given(self, row: int, part: Direction, run: _Run) -> Given:
        """The numbers that a cell's equations take beside x, those of an earlier call if they never change."""
        names = part.program.given
        drawn = run.train and names and (any(self.zoneout) or self.recurrent_dropout)
        if drawn or run.beside is not self._defaults:
            return self._new_given(names, row, run)
        found = self._steady.get(names)
        if found is None:
            given = self._new_given(names, row, run)
            found = self._steady[names] = given._replace(values=read_only(given.values), steady=True)
        return found

    def _new_given(self, names: Sequence[str], row: int, run: _Run) -> Given:
        """The same, written and drawn."""
        H, beside, (N, B) = self.hidden_size, run.beside, (run.steps.N, run.steps.B)
        masked = run.train and any(self.zoneout)
        by_step = masked or any(len(array) != 1 for array in beside.values())
        rows = N if by_step else B if run.train and self.recurrent_dropout else 1
        given, mask = np.empty((len(names), rows, H), self.dtype), None
        zoneout = {f"zoneout {state}": p for state, p in zip(self.cell.states, self.zoneout)}
        for out, name in zip(given, names):
            if name in beside:
                out[...] = beside[name][:, None]
            elif name in zoneout and run.train:
                with self._lock:
                    draw(run.rng, zoneout[name], out)
            elif name in zoneout:
                out[...] = 1 - zoneout[name]
            else:
                if ("h", row) not in run.same:
                    with self._lock:
                        mask = draw_mask(run.steady, (B, H), self.recurrent_dropout, self.dtype)
                    run.same["h", row] = mask
                mask = run.same["h", row]
                out[...] = mask[run.steps.row] if by_step else mask
        return Given(given, by_step, None if mask is None else mask[None])


class _Run:
    """One way through some time steps of all layers, and what it draws.

    rng is for masks that differ by time step, steady for those that are the same for all steps, which `same` holds.
    """

    def __init__(self, steps: Steps, beside: dict[str, np.ndarray], rng: np.random.Generator, train: bool, keep: bool):
        self.steps, self.beside, self.train, self.keep = steps, beside, train, keep
        self.rng = self.steady = rng
        self.same: dict[Any, np.ndarray] = {}
        self.given: list[Given] | None = None
        self.panels: list[Panels] | None = None  # where several pieces share them

    def piece(self, n: int, t0: int, t1: int, seed: int | None) -> _Run:
        """The n-th piece of it, from time step t0 to t1, which draws the same whenever it is made; None: nothing."""
        lo, hi = self.steps.starts[t0], self.steps.starts[t1]
        beside = self.beside
        if any(len(array) != 1 for array in beside.values()):
            beside = {name: array if len(array) == 1 else array[lo:hi] for name, array in beside.items()}
        rng = self.rng if seed is None else np.random.default_rng([seed, n])
        piece = _Run(self.steps.piece(t0, t1), beside, rng, self.train, self.keep)
        piece.steady, piece.same, piece.panels = self.steady, self.same, self.panels
        return piece


@lru_cache(maxsize=256)
def _expected(names: str, size: int | None) -> tuple[tuple[int | None, ...], str]:
    """The shape of an x whose first dimensions have these names, and its name; size: of the last one, if there is."""
    shape = (None,) * len(names.split(", "))
    if size is not None:
        return (*shape, size), f"({names}, {size})"
    return shape, f"({names},)" if len(shape) == 1 else f"({names})"


def _by_row(states: list[np.ndarray]) -> list[Arrays]:
    """States [L D, B, .] for every layer and direction."""
    return list(zip(*states))
