"""The house: imports go down its floors, kernels know no cell, and importing the package brings nothing heavy."""

import ast
import re
from pathlib import Path

import pytest

import nbrnn
from nbrnn.cells.cell import CELLS

ROOT = Path(nbrnn.__file__).parent
FLOORS = {
    "kernels": 0,
    "cells": 1,
    "data": 1,
    "layers": 2,
    "training": 3,
    "text": 4,
    "bench": 5,
    "cli": 6,
    "__main__": 7,
}
# The public names come from every floor but the command line.
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]
EACH_FILE = pytest.mark.parametrize("path", FILES, ids=NAMES)


def room(module):
    """The part of a module's name that says which floor it is on: nbrnn.kernels.jit -> kernels."""
    return module.split(".")[1] if "." in module else ""


def imports(source):
    """The modules of the package that a file imports anywhere."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from nbrnn import kernels` imports a room, `from nbrnn import LSTM` everything
            names = [f"nbrnn.{a.name}" if node.module == "nbrnn" else node.module for a in node.names]
        else:
            continue
        yield from (name for name in names if name == "nbrnn" or name.startswith("nbrnn."))


def upward(source, own):
    """Imports that lead to a higher floor, or to another room of the same one."""
    found = []
    for module in imports(source):
        other = room(module)
        # The package itself stands above all floors but the command line.
        floor = FLOORS.get(other, FLOORS["text"])
        if other != own and floor >= FLOORS[own]:
            found.append(module)
    return found


def own_room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@EACH_FILE
def test_imports_go_down_the_floors(path):
    assert own_room(path) in FLOORS, "a new room needs a floor"
    assert upward(path.read_text(), own_room(path)) == []


def test_an_import_that_goes_up_is_found():
    assert upward("from nbrnn.cells import lstm", "kernels") == ["nbrnn.cells"]
    assert upward("def f():\n    import nbrnn.training.losses", "layers") == ["nbrnn.training.losses"]
    assert upward("from nbrnn import cells", "kernels") == ["nbrnn.cells"]
    assert upward("from nbrnn import LSTM", "layers") == ["nbrnn.LSTM"]
    assert upward("import nbrnn", "training") == ["nbrnn"]
    assert upward("from nbrnn.data import windows", "cells") == ["nbrnn.data"]
    assert upward("from nbrnn.kernels import jit\nfrom nbrnn.layers.module import Module", "layers") == []


# One file a cell, beside what they are all made of
CELL_FILES = sorted(
    path
    for path in (ROOT / "cells").glob("*.py")
    if path.name not in ("__init__.py", "cell.py", "equations.py", "activation.py", "program.py")
)


def words(source):
    """Every word of the code: names, attributes and strings, but no comments and no documentation."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0].value.value = ""
    return set(re.findall("[a-z]+", ast.unparse(tree).lower()))


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.name)
def test_kernels_mention_no_cell(path):
    cells = {part for path in CELL_FILES for part in path.stem.split("_")} - {"coupled"}
    assert {"lstm", "gru", "elman", "jordan"} <= cells
    assert words(path.read_text()) & cells == set()
    assert words("'''An LSTM.'''\nx = lstm_scan  # a GRU") & cells == {"lstm"}


def test_a_cell_is_one_file_and_knows_no_other():
    for path in CELL_FILES:
        found = set(imports(path.read_text()))
        assert found & {"nbrnn.cells.cell"}, path.name
        assert found <= {"nbrnn.cells.cell", "nbrnn.cells.equations"}, path.name
    assert {cell.forward.__module__ for cell in CELLS.values()} == {f"nbrnn.cells.{path.stem}" for path in CELL_FILES}


def test_importing_the_package_brings_nothing_heavy(python):
    loaded = set(python("import sys, nbrnn; print(*sys.modules)").split())
    assert "numba" in loaded
    for name in ("scipy.stats", "scipy.special", "torch", "tqdm", "matplotlib", "nbrnn.text", "nbrnn.cli"):
        assert name not in loaded
