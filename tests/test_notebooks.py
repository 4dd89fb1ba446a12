"Every notebook runs top to bottom, each in a process of its own"
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from gausssafe.warm import close_warm, spawn_warm

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").glob("*.ipynb"))
IMPORTS = ("torch", "pennylane", "numba", "matplotlib.pyplot", "scipy.stats", "sklearn.metrics", "pandas", "nbclient", "papermill")
ENVIRONMENT = dict(os.environ) | {"MPLBACKEND": "agg", "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])}


@pytest.fixture(scope="module", autouse=True)
def no_parent_left():
    "Other tests measure this process with all its children"
    yield
    close_warm()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path):
    command = [sys.executable, "-c", "from notebook_runner import run; run()"]
    with (tmp_path / "log").open("wb") as log:
        process = spawn_warm(IMPORTS, "notebook_runner:run", log, ENVIRONMENT) or subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=ENVIRONMENT)
    with process.stdin as stdin: stdin.write(f"{path}\n".encode())
    try: code = process.wait(280)
    finally:
        with suppress(ProcessLookupError): process.kill()
    assert code == 0, (tmp_path / "log").read_text(errors="replace")[-8000:]
