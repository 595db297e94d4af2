"""Products of integers: rounding and kernels against NumPy's, to the last bit; layers against the same in float64."""

import os
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import numba
import numpy as np
import oracle
import pytest
from test_half import ABLE, assert_same_bits, distance, normal
from test_recurrent import by_oracle, make_problem, unpack
from test_widths import PROCESSORS

import nbrnn
from nbrnn.kernels import amx, gemm, int8, tiles
from nbrnn.kernels.amx import BEHIND
from nbrnn.kernels.jit import OPTIONS
from nbrnn.kernels.memory import zeros
from nbrnn.kernels.products import INT8, pack_layer, round_matrix
from nbrnn.kernels.simd import FEATURES, IS_X86, VECTOR_BYTES, pointer

F4 = np.dtype("float32")
INVERSE = F4.type(1 / 127)


def rounded(x):
    """The integers of rows and their scales, each operation in float32."""
    scale = np.abs(x).max(axis=1, initial=0) * INVERSE
    inverse = np.divide(F4.type(1), scale, out=np.zeros_like(scale), where=scale > 0)
    assert inverse.dtype == F4
    return np.rint(x * inverse[:, None]).astype(int), scale


def as_rows(x, pieces=(0, 1, 0)):
    """A matrix as rows of integers, with memory behind its rows that no result may depend on."""
    first, count, step = pieces
    piece = x.shape[1] if count == 1 else step - 4
    out = zeros((len(x) + BEHIND, INT8.row(piece * count)), np.int8)
    out[len(x) :] = -1
    round_matrix(INT8)(2, x, first, step, piece, count, out)
    return out


def integers_of(rows, depth):
    """Integers and scales of rows."""
    # The lowest bytes of the difference: a byte without a sign holds up to 255.
    levels = (rows[:, :depth].astype(int) - int8.ZERO).astype(np.int8)
    at = int8.padded(depth)
    return levels.astype(int), np.ascontiguousarray(rows[:, at : at + 4]).view(F4)[:, 0]


def as_panels(weight):
    """Panels for a product with the transposed weight."""
    (N, K), P = weight.shape, gemm.padded(1, F4)
    panels, order = np.empty(INT8.panels(gemm.panels(N, F4), K, P), np.int8), gemm.plain_order(N, F4)
    panels[...] = -1
    nothing, none, vector = np.empty((0, 1), F4), np.empty((0, 0, P, 4), np.int8), np.empty(0, F4)
    bias = np.empty((len(panels), P), F4)
    pack_layer(INT8)(2, weight, order, panels, nothing, np.empty(0, np.int64), none, vector, vector, 0, bias)
    return panels


@numba.njit(**OPTIONS)
def run_product(kernel, a, b, depth, start, ld_start, c, rows, columns):
    lda, ldc = a.shape[1], c.shape[1]
    a, b, start, c = pointer(a, 0), pointer(b, 0), pointer(start, 0), pointer(c, 0)
    amx.begin()
    tiles.product(kernel, a, lda, b, depth, start, ld_start, c, ldc, rows, columns, b)
    amx.end()


def multiply(rows, panels, depth, start, out):
    """out = start + the product, panel by panel, with numbers around each result that have to stay."""
    P, depth = panels.shape[2], int8.padded(depth)
    for j, panel in enumerate(panels):
        columns = min(P, out.shape[1] - j * P)
        here = np.full((len(out) + 1, P + 2), 7, F4)
        run_product(int8.product_kernel(4), rows, panel, depth, start[j * P :], 0, here, len(out), columns)
        assert (here[len(out) :] == 7).all()
        assert (here[:, columns:] == 7).all()
        out[:, j * P : j * P + columns] = here[: len(out), :columns]


# ------------------------------------------------------------------ kernels


def test_rows_are_rounded_to_the_nearest_and_ties_to_even():
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.49, -126.51], [-254, 1, 3, 5, -1, -3, 253, 0]], F4)
    levels, scales = integers_of(as_rows(x)[:2], 8)
    assert scales.tolist() == [1, 2]
    assert levels.tolist() == [[127, 0, 2, 2, 0, -2, 126, -127], [-127, 0, 2, 2, 0, -2, 126, 0]]


@pytest.mark.parametrize("K", [1, 15, 16, 63, 64, 65, 300])
def test_rows_have_scales_of_their_own(K):
    x = normal(50, K) * np.exp(20 * normal(50, 1, seed=1))
    rows = as_rows(x)
    for got, want in zip(integers_of(rows[:50], K), rounded(x)):
        np.testing.assert_array_equal(got, want)
    assert np.abs(integers_of(rows[:50], K)[0]).max() == 127
    assert (rows[50:] == -1).all()


