"The commands, typed as the README types them"
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from click.testing import CliRunner

from gausssafe.cli import main

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
COMMAND = Path(sys.executable).parent / "gausssafe"


@pytest.fixture
def notebook(tmp_path):
    def notebook(*sources):
        cells = [nbformat.v4.new_code_cell("epochs = 1", metadata={"tags": ["parameters"]}), *map(nbformat.v4.new_code_cell, sources)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), tmp_path / "in.ipynb")
        return str(tmp_path / "in.ipynb")
    return notebook


def gausssafe(*args, **options): return subprocess.run([COMMAND, *map(str, args)], capture_output=True, text=True, **options)


def test_as_a_module():
    def module(*args): return subprocess.run([sys.executable, "-m", "gausssafe.cli", *args], capture_output=True, text=True)
    assert module("--help").stdout.startswith("Usage: ")
    refused = module("clean")
    assert refused.returncode == 2 and refused.stderr.startswith("gausssafe: say what to clean")


def test_run_prints_record_and_progress(notebook, tmp_path):
    (tmp_path / "params.yaml").write_text("epochs: 5\n")
    limits = ("--memory-limit", "1GB", "--timeout", "10m")
    done = gausssafe("run", notebook("epochs"), tmp_path / "out/out.ipynb", "-f", tmp_path / "params.yaml", "-p", "epochs", "2", *limits)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ok in ") and "of 1.00 GB (" in done.stdout and "out.record.json" in done.stdout
    assert "cell 2 (In [3]), 3 of 3: " in done.stderr
    assert nbformat.read(tmp_path / "out/out.ipynb", as_version=4).cells[-1].outputs[0].data["text/plain"] == "2"


@pytest.mark.parametrize("source, options, code, status", [
    ("1 / 0", (), 1, "error"),
    ("b = [bytearray(10_000_000) for _ in range(100)]", ("--memory-limit", "200MB"), 3, "oom_ram"),
    ("import time; time.sleep(60)", ("--timeout", "4s"), 4, "timeout"),
    ("import os, signal, time; os.kill(os.getppid(), signal.SIGKILL); time.sleep(30)", (), 5, "lost"),
])
def test_exit_codes(notebook, tmp_path, source, options, code, status):
    done = gausssafe("run", notebook(source), tmp_path / "out.ipynb", "--json", "--quiet", *options)
    assert done.returncode == code, done.stderr
    # nbclient interrupts a kernel before it shuts it down; one that is still busy with its error says so
    told = [line for line in done.stderr.splitlines() if line != "[IPKernelApp] ERROR | KeyboardInterrupt caught in kernel."]
    assert json.loads(done.stdout)["status"] == status and told == []


@pytest.mark.parametrize("args, message", [
    (("gone.ipynb", "out.ipynb"), "gausssafe: no such notebook: gone.ipynb"),
    (("IN", "out.ipynb", "-p", "epoch", "3"), "gausssafe: unknown parameter 'epoch': IN has epochs"),
    (("IN", "out.ipynb", "--memory-limit", "2 gigs"),
     "gausssafe: '2 gigs' is not a size: write \"2GB\" (10^9 bytes each), \"2GiB\" (2^30), or whole bytes such as 2000000000"),
    (("IN", "out.ipynb", "--memory-limit", "0"), "gausssafe: '0' is not a size"),
    (("IN", "out.ipynb", "--memory-limit", "-1"), "gausssafe: '-1' is not a size"),
    (("IN", "out.ipynb", "--timeout", "soon"), "gausssafe: 'soon' is not a duration"),
    (("IN", "out.ipynb", "--kernel", "julia-9"), "gausssafe: unknown kernel 'julia-9': this machine has"),
    (("IN", "IN/out.ipynb"), "gausssafe: cannot write IN/out.ipynb"),
    (("IN", "out.ipynb", "-f", "gone.yaml"), "gausssafe: no such parameters file: gone.yaml"),
])
def test_mistyped_is_one_line_and_exit_2(notebook, args, message):
    path = notebook("epochs")
    result = CliRunner().invoke(main, ["run", *(a.replace("IN", path) for a in args)])
    assert result.exit_code == 2 and result.output.startswith(message.replace("IN", path)) and result.output.count("\n") == 1


def test_help_teaches():
    for command in ((), ("run",), ("memory",), ("doctor",), ("kernel",), ("kernel", "install")):
        result = CliRunner().invoke(main, [*command, "--help"])
        assert result.exit_code == 0 and len(result.output.splitlines()) > 5
    assert "Exit codes: 0 ok, 1 the notebook raised, 2 usage, 3 memory, 4 time-out, 5 lost." in CliRunner().invoke(main, ["run", "--help"]).output


def test_memory():
    result = json.loads(CliRunner().invoke(main, ["memory", "--json"]).output)
    assert result["left_bytes"] > 0 and min(result["limits"].values()) > 0
    assert "left now" in CliRunner().invoke(main, ["memory"]).output


def test_kernels_come_and_go(tmp_path):
    env = os.environ | {"JUPYTER_DATA_DIR": str(tmp_path)}
    listed = gausssafe("kernel", "list", env=env)
    done = gausssafe("kernel", "install", "--memory-limit", "2GB", "--name", "held-test", env=env)
    try:
        assert done.returncode == 0 and "installed held-test (2GB)" in done.stdout
        assert "held-test" in gausssafe("kernel", "list", env=env).stdout and "held-test" not in listed.stdout
    finally: removed = gausssafe("kernel", "remove", "held-test", env=env)
    assert removed.returncode == 0 and "held-test" not in gausssafe("kernel", "list", env=env).stdout
    again = gausssafe("kernel", "remove", "held-test", env=env)
    assert again.returncode == 2 and again.stderr.startswith("gausssafe: ") and again.stderr.count("\n") == 1


def test_kernel_install_refuses_a_malformed_size():
    result = CliRunner().invoke(main, ["kernel", "install", "--memory-limit", "2 gigs"])
    assert result.exit_code == 2 and result.output.startswith("gausssafe: '2 gigs' is not a size")
