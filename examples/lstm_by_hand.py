"""An LSTM cell with weights set by hand, from the lectures of Hung-yi Lee: what each gate is for.

    python examples/lstm_by_hand.py

One memory cell and three inputs. Weights of 100 and biases of 10 make the gates all but binary:

    x2 =  1    opens the input gate: x1 is added to the memory
    x2 = -1    closes the forget gate, which is open otherwise: the memory is reset
    x3 =  1    opens the output gate: the memory is put out

Candidate and output are linear here, so that whole numbers stay whole.
"""

import numpy as np

import nbrnn

cell = nbrnn.LSTM(3, 1, activations=("sigmoid", "linear", "linear"))
cell.load_state_dict(
    {
        #                  x1   x2   x3
        "weight_ih_l0": [[0, 100, 0],  # input gate
                         [0, 100, 0],  # forget gate
                         [1, 0, 0],  # candidate
                         [0, 0, 100]],  # output gate
        "weight_hh_l0": [[0], [0], [0], [0]],  # no gate looks at the output of the step before
        "bias_ih_l0": [-10, 10, 0, -10],  # closed, open, none, closed: where x says nothing
        "bias_hh_l0": [0, 0, 0, 0],  # added to the other bias: two of them are a custom of cuDNN
    }
)  # fmt: skip

x1 = [1, 3, 2, 4, 2, 1, 3, 6, 1]
x2 = [0, 1, 0, 1, 0, 0, -1, 1, 0]
x3 = [0, 0, 0, 0, 0, 1, 0, 0, 1]
x = np.array([x1, x2, x3], dtype="float32").T  # (T, I)

# The memory c is a state, and a call returns the last one: to see them all, go step by step and carry the state.
memory, output, state = [], [], None
for t in range(len(x)):
    y, state = cell(x[t : t + 1], state)
    h, c = state
    memory.append(c.item())
    output.append(y.item())


def row(name, values):
    print(f"{name:<8}|" + "".join(f"{round(value):4}" for value in values))


row("time", range(1, 10))
print("--------+" + "-" * 36)
for name, values in [("x1", x1), ("x2", x2), ("x3", x3), ("memory", memory), ("output", output)]:
    row(name, values)

# A gate is never quite closed: sigmoid(-10) = 0.00005 lets a little through.
error = np.abs(np.array([memory, output]) - np.round([memory, output])).max()
print(f"\nlargest distance from a whole number: {error:.5f}")

assert np.round(memory).tolist() == [0, 3, 3, 7, 7, 7, 0, 6, 6]
assert np.round(output).tolist() == [0, 0, 0, 0, 0, 7, 0, 0, 6]
