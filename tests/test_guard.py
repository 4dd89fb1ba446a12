"The guard keeps its limit, leaves nothing behind, and tells the truth about it"
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gausssafe import guard
from gausssafe.guard import GuardSpec, ProcTree, Trace, clear_leftovers, find_cgroup, guard_command, run_guarded, sleep_s

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guard's full strength is Linux")

GREEDY = "import sys, time; kept = []\nwhile len(kept) < int(sys.argv[1]): kept.append(b'x' * 10_000_000)\ntime.sleep(60)"
# A kernel with a child, and a grandchild that daemonizes by setsid and double fork
FAMILY = """
import os, subprocess, sys, time
subprocess.Popen(["sleep", "300"])
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(300)
    os._exit(0)
os.wait()
open(sys.argv[1], "w").close()
time.sleep(300)
"""


COPIES = """
import os, time
data = bytearray(b"x") * 100_000_000
for _ in range(5):
    if os.fork() == 0:
        data[::4096] = b"y" * len(data[::4096])
        time.sleep(60)
os.wait()
"""


def python(code, *args): return [sys.executable, "-c", code, *map(str, args)]


def wait_for(condition, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return found


def marked(run_id):
    "Living processes that carry the mark of a run"
    def is_marked(process):
        with contextlib.suppress(psutil.Error): return process.status() != "zombie" and process.environ().get("GAUSSSAFE_RUN") == run_id
    return [process for process in psutil.process_iter() if is_marked(process)]


@pytest.fixture
def start(tmp_path):
    "Start a guard by hand; its Popen has `.run_id` and `.status()`"
    started = []

    def start(command, **limits):
        spec = GuardSpec(uuid.uuid4().hex, status_path=str(tmp_path / f"{uuid.uuid4().hex}.json"), **limits)
        process = subprocess.Popen([*guard_command(spec), *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process.run_id, process.status = spec.run_id, lambda: json.loads(Path(spec.status_path).read_text())
        started.append(process)
        return process
    yield start
    for process in started:
        process.stdin.close()
        process.wait(20)
        process.stdout.close()
    clear_leftovers()


def test_a_command_that_behaves():
    status = run_guarded(python("import sys; print('hello'); sys.exit(3)"), memory_limit="500MB", timeout_s=60)
    assert (status["reason"], status["exit_code"], status["leaked"], status["unkillable"]) == ("exited", 3, [], [])
    assert 5e6 < status["kernel_hwm_bytes"] <= status["peak_bytes"] < 50e6 and status["limit_bytes"] == 500_000_000


def test_memory_limit():
    status = run_guarded(python(GREEDY, 100), memory_limit="200MB")
    assert (status["reason"], status["exit_code"]) == ("memory", -signal.SIGKILL)
    assert 200e6 <= status["kernel_hwm_bytes"] <= status["peak_bytes"] < 250e6
    assert max(n for _, n in status["samples"]) <= status["peak_bytes"]


def test_an_allocation_that_fails_is_the_programs_own():
    "We set no rlimit, so a MemoryError is never ours"
    status = run_guarded(python("try: b = bytearray(2**60)\nexcept MemoryError: import sys; sys.exit(7)"), memory_limit="200MB")
    assert (status["reason"], status["exit_code"]) == ("exited", 7)


def test_the_sum_of_children_counts():
    code = f"import subprocess, sys\nfor c in [subprocess.Popen([sys.executable, '-c', {GREEDY!r}, '8']) for _ in range(8)]: c.wait()"
    status = run_guarded(python(code), memory_limit="300MB", timeout_s=60)
    assert status["reason"] == "memory" and len(status["leaked"]) == 8
    assert 300e6 <= status["peak_bytes"] < 400e6 and status["kernel_hwm_bytes"] < 50e6


def test_the_high_water_mark_is_not_that_of_a_child_which_ended():
    child = "import time; x = b'x' * 80_000_000; time.sleep(0.5)"
    code = f"import subprocess, sys, time\nsubprocess.run([sys.executable, '-c', {child!r}])\ntime.sleep(60)"
    status = run_guarded(python(code), memory_limit="300MB", timeout_s=2)
    assert status["reason"] == "timeout" and status["peak_bytes"] > 80e6 and 0 < status["kernel_hwm_bytes"] < 50e6


def test_forks_are_not_counted_twice():
    code = "import os, time; data = b'x' * 200_000_000\nfor _ in range(5):\n    if os.fork() == 0: time.sleep(1); os._exit(0)\nwhile True: os.wait()"
    status = run_guarded(python(f"try:\n    exec({code!r})\nexcept ChildProcessError: pass"), memory_limit="500MB", timeout_s=60)
    assert status["reason"] == "exited" and 200e6 < status["peak_bytes"] < 300e6


@pytest.mark.parametrize("kcmp", [guard._KCMP, None])
def test_a_child_of_vfork_is_not_counted_with_its_parents_memory(kcmp, tmp_path):
    "subprocess starts programs by vfork, and they share the caller's memory until they exec: 300 MB must not become 600"
    script = tmp_path / "guard.py"
    script.write_text(Path(guard.__file__).read_text().replace("_KCMP, _KCMP_VM = ", f"_KCMP, _KCMP_VM = {kcmp!r}, 1  # "))
    code = "import subprocess; data = b'x' * 300_000_000\nfor _ in range(400): subprocess.run(['true'])"
    command = guard_command(GuardSpec("vfork", 500_000_000, status_path=str(tmp_path / "status.json")))
    command[3] = str(script)
    with subprocess.Popen([*command, *python(code)], stdin=subprocess.PIPE) as process: process.wait(60)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["reason"] == "exited" and status["exit_code"] == 0 and 300e6 < status["peak_bytes"] < 400e6


def test_copies_of_forked_memory_are_counted():
    "Copy-on-write: RSS does not change, memory does"
    status = run_guarded(python(COPIES), memory_limit="350MB", timeout_s=60)
    assert status["reason"] == "memory" and 350e6 <= status["peak_bytes"] < 460e6


CROWD = """
import os, sys, time
data = b"x" * 30_000_000
for _ in range(100):
    if os.fork() == 0:
        own = b"y" * int(sys.argv[1])
        time.sleep(float(sys.argv[2]))
        os._exit(0)
try:
    while True: os.wait()
except ChildProcessError: pass
"""


@pytest.mark.parametrize("own, seconds, reason", [(5_000_000, 100, "memory"), (100, 2, "exited")])
def test_a_crowd_is_judged_by_what_it_has_not_by_what_it_shares(own, seconds, reason):
    "100 processes that show 3 GB and more: with 5 MB each of their own they are over 400 MB, without they are not"
    status = run_guarded(python(CROWD, own, seconds), memory_limit="400MB", timeout_s=100)
    assert status["reason"] == reason and (status["exit_code"] == 0 or status["peak_bytes"] > 400e6)


def test_a_flood_of_forks_ends():
    "Stopped while it forks: the sweeps must outrun it"
    status = run_guarded(python("import os\nfor _ in range(10): os.fork()\n__import__('signal').pause()"), timeout_s=0.5)
    assert status["reason"] == "timeout" and len(status["leaked"]) > 10 and status["unkillable"] == []
    assert not any(psutil.pid_exists(entry["pid"]) for entry in status["leaked"])


def test_timeout():
    status = run_guarded(["sleep", "60"], timeout_s=0.5)
    assert (status["reason"], status["exit_code"], status["timeout_s"]) == ("timeout", -signal.SIGKILL, 0.5)


def test_a_command_that_is_not_there(capfd):
    assert run_guarded(["no-such-command"])["exit_code"] == 127
    assert "gausssafe: cannot run no-such-command" in capfd.readouterr().err


def test_a_killed_kernel_says_its_signal():
    status = run_guarded(python("import os; os.kill(os.getpid(), 11)"))
    assert (status["reason"], status["exit_code"], status["machine_oom"]) == ("exited", -11, False)


def test_what_a_normal_end_leaves_is_listed_and_gone():
    status = run_guarded(["sh", "-c", "setsid sleep 300 & sleep 300 & sleep 0.2"])
    assert status["reason"] == "exited" and [entry["command"] for entry in status["leaked"]] == ["sleep 300"] * 2
    assert not any(psutil.pid_exists(entry["pid"]) for entry in status["leaked"])


def test_signals_are_the_commands_own(start):
    "Default signal handling, nothing inherited from the guard"
    code = "import signal; print(*[signal.getsignal(n).name for n in (15, 17, 10)], open('/proc/self/oom_score_adj').read())"
    assert start(python(code)).stdout.read().split() == [b"SIG_DFL"] * 3 + [b"1000"]


@pytest.mark.parametrize("send", [lambda p: p.send_signal(signal.SIGINT), lambda p: (p.stdin.write(b"signal 2\n"), p.stdin.flush())])
def test_interrupt(start, send):
    code = "import time\ntry: print('ready', flush=True); time.sleep(60)\nexcept KeyboardInterrupt: print('interrupted', flush=True)"
    process = start(python(code))
    assert process.stdout.readline() == b"ready\n"
    send(process)
    assert process.stdout.readline() == b"interrupted\n" and process.wait(20) == 0
    assert process.status()["reason"] == "exited"


@pytest.mark.parametrize("stop", [lambda p: p.terminate(), lambda p: (p.stdin.write(b"stop\n"), p.stdin.flush())])
def test_stop_takes_all(start, stop, tmp_path):
    process = start(python(FAMILY, tmp_path / "ready"))
    wait_for((tmp_path / "ready").exists)
    assert len(marked(process.run_id)) == 3
    stop(process)
    assert process.wait(20) == 137 and marked(process.run_id) == []
    assert process.status()["reason"] == "terminated" and len(process.status()["leaked"]) == 2


def test_cells(start):
    code = "import sys\nprint('ready', flush=True)\nkept = []\nfor line in sys.stdin:\n    kept.append(b'x' * int(line))\n    del kept[:-1]\n" + (
        "    print('done', flush=True)")
    # The kernel's own stdin is /dev/null, so it reads its orders from a pipe of ours
    read_end, write_end = os.pipe()
    os.set_inheritable(read_end, True)
    spec_command = python(code.replace("sys.stdin", f"open({read_end})"))
    spec = GuardSpec("cells", status_path=f"/tmp/{uuid.uuid4().hex}.json")
    process = subprocess.Popen([*guard_command(spec), *spec_command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[read_end])
    assert process.stdout.readline() == b"ready\n"
    for index, size in ((3, 50_000_000), (5, 10_000_000)):
        process.stdin.write(f"cell {index}\n".encode())
        process.stdin.flush()
        time.sleep(0.5)  # This guard answers nobody; a runner's does
        os.write(write_end, f"{size}\n".encode())
        assert process.stdout.readline() == b"done\n"
        process.stdin.write(b"end\n")
        process.stdin.flush()
        time.sleep(0.05)
    process.terminate()
    process.communicate()
    cells = json.loads(Path(spec.status_path).read_text())["cells"]
    os.unlink(spec.status_path)
    os.close(read_end), os.close(write_end)
    assert [cell["index"] for cell in cells] == [3, 5]
    assert 45e6 < cells[0]["peak_bytes"] - cells[0]["start_bytes"] < 60e6 and cells[1]["end_bytes"] < cells[1]["start_bytes"]


def test_private_folder_goes_with_a_dead_runner(tmp_path):
    folder = tmp_path / "private"
    folder.mkdir(mode=0o700)
    (folder / "socket-1").touch()
    runner = subprocess.Popen(["sleep", "300"])
    spec = GuardSpec("private", private_dir=str(folder), runner_pid=runner.pid)
    process = subprocess.Popen([*guard_command(spec), "sleep", "300"], stdin=subprocess.PIPE)
    assert folder.exists()
    runner.kill()
    runner.wait()  # The lifeline is still open here: the guard watches the runner itself
    process.wait(20)
    process.stdin.close()
    assert not folder.exists()


def test_a_folder_others_can_enter_is_not_removed(tmp_path):
    folder = tmp_path / "public"
    folder.mkdir(mode=0o755)
    process = subprocess.Popen([*guard_command(GuardSpec("public", private_dir=str(folder))), "sleep", "300"], stdin=subprocess.PIPE)
    process.stdin.close()
    process.wait(20)
    assert folder.exists()


RUNNER = """
import subprocess, sys
from gausssafe.guard import GuardSpec, guard_command
import os
spec = GuardSpec(sys.argv[1], runner_pid=os.getpid())
subprocess.Popen([*guard_command(spec), sys.executable, "-c", sys.argv[2], sys.argv[3]], stdin=subprocess.PIPE).wait()
"""


def kill_runner(tmp_path, delay_s):
    "Kill -9 a runner at some moment after its start (None: when its family is complete); seconds until nobody is left"
    run_id, ready = uuid.uuid4().hex, tmp_path / f"ready-{uuid.uuid4().hex}"
    runner = subprocess.Popen(python(RUNNER, run_id, FAMILY, ready))
    wait_for(ready.exists) if delay_s is None else time.sleep(delay_s)
    runner.kill()
    runner.wait()
    began = time.monotonic()
    wait_for(lambda: not marked(run_id) and not guards_of(run_id), 10)
    return time.monotonic() - began


def guards_of(run_id): return [p for p in psutil.process_iter() if run_id in " ".join(_cmdline(p)) and p.pid != os.getpid()]


def _cmdline(process):
    with contextlib.suppress(psutil.Error): return process.cmdline()
    return []


@pytest.mark.parametrize("delay_s", [None, None, 0.15, 0.3])
def test_a_killed_runner_leaves_nothing(tmp_path, delay_s): kill_runner(tmp_path, delay_s)


def test_a_killed_guard_leaves_what_the_janitor_clears(start, tmp_path):
    other = start(python(FAMILY, tmp_path / "other"))
    process = start(python(FAMILY, tmp_path / "ready"))
    for name in ("other", "ready"): wait_for((tmp_path / name).exists)
    kernel = guard.descendants(process.pid)[0]
    process.kill()
    process.wait(20)
    wait_for(lambda: not psutil.pid_exists(kernel))  # by its parent-death signal
    assert other.run_id not in {entry["run_id"] for entry in clear_leftovers()}  # another test may have cleared ours already
    wait_for(lambda: not marked(process.run_id))
    assert len(marked(other.run_id)) == 3
    with pytest.raises(FileNotFoundError): process.status()


def test_the_janitor_spares_its_own_line(tmp_path):
    "Called from inside a run whose guard was killed, it does not end its caller"
    code = "import os, subprocess, time; from gausssafe.guard import clear_leftovers; clear_leftovers(); print('alive')"
    dead = subprocess.run(["true"], check=True) and "999999999:1"
    done = subprocess.run(python(code), env=os.environ | {"GAUSSSAFE_OWNER": dead, "GAUSSSAFE_RUN": "x"}, capture_output=True, text=True)
    assert done.stdout == "alive\n"


def test_another_users_or_namespaces_process_is_no_leftover(monkeypatch):
    victim = subprocess.Popen(["sleep", "300"], env={"GAUSSSAFE_OWNER": "999999999:1"})
    try:
        wait_for(lambda: guard._is_leftover(victim.pid))
        with monkeypatch.context() as patch:
            patch.setattr(os, "getuid", lambda: 12345)
            assert not guard._is_leftover(victim.pid)
        recycled = f"{os.getpid()}:1"  # a pid that lives, with another start
        assert guard._identity(os.getpid()) != recycled
    finally:
        victim.kill()
        victim.wait()


SEGMENT = """
import sys, time
from multiprocessing import resource_tracker, shared_memory
kept = shared_memory.SharedMemory(sys.argv[1], create=True, size=1_000_000)
resource_tracker.unregister("/" + sys.argv[1], "shared_memory")
kept.buf[:4] = b"data"
print("ready", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("seconds, limits", [(300, {"timeout_s": 1.0}), (0.5, {})])
def test_shared_memory_is_unlinked_ours_only(seconds, limits):
    ours, foreign = (f"gausssafe-test-{uuid.uuid4().hex}" for _ in range(2))
    other = subprocess.Popen(python(SEGMENT, foreign, 300), stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        status = run_guarded(python(SEGMENT, ours, seconds), **limits)
        assert status["shared_memory"] == [ours]
        assert not Path("/dev/shm", ours).exists() and Path("/dev/shm", foreign).exists()
    finally:
        other.kill()
        other.communicate()
        Path("/dev/shm", foreign).unlink()


def test_shared_memory_that_somebody_uses_stays():
    name = f"gausssafe-test-{uuid.uuid4().hex}"
    attach = "import sys; from multiprocessing import shared_memory as m; kept = m.SharedMemory(sys.argv[1]); print(flush=True); sys.stdin.read()"
    other = None
    try:
        process = subprocess.Popen([*guard_command(GuardSpec("shm")), *python(SEGMENT, name, 300)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process.stdout.readline()
        other = subprocess.Popen(python(attach, name), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        other.stdout.readline()
        process.terminate()
        process.communicate()
        assert Path("/dev/shm", name).exists()
    finally:
        if other: other.communicate()
        Path("/dev/shm", name).unlink(missing_ok=True)


def test_a_nested_guard_dies_with_the_outer(start):
    inner = f"import sys; from gausssafe.guard import run_guarded; run_guarded([sys.executable, '-c', {GREEDY!r}, '30'], memory_limit='1GB')"
    outer = start(python(inner), limit_bytes=150_000_000)
    outer.wait(30)
    assert outer.status()["reason"] == "memory"
    wait_for(lambda: not marked(outer.run_id))


def test_poll_tier_keeps_its_promises():
    status = run_guarded(python(GREEDY, 200), memory_limit="200MB", tier="poll")
    assert (status["containment"], status["reason"]) == ("poll", "memory") and status["peak_bytes"] > 200e6
    status = run_guarded(["sh", "-c", "sleep 300 & sleep 300"], timeout_s=1, tier="poll")
    assert status["reason"] == "timeout" and len(status["leaked"]) == 2 and not any(psutil.pid_exists(e["pid"]) for e in status["leaked"])


# A control group, played by a thread: it charges memory and kills at memory.max as the operating system would
def play_the_system(folder, stop, grow):
    folder = wait_for(lambda: next(iter(folder.glob("gausssafe-*")), None))
    wait_for((folder / "cgroup.procs").exists)
    for i, n_bytes in enumerate(grow):
        (folder / "memory.current").write_text(f"{n_bytes}\n")
        (folder / "memory.peak").write_text(f"{max(grow[:i + 1])}\n")
        high = n_bytes > 0.85 * int((folder / "memory.max").read_text())
        (folder / "memory.events").write_text(f"low 0\nhigh {int(high)}\nmax 0\noom 0\noom_kill 0\n")
        if high: wait_for(lambda: (folder / "memory.high").read_text() == "max")
        time.sleep(0.1)
    stop(folder)


@pytest.mark.parametrize("oom", [True, False])
def test_cgroup_tier_against_a_played_system(tmp_path, oom, capfd):
    ended = []

    def stop(folder):
        if oom: (folder / "memory.events").write_text("low 0\nhigh 1\nmax 1\noom 1\noom_kill 1\n")
        ended.append({path.name: path.read_text().strip() for path in folder.iterdir()})
        if not oom: process.terminate()

    spec = GuardSpec("played", 100_000_000, status_path=str(tmp_path / "status.json"), cgroup=str(tmp_path))
    segment = f"gausssafe-test-{uuid.uuid4().hex}"
    process = subprocess.Popen([*guard_command(spec), *python(SEGMENT, segment, 300)], stdin=subprocess.PIPE)
    wait_for(Path("/dev/shm", segment).exists)
    player = threading.Thread(target=play_the_system, args=(tmp_path, stop, [20_000_000, 90_000_000, 60_000_000]))
    player.start()
    player.join()
    process.wait(20)
    process.stdin.close()
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["containment"], status["reason"]) == ("cgroup2", "memory" if oom else "terminated")
    assert status["shared_memory"] == [segment]
    assert status["peak_bytes"] == 90_000_000 and max(n for _, n in status["samples"]) == 90_000_000
    assert ended[0]["memory.max"] == "100000000" and ended[0]["memory.oom.group"] == "1" and ended[0]["memory.high"] == "max"
    assert next(tmp_path.glob("gausssafe-*/cgroup.kill")).read_text() == "1"
    assert "Directory not empty" in capfd.readouterr().err  # a folder is no control group: rmdir says so, and the guard goes on


UNIFIED = next((m.mountpoint for m in psutil.disk_partitions(all=True) if m.fstype == "cgroup2"), None)


@pytest.mark.skipif(UNIFIED is None or not os.access(UNIFIED, os.W_OK), reason="no writable unified hierarchy")
def test_cgroup_kill_on_a_real_hierarchy():
    "Without a memory controller: entering, killing and removing are real"
    group = guard.Cgroup(UNIFIED, f"gausssafe-test-{uuid.uuid4().hex}")
    if not os.path.exists(f"{group.path}/cgroup.kill"): pytest.skip("no cgroup.kill (Linux 5.14)")
    assert group.lets_in()
    family = subprocess.Popen(["sh", "-c", f"echo 0 > {group.path}/cgroup.procs; setsid sleep 300 & sleep 300"])
    wait_for(lambda: len(Path(group.path, "cgroup.procs").read_text().split()) == 3)
    group.kill()
    assert family.wait(20) == -signal.SIGKILL
    wait_for(lambda: not Path(group.path, "cgroup.procs").read_text())
    group.remove()
    assert not os.path.exists(group.path)


@pytest.mark.parametrize("cgroup, above, expected", [
    ("0::/user.slice/app.slice/x.scope", "memory pids", "/user.slice/app.slice"),
    ("0::/user.slice/app.slice/x.scope", "pids", None),
    ("4:memory:/x", "memory", None),
])
def test_find_cgroup(tmp_path, monkeypatch, cgroup, above, expected):
    (tmp_path / "user.slice/app.slice/x.scope").mkdir(parents=True)
    for folder in ("user.slice/app.slice", "user.slice/app.slice/x.scope"): (tmp_path / folder / "cgroup.procs").touch()
    (tmp_path / "user.slice/app.slice/cgroup.subtree_control").write_text(above)
    files = {"/proc/self/mountinfo": f"30 23 0:26 / {tmp_path} rw - cgroup2 cgroup2 rw", "/proc/self/cgroup": cgroup}
    monkeypatch.setattr(guard, "_read_all", lambda path: files[path].encode())
    assert find_cgroup() == (expected and str(tmp_path) + expected)


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(0, 10**12)), min_size=1, max_size=3000), st.integers(2, 60))
def test_trace_keeps_every_peak(steps, n_max):
    trace, now = Trace(n_max), 0.0
    for step, n_bytes in steps: trace.add(now := now + step, n_bytes)
    times = [t for t, _ in trace.points]
    assert len(trace.points) <= n_max and times == sorted(times)
    assert max(n for _, n in trace.points) == max(n for _, n in steps)


@given(st.floats(0, 1e12), st.integers(1, 10**12), st.integers(1, 256))
def test_sleep_is_bounded_and_never_far_too_long(bound, limit, n_cores):
    seconds = sleep_s(bound, limit, n_cores)
    assert 0.002 <= seconds <= 0.1
    assert seconds == 0.002 or bound + seconds * 4e9 * n_cores <= 1.021 * limit


def test_a_status_that_cannot_be_written_is_said(capfd):
    spec = GuardSpec("x", status_path="/nowhere/status.json")
    with subprocess.Popen([*guard_command(spec), "true"], stdin=subprocess.PIPE) as process: assert process.wait(20) == 0
    assert "gausssafe: cannot write /nowhere/status.json" in capfd.readouterr().err


def test_windows_is_told():
    done = subprocess.run(python("import os, gausssafe; os.name = 'nt'; import gausssafe.guard"), capture_output=True, text=True)
    assert done.stderr.strip().endswith("ImportError: gausssafe guards processes on Linux and macOS; on Windows, run it inside WSL2")


def test_the_tree_is_complete():
    "Against psutil, on a tree that changes"
    family = subprocess.Popen(["sh", "-c", "for i in 1 2 3; do (sleep 300 & sleep 300) & done; wait"])
    try:
        wait_for(lambda: len(psutil.Process(family.pid).children(recursive=True)) >= 6)
        tree = ProcTree(family.pid)
        assert sorted(tree.processes()) == sorted(p.pid for p in psutil.Process(family.pid).children(recursive=True))
        psutil.Process(tree.known[0]).kill()
        wait_for(lambda: set(tree.processes()) == {p.pid for p in psutil.Process(family.pid).children(recursive=True) if p.status() != "zombie"})
    finally:
        for process in [*psutil.Process(family.pid).children(recursive=True), family]: process.kill()
        family.wait()


@pytest.mark.torture
def test_overshoot_of_one_process():
    "4 GB at full speed under 1 GB, 20 times, every core busy: by our record and by the operating system's high-water mark"
    burners = [subprocess.Popen(python("while True: pass")) for _ in range(os.cpu_count())]
    try:
        for _ in range(20):
            spec = GuardSpec("torture", 10**9, status_path=f"/tmp/{uuid.uuid4().hex}.json")
            process = subprocess.Popen([*guard_command(spec), *python("b'x' * 4_000_000_000")], stdin=subprocess.PIPE)
            seen = 0
            while (done := os.wait4(process.pid, os.WNOHANG))[0] == 0:
                seen = max([seen, *map(guard.high_water_bytes, guard.descendants(process.pid))])
                time.sleep(0.002)
            process.returncode = 0
            process.stdin.close()
            status = json.loads(Path(spec.status_path).read_text())
            os.unlink(spec.status_path)
            assert status["reason"] == "memory" and 0 < seen <= status["peak_bytes"]
            assert 10**9 <= done[2].ru_maxrss * 1024 <= status["peak_bytes"] <= 1.05e9
    finally:
        for process in burners: process.kill(); process.wait()


@pytest.mark.torture
def test_overshoot_of_eight_children():
    code = f"import subprocess, sys\nfor c in [subprocess.Popen([sys.executable, '-c', {GREEDY!r}, '400']) for _ in range(8)]: c.wait()"
    for _ in range(10):
        status = run_guarded(python(code), memory_limit="1GB", timeout_s=120)
        assert status["reason"] == "memory" and len(status["leaked"]) == 8 and status["peak_bytes"] <= 1.1e9


@pytest.mark.torture
def test_fifty_killed_runners_leave_nothing(tmp_path):
    "At random moments, from before the guard is up to long after its family is complete"
    seconds = [kill_runner(tmp_path, random.uniform(0.02, 1.5)) for _ in range(50)]
    assert max(seconds) < 1, max(seconds)


@pytest.mark.torture
@pytest.mark.parametrize("code", ["import time; time.sleep(10)",
                                  "import time; end = time.monotonic() + 10\nwhile time.monotonic() < end: b = b'x' * 400_000_000; del b"])
def test_watching_costs_less_than_a_hundredth(code):
    start_s = min(run_guarded(["true"])["guard_cpu_s"] for _ in range(3))
    status = run_guarded(python(code), memory_limit="1GB")
    assert status["guard_cpu_s"] - start_s < 0.01 * status["seconds"]
