"""Recurrent layers of any cell: stacked, in one or two directions, forward and back.

`Recurrent` checks everything at its edge, undoes `batch_first` and the missing batch dimension there, and hands
time-major arrays to its `Direction`s, one for each layer and direction. The layers in `named` give it their cell.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nbrnn.cells.activation import check_activation, check_activations
from nbrnn.cells.cell import Cell
from nbrnn.cells.program import Options
from nbrnn.kernels import simd
from nbrnn.layers.direction import Direction, Shape, Tape
from nbrnn.layers.dropout import draw_kept, draw_mask
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
    check_size,
    check_tokens,
    read_only,
)

State = Any  # h, or the tuple of all states where the cell has several


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
    ``y, state_n = layer(x, state=None)`` and ``y, state_n, pullback = layer.vjp(x, state=None)``. x is (T, B, I) or
    (T, I), of float32 or float64, or integer tokens (T, B) or (T,) in [0, I), which stand for one-hot rows. y is
    (T, B, D P); what `vjp` returns is read-only, since the pullback needs it. A state is (num_layers D, B, H), h of a
    projection (num_layers D, B, P), or a tuple of such arrays for cells with several; None is zeros.
    What the cell takes beside x is given by name: a number, or an array (T,) or (T, B).
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
        self.given = {name: check_number(name, value) for name, value in (given or {}).items()}
        self._check_options()
        self.rng = generator(seed)
        self._lock = threading.Lock()
        self._parts = self._directions(self.recurrent_dropout > 0)
        # Recurrent dropout has other equations, which only training takes.
        self._plain_parts = self._directions(False) if self.recurrent_dropout else self._parts
        self.params = Parameters.zeros(self._shapes(), self.dtype)
        self._initialise()

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def out_size(self) -> int:
        """Size of one direction's output."""
        return self.proj_size or self.hidden_size

    @property
    def output_size(self) -> int:
        return self.directions * self.out_size

    def _check_zoneout(self, zoneout: Any) -> tuple[float, ...]:
        states = self.cell.states
        values = zoneout if isinstance(zoneout, (tuple, list)) else [zoneout] * len(states)
        if len(values) != len(states):
            raise ValueError(f"zoneout: expected a number or {len(states)} ({', '.join(states)}), got {zoneout!r}")
        return tuple(check_fraction("zoneout", value) for value in values)

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
        if set(self.given) != set(cell.given):
            words = ", ".join(cell.given) or "nothing"
            raise ValueError(f"given: expected {words} for {cell.name}, got {', '.join(self.given) or 'nothing'}")

    # -------------------------------------------------------------- parameters

    def _directions(self, recurrent_dropout: bool) -> list[Direction]:
        """For each layer and direction what runs it."""
        projection = self.projection if self.proj_size else None
        zoneout = tuple(p > 0 for p in self.zoneout)
        options = Options(self.activations, self.clip, zoneout, recurrent_dropout, projection)
        shape = Shape(self.cell, self.hidden_size, self.out_size, self.dtype, self.bias, options)
        return [
            Direction(shape, self._inputs(row // self.directions), end, reverse)
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

    def _sizes(self) -> list[int]:
        """The size of each state."""
        return [self.out_size, *[self.hidden_size] * (len(self.cell.states) - 1)]

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {name: shape for part in self._parts for name, shape in part.shapes().items()}
        if self.learn_state:
            for end, _ in self._ends():
                shapes |= {f"{state}_0{end}": (size,) for state, size in zip(self.cell.states, self._sizes())}
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
        names += ("proj_size", "unit_forget_bias", "clip", "input_dropout", "recurrent_dropout", "learn_state")
        config = {name: getattr(self, name) for name in names} | {"zoneout": list(self.zoneout)}
        acts = [[act.name, act.alpha, act.beta] for act in (*self.activations, self.projection)]
        return config | {"activations": acts[:-1], "projection": acts[-1], "dtype": self.dtype.name}

    def generators(self) -> list[np.random.Generator]:
        return [self.rng]

    # -------------------------------------------------------------- the edge

    def _check(self, x: Any, state: State) -> tuple[np.ndarray, list[np.ndarray], bool]:
        """Time-major x, all states as arrays (L D, B, .), and whether x is one unbatched sequence."""
        x = np.asarray(x)
        tokens = x.dtype.kind in "iu"
        single = x.ndim == (1 if tokens else 2)
        names = "T" if single else "B, T" if self.batch_first else "T, B"
        free = (None,) * (1 if single else 2)
        if tokens:
            x = check_tokens("x", x, free, f"({names},)" if single else f"({names})", self.input_size)
        else:
            x = check_floats("x", x, self.dtype, (*free, self.input_size), f"({names}, {self.input_size})")
        if single:
            x = x[:, None]
        elif self.batch_first:
            x = x.swapaxes(0, 1)
        B = x.shape[1]
        if state is None and self.learn_state:
            states = self._learnt_states(B)
        else:
            states = self._check_states("state", state, B, single)
        return read_only(np.ascontiguousarray(x)), states, single

    def _learnt_states(self, B: int) -> list[np.ndarray]:
        arrays = []
        for state, size in zip(self.cell.states, self._sizes()):
            rows = [np.broadcast_to(self.params[f"{state}_0{end}"], (B, size)) for end, _ in self._ends()]
            arrays.append(np.ascontiguousarray(np.stack(rows)))
        return arrays

    def _check_states(self, name: str, state: State, B: int, single: bool) -> list[np.ndarray]:
        """All states as arrays (L D, B, .), zeros for None."""
        rows, states, sizes = self.num_layers * self.directions, self.cell.states, self._sizes()
        if state is None:
            return [np.zeros((rows, B, size), self.dtype) for size in sizes]
        if len(states) == 1:
            state = (state,)
        elif not isinstance(state, (tuple, list)) or len(state) != len(states):
            raise TypeError(f"{name}: expected a tuple ({', '.join(states)}), got {type(state).__name__}")
        arrays = []
        for array, letter, size in zip(state, states, sizes):
            shape = (rows, size) if single else (rows, B, size)
            words = f"{name} {letter}" if len(states) > 1 else name
            array = check_floats(words, array, self.dtype, shape, str(shape))
            arrays.append(array.reshape(rows, B, size))
        return arrays

    def _check_given(self, given: Mapping[str, Any], T: int, B: int, single: bool) -> dict[str, np.ndarray]:
        """What the cell takes beside x: an array [T or 1, B or 1, 1] by name."""
        for name in given:
            if name not in self.cell.given:
                words = ", ".join(self.cell.given) or "nothing beside x and state"
                raise TypeError(f"{name}: unknown; {self.cell.name} takes {words}")
        found = {}
        for name in self.cell.given:
            array = np.asarray(given.get(name, self.given[name]))
            if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
                raise TypeError(f"{name}: expected finite numbers, got {array.dtype} {array!r}")
            if array.ndim == 2 and self.batch_first and not single:
                array = array.T
            if array.ndim == 2 and array.shape == (T, B) and not single:
                found[name] = array[:, :, None]
            elif array.shape in ((), (T,)):
                found[name] = array.reshape(-1, 1, 1)
            else:
                names = "B, T" if self.batch_first else "T, B"
                raise ValueError(f"{name}: expected a number, ({T},) or ({names}), got shape {np.shape(array)}")
        return found

    def _outer_state(self, states: list[np.ndarray], single: bool) -> State:
        """States as the caller knows them."""
        if single:
            states = [array[:, 0] for array in states]
        return states[0] if len(states) == 1 else tuple(states)

    def _outer(self, y: np.ndarray, single: bool) -> np.ndarray:
        """An output as the caller knows it."""
        if single:
            return y[:, 0]
        return y.swapaxes(0, 1) if self.batch_first else y

    # -------------------------------------------------------------- the three calls

    def __call__(self, x: np.ndarray, state: State = None, **given: Any) -> tuple[np.ndarray, State]:
        """Outputs and last state; keeps nothing. See the notes of the class."""
        x, states, single = self._check(x, state)
        beside = self._check_given(given, *x.shape[:2], single)
        last = [np.empty_like(array) for array in states]
        for layer in range(self.num_layers):
            x, _ = self._forward_layer(layer, x, states, last, beside, keep=False)
        return self._outer(x, single), self._outer_state(last, single)

    def vjp(self, x: np.ndarray, state: State = None, **given: Any) -> tuple[np.ndarray, State, Pullback]:
        """Outputs, last state, and the function that takes gradients back. See the notes of the class."""
        learnt = state is None and self.learn_state
        x, states, single = self._check(x, state)
        beside = self._check_given(given, *x.shape[:2], single)
        last = [np.empty_like(array) for array in states]
        tapes, masks = [], []
        for layer in range(self.num_layers):
            mask = self._draw_mask(layer, x)
            masks.append(mask)
            if mask is not None:
                x = read_only(x * mask)
            x, kept = self._forward_layer(layer, x, states, last, beside, keep=True)
            tapes += kept
        pullback = _once(lambda *args, **options: self._pullback(tapes, masks, single, learnt, *args, **options))
        return self._outer(x, single), self._outer_state(last, single), pullback

    def _draw_mask(self, layer: int, x: np.ndarray) -> np.ndarray | None:
        """What a layer's input is multiplied with in training: dropout between layers, variational dropout, or both."""
        if not (self.input_dropout or (self.dropout and layer)):
            return None
        mask = None
        if self.input_dropout and x.ndim == 2:
            raise ValueError("input_dropout: expected floats as x, got tokens; put an Embedding and a Dropout in front")
        with self._lock:
            if self.dropout and layer:
                mask = draw_mask(self.rng, x.shape, self.dropout, self.dtype)
            if self.input_dropout:
                same = draw_mask(self.rng, (1, *x.shape[1:]), self.input_dropout, self.dtype)
                mask = same if mask is None else mask * same
        return mask

    def _pullback(
        self,
        tapes: list[Tape],
        masks: list[np.ndarray | None],
        single: bool,
        learnt: bool,
        dy: np.ndarray,
        dstate_n: State = None,
        *,
        out: Parameters | None = None,
    ) -> tuple[np.ndarray | None, State, Parameters]:
        """See `nbrnn.layers.module.Pullback`."""
        T, B = tapes[0].x.shape[:2]
        dy = self._check_dy(dy, T, B, single)
        dlast = self._check_states("dstate_n", dstate_n, B, single)
        dfirst = [np.empty_like(array) for array in dlast]
        grads = Parameters.zeros(self.params.shapes, self.dtype) if out is None else out
        for layer in range(self.num_layers - 1, -1, -1):
            dx = None
            for row in self._rows(layer):
                dend, dstart = [array[row] for array in dlast], [array[row] for array in dfirst]
                share = self._parts[row].backward(self.params, grads, tapes[row], dy, dend, dstart)
                dx = share if dx is None else dx + share
            if dx is not None and masks[layer] is not None:
                dx = dx * masks[layer]
            if layer:
                dy = read_only(dx)
        if self.learn_state:
            for row, (end, _) in enumerate(self._ends()):
                for state, array in zip(self.cell.states, dfirst):
                    grads[f"{state}_0{end}"][...] = array[row].sum(axis=0) if learnt else 0.0
        dx = None if dx is None else self._outer(dx, single)
        return dx, self._outer_state(dfirst, single), grads

    def _check_dy(self, dy: Any, T: int, B: int, single: bool) -> np.ndarray:
        shape = (T, B, self.output_size)
        if single:
            shape = (T, self.output_size)
        elif self.batch_first:
            shape = (B, T, self.output_size)
        dy = check_floats("dy", dy, self.dtype, shape, str(shape))
        if self.batch_first and not single:
            dy = dy.swapaxes(0, 1)
        return read_only(np.ascontiguousarray(dy).reshape(T, B, self.output_size))

    def explain(self, T: int, B: int) -> str:
        """Which kernels and schedules a call with T steps of B rows would take, and why."""
        lines = [f"{self.cell.name}, {self.dtype}: {simd.instruction_set()}, vectors of {simd.width(self.dtype)}"]
        for (end, _), part in zip(self._ends(), self._parts):
            for way, plan in zip(("forward", "backward"), part.schedules(T, B)):
                block = f", input product of {plan.block} steps at once" if plan.block > 1 and way == "forward" else ""
                lines.append(f"{end[1:]} {way}: {plan.kind}, {plan.shards} thread(s){block}: {plan.reason}")
        return "\n".join(lines)

    # -------------------------------------------------------------- a layer

    def _forward_layer(
        self,
        layer: int,
        x: np.ndarray,
        states: list[np.ndarray],
        last: list[np.ndarray],
        beside: dict[str, np.ndarray],
        keep: bool,
    ) -> tuple[np.ndarray, list[Tape]]:
        """The output [T, B, D P] of one layer, read-only, and the tapes of its directions."""
        y = np.empty((len(x) + 2, x.shape[1], self.output_size), self.dtype)
        parts, tapes = self._parts if keep else self._plain_parts, []
        for row in self._rows(layer):
            first, end = [array[row] for array in states], [array[row] for array in last]
            given = self._draw_given(parts[row], beside, *x.shape[:2], keep)
            tapes.append(parts[row].forward(self.params, x, y, first, end, given, keep))
        if self.recurrent_dropout and keep:
            # y is what was fed back; the output is the first state behind it
            outputs = [tape.inner[0, 1:-1] for tape in tapes]
            return read_only(np.concatenate(outputs, axis=2)), tapes
        return read_only(y[1:-1]), tapes

    def _draw_given(self, part: Direction, beside: dict[str, np.ndarray], T: int, B: int, train: bool) -> np.ndarray:
        """The numbers that a cell's equations take beside x, [., T or 1, B, H]."""
        names, H = part.program.given, self.hidden_size
        if not names:
            return np.empty((0, 1, B, H), self.dtype)
        masked = train and any(self.zoneout)
        long = masked or any(len(array) > 1 for array in beside.values())
        given = np.empty((len(names), max(T, 1) if long else 1, B, H), self.dtype)
        zoneout = {f"zoneout {state}": p for state, p in zip(self.cell.states, self.zoneout)}
        for out, name in zip(given, names):
            if name in beside:
                out[...] = beside[name] if T else 0.0
            elif name in zoneout:
                with self._lock:
                    out[...] = draw_kept(self.rng, out.shape, zoneout[name]) if train else 1 - zoneout[name]
            else:
                with self._lock:
                    out[...] = draw_mask(self.rng, (B, H), self.recurrent_dropout, self.dtype)
        return given


def _once(function: Callable) -> Pullback:
    """A function that may be called once: the tape is used up by the first call."""
    calls = iter([function])

    def pullback(*args, **options):
        call = next(calls, None)
        if call is None:
            raise RuntimeError("pullback: called twice; its tape is used up by the first call, call vjp again")
        return call(*args, **options)

    return pullback
