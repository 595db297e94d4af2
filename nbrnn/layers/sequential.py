"""Modules one after the other, as one module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from nbrnn.layers.module import Module, Parameters, Pullback


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
    a first state of zeros everywhere.
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
        shapes = {f"{n}.{name}": view.shape for n, m in enumerate(modules) for name, view in m.params.items()}
        self.rebind(Parameters.zeros(shapes, self.dtype))

    def rebind(self, params: Parameters) -> None:
        self.params = params
        for module, part in zip(self.modules, self._parts(params)):
            module.rebind(part)

    def _parts(self, params: Parameters) -> list[Parameters]:
        """Each module's share of parameters or gradients."""
        return [params.part(f"{n}.") for n in range(len(self.modules))]

    def _states(self, name: str, state: Any) -> tuple:
        if state is None:
            return (None,) * len(self.modules)
        if not isinstance(state, (tuple, list)) or len(state) != len(self.modules):
            got = f"{len(state)}" if isinstance(state, (tuple, list)) else type(state).__name__
            raise ValueError(f"{name}: expected a tuple of {len(self.modules)} entries, one for each module, got {got}")
        return tuple(state)

    def __call__(self, x: np.ndarray, state: Any = None) -> tuple[np.ndarray, tuple]:
        last = []
        for module, given in zip(self.modules, self._states("state", state)):
            x, after = module(x, given)
            last.append(after)
        return x, tuple(last)

    def vjp(self, x: np.ndarray, state: Any = None) -> tuple[np.ndarray, tuple, Pullback]:
        last, pullbacks = [], []
        for module, given in zip(self.modules, self._states("state", state)):
            x, after, pullback = module.vjp(x, given)
            last.append(after)
            pullbacks.append(pullback)

        def pullback(dy, dstate_n=None, *, out=None):
            grads = Parameters.zeros(self.params.shapes, self.dtype) if out is None else out
            parts, dlast = self._parts(grads), self._states("dstate_n", dstate_n)
            dfirst = [None] * len(pullbacks)
            for n in range(len(pullbacks) - 1, -1, -1):
                dy, dfirst[n], _ = pullbacks[n](dy, dlast[n], out=parts[n])
            return dy, tuple(dfirst), grads

        return x, tuple(last), pullback

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
