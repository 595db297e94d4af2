"""A recurrent cell of your own: write its equations, train it, and have its gradients checked.

    python examples/own_cell.py

The update gate RNN of J. Collins, J. Sohl-Dickstein and D. Sussillo, Capacity and Trainability in Recurrent Neural
Networks (2017), is not among the cells of nbrnn. Its equations, as the paper has them:

    g  = s(W_gx x + W_gh h + b_g)        update gate
    c  = t(W_cx x + W_ch h + b_c)        candidate
    h' = g h + (1 - g) c                 s: sigmoid, t: tanh

They are all there is to write. nbrnn makes the backward pass from them, and compiles both into its loop over time.
"""

import numpy as np

import nbrnn


def forward(gates, prev, own, act):
    """One hidden unit, one time step: from pre-activations and old states to new states."""
    a_g, a_c = gates  # the products with x and h and the biases are in them already
    (h,), (s, t) = prev, act
    g, c = s(a_g), t(a_c)
    return (g * h + (1.0 - g) * c,)


CELL = nbrnn.Cell("ugrnn", ("g", "c"), ("h",), forward, activations=("sigmoid", "tanh"))


def sample_and_hold(rng, T=40, B=32):
    """x (T, B, 2): numbers, and marks at one step in eight. Target: the number that was marked last, 0 before any."""
    numbers, marks = rng.uniform(-1, 1, (T, B)), rng.random((T, B)) < 1 / 8
    target, held = np.empty((T, B, 1), "float32"), np.zeros(B)
    for t in range(T):
        held = np.where(marks[t], numbers[t], held)
        target[t, :, 0] = held
    return np.stack([numbers, marks], axis=2).astype("float32"), target


report = nbrnn.check_cell(CELL)  # gradients against finite differences; raises an error where they are wrong
print(report)

layer = nbrnn.Recurrent(CELL, 2, 24, seed=0)
model = nbrnn.Sequential(layer, nbrnn.Linear(24, 1, seed=1))
trainer = nbrnn.Trainer(model, nbrnn.MSE(), nbrnn.Adam(0.01), clip_norm=1.0)
rng = np.random.default_rng(0)

print("\nsample and hold: put out the last number that was marked\n")
print("updates   mean squared error")
for step in range(501):
    if step in (0, 50, 100, 200, 500):
        # unseen sequences; who puts out 0 all the time would have about 0.3
        print(f"{step:7}   {trainer.evaluate([sample_and_hold(rng) for _ in range(10)]):18.4f}")
    trainer.step(*sample_and_hold(rng))

x, target = sample_and_hold(rng, T=11, B=1)
y, _ = model(x)
print("\nnumber  " + "".join(f"{v:6.2f}" for v in x[:, 0, 0]))
print("marked  " + "".join(f"{'*' if v else '':>6}" for v in x[:, 0, 1]))
print("target  " + "".join(f"{v:6.2f}" for v in target[:, 0, 0]))
print("network " + "".join(f"{v:6.2f}" for v in y[:, 0, 0]))
