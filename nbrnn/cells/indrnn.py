"""The independently recurrent network: each hidden unit remembers nothing but itself.

    h' = f(W_ih x + b_ih + u h)        f: relu

There is no recurrent product, so that a step costs a few operations a unit. S. Li et al., Independently Recurrent
Neural Network (IndRNN): Building a Longer and Deeper RNN, CVPR (2018).
"""

from nbrnn.cells.cell import Cell, Own, register


def forward(gates, prev, own, act):
    (a,), (h_prev,), (u,), (f,) = gates, prev, own, act
    return (f(a + u * h_prev),), ()


def backward(dnew, kept, prev, new, own, act):
    (dh,), (h_prev,), (h,), (u,), (f,) = dnew, prev, new, own, act
    # h = f(a + u h_prev)
    da = dh * f.slope(h)
    return (da,), (da * u,), (da * h_prev,)


INDRNN = register(
    Cell(
        "indrnn", ("h",), ("h",), forward, backward, feedback=False, own=(Own("weight_u"),), activations=("relu",),
    )
)  # fmt: skip
