"""Between sequences and single rows: pooling over time (many to one) and repetition (one to many).

A pooled row depends on the steps of its own sequence alone: its bits are the same in every batch and beside any
padding, which may hold anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nbrnn.data.ragged import Ragged, check_lengths
from nbrnn.kernels import pool
from nbrnn.kernels.jit import run
from nbrnn.kernels.schedule import shards_for
from nbrnn.layers.initialise import Seed, check_scheme, fill, generator
from nbrnn.layers.linear import Linear
from nbrnn.layers.module import Module, Parameters, Pullback, check_dtype, check_floats, check_size, read_only
from nbrnn.layers.sequences import take

Back = Callable[[np.ndarray, Parameters], np.ndarray]


class _Spans:
    """Where the steps of each sequence lie, and what x looks like to the caller.

    Attributes
    ----------
    rows : ndarray, (M, I)
        All rows of x, those of the padding too.
    starts, lengths : ndarray of int64, (B,)
    step : int
        See `nbrnn.kernels.pool`.
    """

    def __init__(self, x: Any, lengths: Any, batch_first: bool, dtype: np.dtype, size: int | None = None):
        self.ragged = x if isinstance(x, Ragged) else None
        x = np.asarray(x if self.ragged is None else x.values)
        self.single = self.ragged is None and x.ndim == 2
        flat = self.single or self.ragged is not None
        names = "N" if self.ragged is not None else "T" if self.single else "B, T" if batch_first else "T, B"
        shape = (*((None,) if flat else (None, None)), size)
        x = check_floats("x", x, dtype, shape, f"({names}, {size or 'I'})")
        self.shape, self.rows = x.shape, x if flat else x.reshape(x.shape[0] * x.shape[1], x.shape[2])
        if self.ragged is not None:
            if lengths is not None:
                raise ValueError("lengths: expected None beside a Ragged, which has its own")
            self.starts, self.lengths, self.step = self.ragged.offsets[:-1], self.ragged.lengths, 1
        else:
            T, B = (len(x), 1) if self.single else x.shape[1::-1] if batch_first else x.shape[:2]
            self.starts, self.step = _layout(T, B, batch_first or self.single)
            self.lengths = _lengths(lengths, T, B, self.single)
        self.offsets = np.append(0, np.cumsum(self.lengths))

    @property
    def layout(self) -> tuple[np.ndarray, np.ndarray, int]:
        return self.starts, self.lengths, self.step

    @property
    def row_shape(self) -> tuple[int, int]:
        """(B, I)"""
        return len(self.starts), self.rows.shape[1]

    @property
    def shards(self) -> int:
        return shards_for(10 * self.rows.size)

    def blank(self) -> np.ndarray:
        """Room for a gradient of all rows, with zeros in the padding."""
        make = np.empty if self.offsets[-1] == len(self.rows) else np.zeros
        return make(self.rows.shape, self.rows.dtype)

    def places(self) -> np.ndarray | None:
        """The row of each step, sequence by sequence; None where it is its own number."""
        if self.step == 1 and self.offsets[-1] == len(self.rows):
            return None
        time = np.arange(self.offsets[-1]) - np.repeat(self.offsets[:-1], self.lengths)
        return np.repeat(self.starts, self.lengths) + time * self.step

    def outer(self, values: np.ndarray) -> np.ndarray | Ragged:
        """All rows in the form of x."""
        return values.reshape(self.shape) if self.ragged is None else self.ragged.with_values(values)

    def pooled(self, y: np.ndarray) -> np.ndarray:
        """(B, I) as the caller knows it."""
        return y[0] if self.single else y

    def check_dy(self, dy: Any) -> np.ndarray:
        shape = self.row_shape[1:] if self.single else self.row_shape
        return check_floats("dy", dy, self.rows.dtype, shape).reshape(self.row_shape)


def _layout(T: int, B: int, rows_first: bool) -> tuple[np.ndarray, int]:
    """The first row of each sequence, and how far its steps are apart."""
    return (np.arange(B) * T, 1) if rows_first else (np.arange(B), B)


def _lengths(lengths: Any, T: int, B: int, single: bool) -> np.ndarray:
    """One sequence alone may have its length as a number."""
    if lengths is None:
        return np.full(B, T)
    return check_lengths(np.reshape(lengths, 1) if single and np.ndim(lengths) == 0 else lengths, T, B)


class _Pooling(Module):
    """Base of what makes one row of a sequence."""

    changes_time = True
    input_size: int | None = None

    def __init__(self, batch_first: bool = False, dtype: Any = "float32"):
        self.batch_first, self.dtype = bool(batch_first), check_dtype(dtype)
        self.params = Parameters.zeros({}, self.dtype)

    def _linearise(self, spans: _Spans) -> tuple[np.ndarray, Back]:
        """y (B, I), and a function of dy that gives dx (M, I) and writes the gradients of the parameters."""
        raise NotImplementedError

    def _spans(self, x: Any, lengths: Any) -> _Spans:
        return _Spans(x, lengths, self.batch_first, self.dtype, self.input_size)

    def __call__(self, x: np.ndarray | Ragged, state: None = None, lengths: Any = None) -> tuple[np.ndarray, None]:
        spans = self._spans(x, lengths)
        return spans.pooled(self._linearise(spans)[0]), None

    def vjp(self, x: np.ndarray | Ragged, state: None = None, lengths: Any = None) -> tuple[np.ndarray, None, Pullback]:
        spans = self._spans(x, lengths)
        y, back = self._linearise(spans)

        def pullback(dy, dstate_n=None, *, out=None):
            grads = Parameters.zeros(self.params.shapes, self.dtype) if out is None else out
            return spans.outer(back(spans.check_dy(dy), grads)), None, grads

        return spans.pooled(y), None, pullback

    def config(self) -> dict[str, Any]:
        return {"batch_first": self.batch_first, "dtype": self.dtype.name}


class LastStep(_Pooling):
    """The last step of each sequence, y_b = x_{L_b, b}.

    Parameters
    ----------
    batch_first : bool
        Whether x is (B, T, I) rather than (T, B, I).
    dtype : {"float32", "float64"}

    Raises
    ------
    ValueError
        The dtype is another one.

    Notes
    -----
    x is (T, B, I), perhaps with `lengths` (B,), or one sequence (T, I), or a `Ragged` of values (N, I); y is (B, I), of
    one sequence (I,). dx has the form of x, with zeros in the padding. An empty sequence gives zeros and gets no
    gradient. The state is None.
    """

    def _linearise(self, spans: _Spans) -> tuple[np.ndarray, Back]:
        there = spans.lengths > 0
        last = (spans.starts + (spans.lengths - 1) * spans.step)[there]
        y = np.zeros(spans.row_shape, self.dtype)
        y[there] = spans.rows[last]

        def back(dy, grads):
            dx = np.zeros(spans.rows.shape, self.dtype)
            dx[last] = dy[there]
            return dx

        return y, back


class MeanPooling(_Pooling):
    """The mean of all steps of each sequence, y_b = (x_{1, b} + ... + x_{L_b, b}) / L_b.

    Parameters
    ----------
    batch_first : bool
        Whether x is (B, T, I) rather than (T, B, I).
    dtype : {"float32", "float64"}

    Raises
    ------
    ValueError
        The dtype is another one.

    Notes
    -----
    x, y, dx and empty sequences as with `LastStep`.
    """

    def _linearise(self, spans: _Spans) -> tuple[np.ndarray, Back]:
        y, scales = np.empty(spans.row_shape, self.dtype), 1.0 / np.maximum(spans.lengths, 1)
        run(pool.sum_steps, spans.shards, spans.rows, *spans.layout, scales, y)

        def back(dy, grads):
            dx = spans.blank()
            run(pool.spread, spans.shards, dy, scales, *spans.layout, dx)
            return dx

        return y, back


class MaxPooling(_Pooling):
    """The largest value of each unit over the steps of each sequence, y_{b, i} = max over t of x_{t, b, i}.

    Parameters
    ----------
    batch_first : bool
        Whether x is (B, T, I) rather than (T, B, I).
    dtype : {"float32", "float64"}

    Raises
    ------
    ValueError
        The dtype is another one.

    Notes
    -----
    x, y, dx and empty sequences as with `LastStep`. The gradient goes to the first step that holds the largest value. A
    NaN counts as the largest of all.
    """

    def _linearise(self, spans: _Spans) -> tuple[np.ndarray, Back]:
        y = np.empty(spans.row_shape, self.dtype)
        run(pool.max_steps, spans.shards, spans.rows, *spans.layout, y)
        kept = read_only(y.copy())  # y is the caller's

        def back(dy, grads):
            dx = spans.blank()
            run(pool.max_steps_back, spans.shards, spans.rows, kept, dy, *spans.layout, dx)
            return dx

        return y, back


class AttentionPooling(_Pooling):
    """The mean of all steps of each sequence, weighted by what the layer has learnt to look at.

    Parameters
    ----------
    input_size : int
    hidden_size : int, optional
        H, the units that find the scores; by default as many as `input_size`.
    batch_first : bool
        Whether x is (B, T, I) rather than (T, B, I).
    dtype : {"float32", "float64"}
    seed : int, numpy.random.Generator or None
    init : {"torch", "glorot", "orthogonal"}

    Attributes
    ----------
    params : Parameters
        ``weight`` V (H, I), ``bias`` b (H,) and ``score`` w (H,).

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong type or out of range.

    Notes
    -----
    With softmax over the steps of a sequence::

        a_t = w^T tanh(V x_t + b)
        p   = softmax(a)
        y   = sum over t of p_t x_t

    This is the attention of Z. Yang et al., Hierarchical Attention Networks for Document Classification, NAACL 2016,
    equations 5 to 7 (there w is the context vector u_w). `score` is initialised as a weight with one output.

    x, y, dx and empty sequences as with `LastStep`.
    """

    def __init__(
        self,
        input_size: int,
        *,
        hidden_size: int | None = None,
        batch_first: bool = False,
        dtype: Any = "float32",
        seed: Seed = None,
        init: str = "torch",
    ):
        super().__init__(batch_first, dtype)
        self.input_size = check_size("input_size", input_size)
        self.hidden_size = H = self.input_size if hidden_size is None else check_size("hidden_size", hidden_size)
        self.init, rng = check_scheme(init), generator(seed)
        # The packed product, whose rows do not depend on each other; its parameters are the first of this layer's.
        self._linear = Linear(self.input_size, H, dtype=self.dtype, seed=rng, init=init)
        self.params = Parameters.zeros({**self._linear.params.shapes, "score": (H,)}, self.dtype)
        self._linear.rebind(_linear_part(self.params))
        score = Parameters({"score": (1, H)}, self.params.span("score", "score"))
        fill(score, init, rng, 1.0 / np.sqrt(H))

    def rebind(self, params: Parameters) -> None:
        super().rebind(params)
        self._linear.rebind(_linear_part(params))

    def _linearise(self, spans: _Spans) -> tuple[np.ndarray, Back]:
        places, offsets, score = spans.places(), spans.offsets, self.params["score"]
        x = spans.rows if places is None else take(spans.rows, places)
        hidden, _, linear_back = self._linear.vjp(x)
        weights, y = np.empty(len(x), self.dtype), np.empty(spans.row_shape, self.dtype)
        shards = shards_for(10 * (x.size + 3 * hidden.size))
        run(pool.attend, shards, hidden, score, x, offsets, weights, y)

        def back(dy, grads):
            dscores, dhidden = np.empty_like(weights), np.empty_like(hidden)
            run(pool.attend_back, shards, x, weights, offsets, dy, dscores)
            run(pool.score_back, shards, hidden, score, dscores, dhidden, grads["score"])
            dx, _, _ = linear_back(dhidden, out=_linear_part(grads))
            run(pool.add_weighted, shards, dy, weights, offsets, dx)
            return dx if places is None else _put(dx, places, spans.blank())

        return y, back

    def config(self) -> dict[str, Any]:
        return {"input_size": self.input_size, "hidden_size": self.hidden_size, "init": self.init} | super().config()


def _linear_part(params: Parameters) -> Parameters:
    """V and b, as views on the same vector."""
    return Parameters({name: params[name].shape for name in ("weight", "bias")}, params.span("weight", "bias"))


def _put(values: np.ndarray, places: np.ndarray, out: np.ndarray) -> np.ndarray:
    out[places] = values
    return out


class RepeatSteps(Module):
    """The same row at every step, y_{t, b} = x_b.

    Parameters
    ----------
    steps : int
        T.
    batch_first : bool
        Whether y is (B, T, I) rather than (T, B, I).
    dtype : {"float32", "float64"}

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong type or out of range.

    Notes
    -----
    x is (B, I), or one row (I,), of which y is (T, I). `lengths` (B,) in a call are the steps that each row gets: y
    has zeros in the padding behind them, and nothing of dy is read there. dx is the sum of dy over time, in order. The
    state is None.
    """

    changes_time = True

    def __init__(self, steps: int, *, batch_first: bool = False, dtype: Any = "float32"):
        self.steps = check_size("steps", steps)
        self.batch_first, self.dtype = bool(batch_first), check_dtype(dtype)
        self.params = Parameters.zeros({}, self.dtype)

    def __call__(self, x: np.ndarray, state: None = None, lengths: Any = None) -> tuple[np.ndarray, None]:
        return self.vjp(x, state, lengths)[0], None

    def vjp(self, x: np.ndarray, state: None = None, lengths: Any = None) -> tuple[np.ndarray, None, Pullback]:
        if isinstance(x, Ragged):
            raise TypeError("x: expected (B, I), one row for each sequence, got a Ragged")
        single, T = np.ndim(x) == 1, self.steps
        x = check_floats("x", x, self.dtype, (None,) * (1 if single else 2), "(B, I)")
        B, I = shape = (1, *x.shape)[-2:]
        ends = (T, I) if single else (B, T, I) if self.batch_first else (T, B, I)
        starts, step = _layout(T, B, self.batch_first or single)
        layout = starts, _lengths(lengths, T, B, single), step
        shards, scales = shards_for(10 * B * T * I), np.ones(B)
        y = np.empty((B * T, I), self.dtype) if lengths is None else np.zeros((B * T, I), self.dtype)
        run(pool.spread, shards, x.reshape(shape), scales, *layout, y)

        def pullback(dy, dstate_n=None, *, out=None):
            grads = Parameters.zeros({}, self.dtype) if out is None else out
            rows = check_floats("dy", dy, self.dtype, ends, str(ends)).reshape(B * T, I)
            dx = np.empty(shape, self.dtype)
            run(pool.sum_steps, shards, rows, *layout, scales, dx)
            return dx.reshape(x.shape), None, grads

        return y.reshape(ends), None, pullback

    def config(self) -> dict[str, Any]:
        return {"steps": self.steps, "batch_first": self.batch_first, "dtype": self.dtype.name}
