"""The asv suites. Everything is compiled in `setup`, never in a timed body.

Importing this package decides which nbrnn is measured and where its compiled code is kept, so it comes before nbrnn.
"""

import hashlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1]


def _find_package() -> Path:
    """The folder of nbrnn: where Python finds it, else that of this checkout, which need not be installed."""
    if find_spec("nbrnn") is None:
        sys.path.insert(0, str(BENCHMARKS.parent))
    return Path(find_spec("nbrnn").origin).parent


def _commit() -> str:
    """The commit that asv has installed, or a hash of the sources where it has not: in an existing environment."""
    if "ASV_COMMIT" in os.environ:
        return os.environ["ASV_COMMIT"]
    digest = hashlib.blake2b(digest_size=20)
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


PACKAGE = _find_package()
# Numba knows a source by its time and size, and all files of a wheel have the same time: each commit has its own cache.
os.environ["NUMBA_CACHE_DIR"] = str(BENCHMARKS / ".asv" / "numba-cache" / _commit())
# asv takes the user's PYTHONPATH from its processes; ours shall find the same package.
os.environ["PYTHONPATH"] = str(PACKAGE.parent)
