"""What a user waits for before anything is computed."""

import os
import subprocess
import sys
import tempfile

STEP = """
import numpy as np, nbrnn
model = nbrnn.Sequential(nbrnn.LSTM(28, 64), nbrnn.Linear(64, 28))
trainer = nbrnn.Trainer(model, nbrnn.CrossEntropy(), nbrnn.SGD(1.0), clip_norm=1.0)
trainer.step(*np.zeros((2, 35, 32), np.int64))
"""


def run(code, cache=None):
    """Run a piece of Python in a new process, with its own compile cache if one is given."""
    environment = {"NUMBA_CACHE_DIR": cache} if cache else {}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | environment)


class StartUp:
    timeout = 300
    repeat = (3, 10, 5.0)

    def setup_cache(self):
        run(STEP)

    def time_import(self):
        run("import nbrnn")

    def time_first_step_from_cache(self):
        run(STEP)


class Cold:
    timeout = 300
    number, repeat, rounds, warmup_time = 1, 2, 1, 0

    def time_first_step_cold(self):
        with tempfile.TemporaryDirectory() as cache:
            run(STEP, cache)
