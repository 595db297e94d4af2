"""Numbers that other projects publish for recurrent layers, and tests that the oracle and nbrnn reproduce them.

Every expected number was copied from the test file named beside it, and none was computed here. Weights and inputs
follow the recipe of the same test, rewritten into the layout of nbrnn: gates i, f, g, o and r, z, n, time first.
"""

from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest

import nbrnn


class Vector(NamedTuple):
    source: str
    cell: str
    params: dict
    x: np.ndarray  # (T, B, I)
    expected: dict  # a name from READ -> the numbers, as far as broadcasting does not supply them
    state: Any = None
    bidirectional: bool = False
    num_layers: int = 1
    calls: int = 1  # on the same x, each from the state the one before it left
    options: Any = {}  # noqa: RUF012  # activations, clip
    tolerance: float = 5e-7  # most of the numbers were computed in float32 and printed with 7 digits or more


READ = {
    "y": lambda y, h, c: y,
    "h": lambda y, h, c: h,
    "c": lambda y, h, c: c,
    "y by row": lambda y, h, c: y.swapaxes(0, 1),
    "last": lambda y, h, c: np.concatenate(h, axis=1),
    "product of directions": lambda y, h, c: h[0] * h[1],
    "sum of directions by row": lambda y, h, c: sum(np.split(y, 2, axis=2)).swapaxes(0, 1),
}


# PyTorch: pytorch/pytorch, test/cpp/api/rnn.cpp


def pytorch():
    # RNNTest.CheckOutputValuesMatchPyTorch: each parameter counts up from 0 to 1, the input down from 1 to 0
    shapes = {"weight_ih_l0": (8, 2), "weight_hh_l0": (8, 2), "bias_ih_l0": (8,), "bias_hh_l0": (8,)}
    params = {name: (np.arange(np.prod(shape)) / np.prod(shape)).reshape(shape) for name, shape in shapes.items()}
    x = ((24 - np.arange(24)) / 24).reshape(3, 4, 2)
    y = [
        0.4391, 0.5402, 0.4330, 0.5324, 0.4261, 0.5239, 0.4183, 0.5147,
        0.6822, 0.8064, 0.6726, 0.7968, 0.6620, 0.7860, 0.6501, 0.7741,
        0.7889, 0.9003, 0.7769, 0.8905, 0.7635, 0.8794, 0.7484, 0.8666,
    ]  # fmt: skip
    h = [0.7889, 0.9003, 0.7769, 0.8905, 0.7635, 0.8794, 0.7484, 0.8666]
    c = [1.1647, 1.6106, 1.1425, 1.5726, 1.1187, 1.5329, 1.0931, 1.4911]
    expected = {"y": np.reshape(y, (3, 4, 2)), "h": np.reshape(h, (1, 4, 2)), "c": np.reshape(c, (1, 4, 2))}
    yield Vector("pytorch CheckOutputValuesMatchPyTorch", "lstm", params, x, expected, tolerance=6e-5)


# Keras: keras-team/keras, keras/src/layers/rnn/*_test.py. Most of these tests fill each parameter with one constant.
# Keras then prints one number for every unit, which is written here once: a column that stands for all of them.


def count(B, T, I):
    """The sequence of Keras' tests, which runs 0, 1, 2, ... through a (B, T, I) array."""
    return np.arange(float(B * T * I)).reshape(B, T, I).swapaxes(0, 1)


def constants(cell, I, H, kernel=0.01, recurrent=0.02, bias=0.03, unit_forget_bias=True, suffix="_l0"):
    rows = oracle.CELLS[cell].gates * H
    params = {f"weight_ih{suffix}": np.full((rows, I), kernel), f"weight_hh{suffix}": np.full((rows, H), recurrent)}
    if bias is not None:
        bias_ih, bias_hh = np.full(rows, bias), np.zeros(rows)
        if cell == "gru":
            bias_hh[:] = bias  # this GRU of Keras has both biases, the other layers have one
        if cell == "lstm" and unit_forget_bias:
            bias_ih[H : 2 * H] = 1
        params |= {f"bias_ih{suffix}": bias_ih, f"bias_hh{suffix}": bias_hh}
    return params


def both_ways(cell, I, H):
    return constants(cell, I, H) | constants(cell, I, H, suffix="_l0_reverse")


def column(*numbers):
    return np.reshape(numbers, (-1, 1))


