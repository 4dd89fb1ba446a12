"The dead are asked who did it: cell, line and call, for ten bombs and three hangs"
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from bombs import BOMBS, KERNEL, verdict, write
from click.testing import CliRunner
from jupyter_client.manager import KernelManager

from gausssafe import runner, witness
from gausssafe.autopsy import Dump, Frame, Place, Stack, growth_steps, locate, locate_error, parse_stacks, read_journal
from gausssafe.cli import main
from gausssafe.explain import advise, draw_curve, explain, fitting_value
from gausssafe.guard import Suspects, run_guarded
from gausssafe.provisioner import _with_witness, guard_kernel
from gausssafe.runner import run_notebook

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stacks are asked for by Linux signals")
FAST = ("numpy", "thread", "child process", "library call", "hang on a lock")


def detonate(name, folder): return run_notebook(write(name, folder), folder / "out.ipynb", check=False, cwd=folder, **BOMBS[name].limits)


@pytest.mark.parametrize("name", FAST)
def test_the_line_that_did_it(name, tmp_path):
    record = detonate(name, tmp_path)
    if name == "thread" and verdict(name, record): record = detonate(name, tmp_path)  # Starved, main may answer what the thread was asked
    assert not verdict(name, record), record.error
    assert record.place in record.error and f"cell {record.cell_index} (In [{record.execution_count}]), line " in record.error
    dead = nbformat.read(record.output_path, as_version=4).cells[record.cell_index]
    assert dead.outputs[-1].evalue == record.error.partition(": ")[2]
    written = json.loads(Path(record.record_path).read_text())
    assert written["place"] == record.place and any("In [" in call for stack in written["stacks"] for call in stack)
    if name == "child process": assert record.child["rss_bytes"] > 200e6 and "while True" in record.child["command"]
    if name == "library call": check_explanation(record)


def check_explanation(record):
    "What the command says of report A's mistake, in text, as JSON and as a picture"
    shown = CliRunner().invoke(main, ["explain", record.output_path])
    assert shown.exit_code == 0, shown.output
    for text in ("oom_ram after", "400 MB limit at cell 3 (In [2]), line 1", "> k = metrics.rbf_kernel(x, x)", "metrics.py:5 in sq_distances",
                 "metrics.py:9 in rbf_kernel", "where it grew", "gausssafe.metrics", "█"): assert text in shown.output, text
    assert Path(record.output_path).with_suffix(".memory.png").stat().st_size > 5_000
    found = json.loads(CliRunner().invoke(main, ["explain", record.output_path, "--json", "--no-png"]).output)
    assert found["place"] == record.place and found["cells"][0]["execution_count"] == 2 and found["growth"][0]["execution_count"] == 2


@pytest.mark.torture
@pytest.mark.parametrize("name", BOMBS)
def test_the_line_that_did_it_five_times(name, tmp_path):
    wrong = [found for _ in range(5) if (found := verdict(name, detonate(name, tmp_path)))]
    assert not wrong


def test_growth_names_the_cell_that_grew(tmp_path):
    cells = ["import time", "kept = []\nfor _ in range(30):\n    kept.append(b'x' * 5_000_000)\n    time.sleep(0.005)", "time.sleep(0.2)"]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata=KERNEL), tmp_path / "in.ipynb")
    record = run_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", memory_limit="400MB")
    assert record.status == "ok" and record.place == "" and record.stacks == () and record.child is None
    in_cell = [step for step in record.growth if step.execution_count == 2]
    assert len(in_cell) >= 4 and all(step.place.startswith(("line 3", "line 4")) for step in in_cell[:-1]) and len(record.growth) <= 20
    assert in_cell[0].stack[-1].startswith("In [2]:") and not any("interactiveshell" in call for call in in_cell[0].stack)
    starts = [cell.start_s for cell in record.cells]
    assert starts == sorted(starts) and starts[1] < in_cell[0].t_s < starts[2]
    assert explain(record.output_path).advice == ()


def test_a_crash_has_a_line_too(tmp_path):
    cells = ["import ctypes", "x = 1\nctypes.string_at(0)"]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata=KERNEL), tmp_path / "in.ipynb")
    record = run_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", check=False)
    assert record.status == "error" and record.exit_code == -11
    assert record.error.startswith("KernelDied: the kernel ended with signal 11 (SIGSEGV) at cell 3 (In [2]), line 2, ")


CUDA_OOM = """import sys, types
class OutOfMemoryError(RuntimeError): pass
def stand_in(n): return lambda *_: n
cuda = types.SimpleNamespace(is_initialized=lambda: True, device_count=lambda: 1, memory_allocated=stand_in(6_000), memory_reserved=stand_in(7_000),
                             max_memory_allocated=stand_in(8_000))
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)"""


