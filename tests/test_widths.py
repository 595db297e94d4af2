"""The vector widths that this host would not choose: the same tests in processes that compile for older processors."""

import os
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import pytest

from nbrnn.kernels.simd import IS_X86

pytestmark = pytest.mark.skipif(not IS_X86, reason="the host is not x86, its vectors are of one width")

BASE = "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt"
# Numba's names of a processor and its features, and the bytes in a vector
PROCESSORS = {
    "haswell": (BASE + ",+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+movbe", 32),
    "nehalem": (BASE, 16),
}

SCRIPT = """
import sys
import pytest
from nbrnn.kernels import simd
assert simd.VECTOR_BYTES == int(sys.argv[1]), simd.VECTOR_BYTES
assert simd.REGISTERS == 16
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""
TESTS = [
    "test_activations.py::test_errors_are_as_small_as_documented",
    "test_activations.py::test_special_values",
    "test_simd.py::test_load_many_and_store_many",
    "test_simd.py::test_nothing_beyond_the_count_is_touched",
    "test_tiles.py::test_product_equals_numpy_and_writes_nothing_else",
    "test_tiles.py::test_outer_equals_numpy_and_writes_nothing_else",
    "test_recurrent.py::test_all_results_agree_with_the_oracle",
    "test_recurrent.py::test_every_schedule_gives_the_same_bits",
]
# No more than is worth its compilation
CHOICES = [
    "test_activations or test_simd or test_tiles and float32",
    "test_recurrent and ([lstm-float64 or [gru-float64) and not tokens and not True",
]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Both processes at the same time, since most of what they do is compile on one core."""
    tests = Path(__file__).parent
    what = [*(str(tests / test) for test in TESTS), "-k", " or ".join(CHOICES)]
    started = {}
    for name, (features, width) in PROCESSORS.items():
        cache = {"NUMBA_CACHE_DIR": str(tmp_path_factory.mktemp(name))}
        environment = os.environ | cache | {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
        started[name] = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(width), *what],
            cwd=tests,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    yield started
    for process in started.values():
        process.kill()


@pytest.mark.parametrize("name", PROCESSORS)
def test_another_width_computes_the_same(name, processes):
    missing = [word[1:] for word in PROCESSORS[name][0].split(",") if not llvm.get_host_cpu_features().get(word[1:])]
    if missing:
        pytest.skip(f"the host has no {', '.join(missing)}")
    output, _ = processes[name].communicate(timeout=300)
    assert processes[name].returncode == 0, output
