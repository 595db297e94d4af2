"""The examples as their readers run them: a process, and the numbers that it prints."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nbrnn

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"-?\d[\d.]*(?:e[+-]\d+)?")


def run(name, *arguments, code=0, columns=80, **variables):
    """What an example prints, which fits the screen, or with which words it refuses."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, ROOT / "examples" / name, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    assert max(map(len, done.stdout.splitlines()), default=0) <= columns
    return done.stderr if code else done.stdout


def rows(text):
    """The numbers of each line, by the words or the number in front of them."""
    found = {}
    for line in text.splitlines():
        name, *cells = re.split(r"\s{2,}|\s*\|\s*", line.strip())
        found.setdefault(name, [float(number) for cell in cells for number in NUMBER.findall(cell)])
    return found


def test_memory_network():
    out = run("memory_network.py")
    table = rows(out)
    # input, memory before, hidden, output
    assert table["1"] == [1, 1, 0, 0, 2, 2, 4, 4]
    assert table["2"] == [1, 1, 2, 2, 6, 6, 12, 12]
    assert table["3"] == [2, 2, 6, 6, 16, 16, 32, 32]
    assert "(8, 8), (20, 20), (44, 44)" in out


def test_lstm_by_hand():
    out = run("lstm_by_hand.py")
    table = rows(out)
    assert table["memory"] == [0, 3, 3, 7, 7, 7, 0, 6, 6]
    assert table["output"] == [0, 0, 0, 0, 0, 7, 0, 0, 6]
    assert float(out.split()[-1]) < 0.001


def test_vanishing_gradients():
    out = run("vanishing_gradients.py")
    drawn, scaled = (rows(part) for part in out.split("recurrent weights times 5"))
    assert all(norm < 1e-8 for norm in drawn["100"])  # RNN, GRU, LSTM, LSTM with a forget bias
    rnn, _, lstm, biased = drawn["100"]
    assert rnn < 1e-3 * lstm < 1e-6 * biased
    assert scaled["100"][0] > 1e4
    assert all(1e-3 < norm < 1e3 for norm in scaled["100"][1:])
    # largest gradient and its step; w, b and the loss at the end
    thrown, held = (scaled[name] for name in ("without clipping", "norm at most 0.2"))
    assert thrown[0] > 100
    assert max(map(abs, thrown[2:4])) > 10
    assert thrown[4] > 0.05
    assert max(map(abs, held[2:4])) < 6
    assert held[4] < 0.02


