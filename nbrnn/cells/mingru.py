"""The minimal GRU, whose gate and candidate do not see h: the recurrence is linear in time.

    z  = s(W_iz x + b_iz)
    n  = t(W_in x + b_in)
    h' = (1 - z) h + z n        s: sigmoid, t: linear

All products are those of the input, over all time steps at once. L. Feng et al., Were RNNs All We Needed? (2024).
"""

from nbrnn.cells.cell import Cell, register


def forward(gates, prev, own, act):
    (a_z, a_n), (h_prev,), (s, t) = gates, prev, act
    z, n = s(a_z), t(a_n)
    return (h_prev + z * (n - h_prev),), (z, n)


def backward(dnew, kept, prev, new, own, act):
    (dh,), (z, n), (h_prev,), (s, t) = dnew, kept, prev, act
    # h = (1 - z) h_prev + z n
    dz, dn = dh * (n - h_prev), dh * z
    # z = s(a), n = t(a)
    return (dz * s.slope(z), dn * t.slope(n)), (dh * (1.0 - z),)


MINGRU = register(
    Cell("mingru", ("z", "n"), ("h",), forward, backward, feedback=False, activations=("sigmoid", "linear"))
)
