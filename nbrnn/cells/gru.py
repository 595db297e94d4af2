"""The gated recurrent unit, with its reset gate behind or in front of the recurrent product.

    r = s(W_ir x + b_ir + W_hr h + b_hr)        reset gate
    z = s(W_iz x + b_iz + W_hz h + b_hz)        update gate
    n = t(W_in x + b_in + r (W_hn h + b_hn))    candidate, reset after the product
    n = t(W_in x + b_in + W_hn (r h) + b_hn)    candidate, reset before the product
    h' = (1 - z) n + z h                        s: sigmoid, t: tanh

Before: K. Cho et al., Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation
(2014). After, which keeps all products in front of the gates: J. Appleyard, T. Kocisky and P. Blunsom, Optimizing
Performance of Recurrent Neural Networks on GPUs (2016), and cuDNN.
"""

from nbrnn.cells.cell import Cell, register


def forward(gates, prev, own, act):
    # a_n is the candidate's pre-activation from the input, m the one from the recurrence
    a_n, a_r, a_z, m = gates
    (h_prev,), (s, t) = prev, act
    r, z = s(a_r), s(a_z)
    n = t(a_n + r * m)
    h = n + z * (h_prev - n)
    return (h,), (n, r, z, m)


def backward(dnew, kept, prev, new, own, act):
    (dh,), (h_prev,), (s, t) = dnew, prev, act
    n, r, z, m = kept
    # h = (1 - z) n + z h_prev
    dz, dn = dh * (h_prev - n), dh * (1.0 - z)
    # n = t(a_n + r m)
    da_n = dn * t.slope(n)
    dr, dm = da_n * m, da_n * r
    # r, z = s(a)
    dgates = da_n, dr * s.slope(r), dz * s.slope(z), dm
    return dgates, (dh * z,)


def operand(gates, prev, own, act):
    (a_r, _), (h_prev,), (s, _) = gates, prev, act
    return s(a_r) * h_prev


def forward_reset_before(gates, prev, own, act):
    _, a_z, a_n = gates
    (h_prev,), (s, t) = prev, act
    z, n = s(a_z), t(a_n)
    h = n + z * (h_prev - n)
    return (h,), (z, n)


def backward_reset_before(dnew, kept, prev, new, own, act):
    (dh,), (h_prev,), (s, t) = dnew, prev, act
    z, n = kept
    # h = (1 - z) n + z h_prev
    dz, dn = dh * (h_prev - n), dh * (1.0 - z)
    # z = s(a), n = t(a); r gets its gradient from the operand alone
    return (0.0, dz * s.slope(z), dn * t.slope(n)), (dh * z,)


GATES, ACTIVATIONS = ("r", "z", "n"), ("sigmoid", "tanh")
GRU = register(Cell("gru", GATES, ("h",), forward, backward, separate=("n",), activations=ACTIVATIONS))
GRU_RESET_BEFORE = register(
    Cell(
        "gru_reset_before", GATES, ("h",), forward_reset_before, backward_reset_before, second=("n",), operand=operand,
        activations=ACTIVATIONS,
    )
)  # fmt: skip
