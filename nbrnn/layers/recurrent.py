"""Recurrent layers of any cell: stacked, in one or two directions, forward and back.

    one direction of one layer, forward:   pack -> input product and scan, panel by panel
                                backward:  scan -> weight, bias and input gradients, each one big product

`Recurrent` checks everything at its edge, undoes `batch_first` and the missing batch dimension there, and works on
time-major arrays inside. `LSTM`, `GRU` and `RNN` give it their cell.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from nbrnn.cells import elman, gru, lstm
from nbrnn.cells.cell import Cell
from nbrnn.kernels import gemm, schedule, simd
from nbrnn.kernels.barrier import new_counters
from nbrnn.kernels.jit import get_num_threads, run, threading_layer
from nbrnn.kernels.scan import compile_scan
from nbrnn.kernels.schedule import Schedule
from nbrnn.kernels.tiles import VECTORS, panel_width
from nbrnn.layers.dropout import draw_mask
from nbrnn.layers.initialise import Seed, check_scheme, fill, generator
from nbrnn.layers.module import (
    Module,
    Parameters,
    Pullback,
    check_dtype,
    check_floats,
    check_fraction,
    check_size,
    check_tokens,
)
from nbrnn.layers.packing import SMALL, Weights, packing_of

State = Any  # h, or the tuple of all states where the cell has several


class Tape(NamedTuple):
    """What forward keeps of one layer and direction."""

    x: np.ndarray  # [T, B, I] or tokens [T, B]
    y: np.ndarray  # [T + 2, B, D H]
    inner: np.ndarray  # [N, T + 2, B, H]
    gates: np.ndarray  # flat


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
    dtype : {"float32", "float64"}
    seed : int, numpy.random.Generator or None
        Where first values and dropout masks come from; None is different every time.
    init : {"torch", "glorot", "orthogonal"}
        First values, see `nbrnn.layers.initialise`.
    unit_forget_bias : bool
        Start with a forget gate's bias of 1 (R. Jozefowicz, W. Zaremba and I. Sutskever, 2015).

    Attributes
    ----------
    params : Parameters
        ``weight_ih_l0`` (G H, I), ``weight_hh_l0`` (G H, H), ``bias_ih_l0``, ``bias_hh_l0`` (G H), with ``_reverse``
        for the second direction, ``_l1`` and so on for the layers above.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong type or out of range.

    Notes
    -----
    ``y, state_n = layer(x, state=None)`` and ``y, state_n, pullback = layer.vjp(x, state=None)``. x is (T, B, I) or
    (T, I), of float32 or float64, or integer tokens (T, B) or (T,) in [0, I), which stand for one-hot rows. y is
    (T, B, D H); what `vjp` returns is read-only, since the pullback needs it. A state is (num_layers D, B, H), or a
    tuple of such arrays for cells with several; None is zeros.
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
        *,
        dtype: Any = "float32",
        seed: Seed = None,
        init: str = "torch",
        unit_forget_bias: bool = False,
    ):
        self.cell = cell
        self.input_size = check_size("input_size", input_size)
        self.hidden_size = check_size("hidden_size", hidden_size)
        self.num_layers = check_size("num_layers", num_layers)
        self.bias, self.batch_first, self.bidirectional = bool(bias), bool(batch_first), bool(bidirectional)
        self.dropout = check_fraction("dropout", dropout)
        self.dtype = check_dtype(dtype)
        self.init = check_scheme(init)
        self.unit_forget_bias = bool(unit_forget_bias)
        if self.unit_forget_bias and not (self.bias and "f" in cell.gates):
            raise ValueError(f"unit_forget_bias: expected a cell with a forget gate and biases, got {cell.name}")
        self.rng = generator(seed)
        self._lock = threading.Lock()
        self._spare: list[np.ndarray] = []
        self._packed: dict[int, tuple] = {}
        self._packing = packing_of(cell, self.hidden_size, self.dtype)
        self.params = Parameters.zeros(self._shapes(), self.dtype)
        self._initialise()

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def output_size(self) -> int:
        return self.directions * self.hidden_size

    # -------------------------------------------------------------- parameters

    def _suffix(self, row: int) -> str:
        """The end of the parameters' names for row `row` of the states."""
        return f"_l{row // self.directions}" + ("_reverse" if row % self.directions else "")

    def _inputs(self, layer: int) -> int:
        return self.input_size if layer == 0 else self.output_size

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        rows, shapes = len(self.cell.gates) * self.hidden_size, {}
        for row in range(self.num_layers * self.directions):
            end = self._suffix(row)
            shapes["weight_ih" + end] = (rows, self._inputs(row // self.directions))
            shapes["weight_hh" + end] = (rows, self.hidden_size)
            if self.bias:
                shapes["bias_ih" + end] = shapes["bias_hh" + end] = (rows,)
        return shapes

    def _initialise(self) -> None:
        fill(self.params, self.init, self.rng, 1.0 / np.sqrt(self.hidden_size))
        if self.unit_forget_bias:
            at = self.cell.gates.index("f") * self.hidden_size
            for name, view in self.params.items():
                if name.startswith("bias"):
                    view[at : at + self.hidden_size] = 1.0 if name.startswith("bias_ih") else 0.0

    def _weights(self, row: int, params: Parameters) -> Weights:
        end = self._suffix(row)
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return Weights(*(params.get(name + end) for name in names))

    def config(self) -> dict[str, Any]:
        names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "init")
        config = {name: getattr(self, name) for name in names}
        return config | {"unit_forget_bias": self.unit_forget_bias, "dtype": self.dtype.name}

    def generators(self) -> list[np.random.Generator]:
        return [self.rng]

    # -------------------------------------------------------------- the edge

    def _check(self, x: Any, state: State) -> tuple[np.ndarray, list[np.ndarray], bool]:
        """Time-major x, all states as arrays (L D, B, H), and whether x is one unbatched sequence."""
        x = np.asarray(x)
        tokens = x.dtype.kind in "iu"
        single = x.ndim == (1 if tokens else 2)
        names = ("T",) if single else ("B", "T") if self.batch_first else ("T", "B")
        words = "(" + ", ".join(names + (() if tokens else (str(self.input_size),))) + ("," if x.ndim == 1 else "") + ")"
        if tokens:
            x = check_tokens("x", x, (None,) * len(names), words, self.input_size)
        else:
            x = check_floats("x", x, self.dtype, (None,) * len(names) + (self.input_size,), words)
        if single:
            x = x[:, None]
        elif self.batch_first:
            x = x.swapaxes(0, 1)
        return np.ascontiguousarray(x), self._check_states("state", state, x.shape[1], single), single

    def _check_states(self, name: str, state: State, B: int, single: bool) -> list[np.ndarray]:
        """All states as arrays (L D, B, H), zeros for None."""
        rows, states = self.num_layers * self.directions, self.cell.states
        if state is None:
            return [np.zeros((rows, B, self.hidden_size), self.dtype) for _ in states]
        if len(states) == 1:
            state = (state,)
        elif not isinstance(state, (tuple, list)) or len(state) != len(states):
            raise TypeError(f"{name}: expected a tuple ({', '.join(states)}), got {type(state).__name__}")
        shape = (rows, self.hidden_size) if single else (rows, B, self.hidden_size)
        arrays = []
        for array, letter in zip(state, states):
            words = f"{name} {letter}" if len(states) > 1 else name
            array = check_floats(words, array, self.dtype, shape, str(shape))
            arrays.append(array.reshape(rows, B, self.hidden_size))
        return arrays

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

    def __call__(self, x: np.ndarray, state: State = None) -> tuple[np.ndarray, State]:
        """Outputs and last state; keeps nothing. See the notes of the class."""
        x, states, single = self._check(x, state)
        last = [np.empty_like(array) for array in states]
        for layer in range(self.num_layers):
            y, _ = self._forward_layer(layer, x, states, last, keep=False)
            x = y[1:-1]
        return self._outer(x, single), self._outer_state(last, single)

    def vjp(self, x: np.ndarray, state: State = None) -> tuple[np.ndarray, State, Pullback]:
        """Outputs, last state, and the function that takes gradients back. See the notes of the class."""
        x, states, single = self._check(x, state)
        last = [np.empty_like(array) for array in states]
        tapes, masks = [], []
        for layer in range(self.num_layers):
            y, kept = self._forward_layer(layer, x, states, last, keep=True)
            tapes += kept
            x = y[1:-1]
            if self.dropout and layer < self.num_layers - 1:
                with self._lock:
                    masks.append(draw_mask(self.rng, x.shape, self.dropout, self.dtype))
                x = x * masks[-1]
        x.flags.writeable = False
        pullback = _once(lambda *args, **options: self._pullback(tapes, masks, single, *args, **options))
        return self._outer(x, single), self._outer_state(last, single), pullback

    def _pullback(
        self,
        tapes: list[Tape],
        masks: list[np.ndarray],
        single: bool,
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
            rows = range(layer * self.directions, (layer + 1) * self.directions)
            dx = None
            for row in rows:
                part = self._backward_direction(row, tapes[row], dy, dlast, dfirst, grads)
                dx = part if dx is None else dx + part
            if layer and self.dropout:
                dx = dx * masks[layer - 1]
            dy = dx
        for tape in tapes:
            self._spare.append(tape.gates)
        dx = None if dy is None else self._outer(dy, single)
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
        return np.ascontiguousarray(dy).reshape(T, B, self.output_size)

    def explain(self, T: int, B: int) -> str:
        """Which kernels and schedules a call with T steps of B rows would take, and why."""
        packing = self._packing
        lines = [
            f"{self.cell.name}, {self.dtype}: {simd.instruction_set()}, vectors of {simd.width(self.dtype)}, "
            f"{packing.panels} panels of {packing.units} hidden units"
        ]
        for layer in range(self.num_layers):
            for name, plan in zip(("forward", "backward"), self._schedules(T, B, self._inputs(layer))):
                block = f", input product of {plan.block} steps at once" if plan.block > 1 and name == "forward" else ""
                lines.append(f"layer {layer} {name}: {plan.kind}, {plan.shards} thread(s){block}: {plan.reason}")
        return "\n".join(lines)

    # -------------------------------------------------------------- one layer, one direction

    def _schedules(self, T: int, B: int, inputs: int) -> tuple[Schedule, Schedule]:
        """How to run forward and backward."""
        threads, H, G = get_num_threads(), self.hidden_size, len(self.cell.gates)
        layer = threading_layer() if threads > 1 else ""
        panels = self._packing.panels
        weights = G * H * H * self.dtype.itemsize
        forward = schedule.choose(T, B, 2 * G * H * (H + inputs), weights, panels, threads, layer)
        backward = schedule.choose(T, B, 2 * G * H * H, weights, gemm.panels(H, self.dtype), threads, layer)
        return forward, backward

    def _forward_layer(
        self, layer: int, x: np.ndarray, states: list[np.ndarray], last: list[np.ndarray], keep: bool
    ) -> tuple[np.ndarray, list[Tape]]:
        """y [T + 2, B, D H] of one layer, and the tapes of its directions."""
        T, B = x.shape[:2]
        y = np.empty((T + 2, B, self.output_size), self.dtype)
        tapes = []
        for row in range(layer * self.directions, (layer + 1) * self.directions):
            tapes.append(self._forward_direction(row, x, y, states, last, keep))
        return y, tapes

    def _forward_direction(
        self, row: int, x: np.ndarray, y: np.ndarray, states: list[np.ndarray], last: list[np.ndarray], keep: bool
    ) -> Tape:
        """Fill the direction's half of y and its row of the last states."""
        (T, B), H = x.shape[:2], self.hidden_size
        layer, reverse = divmod(row, self.directions)
        first, before, after = reverse * H, (T + 1) * reverse, 1 if reverse else T
        y[before, :, first : first + H] = states[0][row]
        inner = np.empty((len(states) - 1, T + 2 if keep else 1, B, H), self.dtype)
        for array, given in zip(inner, states[1:]):
            array[before if keep else 0] = given[row]
        packing = self._packing
        plan, _ = self._schedules(T, B, self._inputs(layer))
        if keep:
            gates = self._take(T * B * packing.panels * packing.columns)
            packed = packing.forward(self._weights(row, self.params))
        else:
            gates = np.empty(B * packing.columns * (packing.panels * plan.block if plan.block > 1 else 1), self.dtype)
            packed = self._packed_forward(row)
        if T and B:
            scan, _ = self._scans()
            args = (plan.by_units, plan.block, keep, reverse, first, x, *packed, y, inner, gates, new_counters())
            run(scan, plan.shards, *args)
        last[0][row] = y[after if T else before, :, first : first + H]
        for array, out in zip(inner, last[1:]):
            out[row] = array[(after if T else before) if keep else 0]
        return Tape(x, y, inner, gates)

    def _backward_direction(
        self,
        row: int,
        tape: Tape,
        dy: np.ndarray,
        dlast: list[np.ndarray],
        dfirst: list[np.ndarray],
        grads: Parameters,
    ) -> np.ndarray | None:
        """Gradients of one layer and direction: parameters into `grads`, the first state's into `dfirst`; dx."""
        x, y, inner, gates = tape
        (T, B), H = x.shape[:2], self.hidden_size
        layer, reverse = divmod(row, self.directions)
        packing = self._packing
        dh = np.zeros((B, gemm.padded(H, self.dtype)), self.dtype)
        dh[:, :H] = dlast[0][row]
        dinner = np.empty(inner[:, 0].shape, self.dtype)
        for array, given in zip(dinner, dlast[1:]):
            array[...] = given[row]
        weights, dweights = self._weights(row, self.params), self._weights(row, grads)
        _, plan = self._schedules(T, B, self._inputs(layer))
        if T and B:
            _, scan = self._scans()
            w_hh_t = packing.backward_hh(weights)
            args = (plan.by_units, reverse, reverse * H, dy, w_hh_t, y, inner, gates, dh, dinner, new_counters())
            run(scan, plan.shards, *args)
        for array, out in zip((dh[:, :H], *dinner), dfirst):
            out[row] = array
        dgates = gates.reshape(T * B, -1) if T and B else np.zeros((0, packing.panels * packing.columns), self.dtype)
        self._weight_gradients(packing, dgates, tape, reverse, dweights)
        return None if x.ndim == 2 else self._input_gradient(packing, dgates, weights, x.shape)

    def _weight_gradients(self, packing, dgates: np.ndarray, tape: Tape, reverse: int, dweights: Weights) -> None:
        """Everything time-parallel: dW = dgates.T @ inputs."""
        T, B = tape.x.shape[:2]
        shards = self._shards(T * B, dweights.hh.size)
        ignored = np.empty(len(dweights.hh), self.dtype)
        dbias_ih = ignored if dweights.bias_ih is None else dweights.bias_ih
        dbias_hh = ignored if dweights.bias_hh is None else dweights.bias_hh
        pieces = (packing.units, packing.columns)
        # h of the step before is one row of y earlier, in the second direction one row later: y[2:].
        ld = tape.y.shape[2]
        offset = reverse * (2 * B * ld + self.hidden_size)
        run(gemm.gradient, shards, dgates, tape.y, offset, ld, packing.recurrent_runs, *pieces, dweights.hh, dbias_hh)
        runs = packing.input_runs
        if tape.x.ndim == 2:
            run(gemm.token_gradient, shards, dgates, tape.x.ravel(), runs, *pieces, dweights.ih, dbias_ih)
        else:
            shards = self._shards(T * B, dweights.ih.size)
            run(gemm.gradient, shards, dgates, tape.x, 0, tape.x.shape[2], runs, *pieces, dweights.ih, dbias_ih)

    def _input_gradient(self, packing, dgates: np.ndarray, weights: Weights, shape: tuple[int, ...]) -> np.ndarray:
        """dx = dgates @ weight_ih."""
        packed = packing.backward_ih(weights)
        start = np.zeros(packed.shape[0] * panel_width(VECTORS, self.dtype), self.dtype)
        dx = np.empty((len(dgates), shape[2]), self.dtype)
        # The input's slots of all panels lie side by side, or in a piece of every panel.
        depth = packed.shape[1] // (1 if packing.layout.inputs == packing.layout.slots else packing.panels)
        shards = self._shards(len(dgates), weights.ih.size)
        if dx.size:
            run(gemm.multiply, shards, dgates, 0, packing.columns, depth, packed, start, dx)
        return dx.reshape(shape)

    def _shards(self, rows: int, size: int) -> int:
        """Threads for a product of so many rows with a weight matrix of so many numbers."""
        threads = get_num_threads()
        return threads if threads > 1 and 2 * rows * size > schedule.REGION_WORK[threading_layer()] else 1

    def _scans(self) -> tuple[Callable, Callable]:
        packing = self._packing
        return compile_scan(f"{self.cell.name}-{self.dtype}", packing.layout, self.cell.forward, self.cell.backward)

    # -------------------------------------------------------------- memory

    def _packed_forward(self, row: int) -> tuple:
        """The packed weights of one direction: those of the last call where the parameters still are the same bits."""
        end = self._suffix(row)
        flat = self.params.span("weight_ih" + end, ("bias_hh" if self.bias else "weight_hh") + end)
        known = self._packed.get(row)
        if known is not None:
            different = np.ones(get_num_threads(), np.bool_)
            shards = len(different) if flat.size > SMALL else 1
            run(gemm.compare, shards, known[0], flat, different[:shards])
            if not different[:shards].any():
                return known[1]
        packed = self._packing.forward(self._weights(row, self.params))
        self._packed[row] = (flat.copy(), packed)
        return packed

    def _take(self, size: int) -> np.ndarray:
        """A tape: one of an earlier step if it fits, so that a training loop touches no new memory."""
        while self._spare:
            try:
                spare = self._spare.pop()
            except IndexError:  # another thread was faster
                break
            if spare.size == size:
                return spare
        return np.empty(size, self.dtype)


def _once(function: Callable) -> Pullback:
    """A function that may be called once: the tape is used up by the first call."""
    calls = iter([function])

    def pullback(*args, **options):
        call = next(calls, None)
        if call is None:
            raise RuntimeError("pullback: called twice; its tape is used up by the first call, call vjp again")
        return call(*args, **options)

    return pullback


class LSTM(Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000).

    Parameters as in `Recurrent`, without `cell`. Gates are in the order i, f, g, o; the state is the tuple (h, c).
    """

    def __init__(self, input_size: int, hidden_size: int, *args: Any, **options: Any):
        super().__init__(lstm.LSTM, input_size, hidden_size, *args, **options)


class GRU(Recurrent):
    """Gated recurrent unit (Cho et al. 2014) whose reset gate acts after the recurrent product, as in cuDNN and torch.

    Parameters as in `Recurrent`, without `cell`. Gates are in the order r, z, n; the state is the array h.

    Parameters
    ----------
    reset_after : bool
        Only True so far.
    """

    def __init__(self, input_size: int, hidden_size: int, *args: Any, reset_after: bool = True, **options: Any):
        if reset_after is not True:
            raise ValueError(f"reset_after: expected True, got {reset_after!r}")
        super().__init__(gru.GRU, input_size, hidden_size, *args, **options)


class RNN(Recurrent):
    """The simple recurrent network (Elman 1990).

    Parameters as in `Recurrent`, without `cell`. The state is the array h.

    Parameters
    ----------
    nonlinearity : {"tanh", "relu"}
    """

    CELLS = {"tanh": elman.ELMAN_TANH, "relu": elman.ELMAN_RELU}  # noqa: RUF012

    def __init__(self, input_size: int, hidden_size: int, *args: Any, nonlinearity: str = "tanh", **options: Any):
        if nonlinearity not in self.CELLS:
            raise ValueError(f"nonlinearity: expected tanh or relu, got {nonlinearity!r}")
        super().__init__(self.CELLS[nonlinearity], input_size, hidden_size, *args, **options)
        self.nonlinearity = nonlinearity

    def config(self) -> dict[str, Any]:
        return super().config() | {"nonlinearity": self.nonlinearity}
