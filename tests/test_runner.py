"Runs end as they should, whatever happens in them; and what they leave behind tells the truth"
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import papermill
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gausssafe.errors import InvalidInput, MemoryLimitExceeded, RunFailed, TimeLimitExceeded
from gausssafe.runner import _on_screen, run_notebook

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


@pytest.fixture
def write(tmp_path):
    def write(*sources, parameters=None, tags=None):
        cells = [nbformat.v4.new_code_cell(source, metadata={"tags": (tags or {}).get(i, [])}) for i, source in enumerate(sources)]
        if parameters is not None: cells.insert(0, nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), tmp_path / "in.ipynb")
        return tmp_path / "in.ipynb"
    return write


@pytest.fixture
def run(write, tmp_path):
    def run(*sources, parameters=None, values=None, tags=None, **options):
        return run_notebook(write(*sources, parameters=parameters, tags=tags), tmp_path / "out" / "out.ipynb", values, check=False, **options)
    return run


def saved(record): return nbformat.read(record.output_path, as_version=4)


def marked(run_id):
    "Living processes that carry the mark of a run"
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error): found += [process] if process.environ().get("GAUSSSAFE_RUN") == run_id else []
    return found


def test_ok_with_parameters_and_costs(run):
    record = run("block = bytearray(80_000_000)", "del block", "n", parameters="n = 1", values={"n": 7}, memory_limit="1GB")
    assert record.status == "ok" and record.error is None and record.cell_index is None
    nb = saved(record)
    assert nb.cells[-1].outputs[0].data["text/plain"] == "7"
    costs = [cell.metadata.gausssafe for cell in nb.cells]
    assert costs[2].growth_bytes > 70_000_000 and costs[3].growth_bytes < -70_000_000
    assert record.cells[2].growth_bytes == costs[2].growth_bytes and record.cells[2].index == 2
    assert max(cell.peak_bytes for cell in record.cells) <= record.peak_bytes < record.limit_bytes
    assert all(cell.seconds > 0 for cell in record.cells)
    assert json.loads(Path(record.record_path).read_text())["status"] == "ok"


@pytest.mark.parametrize("values", [None, {"n": 3}])
def test_dead_cell_is_the_one_in_the_saved_notebook(run, values):
    hungry = "blocks = [bytearray(20_000_000) for _ in range(200)]  # the hungry one"
    record = run("x = 1", hungry, "y = 2", parameters="n = 1", values=values, memory_limit="300MB")
    dead = saved(record).cells[record.cell_index]
    assert record.status == "oom_ram" and "the hungry one" in dead.source
    assert f"cell {record.cell_index} (In [{3 + (values is not None)}])" in record.error
    assert dead.outputs[-1].ename == "MemoryLimitExceeded" and f"MemoryLimitExceeded: {dead.outputs[-1].evalue}" == record.error
    assert dead.metadata.papermill.status == "failed" and saved(record).metadata.papermill.exception is True
    assert saved(record).cells[-1].metadata.papermill.status == "pending"
    assert record.limit_bytes == 300_000_000 < record.peak_bytes < 400_000_000
    assert record.cells[-1].index == record.cell_index and record.cells[-1].peak_bytes > 290_000_000


def test_threads_and_children_count(run):
    grow = "blocks = [bytearray(10_000_000) for _ in range(100)]; import time; time.sleep(30)"
    thread = f"import threading\nt = threading.Thread(target=lambda: exec({grow!r}))\nt.start(); t.join()"
    assert run(thread, memory_limit="400MB").status == "oom_ram"
    child = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {grow!r}])"
    assert run(child, memory_limit="400MB").status == "oom_ram"


def test_timeout_names_the_cell(run):
    record = run("x = 1", "import time\ntime.sleep(60)", timeout_s=4)
    assert record.status == "timeout" and record.error == "TimeLimitExceeded: still running after 4.00 s at cell 3 (In [2]), line 2"
    assert saved(record).cells[3].outputs[-1].ename == "TimeLimitExceeded" and record.seconds < 30