def keras_lstm():
    # lstm_test.py, LSTMTest.test_correctness; go_backwards is the same sequence read from its end
    x, params = count(3, 6, 4), constants("lstm", 4, 3)
    last = {"last": column(0.6288687, 0.86899155, 0.9460773)}
    yield Vector("keras LSTM test_correctness", "lstm", params, x, last)
    last = {"last": column(0.35622165, 0.74789524, 0.8872726)}
    yield Vector("keras LSTM test_correctness go_backwards", "lstm", params, x[::-1], last)
    params = constants("lstm", 4, 3, unit_forget_bias=False)
    last = {"last": column(0.57019705, 0.8661914, 0.9459622)}
    yield Vector("keras LSTM test_correctness unit_forget_bias=False", "lstm", params, x, last)
    params = constants("lstm", 4, 3, bias=None)
    last = {"last": column(0.54986924, 0.86226785, 0.9443936)}
    yield Vector("keras LSTM test_correctness use_bias=False", "lstm", params, x, last)

    # LSTMTest.test_statefulness
    last = {"last": column(0.3124785, 0.6863672)}
    yield Vector("keras LSTM test_statefulness", "lstm", constants("lstm", 4, 4), count(2, 3, 4), last, calls=2)

    # LSTMTest.test_pass_initial_state
    x, params, state = count(2, 4, 3), constants("lstm", 3, 2), (np.arange(4.0).reshape(1, 2, 2),) * 2
    last = {"last": [[0.20574439, 0.3558822], [0.64930826, 0.66276]]}
    yield Vector("keras LSTM test_pass_initial_state", "lstm", params, x, last, state)
    last = {"last": [[0.13281618, 0.2790356], [0.5839337, 0.5992567]]}
    yield Vector("keras LSTM test_pass_initial_state go_backwards", "lstm", params, x[::-1], last, state)


def keras_gru():
    # gru_test.py, GRUTest.test_correctness
    x, params = count(3, 6, 4), constants("gru", 4, 3)
    last = {"last": column(0.5217289, 0.6371659, 0.39384964)}
    yield Vector("keras GRU test_correctness", "gru", params, x, last)
    last = {"last": column(0.24406259, 0.611516, 0.3928808)}
    yield Vector("keras GRU test_correctness go_backwards", "gru", params, x[::-1], last)
    params = constants("gru", 4, 3, bias=None)
    last = {"last": column(0.49988455, 0.64701194, 0.4103359)}
    yield Vector("keras GRU test_correctness use_bias=False", "gru", params, x, last)
    params = constants("gru_reset_before", 4, 3)
    last = {"last": column(0.51447755, 0.6426879, 0.40208298)}
    yield Vector("keras GRU test_correctness reset_after=False", "gru_reset_before", params, x, last)

    # GRUTest.test_statefulness
    last = {"last": column(0.29542392, 0.5885018)}
    yield Vector("keras GRU test_statefulness", "gru", constants("gru", 4, 4), count(2, 3, 4), last, calls=2)

    # GRUTest.test_pass_initial_state
    x, params, state = count(2, 4, 3), constants("gru", 3, 2), np.arange(4.0).reshape(1, 2, 2)
    last = {"last": [[0.23774096, 0.33508456], [0.83659905, 1.0227708]]}
    yield Vector("keras GRU test_pass_initial_state", "gru", params, x, last, state)
    last = {"last": [[0.13486053, 0.23261218], [0.78257304, 0.9691353]]}
    yield Vector("keras GRU test_pass_initial_state go_backwards", "gru", params, x[::-1], last, state)


def keras_simple_rnn():
    # simple_rnn_test.py, SimpleRNNTest.test_correctness
    x, params = count(2, 3, 4), constants("elman_tanh", 4, 4)
    last = {"last": column(0.405432, 0.73605347)}
    yield Vector("keras SimpleRNN test_correctness", "elman_tanh", params, x, last)
    last = {"last": column(0.11144729, 0.5528889)}
    yield Vector("keras SimpleRNN test_correctness go_backwards", "elman_tanh", params, x[::-1], last)

    # SimpleRNNTest.test_statefulness
    last = {"last": column(0.40559256, 0.7361247)}
    yield Vector("keras SimpleRNN test_statefulness", "elman_tanh", params, x, last, calls=2)

    # SimpleRNNTest.test_pass_initial_state
    x, params, state = count(2, 4, 3), constants("elman_tanh", 3, 4), np.arange(8.0).reshape(1, 2, 4)
    last = {"last": column(0.33621645, 0.6262637)}
    yield Vector("keras SimpleRNN test_pass_initial_state", "elman_tanh", params, x, last, state)
    last = {"last": column(0.07344437, 0.43043602)}
    yield Vector("keras SimpleRNN test_pass_initial_state go_backwards", "elman_tanh", params, x[::-1], last, state)


