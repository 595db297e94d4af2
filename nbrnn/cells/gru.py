"""The gated recurrent unit whose reset gate acts after the recurrent product (linear before reset).

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)        reset gate
    z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)        update gate
    n = tanh   (W_in x + b_in + r (W_hn h + b_hn))    candidate
    h' = (1 - z) n + z h

K. Cho et al., Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation (2014);
this form, which keeps all products in front of the gates: J. Appleyard, T. Kocisky and P. Blunsom, Optimizing
Performance of Recurrent Neural Networks on GPUs (2016), and cuDNN.
"""

from nbrnn.cells.cell import Cell, register
from nbrnn.kernels.activations import sigmoid, tanh
from nbrnn.kernels.jit import jitable


@jitable
def forward(gates, prev):
    # a_n is the candidate's pre-activation from the input, m the one from the recurrence
    a_n, a_r, a_z, m = gates
    (h_prev,) = prev
    r, z = sigmoid(a_r), sigmoid(a_z)
    n = tanh(a_n + r * m)
    h = n + z * (h_prev - n)
    return (h,), (n, r, z, m)


@jitable
def backward(dnew, kept, prev, new):
    (dh,) = dnew
    n, r, z, m = kept
    (h_prev,) = prev
    # h = (1 - z) n + z h_prev
    dz, dn = dh * (h_prev - n), dh * (1.0 - z)
    # n = tanh(a_n + r m)
    da_n = dn * (1.0 - n * n)
    dr, dm = da_n * m, da_n * r
    # r, z = sigmoid(a)
    dgates = da_n, dr * r * (1.0 - r), dz * z * (1.0 - z), dm
    return dgates, (dh * z,)


GRU = register(Cell("gru", ("r", "z", "n"), ("h",), forward, backward, separate=("n",)))
