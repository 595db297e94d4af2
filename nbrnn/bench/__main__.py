"""``python -m nbrnn.bench ENGINE``: serve an engine's cases on standard input, for `processes.Engine`."""

import sys

from nbrnn.bench.engines import ENGINES
from nbrnn.bench.processes import serve

serve(ENGINES[sys.argv[1]])
