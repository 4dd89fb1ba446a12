"Any Jupyter kernel, started by whatever starts kernels, is held by a guard"
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from pathlib import Path

import nbformat
import psutil
import pytest
from jupyter_client.manager import AsyncKernelManager, KernelManager
from nbclient import NotebookClient

from gausssafe import provisioner as module
from gausssafe.errors import InvalidInput
from gausssafe.memory import read_memory
from gausssafe.provisioner import effective_limit_bytes, guard_kernel, install_kernel, list_kernels, remove_kernel

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guard's full strength is Linux")

FAMILY = """
import os, subprocess, time
subprocess.Popen(["sleep", "300"])
if (pid := os.fork()) == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(300)
    os._exit(0)
reaped = os.waitpid(pid, 0)
"""
GREEDY = "rows = []\nwhile True: rows.append(b'x' * 1_000_000)"


def wait_for(condition, timeout_s=30):
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
def kernel():
    "Start a kernel under a guard: its provisioner, a client, and the manager"
    managers = []

    def kernel(**limits):
        manager = KernelManager()
        managers.append(manager)
        provisioner = guard_kernel(manager, **limits)
        manager.start_kernel()
        return provisioner, connect(manager), manager
    yield kernel
    for manager in managers: manager.shutdown_kernel(now=True)


def connect(manager):
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    return client


def run(client, source):
    "What a cell prints"
    printed = []
    client.execute_interactive(source, timeout=30, output_hook=lambda message: printed.append(message["content"].get("text", "")))
    return "".join(printed)


def test_memory_limit_and_cells(kernel):
    provisioner, client, manager = kernel(memory_limit="250MB")
    provisioner.mark(0)
    run(client, "data = b'x' * 40_000_000")
    provisioner.mark(None)
    provisioner.mark(7)
    client.execute(GREEDY)
    wait_for(lambda: not manager.is_alive())
    status = provisioner.read_status()
    assert (status["reason"], status["containment"]) == ("memory", "guard") and 250e6 <= status["peak_bytes"] < 300e6
    assert [cell["index"] for cell in status["cells"]] == [0, 7] and status["cells"][1]["peak_bytes"] == status["peak_bytes"]
    assert 39e6 < status["cells"][0]["end_bytes"] - status["cells"][0]["start_bytes"] < 50e6


def test_the_kernel_knows_its_limit(kernel):
    provisioner, client, _ = kernel(memory_limit="400MB", run_id="known")
    names = ("GAUSSSAFE_LIMIT_BYTES", "GAUSSSAFE_RUN", "GAUSSSAFE_GUARD_PID", "JPY_PARENT_PID")
    assert run(client, f"import os; print(*map(os.environ.get, {names}))").split() == ["400000000", "known", str(provisioner.pid), "1"]


def test_timeout():
    manager = KernelManager()
    provisioner = guard_kernel(manager, timeout="1s")
    manager.start_kernel()
    wait_for(lambda: not manager.is_alive())
    assert provisioner.read_status()["reason"] == "timeout"
    provisioner.mark(3)  # to a guard that is gone: not an error
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("setting, message", [
    ({"memory_limit": "2 gigs"}, "'2 gigs' is not a size"),
    ({"memory_limit": "0"}, "'0' is not a size"),
    ({"memory_limit": -1}, "-1 is not a size"),
    ({"timeout": "soon"}, "'soon' is not a duration"),
])
def test_malformed_settings_are_refused_before_anything_starts(setting, message):
    manager = KernelManager()
    provisioner = guard_kernel(manager, **setting)
    with pytest.raises(InvalidInput, match=message): manager.start_kernel()
    assert not provisioner.has_process and manager.connection_file == ""


def test_malformed_environment_is_refused(monkeypatch):
    monkeypatch.setenv("GAUSSSAFE_MEMORY_LIMIT", "lots")
    manager = KernelManager()
    guard_kernel(manager)
    with pytest.raises(InvalidInput, match="'lots' is not a size"): manager.start_kernel()


def test_sockets_are_private_and_go(kernel):
    provisioner, client, manager = kernel()
    folder = Path(manager.ip).parent
    assert manager.transport == "ipc" and stat.S_IMODE(folder.stat().st_mode) & 0o777 == 0o700
    assert {f"socket-{port}" for port in manager.ports} | {"kernel.json"} <= {path.name for path in folder.iterdir()}
    assert stat.S_IMODE(Path(manager.connection_file).stat().st_mode) == 0o600
    manager.shutdown_kernel()
    assert not folder.exists() and provisioner.read_status()["reason"] == "exited"


def test_tcp_is_a_choice():
    manager = KernelManager()
    guard_kernel(manager).transport = "tcp"
    manager.start_kernel()
    try: assert manager.transport == "tcp" and run(connect(manager), "print(1)") == "1\n"
    finally: manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("end", ["now", "politely", "terminate"])
