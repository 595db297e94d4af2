"""The equations in plain NumPy, one file, no speed: what every layer of nbrnn has to agree with.

Each cell is one step of the published equations, with its derivative written out by hand beneath it. Everything is
float64. `forward` and `backward` are loops over layers, directions and time around a step, and nothing in here comes
from nbrnn. Names, shapes and the order of the gates are those of `torch.nn`.

    y, state_n         = forward("lstm", params, x)
    dx, dstate0, grads = backward("lstm", params, x, dy, dstate_n)

A new cell is a step, its derivative, and one row in CELLS:

    step(p, x, state)                             ->  y, state, tape
    step_backward(p, grads, tape, dy, dstate)     ->  dx, dstate of the step before; adds to grads

Here `p` holds the parameters of one layer and direction ("weight_ih", "bias_hh", ...), `x` is (B, I), `state` is a
tuple of arrays (B, H), and `tape` is whatever the derivative wants to remember. The first state is as wide as what is
fed back.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Activations


def sigmoid(a):
    # 1 / (1 + exp(-a)), written so that exp never overflows
    e = np.exp(-np.abs(a))
    return np.where(a >= 0, 1 / (1 + e), e / (1 + e))


def tanh(a):
    return np.tanh(a)


def relu(a):
    # max(a, 0), and a NaN stays a NaN
    return np.maximum(a, 0)


# The two products of a step: "ih" takes the input, "hh" what is fed back


def linear(p, which, v):
    # a = W v + b
    return v @ p[f"weight_{which}"].T + p.get(f"bias_{which}", 0)


def linear_backward(p, grads, which, v, da):
    # dW = da v^T,  db = da,  dv = W^T da,  the first two summed over the rows of the batch
    grads[f"weight_{which}"] += da.T @ v
    if f"bias_{which}" in p:
        grads[f"bias_{which}"] += da.sum(axis=0)
    return da @ p[f"weight_{which}"]


def split(a, gates):
    return np.split(a, gates, axis=1)


def join(*gates):
    return np.concatenate(gates, axis=1)


# The simple recurrent network: Elman, "Finding structure in time", 1990


def elman_tanh(p, x, state):
    (h,) = state
    # h' = tanh(W_ih x + b_ih + W_hh h + b_hh)
    h_next = tanh(linear(p, "ih", x) + linear(p, "hh", h))
    return h_next, (h_next,), (x, h, h_next)


def elman_tanh_backward(p, grads, tape, dy, dstate):
    x, h, h_next = tape
    # h' is both the output and the state
    dh_next = dy + dstate[0]
    # tanh'(a) = 1 - tanh(a)^2
    da = dh_next * (1 - h_next**2)
    dx = linear_backward(p, grads, "ih", x, da)
    dh = linear_backward(p, grads, "hh", h, da)
    return dx, (dh,)


def elman_relu(p, x, state):
    (h,) = state
    # h' = relu(W_ih x + b_ih + W_hh h + b_hh)
    h_next = relu(linear(p, "ih", x) + linear(p, "hh", h))
    return h_next, (h_next,), (x, h, h_next)


def elman_relu_backward(p, grads, tape, dy, dstate):
    x, h, h_next = tape
    dh_next = dy + dstate[0]
    # relu'(a) = 1 where a > 0, else 0
    da = dh_next * (h_next > 0)
    dx = linear_backward(p, grads, "ih", x, da)
    dh = linear_backward(p, grads, "hh", h, da)
    return dx, (dh,)


# Long short-term memory: Hochreiter and Schmidhuber, 1997, with the forget gate of Gers et al., 2000


def lstm(p, x, state):
    h, c = state
    # a_i, a_f, a_g, a_o = W_ih x + b_ih + W_hh h + b_hh
    a_i, a_f, a_g, a_o = split(linear(p, "ih", x) + linear(p, "hh", h), 4)
    # i = sigma(a_i),  f = sigma(a_f),  g = tanh(a_g),  o = sigma(a_o)
    i, f, g, o = sigmoid(a_i), sigmoid(a_f), tanh(a_g), sigmoid(a_o)
    # c' = f c + i g
    c_next = f * c + i * g
    # h' = o tanh(c')
    h_next = o * tanh(c_next)
    return h_next, (h_next, c_next), (x, h, c, i, f, g, o, c_next)


def lstm_backward(p, grads, tape, dy, dstate):
    x, h, c, i, f, g, o, c_next = tape
    # h' is both the output and a state
    dh_next = dy + dstate[0]
    # h' = o tanh(c')
    do = dh_next * tanh(c_next)
    dc_next = dstate[1] + dh_next * o * (1 - tanh(c_next) ** 2)
    # c' = f c + i g
    di, df, dg, dc = dc_next * g, dc_next * c, dc_next * i, dc_next * f
    # sigma' = sigma (1 - sigma),  tanh' = 1 - tanh^2
    da = join(di * i * (1 - i), df * f * (1 - f), dg * (1 - g**2), do * o * (1 - o))
    dx = linear_backward(p, grads, "ih", x, da)
    dh = linear_backward(p, grads, "hh", h, da)
    return dx, (dh, dc)


# Gated recurrent unit: Cho et al., 2014, with the reset gate acting after the product, as cuDNN and torch have it


def gru(p, x, state):
    (h,) = state
    # a = W_ih x + b_ih,  b = W_hh h + b_hh
    a_r, a_z, a_n = split(linear(p, "ih", x), 3)
    b_r, b_z, b_n = split(linear(p, "hh", h), 3)
    # r = sigma(a_r + b_r),  z = sigma(a_z + b_z)
    r, z = sigmoid(a_r + b_r), sigmoid(a_z + b_z)
    # n = tanh(a_n + r b_n)
    n = tanh(a_n + r * b_n)
    # h' = (1 - z) n + z h
    h_next = (1 - z) * n + z * h
    return h_next, (h_next,), (x, h, r, z, n, b_n)


def gru_backward(p, grads, tape, dy, dstate):
    x, h, r, z, n, b_n = tape
    # h' is both the output and the state
    dh_next = dy + dstate[0]
    # h' = (1 - z) n + z h
    dn, dz, dh = dh_next * (1 - z), dh_next * (h - n), dh_next * z
    # n = tanh(a_n + r b_n)
    da_n = dn * (1 - n**2)
    dr, db_n = da_n * b_n, da_n * r
    # r = sigma(a_r + b_r),  z = sigma(a_z + b_z)
    da_r, da_z = dr * r * (1 - r), dz * z * (1 - z)
    dx = linear_backward(p, grads, "ih", x, join(da_r, da_z, da_n))
    dh = dh + linear_backward(p, grads, "hh", h, join(da_r, da_z, db_n))
    return dx, (dh,)


class Cell(NamedTuple):
    step: Callable
    step_backward: Callable
    gates: int  # blocks of H rows in weight_ih and weight_hh
    states: int  # arrays carried from step to step


CELLS = {
    "elman_tanh": Cell(elman_tanh, elman_tanh_backward, gates=1, states=1),
    "elman_relu": Cell(elman_relu, elman_relu_backward, gates=1, states=1),
    "lstm": Cell(lstm, lstm_backward, gates=4, states=2),
    "gru": Cell(gru, gru_backward, gates=3, states=1),
}


# Layers: a step in loops over layers, directions and time


def forward(cell, params, x, state=None, num_layers=1, bidirectional=False, masks=None):
    """Run a stack of layers over a sequence and return `y, state_n`.

    `x` is (T, B, I), or integer (T, B) for tokens. A state is an array (num_layers * directions, B, H), or a tuple of
    them where the cell has several; None is zeros. `masks[l]` is multiplied onto the output of layer l on its way to
    layer l + 1: dropout, with the dice already thrown. A bias that is missing from `params` is no bias.
    """
    y, state_n, _ = run(CELLS[cell], float64(params), x, state, num_layers, bidirectional, masks)
    return y, state_n


def backward(cell, params, x, dy, dstate_n=None, state=None, num_layers=1, bidirectional=False, masks=None):
    """Back-propagate `dy` and `dstate_n` through `forward` and return `dx, dstate0, grads`.

    `dstate_n` and `dstate0` look like `state`, and None is zeros. `dx` is None for tokens.
    """
    cell, params = CELLS[cell], float64(params)
    _, _, tapes = run(cell, params, x, state, num_layers, bidirectional, masks)
    grads = {name: np.zeros_like(value) for name, value in params.items()}
    tokens, x, dy = is_tokens(x), as_input(params, x), np.asarray(dy, np.float64)
    dstate = unpack(cell, params, dstate_n, x.shape[1], num_layers * (1 + bidirectional))

    for layer in reversed(range(num_layers)):
        dx = 0
        for k, suffix, order in directions(layer, len(x), bidirectional):
            p, g = of_layer(params, suffix), of_layer(grads, suffix)
            side = np.split(dy, 1 + bidirectional, axis=2)[k % (1 + bidirectional)]
            dx_side = np.zeros((*dy.shape[:2], p["weight_ih"].shape[1]))
            ds = take(dstate, k)
            for t in reversed(order):
                dx_side[t], ds = cell.step_backward(p, g, tapes[k][t], side[t], ds)
            put(dstate, k, ds)
            dx = dx + dx_side
        dy = dx * masks[layer - 1] if masks and layer else dx
    return None if tokens else dy, pack(dstate), grads


def run(cell, params, x, state, num_layers, bidirectional, masks):
    """The forward pass; returns `y, state_n, tapes`, with `tapes[k][t]` for step t of layer and direction k."""
    x = as_input(params, x)
    state = unpack(cell, params, state, x.shape[1], num_layers * (1 + bidirectional))
    tapes = {}
    for layer in range(num_layers):
        x = x * masks[layer - 1] if masks and layer else x
        sides = []
        for k, suffix, order in directions(layer, len(x), bidirectional):
            p, tapes[k] = of_layer(params, suffix), {}
            y = np.zeros((*x.shape[:2], p["weight_hh"].shape[1]))
            s = take(state, k)
            for t in order:
                y[t], s, tapes[k][t] = cell.step(p, x[t], s)
            put(state, k, s)
            sides.append(y)
        x = np.concatenate(sides, axis=2)
    return x, pack(state), tapes


def directions(layer, T, bidirectional):
    """Yield for each direction of a layer: its row in the state, the suffix of its parameters, its order of steps."""
    if not bidirectional:
        yield layer, f"_l{layer}", range(T)
    else:
        yield 2 * layer, f"_l{layer}", range(T)
        yield 2 * layer + 1, f"_l{layer}_reverse", range(T)[::-1]


def of_layer(params, suffix):
    """The parameters (or gradients, the same arrays) of one layer and direction, by their names without suffix."""
    return {name.removesuffix(suffix): value for name, value in params.items() if name.endswith(suffix)}


def float64(params):
    return {name: np.asarray(value, np.float64) for name, value in params.items()}


def is_tokens(x):
    return np.ndim(x) == 2 and np.issubdtype(np.asarray(x).dtype, np.integer)


def as_input(params, x):
    """Floats stay what they are; a token is the row of the identity matrix that it numbers: one-hot by definition."""
    if is_tokens(x):
        return np.eye(params["weight_ih_l0"].shape[1])[x]
    return np.asarray(x, np.float64)


def unpack(cell, params, state, B, rows):
    """A list of fresh arrays (rows, B, width), one for each state of the cell."""
    if state is None:
        fed_back, H = params["weight_hh_l0"].shape[1], params["weight_hh_l0"].shape[0] // cell.gates
        return [np.zeros((rows, B, fed_back if n == 0 else H)) for n in range(cell.states)]
    return [np.array(a, np.float64) for a in (state if cell.states > 1 else [state])]


def take(state, k):
    return tuple(a[k].copy() for a in state)


def put(state, k, values):
    for a, value in zip(state, values):
        a[k] = value


def pack(state):
    return tuple(state) if len(state) > 1 else state[0]


# Measuring


def numeric_gradient(f, array, step=2.0**-10):
    """The gradient of the number `f()` with respect to `array`, which f reads and which is nudged in place.

    Fourth-order central differences: with float64 and numbers around 1, both the truncation and the rounding error are
    near 1e-12. They know nothing of kinks: keep relu's arguments more than two steps away from zero.
    """
    gradient = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        value = array[index]
        f_at = {}
        for n in (-2, -1, 1, 2):
            array[index] = value + n * step
            f_at[n] = f()
        array[index] = value
        # f' = (8 (f(+1) - f(-1)) - (f(+2) - f(-2))) / 12 step
        gradient[index] = (8 * (f_at[1] - f_at[-1]) - (f_at[2] - f_at[-2])) / (12 * step)
    return gradient


def relative_error(a, b):
    """The largest difference between a tensor and its reference `b`, in units of the largest entry of `b`."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        raise ValueError(f"relative_error: expected shape {b.shape}, got {a.shape}")
    return np.max(np.abs(a - b), initial=0) / max(np.max(np.abs(b), initial=0), np.finfo(np.float64).tiny)