def test_pieces_of_rows_are_put_side_by_side():
    x = normal(5, 60)
    whole = np.concatenate([x[:, 2 + 20 * n :][:, :16] for n in range(3)], axis=1)
    for got, want in zip(integers_of(as_rows(x, (2, 3, 20))[:5], 48), rounded(whole)):
        np.testing.assert_array_equal(got, want)


def test_what_has_no_scale():
    """Zeros have the scale 0, and what is no number has the scale NaN, in whatever lane it stands."""
    largest = np.finfo(F4).max
    x = normal(40, 70)
    x[0], x[1], x[2] = 0, 1e-40, 1e-36
    x[3, 69], x[4, 0], x[5, 33], x[6, 64] = np.nan, np.inf, -np.inf, largest
    x[7] = largest
    x[8, :2] = np.inf, np.nan
    levels, scales = integers_of(as_rows(x)[:40], 70)
    assert (scales[:3] == 0).all()
    assert (levels[:3] == 0).all()
    assert np.isnan(scales[[3, 4, 5, 8]]).all()
    assert (levels[7] == 127).all()
    assert levels[6].tolist() == [0] * 64 + [127] + [0] * 5
    np.testing.assert_array_equal(scales[6:8], largest * INVERSE)
    assert np.isfinite(scales[9:]).all()