def test_gradients_on_their_way_back_are_those_of_differences(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import vanishing_gradients as example

    layer = nbrnn.LSTM(3, 4, dtype="float64", seed=0)
    x = np.random.default_rng(0).standard_normal((6, 3))
    norms = example.gradient_norms(layer, x)
    for back in (1, 3, 6):
        # The loss is the sum of the last four outputs, divided by 2: its differences for another h so many steps before
        state = layer(x[: 6 - back])[1] if back < 6 else (np.zeros((1, 4)), np.zeros((1, 4)))
        slopes = []
        for n in range(4):
            step = 1e-5 * np.eye(1, 4, n)
            ends = [layer(x[6 - back :], (state[0] + sign * step, state[1]))[0][-1].sum() / 2 for sign in (1, -1)]
            slopes.append((ends[0] - ends[1]) / 2e-5)
        assert norms[back - 1] == pytest.approx(np.linalg.norm(slopes), rel=1e-6)


def test_shapes_and_counts():
    out = run("shapes_and_counts.py")
    table = rows(out)
    # gates of 20 units: input 10, hidden 20, two biases; and what the cell has beside them
    totals = {
        "RNN": 640, "GRU": 3 * 640, "LSTM": 4 * 640, "LSTM without biases": 4 * 600, "peephole LSTM": 4 * 640 + 3 * 20,
        "LSTM projected to 5": 4 * 20 * (10 + 5 + 2) + 5 * 20, "coupled LSTM (CIFG)": 3 * 640, "minGRU": 2 * 20 * 11,
    }  # fmt: skip
    assert {name: table[name][-1] for name in totals} == totals
    assert re.search(r"^2 layers +\(5, 3, 20\) +\(2, 3, 20\) +\(2, 3, 20\)$", out, re.M)
    assert re.search(r"^2 layers, 2 directions +\(5, 3, 40\) +\(4, 3, 20\) +\(4, 3, 20\)$", out, re.M)
    assert re.search(r"^2 layers, projected to 5 +\(5, 3, 5\) +\(2, 3, 5\) +\(2, 3, 20\)$", out, re.M)
    assert re.search(r"^weight_ih_l1_reverse +\(80, 40\)$", out, re.M)


def test_odyssey():
    out = run("odyssey.py", "--seeds", "2", "--steps", "400")
    table = rows(out)
    # parameters, mean, standard error, solved, seeds
    assert len(table) > 8
    assert table["GRU"][1] < 0.02 < 0.1 < table["RNN"][1] < 0.25
    assert table["coupled gates (CIFG)"][1] < table["LSTM"][1]
    assert (table["GRU"][3], table["RNN"][3]) == (2, 0)
    assert table["LSTM"][0] == 4 * table["RNN"][0]


def test_own_cell():
    out = run("own_cell.py")
    table = rows(out)
    assert table["against finite differences"][0] < 1e-6
    errors = [table[str(step)][0] for step in (0, 50, 100, 200, 500)]
    assert errors[0] > 0.1
    assert errors[-1] < 0.01
    text = {line.split()[0]: [float(number) for number in line.split()[1:]] for line in out.splitlines()[-2:]}
    assert np.abs(np.subtract(text["target"], text["network"])).max() < 0.2


def test_tagger():
    out = run("tagger.py", "--sentences", "800")
    table = rows(out)
    # per cent of all words, of the ambiguous ones and of whole sentences that are right
    often = table["most frequent tag"]
    forward, both = table["LSTM, left to right"], table["LSTM, both directions"]
    assert all(a + 10 < b for a, b in zip(often, forward))
    assert all(a + 5 < b for a, b in zip(forward, both))
    assert both[0] > 95
    shortest, longest = map(int, re.search(r"(\d+) to (\d+) words", out).groups())
    assert shortest < 5 < 40 < longest


def test_vowels():
    table = rows(run("vowels.py", "--generated", "--seeds", "1"))
    (centroid,) = table["nearest centroid of means"]
    for pooling in ("last output", "mean", "maximum", "attention"):
        mean, worst, best = table[f"GRU, {pooling}"]
        assert centroid + 3 < mean == worst == best


def test_vowels_from_the_files_of_another_package(tmp_path):
    # Speaker n says the number n at every frame; the files of sktime are padded with zeros
    folder = tmp_path / "sktime" / "datasets" / "data" / "JapaneseVowels"
    folder.mkdir(parents=True)
    (tmp_path / "sktime" / "__init__.py").write_text("raise ImportError('nobody needs to import it')")
    for part, lengths in {"TRAIN": (7, 9, 29), "TEST": (8, 20)}.items():
        lines = [":".join([",".join([f"{n + c / 100}"] * L + ["0.0"] * (29 - L)) for c in range(1, 13)] + [f"{n}"])
                 for n in range(9) for L in lengths]  # fmt: skip
        (folder / f"JapaneseVowels_{part}.ts").write_text("\n".join(["@classLabel true 0 1", "@data", *lines, ""]))
    out = run("vowels.py", "--seeds", "1", PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert out.startswith("Japanese Vowels: 27 to learn from, 18 others;\n9 speakers, 12 channels, 7 to 29 frames\n")
    assert rows(out)["nearest centroid of means"] == [100]


def test_live_signal():
    out = run("live_signal.py", "--samples", "5000")
    table = rows(out)
    assert "the same bits as in one call: yes" in out
    # so many steps that took so long
    assert sum(int(count) for count in re.findall(r" us +(\d+)", out)) == 4999
    error, change, noise = map(float, re.search(r"error (.+), change (.+), noise (.+)", out).groups())
    assert noise < error < 2 * noise < change / 2
    # greatest average before, limit, samples until it was noticed, false alarms
    assert table["error of the network"][2] < 50
    assert table["error of the network"][3] == 0
    assert table["change from sample to sample"][2:] == [0]
    marked = [float(line.split()[1]) for line in out.splitlines() if "<- fault" in line]
    assert min(marked[1:]) > 1.2 * marked[0]  # which is that of the sample at which the fault begins


def test_live_signal_refuses_a_stream_without_room_for_the_fault():
    assert "--samples: expected at least 3000" in run("live_signal.py", "--samples", "2999", code=2)


def test_endless():
    out = run("endless.py", "--steps", "1000000")
    table = rows(out)
    best, last, variance = (table[name][0] for name in ("Kalman filter", "last value", "variance"))
    # error, steps/s, MB
    reports = [numbers for name, numbers in table.items() if re.fullmatch(r"[\d,]+", name)]
    assert len(reports) == 11
    assert best < last < variance
    assert 0.98 * best < reports[-1][0] < 1.03 * best
    start, end = map(float, re.search(r"updates (.+) MB, at the end (.+) MB", out).groups())
    assert end < start + 5


PLOTS = [("vanishing_gradients.py",), ("odyssey.py", "--seeds", "2", "--steps", "3")]


@pytest.mark.parametrize("command", PLOTS)
def test_a_plot(command, tmp_path):
    pytest.importorskip("matplotlib")
    run(*command, "--plot", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.parametrize("command", PLOTS)
def test_a_plot_without_matplotlib(command, tmp_path):
    # a folder in front of all others, in which matplotlib is broken
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    folders = os.pathsep.join([str(tmp_path), str(ROOT)])
    error = run(*command, "--plot", tmp_path / "a.png", code=1, PYTHONPATH=folders)
    assert error == "--plot needs matplotlib: pip install matplotlib\n"
