"""What each engine does in a case: a function for each engine, which returns the call to be timed.

A case is (work, cell, shape, dtype, threads), its shape T,B,I,H; in `step` and `zaremba`, I is the vocabulary.

    peak     nbrnn alone: the most FMAs of its tile
    stream   nbrnn alone: one step of an LSTM at batch 1; of its shape, I and H count
    train    forward and backward of a layer, gradients of parameters and input for given gradients of the output
    infer    forward of a layer, whose parameters are frozen where an engine has that
    step     a whole training step of the language model of d2l.ai: one-hot tokens, a layer, a linear one, cross
             entropy, clipping to norm 1, SGD
    zaremba  a whole training step of the networks of Zaremba et al. (2014), without dropout: embedding, two layers of
             LSTM, a linear one, cross entropy, clipping to norm 5, SGD

With the dtype bfloat16, PyTorch keeps everything in it, and nbrnn computes in float32 with products of that width.

Threads are set by each engine's own means. JAX has none that is documented: its process is bound to so many cores
before its thread pool is made. What that does not control: XLA and its runtime start further threads, which share those
cores, XLA alone decides which operations are divided, and the cores are the first ones, busy or not.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def can(engine, work, dtype):
    """Whether an engine takes part."""
    if engine in ("onnxruntime", "openvino"):
        return (work, dtype) == ("infer", "float32")
    if dtype == "bfloat16":
        return engine in ("nbrnn", "torch") and work in ("train", "infer")
    return engine != "jax" or work in ("train", "infer")


def operations(work, cell, shape):
    """Useful floating-point operations: those of the products forward, and twice as many back.

    Looking up a token's row is none. All time steps count alike, though the states of zeros that the first one begins
    with need not be multiplied (nbrnn does not, which is 1 / T of the recurrent products).
    """
    T, B, I, H = shape
    gates = GATES[cell] * H
    weights = {
        "train": gates * (I + H),
        "infer": gates * (I + H),
        "step": gates * H + I * H,
        "zaremba": 4 * gates * H + I * H,
    }[work]
    return 2 * T * B * weights * (1 if work == "infer" else 3)


# ------------------------------------------------------------------ nbrnn


def nbrnn_case(work, cell, shape, dtype, threads):
    import nbrnn

    nbrnn.set_num_threads(threads)
    if work == "peak":
        from nbrnn.bench.peak import peak_call

        return peak_call(dtype, threads)
    T, B, I, H = shape
    rng = np.random.default_rng(0)
    if work == "stream":
        session, x = nbrnn.LSTM(I, H, dtype=dtype).stream(), np.zeros((1, I), dtype)
        return lambda: session.step(x)
    if work in ("step", "zaremba"):
        trainer = nbrnn_trainer(work, cell, I, H, dtype)
        x, target = rng.integers(0, I, (2, T, B))
        return lambda: trainer.step(x, target)
    products = dtype if dtype == "bfloat16" else None
    dtype = "float32" if products else dtype
    layer = getattr(nbrnn, cell)(I, H, dtype=dtype, products=products)
    x, dy = (rng.standard_normal((T, B, size)).astype(dtype) for size in (I, H))
    if work == "infer":
        layer.freeze()
        return lambda: layer(x)
    grads = nbrnn.Parameters.zeros(layer.params.shapes, layer.dtype)

    def train():
        layer.params.flat[0] += 1e-6  # as after an update: nothing packed may be used again
        _, _, pullback = layer.vjp(x)
        pullback(dy, out=grads)

    return train


def nbrnn_trainer(work, cell, words, H, dtype):
    import nbrnn

    layers = [nbrnn.Linear(H, words, dtype=dtype)]
    if work == "zaremba":
        layers = [nbrnn.Embedding(words, H, dtype=dtype), nbrnn.LSTM(H, H, num_layers=2, dtype=dtype), *layers]
    else:
        layers = [getattr(nbrnn, cell)(words, H, dtype=dtype), *layers]
    clip = 5.0 if work == "zaremba" else 1.0
    return nbrnn.Trainer(nbrnn.Sequential(*layers), nbrnn.CrossEntropy(), nbrnn.SGD(1.0), clip_norm=clip)


# ------------------------------------------------------------------ PyTorch


def torch_case(work, cell, shape, dtype, threads):
    import torch

    torch.set_num_threads(threads)
    T, B, I, H = shape
    kind = getattr(torch, dtype)
    if work in ("step", "zaremba"):
        return torch_step(work, cell, shape, kind)
    layer = getattr(torch.nn, cell)(I, H, dtype=kind)
    x = torch.randn(T, B, I, dtype=kind, requires_grad=work == "train")
    dy = torch.randn(T, B, H, dtype=kind)

    def infer():
        with torch.inference_mode():
            layer(x)

    def train():
        layer.zero_grad(set_to_none=False)
        x.grad = None
        layer(x)[0].backward(dy)

    return train if work == "train" else infer


def torch_step(work, cell, shape, kind):
    import torch
    from torch.nn import functional as F

    T, B, I, H = shape
    head = torch.nn.Linear(H, I, dtype=kind)
    if work == "zaremba":
        embed, layer, clip = torch.nn.Embedding(I, H, dtype=kind), torch.nn.LSTM(H, H, num_layers=2, dtype=kind), 5.0
        params = [*embed.parameters(), *layer.parameters(), *head.parameters()]
    else:
        layer, clip = getattr(torch.nn, cell)(I, H, dtype=kind), 1.0
        params = [*layer.parameters(), *head.parameters()]

        def embed(tokens):
            return F.one_hot(tokens, I).to(kind)

    optimizer = torch.optim.SGD(params, 1.0)
    tokens, target = torch.randint(0, I, (2, T, B))

    def step():
        optimizer.zero_grad()
        logits = head(layer(embed(tokens))[0])
        F.cross_entropy(logits.reshape(-1, I), target.reshape(-1)).backward()
        torch.nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()

    return step


# ------------------------------------------------------------------ ONNX Runtime and OpenVINO: one model for both


def onnx_layer(cell, shape):
    """A layer as an ONNX model in bytes, and its input."""
    from onnx import TensorProto, helper, numpy_helper

    T, B, I, H = shape
    gates, rng = GATES[cell] * H, np.random.default_rng(0)
    sizes = {"W": (1, gates, I), "R": (1, gates, H), "b": (1, 2 * gates)}
    weights = {name: (rng.standard_normal(size) * 0.05).astype("f4") for name, size in sizes.items()}
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    options = {"linear_before_reset": 1} if cell == "GRU" else {}
    node = helper.make_node(cell, ["X", *weights], ["Y"], hidden_size=H, **options)
    x = helper.make_tensor_value_info("X", TensorProto.FLOAT, (T, B, I))
    y = helper.make_tensor_value_info("Y", TensorProto.FLOAT, (T, 1, B, H))
    graph = helper.make_graph([node], "layer", [x], [y], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    return model.SerializeToString(), {"X": rng.standard_normal((T, B, I)).astype("f4")}


def onnxruntime_case(work, cell, shape, dtype, threads):
    import onnxruntime

    model, data = onnx_layer(cell, shape)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, data)


def openvino_case(work, cell, shape, dtype, threads):
    import openvino

    model, data = onnx_layer(cell, shape)
    core = openvino.Core()
    # Where the host has bfloat16, OpenVINO would compute in that.
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "layer.onnx")
        path.write_bytes(model)
        request = core.compile_model(core.read_model(path), "CPU", options).create_infer_request()
    return lambda: request.infer(data)


# ------------------------------------------------------------------ JAX


def jax_case(work, cell, shape, dtype, threads):
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    import jax

    jax.config.update("jax_enable_x64", dtype == "float64")
    layer = jax_layer(cell, jax)
    params, x, dy = jax.tree_util.tree_map(lambda array: jax.numpy.asarray(array, dtype), jax_data(cell, shape))

    def gradients(params, x, dy):
        y, pullback = jax.vjp(layer, params, x)
        return y, pullback(dy)

    if work == "infer":
        infer = jax.jit(layer)
        return lambda: jax.block_until_ready(infer(params, x))
    train = jax.jit(gradients)
    return lambda: jax.block_until_ready(train(params, x, dy))


def jax_data(cell, shape):
    """Parameters, x and dy."""
    T, B, I, H = shape
    gates, rng = GATES[cell] * H, np.random.default_rng(0)
    params = [rng.uniform(-1, 1, size) * H**-0.5 for size in ((gates, I), (gates,), (gates, H), (gates,))]
    return params, *(rng.standard_normal((T, B, size)) for size in (I, H))


def jax_layer(cell, jax):
    """A layer as a function of (parameters, x), with PyTorch's equations and order of gates."""
    numpy, sigmoid = jax.numpy, jax.nn.sigmoid
    tanh = numpy.tanh

    def lstm(state, ahead, back):
        i, f, g, o = numpy.split(ahead + back, 4, axis=1)
        c = sigmoid(f) * state[1] + sigmoid(i) * tanh(g)
        return sigmoid(o) * tanh(c), c

    def gru(state, ahead, back):
        (i_r, i_z, i_n), (h_r, h_z, h_n) = numpy.split(ahead, 3, axis=1), numpy.split(back, 3, axis=1)
        z, n = sigmoid(i_z + h_z), tanh(i_n + sigmoid(i_r + h_r) * h_n)
        return ((1 - z) * n + z * state[0],)

    def rnn(state, ahead, back):
        return (tanh(ahead + back),)

    new_state = {"LSTM": lstm, "GRU": gru, "RNN": rnn}[cell]

    def layer(params, x):
        w_ih, b_ih, w_hh, b_hh = params

        def step(state, ahead):
            state = new_state(state, ahead, state[0] @ w_hh.T + b_hh)
            return state, state[0]

        first = (numpy.zeros((x.shape[1], w_hh.shape[1]), x.dtype),) * (1 + (cell == "LSTM"))
        return jax.lax.scan(step, first, x @ w_ih.T + b_ih)[1]

    return layer


ENGINES = {
    "nbrnn": nbrnn_case,
    "torch": torch_case,
    "onnxruntime": onnxruntime_case,
    "openvino": openvino_case,
    "jax": jax_case,
}