def keras_bidirectional():
    # bidirectional_test.py, SimpleRNNTest.test_correctness: the directions side by side, ...
    x = count(2, 3, 4)
    last = {"last": [[0.39687276, 0.39687276, 0.10004295, 0.10004295], [0.7237238, 0.7237238, 0.53391594, 0.53391594]]}
    params = both_ways("elman_tanh", 4, 2)
    yield Vector("keras Bidirectional test_correctness", "elman_tanh", params, x, last, bidirectional=True)
    # ... multiplied, with other constants on the way back, ...
    params = params | constants("elman_tanh", 4, 2, kernel=0.03, recurrent=0.02, bias=0.01, suffix="_l0_reverse")
    last = {"product of directions": column(0.08374989, 0.6740834)}
    yield Vector("keras Bidirectional test_correctness mul", "elman_tanh", params, x, last, bidirectional=True)
    # ... and added, for a GRU and every step of the sequence
    y = [[0.20937867, 0.34462988, 0.40290534], [0.59829646, 0.6734641, 0.6479671]]
    expected = {"sum of directions by row": np.reshape(y, (2, 3, 1))}
    params = both_ways("gru", 4, 2)
    yield Vector("keras Bidirectional test_correctness sum", "gru", params, x, expected, bidirectional=True)

    # test_statefulness
    x, params = count(2, 4, 3), both_ways("lstm", 3, 2)
    last = {"last": [[0.26234663, 0.26234663, 0.16959146, 0.16959146], [0.6137073, 0.6137073, 0.5381646, 0.5381646]]}
    yield Vector("keras Bidirectional test_statefulness", "lstm", params, x, last, bidirectional=True, calls=2)

    # test_pass_initial_state: h and c of the way forward, then h and c of the way back
    s = np.arange(4.0).reshape(2, 2)
    state = (np.stack([1 * s, 3 * s]), np.stack([2 * s, 4 * s]))
    last = {"last": [[0.20794602, 0.4577124, 0.14046375, 0.48191673], [0.6682636, 0.6711909, 0.60943645, 0.60950446]]}
    yield Vector("keras Bidirectional test_pass_initial_state", "lstm", params, x, last, state, bidirectional=True)

    # test_return_state
    h = [column(0.1990008, 0.52335435), column(0.12659755, 0.44717982)]
    c = [column(0.35567185, 1.0492687), column(0.2501858, 0.941473)]
    yield Vector("keras Bidirectional test_return_state", "lstm", params, x, {"h": h, "c": c}, bidirectional=True)


def keras_rnn():
    # rnn_test.py, RNNTest.test_go_backwards: OneStateRNNCell has weights of one, no bias and no activation, which on
    # these sequences without a negative number is relu
    x, params = count(2, 3, 4), constants("elman_relu", 4, 2, kernel=1.0, recurrent=1.0, bias=None)
    last = {"last": column(202.0, 538.0)}
    yield Vector("keras RNN test_go_backwards", "elman_relu", params, x[::-1], last, tolerance=0)
    last = {"last": column(954.0, 3978.0)}
    yield Vector("keras RNN test_go_backwards stateful", "elman_relu", params, x, last, calls=2, tolerance=0)

    # stacked_rnn_cells_test.py, StackedRNNTest.test_correctness_single_state_stack: 2 units above 3 units. Our layers
    # are all of one size, so the upper one has a third unit here, unconnected and always zero.
    params = constants("elman_relu", 4, 3, kernel=1.0, recurrent=1.0, bias=None)
    params["weight_ih_l1"] = np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    params["weight_hh_l1"] = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    expected = {
        "y by row": [
            [[18.0, 18.0, 0.0], [156.0, 156.0, 0.0], [786.0, 786.0, 0.0]],
            [[162.0, 162.0, 0.0], [1020.0, 1020.0, 0.0], [4386.0, 4386.0, 0.0]],
        ],
        "h": [
            [[158.0, 158.0, 158.0], [782.0, 782.0, 782.0]],
            [[786.0, 786.0, 0.0], [4386.0, 4386.0, 0.0]],
        ],
    }
    name = "keras StackedRNNCells test_correctness_single_state_stack"
    yield Vector(name, "elman_relu", params, x, expected, num_layers=2, tolerance=0)


# ONNX Runtime: microsoft/onnxruntime, onnxruntime/test/providers/cpu/rnn/*_op_test.cc. The numbers of X, W, R and B are
# copied too, in the order of ONNX, where W is (D, G H, I), R is (D, G H, H), B is (D, 2 G H) with the bias of W before
# that of R, Y is (T, D, B, H), and the gates are i, o, f, c and z, r, h.

# The peepholes P are (D, 3 H) in the order i, o, f. Where the gates i and f are coupled, f = 1 - i, and what W, R, B
# and P have for f counts for nothing.

ONNX_GATES = {
    "elman_tanh": [0],
    "elman_relu": [0],
    "lstm": [0, 2, 3, 1],
    "peephole_lstm": [0, 2, 3, 1],
    "coupled_lstm_forget_io": [0, 3, 1],
    "gru": [1, 0, 2],
    "gru_reset_before": [1, 0, 2],
}