def test_a_full_card_by_injection(tmp_path):
    "PyTorch's own exception and its own books, played by a stand-in: no card here"
    (tmp_path / "gan.py").write_text("def rbf_kernel(x, oom):\n    d = x\n    raise oom('CUDA out of memory. Tried to allocate 2.00 GiB.')\n")
    cells = [CUDA_OOM, "import gan\nx = 1\nscore = gan.rbf_kernel(x, OutOfMemoryError)"]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata=KERNEL), tmp_path / "in.ipynb")
    record = run_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", check=False, cwd=tmp_path)
    assert record.status == "oom_gpu" and record.place == "line 3, gan.py:3 in rbf_kernel"
    assert record.error.endswith("Tried to allocate 2.00 GiB. at cell 3 (In [2]), line 3, gan.py:3 in rbf_kernel")
    assert [row[1:] for row in record.device_samples] == [(6_000, 7_000, 8_000)] * len(record.device_samples)
    assert len(record.device_samples) == 2 or witness._has_card()  # where there is one, it is also looked at inside cells
    assert 0 < record.device_samples[0][0] < record.device_samples[1][0] < record.seconds


@contextmanager
def connected(manager):
    "One client at a time: those of one manager share an identity"
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    try: yield client
    finally: client.stop_channels()


def outputs(client, source):
    said = []
    client.execute_interactive(source, timeout=30, output_hook=lambda m: said.append(m["content"].get("text", "")))
    return "".join(said)


def test_the_next_kernel_says_what_killed_the_last():
    manager = KernelManager()
    provisioner = guard_kernel(manager, memory_limit="250MB")
    manager.start_kernel()
    try:
        with connected(manager) as client:
            assert outputs(client, "print(1)") == "1\n"
            client.execute("rows = []\nwhile True:\n    rows.append(b'x' * 1_000_000)")
            deadline = time.monotonic() + 20
            while manager.is_alive() and time.monotonic() < deadline: time.sleep(0.05)
        manager.restart_kernel(now=True)
        with connected(manager) as client: first, second = outputs(client, "print(2)"), outputs(client, "print(3)")
        assert "gausssafe: the kernel before this one was stopped at its memory limit: peak 2" in first and second == "3\n"
        assert "of 250 MB in In [2], line 3\n" in first and "2\n" in first
        manager.restart_kernel(now=True)  # by hand: nothing to say
        with connected(manager) as client: assert outputs(client, "print(4)") == "4\n" and provisioner.last_end == ""
    finally: manager.shutdown_kernel(now=True)


def test_only_kernels_that_can_bear_witness_are_asked():
    def spec(**metadata): return type("Spec", (), {"metadata": metadata})()
    assert _with_witness([sys.executable, "-m", "ipykernel_launcher"], spec())[-1] == "--InteractiveShellApp.extra_extensions=gausssafe.witness"
    ours = spec(kernel_provisioner={"provisioner_name": "gausssafe"})
    assert len(_with_witness(["/other/python", "-m", "ipykernel_launcher"], ours)) == 4
    for command in (["/other/python", "-m", "ipykernel_launcher"], ["R", "--slave"]): assert _with_witness(command, spec()) == command


def test_a_command_without_a_witness_gets_no_signal():
    "Nobody listens: a signal would be the end of it"
    status = run_guarded([sys.executable, "-c", "import time; time.sleep(30)"], timeout_s=0.5)
    assert status["reason"] == "timeout" and status["journal"] == "" and status["exit_code"] == -9


def test_stacks_of_other_pythons():
    "Headers of 3.14 carry a name; a thread may have no frame; what is no dump is ignored"
    text = ['Thread 0x0000 [worker] (most recent call first):', "  <no Python frame>", "",
            "Current thread 0x0001 [MainThread] (most recent call first):", '  File "a b.py", line 3 in f', '  File "c.py", line ??? in g', "garbage"]
    stacks = parse_stacks(text)
    assert [len(s.frames) for s in stacks] == [0, 1] and stacks[1].is_taker and stacks[1].frames[0] == Frame("a b.py", 3, "f")


@pytest.mark.parametrize("text", ["", "dump", "cell x", "kernel 5\ngarbage\n\x00\n", "dump 1.0 5\nStack (most recent call first):\n", "end\ncell 2"])
def test_a_torn_journal_is_read_as_far_as_it_goes(text):
    journal = read_journal(text)
    assert growth_steps(journal) is not None
    for dump in journal.dumps: assert str(locate(dump, journal.cells)) == ""


def test_a_late_answer_is_known_by_its_root():
    "Main answers below the question to a thread, and the thread below the question to main"
    main = '  File "/tmp/a.py", line 8 in <module>\n'
    thread = '  File "/tmp/a.py", line 4 in grow\n  File "/lib/threading.py", line 2 in _bootstrap\n'
    head = "Stack (most recent call first):\n"
    journal = read_journal(f"cell 2 /tmp/a.py\ndump 1.0 5 taker\n{head}{main}dump 1.0 5 main\n{head}{thread}")
    assert str(locate(journal.dumps[0], journal.cells)) == "line 4 in grow (in a thread)"


def test_nobody_answered(): assert locate(Dump(1.0, 5, 3), {}) == Place(3)


