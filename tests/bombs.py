"""Ten ways to run out of memory and three to hang: the cells of each, its limits, and the line and the call that the autopsy must find.

The last cell of each is the one that dies.
"""
from typing import NamedTuple

import nbformat

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
# Report A's mistake, in a module of the user's own
METRICS = """import numpy as np


def sq_distances(x, y):
    return ((x[:, None, :] - y[None, :, :]) ** 2).sum(-1)


def rbf_kernel(x, y):
    return np.exp(-sq_distances(x, y))
"""


class Bomb(NamedTuple):
    cells: tuple[str, ...]
    line: int  # Of the last cell
    within: str = ""  # In the rest of the place
    limits: dict = {"memory_limit": "400MB"}


TIME = {"timeout_s": 8}  # A kernel on a busy machine needs some of it to start
BOMBS = {
    "torch operation": Bomb(("import torch\nx = torch.ones(40_000, 8)", "y = x + 1\nd = torch.cdist(x, y)"), 2, "functional.py:",
                            {"memory_limit": "1GB"}),
    "numpy": Bomb(("import numpy as np", "n = 50_000\na = np.full((n, n), 1.0)\nb = a.sum()"), 2, "numeric.py:"),
    "pandas": Bomb(("import pandas as pd\nleft = pd.DataFrame({'key': [0] * 20_000, 'a': 1})", "n = len(left)\nboth = left.merge(left, on='key')"),
                   2, " in "),
    "list": Bomb(("x = 1", "rows = []\nwhile True:\n    rows.append('x' * 100_000)"), 3),
    "recursion": Bomb(("import sys\nsys.setrecursionlimit(10**6)",
                       "def dive(depth, kept):\n    return dive(depth + 1, b'x' * 2_000_000)\n\ndive(0, b'')"), 2, "in dive"),
    "thread": Bomb(("import threading", "kept = []\ndef grow():\n    while True:\n        kept.append(b'x' * 1_000_000)\n\n"
                    "worker = threading.Thread(target=grow)\nworker.start()\nworker.join()"), 4, "in grow (in a thread)"),
    "child process": Bomb(("import subprocess, sys\ncode = \"kept = []\\nwhile True: kept.append(b'x' * 1_000_000)\"",
                           "x = 1\nsubprocess.run([sys.executable, '-c', code])"), 2, "in child process "),
    "generator": Bomb(("x = 1", "def blocks():\n    while True:\n        yield b'x' * 5_000_000\n\nkept = list(blocks())"), 5, "In [2]:3 in blocks"),
    "library call": Bomb(("import numpy as np\nimport metrics\nx = np.ones((5_000, 8))", "k = metrics.rbf_kernel(x, x)\nk.mean()"), 1,
                         "metrics.py:5 in sq_distances"),
    "slow leak": Bomb(("import time\ncache = {}\n\ndef step(i):\n    cache[i] = b'x' * 1_000_000\n    time.sleep(0.003)",
                       "for i in range(100_000):\n    step(i)"), 2, "In [1]:"),
    "hang in C": Bomb(("import ctypes\nlibc = ctypes.PyDLL(None)  # keeps the lock of the interpreter", "x = 1\nlibc.sleep(600)"), 2, "", TIME),
    "hang on a lock": Bomb(("import threading\nlock = threading.Lock()", "def update():\n    with lock: pass\n\nwith lock:\n    update()"), 5,
                           "In [2]:2 in update", TIME),
    "hang on a socket": Bomb(("import socket\nours, theirs = socket.socketpair()", "ours.send(b'?')\nours.recv(1)"), 2, "", TIME),
}


def write(name, folder):
    "The notebook of a bomb, beside the module it may import"
    (folder / "metrics.py").write_text(METRICS)
    cells = [nbformat.v4.new_code_cell(source) for source in BOMBS[name].cells]
    path = folder / f"{name.replace(' ', '_')}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), path)
    return path


def verdict(name, record):
    "What is wrong with a record of a bomb; empty if it is right"
    bomb = BOMBS[name]
    status = "timeout" if bomb.limits is TIME else "oom_ram"
    wrong = [] if record.status == status else [record.status]
    if (record.cell_index, record.execution_count) != (len(bomb.cells) + 1, len(bomb.cells)): wrong.append(f"cell {record.cell_index}")
    line, _, rest = f"{record.place},".partition(" ")[2].partition(",")
    if line.split(" in ")[0] != str(bomb.line) or bomb.within not in record.place: wrong.append(record.place or "no place")
    return wrong
