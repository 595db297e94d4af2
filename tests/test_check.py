"""`check_cell`: what it says of cells that are right, and of those that are wrong in one way each."""

import itertools

import pytest

import nbrnn
from nbrnn.cells.equations import where_less
from nbrnn.layers.recurrent import Recurrent

NUMBERS = itertools.count(1)


def forward(gates, prev, own, act):
    (a,), (t,) = gates, act
    return (t(a),)


def forward_with_kept(gates, prev, own, act):
    return forward(gates, prev, own, act), ()


def squared(gates, prev, own, act):
    (h,) = prev
    return h * h


def without_slope(dnew, kept, prev, new, own, act):
    (dh,) = dnew
    return (dh,), (0.0,)


def hides_nan(gates, prev, own, act):
    (a,), (t,) = gates, act
    return (t(where_less(-9.0, a, a, -9.0)),)


def another_each_time(gates, prev, own, act):
    (a,), (t,) = gates, act
    return (t(a * (1.0 + 1e-3 / next(NUMBERS))),)


def no_tuple(gates, prev, own, act):
    (a,), (t,) = gates, act
    return t(a)


def cell_of(name, forward, backward=None, **options):
    return nbrnn.Cell(name, ("a",), ("h",), forward, backward, activations=("tanh",), **options)


@pytest.mark.parametrize(("name", "options"), [
    ("one_product", {}),
    ("second_product_alone", {"second": ("a",), "operand": squared}),
])  # fmt: skip
def test_a_right_cell_gets_a_report(name, options):
    cell = cell_of(name, forward, **options)
    report = nbrnn.check_cell(cell)
    found = dict(report.rows)
    assert found["equations"].endswith("backward derived")
    assert float(found["against finite differences"].split()[-1]) < 1e-7
    assert found["NaN"] == "shows in its own row and in no other"
    lines = str(report).splitlines()
    assert lines[0] == f"cell {name}"
    assert len(lines) == 1 + len(report.rows)
    assert Recurrent(cell, 2, 3).output_size == 3


@pytest.mark.parametrize(("cell", "error", "words"), [
    (cell_of("slopeless", forward_with_kept, without_slope), ValueError,
     "slopeless: the gradient of .* is wrong, relative error"),
    (cell_of("hiding", hides_nan), ValueError, "hiding: a NaN in x is hidden, y has none"),
    (cell_of("changing", another_each_time), ValueError, "its equations differ from call to call"),
    (cell_of("bare", no_tuple), TypeError, "bare: expected forward to return"),
])  # fmt: skip
def test_what_is_wrong_is_said(cell, error, words):
    with pytest.raises(error, match=words):
        nbrnn.check_cell(cell)
