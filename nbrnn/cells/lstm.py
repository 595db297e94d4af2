"""The LSTM with forget gates.

    i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)        input gate
    f = sigmoid(W_if x + b_if + W_hf h + b_hf)        forget gate
    g = tanh   (W_ig x + b_ig + W_hg h + b_hg)        candidate
    o = sigmoid(W_io x + b_io + W_ho h + b_ho)        output gate
    c' = f c + i g
    h' = o tanh(c')

S. Hochreiter and J. Schmidhuber, Long Short-Term Memory, Neural Computation 9 (1997); the forget gate: F. A. Gers,
J. Schmidhuber and F. Cummins, Learning to Forget, Neural Computation 12 (2000).
"""

from nbrnn.cells.cell import Cell, register
from nbrnn.kernels.activations import sigmoid, tanh
from nbrnn.kernels.jit import jitable


@jitable
def forward(gates, prev):
    a_i, a_f, a_g, a_o = gates
    _, c_prev = prev
    i, f, g, o = sigmoid(a_i), sigmoid(a_f), tanh(a_g), sigmoid(a_o)
    c = f * c_prev + i * g
    h = o * tanh(c)
    return (h, c), (i, f, g, o)


@jitable
def backward(dnew, kept, prev, new):
    dh, dc = dnew
    i, f, g, o = kept
    _, c_prev = prev
    _, c = new
    # h = o tanh(c): computed again, which is cheaper than to keep it
    tanh_c = tanh(c)
    do = dh * tanh_c
    dc = dc + dh * o * (1.0 - tanh_c * tanh_c)
    # c = f c_prev + i g
    di, df, dg = dc * g, dc * c_prev, dc * i
    # i, f, o = sigmoid(a), g = tanh(a)
    dgates = di * i * (1.0 - i), df * f * (1.0 - f), dg * (1.0 - g * g), do * o * (1.0 - o)
    return dgates, (0.0, dc * f)


LSTM = register(Cell("lstm", ("i", "f", "g", "o"), ("h", "c"), forward, backward))
