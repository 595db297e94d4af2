"""Products of half width: rounding, kernels and layers against the same in float64 with rounded factors."""

import os
import subprocess
import sys

import llvmlite.binding as llvm
import numpy as np
import oracle
import pytest
from test_gemm import SHARDS, some_order
from test_recurrent import by_layer, by_oracle, by_threes, make_problem
from test_widths import PROCESSORS

import nbrnn
from nbrnn.cells.cell import CELLS
from nbrnn.kernels import gemm, half, half_gemm, schedule
from nbrnn.kernels.amx import BEHIND
from nbrnn.kernels.memory import zeros
from nbrnn.kernels.products import HALF, pack_layer, round_matrix
from nbrnn.kernels.simd import IS_X86

F4 = np.dtype("float32")


def rounded(x):
    """To 8 bits of mantissa, ties to even, by the definition: through the distances of neighbours."""
    x = np.asarray(x, np.float64)
    _, exponent = np.frexp(np.where(x == 0, 1, x))
    unit = np.ldexp(1.0, exponent - 8)
    return np.round(x / unit) * unit


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(F4)


def assert_same_bits(got, want):
    assert [array.tobytes() for array in got] == [array.tobytes() for array in want]


def widened(halves):
    return (halves.astype(np.uint32) << 16).view(F4)


def as_rows(x, pieces=(0, 1, 0)):
    """A matrix of half width, with memory behind its rows that no result may depend on."""
    first, count, step = pieces
    piece = x.shape[1] if count == 1 else step - 4
    out = zeros((len(x) + BEHIND, half.padded(piece * count)), np.uint16)
    out[len(x) :] = 0x7FC0
    round_matrix(HALF)(2, x, first, step, piece, count, out)
    return out


def as_panels(weight):
    """Panels for a product with the transposed weight, and for one with the weight."""
    (N, K), P = weight.shape, gemm.padded(1, F4)
    shapes = HALF.panels(gemm.panels(N, F4), K, P), HALF.panels(gemm.panels(K, F4), N, P)
    ahead, back = (np.empty(shape, np.uint16) for shape in shapes)
    none, nothing, no_order = np.empty((0, 0, P, 2), np.uint16), np.empty((0, 1), F4), np.empty(0, np.int64)
    bias = np.empty((len(ahead), P), F4)
    order = gemm.plain_order(N, F4)
    vector = np.empty(0, F4)
    pack_layer(HALF)(2, weight, order, ahead, nothing, no_order, none, vector, vector, 0, bias)
    half_gemm.pack_layer_back.entry(2, weight, np.arange(N), back, nothing, no_order, none)
    return ahead, back


# ------------------------------------------------------------------ kernels


def test_numbers_are_rounded_to_the_nearest_and_ties_to_even():
    # 1 + 2^-8 lies between 1 and 1 + 2^-7, 1 + 3 2^-8 between that and 1 + 2^-6
    known = {1.0: 0x3F80, 1 + 2**-8: 0x3F80, 1 + 3 * 2**-8: 0x3F82, 1 + 2**-8 + 2**-20: 0x3F81, -3.0: 0xC040,
             0.0: 0, np.inf: 0x7F80, -np.inf: 0xFF80, 3.3895314e38: 0x7F7F, 3.4e38: 0x7F80}  # fmt: skip
    halves = as_rows(np.array([list(known)], F4))[0, : len(known)]
    assert halves.tolist() == list(known.values())
    many = normal(50, 40) * np.exp(20 * normal(50, 40, seed=1))
    np.testing.assert_array_equal(widened(as_rows(many)[:50, :40]), rounded(many))


def test_nan_stays_nan():
    # With all its bits in the half that is cut off as well
    x = np.array([[np.nan, 1.0]], F4)
    x.view(np.uint32)[0, 0] = 0x7F800001
    assert np.isnan(widened(as_rows(x)[0, :2])).tolist() == [True, False]


def test_pieces_of_rows_are_put_side_by_side():
    x = normal(5, 60)
    halves = as_rows(x, (2, 3, 20))
    want = np.concatenate([rounded(x[:, 2 + 20 * n :][:, :16]) for n in range(3)], axis=1)
    np.testing.assert_array_equal(widened(halves[:5, :48]), want)


@pytest.mark.parametrize("K", [1, 31, 32, 33, 300])
def test_packed_panels_hold_the_rounded_weights_in_pairs(K):
    weight = normal(70, K)
    ahead, back = as_panels(weight)
    P = ahead.shape[2]
    # [J, pairs, P, 2] -> [pairs, 2, J, P]
    for panels, matrix in ((ahead, weight.T), (back, weight)):
        flat = widened(panels).transpose(1, 3, 0, 2).reshape(-1, len(panels) * P)
        want = np.zeros(flat.shape)
        want[: len(matrix), : matrix.shape[1]] = rounded(matrix)
        np.testing.assert_array_equal(flat, want)


