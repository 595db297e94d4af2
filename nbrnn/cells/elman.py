"""The simple recurrent network, with tanh or relu.

    h' = f(W_ih x + b_ih + W_hh h + b_hh)

J. L. Elman, Finding Structure in Time, Cognitive Science 14 (1990); relu: Q. V. Le, N. Jaitly and G. E. Hinton, A
Simple Way to Initialize Recurrent Networks of Rectified Linear Units (2015).
"""

from nbrnn.cells.cell import Cell, register
from nbrnn.kernels.activations import relu, tanh
from nbrnn.kernels.jit import jitable
from nbrnn.kernels.simd import where_less


@jitable
def forward_tanh(gates, prev):
    (a,) = gates
    return (tanh(a),), ()


@jitable
def backward_tanh(dnew, kept, prev, new):
    (dh,), (h,) = dnew, new
    # h = tanh(a)
    da = dh * (1.0 - h * h)
    return (da,), (0.0,)


@jitable
def forward_relu(gates, prev):
    (a,) = gates
    return (relu(a),), ()


@jitable
def backward_relu(dnew, kept, prev, new):
    (dh,), (h,) = dnew, new
    # h = max(a, 0)
    da = where_less(0.0, h, dh, 0.0 * h)  # 0 times h, so that a NaN is not hidden
    return (da,), (0.0,)


ELMAN_TANH = register(Cell("elman_tanh", ("h",), ("h",), forward_tanh, backward_tanh))
ELMAN_RELU = register(Cell("elman_relu", ("h",), ("h",), forward_relu, backward_relu))
