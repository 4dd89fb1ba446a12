"Runs that are forked from a process with everything imported: as cold ones, only sooner"
import os
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import psutil
import pytest

from gausssafe import warm
from gausssafe.batch import run_batch
from gausssafe.guard import clear_leftovers
from gausssafe.settings import BatchSpec
from gausssafe.warm import WarmParent, close_warm, spawn_warm, stop_imports, why_not_fork

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="warm forks need /proc")
WARM = ("numpy", "matplotlib.pyplot")


@pytest.fixture
def notebook(tmp_path):
    def notebook(name, *sources):
        cells = [nbformat.v4.new_code_cell("size = 1", metadata={"tags": ["parameters"]}), *map(nbformat.v4.new_code_cell, sources)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}),
                       tmp_path / f"{name}.ipynb")
        return {"notebook": str(tmp_path / f"{name}.ipynb")}
    return notebook


def run(tmp_path, experiments, warm, name="results", **options):
    spec = BatchSpec(**{"name": "x", "memory_limit": "400MB", "timeout": "60s", "experiments": experiments} | options)
    return run_batch(spec, tmp_path / name, jobs=2, memory="2GB", warm=warm)


def outputs(result, row):
    nb = nbformat.read(sorted((result.folder.parent / row["run_folder"]).glob("attempt-*.ipynb"))[-1], as_version=4)
    return [[{k: v for k, v in o.items() if k != "traceback"} for o in cell.get("outputs", [])] for cell in nb.cells]


def test_a_forked_kernel_does_what_a_new_one_does(notebook, tmp_path):
    "Prints, figures, errors, exits, memory limits, time limits, crashes, threads, the environment"
    experiments = [
        notebook("figure", "import matplotlib.pyplot as plt\nplt.plot([1, 2]);", "import sys, os\nprint(sys.argv[0][-19:-3], sys.path, os.getcwd())"),
        notebook("shown", "from pathlib import Path\nPath('in a cell')", "import asyncio\nawait asyncio.sleep(0.01)\n%time 1", "!echo from a shell"),
        notebook("threads", "import os, numpy as np\nfrom threadpoolctl import threadpool_info",
                 "print([p['num_threads'] for p in threadpool_info()], os.environ['OPENBLAS_NUM_THREADS'])",
                 "(np.ones((300, 300)) @ np.ones((300, 300))).sum()"),
        notebook("environment", "import os\nprint(sorted((k, v) for k, v in os.environ.items() if not k.startswith('GAUSSSAFE_')))"),
        notebook("error", "1 / 0"), notebook("greedy", "x = bytearray(10**9)"), notebook("crash", "import os; os.kill(os.getpid(), 11)"),
        notebook("hang", "import time; time.sleep(100)") | {"timeout": "3s"},
    ]
    warm, cold = (run(tmp_path, experiments, modules, name) for modules, name in ((WARM, "warm"), ((), "cold")))
    assert {row["run_warm"] for row in warm.rows} == {True} and {row["run_warm"] for row in cold.rows} == {False}
    for one, other in zip(warm.rows, cold.rows, strict=True):
        for key in ("run_experiment", "status", "run_cell", "run_limit_bytes", "run_threads"): assert one[key] == other[key], key
        if one["run_experiment"] in ("figure", "threads", "environment", "error"): assert outputs(warm, one) == outputs(cold, other)
    statuses = {row["run_experiment"]: row["status"] for row in warm.rows}
    failed = {"error": "error", "greedy": "oom_ram", "crash": "error", "hang": "timeout"}
    assert statuses == dict.fromkeys(("figure", "shown", "threads", "environment"), "ok") | failed
    assert any("image/png" in o.get("data", {}) for cell in outputs(warm, warm.rows[0]) for o in cell)


