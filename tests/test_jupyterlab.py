"JupyterLab as its user meets it: a kernel that is held at 500 MB, in a real server and a real browser"
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.request import Request, urlopen

import nbformat
import psutil
import pytest

from gausssafe.provisioner import install_kernel

pytestmark = [pytest.mark.torture, pytest.mark.timeout(240)]
pytest.importorskip("jupyterlab", reason="the lab extra is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if not CHROMIUM: pytest.skip("no chromium on this machine", allow_module_level=True)
FLAGS = [f"--{flag}" for flag in ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-sync")]
LIMIT_BYTES = 500_000_000
CELLS = [
    'import os, subprocess; subprocess.Popen(["setsid", "sleep", "600"]); print("first kernel", os.getpid())',
    'hog = [b"x" * 20_000_000 for _ in range(200)]  # 4 GB, in a kernel that is held at 500 MB',
    'import os; print("kernel again", os.getpid())',
    "import time; time.sleep(600)",
]


def wait_for(condition, timeout_s=60):
    "The condition's first true value"
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {timeout_s} s in vain"
        time.sleep(0.1)
    return value


def processes_of(token):
    "Everything that was started with this server's token in its environment"
    found = []
    for process in psutil.process_iter():
        try: found += [process] if process.environ().get("JUPYTER_TOKEN") == token else []
        except psutil.Error: continue
    return found


def names_of(token): return {process.name() for process in processes_of(token)}


def make_home(folder, token):
    "Private Jupyter folders, with the news and the tours switched off, and the notebook"
    names = ("CONFIG", "DATA", "RUNTIME", "LAB_SETTINGS", "LAB_WORKSPACES")
    env = {f"JUPYTER{'' if name.startswith('LAB') else '_'}{name}_DIR": str(folder / name.lower()) for name in names}
    quiet = folder / "lab_settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    (folder / "work").mkdir()
    return os.environ | env | {"JUPYTER_PATH": str(folder / "prefix/share/jupyter"), "JUPYTER_TOKEN": token, "IPYTHONDIR": str(folder / "ipython")}


def write_notebook(path, kernel_name):
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    spec = {"name": kernel_name, "display_name": kernel_name, "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": spec}), path)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server: return server.getsockname()[1]


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab server of our own"
    token, port = secrets.token_hex(8), free_port()
    scratch = Path(tempfile.mkdtemp())  # a short path: a socket's has 107 characters at most
    env = make_home(tmp_path, token) | {"TMPDIR": str(scratch)}
    kernel = Path(install_kernel(memory_limit="500MB", prefix=tmp_path / "prefix")).name
    write_notebook(tmp_path / "work/hog.ipynb", kernel)
    options = [f"--port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={tmp_path / 'work'}", "--allow-root", "--no-browser",
               "--ip=127.0.0.1", "--ServerApp.terminals_enabled=False", "--LabApp.extension_manager=readonly"]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyter", "lab", *options], env=env, stdout=log, stderr=log, start_new_session=True)
    yield SimpleNamespace(server=server, token=token, url=f"http://127.0.0.1:{port}", log=tmp_path / "server.log", folder=tmp_path, scratch=scratch)
    for process in processes_of(token): process.kill()
    shutil.rmtree(scratch)


def answers(lab):
    try: return urlopen(Request(f"{lab.url}/api/status", headers={"Authorization": f"token {lab.token}"}), timeout=5).status == 200
    except OSError: return False


