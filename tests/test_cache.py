"""The cache of compiled code: a second process compiles nothing, an edited equation runs, and any place will do."""

import json
import shutil
from pathlib import Path

import pytest

import nbrnn

# ------------------------------------------------------------------ hits

# Everything that a model with tokens and numbers compiles, in training and at inference; then what the cache did
USE_EVERYTHING = """
import gc, json
import numpy as np
from numba.core.ccallback import CFunc
from numba.core.dispatcher import Dispatcher
import nbrnn

model = nbrnn.Sequential(nbrnn.LSTM(9, 40, 2, dtype="float64", seed=0), nbrnn.Linear(40, 9, dtype="float64", seed=0))
tokens = np.random.default_rng(0).integers(0, 9, (20, 40))
model(tokens)
trainer = nbrnn.Trainer(model, nbrnn.CrossEntropy(), nbrnn.Adam(1e-3), clip_norm=1.0)
trainer.step(tokens, tokens)
model(tokens)  # compares the weights with those of the first call
for products in "bfloat16", "int8":
    nbrnn.LSTM(9, 40, products=products, seed=0)(np.ones((3, 2, 9), np.float32))
y, _, pullback = nbrnn.LSTM(9, 40, products="bfloat16", seed=0).vjp(np.ones((3, 2, 9), np.float32))
pullback(y)

uses = {}
for entry in gc.get_objects():
    if isinstance(entry, Dispatcher) and entry.stats.cache_path:
        hits, misses = sum(entry.stats.cache_hits.values()), sum(entry.stats.cache_misses.values())
        if hits or misses:
            uses[f"{entry.py_func.__qualname__} {id(entry)}"] = hits, misses, entry.stats.cache_path
    elif isinstance(entry, CFunc):
        uses[f"{entry.__qualname__} {id(entry)}"] = entry.cache_hits, 1 - entry.cache_hits, entry._cache.cache_path
print(json.dumps(sorted((name.split()[0], *use) for name, use in uses.items())))
"""


def cache_files(uses):
    """The files of some entries: others may come from tests that run at the same time."""
    return {
        path: (path.stat().st_mtime_ns, path.stat().st_size)
        for name, *_, folder in uses
        for path in Path(folder).glob(f"*{name.rpartition('.')[2]}-*.nb?")
    }


def test_a_second_process_compiles_nothing(python):
    first = json.loads(python(USE_EVERYTHING))
    before = cache_files(first)
    assert len(before) >= 2 * len(first)
    assert {path.suffix for path in before} == {".nbi", ".nbc"}
    second = json.loads(python(USE_EVERYTHING))
    names = [name for name, *_ in second]
    assert names == [name for name, *_ in first]
    parts = "forward_scan-lstm backward_scan-lstm multiply gradient_with_tokens gradient-half fingerprint adam entropy"
    parts += " round_matrix-half round_matrix-int8 pack_layer-half pack_layer-int8"
    for part in parts.split():
        assert any(part in name for name in names), part
    assert [(name, misses) for name, _, misses, _ in second if misses] == []
    assert all(hits for _, hits, _, _ in second)
    assert cache_files(second) == before


def test_sources_and_byte_code_find_the_same_entries(python, tmp_path):
    """What Numba knows a kernel by must not change when Python has written its byte code."""
    folder = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    from_sources, from_byte_code = (json.loads(python(USE_EVERYTHING, **folder)) for _ in range(2))
    assert list(tmp_path.rglob("scan.*.pyc"))
    names = [name for name, *_ in from_byte_code]
    assert names == [name for name, *_ in from_sources]
    assert any("forward_scan-lstm" in name for name in names)
    assert [name for name, _, misses, _ in from_byte_code if misses] == []


# ------------------------------------------------------------------ edits, in a copy of the package that is read-only

