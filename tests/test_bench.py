"""`nbrnn bench`: what it counts, what its engines compute, and how it writes it down."""

import importlib.util

import numpy as np
import pytest
from test_tiles import assert_close

import nbrnn
from nbrnn import cli
from nbrnn.bench import engines, peak, report
from nbrnn.bench.processes import Engine, compare, times_of
from nbrnn.kernels.tiles import VECTORS, panel_width, product_kernel

SHAPE = (5, 2, 4, 8)


class Fixed:
    """An engine whose cases take as long as it is told, in milliseconds."""

    def __init__(self, name, times):
        self.name, self.times = name, times

    def ask(self, case=None, seconds=None):
        self.work = self.work if case is None else case[0]
        return True if case else [self.times[self.work] * 1e-3, 1.0]


def test_the_report_is_made_of_the_best_times(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    ours = Fixed("nbrnn", {"peak": 1.0, "stream": 0.005, "step": 10.0, "infer": 2.0})
    other = Fixed("onnxruntime", {"infer": 3.0})
    lines = list(report.report([ours, other], 2))
    rate = peak.peak_operations("float32", 2) / 1e6
    assert lines[0].split() == f"FMA peak {rate:.0f} GFLOP/s with threads: 2, {rate / 2:.0f} on one; float32".split()
    assert "5.0 us" in lines[1]
    (step,) = [line for line in lines if line.startswith("LSTM  nbrnn") and "112,000" in line]
    operations = 6 * 35 * 32 * (1024 * 256 + 28 * 256)
    assert step.split() == [
        "LSTM",
        "nbrnn",
        "112,000",
        "10.00",
        f"{operations / 1e7:.0f}",
        f"{operations / rate / 1e7:.0%}",
    ]
    slower = [line for line in lines if "onnxruntime" in line]
    assert [line.split()[-1] for line in slower] == ["1.50"] * 3
    assert max(map(len, "\n".join(lines).splitlines())) <= 80


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_peak_is_that_of_a_product(dtype, threads):
    rng, P = np.random.default_rng(0), panel_width(VECTORS, dtype)
    a, packed, start = (rng.standard_normal(shape).astype(dtype) for shape in ((8 * threads, 5), (1, 5, P), P))
    out = np.empty((len(a), P), dtype)
    peak.repeat.entry(threads, 3, product_kernel(VECTORS, dtype), a, packed, start, out)
    assert_close(out, start, a, packed[0])
    peak.peak_call(dtype, 1)()


def test_useful_operations_are_the_products():
    T, B, I, H = SHAPE
    assert engines.operations("infer", "LSTM", SHAPE) == 2 * T * B * 4 * H * (I + H)
    assert engines.operations("train", "GRU", SHAPE) == 3 * 2 * T * B * 3 * H * (I + H)
    assert engines.operations("step", "RNN", SHAPE) == 3 * 2 * T * B * (H * H + H * I)  # tokens are no product
    assert engines.operations("zaremba", "LSTM", SHAPE) == 3 * 2 * T * B * (4 * 4 * H * H + H * I)


@pytest.mark.parametrize("work", ["train", "infer", "step", "zaremba", "stream", "peak"])
def test_an_engine_in_a_process_of_its_own_is_timed(work):
    with Engine("nbrnn") as engine:
        ((name, times),) = compare([engine], (work, "LSTM", SHAPE, "float32", 1), 2).items()
    assert name == "nbrnn"
    assert 0 < times.best <= times.median
    assert times.slower == 1


def test_a_round_in_which_all_were_slow_leaves_the_ratio():
    first = [[4.0, 2.0], [10.0, 12.0], [1.0]]
    assert times_of([[6.0, 8.0], [30.0, 40.0], [3.5]], first) == (3500.0, 8000.0, 3.0)


def test_an_engine_that_ends_says_on_what():
    with Engine("nbrnn") as engine, pytest.raises(RuntimeError, match="nbrnn: its process ended on"):
        engine.ask(case=("train", "LSTN", SHAPE, "float32", 1))


@pytest.mark.parametrize("cell", engines.GATES)
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_what_runs_onnx_is_timed_on_the_layer(engine, cell):
    """What is timed computes what ours does, with ONNX's order of gates."""
    pytest.importorskip("onnx")
    pytest.importorskip(engine)
    from onnx import load_from_string, numpy_helper

    model, data = engines.onnx_layer(cell, SHAPE)
    found = engines.ENGINES[engine]("infer", cell, SHAPE, "float32", 1)()
    want = np.asarray(found[0])  # OpenVINO answers with a mapping, whose keys may be numbers
    weights = {one.name: numpy_helper.to_array(one)[0] for one in load_from_string(model).graph.initializer}
    order = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}[cell]

    def ours(array):
        return np.concatenate([np.split(array, len(order))[n] for n in order])

    layer = getattr(nbrnn, cell)(SHAPE[2], SHAPE[3])
    bias_ih, bias_hh = map(ours, np.split(weights["b"], 2))
    layer.load_state_dict(
        {"weight_ih_l0": ours(weights["W"]), "weight_hh_l0": ours(weights["R"]), "bias_ih_l0": bias_ih,
         "bias_hh_l0": bias_hh}
    )  # fmt: skip
    np.testing.assert_allclose(layer(data["X"])[0], want[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cell", engines.GATES)
def test_what_jax_is_timed_on_is_the_layer(cell, monkeypatch):
    pytest.importorskip("jax")
    monkeypatch.delattr("os.sched_setaffinity", raising=False)  # this process keeps its cores
    want, (want_params, want_dx) = engines.jax_case("train", cell, SHAPE, "float64", 1)()
    names = [f"{name}_l0" for name in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")]
    params, x, dy = engines.jax_data(cell, SHAPE)
    layer = getattr(nbrnn, cell)(SHAPE[2], SHAPE[3], dtype="float64")
    layer.load_state_dict(dict(zip(names, params)))
    y, _, pullback = layer.vjp(x)
    dx, _, grads = pullback(dy)
    inferred = engines.jax_case("infer", cell, SHAPE, "float64", 1)()
    pairs = [(y, want), (y, inferred), (dx, want_dx), *((grads[name], want) for name, want in zip(names, want_params))]
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("work", ["train", "infer", "step", "zaremba"])
def test_torch_does_every_work(work):
    engines.torch_case(work, "LSTM", SHAPE, "float32", 1)()


def test_the_command_prints_the_report(monkeypatch, capsys):
    monkeypatch.setattr("nbrnn.bench.processes.installed", list)
    monkeypatch.setattr(report, "SHAPE", SHAPE)
    monkeypatch.setattr(report, "ROUNDS", 1)
    assert cli.main(["bench", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert all(words in out for words in ["FMA peak", "one step, LSTM 128", "training step", "inference"])
    assert [line.split()[0] for line in out.splitlines() if " nbrnn " in line] == [*engines.GATES] * 2