def test_the_whole_tree_goes(kernel, end):
    provisioner, client, manager = kernel()
    run(client, "import subprocess; daemon = subprocess.Popen(['sleep', '300'], start_new_session=True)" if end == "politely" else FAMILY)
    wait_for(lambda: len(marked(provisioner.run_id)) == (2 if end == "politely" else 3))
    if end == "terminate":
        asyncio.run(provisioner.terminate())
        wait_for(lambda: not manager.is_alive())
    else: manager.shutdown_kernel(now=end == "now")
    assert marked(provisioner.run_id) == []
    status = provisioner.read_status()
    assert status["reason"] == ("exited" if end == "politely" else "terminated") and 1 <= len(status["leaked"]) <= 2  # the interrupt may end `sleep`


def test_interrupt(kernel):
    _, client, manager = kernel()
    run(client, "import time")
    message_id = client.execute("try: time.sleep(60)\nexcept KeyboardInterrupt: reached = True")
    wait_for(lambda: client.get_iopub_msg(timeout=30)["content"].get("execution_state") == "busy")
    time.sleep(0.3)
    manager.interrupt_kernel()
    while (reply := client.get_shell_msg(timeout=30))["parent_header"].get("msg_id") != message_id: pass
    assert reply["content"]["status"] == "ok" and run(client, "print(reached)") == "True\n"


def test_any_signal_reaches_the_kernel_not_the_guard(kernel):
    provisioner, client, manager = kernel()
    run(client, "import signal; got = []; signal.signal(signal.SIGUSR2, lambda *_: got.append(1))")
    manager.signal_kernel(signal.SIGUSR2)
    wait_for(lambda: run(client, "print(len(got))") == "1\n")
    kernel_pid = int(run(client, "import os; print(os.getpid())"))
    manager.signal_kernel(signal.SIGSTOP)
    wait_for(lambda: psutil.Process(kernel_pid).status() == "stopped")
    assert psutil.Process(provisioner.pid).status() != "stopped"
    manager.signal_kernel(signal.SIGCONT)
    assert run(client, "print(2)") == "2\n"


def test_restart_comes_back_under_a_guard(kernel):
    provisioner, client, manager = kernel(memory_limit="250MB")
    client.execute(GREEDY)
    wait_for(lambda: not manager.is_alive())
    first = provisioner.pid
    manager.restart_kernel(now=True)
    assert provisioner.pid != first and provisioner.read_status() is None
    client.wait_for_ready(timeout=60)  # the same client, over the same sockets
    client.execute(GREEDY)
    wait_for(lambda: not manager.is_alive())
    assert provisioner.read_status()["reason"] == "memory"


def test_restart_before_the_guard_is_up(kernel):
    "The stop travels on the lifeline, so that a guard that is still starting hears it too"
    manager = KernelManager()
    provisioner = guard_kernel(manager)
    manager.start_kernel()
    manager.shutdown_kernel(now=True)
    assert provisioner.read_status()["reason"] == "terminated" and marked(provisioner.run_id) == []


def test_a_killed_guard_takes_the_kernel_and_is_noticed(kernel):
    provisioner, client, manager = kernel()
    run(client, FAMILY)
    family = wait_for(lambda: len(found := marked(provisioner.run_id)) == 3 and found)
    os.kill(provisioner.pid, signal.SIGKILL)
    wait_for(lambda: not manager.is_alive())
    assert provisioner.read_status() is None
    wait_for(lambda: not any(map(is_alive, family)))


def test_a_thread_that_ends_does_not_take_its_kernel_along():
    manager = KernelManager()
    guard_kernel(manager)
    starter = threading.Thread(target=manager.start_kernel)
    starter.start()
    starter.join()
    try:
        client = connect(manager)
        time.sleep(0.3)
        assert run(client, "print(4)") == "4\n"
    finally: manager.shutdown_kernel(now=True)


def test_a_missing_interpreter_is_an_error_at_once():
    manager = KernelManager()
    manager.kernel_spec.argv[0] = "no-such-interpreter"
    guard_kernel(manager)
    with pytest.raises(FileNotFoundError, match="no-such-interpreter"): manager.start_kernel()


def test_async_manager():
    async def session():
        manager = AsyncKernelManager()
        provisioner = guard_kernel(manager, memory_limit="300MB")
        await manager.start_kernel()
        client = manager.client()
        client.start_channels()
        await client.wait_for_ready(timeout=60)
        reply = await client.execute_interactive("1 + 1", timeout=30)
        await manager.restart_kernel(now=True)
        await client.wait_for_ready(timeout=60)
        client.stop_channels()
        await manager.shutdown_kernel()
        return reply["content"]["status"], provisioner.read_status()["reason"], marked(provisioner.run_id)
    assert asyncio.run(session()) == ("ok", "exited", [])


