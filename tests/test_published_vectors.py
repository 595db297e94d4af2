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
            bias_hh[:] = bias  # the GRU of Keras has both biases, the other layers have one
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

ONNX_GATES = {"elman_tanh": [0], "elman_relu": [0], "lstm": [0, 2, 3, 1], "gru": [1, 0, 2]}


def onnx(cell, I, H, W, R, B=None, D=1):
    gates = ONNX_GATES[cell]
    G = len(gates)
    params = {}
    for d, suffix in zip(range(D), ["_l0", "_l0_reverse"]):
        params[f"weight_ih{suffix}"] = np.reshape(W, (D, G, H, I))[d, gates].reshape(G * H, I)
        params[f"weight_hh{suffix}"] = np.reshape(R, (D, G, H, H))[d, gates].reshape(G * H, H)
        if B is not None:
            both = np.reshape(B, (D, 2, G, H))[d][:, gates].reshape(2, G * H)
            params[f"bias_ih{suffix}"], params[f"bias_hh{suffix}"] = both
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

    # The weights of the class LstmOpContext2x1x2x2, without its peepholes
    params = onnx(
        "lstm", 2, 2,
        W=[-0.494659, 0.0453352, -0.487793, 0.417264, -0.0175329, 0.489074, -0.446013, 0.414029,
           -0.0091708, -0.255364, -0.106952, -0.266717, -0.0888852, -0.428709, -0.283349, 0.208792],
        R=[0.146626, -0.0620289, -0.0815302, 0.100482, -0.219535, -0.306635, -0.28515, -0.314112,
           -0.228172, 0.405972, 0.31576, 0.281487, -0.394864, 0.42111, -0.386624, -0.390225],
        B=[0.381619, 0.0323954, -0.14449, 0.420804, -0.258721, 0.45056, -0.250755, 0.0967895] + [0.0] * 8,
    )  # fmt: skip
    x = np.reshape([-0.455351, -0.276391, -0.185934, -0.269585], (2, 1, 2))

    # LSTMTest.ONNXRuntime_TestLSTMForwardCellState
    state = (np.array([[[0.34, 0.72]]]), np.array([[[0.63, 0.21]]]))
    expected = {"y": [[[0.12797015, 0.0097284]], [[0.02716939, 0.01842997]]], "c": [[[0.06408449, 0.03139432]]]}
    yield Vector("onnxruntime TestLSTMForwardCellState", "lstm", params, x, expected, state)

    # LSTMTest.ONNXRuntime_TestLSTMForwardHiddenState
    state = (state[0], np.zeros((1, 1, 2)))
    expected = {"y": [[[0.01797521, -0.07104912]], [[-0.03174796, -0.0152949]]], "c": [[[-0.07285583, -0.02545788]]]}
    yield Vector("onnxruntime TestLSTMForwardHiddenState", "lstm", params, x, expected, state)


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
]
VECTORS = [vector for source in SOURCES for vector in source()]


def run_oracle(vector, state):
    how = {"num_layers": vector.num_layers, "bidirectional": vector.bidirectional}
    return oracle.forward(vector.cell, vector.params, vector.x, state, **how)


def run_nbrnn(vector, state):
    kind, own = {
        "elman_tanh": (nbrnn.RNN, {"nonlinearity": "tanh"}),
        "elman_relu": (nbrnn.RNN, {"nonlinearity": "relu"}),
        "lstm": (nbrnn.LSTM, {}),
        "gru": (nbrnn.GRU, {"reset_after": True}),
    }[vector.cell]
    layer = kind(
        vector.x.shape[2],
        vector.params["weight_hh_l0"].shape[1],
        num_layers=vector.num_layers,
        bias="bias_ih_l0" in vector.params,
        bidirectional=vector.bidirectional,
        dtype="float64",
        **own,
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