CELL = """
from nbrnn.cells.cell import Cell

def forward(gates, prev):
    return (2.0 * gates[0],), ()

def backward(dnew, kept, prev, new):
    return (2.0 * dnew[0],), (0.0,)

OWN = Cell("own", ("a",), ("h",), forward, backward)
"""
RELU = """
import nbrnn
from nbrnn.cells.cell import CELLS
cell = CELLS["elman_relu"]
"""
TANH = RELU.replace("relu", "tanh")
OWN = """
import nbrnn
from own import OWN
cell = OWN
"""
# With weights of one and no bias, y of the first step is the cell's function of the sum of x.
FIRST_STEP = """
import numpy as np
layer = nbrnn.Recurrent(cell, 3, 1, bias=False, dtype="float64")
layer.params.flat[:] = 1
print(layer(np.ones((1, 1, 3)))[0].item())
"""
NORM = """
import numpy as np
from nbrnn.training.clipping import global_norm
print(global_norm(np.full(100, 3.0)))
"""
UPDATE = """
import nbrnn, numpy as np
params = np.full(100, 5.0)
nbrnn.SGD(1.0).step(params, np.full(100, 3.0))
print(params[0])
"""
EDITS = {
    "a cell": (RELU + FIRST_STEP, 3, "nbrnn/cells/elman.py", "(f(a),)", "(4.0 * f(a),)", 12),
    "a function that cells share": (
        *(TANH + FIRST_STEP.replace("= 1", "= 10"), 1, "nbrnn/kernels/activations.py"),
        *("return e / (e + 2.0)", "return 2.0 * (e / (e + 2.0))", 2),
    ),
    "a user's cell": (OWN + FIRST_STEP, 6, "own.py", "2.0 * gates[0]", "4.0 * gates[0]", 12),
    "a function of training": (
        *(NORM, 30, "nbrnn/training/clipping.py", "= lane_sum(total)", "= 4.0 * lane_sum(total)", 60),
    ),
    "an optimizer": (UPDATE, 2, "nbrnn/training/optimizers.py", "return p - lr * g, ()", "return p + lr * g, ()", 8),
}


@pytest.fixture(scope="module")
def install(tmp_path_factory):
    """A copy of the package that nobody can write compiled code to, not even root: files stand where folders would."""
    root = tmp_path_factory.mktemp("install")
    shutil.copytree(Path(nbrnn.__file__).parent, root / "nbrnn", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "own.py").write_text(CELL)
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        (folder / "__pycache__").touch()
    return root


@pytest.fixture(scope="module")
def installed(install, python, tmp_path_factory):
    """Run code with this copy; the cache is the user's."""
    user = str(tmp_path_factory.mktemp("user"))

    def run(code, **variables):
        variables = {"XDG_CACHE_HOME": user, "NUMBA_CACHE_DIR": ""} | variables
        return float(python(code, folders=[str(install)], **variables))

    run.user = Path(user)
    return run


@pytest.mark.parametrize(("code", "before", "file", "old", "new", "after"), EDITS.values(), ids=EDITS)
def test_an_edit_is_compiled_again(code, before, file, old, new, after, install, installed):
    assert installed(code) == before
    source = (install / file).read_text()
    assert source.count(old) == 1
    try:
        (install / file).write_text(source.replace(old, new))
        assert installed(code) == after
    finally:
        (install / file).write_text(source)
    assert installed(code) == before


def test_a_read_only_install_uses_the_cache_of_the_user(install, installed):
    assert installed(NORM) == 30
    assert list(installed.user.rglob("*.nbi"))
    assert not list(install.rglob("*.nb?"))


def test_where_nothing_can_be_written_it_still_works(installed, tmp_path):
    nowhere = tmp_path / "file"
    nowhere.touch()
    assert installed(NORM, XDG_CACHE_HOME=str(nowhere / "cache"), HOME=str(nowhere)) == 30


def test_a_cache_folder_of_ones_own(installed, tmp_path):
    assert installed(NORM, NUMBA_CACHE_DIR=str(tmp_path)) == 30
    assert list(tmp_path.rglob("*.nbi"))


# ------------------------------------------------------------------ processors


def test_code_for_one_processor_is_not_run_on_another(python, tmp_path):
    """One cache folder may serve several machines."""
    code = NORM + "\nfrom nbrnn.training import clipping\nfrom nbrnn.kernels import simd\nprint(simd.VECTOR_BYTES)"
    results = {}
    for name, variables in {"host": {}, "generic": {"NUMBA_CPU_NAME": "generic"}, "host again": {}}.items():
        results[name] = python(code, NUMBA_CACHE_DIR=str(tmp_path), **variables).split()
    assert results["host"] == results["host again"]
    assert results["host"][0] == results["generic"][0] == "30.0"
