"""The continuous-time recurrent network, integrated over steps of the length dt.

    tau dv/dt = -v + W_ih x + b_ih + W_hh y + b_hh        y = s(v + theta), s: sigmoid

    Euler          v' = v + dt / tau (a - v)              a: the right side without -v, constant over the step
    exponential    v' = a + (v - a) exp(-dt / tau)        exact for a constant a, stable for every dt

The output, which is also what is fed back, is y; the state is v. tau = exp(log_tau) stays positive. The Euler step
needs dt < 2 tau.

K. Funahashi and Y. Nakamura, Approximation of Dynamical Systems by Continuous Time Recurrent Neural Networks, Neural
Networks 6 (1993); R. D. Beer, On the Dynamics of Small Continuous-Time Recurrent Neural Networks, Adaptive Behavior 3
(1995).
"""

from nbrnn.cells.cell import Cell, Own, register
from nbrnn.cells.equations import exp


def emission(states, own, act):
    (v,), (_, theta), (s,) = states, own, act
    return s(v + theta)


def forward_euler(gates, prev, own, act, given):
    (a,), (v,), (rate, _), (dt,) = gates, prev, own, given
    k, d = dt * rate, a - v
    return (v + k * d,), (k, d)


def backward_euler(dnew, kept, prev, new, own, act, given):
    (dv,), (k, d), (dt,) = dnew, kept, given
    # v = v_prev + k d, k = dt rate, d = a - v_prev
    da, drate = dv * k, dv * d * dt
    return (da,), (dv - da,), (drate, 0.0)


def forward_exponential(gates, prev, own, act, given):
    (a,), (v,), (rate, _), (dt,) = gates, prev, own, given
    e, d = exp(-(dt * rate)), v - a
    return (a + d * e,), (e, d)


def backward_exponential(dnew, kept, prev, new, own, act, given):
    (dv,), (e, d), (dt,) = dnew, kept, given
    # v = a + d e, e = exp(-dt rate), d = v_prev - a
    dv_prev, drate = dv * e, -(dv * d * e * dt)
    return (dv - dv_prev,), (dv_prev,), (drate, 0.0)


# The equations take the rate 1 / tau, for which nothing has to be divided.
OWN = Own("log_tau", first=0.0, exponent=-1.0), Own("theta", first=0.0)
CTRNN = register(
    Cell(
        "ctrnn", ("v",), ("v",), forward_euler, backward_euler, emission=emission, own=OWN, activations=("sigmoid",),
        inside=1, given=("dt",),
    )
)  # fmt: skip
CTRNN_EXPONENTIAL = register(
    Cell(
        "ctrnn_exponential", ("v",), ("v",), forward_exponential, backward_exponential, emission=emission, own=OWN,
        activations=("sigmoid",), inside=1, given=("dt",),
    )
)  # fmt: skip
