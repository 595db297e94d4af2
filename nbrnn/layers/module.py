"""What every layer is: parameters on one flat vector, and three calls.

`Parameters` are named views on one flat vector, so that an optimizer, a norm or a checkpoint is one pass over
one array. `Module` is the base of every layer:

    y, state_n           = module(x, state=None)          inference: keeps nothing
    y, state_n, pullback = module.vjp(x, state=None)      training: keeps what the pullback needs
    dx, dstate0, grads   = pullback(dy, dstate_n=None)    vector-Jacobian product

Layers that know time take `lengths` behind the state, the steps of each row of a padded batch. x, y and their gradients
may also be `Ragged`. A layer without memory has the state None. Modules contain no other mutable thing than their
parameters and the random generator of their dropout, so a call changes nothing in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from nbrnn.data.ragged import Ragged
from nbrnn.kernels import memory

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
Shapes = Mapping[str, tuple[int, ...]]


class Parameters(Mapping[str, np.ndarray]):
    """Named arrays that are views on one flat vector.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        The arrays' names and shapes, in the order in which they lie in the vector.
    flat : ndarray
        One-dimensional, as long as all the shapes together.

    Attributes
    ----------
    frozen : object or None
        Another object after each `freeze`; None where the arrays may be written to.
    """

    def __init__(self, shapes: Shapes, flat: np.ndarray):
        self.flat, self.frozen = flat, None
        self._views: dict[str, np.ndarray] = {}
        self._parts: dict[str, Parameters] = {}
        self._spans: dict[tuple[str, str], np.ndarray] = {}
        start = 0
        for name, shape in shapes.items():
            stop = start + math.prod(shape)
            self._views[name] = flat[start:stop].reshape(shape)
            start = stop
        if flat.ndim != 1 or start != flat.size:
            raise ValueError(f"flat: expected a vector of {start} elements, got shape {flat.shape}")

    def __reduce__(self) -> tuple:
        """A copy's arrays are views on the copy of the vector."""
        return _again, (self.shapes, self.flat, self.frozen is not None)

    @classmethod
    def zeros(cls, shapes: Shapes, dtype: Any) -> Parameters:
        return cls(shapes, memory.zeros((size_of(shapes),), dtype))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: view.shape for name, view in self._views.items()}

    def part(self, prefix: str) -> Parameters:
        """The parameters whose names begin with `prefix`, without it: a view on the same vector."""
        if prefix not in self._parts:
            self._parts[prefix] = self._part(prefix)
        return self._parts[prefix]

    def _part(self, prefix: str) -> Parameters:
        names = [name for name in self._views if name.startswith(prefix)]
        shapes = {name[len(prefix) :]: self._views[name].shape for name in names}
        part = Parameters(shapes, self.span(names[0], names[-1]) if names else self.flat[:0])
        part.frozen = self.frozen
        return part

    def freeze(self) -> None:
        """Make all arrays read-only, here and in all parts."""
        self._freeze(object())

    def thaw(self) -> None:
        """Undo `freeze`."""
        self._freeze(None)

    def _freeze(self, frozen: object | None) -> None:
        self.frozen = frozen
        for array in (self.flat, *self._views.values()):
            array.flags.writeable = frozen is None
        for part in self._parts.values():
            part._freeze(frozen)

    def span(self, first: str, last: str) -> np.ndarray:
        """The piece of the flat vector from parameter `first` to parameter `last`."""
        if (first, last) not in self._spans:
            names, sizes = list(self._views), [view.size for view in self._views.values()]
            start, stop = (sum(sizes[:n]) for n in (names.index(first), names.index(last) + 1))
            self._spans[first, last] = self.flat[start:stop]
        return self._spans[first, last]

    def name_of(self, index: int) -> str:
        """The name of the parameter that owns element `index` of the flat vector."""
        for name, view in self._views.items():
            if index < view.size:
                return name
            index -= view.size
        raise IndexError("index: beyond the last parameter")

    def __getitem__(self, name: str) -> np.ndarray:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __repr__(self) -> str:
        rows = (f"{name} {'x'.join(map(str, view.shape))}" for name, view in self._views.items())
        return f"Parameters({', '.join(rows)}: {self.flat.size:,} {self.flat.dtype} values)"


def _again(shapes: Shapes, flat: np.ndarray, frozen: bool) -> Parameters:
    """Parameters from what a copy of some is made of."""
    params = Parameters.zeros(shapes, flat.dtype)
    params.flat[:] = flat
    if frozen:
        params.freeze()
    return params