def onnx(cell, I, H, W, R, B=None, D=1, P=None):
    gates = ONNX_GATES[cell]
    G = len(np.ravel(W)) // (D * H * I)
    params = {}
    for d, suffix in zip(range(D), ["_l0", "_l0_reverse"]):
        params[f"weight_ih{suffix}"] = np.reshape(W, (D, G, H, I))[d, gates].reshape(-1, I)
        params[f"weight_hh{suffix}"] = np.reshape(R, (D, G, H, H))[d, gates].reshape(-1, H)
        if B is not None:
            both = np.reshape(B, (D, 2, G, H))[d][:, gates].reshape(2, -1)
            params[f"bias_ih{suffix}"], params[f"bias_hh{suffix}"] = both
        if P is not None:
            params[f"weight_ch{suffix}"] = np.reshape(P, (D, 3, H))[d, [0, 2, 1]]
    return params


def onnx_rnn():
    # rnn_op_test.cc, RNNTest.RNN_bidirectional_bias_initial_zigged_batch: its two rows, of 5 and of 3 steps
    params = onnx(
        "elman_tanh", 2, 3, D=2,
        W=[0.4317745, 0.37378395, -1.0386457, -0.22681296, 0.4418987, 0.49973935,
           0.47248289, -0.63369429, 0.89542073, 0.69698066, 0.65118814, 1.0828459],
        R=[-0.24072374, -0.29326528, -0.91741192, 0.5447638, 0.53938544, 0.79502326,
           -0.59813821, 0.020413321, -0.52225035,
           -0.4292987, -0.14766316, -0.91084105, 0.23699039, 0.064034894, 0.089069292,
           -0.12803128, -0.081178986, 0.967533],
        B=[-0.44529742, 0.80094892, -1.0028138, 0.0, 0.0, 0.0, 0.57412368, 0.13440208, -0.85748988, 0.0, 0.0, 0.0],
    )  # fmt: skip
    state = np.full((2, 1, 3), 1.2)
    x = [1.64644051, 2.14556813, 1.80829012, 1.63464952, 1.27096438, 1.93768239, 1.31276166, 2.67531896,
         2.89098835, 1.15032458]  # fmt: skip
    y = [-0.58767605, 0.69586837, -0.48001164, -0.71697658, 0.99646497, 0.9980582,
         0.8678354, -0.94409049, 0.8424542, -0.37213817, 0.99391747, 0.99555576,
         0.12221602, -0.31430662, -0.42285997, -0.62726945, 0.988343, 0.9956606,
         0.91737539, -0.92293501, 0.78396499, -0.87013513, 0.99671143, 0.9990834,
         0.51060104, -0.95055139, -0.12672578, -0.51847482, 0.99931973, 0.99655205]  # fmt: skip
    h = [0.51060104, -0.95055139, -0.12672578, -0.71697658, 0.99646497, 0.9980582]
    expected = {"y": np.reshape(y, (5, 1, 6)), "h": np.reshape(h, (2, 1, 3))}
    name = "onnxruntime RNN_bidirectional_bias_initial_zigged_batch"
    yield Vector(f"{name} row 1", "elman_tanh", params, np.reshape(x, (5, 1, 2)), expected, state, bidirectional=True)
    x = [1.30798471, 0.0777787, 1.64898741, 1.30596721, 1.26110339, 0.99100447]
    y = [-0.92063117, 0.93283325, -0.93614483, 0.1513377, 0.90150106, 0.74947751,
         0.91569924, -0.96036619, 0.89311725, -0.13006453, 0.98576784, 0.98875856,
         -0.28076148, -0.04275616, -0.75480938, -0.84641802, 0.98438591, 0.96007115]  # fmt: skip
    h = [-0.28076148, -0.04275616, -0.75480938, 0.1513377, 0.90150106, 0.74947751]
    expected = {"y": np.reshape(y, (3, 1, 6)), "h": np.reshape(h, (2, 1, 3))}
    yield Vector(f"{name} row 2", "elman_tanh", params, np.reshape(x, (3, 1, 2)), expected, state, bidirectional=True)

    # RNNTest.RNN_bidirectional_with_sequence_lens: its first direction, which is relu, and its two rows of full length
    params = onnx("elman_relu", 2, 4, W=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.5, 0.6], R=[0.1] * 16, B=[0.1] * 8)
    x = [3.0, 4.0, 5.0, 6.0, 4.0, 4.0, 6.0, 3.0]
    y = [1.3000001, 2.7, 4.0999999, 4.0999999, 1.9000001, 4.0999999, 6.3000002, 6.3000002,
         2.6200001, 4.2200003, 5.8199997, 5.8199997, 3.2600002, 5.0600004, 6.8600001, 6.8600001]  # fmt: skip
    expected = {"y": np.reshape(y, (2, 2, 4))}
    name = "onnxruntime RNN_bidirectional_with_sequence_lens relu"
    yield Vector(name, "elman_relu", params, np.reshape(x, (2, 2, 2)), expected)


