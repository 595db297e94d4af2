"""Is a cell right? `check_cell` tries what a cell of one's own may get wrong, and says what it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nbrnn.cells.cell import Cell
from nbrnn.cells.program import compile_cell
from nbrnn.layers.recurrent import Recurrent

STEP, BOUND = 1e-5, 1e-6


@dataclass(frozen=True)
class CellReport:
    """What `check_cell` found.

    Parameters
    ----------
    cell : str
        The cell's name.
    rows : tuple of (str, str)
        What was checked, and what came of it.
    """

    cell: str
    rows: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        wide = max(len(what) for what, _ in self.rows)
        return "\n".join([f"cell {self.cell}", *(f"  {what:<{wide}}  {found}" for what, found in self.rows)])


def check_cell(cell: Cell, *, seed: int = 0, **options: Any) -> CellReport:
    """Check a cell: its gradients, what a NaN does, and whether its compiled kernels can be cached.

    Parameters
    ----------
    cell : Cell
    seed : int
        Of the random weights and inputs.
    **options
        Further arguments of the `Recurrent` layer that the cell is tried in, such as ``given={"dt": 0.1}``.

    Returns
    -------
    CellReport
        Prints as a short table.

    Raises
    ------
    TypeError
        The equations do not return what a cell's equations return.
    ValueError
        Something is wrong with the cell; the message says what.
    """
    rows = [("equations", _check_equations(cell, options))]
    problem = _Problem(cell, seed, options)
    rows.append(("against finite differences", _check_gradients(problem)))
    if cell.backward is not None:
        rows.append(("against the chain rule", _check_derived(problem, options)))
    rows.append(("NaN", _check_nan(problem)))
    rows.append(("caching", _check_caching(problem.layer)))
    return CellReport(cell.name, tuple(rows))


class _Problem:
    """A small layer of the cell, and arguments for its calls."""

    T, B, I, H = 4, 3, 3, 5

    def __init__(self, cell: Cell, seed: int, options: dict[str, Any]):
        rng = np.random.default_rng(seed)
        self.layer = Recurrent(cell, self.I, self.H, dtype="float64", seed=rng, **options)
        for view in self.layer.params.values():
            view += rng.normal(0.0, 0.3, view.shape)
        self.x = rng.normal(size=(self.T, self.B, self.I))
        _, last = self.layer(self.x)
        self.single = not isinstance(last, tuple)
        self.state = [rng.normal(0.0, 0.5, one.shape) for one in self.states(last)]
        self.dy = rng.normal(size=(self.T, self.B, self.layer.output_size))
        self.dlast = [rng.normal(size=one.shape) for one in self.state]

    def states(self, state: Any) -> list[np.ndarray]:
        return [state] if self.single else list(state)

    def outer(self, arrays: list[np.ndarray]) -> Any:
        return arrays[0] if self.single else tuple(arrays)

    def loss(self) -> float:
        y, last = self.layer(self.x, self.outer(self.state))
        return np.vdot(y, self.dy) + sum(np.vdot(a, b) for a, b in zip(self.states(last), self.dlast))

    def gradients(self, layer: Recurrent) -> dict[str, np.ndarray]:
        _, _, pullback = layer.vjp(self.x, self.outer(self.state))
        dx, dfirst, grads = pullback(self.dy, self.outer(self.dlast))
        named = {f"state {name}": array for name, array in zip(layer.cell.states, self.states(dfirst))}
        return {"x": dx, **named, **grads}

    def arguments(self) -> dict[str, np.ndarray]:
        named = {f"state {name}": array for name, array in zip(self.layer.cell.states, self.state)}
        return {"x": self.x, **named, **self.layer.params}


def _check_equations(cell: Cell, options: dict[str, Any]) -> str:
    layer = Recurrent(cell, 1, 1, dtype="float64", **options)
    layout = layer._parts[0].layout
    how = "given" if cell.backward is not None else "derived"
    return f"{layout.slots} numbers in, {layout.kept} kept, backward {how}"


def _difference(array: np.ndarray, loss: Any) -> np.ndarray:
    """The gradient of a loss by central differences."""
    gradient = np.empty_like(array)
    for at in np.ndindex(array.shape):
        value, ends = array[at], []
        for step in (STEP, -STEP):
            array[at] = value + step
            ends.append(loss())
        array[at] = value
        gradient[at] = (ends[0] - ends[1]) / (2.0 * STEP)
    return gradient


def _worst(pairs: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> tuple[float, str]:
    """The largest difference, relative to the largest number of its array, and the array's name."""
    errors = []
    for name, got, want in pairs:
        error = np.abs(got - want).max(initial=0.0) / max(np.abs(want).max(initial=0.0), 1e-3)
        errors.append((np.inf if np.isnan(error) else float(error), name))
    return max(errors)


def _check_gradients(problem: _Problem) -> str:
    got = problem.gradients(problem.layer)
    wanted = problem.arguments().items()
    error, name = _worst((name, got[name], _difference(array, problem.loss)) for name, array in wanted)
    if not error <= BOUND:
        raise ValueError(f"{problem.layer.cell.name}: the gradient of {name} is wrong, relative error {error:.1e}")
    return f"relative error at most {error:.1e}"


def _check_derived(problem: _Problem, options: dict[str, Any]) -> str:
    layer, cell = problem.layer, problem.layer.cell
    derived = replace(cell, name=f"{cell.name}_derived", backward=None)
    other = Recurrent(derived, problem.I, problem.H, dtype="float64", **options)
    other.params.flat[:] = layer.params.flat
    got, want = problem.gradients(layer), problem.gradients(other)
    error, name = _worst((name, got[name], want[name]) for name in want)
    if not error <= BOUND:
        raise ValueError(f"{cell.name}: backward disagrees with forward in {name}, relative error {error:.1e}")
    return f"relative error at most {error:.1e}"


def _check_nan(problem: _Problem) -> str:
    layer, state = problem.layer, problem.outer(problem.state)
    clean, _ = layer(problem.x, state)
    x = problem.x.copy()
    x[1, 1] = np.nan
    y, _ = layer(x, state)
    others = [0, 2]
    if not np.isnan(y[1:, 1]).any():
        raise ValueError(f"{layer.cell.name}: a NaN in x is hidden, y has none")
    if not np.array_equal(y[:, others], clean[:, others]):
        raise ValueError(f"{layer.cell.name}: a NaN in one row of x changes others")
    return "shows in its own row and in no other"


def _check_caching(layer: Recurrent) -> str:
    part = layer._parts[0]
    again = compile_cell.__wrapped__(part.cell, part.shape.options, part.dtype)
    if again.equations.name != part.program.equations.name:
        raise ValueError(f"{layer.cell.name}: its equations differ from call to call and could never be cached")
    return f"kernels are kept as {again.equations.name}"
