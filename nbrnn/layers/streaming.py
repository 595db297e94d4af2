"""Sequences that arrive one step at a time.

    session = layer.stream(batch_size)
    y_t = session.step(x_t)

A session holds the state, and all memory that a step needs: each step of recurrent layers is one call of compiled code
that allocates nothing. Its results are the bits of the whole sequence in one call.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from nbrnn.kernels.jit import Stages
from nbrnn.layers.direction import Direction, Given
from nbrnn.layers.module import Module, Parameters, Pointwise, check_floats, check_size, check_tokens, read_only
from nbrnn.layers.sequences import even_steps

if TYPE_CHECKING:
    from nbrnn.layers.recurrent import Recurrent


class Session:
    """A stream of one module: what is common to all.

    Parameters
    ----------
    module : Module
    batch_size : int
        Sequences that run side by side, the rows of every step.

    Notes
    -----
    Parameters of the module are read when the session begins: after they have changed, call `refresh`. A session may
    not be used by two threads at once.
    """

    def __init__(self, module: Module, batch_size: int):
        self.module, self.batch_size = module, check_size("batch_size", batch_size)

    def step(self, x: np.ndarray, **given: Any) -> np.ndarray:
        """One time step of all rows.

        Parameters
        ----------
        x : ndarray
            (B, I) floats or (B,) tokens.
        **given
            What the cell takes beside x: a number or an array (B,).

        Returns
        -------
        ndarray
            (B, .), read-only; the step after the next writes over it, so copy what you keep.

        Raises
        ------
        TypeError, ValueError
            x is of another shape, another batch size or dtype; the state is what it was.
        """
        raise NotImplementedError

    def run(self, x: np.ndarray, **given: Any) -> np.ndarray:
        """Several time steps at once, in the form that the module takes: its output."""
        y, self.state = self.module(x, self.state, **given)
        return y

    def reset(self, rows: Any = None) -> None:
        """Let all rows, or those of some indices, begin anew."""
        raise NotImplementedError

    @property
    def state(self) -> Any:
        """The state as calls of the module take and return it: a copy; it can be set."""
        raise NotImplementedError

    @state.setter
    def state(self, state: Any) -> None:
        raise NotImplementedError

    def join(self, count: int = 1) -> list[int]:
        """Let `count` more rows begin; their indices, behind those that there are."""
        raise NotImplementedError

    def leave(self, rows: Any) -> None:
        """Drop the rows of some indices; those behind them move up."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Take the module's parameters as they are now."""
        raise NotImplementedError

    def _rows(self, rows: Any) -> np.ndarray:
        """Indices of rows, or a clear error."""
        found = np.atleast_1d(np.asarray(rows))
        if found.dtype.kind not in "iu":
            raise TypeError(f"rows: expected indices, got {found.dtype}")
        if found.ndim != 1 or (found.size and (found.min() < 0 or found.max() >= self.batch_size)):
            raise ValueError(f"rows: expected indices from 0 to {self.batch_size - 1}, got {rows!r}")
        return found


class Unchanging(Session):
    """A stream of a module without memory."""

    def __init__(self, module: Pointwise, batch_size: int):
        super().__init__(module, batch_size)
        self.refresh()

    def step(self, x: np.ndarray) -> np.ndarray:
        if np.shape(x)[:1] != (self.batch_size,):
            raise ValueError(f"x: expected ({self.batch_size}, ...), got {np.shape(x)}")
        return self._call(x)

    def reset(self, rows: Any = None) -> None:
        if rows is not None:
            self._rows(rows)

    state = property(lambda self: None, lambda self, state: None)

    def join(self, count: int = 1) -> list[int]:
        self.batch_size += check_size("count", count)
        return list(range(self.batch_size - count, self.batch_size))

    def leave(self, rows: Any) -> None:
        self.batch_size -= len(np.unique(self._rows(rows)))

    def refresh(self) -> None:
        self._call = self.module.frozen()


class Chain(Session):
    """A stream of modules one after the other."""

    def __init__(self, module: Module, batch_size: int, sessions: Sequence[Session]):
        super().__init__(module, batch_size)
        self.sessions = sessions

    def step(self, x: np.ndarray) -> np.ndarray:
        for session in self.sessions:
            x = session.step(x)
        return x

    def reset(self, rows: Any = None) -> None:
        for session in self.sessions:
            session.reset(rows)

    @property
    def state(self) -> tuple:
        return tuple(session.state for session in self.sessions)

    @state.setter
    def state(self, state: Any) -> None:
        parts = (None,) * len(self.sessions) if state is None else state
        if not isinstance(parts, (tuple, list)) or len(parts) != len(self.sessions):
            raise ValueError(f"state: expected a tuple of {len(self.sessions)} entries, one for each module")
        before = self.state
        try:
            for session, part in zip(self.sessions, parts):
                session.state = part
        except (TypeError, ValueError):
            for session, part in zip(self.sessions, before):
                session.state = part
            raise

    def join(self, count: int = 1) -> list[int]:
        for session in self.sessions:
            joined = session.join(count)
        self.batch_size = self.sessions[0].batch_size
        return joined

    def leave(self, rows: Any) -> None:
        self._rows(rows)
        for session in self.sessions:
            session.leave(rows)
        self.batch_size = self.sessions[0].batch_size

    def refresh(self) -> None:
        for session in self.sessions:
            session.refresh()


