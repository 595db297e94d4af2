"""Recurrent layers of any cell: stacked, in one or two directions, forward and back.

`Recurrent` checks everything at its edge, undoes `batch_first` and the missing batch dimension there, and hands
time-major arrays to its `Direction`s, one for each layer and direction. `LSTM`, `GRU` and `RNN` give it their cell.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from nbrnn.cells import elman, gru, lstm
from nbrnn.cells.cell import Cell
from nbrnn.kernels import simd
from nbrnn.layers.direction import Direction, Tape
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
        self._parts = [
            Direction(cell, self._inputs(row // self.directions), self.hidden_size, self.dtype, self.bias, end, reverse)
            for row, (end, reverse) in enumerate(self._ends())
        ]
        shapes = {name: shape for part in self._parts for name, shape in part.shapes().items()}
        self.params = Parameters.zeros(shapes, self.dtype)
        self._initialise()

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def output_size(self) -> int:
        return self.directions * self.hidden_size

    # -------------------------------------------------------------- parameters

    def _ends(self) -> list[tuple[str, int]]:
        """For every row of the states: the end of its parameters' names, and its place among the directions."""
        ways = [("", 0), ("_reverse", 1)][: self.directions]
        return [(f"_l{layer}{way}", place) for layer in range(self.num_layers) for way, place in ways]

    def _inputs(self, layer: int) -> int:
        return self.input_size if layer == 0 else self.output_size

    def _rows(self, layer: int) -> range:
        """A layer's rows of the states."""
        return range(layer * self.directions, (layer + 1) * self.directions)

    def _initialise(self) -> None:
        fill(self.params, self.init, self.rng, 1.0 / np.sqrt(self.hidden_size))
        if self.unit_forget_bias:
            at = self.cell.gates.index("f") * self.hidden_size
            for name, view in self.params.items():
                if name.startswith("bias"):
                    view[at : at + self.hidden_size] = 1.0 if name.startswith("bias_ih") else 0.0

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
        return read_only(np.ascontiguousarray(x)), self._check_states("state", state, x.shape[1], single), single

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
            x = read_only(y[1:-1])
        return self._outer(y[1:-1], single), self._outer_state(last, single)

    def vjp(self, x: np.ndarray, state: State = None) -> tuple[np.ndarray, State, Pullback]:
        """Outputs, last state, and the function that takes gradients back. See the notes of the class."""
        x, states, single = self._check(x, state)
        last = [np.empty_like(array) for array in states]
        tapes, masks = [], []
        for layer in range(self.num_layers):
            y, kept = self._forward_layer(layer, x, states, last, keep=True)
            tapes += kept
            x = read_only(y[1:-1])
            if self.dropout and layer < self.num_layers - 1:
                with self._lock:
                    masks.append(draw_mask(self.rng, x.shape, self.dropout, self.dtype))
                x = read_only(x * masks[-1])
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
            dx = None
            for row in self._rows(layer):
                dend, dstart = [array[row] for array in dlast], [array[row] for array in dfirst]
                share = self._parts[row].backward(self.params, grads, tapes[row], dy, dend, dstart)
                dx = share if dx is None else dx + share
            if layer and self.dropout:
                dx = dx * masks[layer - 1]
            if layer:
                dy = read_only(dx)
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
        self, layer: int, x: np.ndarray, states: list[np.ndarray], last: list[np.ndarray], keep: bool
    ) -> tuple[np.ndarray, list[Tape]]:
        """y [T + 2, B, D H] of one layer, and the tapes of its directions."""
        y = np.empty((len(x) + 2, x.shape[1], self.output_size), self.dtype)
        tapes = []
        for row in self._rows(layer):
            first, end = [array[row] for array in states], [array[row] for array in last]
            tapes.append(self._parts[row].forward(self.params, x, y, first, end, keep))
        return y, tapes


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