def onnx_lstm():
    # deep_cpu_lstm_op_test.cc, LSTMTest.BidirectionalSimpleWeightsNoBiasTwoRows
    W = [0.1, 0.2, 0.3, 0.4, 1.0, 2.0, 3.0, 4.0, 10.0, 11.0, 12.0, 13.0]
    params = onnx("lstm", 1, 3, W=W * 2, R=[0.1] * 72, D=2)
    x = np.reshape([1.0, 2.0, 10.0, 11.0], (2, 2, 1))
    y = [0.28828835, 0.36581863, 0.45679406, 0.34526032, 0.47220859, 0.55850911,
         0.55391603, 0.69201493, 0.82696019, 0.64046413, 0.82303363, 0.91610711,
         0.84196719, 0.89402526, 0.91073048, 0.85882828, 0.90703777, 0.92382453,
         0.61249432, 0.70678632, 0.74094619, 0.62759886, 0.71640738, 0.74624585]  # fmt: skip
    c = [1.27731147, 1.44181041, 1.53179041, 1.3249796, 1.51063104, 1.61451544,
         1.27850552, 1.46799496, 1.57641257, 1.34960834, 1.54772296, 1.65633056]  # fmt: skip
    y = np.reshape(y, (2, 2, 2, 3)).swapaxes(1, 2).reshape(2, 2, 6)
    expected = {"y": y, "c": np.reshape(c, (2, 2, 3))}
    name = "onnxruntime LSTM BidirectionalSimpleWeightsNoBiasTwoRows"
    yield Vector(name, "lstm", params, x, expected, bidirectional=True)

    # LSTMTest.LargeBatchWithClip: its rows 1, 16, 24 and 32 out of 32, whose gates see more than the limit
    params = onnx("lstm", 1, 3, W=W, R=[0.1] * 36)
    x = np.reshape([1.0, 16.0, 24.0, 32.0, 33.0, 48.0, 56.0, 64.0], (2, 4, 1))
    h = [0.88572926, 0.89251395, 0.89655037, 0.92955856, 0.94103248, 0.94266769,
         0.93741938, 0.94266769, 0.94266769, 0.94103248, 0.94266769, 0.94266769]  # fmt: skip
    expected = {"h": np.reshape(h, (1, 4, 3))}
    yield Vector("onnxruntime LSTM LargeBatchWithClip", "lstm", params, x, expected, options={"clip": 4.0})
    # ... and LargeBatchNoClipping: the same rows
    h = [0.90387899, 0.9135572, 0.91772245, 0.94937864, 0.96114929, 0.96344629,
         0.9574102, 0.96344554, 0.96397483, 0.96105254, 0.96391004, 0.96402279]  # fmt: skip
    yield Vector("onnxruntime LSTM LargeBatchNoClipping", "lstm", params, x, {"h": np.reshape(h, (1, 4, 3))})

    # The weights of the class LstmOpContext2x1x2x2
    W = [-0.494659, 0.0453352, -0.487793, 0.417264, -0.0175329, 0.489074, -0.446013, 0.414029,
         -0.0091708, -0.255364, -0.106952, -0.266717, -0.0888852, -0.428709, -0.283349, 0.208792]  # fmt: skip
    R = [0.146626, -0.0620289, -0.0815302, 0.100482, -0.219535, -0.306635, -0.28515, -0.314112,
         -0.228172, 0.405972, 0.31576, 0.281487, -0.394864, 0.42111, -0.386624, -0.390225]  # fmt: skip
    B = [0.381619, 0.0323954, -0.14449, 0.420804, -0.258721, 0.45056, -0.250755, 0.0967895] + [0.0] * 8
    P = [0.2345, 0.5235, 0.4378, 0.3475, 0.8927, 0.3456]
    params = onnx("lstm", 2, 2, W, R, B)
    x = np.reshape([-0.455351, -0.276391, -0.185934, -0.269585], (2, 1, 2))

    # LSTMTest.ONNXRuntime_TestLSTMForwardCellState
    state = (np.array([[[0.34, 0.72]]]), np.array([[[0.63, 0.21]]]))
    expected = {"y": [[[0.12797015, 0.0097284]], [[0.02716939, 0.01842997]]], "c": [[[0.06408449, 0.03139432]]]}
    yield Vector("onnxruntime TestLSTMForwardCellState", "lstm", params, x, expected, state)

    # LSTMTest.ONNXRuntime_TestLSTMForwardHiddenState
    state = (state[0], np.zeros((1, 1, 2)))
    expected = {"y": [[[0.01797521, -0.07104912]], [[-0.03174796, -0.0152949]]], "c": [[[-0.07285583, -0.02545788]]]}
    yield Vector("onnxruntime TestLSTMForwardHiddenState", "lstm", params, x, expected, state)

    # LSTMTest.ONNXRuntime_TestLSTMActivation
    expected = {"y": [[[-0.0660155, 0.0351227]], [[-0.04236888, 0.0177365]]], "c": [[[0.1624992, 0.04672481]]]}
    options = {"activations": ["tanh", "sigmoid", "tanh"]}
    yield Vector("onnxruntime TestLSTMActivation", "lstm", params, x, expected, options=options)

    # LSTMTest.ONNXRuntime_TestLSTMForwardPeepHole
    params = onnx("peephole_lstm", 2, 2, W, R, B, P=P)
    y = [[[-0.0251062475, 0.0561261699]], [[-0.03277518, 0.05935364]]]
    expected = {"y": y, "c": [[[-0.0780206, 0.098829]]]}
    yield Vector("onnxruntime TestLSTMForwardPeepHole", "peephole_lstm", params, x, expected)

    # LSTMTest.ONNXRuntime_TestLSTMForwardClip
    expected = {"y": [[[-0.02280854, 0.02744377]], [[-0.03516197, 0.03875681]]], "c": [[[-0.07415761, 0.07395997]]]}
    options = {"clip": 0.1}
    yield Vector("onnxruntime TestLSTMForwardClip", "peephole_lstm", params, x, expected, options=options)

    # LSTMTest.ONNXRuntime_TestLSTMForwardNoBiasUsePeepholes
    params = onnx("peephole_lstm", 2, 2, W, R, P=P)
    expected = {"y": [[[0.04154162, 0.01969122]], [[0.05298181, 0.0030589]]], "c": [[[0.11169686, 0.00625722]]]}
    yield Vector("onnxruntime TestLSTMForwardNoBiasUsePeepholes", "peephole_lstm", params, x, expected)

    # LSTMTest.ONNXRuntime_TestLSTMBidirectionalBasic
    params = onnx("peephole_lstm", 2, 2, W * 2, R * 2, B * 2, D=2, P=P * 2)
    y = [[[-0.0251062, 0.0561262, -0.0318928, 0.0762679]], [[-0.0327752, 0.0593536, -0.0306872, 0.028035]]]
    expected = {"y": y, "c": [[[-0.0780206, 0.098829]], [[-0.0753684, 0.120794]]]}
    yield Vector("onnxruntime TestLSTMBidirectionalBasic", "peephole_lstm", params, x, expected, bidirectional=True)

    # LSTMTest.ONNXRuntime_TestLSTMForwardInputForget
    params = onnx("coupled_lstm_forget_io", 2, 2, W, R, B, P=P)
    expected = {"y": [[[-0.02510626, 0.05612619]], [[-0.0314321, 0.05087372]]], "c": [[[-0.07474898, 0.08480116]]]}
    yield Vector("onnxruntime TestLSTMForwardInputForget", "coupled_lstm_forget_io", params, x, expected)