@pytest.mark.parametrize(("M", "K", "N"), [(1, 5, 3), (7, 33, 70), (16, 64, 64), (40, 100, 130), (150, 520, 65)])
def test_products_are_those_of_the_rounded_factors(M, K, N):
    x, dy, weight = normal(M, K), normal(M, N, seed=1), normal(N, K, seed=2)
    ahead, back = as_panels(weight)
    start = normal(gemm.padded(max(N, K), F4), seed=3)
    for left, panels, matrix in ((x, ahead, weight.T), (dy, back, weight)):
        want = rounded(left) @ rounded(matrix) + start[: matrix.shape[1]]
        results = [np.full(want.shape, np.nan, F4) for _ in SHARDS]
        for shards, out in zip(SHARDS, results):
            half_gemm.multiply(shards, half.product_kernel(4), as_rows(left), panels, start, out)
        for out in results[1:]:
            assert_same_bits([out], results[:1])
        assert oracle.relative_error(results[0], want) < 3e-6
        # A row alone has the bits that it has among others.
        alone = np.full((1, want.shape[1]), np.nan, F4)
        half_gemm.multiply(1, half.product_kernel(4), as_rows(left[-1:]), panels, start, alone)
        assert_same_bits([alone], [results[0][-1:]])


@pytest.mark.parametrize(("M", "K", "N"), [(1, 5, 3), (33, 70, 20), (300, 65, 130), (700, 130, 64)])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("blank", [0, 1])
def test_weight_gradients_are_those_of_the_rounded_factors(M, K, N, add, blank):
    dy, table, before = normal(M, N), normal(2 * M, K, seed=1), normal(N, K, seed=2)
    for rows in (np.empty(0, np.int64), some_order(2 * M, M, np.random.default_rng(0)).clip(0)):
        x = table[rows] if len(rows) else table[1 : M + 1]
        want = rounded(dy)[blank:].T @ rounded(x)[blank:] + add * before
        first = None
        for shards in SHARDS:
            dw, db = before.copy(), np.ones(N, F4)
            side = table, 0 if len(rows) else K, K, rows, dw, db
            args = dy, gemm.runs_of(N, F4), 0, 0, add, blank, *side, *gemm.alone(F4)
            half_gemm.gradient(shards, half.product_kernel(4), *args)
            assert oracle.relative_error(dw, want) < 3e-6
            assert oracle.relative_error(db, dy.sum(axis=0, dtype="f8") + add) < 3e-6
            first = dw if first is None else first
            assert_same_bits([dw], [first])


SCRIPT = """
import sys
import pytest
from nbrnn.kernels import half, simd
assert (half.KIND, simd.VECTOR_BYTES) == (sys.argv[1], int(sys.argv[2])), (half.KIND, simd.VECTOR_BYTES)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[3:]]))
"""
OWN = llvm.get_host_cpu_features().flatten() if IS_X86 else ""
NO_TILES = OWN.replace("+amx", "-amx")
# The processor's name, its features, and what it is to have: kernels and vectors
OTHERS = {"pairs": (llvm.get_host_cpu_name(), NO_TILES, ("pairs", "64"))}
OTHERS |= {name: (name, features, ("wide", str(width))) for name, (features, width) in PROCESSORS.items()}