def test_a_signal_is_an_error_with_its_name(run):
    record = run("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    assert record.status == "error" and "signal 11 (SIGSEGV) at cell 2 (In [1])" in record.error and record.exit_code == -11


def test_a_kernel_that_leaves_by_itself(run):
    record = run("import os\nos._exit(3)")
    assert record.status == "error" and "exit code 3" in record.error


def test_what_a_cell_raises_is_told(run):
    record = run("1 / 0")
    assert record.status == "error" and record.error == "ZeroDivisionError: division by zero at cell 2 (In [1]), line 1"
    refused = run("raise MemoryError('Unable to allocate 7 TiB')")
    assert refused.status == "oom_ram" and "7 TiB" in refused.error
    card = run("class OutOfMemoryError(RuntimeError): pass\nraise OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')")
    assert card.status == "oom_gpu"


def test_cells_that_are_meant_to_raise(run):
    record = run("1 / 0", "print('went on')", tags={0: ["raises-exception"]})
    nb = saved(record)
    assert record.status == "ok" and len(nb.cells) == 2 and nb.cells[1].outputs[0].text == "went on\n"


def test_leaving_by_sys_exit_zero_is_ok(run): assert run("import sys\nsys.exit(0)", "never").status == "ok"


def test_a_limit_too_small_to_start(run):
    record = run("print('hello')", memory_limit="20MB")
    assert record.status == "oom_ram" and "20.0 MB limit before the first cell" in record.error
    assert saved(record).cells[record.cell_index].outputs[-1].ename == "MemoryLimitExceeded"


def test_check_raises_what_fits(write, tmp_path):
    with pytest.raises(MemoryLimitExceeded, match="of 200 MB limit at cell 2") as info:
        run_notebook(write("b = [bytearray(10_000_000) for _ in range(100)]"), tmp_path / "out.ipynb", memory_limit="200MB")
    assert info.value.record.status == "oom_ram" and info.value.limit_bytes == 200_000_000
    with pytest.raises(TimeLimitExceeded): run_notebook(write("import time; time.sleep(60)"), tmp_path / "out.ipynb", timeout_s="3s")
    with pytest.raises(RunFailed, match="division by zero"): run_notebook(write("1 / 0"), tmp_path / "out.ipynb")


@pytest.mark.parametrize("change, message", [
    ({"input_path": "gone.ipynb"}, "no such notebook: gone.ipynb"),
    ({"parameters": {"epoch": 2}}, "unknown parameter 'epoch': .* has epochs"),
    ({"memory_limit": "2 gigs"}, "'2 gigs' is not a size"),
    ({"memory_limit": "0"}, "is not a size"),
    ({"memory_limit": -1}, "is not a size"),
    ({"timeout_s": "soon"}, "'soon' is not a duration"),
    ({"kernel_name": "julia-9"}, "unknown kernel 'julia-9': this machine has .*python3"),
    ({"cwd": "nowhere"}, "no such folder: nowhere"),
])
def test_bad_input_is_refused_before_anything_starts(write, tmp_path, change, message):
    options = {"input_path": write("x = 1", parameters="epochs = 1"), "output_path": tmp_path / "new" / "out.ipynb"} | change
    with pytest.raises(ValueError, match=message): run_notebook(**options)
    assert not (tmp_path / "new" / "out.ipynb").exists()


def test_parameters_need_a_parameters_cell(write, tmp_path):
    with pytest.raises(InvalidInput, match="no cell tagged `parameters`, so 'epochs' would have no effect"):
        run_notebook(write("x = 1"), tmp_path / "out.ipynb", {"epochs": 2})


def test_an_output_that_cannot_be_written(write, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InvalidInput, match="cannot write .*out.ipynb: "): run_notebook(write("x = 1"), tmp_path / "file" / "out.ipynb")
    with pytest.raises(InvalidInput, match="is a folder|directory"): run_notebook(write("x = 1"), tmp_path)


def test_not_a_notebook(tmp_path):
    (tmp_path / "in.ipynb").write_text("{]")
    with pytest.raises(InvalidInput, match="not a notebook"): run_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb")


def test_an_old_record_does_not_speak_for_a_new_run(write, tmp_path):
    record = run_notebook(write("x = 1"), tmp_path / "out.ipynb")
    with pytest.raises(InvalidInput): run_notebook(write("x = 1"), tmp_path / "out.ipynb", {"x": 2})
    assert json.loads(Path(record.record_path).read_text())["run_id"] == record.run_id  # refused: nothing was touched
    run_notebook(write("1 / 0"), tmp_path / "out.ipynb", check=False)
    assert json.loads(Path(record.record_path).read_text())["status"] == "error"


LEAVES_BEHIND = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        import time
        time.sleep(300)
    os._exit(0)
"""


def test_bars_leave_what_a_screen_would_show(run):
    bar = "import sys\nfrom tqdm import tqdm\nfor _ in tqdm(range(200), mininterval=0, desc='kept'): print('x' * (_ == 199), end='')"
    gone = "for _ in tqdm(range(200), mininterval=0, leave=False): pass"
    mixed = "print('before')\ndisplay(1)\nprint('after')\nprint('3', end='\\r', flush=True)\nprint('2\\b')"
    kept, none, both = (cell.outputs for cell in saved(run(bar, gone, mixed)).cells)
    assert {output.name for output in kept} == {"stderr", "stdout"} and "".join(o.text for o in kept if o.name == "stdout") == "x"
    drawn = "".join(o.text for o in kept if o.name == "stderr")
    assert drawn.startswith("kept: 100%") and drawn.count("kept") == 1 and len(kept) < 4 and none == []
    assert [output.get("text") for output in both] == ["before\n", None, "after\n2\b\n"]


@given(st.text("ab \r\n", max_size=30))
def test_a_screen_overwrites(text):
    grid, row, column = {}, 0, 0
    for sign in text:
        if sign == "\n": row, column = row + 1, 0
        elif sign == "\r": column = 0
        else: grid[row, column], column = sign, column + 1
    rows = ["".join(grid[r, c] for c in range(sum(1 for i, _ in grid if i == r))) for r in range(row + 1)]
    found = [_on_screen(line) for line in text.split("\n")]
    assert [line.rstrip() for line in found] == [line.rstrip() for line in rows]
    assert all(line == before for line, before in zip(found, text.split("\n"), strict=True) if "\r" not in before)


def test_nothing_outlives_a_clean_run(run):
    record = run(LEAVES_BEHIND)
    assert record.status == "ok" and len(record.leaked) >= 2
    assert marked(record.run_id) == []


def test_a_killed_runner_leaves_nothing(write, tmp_path):
    "SIGKILL of the process that called run_notebook: kernel, child and double-forked grandchild are gone within a second"
    source, out = write(LEAVES_BEHIND + "\nimport time\nopen('ready', 'w').close()\ntime.sleep(300)"), tmp_path / "out.ipynb"
    code = f"from gausssafe.runner import run_notebook; run_notebook({str(source)!r}, {str(out)!r}, cwd={str(tmp_path)!r})"
    runner = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "ready").exists():
        assert runner.poll() is None
        time.sleep(0.05)
    family = psutil.Process(runner.pid).children(recursive=True)
    assert len(family) >= 3
    runner.kill()
    runner.wait()
    gone, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    assert not out.with_suffix(".record.json").exists()


def test_a_killed_guard_is_lost(write, tmp_path):
    "SIGKILL of the guard itself: the run is lost, and says so; nothing stays"
    source = write("import os, signal, time\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(30)")
    record = run_notebook(source, tmp_path / "out.ipynb", check=False)
    assert record.status == "lost" and "the guard of this run vanished" in record.error
    deadline = time.monotonic() + 5
    while marked(record.run_id) and time.monotonic() < deadline: time.sleep(0.05)
    assert marked(record.run_id) == []


@pytest.mark.parametrize("name", ["simple_execute", "report_mode_test", "no_parameters"])
def test_notebooks_that_nobody_here_wrote(tmp_path, name):
    "From papermill's own test suite, unchanged"
    source = Path(papermill.__file__).parent / "tests/notebooks" / f"{name}.ipynb"
    parameters = {"msg": "hello"} if name == "simple_execute" else None
    record = run_notebook(source, tmp_path / "out.ipynb", parameters, memory_limit="1GB", kernel_name="python3")
    assert record.status == "ok"


def test_papermill_command_with_our_engine(write, tmp_path):
    "`papermill --engine gausssafe`: the dead cell tells the truth there too"
    source = write("b = [bytearray(10_000_000) for _ in range(100)]")
    env = os.environ | {"GAUSSSAFE_MEMORY_LIMIT": "200MB"}
    command = [sys.executable, "-m", "papermill", "--engine", "gausssafe", source, tmp_path / "out.ipynb"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "MemoryLimitExceeded: peak" in done.stderr and "of 200 MB limit at cell 2 (In [1])" in done.stderr
