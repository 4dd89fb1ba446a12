"""Whether the autopsy names the right line, how much later a run ends for it, and what it costs a run that lives.

    python benchmarks/autopsy.py [--tries 5] [--only lines,overshoot,cost] [--out benchmarks/results/autopsy.json]

Lines: ten bombs and three hangs (tests/bombs.py), each several times; what `gausssafe explain` says of each is kept as text.
Overshoot: 4 GB under a limit of 1 GB, with the stacks asked for, by our record and by the operating system's high-water mark.
Cost: a notebook that grows to nine tenths of its limit and lives, with and without a witness, in turn.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from bombs import BOMBS, KERNEL, verdict, write  # noqa: E402

from gausssafe import provisioner  # noqa: E402
from gausssafe.explain import explain  # noqa: E402
from gausssafe.guard import GuardSpec, guard_command  # noqa: E402
from gausssafe.runner import run_notebook  # noqa: E402

LIMIT = 10**9
WITNESS = "import os\nfrom gausssafe.witness import open_journal\nopen_journal(os.environ['GAUSSSAFE_JOURNAL'], (45, 46))\n"
ONE_BLOCK = "b'x' * 4_000_000_000"
IN_PIECES = "kept = []\nwhile len(kept) < 400: kept.append(b'x' * 10_000_000)"
THREAD = f"import threading\nt = threading.Thread(target=lambda: {ONE_BLOCK})\nt.start()\nt.join()"
EIGHT = ("import subprocess, sys\n"
         f"for child in [subprocess.Popen([sys.executable, '-c', {IN_PIECES!r}]) for _ in range(8)]: child.wait()")
LIVES = """import time
import numpy as np
began = time.process_time()
kept = []
for i in range(90):
    kept.append(np.ones(1_000_000))
    for _ in range(8): kept[-1] = np.sqrt(kept[-1] + 1)
    sum(range(200_000))
print(time.process_time() - began)"""


def lines(tries):
    "Right answers by bomb, and what is said of the last try of each"
    found, texts = {}, []
    for name in BOMBS:
        with TemporaryDirectory() as folder:
            folder = Path(folder)
            for i in range(tries):
                record = run_notebook(write(name, folder), folder / "out.ipynb", check=False, cwd=folder, **BOMBS[name].limits)
                wrong = verdict(name, record)
                row = found.setdefault(name, {"right": 0, "tries": tries, "place": record.place})
                row["right"] += not wrong
                if wrong: row.setdefault("wrong", []).append(wrong)
                if i == tries - 1: texts.append(f"== {name}\n\n{explain(record.output_path)}\n".replace(sys.executable, "python"))
        print(f"{name:18} {found[name]['right']} of {tries}  {found[name]['place'][:90]}", flush=True)
    return found, "\n".join(texts)


def guarded(code):
    "The status of a guarded command that bears witness, and the high-water mark of what was reaped"
    with TemporaryDirectory() as folder:
        spec = GuardSpec("bench", LIMIT, status_path=f"{folder}/status.json", runner_pid=os.getpid(), journal_path=f"{folder}/journal")
        process = subprocess.Popen([*guard_command(spec), sys.executable, "-c", WITNESS + code], stdin=subprocess.PIPE)
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0
        process.stdin.close()
        return json.loads(Path(spec.status_path).read_text()), usage.ru_maxrss * 1024


def overshoot(code, tries):
    "Percent above the limit, by both readings, and how often there were stacks"
    record, mark, n_told = [], [], 0
    for _ in range(tries):
        status, high_water = guarded(code)
        assert status["reason"] == "memory", status
        record.append(100 * (status["peak_bytes"] / LIMIT - 1))
        if not status["child"]: mark.append(100 * (max(high_water, status["kernel_hwm_bytes"]) / LIMIT - 1))
        n_told += "Current thread" in status["journal"]
    return {"record, worst %": round(max(record), 2), "median %": round(statistics.median(record), 2),
            **({"high-water mark, worst %": round(max(mark), 2)} if mark else {}), "with stacks": f"{n_told} of {tries}"}


def lived(folder, witness):
    "CPU seconds of the work inside the notebook, handlers of signals included, and the whole record"
    keep, provisioner._with_witness = provisioner._with_witness, provisioner._with_witness if witness else lambda command, spec: command
    try: record = run_notebook(folder / "lives.ipynb", folder / "out.ipynb", memory_limit="900MB")
    finally: provisioner._with_witness = keep
    return float(nbformat.read(folder / "out.ipynb", as_version=4).cells[0].outputs[0].text), record


def cost(tries):
    "With and without a witness, in turn"
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(LIVES)], metadata=KERNEL), folder / "lives.ipynb")
        pairs = []
        for i in range(tries):  # who comes first takes turns too
            found = {witness: lived(folder, witness) for witness in ((True, False) if i % 2 else (False, True))}
            pairs.append((found[True], found[False]))
    seconds = np.array([[run[0] for run in pair] for pair in pairs])
    drawn = np.median(seconds[np.random.default_rng(0).integers(tries, size=(5000, tries))], axis=1)
    asked = [len(pair[0][1].growth) for pair in pairs]
    assert not pairs[0][1][1].growth
    with_s, without_s = np.median(seconds, axis=0)
    return {"with, median CPU s": round(with_s, 4), "without, median CPU s": round(without_s, 4), "ratio": round(with_s / without_s, 4),
            "ratio, 95 % interval": np.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975)).round(4).tolist(),
            "fastest with / fastest without": round(seconds[:, 0].min() / seconds[:, 1].min(), 4), "times asked": max(asked), "pairs": tries}


def cpu_s(pid): return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def price_of_a_question(tries=500):
    "CPU milliseconds that a thread spends on writing its own stack of thirty calls"
    code = WITNESS + "import time\ndef dive(n):\n    if n: return dive(n - 1)\n    print('deep', flush=True)\n    time.sleep(600)\ndive(30)"
    with TemporaryDirectory() as folder:
        process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"GAUSSSAFE_JOURNAL": f"{folder}/journal"}, stdout=subprocess.PIPE)
        process.stdout.readline()
        journal = Path(folder, "journal")
        began, size, one = cpu_s(process.pid), journal.stat().st_size, 0
        for i in range(tries):
            process.send_signal(46)
            time.sleep(0.02 if i == 0 else 0)  # the first answer says how long an answer is
            one = one if i else journal.stat().st_size - size
            while journal.stat().st_size < size + (i + 1) * one: time.sleep(0.0005)
        took_s = cpu_s(process.pid) - began
        process.kill()
        process.communicate()
    return {"CPU ms": round(1e3 * took_s / tries, 3), "questions": tries, "at most, times a run": 2 * 20}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--only", default="lines,overshoot,cost")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "autopsy.json")
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    results["machine"] = {"system": platform.platform(), "python": platform.python_version(), "n_cores": os.cpu_count(),
                          "memory_bytes": psutil.virtual_memory().total, "load": os.getloadavg()[0]}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if "lines" in options.only:
        results["lines"], text = lines(options.tries)
        options.out.with_name("autopsy.txt").write_text(text)
    for name, code in (("one block of 4 GB", ONE_BLOCK), ("in pieces of 10 MB", IN_PIECES), ("in a thread", THREAD), ("8 children", EIGHT)):
        if "overshoot" not in options.only: break
        results[f"overshoot, {name}"] = overshoot(code, 2 * options.tries)
        print(name, results[f"overshoot, {name}"], flush=True)
    if "cost" in options.only:
        results["cost of a run that lives"], results["a question"] = cost(options.tries), price_of_a_question()
        print(results["cost of a run that lives"], results["a question"], sep="\n")
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__": main()