@pytest.mark.skipif(not IS_X86, reason="the host is not x86, it has one kind of kernels")
@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_of_kernels_compute_the_same(name, tmp_path):
    cpu, features, kinds = OTHERS[name]
    there = llvm.get_host_cpu_features()
    if not all(there.get(word[1:]) for word in features.split(",") if word.startswith("+")):
        pytest.skip(f"the host has no {name}")
    if name == "pairs" and not half.NATIVE:
        pytest.skip("the host has no products of pairs")
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_CPU_FEATURES": features}
    tests = "products_are or gradients_are or rounded_to or stays_nan"
    command = [sys.executable, "-c", SCRIPT, *kinds, __file__, "-k", f"({tests}) and not other"]
    done = subprocess.run(command, env=environment | {"NUMBA_CPU_NAME": cpu}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------ layers

ABLE = [name for name, cell in CELLS.items() if not (cell.second or cell.finish or cell.projection)]


@pytest.fixture
def rounding(monkeypatch):
    """The oracle with rounded factors in all of its products."""

    def linear(p, which, v):
        return rounded(v) @ rounded(p[f"weight_{which}"]).T + p.get(f"bias_{which}", 0)

    def linear_backward(p, grads, which, v, da):
        grads[f"weight_{which}"] += rounded(da).T @ rounded(v)
        if f"bias_{which}" in p:
            grads[f"bias_{which}"] += da.sum(axis=0)
        return rounded(da) @ rounded(p[f"weight_{which}"])

    monkeypatch.setattr(oracle, "linear", linear)
    monkeypatch.setattr(oracle, "linear_backward", linear_backward)


def distance(a, b):
    return np.linalg.norm(np.subtract(a, b, dtype="f8")) / max(np.linalg.norm(b), 1e-30)


PROBLEMS = [(cell, {}) for cell in ABLE]
PROBLEMS += [("lstm", {"num_layers": 2, "bidirectional": True}), ("gru", {"recurrent_dropout": 0.4, "zoneout": 0.3})]


@pytest.mark.parametrize(("cell", "options"), PROBLEMS, ids=str)
def test_results_agree_with_the_oracle_that_rounds(cell, options, rounding, request):
    problem = make_problem(cell, 5, 19, 37, 33, dtype="float32", products="bfloat16", **options)
    got, near = by_layer(problem), by_oracle(problem)
    request.getfixturevalue("monkeypatch").undo()
    far = by_oracle(problem)
    assert got.keys() == near.keys()
    # A number that lies at a tie goes up here and down there now and then, which is what the bound leaves room for.
    assert {name: error for name in got if (error := distance(got[name], near[name])) > 1e-3} == {}
    assert max(distance(got[name], far[name]) for name in got) > 1e-3


def test_gradients_block_by_block_differ_by_rounding_alone(monkeypatch):
    sizes = {"T": 7, "B": 19, "I": 37, "H": 33, "dtype": "float32", "products": "bfloat16"}
    want, problem = by_layer(make_problem("lstm", **sizes)), make_problem("lstm", **sizes)
    monkeypatch.setattr(schedule, "blocks_back", by_threes)
    got = by_layer(problem)
    assert {name: error for name in want if (error := distance(got[name], want[name])) > 1e-6} == {}


@pytest.mark.parametrize("rows", [0, 1, 7, 200])
@pytest.mark.parametrize("sizes", [(33, 100), (64, 5)], ids=str)
def test_a_linear_layer_is_a_product_of_rounded_factors(rows, sizes):
    layer, x = nbrnn.Linear(*sizes, products="bfloat16", seed=0), normal(rows, sizes[0])
    weight, dy = layer.params["weight"], normal(rows, sizes[1], seed=1)
    y, _, pullback = layer.vjp(x)
    dx, _, grads = pullback(dy)
    want = rounded(x) @ rounded(weight).T + layer.params["bias"]
    want = want, rounded(dy) @ rounded(weight), rounded(dy).T @ rounded(x), dy.sum(axis=0, dtype="f8")
    for got, known in zip((y, dx, grads["weight"], grads["bias"]), want):
        np.testing.assert_allclose(got, known, rtol=0, atol=3e-6 * max(1, np.abs(known).max(initial=0)))
    whole = nbrnn.Linear(*sizes, seed=0)(x)[0]
    assert rows == 0 or 1e-5 < np.abs(y - whole).max() < 0.05  # it does round
    assert_same_bits([layer(x)[0], layer.frozen()(x)], [y, y])
    for m in range(0, rows, 50):
        assert_same_bits([layer(x[m])[0], layer(x[m:])[0]], [y[m], y[m:]])
    again = nbrnn.Linear(**layer.config())
    again.load_state_dict(layer.state_dict())
    assert_same_bits([again(x)[0]], [y])


def test_training_goes_as_with_whole_products():
    """The adding problem in small: the same loss in the end, to a tenth of what was there in the beginning."""
    losses = {}
    for products in (None, "bfloat16"):
        layer = nbrnn.GRU(2, 24, products=products, seed=0)
        model = nbrnn.Sequential(layer, nbrnn.Linear(24, 1, seed=1))
        trainer = nbrnn.Trainer(model, nbrnn.MSE(), nbrnn.Adam(0.01))
        rng, found = np.random.default_rng(0), []
        for _ in range(150):
            x = rng.random((8, 32, 2)).astype("f4")
            x[:, :, 1] = 0
            x[[0, 5], :, 1] = 1
            target = np.cumsum(x[:, :, :1] * x[:, :, 1:], axis=0)
            found.append(trainer.step(x, target)[0])
        losses[products] = found
    first = losses[None][0]
    assert losses[None][-1] < first / 20
    assert abs(losses["bfloat16"][-1] - losses[None][-1]) < first / 10


# ------------------------------------------------------------------ the edge


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"^products: expected None, 'bfloat16' or 'int8', got 'float16'$"):
        nbrnn.LSTM(2, 3, products="float16")
    with pytest.raises(ValueError, match=r"^products: expected None or 'bfloat16', got 'int8'$"):
        nbrnn.Linear(2, 3, products="int8")
    with pytest.raises(ValueError, match=r"^products: expected None for float64, got 'bfloat16'$"):
        nbrnn.Linear(2, 3, dtype="float64", products="bfloat16")
    with pytest.raises(ValueError, match=r"^products: expected None for float64, got 'bfloat16'$"):
        nbrnn.LSTM(2, 3, dtype="float64", products="bfloat16")
    for make in (lambda **how: nbrnn.LSTM(2, 3, proj_size=2, **how), lambda **how: nbrnn.JordanRNN(2, 3, **how),
                 lambda **how: nbrnn.LayerNormLSTM(2, 3, **how)):  # fmt: skip
        with pytest.raises(ValueError, match=r"^products: expected None for .*: it takes one product in a step$"):
            make(products="bfloat16")
