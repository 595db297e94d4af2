"""The Jordan network: what is fed back is the output, whose layer lies inside the loop.

    h  = f(W_ih x + b_ih + W_hh y + b_hh)        y: the output of the step before
    y' = g(W_hr h + b_hr)                        f, g: tanh

M. I. Jordan, Serial Order: A Parallel Distributed Processing Approach, ICS Report 8604 (1986), without the decaying
memory of its state units.
"""

from nbrnn.cells.cell import Cell, register


def forward(gates, prev, own, act):
    (a,), (f,) = gates, act
    return (f(a),), ()


def backward(dnew, kept, prev, new, own, act):
    (dh,), (h,), (f,) = dnew, new, act
    # h = f(a)
    da = dh * f.slope(h)
    return (da,), (0.0,)


JORDAN = register(Cell("jordan", ("h",), ("y",), forward, backward, activations=("tanh",), projection="tanh"))
