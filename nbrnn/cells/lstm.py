"""The LSTM with forget gates.

    i = s(W_ii x + b_ii + W_hi h + b_hi)        input gate
    f = s(W_if x + b_if + W_hf h + b_hf)        forget gate
    g = t(W_ig x + b_ig + W_hg h + b_hg)        candidate
    o = s(W_io x + b_io + W_ho h + b_ho)        output gate
    c' = f c + i g
    h' = o u(c')                                s: sigmoid, t and u: tanh

S. Hochreiter and J. Schmidhuber, Long Short-Term Memory, Neural Computation 9 (1997); the forget gate: F. A. Gers,
J. Schmidhuber and F. Cummins, Learning to Forget, Neural Computation 12 (2000).
"""

from nbrnn.cells.cell import Cell, register


def forward(gates, prev, own, act):
    a_i, a_f, a_g, a_o = gates
    _, c_prev = prev
    s, t, u = act
    i, f, g, o = s(a_i), s(a_f), t(a_g), s(a_o)
    c = f * c_prev + i * g
    h = o * u(c)
    return (h, c), (i, f, g, o)


def backward(dnew, kept, prev, new, own, act):
    dh, dc = dnew
    i, f, g, o = kept
    _, c_prev = prev
    _, c = new
    s, t, u = act
    # h = o u(c)
    u_c = u(c)
    do = dh * u_c
    dc = dc + dh * o * u.slope(u_c)
    # c = f c_prev + i g
    di, df, dg = dc * g, dc * c_prev, dc * i
    # i, f, o = s(a), g = t(a)
    dgates = di * s.slope(i), df * s.slope(f), dg * t.slope(g), do * s.slope(o)
    return dgates, (0.0, dc * f)


LSTM = register(
    Cell("lstm", ("i", "f", "g", "o"), ("h", "c"), forward, backward, activations=("sigmoid", "tanh", "tanh"), inside=1)
)
