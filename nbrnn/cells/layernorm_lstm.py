"""The LSTM with layer normalisation.

    a = gx norm(W_ih x) + gh norm(W_hh h) + b          the four gates together: one mean and deviation a row
    i, f, o = s(a_i), s(a_f), s(a_o)
    g = t(a_g)
    c' = f c + i g
    h' = o u(gc norm(c') + bc)                         s: sigmoid, t and u: tanh

norm(v) = (v - mean of v) / sqrt(variance of v + 1e-5). J. L. Ba, J. R. Kiros and G. E. Hinton, Layer Normalization
(2016), equations 20 to 22.
"""

from nbrnn.cells.cell import Cell, Own, register


def gates_of(normals, own):
    """The pre-activations a, from those of the input and of the recurrence, normalised."""
    gx, gh, b = own[0:4], own[4:8], own[8:12]
    return [gx[n] * normals[n] + gh[n] * normals[4 + n] + b[n] for n in range(4)]


def forward(normals, prev, own, act):
    a_i, a_f, a_g, _ = gates_of(normals, own)
    (_, c_prev), (s, t, _) = prev, act
    c = s(a_f) * c_prev + s(a_i) * t(a_g)
    return (c,)


def finish(normal_c, normals, new, own, act):
    _, _, _, a_o = gates_of(normals, own)
    (gc, bc), (s, _, u) = own[12:], act
    return s(a_o) * u(gc * normal_c + bc)


GATES = ("i", "f", "g", "o")
OWN = (
    Own("weight_ln_ih", rows=4, first=1.0), Own("weight_ln_hh", rows=4, first=1.0), Own("bias_ln", rows=4, first=0.0),
    Own("weight_ln_c", first=1.0), Own("bias_ln_c", first=0.0),
)  # fmt: skip
LAYERNORM_LSTM = register(
    Cell(
        "layernorm_lstm", GATES, ("h", "c"), forward, separate=GATES, own=OWN,
        activations=("sigmoid", "tanh", "tanh"), inside=1, norms=2, finish=finish, biased=False,
    )
)  # fmt: skip
