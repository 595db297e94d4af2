"""The simple recurrent unit: gates that see the cell state of their own unit, and a way around for the input.

    f  = s(W_f x + b_f + v_f c)
    r  = s(W_r x + b_r + v_r c)
    c' = f c + (1 - f) (W_g x + b_g)
    h' = r c' + (1 - r) (W_x x + b_x)        s: sigmoid

All products are those of the input. T. Lei et al., Simple Recurrent Units for Highly Parallelizable Recurrence, EMNLP
(2018); the way around always has weights, as there where the sizes of input and state differ.
"""

from nbrnn.cells.cell import Cell, Own, register


def forward(gates, prev, own, act):
    a_f, a_r, g, x = gates
    (_, c_prev), (v_f, v_r), (s,) = prev, own, act
    f, r = s(a_f + v_f * c_prev), s(a_r + v_r * c_prev)
    c = g + f * (c_prev - g)
    h = x + r * (c - x)
    return (h, c), (f, r, g, x)


def backward(dnew, kept, prev, new, own, act):
    (dh, dc), (f, r, g, x), (_, c_prev), (_, c) = dnew, kept, prev, new
    (v_f, v_r), (s,) = own, act
    # h = r c + (1 - r) x
    dr, dx, dc = dh * (c - x), dh * (1.0 - r), dc + dh * r
    # c = f c_prev + (1 - f) g
    df, dg = dc * (c_prev - g), dc * (1.0 - f)
    # f, r = s(a + v c_prev)
    da_f, da_r = df * s.slope(f), dr * s.slope(r)
    dc_prev = dc * f + da_f * v_f + da_r * v_r
    return (da_f, da_r, dg, dx), (0.0, dc_prev), (da_f * c_prev, da_r * c_prev)


SRU = register(
    Cell(
        "sru", ("f", "r", "g", "x"), ("h", "c"), forward, backward, feedback=False, own=(Own("weight_c", rows=2),),
        activations=("sigmoid",),
    )
)  # fmt: skip
