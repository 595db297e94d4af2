"""The equations in plain NumPy, one file, no speed: what every layer of nbrnn has to agree with.

Each cell is one step of the published equations, with its derivative written out by hand beneath it. Everything is
float64. `forward` and `backward` are loops over layers, directions and time around a step, and nothing in here comes
from nbrnn. Names, shapes and the order of the gates are those of `torch.nn`.

    y, state_n         = forward("lstm", params, x)
    dx, dstate0, grads = backward("lstm", params, x, dy, dstate_n)

A new cell is a step, its derivative, and one row in CELLS:

    step(p, x, fed, state, act)                    ->  the next state, tape
    step_backward(p, grads, tape, dnext, act)      ->  dx, dfed, dstate; adds to grads

Here `p` holds the parameters of one layer and direction ("weight_ih", "bias_hh", ...), `x` is (B, I), `fed` is what is
fed back, `state` is a tuple of arrays (B, H), `act` are the activation functions, and `tape` is whatever the derivative
wants to remember. What may happen between two steps of any cell is in `advance`: zoneout, projection, dropout of what
is fed back, and an output that is no state.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

# Activation functions of an argument a, and their derivatives: those that ONNX's LSTM, GRU and RNN may be given


def sigmoid(a):
    # 1 / (1 + exp(-a)), written so that exp never overflows
    e = np.exp(-np.abs(a))
    return np.where(a >= 0, 1 / (1 + e), e / (1 + e))


class Kind(NamedTuple):
    f: Callable  # of a, alpha, beta
    df: Callable  # its derivative with respect to a
    alpha: float = 0.0  # by default
    beta: float = 0.0
    kinks: Callable = lambda A, B: ()  # where a derivative jumps


def at_zero(A, B):
    return (0,)


KINDS = {
    "sigmoid": Kind(lambda a, A, B: sigmoid(a), lambda a, A, B: sigmoid(a) * (1 - sigmoid(a))),
    "tanh": Kind(lambda a, A, B: np.tanh(a), lambda a, A, B: 1 - np.tanh(a) ** 2),
    "linear": Kind(lambda a, A, B: a, lambda a, A, B: np.ones_like(a)),
    "affine": Kind(lambda a, A, B: A * a + B, lambda a, A, B: np.full_like(a, A), 1.0, 0.0),
    "relu": Kind(lambda a, A, B: np.maximum(a, 0), lambda a, A, B: a > 0, kinks=at_zero),
    "leaky_relu": Kind(
        lambda a, A, B: np.where(a < 0, A * a, a), lambda a, A, B: np.where(a < 0, A, 1), 0.01, kinks=at_zero
    ),
    "thresholded_relu": Kind(
        lambda a, A, B: np.where(a > A, a, 0), lambda a, A, B: a > A, 1.0, kinks=lambda A, B: (A,)
    ),
    "scaled_tanh": Kind(
        lambda a, A, B: A * np.tanh(B * a), lambda a, A, B: A * B * (1 - np.tanh(B * a) ** 2), 1.0, 1.0
    ),
    "hard_sigmoid": Kind(
        lambda a, A, B: np.clip(A * a + B, 0, 1),
        lambda a, A, B: A * ((A * a + B > 0) & (A * a + B < 1)),
        0.2,
        0.5,
        kinks=lambda A, B: (-B / A, (1 - B) / A),
    ),
    "elu": Kind(
        lambda a, A, B: np.where(a < 0, A * np.expm1(np.minimum(a, 0)), a),
        lambda a, A, B: np.where(a < 0, A * np.exp(np.minimum(a, 0)), 1),
        1.0,
        kinks=at_zero,
    ),
    "softsign": Kind(lambda a, A, B: a / (1 + np.abs(a)), lambda a, A, B: (1 + np.abs(a)) ** -2.0, kinks=at_zero),
    "softplus": Kind(lambda a, A, B: np.logaddexp(a, 0), lambda a, A, B: sigmoid(a)),
}


class Activation:
    """One of KINDS, of an argument that may be clipped to [-limit, limit] before."""

    def __init__(self, name, alpha=None, beta=None, limit=np.inf):
        self.kind, self.limit = KINDS[name], limit
        self.alpha = self.kind.alpha if alpha is None else alpha
        self.beta = self.kind.beta if beta is None else beta
        self.kinks = [a for a in (-limit, limit, *self.kind.kinks(self.alpha, self.beta)) if np.isfinite(a)]

    def __call__(self, a):
        return self.kind.f(np.clip(a, -self.limit, self.limit), self.alpha, self.beta)

    def slope(self, a):
        # d clip(a) / da = 1 within the limits, else 0
        slope = self.kind.df(np.clip(a, -self.limit, self.limit), self.alpha, self.beta)
        return np.where(np.abs(a) > self.limit, 0, slope)


# The products of a step: "ih" takes the input, "hh" what is fed back, "hr" what is projected


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


# The simple recurrent network: Elman, "Finding structure in time", 1990. The Jordan network, "Serial order", 1986, is
# the same with a projection


def elman(p, x, fed, state, act):
    (f,) = act
    # h' = f(W_ih x + b_ih + W_hh h + b_hh)
    a = linear(p, "ih", x) + linear(p, "hh", fed)
    return (f(a),), (x, fed, a)


def elman_backward(p, grads, tape, dnext, act):
    (x, fed, a), (dh_next,), (f,) = tape, dnext, act
    da = dh_next * f.slope(a)
    return linear_backward(p, grads, "ih", x, da), linear_backward(p, grads, "hh", fed, da), (0,)


# Long short-term memory: Hochreiter and Schmidhuber, 1997, with the forget gate of Gers et al., 2000, and the peepholes
# of Gers and Schmidhuber, "Recurrent nets that time and count", 2000


def peepholes(p):
    # p_i, p_f, p_o
    return p.get("weight_ch", np.zeros((3, 1)))


def peepholes_backward(grads, *dp):
    if "weight_ch" in grads:
        for row, d in zip(grads["weight_ch"], dp):
            row += np.sum(d, axis=0)


def lstm(p, x, fed, state, act):
    (_, c), (s, t, u), (p_i, p_f, p_o) = state, act, peepholes(p)
    # a_i, a_f, a_g, a_o = W_ih x + b_ih + W_hh h + b_hh
    a_i, a_f, a_g, a_o = split(linear(p, "ih", x) + linear(p, "hh", fed), 4)
    # i = s(a_i + p_i c),  f = s(a_f + p_f c),  g = t(a_g)
    a_i, a_f = a_i + p_i * c, a_f + p_f * c
    # c' = f c + i g
    c_next = s(a_f) * c + s(a_i) * t(a_g)
    # o = s(a_o + p_o c')
    a_o = a_o + p_o * c_next
    # h' = o u(c')
    h_next = s(a_o) * u(c_next)
    return (h_next, c_next), (x, fed, c, a_i, a_f, a_g, a_o, c_next)


def lstm_backward(p, grads, tape, dnext, act):
    (x, fed, c, a_i, a_f, a_g, a_o, c_next), (dh_next, dc_next) = tape, dnext
    (s, t, u), (p_i, p_f, p_o) = act, peepholes(p)
    # h' = o u(c')
    da_o = dh_next * u(c_next) * s.slope(a_o)
    # c' is in h', in o, and is a state
    dc_next = dc_next + dh_next * s(a_o) * u.slope(c_next) + da_o * p_o
    # c' = f c + i g
    da_i, da_f = dc_next * t(a_g) * s.slope(a_i), dc_next * c * s.slope(a_f)
    da_g = dc_next * s(a_i) * t.slope(a_g)
    dc = dc_next * s(a_f) + da_i * p_i + da_f * p_f
    peepholes_backward(grads, da_i * c, da_f * c, da_o * c_next)
    da = join(da_i, da_f, da_g, da_o)
    return linear_backward(p, grads, "ih", x, da), linear_backward(p, grads, "hh", fed, da), (0, dc)


# The same with one gate in place of i and f: Greff et al., "LSTM: a search space odyssey", 2017


def coupled_input(p, x, fed, state, act):
    (_, c), (s, t, u), (_, p_f, p_o) = state, act, peepholes(p)
    a_f, a_g, a_o = split(linear(p, "ih", x) + linear(p, "hh", fed), 3)
    a_f = a_f + p_f * c
    # i = 1 - f
    f = s(a_f)
    c_next = f * c + (1 - f) * t(a_g)
    a_o = a_o + p_o * c_next
    h_next = s(a_o) * u(c_next)
    return (h_next, c_next), (x, fed, c, a_f, a_g, a_o, c_next)


def coupled_input_backward(p, grads, tape, dnext, act):
    (x, fed, c, a_f, a_g, a_o, c_next), (dh_next, dc_next) = tape, dnext
    (s, t, u), (_, p_f, p_o) = act, peepholes(p)
    da_o = dh_next * u(c_next) * s.slope(a_o)
    dc_next = dc_next + dh_next * s(a_o) * u.slope(c_next) + da_o * p_o
    # c' = f c + (1 - f) g
    da_f = dc_next * (c - t(a_g)) * s.slope(a_f)
    da_g = dc_next * (1 - s(a_f)) * t.slope(a_g)
    dc = dc_next * s(a_f) + da_f * p_f
    peepholes_backward(grads, 0, da_f * c, da_o * c_next)
    da = join(da_f, da_g, da_o)
    return linear_backward(p, grads, "ih", x, da), linear_backward(p, grads, "hh", fed, da), (0, dc)


def coupled_forget(p, x, fed, state, act):
    (_, c), (s, t, u), (p_i, _, p_o) = state, act, peepholes(p)
    a_i, a_g, a_o = split(linear(p, "ih", x) + linear(p, "hh", fed), 3)
    a_i = a_i + p_i * c
    # f = 1 - i
    i = s(a_i)
    c_next = (1 - i) * c + i * t(a_g)
    a_o = a_o + p_o * c_next
    h_next = s(a_o) * u(c_next)
    return (h_next, c_next), (x, fed, c, a_i, a_g, a_o, c_next)


def coupled_forget_backward(p, grads, tape, dnext, act):
    (x, fed, c, a_i, a_g, a_o, c_next), (dh_next, dc_next) = tape, dnext
    (s, t, u), (p_i, _, p_o) = act, peepholes(p)
    da_o = dh_next * u(c_next) * s.slope(a_o)
    dc_next = dc_next + dh_next * s(a_o) * u.slope(c_next) + da_o * p_o
    # c' = (1 - i) c + i g
    da_i = dc_next * (t(a_g) - c) * s.slope(a_i)
    da_g = dc_next * s(a_i) * t.slope(a_g)
    dc = dc_next * (1 - s(a_i)) + da_i * p_i
    peepholes_backward(grads, da_i * c, 0, da_o * c_next)
    da = join(da_i, da_g, da_o)
    return linear_backward(p, grads, "ih", x, da), linear_backward(p, grads, "hh", fed, da), (0, dc)


# Gated recurrent unit: Cho et al., 2014, with the reset gate acting after the product, as cuDNN and torch have it, ...


def gru(p, x, fed, state, act):
    (h,), (s, t) = state, act
    # a = W_ih x + b_ih,  b = W_hh h + b_hh
    a_r, a_z, a_n = split(linear(p, "ih", x), 3)
    b_r, b_z, b_n = split(linear(p, "hh", fed), 3)
    # r = s(a_r + b_r),  z = s(a_z + b_z)
    a_r, a_z = a_r + b_r, a_z + b_z
    r, z = s(a_r), s(a_z)
    # n = t(a_n + r b_n)
    a_n = a_n + r * b_n
    # h' = (1 - z) n + z h
    h_next = (1 - z) * t(a_n) + z * h
    return (h_next,), (x, fed, h, a_r, a_z, a_n, b_n)


def gru_backward(p, grads, tape, dnext, act):
    (x, fed, h, a_r, a_z, a_n, b_n), (dh_next,), (s, t) = tape, dnext, act
    # h' = (1 - z) n + z h
    da_z, dh = dh_next * (h - t(a_n)) * s.slope(a_z), dh_next * s(a_z)
    # n = t(a_n + r b_n)
    da_n = dh_next * (1 - s(a_z)) * t.slope(a_n)
    da_r, db_n = da_n * b_n * s.slope(a_r), da_n * s(a_r)
    dx = linear_backward(p, grads, "ih", x, join(da_r, da_z, da_n))
    dfed = linear_backward(p, grads, "hh", fed, join(da_r, da_z, db_n))
    return dx, dfed, (dh,)


# ... and before the product, as the paper has it


def gru_reset_before(p, x, fed, state, act):
    (h,), (s, t) = state, act
    rz, n = gates_of(p, 0, 2), gates_of(p, 2, 3)
    # r, z = s(W_ih x + b_ih + W_hh h + b_hh)
    a_r, a_z = split(linear(rz, "ih", x) + linear(rz, "hh", fed), 2)
    # n = t(W_in x + b_in + W_hn (r h) + b_hn)
    a_n = linear(n, "ih", x) + linear(n, "hh", s(a_r) * fed)
    # h' = (1 - z) n + z h
    h_next = (1 - s(a_z)) * t(a_n) + s(a_z) * h
    return (h_next,), (x, fed, h, a_r, a_z, a_n)


def gru_reset_before_backward(p, grads, tape, dnext, act):
    (x, fed, h, a_r, a_z, a_n), (dh_next,), (s, t) = tape, dnext, act
    rz, n, grads_rz, grads_n = gates_of(p, 0, 2), gates_of(p, 2, 3), gates_of(grads, 0, 2), gates_of(grads, 2, 3)
    # h' = (1 - z) n + z h
    da_z, dh = dh_next * (h - t(a_n)) * s.slope(a_z), dh_next * s(a_z)
    da_n = dh_next * (1 - s(a_z)) * t.slope(a_n)
    # a_n = ... + W_hn (r h)
    dreset = linear_backward(n, grads_n, "hh", s(a_r) * fed, da_n)
    da = join(dreset * fed * s.slope(a_r), da_z)
    dx = linear_backward(n, grads_n, "ih", x, da_n) + linear_backward(rz, grads_rz, "ih", x, da)
    dfed = dreset * s(a_r) + linear_backward(rz, grads_rz, "hh", fed, da)
    return dx, dfed, (dh,)


def gates_of(p, first, last):
    """Some of three gates: views on their rows of the parameters or gradients."""
    return {name: value[first * len(value) // 3 : last * len(value) // 3] for name, value in p.items()}


# Light gated recurrent unit: Ravanelli et al., "Light gated recurrent units for speech recognition", 2018, without
# batch normalisation


def ligru(p, x, fed, state, act):
    (h,), (s, t) = state, act
    a_z, a_n = split(linear(p, "ih", x) + linear(p, "hh", fed), 2)
    # h' = z h + (1 - z) n
    h_next = s(a_z) * h + (1 - s(a_z)) * t(a_n)
    return (h_next,), (x, fed, h, a_z, a_n)


def ligru_backward(p, grads, tape, dnext, act):
    (x, fed, h, a_z, a_n), (dh_next,), (s, t) = tape, dnext, act
    da_z, da_n = dh_next * (h - t(a_n)) * s.slope(a_z), dh_next * (1 - s(a_z)) * t.slope(a_n)
    da = join(da_z, da_n)
    dx = linear_backward(p, grads, "ih", x, da)
    return dx, linear_backward(p, grads, "hh", fed, da), (dh_next * s(a_z),)


# Minimal gated recurrent unit: Feng et al., "Were RNNs all we needed?", 2024


def mingru(p, x, fed, state, act):
    (h,), (s, t) = state, act
    a_z, a_n = split(linear(p, "ih", x), 2)
    # h' = (1 - z) h + z n
    h_next = (1 - s(a_z)) * h + s(a_z) * t(a_n)
    return (h_next,), (x, h, a_z, a_n)


def mingru_backward(p, grads, tape, dnext, act):
    (x, h, a_z, a_n), (dh_next,), (s, t) = tape, dnext, act
    da_z, da_n = dh_next * (t(a_n) - h) * s.slope(a_z), dh_next * s(a_z) * t.slope(a_n)
    return linear_backward(p, grads, "ih", x, join(da_z, da_n)), 0, (dh_next * (1 - s(a_z)),)


# Independently recurrent network: Li et al., "Independently recurrent neural network (IndRNN)", 2018


def indrnn(p, x, fed, state, act):
    (h,), (f,) = state, act
    # h' = f(W_ih x + b_ih + u h)
    a = linear(p, "ih", x) + p["weight_u"] * h
    return (f(a),), (x, h, a)


def indrnn_backward(p, grads, tape, dnext, act):
    (x, h, a), (dh_next,), (f,) = tape, dnext, act
    da = dh_next * f.slope(a)
    grads["weight_u"] += (da * h).sum(axis=0)
    return linear_backward(p, grads, "ih", x, da), 0, (da * p["weight_u"],)


# Simple recurrent unit: Lei et al., "Simple recurrent units for highly parallelizable recurrence", 2018


def sru(p, x, fed, state, act):
    (_, c), (s,), (v_f, v_r) = state, act, p["weight_c"]
    a_f, a_r, g, way = split(linear(p, "ih", x), 4)
    # f = s(a_f + v_f c),  r = s(a_r + v_r c)
    a_f, a_r = a_f + v_f * c, a_r + v_r * c
    # c' = f c + (1 - f) g
    c_next = s(a_f) * c + (1 - s(a_f)) * g
    # h' = r c' + (1 - r) way
    h_next = s(a_r) * c_next + (1 - s(a_r)) * way
    return (h_next, c_next), (x, c, a_f, a_r, g, way, c_next)


def sru_backward(p, grads, tape, dnext, act):
    (x, c, a_f, a_r, g, way, c_next), (dh_next, dc_next) = tape, dnext
    (s,), (v_f, v_r) = act, p["weight_c"]
    # h' = r c' + (1 - r) way
    da_r, dway = dh_next * (c_next - way) * s.slope(a_r), dh_next * (1 - s(a_r))
    dc_next = dc_next + dh_next * s(a_r)
    # c' = f c + (1 - f) g
    da_f, dg = dc_next * (c - g) * s.slope(a_f), dc_next * (1 - s(a_f))
    grads["weight_c"] += [(da_f * c).sum(axis=0), (da_r * c).sum(axis=0)]
    dc = dc_next * s(a_f) + da_f * v_f + da_r * v_r
    return linear_backward(p, grads, "ih", x, join(da_f, da_r, dg, dway)), 0, (0, dc)


# Long short-term memory with layer normalisation: Ba et al., "Layer normalization", 2016, equations 20 to 22


def normalise(v):
    # n = (v - mean) / sqrt(variance + 1e-5), each row by itself
    centred = v - v.mean(axis=1, keepdims=True)
    scale = 1 / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
    return centred * scale, scale


def normalise_backward(n, scale, dn):
    return scale * (dn - dn.mean(axis=1, keepdims=True) - n * (n * dn).mean(axis=1, keepdims=True))


def layernorm_lstm(p, x, fed, state, act):
    (_, c), (s, t, u) = state, act
    # a = gx norm(W_ih x) + gh norm(W_hh h) + b
    norms = normalise(linear(p, "ih", x)), normalise(linear(p, "hh", fed))
    a = sum(norm * p[f"weight_ln_{which}"].ravel() for which, (norm, _) in zip(("ih", "hh"), norms))
    a_i, a_f, a_g, a_o = split(a + p["bias_ln"].ravel(), 4)
    # c' = f c + i g,  h' = o u(gc norm(c') + bc)
    c_next = s(a_f) * c + s(a_i) * t(a_g)
    norms += (normalise(c_next),)
    a_h = p["weight_ln_c"] * norms[2][0] + p["bias_ln_c"]
    return (s(a_o) * u(a_h), c_next), (x, fed, c, a_i, a_f, a_g, a_o, a_h, norms)


def layernorm_lstm_backward(p, grads, tape, dnext, act):
    (x, fed, c, a_i, a_f, a_g, a_o, a_h, norms), (dh_next, dc_next), (s, t, u) = tape, dnext, act
    # h' = o u(a_h),  a_h = gc norm(c') + bc
    da_o, da_h = dh_next * u(a_h) * s.slope(a_o), dh_next * s(a_o) * u.slope(a_h)
    grads["weight_ln_c"] += (da_h * norms[2][0]).sum(axis=0)
    grads["bias_ln_c"] += da_h.sum(axis=0)
    dc_next = dc_next + normalise_backward(*norms[2], da_h * p["weight_ln_c"])
    # c' = f c + i g
    da_i, da_f = dc_next * t(a_g) * s.slope(a_i), dc_next * c * s.slope(a_f)
    da = join(da_i, da_f, dc_next * s(a_i) * t.slope(a_g), da_o)
    grads["bias_ln"] += da.sum(axis=0).reshape(4, -1)
    back = []
    for which, v, (norm, scale) in zip(("ih", "hh"), (x, fed), norms):
        gain = p[f"weight_ln_{which}"]
        grads[f"weight_ln_{which}"] += (da * norm).sum(axis=0).reshape(gain.shape)
        back.append(linear_backward(p, grads, which, v, normalise_backward(norm, scale, da * gain.ravel())))
    return *back, (0, dc_next * s(a_f))


# Continuous-time recurrent network: Funahashi and Nakamura, 1993; Beer, "On the dynamics of small continuous-time
# recurrent neural networks", 1995:  tau dv/dt = -v + a,  a = W_ih x + b_ih + W_hh y + b_hh,  y = s(v + theta)


def ctrnn_emit(p, state, act):
    (v,), (s,) = state, act
    return s(v + p["theta"])


def ctrnn_emit_backward(p, grads, state, dy, act):
    (v,), (s,) = state, act
    dv = dy * s.slope(v + p["theta"])
    grads["theta"] += dv.sum(axis=0)
    return dv


def ctrnn(p, x, fed, state, act, dt):
    # Euler: v' = v + dt / tau (a - v)
    (v,), tau = state, np.exp(p["log_tau"])
    a = linear(p, "ih", x) + linear(p, "hh", fed)
    return (v + dt / tau * (a - v),), (x, fed, v, a, dt)


def ctrnn_backward(p, grads, tape, dnext, act):
    (x, fed, v, a, dt), (dv_next,), tau = tape, dnext, np.exp(p["log_tau"])
    da = dv_next * dt / tau
    # d(dt / tau) / d(log tau) = -dt / tau
    grads["log_tau"] += (-da * (a - v)).sum(axis=0)
    return linear_backward(p, grads, "ih", x, da), linear_backward(p, grads, "hh", fed, da), (dv_next - da,)


def ctrnn_exponential(p, x, fed, state, act, dt):
    # The solution for a constant a: v' = a + (v - a) exp(-dt / tau)
    (v,), tau = state, np.exp(p["log_tau"])
    a = linear(p, "ih", x) + linear(p, "hh", fed)
    return (a + (v - a) * np.exp(-dt / tau),), (x, fed, v, a, dt)


def ctrnn_exponential_backward(p, grads, tape, dnext, act):
    (x, fed, v, a, dt), (dv_next,), tau = tape, dnext, np.exp(p["log_tau"])
    e = np.exp(-dt / tau)
    da = dv_next * (1 - e)
    # d exp(-dt / tau) / d(log tau) = exp(-dt / tau) dt / tau
    grads["log_tau"] += (dv_next * (v - a) * e * dt / tau).sum(axis=0)
    return linear_backward(p, grads, "ih", x, da), linear_backward(p, grads, "hh", fed, da), (dv_next * e,)


class Cell(NamedTuple):
    step: Callable
    step_backward: Callable
    gates: int  # blocks of H rows in weight_ih and weight_hh
    states: tuple = ("h",)  # arrays carried from step to step; the first is the output and what is fed back, ...
    activations: tuple = ("tanh",)
    clipped: int = 1  # how many of them are of pre-activations, which `clip` limits
    projection: str = "linear"  # the activation of the projection, if there is one
    emit: Callable | None = None  # ... unless it is computed from the states
    emit_backward: Callable | None = None


LSTM = {"states": ("h", "c"), "activations": ("sigmoid", "tanh", "tanh"), "clipped": 2}
GRU = {"activations": ("sigmoid", "tanh"), "clipped": 2}
CTRNN = {"states": ("v",), "activations": ("sigmoid",), "clipped": 0}
CTRNN |= {"emit": ctrnn_emit, "emit_backward": ctrnn_emit_backward}
CELLS = {
    "elman_tanh": Cell(elman, elman_backward, 1),
    "elman_relu": Cell(elman, elman_backward, 1, activations=("relu",)),
    "jordan": Cell(elman, elman_backward, 1, states=("y",), projection="tanh"),
    "lstm": Cell(lstm, lstm_backward, 4, **LSTM),
    "peephole_lstm": Cell(lstm, lstm_backward, 4, **LSTM),
    "coupled_lstm_input": Cell(coupled_input, coupled_input_backward, 3, **LSTM),
    "coupled_lstm_input_fo": Cell(coupled_input, coupled_input_backward, 3, **LSTM),
    "coupled_lstm_forget": Cell(coupled_forget, coupled_forget_backward, 3, **LSTM),
    "layernorm_lstm": Cell(layernorm_lstm, layernorm_lstm_backward, 4, **LSTM),
    "gru": Cell(gru, gru_backward, 3, **GRU),
    "gru_reset_before": Cell(gru_reset_before, gru_reset_before_backward, 3, **GRU),
    "ligru": Cell(ligru, ligru_backward, 2, activations=("sigmoid", "relu"), clipped=2),
    "mingru": Cell(mingru, mingru_backward, 2, activations=("sigmoid", "linear"), clipped=2),
    "indrnn": Cell(indrnn, indrnn_backward, 1, activations=("relu",)),
    "sru": Cell(sru, sru_backward, 4, states=("h", "c"), activations=("sigmoid",)),
    "ctrnn": Cell(ctrnn, ctrnn_backward, 1, **CTRNN),
    "ctrnn_exponential": Cell(ctrnn_exponential, ctrnn_exponential_backward, 1, **CTRNN),
}


# What happens around a step of any cell


NOTHING = MappingProxyType({})


class Options(NamedTuple):
    activations: Any = None  # for each of the cell's a name or (name, alpha, beta)
    projection: Any = None  # the same for the output layer weight_hr, where there is one
    clip: float = np.inf
    dt: Any = None  # for cells that want it: anything that broadcasts to (T, B, 1)
    masks: Any = NOTHING  # layer -> what its input is multiplied with: dropout, with the dice already thrown
    feedback_masks: Any = NOTHING  # row of the states -> what is fed back is multiplied with
    zoneout: Any = NOTHING  # row of the states -> for each state, 1 where it changes, (T, B, H); or the mean of that


def resolve(cell, options):
    """The activation functions of a cell and of its output layer."""
    names = cell.activations if options.activations is None else options.activations
    limits = [options.clip] * cell.clipped + [np.inf] * (len(names) - cell.clipped)
    act = [Activation(*([name] if isinstance(name, str) else name), limit=n) for name, n in zip(names, limits)]
    last = options.projection or cell.projection
    return act, Activation(*([last] if isinstance(last, str) else last))


def advance(cell, p, x, state, options, k, t):
    """One step at time t in row k of the states; returns `y, state, tape`."""
    act, last = resolve(cell, options)
    out = cell.emit(p, state, act) if cell.emit else state[0]
    fed = options.feedback_masks.get(k, 1) * out
    given = () if options.dt is None else (options.dt[t],)
    inner, tape = cell.step(p, x, fed, state, act, *given)
    # Zoneout: s' = s + m (s' - s)
    m = [at(mask, t) for mask in options.zoneout.get(k, [1] * len(inner))]
    # y = g(W_hr h + b_hr)
    a = linear(p, "hr", inner[0]) if "weight_hr" in p else None
    after = list(inner) if a is None else [last(a), *inner[1:]]
    after = tuple(s + one * (new - s) if np.any(one != 1) else new for s, one, new in zip(state, m, after))
    y = cell.emit(p, after, act) if cell.emit else after[0]
    return y, after, (state, inner, tape, m, a, after)


def advance_backward(cell, p, grads, tape, dy, dafter, options, k):
    """From `dy` and the gradients of the states after a step; returns `dx, dstate`."""
    act, last = resolve(cell, options)
    state, inner, tape, m, a, after = tape
    dafter = list(dafter)
    dafter[0] = dafter[0] + (cell.emit_backward(p, grads, after, dy, act) if cell.emit else dy)
    dinner, dstate = [d * one for d, one in zip(dafter, m)], [d * (1 - one) for d, one in zip(dafter, m)]
    if a is not None:
        dinner[0] = linear_backward(p, grads, "hr", inner[0], dinner[0] * last.slope(a))
    dx, dfed, dprev = cell.step_backward(p, grads, tape, dinner, act)
    dstate = [d + more for d, more in zip(dstate, dprev)]
    dout = dfed * options.feedback_masks.get(k, 1)
    dstate[0] = dstate[0] + (cell.emit_backward(p, grads, state, dout, act) if cell.emit else dout)
    return dx, tuple(dstate)


def at(mask, t):
    return mask if np.ndim(mask) == 0 else mask[t]


# Layers: a step in loops over layers, directions and time


def forward(cell, params, x, state=None, num_layers=1, bidirectional=False, **options):
    """Run a stack of layers over a sequence and return `y, state_n`.

    `x` is (T, B, I), or integer (T, B) for tokens. A state is an array (num_layers * directions, B, H), or a tuple of
    them where the cell has several; None is zeros, or what `params` holds as ``h_0_l0`` and so on. A bias that is
    missing from `params` is no bias. For `options` see `Options`.
    """
    y, state_n, _ = run(CELLS[cell], float64(params), x, state, num_layers, bidirectional, Options(**options))
    return y, state_n


def backward(cell, params, x, dy, dstate_n=None, state=None, num_layers=1, bidirectional=False, **options):
    """Back-propagate `dy` and `dstate_n` through `forward` and return `dx, dstate0, grads`.

    `dstate_n` and `dstate0` look like `state`, and None is zeros. `dx` is None for tokens.
    """
    cell, params, options = CELLS[cell], float64(params), Options(**options)
    _, _, tapes = run(cell, params, x, state, num_layers, bidirectional, options)
    grads = {name: np.zeros_like(value) for name, value in params.items()}
    learnt, tokens, x, dy = state is None, is_tokens(x), as_input(params, x), np.asarray(dy, np.float64)
    dstate = unpack(cell, params, dstate_n, x.shape[1], num_layers * (1 + bidirectional))

    for layer in reversed(range(num_layers)):
        dx = 0
        for k, suffix, order in directions(layer, len(x), bidirectional):
            p, g = of_layer(params, suffix), of_layer(grads, suffix)
            side = np.split(dy, 1 + bidirectional, axis=2)[k % (1 + bidirectional)]
            dx_side = np.zeros((*dy.shape[:2], p["weight_ih"].shape[1]))
            ds = take(dstate, k)
            for t in reversed(order):
                dx_side[t], ds = advance_backward(cell, p, g, tapes[k][t], side[t], ds, options, k)
            put(dstate, k, ds)
            for name, d in zip(cell.states, ds):
                if learnt and f"{name}_0" in g:
                    g[f"{name}_0"] += d.sum(axis=0)
            dx = dx + dx_side
        dy = dx * options.masks.get(layer, 1)
    return None if tokens else dy, pack(dstate), grads


def run(cell, params, x, state, num_layers, bidirectional, options):
    """The forward pass; returns `y, state_n, tapes`, with `tapes[k][t]` for step t of layer and direction k."""
    x, learnt = as_input(params, x), state is None
    state = unpack(cell, params, state, x.shape[1], num_layers * (1 + bidirectional))
    if options.dt is not None:
        options = options._replace(dt=np.broadcast_to(options.dt, (*x.shape[:2], 1)))
    tapes = {}
    for layer in range(num_layers):
        x = x * options.masks.get(layer, 1)
        sides = []
        for k, suffix, order in directions(layer, len(x), bidirectional):
            p, tapes[k] = of_layer(params, suffix), {}
            for name, array in zip(cell.states, state):
                if learnt and f"{name}_0" in p:
                    array[k] = p[f"{name}_0"]
            s = take(state, k)
            y = np.zeros((*x.shape[:2], s[0].shape[1]))
            for t in order:
                y[t], s, tapes[k][t] = advance(cell, p, x[t], s, options, k, t)
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
        H = len(params["weight_ih_l0"]) // cell.gates
        widths = [len(params.get("weight_hr_l0", range(H))), *[H] * (len(cell.states) - 1)]
        return [np.zeros((rows, B, width)) for width in widths]
    return [np.array(a, np.float64) for a in (state if len(cell.states) > 1 else [state])]


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
