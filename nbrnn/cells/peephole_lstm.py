"""The LSTM whose gates look at the cell state.

    i = s(W_ii x + b_ii + W_hi h + b_hi + p_i c)
    f = s(W_if x + b_if + W_hf h + b_hf + p_f c)
    g = t(W_ig x + b_ig + W_hg h + b_hg)
    c' = f c + i g
    o = s(W_io x + b_io + W_ho h + b_ho + p_o c')        the output gate sees the new state
    h' = o u(c')                                         s: sigmoid, t and u: tanh

F. A. Gers and J. Schmidhuber, Recurrent Nets that Time and Count, IJCNN (2000). Any of the three peepholes may be
missing; the parameter `weight_ch` keeps its rows i, f, o, and those without a peephole count for nothing.
"""

from functools import cache

from nbrnn.cells.cell import Cell, Own, register

PEEPHOLES = Own("weight_ch", rows=3)


def forward(looks, gates, prev, own, act):
    a_i, a_f, a_g, a_o = gates
    (_, c_prev), (p_i, p_f, p_o), (s, t, u) = prev, own, act
    i = s(a_i + p_i * c_prev if "i" in looks else a_i)
    f = s(a_f + p_f * c_prev if "f" in looks else a_f)
    g = t(a_g)
    c = f * c_prev + i * g
    o = s(a_o + p_o * c if "o" in looks else a_o)
    h = o * u(c)
    return (h, c), (i, f, g, o)


def backward(looks, dnew, kept, prev, new, own, act):
    (dh, dc), (i, f, g, o), (_, c_prev), (_, c) = dnew, kept, prev, new
    (p_i, p_f, p_o), (s, t, u) = own, act
    # h = o u(c)
    u_c = u(c)
    da_o = dh * u_c * s.slope(o)
    dc = dc + dh * o * u.slope(u_c)
    # o = s(a_o + p_o c)
    dc, dp_o = (dc + da_o * p_o, da_o * c) if "o" in looks else (dc, 0.0)
    # c = f c_prev + i g
    da_i, da_f, da_g = dc * g * s.slope(i), dc * c_prev * s.slope(f), dc * i * t.slope(g)
    dc_prev = dc * f
    # i = s(a_i + p_i c_prev), f = s(a_f + p_f c_prev)
    dc_prev, dp_i = (dc_prev + da_i * p_i, da_i * c_prev) if "i" in looks else (dc_prev, 0.0)
    dc_prev, dp_f = (dc_prev + da_f * p_f, da_f * c_prev) if "f" in looks else (dc_prev, 0.0)
    return (da_i, da_f, da_g, da_o), (0.0, dc_prev), (dp_i, dp_f, dp_o)


@cache
def peephole_lstm(looks: str = "ifo") -> Cell:
    """The cell with peepholes for the gates in `looks`."""

    def forward_(gates, prev, own, act):
        return forward(looks, gates, prev, own, act)

    def backward_(dnew, kept, prev, new, own, act):
        return backward(looks, dnew, kept, prev, new, own, act)

    return Cell(
        "peephole_lstm" if looks == "ifo" else f"peephole_lstm_{looks}", ("i", "f", "g", "o"), ("h", "c"), forward_,
        backward_, own=(PEEPHOLES,), activations=("sigmoid", "tanh", "tanh"), inside=1,
    )  # fmt: skip


PEEPHOLE_LSTM = register(peephole_lstm())