def test_children_do_not_share_their_luck_and_say_goodbye(notebook, tmp_path):
    draw = notebook("draw", "import random, uuid, numpy as np\nprint(random.random(), np.random.rand(), uuid.uuid4())",
                    f"import atexit\natexit.register(lambda: open({str(tmp_path / 'bye')!r}, 'a').write('bye '))", "import os; print(os.getpid())")
    result = run(tmp_path, [draw], WARM, runs_per_config=4)
    assert [row["status"] for row in result.rows] == ["ok"] * 4
    words = [o["text"].split() for row in result.rows for cell in outputs(result, row) for o in cell if o["output_type"] == "stream"]
    assert len({word for line in words for word in line}) == 4 * 4
    assert (tmp_path / "bye").read_text() == "bye " * 4


def test_what_outlives_its_guard_is_found_by_its_marks(notebook, tmp_path):
    "A forked kernel shows the marks of its guard in /proc, so a janitor finds what a killed guard left"
    kill = f"""
import os, pathlib, time
marks = pathlib.Path('/proc/self/environ').read_bytes().split(b'\\0')
owner = next(m for m in marks if m.startswith(b'GAUSSSAFE_OWNER=')).decode()
assert owner.endswith(':' + pathlib.Path(f'/proc/{{os.getppid()}}/stat').read_text().split()[21]), owner
if os.fork() == 0: os.setsid(); time.sleep(300)
pathlib.Path({str(tmp_path / 'stray')!r}).write_text(os.environ['GAUSSSAFE_RUN'])
os.kill(os.getppid(), 9); time.sleep(60)"""
    result = run(tmp_path, [notebook("kill", kill)], WARM)
    assert result.rows[0]["status"] == "lost"
    clear_leftovers()
    run_id = (tmp_path / "stray").read_text().encode()
    assert not [p.pid for p in psutil.process_iter() if p.pid != os.getpid() and b"GAUSSSAFE_RUN=" + run_id + b"\0" in _environ(p.pid)]


def _environ(pid):
    try: return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError: return b""


def test_a_process_with_threads_is_no_parent(tmp_path, notebook):
    (tmp_path / "threadful.py").write_text("import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()")
    sys.path.insert(0, str(tmp_path))
    os.environ["PYTHONPATH"] = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = run(tmp_path, [notebook("a", "print(1)")], ("threadful",), runs_per_config=2)
    finally:
        sys.path.remove(str(tmp_path))
        os.environ["PYTHONPATH"] = os.environ["PYTHONPATH"].partition(":")[2]
    told = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert told == ["threadful: no warm start, it has 2 threads, and a fork copies one. Runs start cold."]
    assert [(row["status"], row["run_warm"]) for row in result.rows] == [("ok", False)] * 2
    assert why_not_fork().startswith("it has ") or len(os.listdir("/proc/self/task")) == 1


def test_a_parent_that_is_killed_is_replaced(tmp_path):
    with open(tmp_path / "log", "ab") as log:
        def spawn(): return warm.spawn_warm(("json",), "gausssafe.warm:_compute", log, dict(os.environ))
        assert spawn().wait(20) == 0
        parent = next(iter(warm._PARENTS.values()))
        os.kill(parent.process.pid, signal.SIGKILL)
        parent.process.wait()
        assert spawn().wait(20) == 0 and next(iter(warm._PARENTS.values())) is not parent
    close_warm()