class Notebook:
    "What a user does and sees in JupyterLab"
    def __init__(self, page, lab):
        self.page, self.folder = page, lab.folder
        page.goto(f"{lab.url}/lab/tree/hog.ipynb?reset&token={lab.token}")
        page.wait_for_selector(".jp-Cell")
        self.wait_until_idle()

    def wait_until_idle(self): self.page.wait_for_selector("#jp-main-statusbar >> text=/\\| Idle/", timeout=60_000)
    def look(self, name): self.page.screenshot(path=self.folder / f"{name}.png")
    def output(self, i): return "\n".join(self.page.locator(".jp-CodeCell").nth(i).locator(".jp-OutputArea-output").all_inner_texts())

    def choose(self, menu, entry):
        self.page.click(f".lm-MenuBar-item:has-text('{menu}')")
        self.page.click(f".lm-Menu-item:has-text('{entry}')")

    def pid_of(self, i, words):
        "The process id that a cell printed after its words"
        return int(wait_for(lambda: re.search(rf"{words} (\d+)", self.output(i)))[1])

    def run_cell(self, i):
        self.page.locator(".jp-CodeCell").nth(i).locator(".jp-InputArea-editor").click()
        self.page.keyboard.press("Shift+Enter")

    def read_dialog(self):
        "The words of the dialog that comes up, which is then accepted"
        words = self.page.locator(".jp-Dialog-content").inner_text(timeout=60_000)
        self.look("dialog")
        self.page.click(".jp-Dialog .jp-mod-accept")
        return words


@pytest.fixture
def notebook(lab):
    wait_for(lambda: answers(lab))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield Notebook(browser.new_page(viewport={"width": 1280, "height": 900}), lab)
        browser.close()


def test_a_kernel_killed_at_its_limit_comes_back_under_guard(lab, notebook):
    notebook.choose("Run", "Run All Cells")
    assert "appears to have died. It will restart automatically" in notebook.read_dialog()
    first = notebook.pid_of(0, "first kernel")
    notebook.wait_until_idle()
    notebook.run_cell(2)
    again = notebook.pid_of(2, "kernel again")
    notebook.look("again")
    assert "the kernel before this one was stopped at its memory limit" in notebook.output(2) and "in In [2], line 1" in notebook.output(2)
    assert again != first and not psutil.pid_exists(first) and "sleep" not in names_of(lab.token)
    assert psutil.Process(again).environ()["GAUSSSAFE_LIMIT_BYTES"] == str(LIMIT_BYTES)
    assert "stopped at its memory limit: peak 5" in lab.log.read_text() and "of 500 MB" in lab.log.read_text()
    notebook.run_cell(1)
    assert "appears to have died" in notebook.read_dialog(), "the second kernel is held too"
    wait_for(lambda: not psutil.pid_exists(again))


def test_nothing_is_left_of_a_killed_server(lab, notebook):
    notebook.run_cell(0)
    kernel = notebook.pid_of(0, "first kernel")
    assert {kernel, lab.server.pid} < {p.pid for p in processes_of(lab.token)} and "sleep" in names_of(lab.token)
    assert list(lab.scratch.glob("gausssafe-*/socket*"))
    lab.server.kill()
    lab.server.wait()
    wait_for(lambda: not processes_of(lab.token), timeout_s=5)
    assert not list(lab.scratch.glob("gausssafe-*")), "its sockets are gone with it"


def test_interrupt_and_restart_reach_the_kernel(lab, notebook):
    notebook.run_cell(0)
    first = notebook.pid_of(0, "first kernel")
    notebook.run_cell(3)
    notebook.page.wait_for_selector("#jp-main-statusbar >> text=/\\| Busy/", timeout=60_000)
    notebook.choose("Kernel", "Interrupt Kernel")
    assert "KeyboardInterrupt" in wait_for(lambda: notebook.output(3))
    notebook.wait_until_idle()
    notebook.choose("Kernel", "Restart Kernel…")
    assert "Restart Kernel?" in notebook.read_dialog()
    wait_for(lambda: not psutil.pid_exists(first) and "sleep" not in names_of(lab.token))
    notebook.wait_until_idle()
    notebook.run_cell(2)
    assert psutil.Process(notebook.pid_of(2, "kernel again")).environ()["GAUSSSAFE_LIMIT_BYTES"] == str(LIMIT_BYTES)
