"A weekend in minutes: runs that die of everything, and a batch that is shot at. The short forms run in `make test`, the long ones in `make torture`"
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest

from gausssafe.batch import run_batch
from gausssafe.guard import clear_leftovers
from gausssafe.journal import read_journal
from gausssafe.settings import BatchSpec

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
COMMAND = Path(sys.executable).parent / "gausssafe"

FAULTS = {  # What a run does, the status it deserves, and, with papermill's insertions, cell 5
    "none": ("done = True", "ok"),
    "flaky": ("from pathlib import Path\nseen = Path(folder) / 'seen'\nif not seen.exists(): seen.touch(); raise OSError('not at once')", "ok"),
    "stray": ("import subprocess\nsubprocess.Popen(['setsid', 'sleep', '1000'])", "ok"),
    "segment": ("from multiprocessing import shared_memory, resource_tracker\nblock = shared_memory.SharedMemory(create=True, size=2**20)\n"
                "resource_tracker.unregister(block._name, 'shared_memory')\nblock.buf[:] = bytes(2**20)", "ok"),
    "vanish": ("from pathlib import Path\nimport os, psutil, time\nseen = Path(folder) / 'seen'\n"  # Its guard is killed, the first time
               "if not seen.exists(): seen.touch(); os.kill(os.getppid(), 9); time.sleep(60)", "ok"),
    "greedy": ("blocks = [bytearray(10**7) for _ in range(100)]", "oom_ram"),
    "hang": ("import time\ntime.sleep(1000)", "timeout"),
    "crash": ("import os\nos.kill(os.getpid(), 11)", "error"),
    "mistake": ("1 / 0", "error"),
}


def write_notebook(path, source, *before):
    cells = [nbformat.v4.new_code_cell("number, folder = 0, ''", metadata={"tags": ["parameters"]}), *map(nbformat.v4.new_code_cell, before),
             nbformat.v4.new_code_cell(source), nbformat.v4.new_code_cell("print(number, 'done')")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}), path)


def processes(marker):
    "Living processes that have to do with a folder"
    found = []
    for process in psutil.process_iter():
        try:
            mine = process.pid != os.getpid() and marker in " ".join(process.cmdline())
            if mine and process.status() != psutil.STATUS_ZOMBIE: found.append(process)
        except psutil.Error: pass
    return found


def marked():
    "Living processes that carry the marks of a guard which is dead: what the janitor finds"
    return clear_leftovers()


def replay(tmp_path, n_of_each, warm=("json",)):
    "Every fault so many times, in one batch"
    experiments = []
    for name, (source, expect) in FAULTS.items():
        write_notebook(tmp_path / f"{name}.ipynb", source, "before = 1")
        experiments.append({"notebook": str(tmp_path / f"{name}.ipynb"), "grid": {"number": list(range(n_of_each.get(name, 0)))}, "expect": expect,
                            "parameters": {"folder": "{run_folder}"}, "max_retries": 1 if expect == "ok" else 0,
                            "timeout": "4s" if name == "hang" else "60s"})
    spec = BatchSpec(name="weekend", memory_limit="300MB", order="shuffled", experiments=[e for e in experiments if e["grid"]["number"]])
    return run_batch(spec, tmp_path / "results", jobs=3, memory="1500MB", warm=warm)


def check_replay(result, n_of_each):
    rows = {(row["run_experiment"], row["number"]): row for row in result.rows}
    assert len(rows) == len(result.rows) == sum(n_of_each.values())
    wrong = [(key, row["status"], row["run_error"]) for key, row in rows.items() if row["status"] != FAULTS[key[0]][1]]
    assert not wrong, wrong
    assert {row["run_cell"] for (name, _), row in rows.items() if FAULTS[name][1] != "ok"} <= {5}
    assert all(row["attempts"] == (2 if name == "flaky" else 1) and row["run_lost"] == (name == "vanish") for (name, _), row in rows.items())
    assert result.exit_code == 0
    assert not marked() and not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "1000"]]


def test_every_way_to_die_once(tmp_path):
    n_of_each, segments = dict.fromkeys(FAULTS, 1), set(os.listdir("/dev/shm"))
    check_replay(replay(tmp_path, n_of_each), n_of_each)
    assert not [name for name in set(os.listdir("/dev/shm")) - segments if name.startswith("psm_")]


@pytest.mark.torture
def test_a_weekend_of_160_runs(tmp_path, record_property):
    n_of_each = {"none": 80, "flaky": 16, "stray": 12, "segment": 8, "vanish": 8, "greedy": 16, "hang": 8, "crash": 6, "mistake": 6}
    result = replay(tmp_path, n_of_each)
    print("\n" + pd.crosstab(result.table["run_experiment"], result.table["status"]).to_string())
    check_replay(result, n_of_each)


# Shots in the dark

def targets(batch_pid, warm):
    "Everything of a batch that can be shot: pids by kind"
    kinds, found, level = [*(["warm parent"] if warm else []), "run", "guard", "kernel"], {"batch": [batch_pid]}, [batch_pid]
    for kind in kinds:
        try: level = [child.pid for pid in level for child in psutil.Process(pid).children()]
        except psutil.Error: break
        if level: found[kind] = level
    return found


