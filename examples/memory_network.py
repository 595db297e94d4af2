"""A recurrent network small enough to check in the head, from the lectures of Hung-yi Lee.

    python examples/memory_network.py

Two inputs, two hidden units, two outputs, all of them linear, every weight 1, no biases. The memory starts at 0, so the
first hidden value is 1 + 1 + 0 + 0 = 2. The second input is the same, but now the memory holds 2 and 2: the hidden
value is 1 + 1 + 2 + 2 = 6. The same input, another output: that is what a memory is for.
"""

import numpy as np

import nbrnn

# Weights are drawn at random unless they are set, and `params` are live views: writing into them changes the model.
hidden = nbrnn.RNN(2, 2, bias=False, activations="linear")
model = nbrnn.Sequential(hidden, nbrnn.Linear(2, 2, bias=False))
for weight in model.params.values():
    weight[...] = 1.0

x = np.array([[1, 1], [1, 1], [2, 2]], dtype="float32")  # (T, I): one sequence
h, _ = hidden(x)
y, _ = model(x)

print(" step | input   | memory before | hidden    | output")
print("------+---------+---------------+-----------+---------")
for t in range(len(x)):
    before = h[t - 1] if t else np.zeros(2)
    print(
        f"{t + 1:5} | {x[t, 0]:2.0f}, {x[t, 1]:2.0f}  | {before[0]:5.0f}, {before[1]:2.0f}     "
        f"| {h[t, 0]:3.0f}, {h[t, 1]:3.0f}  | {y[t, 0]:3.0f}, {y[t, 1]:3.0f}"
    )

assert y.tolist() == [[4, 4], [12, 12], [32, 32]]

# The order of a sequence matters, too: the same three inputs, another first one.
other, _ = model(x[[2, 0, 1]])
print("\nThe inputs (2, 2), (1, 1), (1, 1) instead: " + ", ".join(f"({a:.0f}, {b:.0f})" for a, b in other))
assert other.tolist() == [[8, 8], [20, 20], [44, 44]]
