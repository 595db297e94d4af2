"""The light GRU: no reset gate, and a candidate that is not bounded.

    z  = s(W_iz x + b_iz + W_hz h + b_hz)
    n  = t(W_in x + b_in + W_hn h + b_hn)
    h' = z h + (1 - z) n        s: sigmoid, t: relu

M. Ravanelli et al., Light Gated Recurrent Units for Speech Recognition, IEEE TETCI 2 (2018), without its batch
normalisation of W x.
"""

from nbrnn.cells.cell import Cell, register


def forward(gates, prev, own, act):
    (a_z, a_n), (h_prev,), (s, t) = gates, prev, act
    z, n = s(a_z), t(a_n)
    return (n + z * (h_prev - n),), (z, n)


def backward(dnew, kept, prev, new, own, act):
    (dh,), (z, n), (h_prev,), (s, t) = dnew, kept, prev, act
    # h = z h_prev + (1 - z) n
    dz, dn = dh * (h_prev - n), dh * (1.0 - z)
    # z = s(a), n = t(a)
    return (dz * s.slope(z), dn * t.slope(n)), (dh * z,)


LIGRU = register(Cell("ligru", ("z", "n"), ("h",), forward, backward, activations=("sigmoid", "relu")))