def test_nested_limit_is_what_is_left(monkeypatch):
    limit_bytes = read_memory(os.getppid()).tree_bytes + 2_000_000_000  # The tests beside us, in the same tree, grow and shrink
    monkeypatch.setenv("GAUSSSAFE_LIMIT_BYTES", str(limit_bytes))
    monkeypatch.setenv("GAUSSSAFE_GUARD_PID", str(os.getppid()))
    assert 0 < effective_limit_bytes(100 * limit_bytes) < limit_bytes and effective_limit_bytes("100kB") == 100_000
    assert 0 < effective_limit_bytes(None) < limit_bytes
    monkeypatch.setenv("GAUSSSAFE_GUARD_PID", "4194305")  # an outer guard that is gone
    assert effective_limit_bytes(100 * limit_bytes) == limit_bytes


@pytest.fixture
def jupyter(tmp_path, monkeypatch):
    "Kernelspecs of our own, seen by nobody else"
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    return tmp_path


def test_kernelspecs_come_and_go(jupyter):
    before = {kernel.name for kernel in list_kernels()}
    path = install_kernel("Held-Test", memory_limit="500MB", timeout="8h", user=True)
    held = {kernel.name: kernel for kernel in list_kernels()}["held-test"]
    assert (held.memory_limit, held.timeout, held.path) == ("500MB", "8h", path) and "500MB" in held.display_name
    assert remove_kernel("held-test") == path and not Path(path).exists()
    assert {kernel.name for kernel in list_kernels()} == before
    with pytest.raises(InvalidInput, match="no kernel 'held-test' was installed by gausssafe"): remove_kernel("held-test")
    with pytest.raises(InvalidInput, match="'a b' is not a kernel name"): install_kernel("a b", user=True)
    with pytest.raises(InvalidInput, match="'2 gigs' is not a size"): install_kernel(memory_limit="2 gigs", user=True)


def test_remove_touches_no_other_kernel(jupyter):
    with pytest.raises(InvalidInput, match="no kernel 'python3' was installed by gausssafe"): remove_kernel("python3")


def test_an_unwritable_place_is_said(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InvalidInput, match="cannot install kernel 'x': .*user=True"): install_kernel("x", prefix=tmp_path / "file")


def test_nbclient_by_kernelspec(jupyter):
    install_kernel("held-test", memory_limit="250MB", user=True)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import os; print(os.environ['GAUSSSAFE_LIMIT_BYTES'])")])
    NotebookClient(notebook, kernel_name="held-test").execute()
    assert notebook.cells[0].outputs[0].text == "250000000\n"


def test_nbconvert_with_the_default_provisioner(tmp_path):
    "No kernelspec at all: two environment variables hold every kernel"
    cell = nbformat.v4.new_code_cell("import os; print(os.environ['GAUSSSAFE_LIMIT_BYTES'], os.environ['JPY_PARENT_PID'])")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "in.ipynb")
    env = os.environ | {"JUPYTER_DEFAULT_PROVISIONER_NAME": "gausssafe", "GAUSSSAFE_MEMORY_LIMIT": "300MB"}
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--output", "out.ipynb", tmp_path / "in.ipynb"]
    subprocess.run(command, env=env, check=True, capture_output=True)
    assert nbformat.read(tmp_path / "out.ipynb", 4).cells[0].outputs[0].text == "300000000 1\n"


SERVERLESS_RUNNER = """
import sys, time
from jupyter_client.manager import KernelManager
from gausssafe.provisioner import guard_kernel
manager = KernelManager()
guard_kernel(manager, run_id=sys.argv[1])
manager.start_kernel()
print(manager.ip, flush=True)
client = manager.client(); client.start_channels(); client.wait_for_ready(timeout=60)
client.execute_interactive(sys.argv[2], timeout=30)
print("ready", flush=True)
time.sleep(300)
"""


def test_a_killed_runner_leaves_neither_processes_nor_sockets():
    run_id = f"killed-{os.getpid()}-{time.monotonic_ns()}"
    runner = subprocess.Popen([sys.executable, "-c", SERVERLESS_RUNNER, run_id, FAMILY], stdout=subprocess.PIPE, text=True)
    try:
        folder = Path(runner.stdout.readline().strip()).parent
        assert runner.stdout.readline() == "ready\n"
        wait_for(lambda: len(marked(run_id)) == 3)
    finally:
        runner.kill()
        runner.communicate()
    wait_for(lambda: not marked(run_id) and not folder.exists(), 10)


