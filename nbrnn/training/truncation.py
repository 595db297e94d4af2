"""Truncated BPTT: how far gradients flow back through batches that continue each other.

A batch of a stream adds k1 steps, which an update learns from, and begins from the state at the end of the one before.
Its gradients flow back through the last k2 steps: to the beginning of the batch where k2 = k1, and farther where k2 is
greater. Then the batches before it, as many as k2 steps hold, are run once more, from the state that came before them.

    R. J. Williams and J. Peng, An Efficient Gradient-Based Algorithm for On-Line Training of Recurrent Network
    Trajectories, Neural Computation 2 (1990): BPTT(h; h'), with h = k2 and h' = k1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from nbrnn.data.ragged import Ragged
from nbrnn.layers.module import Module, Parameters


class Piece(NamedTuple):
    """One batch and the state before it."""

    x: Any
    lengths: Any
    reset: Any
    state: Any

    def steps(self, batch_first: bool) -> int:
        """Time steps, k1."""
        if isinstance(self.x, Ragged):
            return int(self.x.lengths.max(initial=0))
        x = np.asarray(self.x)
        single = x.ndim == (1 if x.dtype.kind in "iu" else 2)
        return x.shape[int(batch_first and not single)]


class Window:
    """The last batches that gradients flow back through.

    Parameters
    ----------
    model : Module
    k2 : int or None
        Steps of history; None is those of the batch alone.
    """

    def __init__(self, model: Module, k2: int | None):
        self.model, self.k2 = model, k2
        self.pieces: list[Piece] = []
        self.state: Any = None  # behind the last of them

    def vjp(self, x: Any, state: Any, lengths: Any, reset: Any) -> tuple[Any, Any, Callable]:
        """Outputs of a batch, the state behind it, and the function of (dy, out) that takes gradients back.

        A state that is not the one behind the last batch begins a new history.
        """
        if self.k2 is None:  # the batch alone
            rows = check_reset(self.model, x, reset)
            y, state, pullback = self.model.vjp(x, reset_rows(state, rows), *(() if lengths is None else (lengths,)))
            self.state = state
            return y, state, lambda dy, out: pullback(dy, out=out)
        pieces = [
            *(self.pieces if state is not None and state is self.state else []),
            Piece(x, None if lengths is None else np.asarray(lengths), check_reset(self.model, x, reset), state),
        ]
        steps = [piece.steps(getattr(self.model, "batch_first", False)) for piece in pieces]
        if steps[-1] > self.k2:
            raise ValueError(f"k2: expected at least k1, the {steps[-1]} steps of a batch, got {self.k2}")
        while sum(steps) > self.k2:
            del pieces[0], steps[0]
        calls, state = [], pieces[0].state
        for n, piece in enumerate(pieces):
            pieces[n] = piece._replace(state=state)
            lengths = () if piece.lengths is None else (piece.lengths,)
            y, state, pullback = self.model.vjp(piece.x, reset_rows(state, piece.reset), *lengths)
            calls.append((y, piece.reset, pullback))
        self.pieces, self.state = pieces, state
        return y, state, lambda dy, out: _back(calls, dy, out)

    def tree(self) -> list[dict[str, Any]]:
        """The batches, nested as a checkpoint keeps them."""
        return [
            piece._asdict()
            | {"x": vars(piece.x) if isinstance(piece.x, Ragged) else piece.x}
            | {"reset": None if piece.reset is None else piece.reset.astype(np.uint8)}  # checkpoints have no booleans
            for piece in self.pieces
        ]

    def load(self, tree: list[dict[str, Any]], state: Any) -> None:
        """Go on from what `tree` gave, and from the state behind it."""
        self.pieces = [
            Piece(**kept)._replace(
                x=Ragged(**kept["x"]) if isinstance(kept["x"], dict) else kept["x"],
                reset=None if kept["reset"] is None else np.asarray(kept["reset"], bool),
            )
            for kept in tree
        ]
        self.state = state


def _back(calls: list[tuple], dy: Any, out: Parameters) -> None:
    """The gradients of all batches of a window into `out`."""
    dstate, scratch = None, out
    for y, reset, pullback in reversed(calls):
        dy = _zeros_like(y) if dy is None else dy
        _, dstate, _ = pullback(dy, *([] if dstate is None else [dstate]), out=scratch)
        if scratch is out:
            scratch = Parameters.zeros(out.shapes, out.flat.dtype) if len(calls) > 1 else out
        else:
            out.flat += scratch.flat
        dy, dstate = None, reset_rows(dstate, reset)


def _zeros_like(y: Any) -> Any:
    return y.with_values(np.zeros_like(y.values)) if isinstance(y, Ragged) else np.zeros_like(y)


def check_reset(model: Module, x: Any, rows: Any) -> np.ndarray | None:
    """Which rows of a batch begin something new, as booleans (B,) or None.

    Raises
    ------
    TypeError, ValueError
        `rows` is not one boolean for each row.
    """
    if rows is None:
        return None
    rows = np.asarray(rows)
    if rows.dtype != bool:
        raise TypeError(f"reset: expected booleans, got {rows.dtype}")
    B = len(x) if isinstance(x, Ragged) else np.shape(x)[int(not getattr(model, "batch_first", False))]
    if rows.shape != (B,):
        raise ValueError(f"reset: expected ({B},), one for each row, got {rows.shape}")
    return rows


def reset_rows(state: Any, rows: np.ndarray | None) -> Any:
    """A state, nested as it may be, whose rows are zero where `rows` (B,) says so."""
    if rows is None or state is None:
        return state
    if isinstance(state, (tuple, list)):
        return tuple(reset_rows(part, rows) for part in state)
    return np.where(rows[:, None], state.dtype.type(0), state)
