"""The command line as its users meet it: a process with arguments, output and an exit code."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nbrnn import cli
from nbrnn.cells.cell import CELLS
from nbrnn.text import language_model
from nbrnn.training.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[1]
TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40
TINY = ["--hidden", "8", "--steps", "10", "--batch", "4", "--epochs", "2"]


def start(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen([sys.executable, "-m", "nbrnn", *map(str, arguments)], **pipes, **options)


def nbrnn(*arguments, code=0, **options):
    """stdout and stderr of a command that must end with `code`."""
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out, err


def refuses(*arguments, **options):
    """The one line with which a command refuses its arguments."""
    out, err = nbrnn(*arguments, code=2, **options)
    assert out == ""
    assert err.count("\n") == 1, err
    return err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text").write_text(TEXT)
    (folder / "empty").write_bytes(b"")
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "short").write_text("too short")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    nbrnn("train", "text", *TINY, "--out", "model", cwd=folder)
    return folder / "model"


def arrays_of(path):
    return load_checkpoint(path)[0]


def same(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


# ------------------------------------------------------------------ what it does


@pytest.mark.parametrize("command", ["", "train", "generate", "evaluate", "bench", "info", "warmup"])
def test_help_fits_the_screen(command):
    out, _ = nbrnn(*command.split(), "--help")
    assert out.startswith("usage: nbrnn")
    assert max(map(len, out.splitlines())) <= 80


def test_training_shows_progress_baselines_a_sample_and_what_to_do_next(folder):
    out, err = nbrnn("train", "text", *TINY, "--out", "a b.safetensors", cwd=folder)
    assert max(map(len, (out + err).splitlines())) <= 80
    assert re.search(r"epoch 1: .*perplexity .*\nepoch 2: .*validation", err)
    rows = re.findall(r"^(character frequencies|character trigrams|this LSTM) +([\d.]+) +([\d.]+)$", out, re.M)
    assert [name for name, _, _ in rows] == ["character frequencies", "character trigrams", "this LSTM"]
    assert all(np.isclose(np.log2(float(perplexity)), float(bits), atol=0.02) for _, perplexity, bits in rows)
    assert "a sample" in out
    # The last line can be typed as it stands.
    command = out.splitlines()[-1].strip()
    assert command.startswith("nbrnn generate 'a b.safetensors'")
    words = command.replace("nbrnn", f"{sys.executable} -m nbrnn", 1)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("the ")
    assert len(done.stdout) == len("the ") + 500 + 1


def test_the_same_command_trains_the_same_model(folder, model):
    nbrnn("train", "text", *TINY, "--out", "again", "--threads", "1", cwd=folder)
    assert same(arrays_of(folder / "again"), arrays_of(model))
    nbrnn("train", "text", *TINY, "--out", "other", "--seed", "1", cwd=folder)
    assert not same(arrays_of(folder / "other"), arrays_of(model))


def test_options_reach_the_training(folder):
    options = ["--cell", "gru", "--layers", "2", "--embedding", "5", "--dropout", "0.25", "--dtype", "float64"]
    options += ["--optimizer", "sgd", "--lr", "0.5", "--schedule", "constant", "--clip", "0", "--level", "word"]
    nbrnn("train", "text", "text", *TINY, *options, "--validation", "0", "--out", "options", cwd=folder)
    arrays, meta = load_checkpoint(folder / "options")
    modules = dict(meta["config"]["model"]["modules"])
    assert (modules["GRU"]["num_layers"], modules["GRU"]["hidden_size"]) == (2, 8)
    assert modules["Embedding"]["embedding_dim"] == 5
    assert (modules["GRU"]["dropout"], modules["Dropout"]["p"]) == (0.25, 0.25)
    assert {array.dtype for name, array in arrays.items() if name.startswith("model.")} == {np.dtype("float64")}
    assert meta["config"]["optimizer"]["name"] == "SGD"
    assert meta["config"]["optimizer"]["lr"] == 0.5
    assert meta["config"]["schedule"] is None
    assert meta["config"]["clip_norm"] is None
    assert meta["extra"]["language_model"]["vocabulary"]["level"] == "word"
    assert [record["validation_loss"] for record in meta["history"]] == [None, None]


def test_generating(model):
    drawn, _ = nbrnn("generate", model, "--prompt", "the quick", "--length", "30", "--seed", "1")
    assert drawn.startswith("the quick")
    assert len(drawn) == len("the quick") + 30 + 1
    greedy, _ = nbrnn("generate", model, "--prompt", "the quick", "--length", "30", "--greedy")
    assert nbrnn("generate", model, "--prompt", "the quick", "--length", "30", "--top-k", "1")[0] == greedy
    assert nbrnn("generate", model, "--prompt", "the quick", "--length", "30", "--top-p", "0.000001")[0] == greedy
    assert nbrnn("generate", model, "--prompt", "the quick", "--length", "30", "--seed", "1")[0] == drawn


def test_evaluating(folder, model):
    from nbrnn.text import LanguageModel

    out, _ = nbrnn("evaluate", model, folder / "text")
    expected = LanguageModel.load(model).perplexity(TEXT)
    assert f"{expected:.3f} per character" in out
    assert f"{np.log2(expected):.3f}" in out
    assert f"{len(TEXT):,} characters" in out


def test_info_names_versions_the_machine_and_the_cache(model):
    import numba

    from nbrnn.kernels import simd

    out, _ = nbrnn("info")
    for words in [numba.__version__, np.__version__, simd.instruction_set(), f"{simd.VECTOR_BYTES} bytes"]:
        assert words in out
    folder = Path(re.search(r"^kept in +(.+)$", out, re.M)[1])
    size = sum(file.stat().st_size for file in folder.rglob("*.nb[ci]")) / 1e6
    assert np.isclose(float(re.search(r"^compiled code +([\d.]+) MB", out, re.M)[1]), size, rtol=0.1)
    assert size > 0.1
    cache = float(re.search(r"^second cache +([\d.]+) MB", out, re.M)[1])
    assert 0.1 < cache < 100
    for name in ["nbrnn", "Python", "SciPy", "llvmlite", "threads"]:
        assert re.search(rf"^{name} +\S", out, re.M)


def test_cells_lists_every_cell_and_the_documentation_has_the_same_table():
    out, _ = nbrnn("cells")
    assert all(re.search(rf"^{cell} +\w", out, re.M) for cell in CELLS)
    assert max(map(len, out.splitlines())) <= 80
    table, _ = nbrnn("cells", "--markdown")
    document = Path(__file__).parents[1] / "docs" / "cells.md"
    assert document.read_text().endswith(table), "run: nbrnn cells --markdown"


def test_every_cell_of_language_models_is_on_the_command_line():
    assert tuple(language_model.CELLS) == cli.CELLS


@pytest.mark.slow
def test_after_warmup_nothing_is_left_to_compile(folder, tmp_path, monkeypatch):
    # Numba writes a file for every function and signature: trainings in the warm cache must not add one.
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    out, _ = nbrnn("warmup")
    assert all(re.search(rf"^{cell} +[\d.]+ s$", out, re.M) for cell in ("lstm", "gru", "elman_tanh"))
    before = sorted(tmp_path.rglob("*.nbc"))
    assert before
    for options in ["--cell lstm --layers 2", "--cell gru --embedding 4 --dropout 0.1", "--cell rnn --optimizer sgd"]:
        nbrnn("train", "text", *TINY, *options.split(), "--out", "warm", cwd=folder)
        nbrnn("generate", "warm", "--length", "5", cwd=folder)
    assert sorted(tmp_path.rglob("*.nbc")) == before


# ------------------------------------------------------------------ interrupted and resumed


def test_ctrl_c_saves_and_resume_goes_on_with_the_same_bits(folder):
    options = ["text", "--hidden", "16", "--steps", "4", "--batch", "2", "--epochs", "40"]
    nbrnn("train", *options, "--out", "through", cwd=folder)

    process = start("train", *options, "--out", "broken", cwd=folder)
    for line in process.stderr:
        if line.startswith("epoch 2:"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    command = out.splitlines()[-1].split()
    assert command == ["nbrnn", "train", "--resume", "broken"]
    interrupted = load_checkpoint(folder / "broken")[1]
    assert 2 <= interrupted["epoch"] < 40

    out, err = nbrnn(*command[1:], cwd=folder)
    assert "resuming in epoch" in out
    assert f"epoch {interrupted['epoch'] + 1}:" in err
    assert "epoch 1:" not in err
    assert same(arrays_of(folder / "broken"), arrays_of(folder / "through"))

    out, err = nbrnn("train", "--resume", "broken", "--out", "copy", cwd=folder)
    assert "a sample" in out
    assert same(arrays_of(folder / "copy"), arrays_of(folder / "through"))


# ------------------------------------------------------------------ what it refuses


def test_a_training_that_fails_says_so_in_one_line(folder):
    out, err = nbrnn("train", "text", *TINY, "--lr", "1e38", "--clip", "0", "--out", "failed", code=1, cwd=folder)
    assert err.splitlines()[-1].startswith("nbrnn train: error: step ")
    assert "the loss is" in err or "gradient" in err
    assert "Go on" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "COMMAND"),
        ("fly", "fly"),
        ("train --hiden 5", "--hiden"),
        ("train --hid 5", "--hid"),
        ("train --hidden none", "--hidden: expected an integer at least 1, got 'none'"),
        ("train --hidden 0", "--hidden: expected an integer at least 1, got '0'"),
        ("train --lr 0", "--lr: expected a number above 0, got '0'"),
        ("train --lr nan", "--lr: expected a number above 0, got 'nan'"),
        ("train --dropout 1", "--dropout: expected a number at least 0, below 1, got '1'"),
        ("train --cell elman", "--cell"),
        ("train text --threads 1000", "threads"),
        ("train missing", "missing: cannot be read (No such file or directory)"),
        ("train text missing", "missing: cannot be read"),
        ("train empty", "empty: expected text, got an empty file"),
        ("train binary", "binary: expected text, got a binary file"),
        ("train short", "one batch of 32 windows of"),
        ("train text --steps 20 --validation 0.999", "windows of 20 steps needs 641 tokens, got 2"),
        ("train text --steps 20 --validation 0.001", "validation: expected at least 3 chars held out"),
        ("train text --out no/such/folder", "--out: cannot write to no/such/folder (No such file or directory)"),
        ("train text --out .", "--out: expected a file, got the folder ."),
        ("train text --out text", "--out: expected a file of its own"),
        ("train text --out text/model", "--out: cannot write to text/model"),
        ("train --resume missing", "missing"),
        ("train --resume text", "text: not a checkpoint"),
        ("train --resume model --hidden 9", "--hidden: a resumed training keeps its settings"),
        ("train --resume model short", "another text"),
        ("generate", "MODEL"),
        ("generate missing", "missing"),
        ("generate text", "text: not a checkpoint"),
        ("generate truncated", "truncated: "),
        ("generate model --temperature 0", "--temperature: expected a number above 0"),
        ("generate model --top-p 1.5", "top_p"),
        ("generate model --length -5", "--length: expected an integer at least 1"),
        ("evaluate model", "TEXT"),
        ("evaluate model binary", "binary file"),
        ("evaluate text text", "text: not a checkpoint"),
        ("warmup --dtype float16", "--dtype"),
        ("bench --threads 0", "--threads"),
        ("bench --threads 1000", "--threads"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(folder, model, arguments, words):
    whole = model.read_bytes()
    (folder / "truncated").write_bytes(whole[: len(whole) // 2])
    message = refuses(*arguments.split(), cwd=folder)
    assert message.startswith("nbrnn")
    assert words in message
    assert model.read_bytes() == whole
    assert (folder / "text").read_text() == TEXT


def test_a_failed_training_leaves_the_old_model_and_no_remains(folder, model):
    before = model.read_bytes(), sorted(folder.iterdir())
    refuses("train", "short", "--out", "model", cwd=folder)
    assert (model.read_bytes(), sorted(folder.iterdir())) == before


def test_a_reader_that_has_seen_enough_is_no_error(folder, model):
    process = start("generate", model, "--length", "3000", "--seed", "0")
    process.stdout.read(10)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=600) == 0, err
    assert err == ""


# ------------------------------------------------------------------ examples


def example(name, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "examples" / name, *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def test_the_example_in_numpy_finds_the_fault():
    out = example("embed_in_numpy.py")
    usual, largest, where = re.search(r"error ([\d.]+); largest ([\d.]+) at (\d+)", out).groups()
    assert 3500 <= int(where) <= 3505
    assert float(largest) > 5 * float(usual)


def test_the_example_of_the_book_reads_any_text(folder):
    # A text of 1,800 characters becomes 1,720 without newlines: windows of 35 steps by 32 rows make one batch an epoch.
    out = example("time_machine.py", folder / "text", "--cell", "rnn", "--epochs", "2")
    assert re.search(r"rnn, random windows: perplexity [\d.]+, [\d,]+ tokens/s\n    time traveller", out)
    assert "rnn, sequential windows" in out
