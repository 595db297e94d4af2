"""The LSTM whose input and forget gates are one (CIFG): what is forgotten makes room for what is taken in.

    f = s(W_if x + b_if + W_hf h + b_hf + p_f c)         couple="input": i = 1 - f
    i = s(W_ii x + b_ii + W_hi h + b_hi + p_i c)         couple="forget": f = 1 - i
    g = t(W_ig x + b_ig + W_hg h + b_hg)
    c' = f c + i g
    o = s(W_io x + b_io + W_ho h + b_ho + p_o c')
    h' = o u(c')                                         s: sigmoid, t and u: tanh

K. Greff et al., LSTM: A Search Space Odyssey, IEEE TNNLS 28 (2017). Peepholes as in `peephole_lstm`, for any of the two
gates that there are.
"""

from functools import cache

from nbrnn.cells.cell import Cell, Own, register

PEEPHOLES = Own("weight_ch", rows=3)


def forward(couple, looks, gates, prev, own, act):
    a_m, a_g, a_o = gates  # m: the gate that is left, f or i
    (_, c_prev), (s, t, u) = prev, act
    p_m, p_o = _peepholes(couple, looks, own)
    m = s(a_m + p_m * c_prev if p_m is not None else a_m)
    g = t(a_g)
    c = g + m * (c_prev - g) if couple == "input" else c_prev + m * (g - c_prev)
    o = s(a_o + p_o * c if p_o is not None else a_o)
    h = o * u(c)
    return (h, c), (m, g, o)


def backward(couple, looks, dnew, kept, prev, new, own, act):
    (dh, dc), (m, g, o), (_, c_prev), (_, c), (s, t, u) = dnew, kept, prev, new, act
    p_m, p_o = _peepholes(couple, looks, own)
    # h = o u(c)
    u_c = u(c)
    da_o = dh * u_c * s.slope(o)
    dc = dc + dh * o * u.slope(u_c)
    # o = s(a_o + p_o c)
    dc, dp_o = (dc + da_o * p_o, da_o * c) if p_o is not None else (dc, 0.0)
    if couple == "input":
        # c = m c_prev + (1 - m) g
        dm, dg, dc_prev = dc * (c_prev - g), dc * (1.0 - m), dc * m
    else:
        # c = (1 - m) c_prev + m g
        dm, dg, dc_prev = dc * (g - c_prev), dc * m, dc * (1.0 - m)
    # m = s(a_m + p_m c_prev)
    da_m = dm * s.slope(m)
    dc_prev, dp_m = (dc_prev + da_m * p_m, da_m * c_prev) if p_m is not None else (dc_prev, 0.0)
    down = (0.0, dp_m, dp_o) if couple == "input" else (dp_m, 0.0, dp_o)
    return (da_m, dg * t.slope(g), da_o), (0.0, dc_prev), down[: len(own)]


def _peepholes(couple, looks, own):
    """The peephole weights of the gate that is left and of the output gate, None where there is none."""
    if not own:
        return None, None
    p_i, p_f, p_o = own
    gate, p_m = ("f", p_f) if couple == "input" else ("i", p_i)
    return p_m if gate in looks else None, p_o if "o" in looks else None


@cache
def coupled_lstm(couple: str = "input", looks: str = "") -> Cell:
    """The cell in one of its two forms, with peepholes for the gates in `looks`."""

    def forward_(gates, prev, own, act):
        return forward(couple, looks, gates, prev, own, act)

    def backward_(dnew, kept, prev, new, own, act):
        return backward(couple, looks, dnew, kept, prev, new, own, act)

    return Cell(
        "_".join(filter(None, ["coupled_lstm", couple, looks])), ("f" if couple == "input" else "i", "g", "o"),
        ("h", "c"), forward_, backward_, own=(PEEPHOLES,) if looks else (), activations=("sigmoid", "tanh", "tanh"),
        inside=1,
    )  # fmt: skip


COUPLED_INPUT = register(coupled_lstm("input"))
COUPLED_FORGET = register(coupled_lstm("forget"))
COUPLED_PEEPHOLE = register(coupled_lstm("input", "fo"))