def test_identical_cells_are_told_apart_by_the_one_that_runs():
    "ipykernel names a cell's file after its text, so the same text is the same file"
    journal = read_journal("cell 2 /tmp/a.py\ncell 3 /tmp/b.py\ncell 4 /tmp/a.py\n")
    stack = Stack((Frame("/tmp/a.py", 7, "<module>"),), is_taker=True, is_main=True)
    assert locate(Dump(1.0, 5, 4, [stack]), journal.cells) == Place(4, 7)


@pytest.mark.parametrize("traceback, expected", [
    (["Cell In[7], line 4, in f(x)", "File ~/a/b.py:12, in g(y)"], "line 4 in f, b.py:12 in g"),
    (["Cell In[7], line 1", "Cell In[2], line 3, in helper()"], "line 1, In [2]:3 in helper"),
    (["KeyError: 'x'"], ""),
    (["Traceback (most recent call last)", "Cell In[1], line 9", "Traceback (most recent call last)", "Cell In[7], line 2"], "line 2"),
])
def test_where_an_exception_was_raised(traceback, expected): assert str(locate_error(traceback)) == expected


def test_the_thread_that_touches_memory_is_found():
    work = "lambda: [b'x' * 1_000_000 for _ in range(100)] and sys.stdin.read()"
    code = f"import threading, sys; sys.stdin.read(1); t = threading.Thread(target={work})"
    process = subprocess.Popen([sys.executable, "-c", code + "; t.start(); print(t.native_id, flush=True); t.join()"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True, bufsize=0)
    try:
        suspects = Suspects()
        time.sleep(0.2)
        for _ in range(2): suspects.look(process.pid, {}, float("inf"))
        process.stdin.write("x")
        thread = int(process.stdout.readline())
        deadline = time.monotonic() + 10
        while suspects.threads(process.pid)[0] != thread: assert time.monotonic() < deadline
    finally:
        process.kill()
        process.communicate()


def test_advice_needs_probes_that_differ_in_one_number():
    def run(status="ok", peak=10**8, **parameters): return {"status": status, "parameters": parameters, "peak_bytes": peak, "limit_bytes": 10**9}
    dead = run("oom_ram", 10**9, batch=512, name="a", flag=True)
    two = [run(batch=10, peak=2 * 10**8, name="a", flag=True), run(batch=20, peak=3 * 10**8, name="a", flag=True)]
    assert fitting_value(dead, two) == ("batch", 85, 1) and "batch = 85 would have fitted" in advise(dead, "", two)[0]
    other = [two[0], run(batch=20, peak=3 * 10**8, name="b", flag=True)]
    assert fitting_value(dead, other) is None and "Two runs with smaller batch" in advise(dead, "", other)[-1]
    assert fitting_value(dead, [two[0], run("error", batch=20, name="a", flag=True)]) is None
    assert fitting_value(dead, [two[0], two[1] | {"peak_bytes": 2 * 10**8}]) is None  # it does not grow: no law


@pytest.mark.parametrize("samples", [[], [(0.0, 0)], [(1.0, 5)], [(0.1, 10**9), (0.1, 10**9)], [(i / 7, i) for i in range(500)]])
def test_a_curve_of_anything(samples):
    lines = draw_curve(samples, limit_bytes=10**6).splitlines()
    assert len({len(line) for line in lines[:8]}) == 1


def test_explain_refuses_in_one_line(tmp_path):
    (tmp_path / "bad.record.json").write_text("{}")
    for path, message in ((tmp_path / "gone.ipynb", "no record at"), (tmp_path / "bad.ipynb", "not a record")):
        refused = CliRunner().invoke(main, ["explain", str(path)])
        assert refused.exit_code == 2 and refused.output.startswith(f"gausssafe: {message}") and refused.output.count("\n") == 1


def test_magics_in_a_kernel(tmp_path, monkeypatch):
    "As a user types them, lines counted in the whole cell; and an error passes through"
    monkeypatch.setattr(runner, "_join_streams", list)  # A live bar is gone at the end: keep what it was
    cells = ["%load_ext gausssafe", "%%memory\nx = b'x' * 60_000_000\nrows = [b'y' * 1_000_000 for _ in range(20)]\nlen(rows)", "%memory_limit",
             "%%memory --live\nimport time\ntime.sleep(0.6)\n1 / 0"]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata=KERNEL), tmp_path / "in.ipynb")
    record = run_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", check=False, memory_limit="600MB")
    assert record.status == "error" and record.error == "ZeroDivisionError: division by zero at cell 5 (In [4]), line 4"
    code = [cell for cell in nbformat.read(record.output_path, as_version=4).cells if cell.cell_type == "code"]
    shown = "".join(output.get("text", "") for output in code[1].outputs)
    assert shown.startswith("peak ") and "line 2 " in shown and "x = b'x' * 60_000_000" in shown and code[1].outputs[-1].data["text/plain"] == "20"
    assert "guard            600 MB" in code[2].outputs[0].text and "left now" in code[2].outputs[0].text
    assert any("of 600 MB" in output.get("text", "") for output in code[3].outputs)


def test_the_extension_is_light():
    "The witness of every kernel may not cost a start: neither psutil nor numpy"
    code = "import sys, gausssafe.witness; bad = {'psutil', 'numpy', 'torch', 'IPython'} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/", env=os.environ)