def test_a_child_whose_parent_vanishes_is_lost_and_a_parent_without_its_master_ends():
    parent = WarmParent(("json",), "gausssafe.batch:_warm_child", dict(os.environ))
    with open(os.devnull, "ab") as log: child = parent.spawn(log)
    os.kill(parent.process.pid, signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL
    child.stdin.close()
    deadline_s = time.monotonic() + 10
    while psutil.pid_exists(child.pid) and time.monotonic() < deadline_s: time.sleep(0.05)
    assert not psutil.pid_exists(child.pid) or psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
    other = WarmParent(("json",), "gausssafe.warm:_compute", dict(os.environ))
    other.close()
    assert other.process.returncode == 0


def test_a_broken_pipe_is_an_exception_in_a_forked_kernel(notebook, tmp_path):
    pipe = "import os\near, mouth = os.pipe()\nos.close(ear)\ntry: os.write(mouth, b'x')\nexcept BrokenPipeError: print('told')"
    result = run(tmp_path, [notebook("pipe", pipe)], WARM)
    assert [(row["status"], row["run_warm"]) for row in result.rows] == [("ok", True)]


@pytest.fixture
def module(tmp_path, monkeypatch):
    def write(name, source): (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    yield write
    close_warm()


@pytest.mark.parametrize("source, told", [("import os\nos.chdir('/')", "working directory (/)"), ("file = open(__file__)", "file descriptor"),
                                          ("import signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)", "handler of SIGCHLD"),
                                          ("raise SystemExit(3)", "import sly: SystemExit: 3")])
def test_what_a_fork_would_inherit_or_lose_is_no_parent(module, source, told):
    module("sly", source)
    parent = WarmParent(("sly",), "gausssafe.warm:_compute", dict(os.environ))
    assert told in parent.problem and "\n" not in parent.problem
    parent.close()


def test_a_parent_whose_module_is_edited_is_replaced_and_its_children_run_on(module, tmp_path):
    "Also a module that the named one imports; a module may print, and start a process that ends"
    module("inner", "import subprocess\nsubprocess.Popen(['true'])\nprint('loud')\ndef nap(): import time; time.sleep(1); return 5")
    module("outer", "import inner")
    with open(tmp_path / "log", "ab") as log:
        def spawn(): return warm.spawn_warm(("outer",), "inner:nap", log, dict(os.environ))
        first, parent = spawn(), next(iter(warm._PARENTS.values()))
        assert parent.is_current
        module("inner", "def nap(): return 6")
        assert not parent.is_current
        assert spawn().wait(20) == 6 and first.wait(20) == 5
    close_warm()
    assert parent.process.returncode == 0


def test_a_stopped_child_of_a_parent_that_vanished_ends(tmp_path):
    parent = WarmParent(("json",), "gausssafe.batch:_warm_child", dict(os.environ))
    with open(os.devnull, "ab") as log: child = parent.spawn(log)
    while not psutil.Process(child.pid).children(): time.sleep(0.02)  # its guard
    os.kill(child.pid, signal.SIGSTOP)
    os.kill(parent.process.pid, signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL
    deadline_s = time.monotonic() + 10
    while psutil.pid_exists(child.pid) and time.monotonic() < deadline_s: time.sleep(0.05)
    assert not psutil.pid_exists(child.pid) or psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE


def test_imports_that_last_can_be_stopped(module):
    module("slow", "import time\ntime.sleep(60)")
    with open(os.devnull, "ab") as log, ThreadPoolExecutor(1) as pool, pytest.warns(RuntimeWarning, match="the process that imports them died"):
        future = pool.submit(spawn_warm, ("slow",), "gausssafe.warm:_compute", log, dict(os.environ))
        while not future.done(): time.sleep(0.05), stop_imports()
        assert future.result() is None


def test_imports_that_were_shot_at_are_tried_again(module, tmp_path):
    seen = tmp_path / "seen"
    module("slow", f"import pathlib, time\nseen = pathlib.Path({str(seen)!r})\nwas = seen.exists()\nseen.touch()\nif not was: time.sleep(60)")
    with open(os.devnull, "ab") as log, ThreadPoolExecutor(1) as pool:
        future = pool.submit(spawn_warm, ("slow",), "gausssafe.warm:_compute", log, dict(os.environ))
        while not seen.exists(): time.sleep(0.02)
        next(iter(warm._IMPORTING)).kill()
        assert future.result().wait(20) == 0


def test_a_parent_whose_master_is_gone_still_sees_its_children_end():
    "Nobody reads the pipe by then"
    parent = WarmParent(("json",), "gausssafe.warm:_compute", dict(os.environ))
    with open(os.devnull, "ab") as log: children = [parent.spawn(log) for _ in range(3)]
    for child in children: child._exit.close()
    parent.close()
    assert parent.process.returncode == 0
