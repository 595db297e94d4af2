"""What a cell is, and the registry of the package's cells.

A cell is a few names and its equations, plain functions of one hidden unit, written as the field writes them
(`nbrnn.cells.equations` has the functions they may call). The scan runs them on vectors of hidden units and knows
nothing else about the cell:

    new, kept            = forward(gates, prev, own, act, given)
    dgates, dprev[, down] = backward(dnew, kept, prev, new, own, act, given)

gates   pre-activations: W_ih x + b_ih + W_hh h + b_hh
prev    the states before; new: the states after the step. The first one is h: the output, and what is fed back
own     the cell's own parameters
act     its activation functions; ``act.slope(y)`` is the derivative where the result is y
given   numbers that the caller gives beside x, such as the length of a time step
kept    whatever backward likes to have from forward
d...    the gradient with respect to something; 0.0 where there is none

Each is a tuple in the order of the cell's names. An equation may leave out the last arguments that it does not need. A
cell without `backward` gets one by the chain rule, and its forward may return the new states alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Own:
    """A parameter of a cell that has one number for each hidden unit.

    Parameters
    ----------
    name : str
        The parameter's name without the layer's ending.
    rows : int
        How many numbers a unit it has: the parameter is (rows, H), or (H,) for one.
    first : float or None
        The value to begin with; None draws it as the weights.
    exponent : float or None
        The equations get exp(exponent times the parameter), which is positive; None: the parameter itself.
    """

    name: str
    rows: int = 1
    first: float | None = None
    exponent: float | None = None


@dataclass(frozen=True)
class Cell:
    """A recurrent cell.

    Parameters
    ----------
    name : str
        The cell's name in the registry and in cache files.
    gates : tuple of str
        The gates in the order of the blocks of rows of ``weight_ih`` and ``weight_hh``.
    states : tuple of str
        The states; the first is the output and what is fed back, unless there is an `emission`.
    forward : callable
        The equations.
    backward : callable or None
        Their gradients.
    separate : tuple of str
        Gates whose recurrent pre-activation reaches the equations apart from that of the input (the GRU that resets
        after the product). The tuple `gates` then holds: the separate gates' input parts, the other gates, the
        separate gates' recurrent parts.
    second : tuple of str
        The last gates, if their recurrent product does not take h but what `operand` gives (the GRU that resets before
        the product).
    operand : callable or None
        ``operand(gates, prev, own, act, given)``, of the gates in front of `second`.
    emission : callable or None
        ``emission(states, own, act)``: the output, and what is fed back, where that is no state (CTRNN).
    feedback : bool
        Whether there is a recurrent product at all.
    own : tuple of Own
    activations : tuple of str
        The names of the activation functions (`nbrnn.cells.activation`), for which others may be chosen.
    inside : int
        How many of them, the last ones, are not applied to pre-activations and not clipped.
    given : tuple of str
        Names of further arguments of a call.
    norms : int
        In so many groups of equal size the pre-activations are normalised over the row before they reach the equations
        (layer normalisation).
    finish : callable or None
        ``finish(normal, gates, new, own, act)``: h, from the second state normalised over the row; `forward` then
        returns the other states only.
    biased : bool
        Whether there may be biases in the pre-activations.
    projection : str or None
        The activation of the output layer inside the loop, for cells that are nothing without one (Jordan).
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    forward: Callable
    backward: Callable | None = None
    separate: tuple[str, ...] = ()
    second: tuple[str, ...] = ()
    operand: Callable | None = None
    emission: Callable | None = None
    feedback: bool = True
    own: tuple[Own, ...] = ()
    activations: tuple[str, ...] = ()
    inside: int = 0
    given: tuple[str, ...] = ()
    norms: int = 0
    finish: Callable | None = None
    biased: bool = True
    projection: str | None = None

    @property
    def input_slots(self) -> tuple[str, ...]:
        """The gates that the input product fills, from the first slot on."""
        return self.separate + tuple(gate for gate in self.gates if gate not in self.separate)

    @property
    def recurrent_slots(self) -> tuple[str, ...]:
        """The gates that the recurrent product fills, up to the last slot or to that of the second product."""
        if not self.feedback:
            return ()
        return tuple(gate for gate in self.gates if gate not in self.separate + self.second) + self.separate

    @property
    def slots(self) -> int:
        """Pre-activations of one hidden unit."""
        return len(self.gates) + len(self.separate)

    @property
    def own_rows(self) -> int:
        """Numbers of one hidden unit among its own parameters."""
        return sum(own.rows for own in self.own)


CELLS: dict[str, Cell] = {}


def parameters(cell: Cell) -> str:
    """How many parameters a layer and direction has, in words: I inputs, H hidden units, P outputs."""
    G, fed = len(cell.gates), "P" if cell.projection else "H"
    times = f"{G} H" if G > 1 else "H"
    terms = [f"{times} (I + {fed})" if cell.feedback else f"{times} I"]
    terms += ["P H"] if cell.projection else []
    vectors = cell.own_rows + (G * (1 + cell.feedback) if cell.biased else 0)
    return " + ".join([*terms, f"{vectors} H" if vectors > 1 else "H", *["P"] * (cell.projection is not None)])


def source(cell: Cell) -> tuple[str, str]:
    """What a cell is, and where it comes from: the first and the last paragraph of its file's documentation."""
    words = [" ".join(part.split()) for part in sys.modules[cell.forward.__module__].__doc__.split("\n\n")]
    return words[0], words[-1]


def register(cell: Cell) -> Cell:
    """Add a cell to the registry, from which tests and benchmarks take their rows."""
    CELLS[cell.name] = cell
    return cell