def onnx_gru():
    # deep_cpu_gru_op_test.cc, GRUTest, where linear_before_reset is our reset_after.
    # ForwardDefaultActivationsSimpleWeightsWithBiasBatchParallelLinearBeforeReset, and the same with Reverse
    params = onnx(
        "gru", 1, 3,
        W=[0.1, 0.2, 0.3, 0.2, 0.3, 0.1, 0.3, 0.1, 0.2],
        R=[0.1] * 27,
        B=[-0.01, 0.1, 0.01, -0.2, -0.02, 0.02, 0.3, -0.3, -0.3, -0.03, 0.5, -0.7, 0.05, -0.7, 0.3, 0.07, -0.03, 0.5],
    )  # fmt: skip
    x = np.reshape([-0.1, 0.2, -0.3, 0.4], (2, 2, 1))
    y = [0.15024948, -0.11097029, -0.02121867, 0.18887489, -0.09747667, 0.02093463,
         0.19538902, -0.19016478, -0.05644283, 0.30856851, -0.15190377, 0.05999807]  # fmt: skip
    y_before = [0.16783132, -0.11754231, 0.11977843, 0.2046872, -0.10372487, 0.15365849,
                0.22688604, -0.19698407, 0.14017843, 0.33386092, -0.15799662, 0.2381169]  # fmt: skip
    expected = {"y": np.reshape(y_before, (2, 2, 3))}
    name = "onnxruntime GRU SimpleWeightsWithBiasBatchParallel"
    yield Vector(f"{name} forward", "gru_reset_before", params, x, expected)
    name = "onnxruntime GRU SimpleWeightsWithBiasBatchParallelLinearBeforeReset"
    yield Vector(f"{name} forward", "gru", params, x, {"y": np.reshape(y, (2, 2, 3))})
    y = [0.20910699, -0.18880953, -0.04005555, 0.29700265, -0.15308119, 0.04537245,
         0.12252139, -0.12032216, -0.05064924, 0.21249877, -0.08884402, 0.04751285]  # fmt: skip
    yield Vector(f"{name} reverse", "gru", params, x[::-1], {"y": np.reshape(y, (2, 2, 3))[::-1]})

    # The weights of the class DeepCpuGruOpTestContext
    W = [-0.494659, 0.0453352, -0.487793, 0.417264, -0.0091708, -0.255364, -0.106952, -0.266717,
         -0.0888852, -0.428709, -0.283349, 0.208792]  # fmt: skip
    R = [0.146626, -0.0620289, -0.0815302, 0.100482, -0.228172, 0.405972, 0.31576, 0.281487,
         -0.394864, 0.42111, -0.386624, -0.390225]  # fmt: skip
    B = [0.381619, 0.0323954, -0.258721, 0.45056, -0.250755, 0.0967895] + [0.0] * 6

    # ONNXRuntime_TestGRUOpForwardBatchLinearBeforeReset
    x = [[[-0.455351, -0.276391], [-0.455351, -0.276391]], [[-0.185934, -0.269585], [-0.185934, -0.269585]]]
    y = [0.253942400, -0.174207777, -0.0325528607, 0.0774837881,
         0.0874997079, -0.0485242009, -0.0577347837, 0.0796165839]  # fmt: skip
    params, state = onnx("gru", 2, 2, W, R, B), np.array([[[0.5, -0.5], [0.0, 0.0]]])
    name = "onnxruntime TestGRUOpForwardBatchLinearBeforeReset"
    yield Vector(name, "gru", params, np.array(x), {"y": np.reshape(y, (2, 2, 2))}, state)

    # ONNXRuntime_TestGRUOpSequenceLengthWithBidirectionalLinearBeforeResetB2
    x = [[[0.855351, 0.676391]], [[0.585934, 0.669585]]]
    y = [-0.275918573, -0.0022855850, -0.385578573, 0.0370728001,
         -0.382134795, 0.0607641526, -0.248751760, 0.0347689129]  # fmt: skip
    params = onnx("gru", 2, 2, W * 2, R * 2, B * 2, D=2)
    name = "onnxruntime TestGRUOpSequenceLengthWithBidirectionalLinearBeforeResetB2"
    yield Vector(name, "gru", params, np.array(x), {"y": np.reshape(y, (2, 1, 4))}, bidirectional=True)

    # ONNXRuntime_TestGRUOpForwardBatch
    x = [[[-0.455351, -0.276391], [-0.455351, -0.276391]], [[-0.185934, -0.269585], [-0.185934, -0.269585]]]
    y = [0.2366661, -0.1500429, -0.03255286, 0.0774838, 0.07378622, -0.02782359, -0.05556786, 0.0785508]
    params, expected = onnx("gru_reset_before", 2, 2, W, R, B), {"y": np.reshape(y, (2, 2, 2))}
    yield Vector("onnxruntime TestGRUOpForwardBatch", "gru_reset_before", params, np.array(x), expected, state)

    # ONNXRuntime_TestGRUOpForwardActivation
    x, y = np.array(x)[:, :1], [[[0.222789, 0.4669829]], [[0.3810334, 0.4944591]]]
    options = {"activations": ["tanh", "sigmoid"]}
    yield Vector("onnxruntime TestGRUOpForwardActivation", "gru_reset_before", params, x, {"y": y}, options=options)

    # ONNXRuntime_TestGRUOpBidirectionalBasic
    params = onnx("gru_reset_before", 2, 2, W * 2, R * 2, B * 2, D=2)
    y = [[[-0.03255286, 0.0774838, -0.05469977, 0.1004222]], [[-0.05556786, 0.0785508, -0.04566499, 0.04621252]]]
    name = "onnxruntime TestGRUOpBidirectionalBasic"
    yield Vector(name, "gru_reset_before", params, x, {"y": y}, bidirectional=True)

    # ONNXRuntime_TestGRUPositiveActivationAlphaBeta: 32 units, one step, and other functions in each direction, which
    # are two calls here. These numbers were computed with more digits than the others.
    H, x, state = 32, np.array([[[1.0, 2.0]]]), np.full((1, 1, 32), 0.25)
    W = np.repeat([0.1, 0.2, 0.3], 2 * H)
    R = np.stack([np.diag([0.1 + 0.1 * (n % m) for n in range(H)]) for m in (2, 3, 5)])
    params = onnx("gru_reset_before", 2, H, W, R, [*np.repeat([0.1, 0.2, 0.3], H), *[0.0] * (3 * H)])
    y = [0.589157104133446, 0.57789190635582, 0.596499289838044, 0.583932266186645,
         0.602660999282266, 0.574613517108484, 0.592591742002174, 0.581152059107645,
         0.599870466365438, 0.58688901119379, 0.589262946094602, 0.578086950802852,
         0.595908617320326, 0.584296265507284, 0.603117381311498, 0.574411143084165,
         0.592796083917448, 0.581434103323347, 0.599111005558765, 0.58732791235695,
         0.589368676977052, 0.577696448871644, 0.59620442543072, 0.584658706958245,
         0.602202148066235, 0.574512383220923, 0.592999994021163, 0.580869112219442,
         0.59949155030307, 0.587764451689259, 0.589157104133446, 0.57789190635582]  # fmt: skip
    name, options = "onnxruntime TestGRUPositiveActivationAlphaBeta", {"activations": [("leaky_relu", 0.5), "tanh"]}
    yield Vector(f"{name} 1", "gru_reset_before", params, x, {"y": [[y]]}, state, options=options)
    y = [0.92976461079108, 0.920318863429123, 0.931350963541001, 0.921736050322775,
         0.932696544850119, 0.91952832256688, 0.930568024045208, 0.921062381128771,
         0.93205941179011, 0.922380156527733, 0.929770910118088, 0.920330320081968,
         0.931318215990949, 0.921756237467303, 0.932720157970373, 0.919515978936628,
         0.930579785457139, 0.921078414664293, 0.932018665973048, 0.922403708998701,
         0.929777143371747, 0.920307279340899, 0.931334684571751, 0.921776181825893,
         0.932672631849138, 0.919522183290344, 0.930591417482971, 0.921046160840421,
         0.932039162132774, 0.922426966110166, 0.92976461079108, 0.920318863429123]  # fmt: skip
    options = {"activations": ["sigmoid", ("scaled_tanh", 2.0, 2.0)]}
    yield Vector(f"{name} 2", "gru_reset_before", params, x, {"y": [[y]]}, state, options=options)


