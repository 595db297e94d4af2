"""What a cell is, and the registry of the package's cells.

A cell is two functions of one hidden unit, written as the field writes its equations, and a few names. The scan
compiles them on a vector of hidden units at once, runs them on a tile of pre-activations while it is in the nearest
cache, and knows nothing else about the cell:

    new, kept     = forward(gates, prev)               gates: pre-activations  W_ih x + b_ih + W_hh h + b_hh
    dgates, dprev = backward(dnew, kept, prev, new)    d in front of a name: the gradient with respect to it

Each argument is a tuple of values in the order of the cell's names. The first state is h: what goes into the next
step's product, and the output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


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
        The states; the first is the output and what is fed back.
    forward, backward : callable
        The equations, module-level functions decorated with `nbrnn.kernels.jit.jitable`. `backward` may return the
        plain number 0.0 for a gradient that is always zero.
    separate : tuple of str, optional
        Gates whose recurrent pre-activation reaches `forward` apart from that of the input (the GRU that resets
        after the product). The tuple `gates` of the equations then holds: the separate gates' input parts, the other
        gates, the separate gates' recurrent parts.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    forward: Callable
    backward: Callable
    separate: tuple[str, ...] = ()

    @property
    def input_slots(self) -> tuple[str, ...]:
        """The gates that the input product fills, from the first slot on."""
        return self.separate + tuple(gate for gate in self.gates if gate not in self.separate)

    @property
    def recurrent_slots(self) -> tuple[str, ...]:
        """The gates that the recurrent product fills, up to the last slot."""
        return tuple(gate for gate in self.gates if gate not in self.separate) + self.separate

    @property
    def slots(self) -> int:
        """Pre-activations of one hidden unit."""
        return len(self.gates) + len(self.separate)


CELLS: dict[str, Cell] = {}


def register(cell: Cell) -> Cell:
    """Add a cell to the registry, from which tests and benchmarks take their rows."""
    CELLS[cell.name] = cell
    return cell
