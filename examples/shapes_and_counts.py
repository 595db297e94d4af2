"""How many parameters a cell has, and which shapes go in and come out.

    python examples/shapes_and_counts.py

Sizes are those of the example in the documentation of torch.nn.LSTM: input 10, hidden 20, two layers, batches of 3
sequences with 5 time steps. Names, shapes and gate order are torch's, too.
"""

import numpy as np

import nbrnn

I, H, P, T, B = 10, 20, 5, 5, 3

CELLS = {
    "RNN": nbrnn.RNN(I, H),
    "GRU": nbrnn.GRU(I, H),
    "LSTM": nbrnn.LSTM(I, H),
    "LSTM without biases": nbrnn.LSTM(I, H, bias=False),
    f"LSTM projected to {P}": nbrnn.LSTM(I, H, proj_size=P),
    "peephole LSTM": nbrnn.PeepholeLSTM(I, H),
    "coupled LSTM (CIFG)": nbrnn.CoupledLSTM(I, H),
    "Jordan": nbrnn.JordanRNN(I, H),
    "CTRNN": nbrnn.CTRNN(I, H),
    "light GRU": nbrnn.LiGRU(I, H),
    "minGRU": nbrnn.MinGRU(I, H),
    "SRU": nbrnn.SRU(I, H),
    "IndRNN": nbrnn.IndRNN(I, H),
}


def count(layer, part=""):
    return sum(array.size for name, array in layer.params.items() if part in name)


print(f"parameters of one layer, input {I}, hidden {H}\n")
print(f"{'':22}  gates     input  recurrent   biases    other    total")
for name, layer in CELLS.items():
    parts = [count(layer, part) for part in ("weight_ih", "weight_hh", "bias")]
    total = count(layer)
    numbers = f"{parts[0]:8}{parts[1]:11}{parts[2]:9}{total - sum(parts):9}{total:9}"
    print(f"{name:22}{', '.join(layer.cell.gates):>11}{numbers}")

# G gates are G blocks of rows in each matrix: the LSTM has four times the parameters of the RNN, the GRU three times.
assert count(CELLS["RNN"]) == H * I + H * H + 2 * H == 640
assert count(CELLS["LSTM"]) == 4 * count(CELLS["RNN"])
assert count(CELLS["GRU"]) == 3 * count(CELLS["RNN"])

print(f"\nshapes of an LSTM with x ({T}, {B}, {I}): time, batch, input\n")
print(f"{'':34}{'y':>14}{'h_n':>14}{'c_n':>14}")
x = np.zeros((T, B, I), "float32")
for name, options in {
    "1 layer": {},
    "2 layers": {"num_layers": 2},
    "2 layers, 2 directions": {"num_layers": 2, "bidirectional": True},
    f"2 layers, projected to {P}": {"num_layers": 2, "proj_size": P},
    "2 layers, batch_first": {"num_layers": 2, "batch_first": True},
}.items():
    layer = nbrnn.LSTM(I, H, **options)
    y, (h_n, c_n) = layer(x.swapaxes(0, 1) if layer.batch_first else x)
    print(f"{name:34}{y.shape!s:>14}{h_n.shape!s:>14}{c_n.shape!s:>14}")

    # y: both directions side by side; h_n and c_n: layer by layer
    rows, size = layer.num_layers * layer.directions, layer.out_size
    assert y.shape == (*((B, T) if layer.batch_first else (T, B)), layer.directions * size)
    assert (h_n.shape, c_n.shape) == ((rows, B, size), (rows, B, H))

layer = nbrnn.LSTM(I, H, num_layers=2, bidirectional=True)
print("\nparameters of 2 layers with 2 directions: each four blocks of rows i, f, g, o\n")
for name, array in layer.params.items():
    if name.startswith("weight"):
        print(f"{name:24}{array.shape!s:>10}")