# TensorFlow: tensorflow/tensorflow, tensorflow/contrib/rnn/python/kernel_tests/rnn_cell_test.py


def tensorflow():
    # testCoupledInputForgetGateLSTMCell: every weight is 0.5, the gate f has a bias of 1, and h = c = 0.1 at first
    params = constants("coupled_lstm_input", 4, 2, kernel=0.5, recurrent=0.5, bias=0.0)
    params["bias_ih_l0"][:2] = 1.0
    x = np.repeat([[[1.0], [2.0], [3.0]]], 4, axis=2)
    state = np.full((1, 3, 2), 0.1), np.full((1, 3, 2), 0.1)
    h, c = [[0.121753], [0.103349], [0.100178]], [[0.137523], [0.105450], [0.100742]]
    expected = {"h": np.array([h]), "c": np.array([c])}
    source = "tensorflow testCoupledInputForgetGateLSTMCell"
    yield Vector(source, "coupled_lstm_input", params, x, expected, state, tolerance=1e-6)


SOURCES = [
    pytorch,
    keras_lstm,
    keras_gru,
    keras_simple_rnn,
    keras_bidirectional,
    keras_rnn,
    onnx_rnn,
    onnx_lstm,
    onnx_gru,
    tensorflow,
]
VECTORS = [vector for source in SOURCES for vector in source()]