def size_of(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


class Pullback(Protocol):
    """The vector-Jacobian product that `Module.vjp` returns; it may be called once.

    Parameters
    ----------
    dy : ndarray
        Gradient with respect to y.
    dstate_n : optional
        Gradient with respect to the last state, shaped like it; None is zero.
    out : Parameters, optional
        Where to write the gradients; by default they are newly made.

    Returns
    -------
    dx : ndarray or None
        Gradient with respect to x; None where x holds integers.
    dstate0
        Gradient with respect to the first state.
    grads : Parameters
        Gradients with respect to the parameters, under the same names.
    """

    def __call__(
        self, dy: np.ndarray, dstate_n: Any = None, *, out: Parameters | None = None
    ) -> tuple[np.ndarray | None, Any, Parameters]: ...


class Module:
    """Base of all layers: parameters and three calls (see the top of this file).

    `copy.deepcopy` gives a module with parameters and random generators of its own; `pickle` takes it to another
    process.
    """

    params: Parameters
    dtype: np.dtype
    changes_time = False  # whether the steps of y are others than those of x
    _fresh: tuple[str, ...] = ()  # attributes that `_make` sets, and that a copy does not take over

    def _make(self) -> None:
        """Set what belongs to this object alone, such as memory for its calls: when it is built, and in a copy."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self._fresh}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make()

    def __call__(self, x: np.ndarray, state: Any = None) -> tuple[np.ndarray, Any]:
        raise NotImplementedError

    def vjp(self, x: np.ndarray, state: Any = None) -> tuple[np.ndarray, Any, Pullback]:
        raise NotImplementedError

    def stream(self, batch_size: int = 1) -> Any:
        """A session that takes one time step at a time, of so many rows; see `nbrnn.layers.streaming`."""
        raise TypeError(f"stream: {type(self).__name__} needs the whole sequence")

    def config(self) -> dict[str, Any]:
        """The arguments that build a module of the same shape, as plain JSON values."""
        raise NotImplementedError

    def freeze(self) -> Module:
        """Make the parameters read-only, from now on until `thaw`: for inference, and often.

        A call compares parameters with those that it packed before, which takes as long as reading them all; with
        frozen ones it need not. Freeze a whole model rather than a module of it: through the model's own parameters
        those of the module could still be written to.

        Returns
        -------
        Module
            Itself.
        """
        self.params.freeze()
        return self

    def thaw(self) -> Module:
        """Let the parameters be written to again, as for training; returns the module."""
        self.params.thaw()
        return self

    def rebind(self, params: Parameters) -> None:
        """Move the parameters into `params`, views on a larger vector, keeping their values."""
        params.flat[:] = self.params.flat
        self.params = params

    def leaves(self) -> list[Module]:
        """The modules that hold the parameters: itself, or those that it consists of."""
        return [self]

    def generators(self) -> list[np.random.Generator]:
        """The random generators that calls of `vjp` draw from, in a fixed order."""
        return []

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of all parameters by name."""
        return {name: view.copy() for name, view in self.params.items()}

    def load_state_dict(self, mapping: Mapping[str, np.ndarray]) -> None:
        """Set all parameters; either all of them change or, with an error, none.

        Parameters
        ----------
        mapping : mapping of str to array_like
            An array for every parameter, of its shape, of finite real numbers.

        Raises
        ------
        ValueError
            Names are missing or unknown, a shape differs, or a value is not finite: the message lists them all. Or the
            parameters are frozen.
        TypeError
            A value is not an array of real numbers.
        """
        if self.params.frozen is not None:
            raise ValueError("mapping: expected a module that can be written to, got a frozen one (thaw it)")
        wrong = [f"{name}: missing" for name in self.params if name not in mapping]
        wrong += [f"{name}: unknown" for name in mapping if name not in self.params]
        arrays = {}
        for name, view in self.params.items():
            if name not in mapping:
                continue
            array = np.asarray(mapping[name])
            if array.dtype.kind not in "fiu":
                raise TypeError(f"{name}: expected an array of real numbers, got dtype {array.dtype}")
            if array.shape != view.shape:
                wrong.append(f"{name}: expected shape {view.shape}, got {array.shape}")
                continue
            with np.errstate(over="ignore"):
                array = array.astype(self.dtype)
            if not np.isfinite(array).all():
                wrong.append(f"{name}: expected finite values, got NaN, infinity or a value beyond {self.dtype}")
            arrays[name] = array
        if wrong:
            raise ValueError("state_dict: " + "; ".join(wrong))
        for name, array in arrays.items():
            self.params[name][...] = array


class Pointwise(Module):
    """Base of layers without memory that treat every step by itself."""

    def _apply(self, x: Any) -> np.ndarray:
        """y, from x of any form that the layer takes."""
        raise NotImplementedError

    def _linearise(self, x: Any) -> tuple[np.ndarray, Callable[[np.ndarray, Parameters], np.ndarray | None]]:
        """y, and a function of dy that gives dx and writes the gradients of the parameters."""
        raise NotImplementedError

    def frozen(self) -> Callable[[Any], np.ndarray]:
        """The function y of x for many calls with the parameters as they are now."""
        return self._apply

    def __call__(self, x: np.ndarray | Ragged, state: None = None) -> tuple[np.ndarray | Ragged, None]:
        if isinstance(x, Ragged):
            return x.with_values(self._apply(x.values)), None
        return self._apply(x), None

    def vjp(self, x: np.ndarray | Ragged, state: None = None) -> tuple[np.ndarray | Ragged, None, Pullback]:
        ragged = x if isinstance(x, Ragged) else None
        y, back = self._linearise(x if ragged is None else x.values)

        def pullback(dy, dstate_n=None, *, out=None):
            grads = Parameters.zeros(self.params.shapes, self.dtype) if out is None else out
            dx = back(dy if ragged is None else ragged.values_of("dy", dy), grads)
            return dx if dx is None or ragged is None else ragged.with_values(dx), None, grads

        return y if ragged is None else ragged.with_values(y), None, pullback


def check_dtype(dtype: Any) -> np.dtype:
    """The layer's dtype, or a clear error."""
    try:
        result = np.dtype(dtype)
    except TypeError:
        result = None
    if result is None or result not in FLOATS:  # None alone would stand for float64
        raise ValueError(f"dtype: expected float32 or float64, got {dtype!r}")
    return result


def check_size(name: str, value: Any, least: int = 1) -> int:
    """An integer argument, or a clear error."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return int(value)


def check_number(name: str, value: Any) -> float:
    """A finite number, or a clear error."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not np.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)


def check_positive(name: str, value: Any) -> float | None:
    """A number above zero or None, or a clear error."""
    if value is not None and not check_number(name, value) > 0:
        raise ValueError(f"{name}: expected more than 0, got {value}")
    return None if value is None else float(value)


def check_letters(name: str, value: Any, known: str, least: int = 1) -> str:
    """Some of the letters of `known`, in their order, or a clear error."""
    if not isinstance(value, str) or set(value) - set(known) or len(set(value)) < max(len(value), least):
        raise ValueError(f"{name}: expected some of the letters of {known!r}, got {value!r}")
    return "".join(letter for letter in known if letter in value)


def check_fraction(name: str, value: Any) -> float:
    """A probability in [0, 1), or a clear error."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected a fraction in [0, 1), got {value}")
    return float(value)


def check_floats(
    name: str, array: Any, dtype: np.dtype, shape: tuple[int | None, ...], words: str | None = None
) -> np.ndarray:
    """`array` as a read-only C-contiguous array of `dtype` and `shape`, or a clear error.

    None in `shape` is any size; `words` is how a message writes the expected shape, if not as it is. float32 and
    float64 are converted into each other; integers and half precision are refused, since to convert them may hide a
    mistake.
    """
    if type(array) is not np.ndarray:
        if isinstance(array, Ragged):
            raise TypeError(f"{name}: expected an array {words or shape}, got a Ragged")
        array = np.asarray(array)
    if array.dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected {dtype} values, got {array.dtype}; convert them with .astype({dtype.name!r})"
        )
    if not _fits(array.shape, shape):
        raise ValueError(f"{name}: expected {words or shape}, got {array.shape}")
    if array.dtype is not dtype or not array.flags.c_contiguous:
        array = np.asarray(array, dtype, order="C")
    return read_only(array)


def check_tokens(
    name: str, array: Any, shape: tuple[int | None, ...], words: str, count: int | None = None
) -> np.ndarray:
    """`array` as a read-only C-contiguous int64 array of `shape` with values in [0, count), or a clear error."""
    array = np.asarray(array)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integer tokens, got {array.dtype}")
    if not _fits(array.shape, shape):
        raise ValueError(f"{name}: expected {words}, got {array.shape}")
    tokens = np.asarray(array, np.int64, order="C")
    # One pass finds both kinds of wrong ones: without a sign, negative numbers are the largest.
    if count is not None and array.size and tokens.view(np.uint64).max() >= count:
        raise ValueError(f"{name}: expected tokens in [0, {count}), got {array.min()} to {array.max()}")
    return read_only(tokens)


@lru_cache(maxsize=256)
def zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros that cannot be written to; many of them take no memory, since their pages are never touched."""
    return read_only(np.zeros(shape, dtype))


def check_products(products: Any, dtype: np.dtype, able: Sequence[str]) -> str | None:
    """None or one of the kinds of narrow factors that a layer is able to multiply by, which are for float32."""
    if products is not None and products not in able:
        *kinds, last = map(repr, (None, *able))
        raise ValueError(f"products: expected {', '.join(kinds)} or {last}, got {products!r}")
    if products and dtype != np.float32:
        raise ValueError(f"products: expected None for {dtype}, got {products!r}")
    return products


def read_only(array: np.ndarray) -> np.ndarray:
    """A view that cannot be written to."""
    view = array.view()
    view.setflags(write=False)  # takes half as long as to set an attribute of `flags`
    return view


def _fits(got: tuple[int, ...], want: tuple[int | None, ...]) -> bool:
    if got == want:
        return True
    # A list takes half as long as `all`, and this is in every call.
    return len(got) == len(want) and not [1 for size, one in zip(got, want) if size != one and one is not None]
