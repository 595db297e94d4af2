"""The simple recurrent network.

    h' = f(W_ih x + b_ih + W_hh h + b_hh)        f: tanh or relu

J. L. Elman, Finding Structure in Time, Cognitive Science 14 (1990); relu: Q. V. Le, N. Jaitly and G. E. Hinton, A
Simple Way to Initialize Recurrent Networks of Rectified Linear Units (2015).
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


ELMAN_TANH = register(Cell("elman_tanh", ("h",), ("h",), forward, backward, activations=("tanh",)))
ELMAN_RELU = register(Cell("elman_relu", ("h",), ("h",), forward, backward, activations=("relu",)))
