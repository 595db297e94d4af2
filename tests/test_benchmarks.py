"""The scripts in benchmarks/: what they make of times, and what they count."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

import nbrnn
from nbrnn.bench.engines import GATES
from nbrnn.kernels.memory import empty, zeros

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


# ------------------------------------------------------------------ scaling.py


def test_the_exponent_is_that_of_the_upper_half(script):
    sizes = [1, 2, 4, 8, 16, 32]
    times = [5.0, 5.0, 5.0, *(1e-3 * size**1.5 for size in sizes[3:])]
    assert script("scaling").exponent(sizes, times) == pytest.approx(1.5)


def test_the_worst_step_is_a_rise_not_a_fall(script):
    assert script("scaling").worst_step([1, 2, 3, 4, 5], [9.0, 2.0, 3.0, 3.3, 1.0]) == (1.5, (2, 3))


def test_scaling_prints_a_line_for_each_point(script, monkeypatch, capsys):
    scaling = script("scaling")
    monkeypatch.setattr(scaling, "CENTRE", {"T": 3, "B": 2, "H": 8})
    monkeypatch.setattr(scaling, "SWEEPS", {"T": (2, 3, 4), "B": (1, 2, 3), "H": (4, 8, 9)})
    monkeypatch.setattr(scaling, "LEAST", 0.0)
    options = ["--cells", "LSTM", "--work", "infer", "--threads", "1", "2", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", ["scaling.py", *options])
    scaling.main()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for name, sizes in scaling.SWEEPS.items():
        for size in sizes:
            assert sum(line.startswith(f"| {name} {size} |") for line in lines) == 2
            assert sum(line.startswith(f"| LSTM infer, {name} {size} |") for line in lines) == 1
    assert sum(line.startswith("| LSTM infer, the FMA peak |") for line in lines) == 1


def test_two_threads_do_twice_the_work_of_the_peak(script, monkeypatch):
    scaling = script("scaling")
    monkeypatch.setattr(scaling, "SWEEPS", {"T": (2,)})
    shape = scaling.shape_at("T", 2)
    times = {
        (scaling.PEAK, 1): (3.0, 3.0),
        (scaling.PEAK, 2): (4.0, 6.0),
        (shape, 1): (8.0, 9.0),
        (shape, 2): (5.0, 6.0),
    }
    lines = list(scaling.threads_table({("infer", "GRU"): times}, 2))
    assert lines[3:5] == ["| GRU infer, the FMA peak | 1.50 (1.00) |", "| GRU infer, T 2 | 1.60 (1.50) |"]


# ------------------------------------------------------------------ memory.py


@pytest.mark.parametrize("cell", GATES)
def test_what_is_not_counted_are_the_parameters_and_data(script, cell):
    shape = T, B, I, H = 5, 3, 7, 11
    given = script("memory").given
    layer = getattr(nbrnn, cell)(I, H)
    x, dy = np.zeros((T, B, I), "f4"), np.zeros((T, B, H), "f4")
    assert given("train", cell, shape, "float32", 1) == layer.params.flat.nbytes + x.nbytes + dy.nbytes
    tokens = np.zeros((2, T, B), int)
    linear = nbrnn.Linear(H, I)
    assert given("step", cell, shape, "float32", 1) == sum(
        array.nbytes for array in (layer.params.flat, linear.params.flat, tokens)
    )


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
def test_the_peak_is_that_of_the_step_alone(script, monkeypatch):
    """Neither a larger peak before it counts, nor what was given back."""
    memory = script("memory")
    monkeypatch.setattr(memory, "given", lambda *case: 0)
    monkeypatch.setitem(memory.ENGINES, "arrays", lambda size: lambda: zeros((size,), np.uint8))
    np.ones(200_000_000, np.uint8)
    kept = empty((60_000_000,), np.uint8)  # whose memory an array of the step may have
    kept[...] = 1
    del kept
    peak, alone = memory.fresh_step("arrays", (60_000_000,))()
    assert alone
    assert 59_000_000 < peak < 70_000_000  # the kernel counts pages in batches


# ------------------------------------------------------------------ readme.py


def test_the_readme_gets_the_ratios_and_keeps_its_words(script, tmp_path):
    readme = script("readme")
    times = {"nbrnn": (1, 2, 1)}, {"torch": (8, 9, 3), "openvino": (4, 9, 6)}, {"torch": (1, 9, 3)}
    cases = [{"ms": times[0] | other} for other in times[1:]]  # ratios 4 (3) and 1 (3)
    for H, case in enumerate(cases):
        case |= {"work": "train", "cell": "GRU", "shape": (1, 2, 3, H), "dtype": "float32", "threads": 2}
    known = {"machine": "A processor, 2 cores", "engines": {"torch": "2.13.0+cpu", "openvino": "2026.4.1"}}
    (tmp_path / "peers.json").write_text(json.dumps(known | {"cases": cases}))
    (tmp_path / "peers.png").write_bytes(b"chart")
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- peers -->\nold\n<!-- /peers -->\nafter\n")
    for _ in range(2):
        readme.rewrite([tmp_path], path)
        text = path.read_text()
        assert text.startswith(
            "before\n<!-- peers -->\nAgainst PyTorch 2.13 and OpenVINO 2026.4 on the same machine (A pro"
        )
        assert text.endswith("(docs/img/peers.png)\n<!-- /peers -->\nafter\n")
        assert "| GRU, forward and backward | 2 | 2.00 (3.00) | 1.00 (3.00) |" in text.splitlines()
        assert "old" not in text
    assert (tmp_path / "docs" / "img" / "peers.png").read_bytes() == b"chart"
    path.write_text("before\n<!-- peers -->\nold\n")
    with pytest.raises(SystemExit, match="no comments"):
        readme.rewrite([tmp_path], path)
    assert path.read_text() == "before\n<!-- peers -->\nold\n"


def test_several_runs_are_one_of_their_best_times_and_middle_ratios(script):
    def run(*ms):
        case = {"work": "train", "cell": "GRU", "shape": [1, 2, 3, 4], "dtype": "float32", "threads": 2}
        return {"machine": "A processor", "engines": {"torch": "2.13.0"}, "cases": [case | {"ms": dict(ms)}]}

    runs = [run(("nbrnn", (m, m + 1, 1)), ("torch", (t, 2 * t, r))) for m, t, r in ((1, 5, 6), (2, 4, 3), (4, 8, 2))]
    runs[1]["cases"][0]["ms"]["jax"] = 9, 11, 7  # which only one of them had
    known = script("readme").merged(runs)
    (case,) = known["cases"]
    assert case["ms"] == {"nbrnn": (1, 3, 1), "torch": (4, 10, 3), "jax": (9, 11, 7)}
    text = script("readme").section(known)
    assert "| 4.00 (3.00) |" in text
    assert "interleaved, 3 runs" in " ".join(text.split())


def test_the_readme_has_a_place_for_the_ratios(script):
    text = (FOLDER.parent / "README.md").read_text()
    assert [text.count(comment) for comment in (script("readme").BEGIN, script("readme").END)] == [1, 1]


# ------------------------------------------------------------------ quantized.py


def test_the_error_is_that_against_float32(script):
    make, case = script("quantized").case_of, ("LSTM", (5, 2, 20, 30), 1)
    assert make("nbrnn float32")("error", *case)() == 0
    assert 1e-4 < make("nbrnn bfloat16")("error", *case)() < 1e-2
    assert 1e-3 < make("nbrnn int8")("error", *case)() < 3e-2
    assert make("nbrnn int8")("time", *case)().shape == (5, 2, 30)