def run_oracle(vector, state):
    how = {"num_layers": vector.num_layers, "bidirectional": vector.bidirectional, **vector.options}
    return oracle.forward(vector.cell.removesuffix("_io"), vector.params, vector.x, state, **how)


def run_nbrnn(vector, state):
    kind, own = {
        "elman_tanh": (nbrnn.RNN, {"nonlinearity": "tanh"}),
        "elman_relu": (nbrnn.RNN, {"nonlinearity": "relu"}),
        "lstm": (nbrnn.LSTM, {}),
        "peephole_lstm": (nbrnn.PeepholeLSTM, {}),
        "coupled_lstm_input": (nbrnn.CoupledLSTM, {}),
        "coupled_lstm_forget_io": (nbrnn.CoupledLSTM, {"couple": "forget", "peepholes": "io"}),
        "gru": (nbrnn.GRU, {"reset_after": True}),
        "gru_reset_before": (nbrnn.GRU, {"reset_after": False}),
    }[vector.cell]
    layer = kind(
        vector.x.shape[2],
        vector.params["weight_hh_l0"].shape[1],
        num_layers=vector.num_layers,
        bias="bias_ih_l0" in vector.params,
        bidirectional=vector.bidirectional,
        dtype="float64",
        **own,
        **vector.options,
    )
    layer.load_state_dict(vector.params)
    return layer(vector.x, state)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.source.replace(" ", "-"))
@pytest.mark.parametrize("run", [run_oracle, run_nbrnn], ids=["oracle", "nbrnn"])
def test_published_numbers_are_reproduced(run, vector):
    state = vector.state
    for _ in range(vector.calls):
        y, state = run(vector, state)
    h, c = state if isinstance(state, tuple) else (state, None)
    for what, numbers in vector.expected.items():
        ours = READ[what](y, h, c)
        published = np.broadcast_to(numbers, ours.shape)
        np.testing.assert_allclose(ours, published, rtol=0, atol=vector.tolerance, err_msg=what)