@pytest.mark.parametrize("status, sentence", [
    ({"reason": "memory", "peak_bytes": 512_000_000, "limit_bytes": 500_000_000}, "stopped at its memory limit: peak 512 MB of 500 MB"),
    ({"reason": "exited", "machine_oom": True, "peak_bytes": 10**9},
     "killed by the operating system, which ran out of memory; its own peak was 1.00 GB"),
])
def test_the_log_says_why(status, sentence): assert module.explain_end(status) == sentence


class Server:
    "A Jupyter server of our own, spoken to as a browser does"

    def __init__(self, folder):
        self.port, self.token, self.folder = free_port(), uuid.uuid4().hex, folder
        names = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime"}
        env = os.environ | {"JUPYTER_TOKEN": self.token} | {key: str(folder / value) for key, value in names.items()}
        options = ["--no-browser", "--ip=127.0.0.1", f"--ServerApp.port={self.port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}"]
        with open(folder / "log", "wb") as log:
            command = [sys.executable, "-m", "jupyter_server", *options, "--allow-root", "--KernelRestarter.time_to_dead=0.5"]
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        wait_for(lambda: self.process.poll() is not None or self.answers(), 60)

    def answers(self):
        with contextlib.suppress(OSError): return self.ask("GET", "/api")

    def ask(self, method, path, body=None):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method, data=json.dumps(body).encode() if body else None,
                                         headers={"Authorization": f"token {self.token}", "Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as reply: return json.loads(reply.read() or "null")

    def run(self, kernel_id, source, wait=True):
        "What a cell prints"
        import websocket
        channel = websocket.create_connection(f"ws://127.0.0.1:{self.port}/api/kernels/{kernel_id}/channels?token={self.token}", timeout=60)
        header = {"msg_id": uuid.uuid4().hex, "username": "", "session": uuid.uuid4().hex, "msg_type": "execute_request", "version": "5.3"}
        content = {"code": source, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
        channel.send(json.dumps({"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell", "buffers": []}))
        printed, message = [], {"msg_type": None}
        while wait and not (message["msg_type"] == "status" and message["content"]["execution_state"] == "idle"):
            while (message := json.loads(channel.recv()))["parent_header"].get("msg_id") != header["msg_id"]: pass
            printed.append(message["content"].get("text", ""))
        if not wait: time.sleep(0.2)
        channel.close()
        return "".join(printed)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def server(jupyter):
    pytest.importorskip("jupyter_server")
    pytest.importorskip("websocket")
    install_kernel("held", memory_limit="500MB", user=True)
    servers = []

    def server():
        servers.append(Server(jupyter))
        return servers[-1]
    yield server
    for each in servers:
        each.process.terminate()
        each.process.wait(30)


def below(process):
    "Guards, kernels and all they started"
    return psutil.Process(process.pid).children(recursive=True)


def is_alive(process):
    "Neither gone nor dead and waiting for init to notice"
    with contextlib.suppress(psutil.Error): return process.is_running() and process.status() != "zombie"
    return False


@pytest.mark.slow
def test_jupyter_server_restarts_a_killed_kernel_under_a_guard(server):
    a_server = server()
    kernel_id = a_server.ask("POST", "/api/kernels", {"name": "held"})["id"]
    show = "import os; print(os.environ['GAUSSSAFE_LIMIT_BYTES'], os.environ['GAUSSSAFE_GUARD_PID'])"
    limit, first = a_server.run(kernel_id, show).split()
    a_server.run(kernel_id, FAMILY)
    a_server.run(kernel_id, GREEDY, wait=False)
    wait_for(lambda: not psutil.pid_exists(int(first)) or psutil.Process(int(first)).status() == "zombie")
    wait_for(lambda: len(below(a_server.process)) == 2)  # another guard and its kernel, and nothing of the first
    said = a_server.run(kernel_id, "pass")
    assert "gausssafe: the kernel before this one was stopped at its memory limit: peak 5" in said and "of 500 MB in In [3], line 2" in said
    limit_again, second = a_server.run(kernel_id, show).split()
    assert limit == limit_again == "500000000" and first != second
    log = (a_server.folder / "log").read_text()
    assert "stopped at its memory limit: peak 5" in log and "of 500 MB" in log


@pytest.mark.torture
def test_fifty_killed_jupyter_servers_leave_nothing(server):
    for _ in range(50):
        a_server = server()
        kernel_id = a_server.ask("POST", "/api/kernels", {"name": "held"})["id"]
        if random.random() < 0.7: a_server.run(kernel_id, FAMILY)
        time.sleep(random.uniform(0, 0.3))
        family = below(a_server.process)
        a_server.process.kill()
        a_server.process.wait()
        assert len(family) >= 2
        wait_for(lambda family=family: not any(map(is_alive, family)), 1)