@pytest.mark.parametrize("K", [1, 31, 64, 65, 300])
def test_packed_panels_hold_the_integers_in_fours(K):
    weight = normal(70, K) * np.exp(normal(70, 1, seed=1))
    weight[3], weight[5, 0] = 0, np.nan
    panels, depth = as_panels(weight), int8.padded(K)
    J, _, P, _ = panels.shape
    # [J, fours, P, 4] -> [fours, 4, J, P]
    levels, scales = rounded(np.delete(weight, 5, axis=0))
    flat = np.delete(panels[:, : depth // 4].transpose(1, 3, 0, 2).reshape(depth, J * P), 5, axis=1)
    want = np.zeros(flat.shape)
    want[:K, :69] = levels.T
    np.testing.assert_array_equal(flat, want)
    behind = np.ascontiguousarray(panels[:, depth // 4 :]).view(F4)[..., 0]
    found, beginning = behind[:, 0].ravel(), behind[:, 1].copy().view(np.int32).ravel()
    assert np.isnan(found[5])
    np.testing.assert_array_equal(np.delete(found, 5)[:69], scales)
    assert (found[70:] == 0).all()
    np.testing.assert_array_equal(np.delete(beginning, 5), -128 * want.sum(axis=0))


@pytest.mark.parametrize(
    ("M", "K", "N"), [(1, 5, 3), (7, 33, 70), (16, 64, 64), (17, 65, 64), (40, 100, 130), (150, 520, 65)]
)
def test_products_are_those_of_the_integers_to_the_last_bit(M, K, N):
    x, weight, start = normal(M, K), normal(N, K, seed=1), normal(gemm.padded(N, F4), seed=2)
    weight *= np.exp(normal(N, 1, seed=3))
    (left, row_scales), (right, scales) = rounded(x), rounded(weight)
    want = start[:N] + row_scales[:, None] * scales * (left @ right.T).astype(F4)
    rows, panels, out = as_rows(x), as_panels(weight), np.empty((M, N), F4)
    multiply(rows, panels, K, start, out)
    assert_same_bits([out], [want])
    # A row alone has the bits that it has among others.
    alone = np.empty((1, N), F4)
    multiply(as_rows(x[-1:]), panels, K, start, alone)
    assert_same_bits([alone], [want[-1:]])


@pytest.mark.parametrize("vectors", [1, 2, 3, 4])
def test_panels_of_every_width_and_results_in_place(vectors):
    K, M, P = 70, 35, tiles.panel_width(vectors, F4)
    x, weight = normal(M, K), normal(P, K, seed=1)
    panel, none, vector = np.empty(INT8.panels(1, K, P), np.int8), np.empty((0, 0, P, 4), np.int8), np.empty(0, F4)
    nothing, bias = np.empty((0, 1), F4), np.empty((1, P), F4)
    pack_layer(INT8)(1, weight, np.arange(P), panel, nothing, np.empty(0, np.int64), none, vector, vector, 0, bias)
    (left, row_scales), (right, scales) = rounded(x), rounded(weight)
    for M in (1, 16, 17, 32, 33, 35):
        out = normal(M, P, seed=2)
        want = out + row_scales[:M, None] * scales * (left[:M] @ right.T).astype(F4)
        run_product(int8.product_kernel(vectors), as_rows(x), panel[0], int8.padded(K), out, P, out, M, P)
        assert_same_bits([out], [want])


def test_sums_are_exact_where_those_of_float32_are_not():
    K = 4001
    x, weight = np.full((3, K), 127, F4), np.full((5, K), 127, F4)
    # 127 127 2000 needs 25 bits; what is left of it in the end is small.
    x[:, 2000:4000] = -127
    x[:, 4000] = 1, 3, 5
    weight[:, 4000] = range(5)
    out = np.empty((3, 5), F4)
    multiply(as_rows(x), as_panels(weight), K, zeros((gemm.padded(5, F4),), F4), out)
    np.testing.assert_array_equal(out, np.outer([1, 3, 5], range(5)))


def test_the_largest_sum_does_not_overflow():
    K = int8.DEEPEST
    for sign in (1, -1):
        x, weight, out = np.full((1, K), 127, F4), np.full((1, K), 127 * sign, F4), np.empty((1, 1), F4)
        multiply(as_rows(x), as_panels(weight), K, zeros((gemm.padded(1, F4),), F4), out)
        assert out[0, 0] == F4.type(sign * 127 * 127 * K)


KERNELS = "rows_are or rows_have or what_has or packed or products_are or every_width or sums_are or largest"


def test_the_kind_of_kernel_is_one_that_the_host_has():
    vnni = "avx512vnni" in FEATURES and VECTOR_BYTES == 64
    assert int8.KIND == ("amx" if amx.available("int8") else "vnni" if vnni else "wide")
    assert f"products of int8-{int8.KIND}\n" in nbrnn.GRU(2, 3, products="int8").explain(4, 2)


# ------------------------------------------------------------------ other kinds of kernels

# The tests above, and then the results of a layer
SCRIPT = """
import sys
import numpy as np
import pytest
import nbrnn
from nbrnn.kernels import int8, simd
assert (int8.KIND, simd.VECTOR_BYTES, int8.HAS_PAIRS) == (sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1")
code = pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[4:]])
layer = nbrnn.RNN(70, 150, products="int8", seed=0)
print(layer(np.random.default_rng(0).standard_normal((5, 20, 70)).astype("f4"))[0].tobytes().hex())
sys.exit(code)
"""
OWN = llvm.get_host_cpu_features().flatten() if IS_X86 else ""
HASWELL = PROCESSORS["haswell"][0] if IS_X86 else ""


def without(*features):
    return ",".join("-" + word[1:] if word[1:] in features else word for word in OWN.split(","))


# The processor's name (None: the host's), its features, and what it is to have: kernels, vectors, sums of pairs
OTHERS = {
    "vnni": (None, without("amx-int8"), ("vnni", "64", "1")),
    "avx512": ("skylake-avx512", HASWELL + ",+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl", ("wide", "64", "1")),
    "avx512f": ("knl", HASWELL + ",+avx512f,+avx512cd", ("wide", "64", "0")),
    "avx2": ("haswell", HASWELL, ("wide", "32", "1")),
    "sse": ("nehalem", PROCESSORS["nehalem"][0], ("wide", "16", "1")),
}


def host_can(features):
    wanted = {word[1:] for word in features.split(",") if word.startswith("+")}
    return wanted <= {name for name, there in llvm.get_host_cpu_features().items() if there}


@pytest.mark.skipif(not IS_X86, reason="the host is not x86, it has one kind of kernels")
@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_of_kernels_give_the_same_bits(name, tmp_path):
    """Integers, sums and scaled sums everywhere, whole layers where vectors are as wide."""
    cpu, features, kinds = OTHERS[name]
    if not host_can(features) or (name == "vnni" and "avx512vnni" not in FEATURES):
        pytest.skip(f"the host has no {name}")
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_CPU_FEATURES": features}
    environment |= {"NUMBA_CPU_NAME": cpu or llvm.get_host_cpu_name()}
    command = [sys.executable, "-c", SCRIPT, *kinds, __file__, "-k", KERNELS]
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100%" in done.stdout
    if int(kinds[1]) == VECTOR_BYTES:
        y, _ = nbrnn.RNN(70, 150, products="int8", seed=0)(normal(5, 20, 70))
        assert bytes.fromhex(done.stdout.split()[-1]) == y.tobytes()


# ------------------------------------------------------------------ layers


def near(x):
    """The nearest numbers to rows x that have few integers, in float64."""
    x = np.asarray(x, np.float64)
    scale = np.abs(x).max(axis=1, keepdims=True) / 127
    return np.rint(x / np.where(scale > 0, scale, 1)) * scale


@pytest.fixture
def rounding(monkeypatch):
    """The oracle with integers in all of its products."""

    def linear(p, which, v):
        return near(v) @ near(p[f"weight_{which}"]).T + p.get(f"bias_{which}", 0)

    monkeypatch.setattr(oracle, "linear", linear)


def by_inference(problem):
    y, state_n = problem.layer(problem.x, problem.state)
    return {"y": y, **{f"state_n {n}": array for n, array in enumerate(unpack(state_n))}}


PROBLEMS = [(cell, {}) for cell in ABLE]
PROBLEMS += [("lstm", {"num_layers": 2, "bidirectional": True}), ("gru", {"recurrent_dropout": 0.4, "zoneout": 0.3})]
PROBLEMS += [("gru", {"tokens": True}), ("lstm", {"tokens": True, "bias": False, "batch_first": True})]


@pytest.mark.parametrize(("cell", "options"), PROBLEMS, ids=str)
def test_results_agree_with_the_oracle_that_rounds(cell, options, rounding, request):
    problem = make_problem(cell, 5, 19, 37, 33, dtype="float32", products="int8", **options)
    # Rows and columns of very different sizes: a scale of another one would be seen.
    for name, view in problem.layer.params.items():
        if name.startswith("weight") and view.shape[0] > 1:
            view *= np.exp(normal(len(view), *[1] * (view.ndim - 1), seed=5) / 2)
    if problem.x.dtype == F4:
        problem.x[...] *= np.exp(normal(*problem.x.shape[:2], 1, seed=6))
    got, close = by_inference(problem), by_oracle(problem, training=False)
    request.getfixturevalue("monkeypatch").undo()
    far = by_oracle(problem, training=False)
    # A number at a tie goes up here and down there now and then, which is what the bound leaves room for.
    assert {name: error for name in got if (error := distance(got[name], close[name])) > 2e-3} == {}
    assert max(distance(got[name], far[name]) for name in got) > 2e-3


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_what_is_no_number_makes_no_plausible_one(kind, number):
    layer, x = getattr(nbrnn, kind)(9, 70, products="int8", seed=0), normal(6, 20, 9)
    want, _ = layer(x)
    x[3, 5, 7] = number
    y, _ = layer(x)
    assert np.isnan(y[3:, 5]).all()
    assert_same_bits([y[:3], np.delete(y, 5, axis=1)], [want[:3], np.delete(want, 5, axis=1)])
    state = [np.zeros((1, 20, 70), "f4") for _ in layer.cell.states]
    state[0][0, 5, 69] = number
    y, _ = layer(normal(6, 20, 9), state[0] if len(state) == 1 else tuple(state))
    assert np.isnan(y[:, 5]).all()
    assert_same_bits([np.delete(y, 5, axis=1)], [np.delete(want, 5, axis=1)])


def test_zeros_are_no_trouble():
    layer, x = nbrnn.RNN(9, 20, products="int8", seed=0), np.zeros((1, 3, 9), "f4")
    y, _ = layer(x)
    bias = layer.params["bias_ih_l0"] + layer.params["bias_hh_l0"]
    np.testing.assert_allclose(y, np.broadcast_to(np.tanh(bias), y.shape), rtol=1e-5)
    layer.params["weight_ih_l0"][:] = 0
    assert_same_bits([layer(normal(1, 3, 9))[0]], [y])


def test_new_parameters_are_taken():
    layer, x = nbrnn.LSTM(9, 20, products="int8", seed=0), normal(4, 3, 9)
    layer(x)
    layer.params.flat[:] = nbrnn.LSTM(9, 20, seed=1).params.flat
    want, _ = nbrnn.LSTM(9, 20, products="int8", seed=1)(x)
    assert_same_bits([layer(x)[0]], [want])


# ------------------------------------------------------------------ the edge


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"^products: expected None for float64, got 'int8'$"):
        nbrnn.LSTM(2, 3, dtype="float64", products="int8")
    for make in (lambda **how: nbrnn.LSTM(2, 3, proj_size=2, **how), lambda **how: nbrnn.JordanRNN(2, 3, **how),
                 lambda **how: nbrnn.LayerNormLSTM(2, 3, **how)):  # fmt: skip
        with pytest.raises(ValueError, match=r"^products: expected None for .*: it takes one product in a step$"):
            make(products="int8")
    with pytest.raises(ValueError, match=r"^products: expected None for sizes above 133144, got 'int8', whose sums"):
        nbrnn.LSTM(133_145, 1, products="int8")


@pytest.mark.parametrize("options", [{}, {"recompute": 2}])
def test_there_are_no_gradients(options):
    layer, x = nbrnn.LSTM(2, 3, products="int8", **options), normal(4, 2, 2)
    with pytest.raises(ValueError, match=r"^products: expected None or 'bfloat16' for gradients, got 'int8', which is"):
        layer.vjp(x)
    trainer = nbrnn.Trainer(layer, nbrnn.MSE(), nbrnn.SGD(0.1))
    with pytest.raises(ValueError, match="for gradients, got 'int8'"):
        trainer.step(x, np.zeros((4, 2, 3), "f4"))


def test_the_configuration_tells_of_it():
    layer = nbrnn.LSTM(3, 5, products="int8", seed=0)
    again, x = nbrnn.LSTM(**layer.config()), normal(4, 2, 3)
    again.params.flat[:] = layer.params.flat
    assert_same_bits([again(x)[0]], [layer(x)[0]])
