"""Modules one after the other, as one module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from nbrnn.data.ragged import Ragged
from nbrnn.layers.module import Module, Parameters, Pointwise, Pullback, check_floats
from nbrnn.layers.streaming import Chain, Session, Unchanging


class Sequential(Module):
    """Modules one after the other.

    Parameters
    ----------
    *modules : Module
        All of one dtype. Their parameters move into one flat vector.

    Attributes
    ----------
    params : Parameters
        The modules' parameters under ``0.``, ``1.`` and so on.

    Raises
    ------
    TypeError
        An argument is not a module.
    ValueError
        There is none, or the dtypes differ.

    Notes
    -----
    The state is a tuple with an entry for each module, None for those without memory; as an argument, None stands for
    a first state of zeros everywhere. x may be a `Ragged`; with `lengths` (B,), a padded batch becomes one on its way.
    """

    def __init__(self, *modules: Module):
        if not modules:
            raise ValueError("modules: expected at least one module, got none")
        for n, module in enumerate(modules):
            if not isinstance(module, Module):
                raise TypeError(f"module {n}: expected a module, got {type(module).__name__}")
            if {id(leaf) for leaf in module.leaves()} & {id(leaf) for m in modules[:n] for leaf in m.leaves()}:
                raise ValueError(f"module {n}: expected each module once, got one that stands earlier too")
            if module.dtype != modules[0].dtype:
                raise ValueError(f"module {n}: expected dtype {modules[0].dtype}, got {module.dtype}")
        self.modules, self.dtype = modules, modules[0].dtype
        self._prefixes = [f"{n}." for n in range(len(modules))]
        self._make()

    _fresh = ("params",)

    def _make(self) -> None:
        """Move the modules' parameters into one vector, frozen if they all are."""
        parts = [module.params for module in self.modules]
        named = ((prefix + name, view) for prefix, part in zip(self._prefixes, parts) for name, view in part.items())
        self.rebind(Parameters.zeros({name: view.shape for name, view in named}, self.dtype))
        if all(part.frozen is not None for part in parts):
            self.params.freeze()

    def rebind(self, params: Parameters) -> None:
        self.params = params
        for module, part in zip(self.modules, self._parts(params)):
            module.rebind(part)

    def _parts(self, params: Parameters) -> list[Parameters]:
        """Each module's share of parameters or gradients."""
        return [params.part(prefix) for prefix in self._prefixes]

    def _states(self, name: str, state: Any) -> tuple:
        if state is None:
            return (None,) * len(self.modules)
        if not isinstance(state, (tuple, list)) or len(state) != len(self.modules):
            got = f"{len(state)}" if isinstance(state, (tuple, list)) else type(state).__name__
            raise ValueError(f"{name}: expected a tuple of {len(self.modules)} entries, one for each module, got {got}")
        return tuple(state)

    def __call__(
        self, x: np.ndarray | Ragged, state: Any = None, lengths: Any = None
    ) -> tuple[np.ndarray | Ragged, tuple]:
        padding, last = _Padding(x, lengths, self.batch_first), []
        x = padding.strip(x)
        for module, given in zip(self.modules, self._states("state", state)):
            x, after = module(x, given)
            last.append(after)
        return padding.restore(x), tuple(last)

    def vjp(
        self, x: np.ndarray | Ragged, state: Any = None, lengths: Any = None
    ) -> tuple[np.ndarray | Ragged, tuple, Pullback]:
        padding, last, pullbacks = _Padding(x, lengths, self.batch_first), [], []
        x = padding.strip(x)
        for module, given in zip(self.modules, self._states("state", state)):
            x, after, pullback = module.vjp(x, given)
            last.append(after)
            pullbacks.append(pullback)
        y = padding.restore(x)

        def pullback(dy, dstate_n=None, *, out=None):
            grads = Parameters.zeros(self.params.shapes, self.dtype) if out is None else out
            parts, dlast = self._parts(grads), self._states("dstate_n", dstate_n)
            dfirst = [None] * len(pullbacks)
            dy = padding.strip(check_floats("dy", dy, self.dtype, y.shape)) if y is not x else dy
            for n in range(len(pullbacks) - 1, -1, -1):
                dy, dfirst[n], _ = pullbacks[n](dy, dlast[n], out=parts[n])
            return padding.restore(dy), tuple(dfirst), grads

        return y, tuple(last), pullback

    @property
    def batch_first(self) -> bool:
        """Whether one of the modules takes (B, T, .)."""
        return any(getattr(module, "batch_first", False) for module in self.modules)

    @property
    def changes_time(self) -> bool:
        """Whether one of the modules does."""
        return any(module.changes_time for module in self.modules)

    def stream(self, batch_size: int = 1) -> Session:
        """A session that takes one time step at a time, of so many rows; see `nbrnn.layers.streaming`.

        Raises
        ------
        TypeError, ValueError
            A module needs the whole sequence.
        """
        pointwise = [isinstance(module, Pointwise) for module in self.modules]
        sessions = [
            Unchanging(module, batch_size) if alone else module.stream(batch_size)
            for module, alone in zip(self.modules, pointwise)
        ]
        return Chain(self, batch_size, sessions)

    def config(self) -> dict[str, Any]:
        return {"modules": [[type(module).__name__, module.config()] for module in self.modules]}

    def leaves(self) -> list[Module]:
        return [leaf for module in self.modules for leaf in module.leaves()]

    def generators(self) -> list[np.random.Generator]:
        return [rng for module in self.modules for rng in module.generators()]

    def __len__(self) -> int:
        return len(self.modules)

    def __getitem__(self, n: int) -> Module:
        return self.modules[n]

    def __iter__(self) -> Iterator[Module]:
        return iter(self.modules)


class _Padding:
    """The padding of a batch with lengths, which goes through the modules as a Ragged; nothing for another x.

    Modules without memory know no lengths: they would bring a NaN of the padding into the gradients.
    """

    def __init__(self, x: Any, lengths: Any, batch_first: bool):
        self.lengths, self.batch_first = lengths, batch_first
        if lengths is not None and isinstance(x, Ragged):
            raise ValueError("lengths: expected None beside a Ragged, which has its own")
        self.steps = np.shape(x)[int(batch_first)] if lengths is not None and np.ndim(x) > 1 else 0

    def strip(self, x: Any) -> Any:
        return x if self.lengths is None else Ragged.from_padded(x, self.lengths, self.batch_first)

    def restore(self, y: Any) -> Any:
        if self.lengths is None or not isinstance(y, Ragged):
            return y
        return y.to_padded(self.batch_first, steps=self.steps)[0]
