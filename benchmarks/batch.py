"""Batches: short runs by papermill's command, by papermill in one process, and by us, cold and warm, on the same notebook.

    python benchmarks/batch.py [--runs 100] [--only throughput,cleanup,admission] [--out benchmarks/results]

- throughput: seconds for all runs of a notebook that imports torch: the papermill command in a shell loop, two such loops at a time,
  papermill's API in one process, `gausssafe batch` with two jobs cold, and with `--warm torch`. All start-up is counted. The outputs of every
  run are compared between all of them.
- cleanup: seconds from the last cell of a run to an empty tree, and those that the guard needed to end it.
- admission: runs of 181 MB that declare 400 MB (2.2 times as much) or 1 GB (5.5 times), in two fixed slots and by learned peaks.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat

from gausssafe.batch import run_batch
from gausssafe.settings import BatchSpec

BIN = Path(sys.executable).parent
SHORT = "import torch\ntorch.manual_seed(number)\nx = torch.randn(64, 64)\nprint(number, float((x @ x.T).trace()))"
STRAY = "import subprocess\nload = subprocess.Popen(['setsid', 'sleep', '1000'])\nblock = bytearray(200_000_000)"
SLEEPY = "import time\nblock = bytearray(80_000_000)\nblock[::4096] = b'x' * len(block[::4096])\ntime.sleep(4)"


def write_notebook(path, source):
    cells = [nbformat.v4.new_code_cell("number = 0", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(source)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


def printed(paths):
    "What each run printed, in the order of the runs"
    return [["".join(o.get("text", "") for o in cell.get("outputs", [])) for cell in nbformat.read(path, as_version=4).cells] for path in paths]


def by_command(folder, n_runs, n_loops):
    "`papermill in.ipynb out.ipynb -p number i`, in a loop of a shell, or in several"
    def loop(numbers):
        lines = [f"{BIN}/papermill {folder}/in.ipynb {folder}/command-{n_loops}-{i}.ipynb -p number {i} --no-progress-bar" for i in numbers]
        subprocess.run(["sh", "-e", "-c", "\n".join(lines)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ONE_THREAD)
    with ThreadPoolExecutor(n_loops) as pool: list(pool.map(loop, [range(k, n_runs, n_loops) for k in range(n_loops)]))
    return printed(f"{folder}/command-{n_loops}-{i}.ipynb" for i in range(n_runs))


def by_api(folder, n_runs):
    code = (f"import papermill\nfor i in range({n_runs}):\n"
            f"    papermill.execute_notebook('{folder}/in.ipynb', f'{folder}/api-{{i}}.ipynb', dict(number=i), progress_bar=False)")
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ONE_THREAD)
    return printed(f"{folder}/api-{i}.ipynb" for i in range(n_runs))


def by_batch(folder, n_runs, *warm):
    "Ours, by its command, with its start and its report"
    page = {"name": "short", "memory_limit": "600MB", "experiments": [{"notebook": f"{folder}/in.ipynb", "grid": {"number": list(range(n_runs))}}]}
    Path(folder, "s.json").write_text(json.dumps(page))
    results = Path(folder, "warm" if warm else "cold")
    command = [BIN / "gausssafe", "batch", f"{folder}/s.json", "--results", results, "--jobs", "2", "--memory", "2GB", "--new", "-q", *warm]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=ONE_THREAD)
    rows = [e["row"] for line in next(results.glob("run_*/journal.jsonl")).open() if (e := json.loads(line))["event"] == "end"]
    rows.sort(key=lambda row: row["number"])
    assert len(rows) == n_runs and {row["status"] for row in rows} == {"ok"} and {row["run_warm"] for row in rows} == {bool(warm)}
    return printed(results / row["run_folder"] / "attempt-1.ipynb" for row in rows)


ONE_THREAD = dict(os.environ) | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
WAYS = {
    "papermill command, one loop": lambda folder, n: by_command(folder, n, 1),
    "papermill command, two loops": lambda folder, n: by_command(folder, n, 2),
    "papermill API": by_api,
    "gausssafe batch, 2 jobs, cold": by_batch,
    "gausssafe batch, 2 jobs, --warm torch": lambda folder, n: by_batch(folder, n, "--warm", "torch"),
}


def throughput(n_runs):
    "Seconds and speed of each way, and whether all outputs agree"
    found, outputs = [], []
    with tempfile.TemporaryDirectory() as folder:
        write_notebook(f"{folder}/in.ipynb", SHORT)
        for name, way in WAYS.items():
            began_s = time.perf_counter()
            outputs.append([[text for text in cells if text] for cells in way(folder, n_runs)])
            found.append({"way": name, "runs": n_runs, "seconds": round(time.perf_counter() - began_s, 2)})
            print(found[-1], flush=True)
    for row in found: row["over one loop"], row["over two loops"] = (round(found[k]["seconds"] / row["seconds"], 1) for k in (0, 1))
    return {"rows": found, "identical outputs": all(output == outputs[0] for output in outputs)}


def cleanup(n_runs=10):
    "What a run costs beyond its cells: start, and end"
    with tempfile.TemporaryDirectory() as folder:
        write_notebook(f"{folder}/in.ipynb", STRAY)
        spec = BatchSpec(name="c", memory_limit="600MB", experiments=[{"notebook": f"{folder}/in.ipynb", "grid": {"number": list(range(n_runs))}}])
        result = run_batch(spec, folder, jobs=1, memory="1GB", warm=("json",))
        after = []
        for row in result.rows:
            record = json.loads((result.folder.parent / row["run_folder"] / "attempt-1.result.json").read_text())
            after.append(record["samples"][-1][0] - record["cells"][-1]["start_s"] - record["cells"][-1]["seconds"])
        return {"from the last cell to an empty tree, a stray process and 200 MB included, median s": round(sorted(after)[n_runs // 2], 3)}


def admission(n_runs=24):
    "Runs that declare more than they take, two of which fit by what they declare"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_notebook(f"{folder}/in.ipynb", SLEEPY)
        for declared, budget in ((400_000_000, 900_000_000), (1_000_000_000, 2_200_000_000)):
            seconds, statuses, peaks = {}, [], []
            for jobs in (2, 8):  # two slots, or as many as the peaks of earlier runs leave room for
                spec = BatchSpec(name="admission", memory_limit=declared, experiments=[
                    {"notebook": f"{folder}/in.ipynb", "grid": {"number": list(range(n_runs))}}])
                began_s = time.perf_counter()
                result = run_batch(spec, f"{folder}/{declared}-{jobs}", jobs=jobs, memory=budget, warm=("json",))
                seconds[jobs] = round(time.perf_counter() - began_s, 2)
                statuses += [row["status"] for row in result.rows]
                peaks += [row["run_peak_bytes"] for row in result.rows]
            rows.append({"declared MB": declared / 1e6, "taken MB": round(max(peaks) / 1e6), "memory of the batch MB": budget / 1e6,
                         "two slots, s": seconds[2], "by learned peaks, s": seconds[8], "throughput": round(seconds[2] / seconds[8], 2),
                         "ok": f"{statuses.count('ok')} of {len(statuses)}"})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--only", default="throughput,cleanup,admission")
    parser.add_argument("--out", default="benchmarks/results")
    options = parser.parse_args()
    parts = {"throughput": lambda: throughput(options.runs), "cleanup": cleanup, "admission": admission}
    results = {"machine": {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.system()}}
    for name in options.only.split(","):
        results[name] = parts[name]()
        print(name, json.dumps(results[name], indent=1), flush=True)
    Path(options.out).mkdir(parents=True, exist_ok=True)
    Path(options.out, "batch.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__": main()