def shoot_at(tmp_path, n_shots, n_runs, warm, seed, gap_s):
    "Kill something at random until so many shots have hit; start the batch again when it is gone. What was hit"
    write_notebook(tmp_path / "short.ipynb", "import time\ntime.sleep(0.2)")
    page = {"name": "target", "memory_limit": "300MB", "max_retries": 50, "experiments": [{"notebook": str(tmp_path / "short.ipynb"),
                                                                        "grid": {"number": list(range(n_runs))}}]}
    (tmp_path / "s.json").write_text(json.dumps(page))
    command = [COMMAND, "batch", tmp_path / "s.json", "--results", tmp_path / "results", "--memory", "1GB", "-q", *(["--warm", warm] if warm else [])]
    log, g, hits, process = (tmp_path / "log").open("ab"), random.Random(seed), Counter(), None
    while hits.total() < n_shots:
        if process is None or process.poll() is not None:
            if process is not None and process.returncode == 0: break
            process = subprocess.Popen(command, stdout=log, stderr=log)
        time.sleep(g.uniform(0, gap_s))
        aims = targets(process.pid, warm)
        kind = g.choices(["batch", "warm parent", "run", "guard", "kernel"], [1, 1, 3, 3, 3])[0]
        if kind not in aims: continue
        try: os.kill(g.choice(aims[kind]), signal.SIGKILL)
        except ProcessLookupError: continue
        hits[kind] += 1
        if kind == "batch": process.wait()
    process.wait()
    for _ in range(3):  # A run that was hit too often is given up as lost; the same command tries it again
        process = subprocess.run(command, stdout=log, stderr=log, timeout=900)
        if process.returncode == 0: break
    log.close()
    return hits, process.returncode


def check_nothing_lost(tmp_path, n_runs, segments):
    journals = list(tmp_path.glob("results/*/journal.jsonl"))
    assert len(journals) == 1
    table = pd.read_csv(journals[0].parent / "summary.csv")
    assert sorted(table["number"]) == list(range(n_runs)) and set(table["status"]) == {"ok"}, Counter(table["status"])
    ends = Counter(e["key"] for e in read_journal(journals[0]) if e["event"] == "end" and e["row"]["status"] == "ok")
    assert set(ends.values()) == {1} and len(ends) == n_runs
    clear_leftovers()
    deadline_s = time.monotonic() + 10
    while processes(str(tmp_path)) and time.monotonic() < deadline_s: time.sleep(0.1)
    assert not processes(str(tmp_path)), [p.cmdline() for p in processes(str(tmp_path))]
    assert set(os.listdir("/dev/shm")) <= segments


def test_eight_shots_and_nothing_is_lost(tmp_path):
    segments = set(os.listdir("/dev/shm"))
    hits, code = shoot_at(tmp_path, 8, 6, "json", seed=4, gap_s=0.8)
    assert code == 0 and hits
    check_nothing_lost(tmp_path, 6, segments)


@pytest.mark.torture
@pytest.mark.parametrize("n_shots, n_runs, warm", [(240, 500, "json"), (60, 120, "")])
def test_300_shots_and_nothing_is_lost(tmp_path, n_shots, n_runs, warm):
    segments = set(os.listdir("/dev/shm"))
    hits, code = shoot_at(tmp_path, n_shots, n_runs, warm, seed=7, gap_s=0.6 if warm else 1.2)
    print("warm" if warm else "cold", dict(hits))
    assert code == 0 and hits.total() == n_shots
    check_nothing_lost(tmp_path, n_runs, segments)


@pytest.mark.torture
def test_a_thousand_runs_do_not_grow(tmp_path):
    "The batch's own process, its journal and its report stay small"
    write_notebook(tmp_path / "tiny.ipynb", "pass")
    experiment = {"notebook": str(tmp_path / "tiny.ipynb"), "grid": {"number": list(range(1000))}}
    page = {"name": "thousand", "memory_limit": "200MB", "experiments": [experiment]}
    (tmp_path / "s.json").write_text(json.dumps(page))
    command = [COMMAND, "batch", tmp_path / "s.json", "--results", tmp_path / "results", "--memory", "1GB", "-q", "--warm", "json"]
    process = subprocess.Popen(command)
    sizes = []
    while process.poll() is None:
        try: sizes.append(psutil.Process(process.pid).memory_info().rss)
        except psutil.Error: break
        time.sleep(1)
    assert process.wait() == 0
    settled = sizes[len(sizes) // 10:-5]
    print(f"{settled[0] / 1e6:.0f} MB at first, {settled[-1] / 1e6:.0f} MB at the end")
    assert max(settled) < 200e6 and settled[-1] < settled[0] + 20e6
    folder, = tmp_path.glob("results/run_*")
    assert (folder / "journal.jsonl").stat().st_size + (folder / "report.html").stat().st_size < 200e6