class RecurrentSession(Session):
    """A stream of a recurrent layer."""

    def __init__(self, module: Recurrent, batch_size: int):
        super().__init__(module, batch_size)
        self._tokens = False
        self._altered = False  # whether a step was given something beside x, which holds for that step alone
        self._state = self._first(None)
        self._build()

    # -------------------------------------------------------------- memory

    def _first(self, state: Any) -> list[np.ndarray]:
        """Checked copies of a state, or of that to begin with."""
        layer, form = self.module, self.module._form(self.batch_size)
        if state is None and layer.learn_state:
            return layer._learnt_states(self.batch_size)
        if state is None:
            return [np.zeros_like(array) for array in layer._empty_states(self.batch_size)]
        return [array.copy() for array in layer._check_states("state", state, form)]

    def _build(self) -> None:
        """Memory and plans for this number of rows, from `_state`."""
        layer, B = self.module, self.batch_size
        kind, shape = (np.int64, (B,)) if self._tokens else (layer.dtype, (B, layer.input_size))
        self._x = np.zeros(shape, kind)
        self._turn, self._layers, x = 0, [], (read_only(self._x),) * 2
        for row, (part, given) in enumerate(zip(layer._plain_parts, layer._given_at_inference(B))):
            states = [array[row] for array in self._state]
            self._layers.append(_Layer(part, layer.params, x, states, given, B))
            x = self._layers[-1].outputs
        self._outputs = tuple(read_only(out) for out in x)
        self._stages = [Stages(*chain(*lists)) for lists in zip(*[layer.stages for layer in self._layers])]
        self._counters = [layer.tape.counters for layer in self._layers if layer.tape.how.by_units]
        self._state = None

    # -------------------------------------------------------------- steps

    def step(self, x: np.ndarray, **given: Any) -> np.ndarray:
        here = self._x
        if type(x) is not np.ndarray or x.dtype is not here.dtype or x.shape != here.shape or self._tokens:
            x = self._check(x)
            here = self._x
        if given or self._altered:
            self._set_given(given)
        here[...] = x
        turn = self._turn
        for counters in self._counters:
            counters[:] = 0
        self._stages[turn].run()
        self._turn = 1 - turn
        return self._outputs[turn]

    def _check(self, x: Any) -> np.ndarray:
        """x of one step; builds anew where it holds tokens for the first time, or floats again."""
        layer, B, x = self.module, self.batch_size, np.asarray(x)
        tokens = x.dtype.kind in "iu"
        if tokens:
            x = check_tokens("x", x, (B,), f"({B},)", layer.input_size)
        else:
            x = check_floats("x", x, layer.dtype, (B, layer.input_size), f"({B}, {layer.input_size})")
        if tokens != self._tokens:
            self._state, self._tokens = self._read(), tokens
            self._build()
        return x

    def _set_given(self, given: Mapping[str, Any]) -> None:
        layer = self.module
        found = layer._check_given({name: np.reshape(v, (1, -1)) if np.ndim(v) else v for name, v in given.items()},
                                   layer._form(self.batch_size))  # fmt: skip
        for one in self._layers:
            for out, name in zip(one.given, one.part.program.given):
                if name in found:
                    out[...] = found[name][:, None]
        self._altered = bool(given)

    # -------------------------------------------------------------- state

    def _read(self) -> list[np.ndarray]:
        """The cell's states [L, B, .]."""
        found = [layer.states(self._turn) for layer in self._layers]
        return [np.stack(arrays) for arrays in zip(*found)]

    @property
    def state(self) -> Any:
        states = self._read()
        return states[0] if len(states) == 1 else tuple(states)

    @state.setter
    def state(self, state: Any) -> None:
        self._state = self._first(state)
        self._build()

    def reset(self, rows: Any = None) -> None:
        states, first = self._read(), self._first(None)
        rows = slice(None) if rows is None else self._rows(rows)
        for state, begin in zip(states, first):
            state[:, rows] = begin[:, rows]
        self._state = states
        self._build()

    def join(self, count: int = 1) -> list[int]:
        before, states = self.batch_size, self._read()
        self.batch_size += check_size("count", count)
        first = self._first(None)
        for begin, state in zip(first, states):
            begin[:, :before] = state
        self._state = first
        self._build()
        return list(range(before, self.batch_size))

    def leave(self, rows: Any) -> None:
        stay = np.setdiff1d(np.arange(self.batch_size), self._rows(rows))
        if not len(stay):
            raise ValueError("rows: expected at least one row to stay")
        self._state = [np.ascontiguousarray(state[:, stay]) for state in self._read()]
        self.batch_size = len(stay)
        self._build()

    def refresh(self) -> None:
        self._state = self._read()
        self._build()


class _Layer:
    """One layer of a stream: memory for two turns, which write where the other one reads, and their stages."""

    def __init__(
        self,
        part: Direction,
        params: Parameters,
        x: tuple[np.ndarray, np.ndarray],
        states: list[np.ndarray],
        given: Given,
        B: int,
    ):
        values = np.repeat(given.values, B, axis=1)  # a step may be given other numbers
        given = given._replace(values=values, steady=False)
        self.part, self.given, self.B = part, values, B
        there = even_steps(1, B)
        self.tape = part.new_tape(there, False, part.packed(params))
        self.y = np.empty((2 * B, part.output), part.dtype)
        self.outputs = read_only(self.y[B:]), read_only(self.y[:B])
        back = copy.copy(there)
        back.slots = np.array([B, 0, 2 * B], np.int64)
        self.tape.y, self.tape.given = self.y, given
        Stages(*part.begin(self.tape, states)).run()
        self.stages = []
        for turn, steps in enumerate((there, back)):
            self.tape.x, self.tape.steps = x[turn], steps
            self.stages.append(part.scan(self.tape, turn))

    def states(self, turn: int) -> list[np.ndarray]:
        """The cell's states before a turn."""
        states = [self.y[: self.B] if turn == 0 else self.y[self.B :], *self.tape.inner]
        return states[self.part.program.hidden :]
