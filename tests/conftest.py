"""What all tests share: threads are put back, Hypothesis has no clock, and a fresh Python process is one call."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Where other processes want the cores too, OpenMP threads that spin while they wait make small regions very slow. This
# is read when the first region starts.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import nbrnn

# The first example compiles, and a compiled cell is slow to make and fast to run: no deadline, not too many examples.
settings.register_profile("few", deadline=None, max_examples=30)
settings.register_profile("ci", settings.get_profile("few"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "few")

# Files take turns on the cores. The longest begin; the last one finds in the cache what the first one has compiled,
# while side by side both would compile it.
ORDER = "recurrent", "cli", "half", "learning", "cells", "examples", "", "ragged"


def pytest_collection_modifyitems(items):
    def place(item):
        name = item.path.stem.removeprefix("test_")
        return ORDER.index(name if name in ORDER else "")

    items.sort(key=place)


@pytest.fixture(autouse=True)
def _threads_are_put_back():
    before = nbrnn.get_num_threads()
    yield
    nbrnn.set_num_threads(before)


@pytest.fixture(scope="session")
def python():
    """Call ``python(code, *arguments, VARIABLE=value)`` for what a fresh process prints; it has to end well."""
    folders = [str(Path(nbrnn.__file__).parents[1]), str(Path(__file__).parent)]

    def run(code, *arguments, folders=tuple(folders), **variables):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)} | variables
        command = [sys.executable, "-X", "faulthandler", "-c", code, *map(str, arguments)]
        # Not in a folder that holds the package, which would come before PYTHONPATH
        cwd = Path(__file__).parent
        process = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
        assert process.returncode == 0, f"exit code {process.returncode}\n{process.stdout}\n{process.stderr}"
        return process.stdout

    return run


def pytest_configure(config):
    """Listen to Ctrl-C, which some tests send: a runner in the background may have told its children to ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
